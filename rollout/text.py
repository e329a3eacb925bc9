"""Tokens and text: where a completion ends, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file


class Text:
    """The tokenizer of a model, as an engine needs it."""

    def __init__(self, path: str | Path, revision: str | None = None) -> None:
        """`path`: a folder, or a hub name at `revision`."""
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, revision=revision)
        self.eos = _eos_tokens(path, revision, self.tokenizer)
        """Ids of the tokens that end a completion: the tokenizer's and those of the model's generation settings."""
        self._of_token: dict[int, str] = {}

    def decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """What each completion says, special tokens left out."""
        options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.batch_decode([list(tokens) for tokens in completions], **options)

    def ends_with_stop(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the last token completes one of the strings. Ask after each token: an earlier one is not looked for."""
        if not stop or not self._may_complete(tokens[-1], stop):
            return False
        # A character takes up to four tokens (one a byte), and a string may begin inside a token.
        window = tokens[-(4 * max(map(len, stop)) + 4) :]
        text = self.decode([window])[0]
        return any(string in text for string in stop)

    def _may_complete(self, token: int, stop: Sequence[str]) -> bool:
        """Cheap and never wrong when it says no. White space and partial characters decode otherwise on their own."""
        if token not in self._of_token:
            self._of_token[token] = self.decode([[token]])[0]
        text = self._of_token[token]
        return "\ufffd" in text or any(string[-1].isspace() or string[-1] in text for string in stop)


def _eos_tokens(path: str | Path, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    found: set[int] = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    there = cached_file(
        str(path), "generation_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    # It is optional: what is there and cannot be read is an error.
    configured = GenerationConfig.from_pretrained(path, revision=revision or "main").eos_token_id if there else None
    if configured is not None:
        found.update([configured] if isinstance(configured, int) else configured)
    return frozenset(found)
