"""The pocket model: tokenizer, demonstrations, warm start, cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qarl.config import PocketConfig
from qarl.shapes import parameter_shapes, pocket_architecture
from qarl.trainer import pocket
from qarl.trainer.pocket import build_model, build_tokenizer, demonstration, demonstrations, pocket_model

reasoning_gym = pytest.importorskip("reasoning_gym")  # not to be had on every GPU machine
BRIEF = PocketConfig(layers=1, steps=3, batch_size=4)
ITEM = {"answer": "7", "metadata": {"expression": "4 - 1 - 7 + 2 + 9"}}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of floats depend on how they are divided among threads; equality of weights is asserted below."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_same_seed_gives_identical_weights_and_another_seed_does_not(tmp_path):
    first = weights(pocket_model(BRIEF, tmp_path / "a"))
    again = weights(pocket_model(BRIEF, tmp_path / "b"))
    other = weights(pocket_model(replace(BRIEF, seed=1), tmp_path / "a"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pocket_model(BRIEF, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_found_model_is_not_trained_again(tmp_path, monkeypatch):
    folder = pocket_model(BRIEF, tmp_path, held_out=["1 + 1 ="])
    monkeypatch.setattr(pocket, "warm_start", lambda *_: pytest.fail("trained again"))
    assert pocket_model(BRIEF, tmp_path, held_out=["1 + 1 ="]) == folder
    with pytest.raises(pytest.fail.Exception):
        pocket_model(BRIEF, tmp_path, held_out=["1 + 2 ="])


def test_a_warm_start_that_dies_leaves_nothing_behind(tmp_path, monkeypatch):
    def die(*_):
        raise RuntimeError("out of power")

    monkeypatch.setattr(pocket, "warm_start", die)
    with pytest.raises(RuntimeError, match="out of power"):
        pocket_model(BRIEF, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_sees_every_step_and_a_falling_loss(tmp_path):
    seen: list[tuple[int, int, float]] = []
    pocket_model(replace(BRIEF, steps=25), tmp_path, progress=lambda *report: seen.append(report))
    assert [(step, steps) for step, steps, _ in seen] == [(step, 25) for step in range(1, 26)]
    assert seen[-1][2] < 0.5 * seen[0][2]


def test_transformers_loads_the_folder_with_config_generation_config_and_template(tmp_path):
    folder = pocket_model(BRIEF, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3" and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    chat = [{"role": "user", "content": "4 - 1 ="}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|user|>4 - 1 =<|end|><|assistant|>"
    )
    assert len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) == 10


def test_tokenizer_round_trips_ascii_one_token_per_character_and_boxed_as_one():
    tokenizer = build_tokenizer(512)
    text = "\n" + "".join(chr(code) for code in range(32, 127))
    assert len(tokenizer(text)["input_ids"]) == len(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    answer = "4-1=3 \\boxed{3}"
    assert len(tokenizer(answer)["input_ids"]) == 6 + 1 + 2
    assert tokenizer.decode(tokenizer(answer + "<|end|>")["input_ids"], skip_special_tokens=True) == answer


def test_a_tokenizer_without_padding_pads_behind_what_is_learnt():
    tokenizer = pocket.build_tokenizer(64)
    pairs = [("1 + 2", "3"), ("1 + 2", "1+2=3 3")]
    expected = pocket.padded(tokenizer, pairs)
    tokenizer.pad_token = None
    tokens, labels = pocket.padded(tokenizer, pairs)
    assert torch.equal(tokens, expected[0]) and torch.equal(labels, expected[1])
    missing = len("1+2=3 3") - len("3")
    assert (labels[0, -missing:] == pocket.IGNORED).all() and (labels[0, -missing - 2 : -missing] >= 0).all()


def test_what_is_not_printable_ascii_becomes_unknown():
    tokenizer = build_tokenizer(512)
    assert tokenizer("a\té☃")["input_ids"] == [tokenizer.convert_tokens_to_ids("a"), *[tokenizer.unk_token_id] * 3]


@pytest.mark.parametrize("experts", [0, 4])
def test_every_linear_layer_takes_a_multiple_of_128_features(experts):
    model = build_model(PocketConfig(experts=experts), build_tokenizer(512))
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all(linear.in_features % 128 == 0 for linear in linears)
    packed = {name: weight.shape for name, weight in model.named_parameters() if weight.ndim == 3}
    assert len(packed) == (2 * 3 if experts else 0)
    assert all(shape[-1] % 128 == 0 for shape in packed.values())


@pytest.mark.parametrize("experts", [0, 4])
def test_a_plan_knows_the_shapes_of_the_model_that_is_made(experts):
    spec = PocketConfig(experts=experts, layers=2)
    with torch.device("meta"):
        model = build_model(spec, build_tokenizer(spec.context))
    made = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert parameter_shapes(pocket_architecture(spec)) == made


def test_demonstrations_show_both_ways_and_end_in_the_answer():
    assert demonstration(ITEM, worked=False) == "\\boxed{7}"
    assert demonstration(ITEM, worked=True) == "4-1=3 3-7=-4 -4+2=-2 -2+9=7 \\boxed{7}"
    stream = demonstrations(PocketConfig(), ())
    answers = [next(stream)[1] for _ in range(1000)]
    # Of 1000 draws a share of 0.42 has a standard deviation of 0.016: three of them.
    assert sum("=" in answer for answer in answers) / 1000 == pytest.approx(PocketConfig().worked_share, abs=0.05)


def test_held_out_prompts_are_never_demonstrated():
    spec = PocketConfig(min_terms=2, max_terms=2)  # 200 problems, so that chance would show every one of them
    items = reasoning_gym.create_dataset("chain_sum", seed=3, size=50, min_terms=2, max_terms=2, max_digits=1)
    held_out = {spec.template.format(**item) for item in items}
    stream = demonstrations(spec, held_out)
    shown = {next(stream)[0] for _ in range(5000)}
    assert len(held_out) > 30 and len(shown) == 200 - len(held_out)
    assert not shown & held_out
