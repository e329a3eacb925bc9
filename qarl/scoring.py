"""Scores: how right one response is, as functions (response, answer, extras) -> float.

They may loop for ever or take all memory: call them through `qarl.rewards`, which runs them where they can be killed.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from itertools import product

Score = Callable[[str, str, Mapping[str, object]], float]

BOXED = re.compile(r"\\f?boxed\s*{")
DOLLAR = re.compile(r"(?<!\\)\$")
INTEGER = re.compile(r"-?[0-9]{1,18}")
BRACES = re.compile(BOXED.pattern + r"|\\[{}]|[{}]")


def exact(response: str, answer: str, extras: Mapping[str, object]) -> float:
    """1 where the last line that is not empty is the answer, up to white space around both."""
    lines = response.strip().splitlines()
    return float(bool(lines) and lines[-1].strip() == answer.strip())


def math(response: str, answer: str, extras: Mapping[str, object]) -> float:
    """1 where math-verify finds the last `\\boxed{}` equal to `answer`, or without one what it takes for the response's answer:
    what follows "answer is", else the last number or expression.

    `answer` is LaTeX or a number; of GSM8K's worked answers, what follows `####`. Raises `ValueError` where it is no
    mathematics (nothing could ever equal it), and `MemoryError`; whatever else a response does to the parser makes it
    wrong.
    """
    from math_verify import verify

    answer = answer.rsplit("####", 1)[-1].strip()
    boxed = last_boxed(response)
    claim = (response if boxed is None else boxed).strip()
    if INTEGER.fullmatch(answer) and INTEGER.fullmatch(claim):  # the parser takes milliseconds
        return float(int(answer) == int(claim))
    gold = _gold(answer)
    try:
        found = _parse(response if boxed is None else f"\\boxed{{{boxed}}}")
    except MemoryError:
        raise
    except Exception:
        return 0.0
    for one, other in product(gold, found):
        try:
            # Without its own timeout, signal.alarm: that works in main threads only, and each response has ours.
            if verify(one, other, timeout_seconds=None, raise_on_error=True):
                return 1.0
        except MemoryError:
            raise
        except Exception:
            continue
    return 0.0


def reasoning_gym(response: str, answer: str, extras: Mapping[str, object]) -> float:
    """The task's own score, 0 to 1, of what stands in the last `<answer>` tag, or without one of the stripped response.

    `extras` as `qarl.data` makes them of `reasoning_gym:` sources.
    """
    from reasoning_gym.utils import extract_answer

    found = extract_answer(response)
    entry = {"question": extras["question"], "answer": answer, "metadata": extras["metadata"]}
    task = _task(str(extras["task"]), json.dumps(extras["options"], sort_keys=True, default=list))
    return float(task.score_answer(response.strip() if found is None else found, entry))


SCORES: dict[str, Score] = {"exact": exact, "math": math, "reasoning_gym": reasoning_gym}
MODULES = {"exact": (), "math": ("math_verify",), "reasoning_gym": ("reasoning_gym",)}
"""What a kind imports when it is first called, in seconds."""


def last_boxed(text: str) -> str | None:
    """What stands in the complete `\\boxed{…}` that begins last, braces balanced; `None` without one."""
    open_at: list[int | None] = []
    best = (-1, -1)
    for brace in BRACES.finditer(text):
        if brace[0] == "}":
            start = open_at.pop() if open_at else None
            if start is not None:
                best = max(best, (start, brace.start()))
        elif brace[0].endswith("{") and brace[0] != "\\{":
            open_at.append(None if brace[0] == "{" else brace.end())
    return text[slice(*best)] if best[0] >= 0 else None


@lru_cache(maxsize=4096)
def _gold(answer: str) -> list:
    gold = _parse(answer if DOLLAR.search(answer) or BOXED.search(answer) else f"${answer}$")
    if not gold:
        raise ValueError(f"the answer {answer[:80]!r} is not mathematics")
    return gold


def _parse(text: str) -> list:
    from math_verify import parse

    _quiet()
    return parse(text, parsing_timeout=None, raise_on_error=True)


@cache
def _quiet() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeout is off


@lru_cache(maxsize=64)
def _task(name: str, options: str):
    """Made with the options of the data set, which some tasks' scorers read."""
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, **json.loads(options))
