"""How much of a response is what low-bit policies fall into: the same few tokens over and over, or text in no language."""

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

MAX_NGRAM = 32
COPIES = 3
MIN_TOKENS = 8
NEIGHBOURS = 12
SCRIPTS = 3
ERROR = 0.5
"""A response is an error where a larger share of it is a loop, or is garbled."""

_FAMILIES = {
    **dict.fromkeys(("LATIN", "GREEK"), "western"),
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "HANGUL"), "east asian"),
    **{
        name: name
        for name in (
            "CYRILLIC ARMENIAN GEORGIAN HEBREW ARABIC SYRIAC THAANA DEVANAGARI BENGALI GURMUKHI GUJARATI ORIYA TAMIL TELUGU "
            "KANNADA MALAYALAM SINHALA THAI LAO TIBETAN MYANMAR KHMER MONGOLIAN ETHIOPIC CHEROKEE CANADIAN"
        ).split()
    },
}


def repetition_rate(tokens: np.ndarray) -> float:
    """Share of `tokens` [L], any integers, that lie in a loop; 0 of an empty response.

    A loop is an n-gram, n <= 32, that stands there at least 3 times in a row and covers at least 8 tokens: so neither
    "1000" nor "no, no, no" is one. A trailing part of the n-gram belongs to its loop. Our own definition: the papers on
    error tokens give none. (The repetition rules of Gopher's data, arXiv 2112.11446 table A1, count n-grams that occur again
    anywhere; a long derivation repeats its phrases and would be marked by them.)
    """
    tokens = np.asarray(tokens)
    looping = np.zeros(len(tokens), dtype=bool)
    for n in range(1, min(MAX_NGRAM, len(tokens) // COPIES) + 1):
        # Token t continues a loop where it equals token t - n. A run of r such tokens is a loop of r + n tokens.
        continues = tokens[n:] == tokens[:-n]
        shortest = max((COPIES - 1) * n, MIN_TOKENS - n)
        if np.count_nonzero(continues) < shortest:
            continue
        edges = np.flatnonzero(np.diff(continues, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2):
            if end - start >= shortest:
                looping[start : end + n] = True
    return float(looping.mean()) if len(tokens) else 0.0


def garbling_rate(text: str) -> float:
    """Share of the characters of `text`, white space left out, that are damaged or stand in a salad of scripts.

    Damaged: the replacement character U+FFFD, which decoding puts for bytes that are not UTF-8, control characters, and code
    points that are surrogates, private or not assigned. Salad: the letters of 12 words in a row, or of fewer where there are no
    more, that come from 3 scripts or more. A word is a run of letters of one script. Scripts are Unicode's, after
    the mixed-script detection of UTS #39 (section 5.1), told by the names of letters. As there, what is written together
    counts as one: Han, Kana and Hangul; and here Latin and Greek too, for mathematics. Two scripts are how half the world
    writes, three within a dozen words hardly anyone.

    Our own definition: the papers on error tokens show examples and define nothing. It reads the text, not the policy's
    probabilities, so garbage that the policy has come to be sure of counts; wrong words of one script do not.
    """
    total = sum(not character.isspace() for character in text)
    garbled = sum(not character.isspace() and _damaged(character) for character in text)
    words = _words(text) if not text.isascii() else []
    salad = np.zeros(len(words), dtype=bool)
    for start in range(max(len(words) - NEIGHBOURS, 0) + 1):
        window = [script for script, _ in words[start : start + NEIGHBOURS]]
        if len(set(window)) >= SCRIPTS:
            salad[start : start + len(window)] = True
    garbled += sum(length for (_, length), within in zip(words, salad, strict=True) if within)
    return garbled / total if total else 0.0


def is_error(repetition: float, garbling: float) -> bool:
    """Whether a response of these rates counts as one of error tokens."""
    return max(repetition, garbling) > ERROR


def error_token_metrics(repetition: Sequence[float], garbling: Sequence[float]) -> dict[str, float]:
    """Of the responses of a step: the mean rates, and the share of responses that are errors."""
    errors = [is_error(r, g) for r, g in zip(repetition, garbling, strict=True)]
    return {
        "error_tokens/repetition_rate": float(np.mean(repetition or [0.0])),
        "error_tokens/garbling_rate": float(np.mean(garbling or [0.0])),
        "error_tokens/share": float(np.mean(errors or [False])),
    }


def _words(text: str) -> list[tuple[str, int]]:
    """(script, letters) of each run of letters of one script."""
    words: list[tuple[str, int]] = []
    before = ""
    for character in text:
        script = _script(character)
        if script and script == before:
            words[-1] = script, words[-1][1] + 1
        elif script:
            words.append((script, 1))
        before = script
    return words


@cache
def _script(character: str) -> str:
    """The script of a letter or of a mark on it, or "": digits, signs, and letters that mathematics has made its own."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    return _FAMILIES.get(unicodedata.name(character, "").split(" ")[0].split("-")[0], "")


@cache
def _damaged(character: str) -> bool:
    return character == "\N{REPLACEMENT CHARACTER}" or unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn")
