import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qarl.config import DataConfig, DatasetConfig
from qarl.errors import CheckpointError, ConfigError
from qarl.prompts import PromptSets, PromptStream, read, to_prompts
from qarl.records import Prompt

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character, `^` in front of texts that are no chat."""
    characters = [chr(c) for c in range(32, 127)]
    model = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.post_processor = processors.TemplateProcessing("^ $A", special_tokens=[("^", characters.index("^"))])
    made = PreTrainedTokenizerFast(tokenizer_object=model)
    made.chat_template = CHAT
    return made


@pytest.fixture
def files(tmp_path):
    def write(name: str, questions: list[str]) -> DatasetConfig:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
        return DatasetConfig(source=str(path))

    return write


def data(train: DatasetConfig, heldout: DatasetConfig, **changes) -> DataConfig:
    return DataConfig(train=train, heldout=heldout, **changes)


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> PromptSets:
    return to_prompts(read(config), config, tokenizer)


def test_prompts_carry_the_chat_template_and_its_tokens(files, tokenizer):
    train = DatasetConfig(source=files("train", ["a", "b"]).source, system="be brief", template="{prompt}?")
    sets = load_prompts(data(train, files("heldout", ["c"])), tokenizer)
    assert [p.text for p in sets.train] == [
        "<system>be brief<user>a?<assistant>",
        "<system>be brief<user>b?<assistant>",
    ]
    assert sets.heldout[0].text == "<user>c<assistant>"
    for prompt in (*sets.train, *sets.heldout):
        assert prompt.tokens.dtype == np.int32
        assert tokenizer.decode(prompt.tokens).replace(" ", "") == prompt.text.replace(" ", "")
    assert [p.id for p in sets.train] == [0, 1]
    assert sets.train[0].answer == "1"


def test_without_chat_the_tokenizers_own_special_tokens_are_added(files, tokenizer):
    sets = load_prompts(data(files("train", ["ab"]), files("heldout", ["c"]), chat=False), tokenizer)
    assert sets.train[0].text == "ab"
    assert [tokenizer.convert_ids_to_tokens(int(t)) for t in sets.train[0].tokens] == ["^", "a", "b"]


def test_training_rows_that_are_held_out_are_left_out_and_counted(files, tokenizer):
    sets = load_prompts(data(files("train", ["a", "b", "c", "b"]), files("heldout", ["b", "z"])), tokenizer)
    assert [p.text for p in sets.train] == ["<user>a<assistant>", "<user>c<assistant>"]
    assert [p.id for p in sets.train] == [0, 1]
    assert (sets.overlap, sets.overlong) == (2, 0)


def test_overlap_is_found_through_different_templates(files, tokenizer):
    train = DatasetConfig(source=files("train", ["a", "b"]).source, template="Now: {prompt}")
    assert load_prompts(data(train, files("heldout", ["b"])), tokenizer).overlap == 1


def test_nothing_left_to_train_on_is_an_error(files, tokenizer):
    with pytest.raises(ConfigError, match=r"data\.train: all 2 rows .* also stand in data\.heldout"):
        load_prompts(data(files("train", ["a", "a"]), files("heldout", ["a"])), tokenizer)


def test_long_prompts_are_refused_by_row_or_dropped_and_counted(files, tokenizer):
    sources = files("train", ["a", "b" * 50, "c"]), files("heldout", ["d" * 60, "e"])
    with pytest.raises(
        ConfigError, match=r"data\.max_prompt_tokens: 40, but row 1 of data\.train \('bbb.* has 67 tokens"
    ):
        load_prompts(data(*sources, max_prompt_tokens=40), tokenizer)
    sets = load_prompts(data(*sources, max_prompt_tokens=40, overlong="drop"), tokenizer)
    assert [p.text for p in sets.train] == ["<user>a<assistant>", "<user>c<assistant>"]
    assert [p.text for p in sets.heldout] == ["<user>e<assistant>"]
    assert [p.id for p in sets.train] == [0, 1]
    assert sets.overlong == 2
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens: 5, and all 3 rows of data\.train are longer"):
        load_prompts(data(*sources, max_prompt_tokens=5, overlong="drop"), tokenizer)
    exactly = load_prompts(data(*sources, max_prompt_tokens=77), tokenizer)
    assert max(len(p.tokens) for p in exactly.heldout) == 77


def test_what_the_tokenizer_cannot_do_is_a_config_error(files, tokenizer):
    sets = files("train", ["a"]), files("heldout", ["b"])
    system = DatasetConfig(source=sets[0].source, system="be brief")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match=r"data\.chat: true, but .* no chat template"):
        load_prompts(data(*sets), bare)
    with pytest.raises(ConfigError, match=r"data\.train\.system: 'be brief' needs data\.chat=true"):
        load_prompts(data(system, sets[1], chat=False), tokenizer)
    bare.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
    )
    with pytest.raises(ConfigError, match=r"data\.train\.system: 'be brief' is refused .* no system role"):
        load_prompts(data(system, sets[1]), bare)


def test_an_empty_prompt_is_refused(files, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    with pytest.raises(ConfigError, match=r"data\.train: row 1 \(''\) is an empty prompt"):
        load_prompts(data(files("train", ["a", ""]), files("heldout", ["b"]), chat=False), bare)


# --- the stream --------------------------------------------------


def prompts(n: int, answer: str = "1") -> list[Prompt]:
    return [Prompt(i, str(i), np.array([i + 1], np.int32), answer) for i in range(n)]


def texts(taken: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in taken]


@given(n=st.integers(1, 9), seed=st.integers(-3, 2**63), batches=st.lists(st.integers(0, 25), max_size=6))
def test_every_pass_holds_every_prompt_once_however_it_is_cut(n, seed, batches):
    stream = PromptStream(prompts(n), seed)
    taken = [prompt for size in batches for prompt in stream.take(size)]
    assert [prompt.id for prompt in taken] == list(range(sum(batches)))
    whole = PromptStream(prompts(n), seed).take(sum(batches))
    assert texts(taken) == texts(whole)
    for start in range(0, len(taken) - n + 1, n):
        assert sorted(texts(taken[start : start + n]), key=int) == [str(i) for i in range(n)]


@given(n=st.integers(1, 9), data=st.data(), shuffle=st.booleans())
def test_resuming_anywhere_equals_the_uninterrupted_stream(n, data, shuffle):
    before = data.draw(st.sampled_from([0, 1, n - 1, n, n + 1, 2 * n, 3 * n]) | st.integers(0, 40))
    after = data.draw(st.integers(1, 30))
    uninterrupted = PromptStream(prompts(n), 7, shuffle)
    uninterrupted.take(before)
    saved = json.dumps(uninterrupted.state())
    expected = uninterrupted.take(after)
    resumed = PromptStream(prompts(n), 7, shuffle)
    resumed.take(data.draw(st.integers(0, 5)))
    resumed.restore(json.loads(saved))
    got = resumed.take(after)
    assert [(p.id, p.text) for p in got] == [(p.id, p.text) for p in expected]
    assert resumed.state() == uninterrupted.state()


def test_passes_and_seeds_differ_in_order():
    n = 50
    stream = PromptStream(prompts(n), seed=1)
    first, second = texts(stream.take(n)), texts(stream.take(n))
    other = texts(PromptStream(prompts(n), seed=2).take(n))
    assert first != second and first != other and second != other
    assert first == texts(PromptStream(prompts(n), seed=1).take(n))


def test_the_order_is_that_of_philox_raw_words():
    """Pinned: a checkpoint must be continued by later versions of NumPy and of QaRL."""
    two_passes = texts(PromptStream(prompts(8), seed=3).take(16))
    assert two_passes == [*"61527430", *"73564021"]


def test_without_shuffle_the_data_sets_order_is_kept():
    assert texts(PromptStream(prompts(3), seed=1, shuffle=False).take(7)) == ["0", "1", "2", "0", "1", "2", "0"]


@pytest.mark.parametrize(
    "other, says",
    [
        (PromptStream(prompts(5), 1), "size"),
        (PromptStream(prompts(4, answer="2"), 1), "fingerprint"),
        (PromptStream(prompts(5)[1:], 1), "fingerprint"),
        (PromptStream(prompts(4)[::-1], 1), "fingerprint"),
        (PromptStream(prompts(4), 2), "seed"),
        (PromptStream(prompts(4), 1, shuffle=False), "shuffle"),
    ],
)
def test_a_stream_of_other_prompts_or_order_is_not_continued(other, says):
    saved = PromptStream(prompts(4), 1)
    saved.take(3)
    with pytest.raises(CheckpointError, match=f"has {says} "):
        other.restore(saved.state())
    assert other.take(1)[0].id == 0


@pytest.mark.parametrize("taken", [None, -1, "3"])
def test_a_state_without_position_is_not_continued(taken):
    stream = PromptStream(prompts(4), 1)
    with pytest.raises(CheckpointError, match="no valid position"):
        stream.restore(stream.state() | {"taken": taken})


def test_a_stream_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream([], 0)
