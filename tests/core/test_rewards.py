import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from qarl import scoring
from qarl.config import DatasetConfig, RewardConfig
from qarl.data import load_rows
from qarl.errors import ConfigError
from qarl.records import Prompt
from qarl.rewards import CHUNK, WARM_UP, Rewarder

HERE = str(Path(__file__).parent)


def prompt(answer: str, **extras: object) -> Prompt:
    return Prompt(0, "", np.zeros(1, np.int32), answer, extras)


@pytest.fixture
def hostile(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("hostile_score")


@pytest.fixture(scope="module")
def maths():
    with Rewarder(RewardConfig(workers=2, timeout_s=10.0)) as rewarder:
        yield rewarder


# --- what is right -----------------------------------------------

RIGHT = [
    ("42", "42"),
    (" 42\n", "42"),
    ("007", "7"),
    ("First 3 + 4 = 7, then 7 * 6. The answer is 42.", "42"),
    (r"so \boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{1} was wrong, it is \boxed{2}", "2"),
    (r"\boxed{2}, which I checked in 3 ways", "2"),
    ("final answer is 12. No wait, 13", "12"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}"),
    ("1,234", "1234"),
    ("it is 72", "She sold 48/2 = <<48/2=24>>24 clips.\n#### 72"),
    ("$-7$", "-7"),
]
WRONG = [
    ("", "42"),
    ("41", "42"),
    ("42 and then 43", "42"),
    ("final answer is 12. No wait, 13", "13"),
    (r"\boxed{42} no, \boxed{43}", "42"),
    (r"\boxed{} 42", "42"),
    ("no number at all", "42"),
    ("-7", "7"),
    (r"\boxed{\frac{1}{3}}", "0.5"),
]


def test_math_gives_one_to_right_answers_and_zero_to_wrong_ones_in_order(maths):
    cases = [(r, a, 1.0) for r, a in RIGHT] + [(r, a, 0.0) for r, a in WRONG]
    rewards = maths.score([r for r, _, _ in cases], [prompt(a) for _, a, _ in cases])
    assert [(r, a, v) for (r, a, _), v in zip(cases, rewards.values, strict=True)] == cases
    assert rewards.values.dtype == np.float64
    assert (rewards.timeouts, rewards.crashes) == (0, 0)


@pytest.mark.parametrize("claim", ["7", "-7", "007", "70", "0", "-0"])
@pytest.mark.parametrize("answer", ["7", "-7", "0", "70"])
def test_the_short_way_for_integers_agrees_with_math_verify(claim, answer):
    from math_verify import parse, verify

    gold, found = (parse(f"${text}$", parsing_timeout=None) for text in (answer, claim))
    assert scoring.math(claim, answer, {}) == float(verify(gold, found, timeout_seconds=None))


def test_math_verify_works_off_the_main_thread_and_sets_no_alarm(monkeypatch):
    def refuse(*_):
        raise AssertionError("signal.alarm was called")

    monkeypatch.setattr(signal, "alarm", refuse)
    values = []
    thread = threading.Thread(target=lambda: values.append(scoring.math(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", {})))
    thread.start()
    thread.join()
    assert values == [1.0]


def test_rewarder_works_off_the_main_thread(maths):
    results = []
    thread = threading.Thread(target=lambda: results.append(maths.score([r"\boxed{0.25}", "3"], [prompt("1/4")] * 2)))
    thread.start()
    thread.join()
    assert results[0].values.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("answer", [r"\$18.90", "$18.90$", "18.90"])
def test_an_escaped_dollar_is_money_and_no_delimiter(answer):
    assert scoring.math(r"\boxed{\$18.90}", answer, {}) == 1.0


def test_an_answer_that_is_no_mathematics_is_counted_and_said(maths, caplog):
    rewards = maths.score(["4", "4"], [prompt(""), prompt("4")])
    assert rewards.values.tolist() == [0.0, 1.0]
    assert (rewards.timeouts, rewards.crashes) == (0, 1)
    assert "is not mathematics" in caplog.text


def test_a_million_digits_are_survived(maths):
    digits = "9" * 1_000_000
    responses = [digits, f"\\boxed{{{digits}}}", "1" + digits, "7"]
    rewards = maths.score(responses, [prompt("7")] * 4)
    assert rewards.values.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_only_the_end_of_a_response_is_looked_at():
    with Rewarder(RewardConfig(kind="exact", workers=1, max_chars=10)) as rewarder:
        rewards = rewarder.score(["7\n" + "x" * 10, "x" * 1000 + "\n7"], [prompt("7")] * 2)
    assert rewards.values.tolist() == [0.0, 1.0]


def test_exact_compares_the_last_line_that_is_not_empty():
    assert scoring.exact("thinking\n  yes \n\n", "yes", {}) == 1.0
    assert scoring.exact("yes\nno", "yes", {}) == 0.0
    assert scoring.exact(" \n", "", {}) == 0.0


def test_last_boxed_balances_braces():
    assert scoring.last_boxed(r"\boxed{a} \boxed{b{c}d} e") == "b{c}d"
    assert scoring.last_boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert scoring.last_boxed(r"\boxed{1} then \boxed{2") == "1"
    assert scoring.last_boxed("2}") is None
    started = time.perf_counter()
    assert scoring.last_boxed(r"\boxed{" * 100_000) is None
    assert time.perf_counter() - started < 2.0  # linear


# --- reasoning-gym -----------------------------------------------


def test_reasoning_gym_uses_the_tasks_own_scorer():
    config = DatasetConfig(
        source="reasoning_gym:countdown", size=3, seed=4, options={"max_numbers": 4, "min_numbers": 3}
    )
    rows = load_rows(config, "data.train")
    prompts = [prompt(row.answer, **row.extras) for row in rows]
    spelled = [f"I think <answer> ({row.answer}) </answer>" for row in rows]  # another expression of the same value
    with Rewarder(RewardConfig(kind="reasoning_gym", workers=1, timeout_s=20.0)) as rewarder:
        right = rewarder.score([row.answer for row in rows], prompts)
        rewritten = rewarder.score(spelled, prompts)
        wrong = rewarder.score(["1 + 1"] * 3, prompts)
    assert right.values.tolist() == [1.0] * 3
    assert rewritten.values.tolist() == [1.0] * 3
    assert (wrong.values < 0.5).all()
    assert right.crashes == rewritten.crashes == wrong.crashes == 0


def test_reasoning_gym_refuses_rows_of_other_sources():
    with Rewarder(RewardConfig(kind="reasoning_gym", workers=1)) as rewarder:
        with pytest.raises(ConfigError, match=r"reward\.kind: reasoning_gym .*math, exact"):
            rewarder.score(["4"], [prompt("4")])


# --- hostile responses -------------------------------------------


def test_hostile_responses_cost_themselves_only(hostile):
    bad = ["loop", "exit", "kill", "segfault", "allocate", "digits", "recurse", "nan"]
    responses = [r for b in bad for r in ("yes", b, "no", "yes")]
    with Rewarder(RewardConfig(workers=2, timeout_s=4.0, memory_mb=256), score=hostile.act) as rewarder:
        rewards = rewarder.score(responses, [prompt("yes")] * len(responses))
        again = rewarder.score(["yes", "no"], [prompt("yes")] * 2)
    assert rewards.values.tolist() == [1.0, 0.0, 0.0, 1.0] * len(bad)
    assert rewards.timeouts == 1 and rewards.timed_out.nonzero()[0].tolist() == [1]
    assert rewards.crashes == len(bad) - 1
    assert again.values.tolist() == [1.0, 0.0]


def test_mathematics_that_explodes_is_timed_out():
    with Rewarder(RewardConfig(workers=2, timeout_s=2.0)) as rewarder:
        rewards = rewarder.score([r"\boxed{100000000!}", r"\boxed{7}", "7"], [prompt("7")] * 3)
    assert rewards.values.tolist() == [0.0, 1.0, 1.0]
    assert rewards.timeouts + rewards.crashes == 1


def test_the_deadline_is_that_of_one_response_and_begins_when_it_runs(hostile):
    """One worker, a chunk of responses that take 0.3 s each: longer together than the timeout, yet none is late."""
    responses = ["sleep 0.3"] * CHUNK
    with Rewarder(RewardConfig(workers=1, timeout_s=1.5), score=hostile.act) as rewarder:
        rewards = rewarder.score(responses, [prompt("")] * len(responses))
    assert rewards.seconds > 1.5
    assert rewards.values.tolist() == [1.0] * CHUNK
    assert rewards.timeouts == 0


def test_starting_a_worker_does_not_count_against_its_first_response(hostile):
    """Every response but one kills its worker, and each new worker must import the scorer before it goes on."""
    with Rewarder(RewardConfig(workers=1, timeout_s=0.5), score=hostile.act) as rewarder:
        rewards = rewarder.score(["exit", "exit", "exit", "yes"], [prompt("yes")] * 4)
    assert (rewards.values.tolist(), rewards.crashes, rewards.timeouts) == ([0.0, 0.0, 0.0, 1.0], 3, 0)


def test_a_worker_that_is_warm_has_parsed(monkeypatch):
    """An integer would not be: `math` compares those without its parser, whose imports and caches take longer than a parse."""
    parsed, parse = [], scoring._parse

    def spy(text):
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(scoring, "_parse", spy)
    assert scoring.math(*WARM_UP, {}) == 1
    assert WARM_UP[0] in parsed


def test_a_scorer_that_cannot_start_ends_the_run_instead_of_starting_for_ever(hostile):
    with Rewarder(RewardConfig(workers=1), score=hostile.dies_at_once) as rewarder:
        with pytest.raises(RuntimeError, match="ended with code 7 before it was ready"):
            rewarder.score(["1"], [prompt("1")])


def test_no_worker_is_left_behind_on_exit(hostile):
    with Rewarder(RewardConfig(workers=2), score=hostile.act) as rewarder:
        rewarder.score(["yes"], [prompt("yes")])
        pids = [worker.process.pid for worker in rewarder._workers]
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_busy_worker_ends_by_itself_after_its_driver_is_killed(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {HERE!r})
        import numpy as np, hostile_score
        from qarl.config import RewardConfig
        from qarl.records import Prompt
        from qarl.rewards import Rewarder

        if __name__ == "__main__":
            one = [Prompt(0, "", np.zeros(1, np.int32), "yes")]
            with Rewarder(RewardConfig(workers=1, timeout_s=0.2), score=hostile_score.act) as rewarder:
                rewarder.score(["yes"], one)
                print(rewarder._workers[0].process.pid, flush=True)
                rewarder._workers[0].timeout = 1e6  # the driver would not kill it
                rewarder.score(["loop"], one)
        """)
    )
    driver = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    worker = psutil.Process(int(driver.stdout.readline()))
    time.sleep(0.5)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    try:
        worker.wait(timeout=30)  # CPU limit: 2 timeouts and 2 seconds
    except psutil.TimeoutExpired:
        os.kill(worker.pid, signal.SIGKILL)
        raise


def test_256_responses_come_back_in_their_order(maths):
    prompts = [prompt(str(i)) for i in range(256)]
    rewards = maths.score([str(i if i % 3 else i + 1) for i in range(256)], prompts)
    assert rewards.values.tolist() == [float(i % 3 > 0) for i in range(256)]
