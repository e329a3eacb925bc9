import json
import re
from dataclasses import replace

import pytest

from qarl.config import DatasetConfig, FieldsConfig
from qarl.data import load_rows
from qarl.errors import ConfigError

ROWS = [{"question": f"{i} + 1?", "answer": i + 1, "level": "easy"} for i in range(5)]
KEY = "data.train"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` converts files into its cache; the user's is none of ours."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    return path


@pytest.fixture
def parquet(tmp_path):
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path


def refused(config: DatasetConfig, *says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_rows(config, KEY)
    for text in says:
        assert text in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_give_their_rows_in_order(kind, request):
    source = str(request.getfixturevalue(kind))
    rows = load_rows(DatasetConfig(source=source, fields=FieldsConfig(extras=("level",))), KEY)
    assert [(row.question, row.answer, row.extras) for row in rows] == [
        (f"{i} + 1?", str(i + 1), {"level": "easy"}) for i in range(5)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_size_takes_the_first_rows_and_refuses_more_than_there_are(kind, request):
    config = DatasetConfig(source=str(request.getfixturevalue(kind)), size=3)
    assert [row.answer for row in load_rows(config, KEY)] == ["1", "2", "3"]
    refused(replace(config, size=6), "data.train.size: 6 rows asked for", "has 5")


def test_hub_names_go_through_datasets_with_name_split_and_revision(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DatasetConfig(source="openai/gsm8k", split="test", options={"name": "main", "revision": "abc"})
    assert len(load_rows(config, KEY)) == 5
    assert calls == [("openai/gsm8k", {"split": "test", "name": "main", "revision": "abc"})]
    refused(replace(config, options={"nam": "main"}), "data.train.options.nam", "did you mean 'name'", "revision")


def test_a_folder_in_hub_layout_is_read_with_its_splits(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = DatasetConfig(source=str(folder), split="test")
    assert [row.answer for row in load_rows(config, KEY)] == ["1", "2"]
    refused(replace(config, split="validation"), "data.train.split: 'validation'", "test", "train")


def test_a_hub_name_that_does_not_exist_is_named(monkeypatch):
    import datasets

    def load_dataset(path, **_):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("no/such", "no/splitting-headaches"):
        refused(DatasetConfig(source=name), f"data.train.source: '{name}'", "doesn't exist on the Hub")


def test_procedural_rows_are_those_of_reasoning_gym():
    import reasoning_gym

    options = {"min_terms": 2, "max_terms": 3}
    config = DatasetConfig(source="reasoning_gym:chain_sum", size=4, seed=5, options=options)
    rows = load_rows(config, KEY)
    theirs = reasoning_gym.create_dataset("chain_sum", size=4, seed=5, **options)
    assert [(row.question, row.answer) for row in rows] == [(item["question"], item["answer"]) for item in theirs]
    assert rows[0].extras["task"] == "chain_sum"
    assert rows[0].extras["options"] == options
    assert rows[0].extras["metadata"] == theirs[0]["metadata"]
    assert [row.question for row in load_rows(replace(config, seed=6), KEY)] != [row.question for row in rows]


def test_procedural_mistakes_are_named():
    good = DatasetConfig(source="reasoning_gym:chain_sum", size=2)
    refused(
        replace(good, source="reasoning_gym:chain_sums"),
        "data.train.source",
        "'chain_sums'",
        "did you mean 'chain_sum'",
        "countdown",
    )
    refused(replace(good, size=None), "data.train.size: must be given")
    refused(replace(good, split="test"), "data.train.split: 'test', but a task has no splits")
    refused(replace(good, options={"max_term": 3}), "data.train.options.max_term", "did you mean 'max_terms'")
    refused(replace(good, options={"seed": 3}), "data.train.options.seed")
    refused(replace(good, options={"min_terms": 5, "max_terms": 2}), "data.train.options", "chain_sum")
    refused(replace(good, options={"min_terms": "two"}), "data.train.options", "two")


def test_template_is_filled_from_the_fields_of_the_row(jsonl):
    config = DatasetConfig(source=str(jsonl), size=1, template="[{level}] {prompt} Answer in \\boxed{{}}.")
    assert load_rows(config, KEY)[0].message == "[easy] 0 + 1? Answer in \\boxed{}."
    nested = DatasetConfig(source="reasoning_gym:chain_sum", size=1, template="{metadata[expression]} =")
    row = load_rows(nested, KEY)[0]
    assert re.fullmatch(r"[-+0-9 ]+ =", row.message)


@pytest.mark.parametrize("template", ["{promt}", "{prompt} \\boxed{}", "{prompt", "{level[x]}", "{prompt.nothing}"])
def test_templates_that_cannot_be_filled_are_refused(jsonl, template):
    config = DatasetConfig(source=str(jsonl), template=template)
    refused(config, "data.train.template", repr(template), "row 0", "level", "prompt")


def test_unknown_fields_name_the_key_the_value_and_what_exists(jsonl):
    config = DatasetConfig(source=str(jsonl))
    refused(
        replace(config, fields=FieldsConfig(prompt="questoin")),
        "data.train.fields.prompt",
        "'questoin'",
        "did you mean 'question'",
        "choices: answer, level, question",
    )
    refused(replace(config, fields=FieldsConfig(answer="solution")), "data.train.fields.answer", "'solution'")
    refused(replace(config, fields=FieldsConfig(extras=("level", "nope"))), "data.train.fields.extras[1]", "'nope'")


def test_fields_inside_of_fields_are_found_by_their_path(tmp_path, composed):
    """A row in the layout of the target recipe's data set (verl's), read as that recipe reads it."""
    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 1 + 1?"}]
    row = {
        "data_source": "Numina",
        "prompt": turns,
        "target": [{"role": "assistant", "content": "Two."}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 7, "split": "train"},
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    recipe = composed("recipe=qwen3_30b_a3b_math_w4a16").data.train
    fields = replace(recipe.fields, extras=("extra_info.index",))
    (read,) = load_rows(replace(recipe, source=str(path), fields=fields), KEY)
    assert (read.question, read.answer, read.extras) == ("What is 1 + 1?", "2", {"extra_info.index": 7})
    assert read.message.startswith("What is 1 + 1?\n\nReason step by step")
    config = DatasetConfig(source=str(path))
    for prompt in ("prompt.2.content", "prompt.one.content", "prompt.1.text", "data_source.1.content"):
        refused(
            replace(config, fields=FieldsConfig(prompt=prompt)),
            "data.train.fields.prompt: row 0",
            f"no field '{prompt}'",
        )


def test_a_field_whose_name_has_dots_is_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a.b": "2 + 2", "a": {"b": "3 + 3"}, "answer": 4}) + "\n")
    fields = FieldsConfig(prompt="a.b")
    assert load_rows(DatasetConfig(source=str(path), fields=fields), KEY)[0].question == "2 + 2"


@pytest.mark.parametrize(
    "row, says",
    [
        ({"question": ["4"], "answer": "4"}, "data.train.fields.prompt: 'question' of row 1"),
        ({"question": "2+2", "answer": None}, "data.train.fields.answer: 'answer' of row 1"),
        ({"question": "2+2", "answer": ["4"]}, "data.train.fields.answer: 'answer' of row 1"),
        ({"question": "2+2"}, "row 1"),
    ],
)
def test_rows_without_question_or_answer_are_named(tmp_path, row, says):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    refused(DatasetConfig(source=str(path)), says)


@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"question": ', "rows.jsonl:3: not JSON"),
        (b"\xff\xfe", "rows.jsonl:3: not JSON"),
        (b"[1, 2]", "rows.jsonl:3: expected an object, got list"),
    ],
)
def test_broken_lines_are_named_by_file_and_number(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + line + b"\n")
    refused(DatasetConfig(source=str(path)), "data.train.source", says)


def test_broken_parquet_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    refused(DatasetConfig(source=str(path)), "data.train.source", "rows.parquet")


def test_sources_that_give_nothing_are_refused(tmp_path):
    empty, text = tmp_path / "empty.jsonl", tmp_path / "rows.csv"
    empty.write_text("\n")
    text.write_text("question,answer\n")
    refused(DatasetConfig(), "data.train.source: must be given", "reasoning_gym:TASK")
    refused(DatasetConfig(source=str(empty)), "data.train.source", "is empty")
    refused(DatasetConfig(source=str(text)), "data.train.source", "neither .jsonl nor .parquet")
    refused(DatasetConfig(source=str(tmp_path / "none.jsonl")), "data.train.source: no such file", "none.jsonl")
    refused(DatasetConfig(source=str(tmp_path / "none.parquet")), "data.train.source: no such file", "none.parquet")


def test_settings_that_mean_nothing_to_a_file_are_refused(jsonl):
    refused(DatasetConfig(source=str(jsonl), options={"name": "main"}), "data.train.options", "'main'")
    refused(DatasetConfig(source=str(jsonl), split="test"), "data.train.split: 'test'")


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_that_is_not_positive_is_refused_by_its_key(jsonl, size):
    with pytest.raises(ConfigError, match=rf"data\.heldout\.size: must be positive or null, got {size}"):
        load_rows(DatasetConfig(source=str(jsonl), size=size), "data.heldout")


def test_numbers_are_answers_in_digits(tmp_path):
    """LaTeX reads 1e-05 as the number e."""
    path = tmp_path / "rows.jsonl"
    numbers = (0.00001, 2.5e-05, 1e16, 18.0, 0.1, -3, 7)
    path.write_text("".join(json.dumps({"question": "q", "answer": number}) + "\n" for number in numbers))
    answers = [row.answer for row in load_rows(DatasetConfig(source=str(path)), KEY)]
    assert answers == ["0.00001", "0.000025", "10000000000000000.0", "18.0", "0.1", "-3", "7"]
