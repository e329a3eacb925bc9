"""Where a completion ends."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qarl.rollout.text import Text


@pytest.fixture
def text(tmp_path: Path) -> Text:
    """Byte-level, as most models are: the euro sign takes three tokens, `</` and `answer` are one each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "</", "answer", "<|end|>", "<|turn|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|end|>"))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=["<|turn|>"]
    ).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 259]}))
    return Text(tmp_path)


def _ids(text: Text, pieces: list[str]) -> list[int]:
    return [text.tokenizer.get_vocab()[piece] for piece in pieces]


def _end(text: Text, tokens: list[int], stop: tuple[str, ...]) -> int | None:
    """Tokens until the stop string is complete."""
    return next((i for i in range(1, len(tokens) + 1) if text.ends_with_stop(tokens[:i], stop)), None)


def test_eos_are_the_tokenizers_and_the_generation_settings(text: Text):
    assert text.eos == {text.tokenizer.eos_token_id, 256, 259}


def test_a_stop_string_may_span_tokens_and_end_inside_one(text: Text):
    tokens = _ids(text, ["a", "</", "answer", ">", "b"])
    assert _end(text, tokens, ("</answer>",)) == 4
    assert _end(text, tokens, ("/ans",)) == 3
    assert _end(text, tokens, ("zzz", "<")) == 2
    assert _end(text, tokens, ("ab",)) is None
    assert _end(text, tokens, ()) is None


def test_a_stop_string_may_be_a_character_of_several_tokens(text: Text):
    euro = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("€")[0][0]
    assert len(euro) == 3
    tokens = _ids(text, ["a", *euro, "b"])
    assert _end(text, tokens, ("€",)) == 4


def test_a_stop_string_may_end_in_white_space(text: Text):
    tokens = _ids(text, ["a", "Ġ", "Ċ", "Ċ", "b"])  # space, newline, newline
    assert _end(text, tokens, ("\n\n",)) == 4
    assert _end(text, tokens, ("a ",)) == 2


def test_special_tokens_are_left_out_of_the_text(text: Text):
    assert text.decode([_ids(text, ["a", "<|end|>"]), _ids(text, ["b"])]) == ["a", "b"]


def test_generation_settings_are_optional_but_broken_ones_are_an_error(text: Text, tmp_path: Path):
    settings = tmp_path / "generation_config.json"
    settings.unlink()
    assert Text(tmp_path).eos == {text.tokenizer.eos_token_id}
    settings.write_text("{")
    with pytest.raises((OSError, ValueError)):
        Text(tmp_path)
