"""Repetition rate against a slow definition read off the docstring; both rates on labelled texts, right ones and wrong ones."""

import re
from pathlib import Path

import numpy as np
import pytest

from qarl import error_tokens
from qarl.error_tokens import (
    COPIES,
    MAX_NGRAM,
    MIN_TOKENS,
    error_token_metrics,
    garbling_rate,
    is_error,
    repetition_rate,
)


def brute_force(tokens: list[int]) -> float:
    """Every window [i, j) that some n <= 32 tiles at least 3 times, over at least 8 tokens."""
    inside = set()
    for n in range(1, MAX_NGRAM + 1):
        for i in range(len(tokens)):
            j = i + n
            while j < len(tokens) and tokens[j] == tokens[j - n]:
                j += 1
            if j - i >= max(COPIES * n, MIN_TOKENS):
                inside |= set(range(i, j))
    return len(inside) / len(tokens) if tokens else 0.0


def test_equals_the_definition_on_random_sequences_with_planted_loops():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        loop = rng.integers(0, 5, rng.integers(1, 40)).tolist() * int(rng.integers(0, 6))
        tokens = rng.integers(0, 4, rng.integers(0, 30)).tolist() + loop + rng.integers(0, 4, 7).tolist()
        expected = brute_force(tokens)
        seen.add(expected > 0)
        assert repetition_rate(np.array(tokens, np.int32)) == pytest.approx(expected, abs=1e-12)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        ([], 0.0),
        ([7], 0.0),
        ([1, 0, 0, 0], 0.0),  # "1000"
        ([5, 9] * 3, 0.0),  # "no, no, no"
        ([5] * 8, 1.0),
        ([1, 2, 3, 4] + [5, 9] * 4, 8 / 12),
        (list(range(100)), 0.0),
        (list(range(32)) * 3, 1.0),
        (list(range(33)) * 3, 0.0),  # longer than the longest n-gram looked for
    ],
)
def test_known_sequences(tokens: list[int], rate: float):
    assert repetition_rate(np.array(tokens, np.int32)) == pytest.approx(rate)


MIXED = "the sum of 苹果 привет and number สวัสดี is الان then 数 equals кот"
RIGHT = {
    "a long derivation": " ".join(
        f"Step {i}: add {i} to {i * (i - 1) // 2}, which gives {i * (i + 1) // 2}, so the sum so far is {i * (i + 1) // 2}."
        for i in range(1, 60)
    ),
    "a column of additions": "\n".join(f"{a} + {a + 3} = {2 * a + 3}" for a in range(7, 300)),
    "one digit at a time": "\n".join(f"{i} + 1 = {i + 1}" for i in range(120)),
    "a table": "| n | n² | n³ |\n|---|---|---|\n" + "\n".join(f"| {n} | {n**2} | {n**3} |" for n in range(40)),
    "a table of zeros and ones": "\n".join(f"{i & 1} {i >> 1 & 1} {i >> 2 & 1} | {i % 3 == 0:d}" for i in range(8)),
    "code": Path(error_tokens.__file__).read_text(),
    "LaTeX": r"\begin{aligned} \int_0^1 x^n\,dx &= \frac{1}{n+1} \\ \sum_{k=1}^{n} k &= \frac{n(n+1)}{2} \end{aligned}",
    "mathematics": "For all ε > 0 there is δ > 0 with |x − ξ| < δ ⇒ |f(x) − f(ξ)| < ε. ℵ₀ < 2^ℵ₀, 𝑓: ℝ → ℂ, 2πr, Δx ≤ 3 µm.",
    "Chinese with English terms": "使用 NumPy 计算矩阵的特征值,然后用 matplotlib 画图。答案是 λ = 3。" * 2,
    "Japanese": "まず x を求めます。カタカナとひらがなと漢字、それに English が混ざります。",
    "Russian about Python": "Вызовите функцию print в Python и получите ответ: сумма равна 42.",
    "Hindi": "योग का मान ज्ञात कीजिए और उत्तर को boxed में लिखिए",
    "a short answer": "1000",
    "nothing": "",
}
LOOPS = {
    "one word": "The engine " + "to " * 60,
    "a sentence": "So the answer is 12. " + "Let me check that again. " * 20,
    "the end of a derivation": "\n".join(f"{a} + 1 = {a + 1}" for a in range(10)) + "\n9 + 1 = 10" * 30,
    "brackets": "f(x) = " + "}" * 200,
}
GARBAGE = {
    "salad of scripts": MIXED,
    "salad that looks like a derivation": f"Step 1: {MIXED}. Step 2: {MIXED[::-1]}.",
    "bytes that are no text": bytes(range(128, 256)).decode(errors="replace"),
    "control characters": "x = " + "".join(map(chr, (1, 2, 3, 4, 5, 6, 7, 8, 14, 15))),
    "private and unassigned": "ok " + "\ue000\uf8ff\U000f0000\U000effff" * 3,
}


def tokens_of(text: str) -> np.ndarray:
    """Digits and signs one by one, other words whole: about as tokenizers do."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(t, len(known)) for t in re.findall(r"\d|[^\W\d]+|\s+|.", text)], np.int32)


@pytest.mark.parametrize("name", RIGHT)
def test_right_text_is_left_alone(name: str):
    assert garbling_rate(RIGHT[name]) == 0
    assert repetition_rate(tokens_of(RIGHT[name])) < 0.05
    assert repetition_rate(np.array([ord(c) for c in RIGHT[name]])) < 0.1  # a tokenizer of characters


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_found_and_are_not_garbled(name: str):
    repetition, garbling = repetition_rate(tokens_of(LOOPS[name])), garbling_rate(LOOPS[name])
    assert is_error(repetition, garbling) and repetition > 0.5 and garbling == 0


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_found(name: str):
    assert garbling_rate(GARBAGE[name]) > 0.5 and is_error(0, garbling_rate(GARBAGE[name]))


def test_salad_marks_words_near_it_and_no_others():
    """Twelve words in a row with a third script: it reaches eleven words to either side, not the derivation before."""
    before = "and so it goes on " * 20
    text = before + "яблоко 苹果 " + before
    letters = lambda words: sum(len(w) for w in words)  # noqa: E731
    near = letters(before.split()[-10:]) + letters(before.split()[:10]) + letters(["яблоко", "苹果"])
    assert garbling_rate(text) == pytest.approx(near / letters(text.split()), rel=1e-12)
    assert garbling_rate(before + "яблоко " + before) == 0


def test_metrics_are_mean_rates_and_the_share_of_errors():
    found = error_token_metrics([1.0, 0.5, 0.0, 0.0], [0.0, 0.5, 0.75, 0.0])
    assert found == {
        "error_tokens/repetition_rate": 1.5 / 4,
        "error_tokens/garbling_rate": 1.25 / 4,
        "error_tokens/share": 0.5,
    }
    assert set(error_token_metrics([], []).values()) == {0.0}
