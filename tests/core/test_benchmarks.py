"""The benchmark commands run, at sizes that measure nothing, and fail where a row does."""

import json
import os
import shlex
import socket
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from benchmarks import (
    faults,
    kernels,
    learner,
    record,
    refill,
    refill_engine,
    rollout,
    rollout_engines,
    step_time,
    timing,
    whole_step,
)
from benchmarks.floors import ideal_ratio
from benchmarks.jobs import run_job
from benchmarks.rows import Bar, Report
from benchmarks.served import judge
from benchmarks.served_job import REPEATS, Served, compare
from qarl.errors import ConfigError
from qarl.records import Completion


@pytest.mark.parametrize("group", ["quantize", "dense", "experts", "head"])
def test_every_kernel_row_is_measured(run_benchmark, group, capsys):
    status, rows = run_benchmark(kernels, "--only", group)
    assert status == 0 and rows
    for row in rows:
        assert row["group"] == group and row["ms"] > 0 and row["floor_bytes_ms"] > 0, row
    assert {"w4a16", "w8a8_int8", "w8a8_fp8"} <= {row["format"] for row in rows} or group == "head"
    assert "verdict" in capsys.readouterr().out


def test_ratios_are_of_neighbours_and_the_strictest_baseline_counts(monkeypatch):
    samples = {"slow": [40.0, 40.0, 80.0], "fast": [10.0, 20.0, 40.0], "own": [15.0, 60.0]}

    class Sampled(timing.Work):
        def __init__(self, name):
            self.ms, self.calls, self.values = 1.0, 1, iter(samples[name])

    monkeypatch.setattr(timing, "_rounds", lambda works, budget_ms: 2)
    monkeypatch.setattr(timing, "_sampled", lambda works: [next(work.values) for work in works])
    row = timing.against(Sampled("own"), {"slow": Sampled("slow"), "fast": Sampled("fast")})
    assert (row["ms"], row["bf16_ms"], row["slow_ms"]) == (37.5, 20.0, 40.0)
    assert row["ratio"] == row["ratio_fast"] == pytest.approx((15 / 15 + 60 / 30) / 2)
    assert row["ratio_slow"] == pytest.approx((15 / 40 + 60 / 60) / 2)
    assert row["ratio_quartiles"] == pytest.approx([1.25, 1.75])


def test_the_ratio_of_an_ideal_layer():
    """8192 tokens of 1000: 24.576 MB at 1 TB/s are 0.024576 ms. Forward: half a product; with backward: 2.5 of 3."""
    ceilings = timing.Ceilings(copy_bytes_s=1e12, bf16_flop_s=1e15)
    assert ideal_ratio(ceilings, 8192, 1000, 0.2, 1.0) == pytest.approx((0.024576 + 0.1) / 0.2)
    assert ideal_ratio(ceilings, 8192, 1000, 0.6, 1 / 3) == pytest.approx((0.024576 + 0.1 + 0.4) / 0.6)


def test_rows_of_8_bits_that_have_a_bar_say_what_an_ideal_layer_would_take(run_benchmark, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_dense_bars", lambda name, *_: (kernels.INFER,) if name == "w8a8_int8" else ())
    _, rows = run_benchmark(kernels, "--only", "dense")
    assert "time / bf16 of an ideal w8a8 layer (bars: 0.625 f, 0.870 f+b)" in capsys.readouterr().out
    bf16 = {(row["m"], row["pass"]): row["ms"] for row in rows if row["format"] == "bf16"}
    for row in rows:
        assert ("ideal_ratio" in row) == (row["format"] == "w8a8_int8" and row["pass"] != "quantize+fwd+bwd")
        if "ideal_ratio" in row:
            share = bf16[row["m"], "fwd"] / bf16[row["m"], row["pass"]]
            assert row["ideal_ratio"] > 1 - share / 2  # by the tokens


def test_a_broken_kernel_fails_its_rows_and_the_command_and_the_others_go_on(run_benchmark, monkeypatch):
    from qarl.kernels import w8a8_fp8

    def broken(*arguments):
        raise RuntimeError("out of order")

    monkeypatch.setattr(w8a8_fp8, "product", broken)
    status, rows = run_benchmark(kernels, "--only", "dense")
    assert status == 1
    for row in rows:
        assert ("failed" in row) == (row["format"] == "w8a8_fp8")
        assert row.get("failed", "RuntimeError: out of order") == "RuntimeError: out of order"


def test_a_refused_row_is_kept_misses_its_bar_and_is_no_failure(tmp_path):
    def refuse():
        raise ConfigError("learner.backend: not here")

    report, bar = Report(tmp_path / "r.json"), Bar("time", "ratio", 1.05)
    report.add({"group": "dense", "format": "w4a16"}, refuse, bar)
    report.add({"group": "dense", "format": "w8a8_int8"}, lambda: {"ratio": 0.9}, bar)
    assert not report.failed and "REFUSED: learner.backend: not here" in report.troubles()
    assert "NOT MET" in report.verdicts() and "1/2" in report.verdicts()
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["bars"]["time"] for row in rows] == [None, True]


def test_the_worst_row_stands_beside_its_bar():
    report = Report(None)
    for size, share in ((1, 0.9), (2, 0.71), (3, 0.8)):
        bar = Bar("bandwidth", "share", 0.7, at_least=True)
        report.add({"group": "quantize", "m": size}, partial(dict, share=share), bar)
    assert report.verdicts().splitlines()[1].split() == "bandwidth >= 0.7 MET 3/3 0.710 quantize 2".split()


def test_rows_of_a_run_that_is_stopped_are_on_disk(tmp_path):
    report = Report(tmp_path / "r.json")
    report.add({"group": "dense"}, lambda: {"ms": 1.0})

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.add({"group": "dense"}, stop)
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 1


def test_faults_put_into_syncs_are_caught_and_nothing_else(tmp_path):
    """On a torch engine, which cannot read back what it holds: a layer that it leaves alone is seen by a tile or the canaries."""
    out = tmp_path / "faults.json"
    faults.main(["--tiny", "--n", "10", "--format", "w4a16", "--out", str(out)])
    told = json.loads(out.read_text())
    assert told["false_alarms"] == [] and told["clean"] == 12
    assert [(row["injected"], row["caught"]) for row in told["rows"]] == [(1, 1)] * len(faults.FAULTS)
    assert {row["fault"] for row in told["rows"] if row["named"]} >= set(faults.FAULTS) - {"stale_layer"}
    rows = {row["fault"]: row for row in told["rows"]}
    (gap,) = rows["quantized_router"]["canary_gaps"]
    assert gap > faults.CANARY_TOLERANCE and told["default_canary_tolerance"] == 0.02
    assert rows["quantized_router"]["by_default"] == (gap > 0.02)
    assert "by_default" not in rows["flipped_bit"], "refused before the canaries"


def test_a_format_whose_canaries_tell_nothing_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(faults, "Rig", MagicMock())
    monkeypatch.setattr(faults, "attempt", lambda rig: ("canaries differ by 0.5 nats", 0.5))
    with pytest.raises(SystemExit) as ended:
        faults.main(["--tiny", "--format", "w4a16"])
    assert ended.value.code == 2
    assert "--format: canaries of w4a16 differ by 0.5 nats a token in a clean sync" in capsys.readouterr().err


class Silent:
    """In the place of a `rollout.Child`."""

    def __init__(self, *task):
        pass

    def go(self):
        pass

    def answer(self, limit):
        return {"tokens_s": 1.0}

    def end(self):
        pass


@pytest.mark.parametrize(
    ("module", "words", "written"),
    [
        (kernels, "", "kernels_{}.json"),
        (kernels, "--tiny", None),
        (learner, "", "learner_{}.json"),
        (learner, "--tiny", None),
        (refill, "", "refill_{}.json"),
        (refill, "--carrier broadcast", "refill_{}_x2.json"),
        (refill, "--cycles 1", "refill_sleep_{}.json"),
        (refill, "--tiny --cycles 1", None),
        (faults, "", "faults_{}.json"),
        (faults, "--tiny", None),
        (rollout, "", "rollout_{}.json"),
        (rollout, "--tiny", None),
        (step_time, "RUN", "step_time_{}.json"),
    ],
)
def test_results_bear_the_name_of_the_device_and_a_tiny_run_publishes_none(
    module, words, written, tmp_path, monkeypatch
):
    steps = [{"step": i, **dict.fromkeys([*step_time.WORK, "time/step_s"], 1.0)} for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    results = tmp_path / "results"
    monkeypatch.setattr(record, "RESULTS", results)
    monkeypatch.setattr(timing.Ceilings, "measure", lambda tiny: timing.Ceilings(1.0, 1.0))
    monkeypatch.setattr(kernels.layers, "head", lambda report, ceilings, tiny: report.save())
    monkeypatch.setattr(learner, "measure_model", lambda report, name, tiny: report.save())
    monkeypatch.setattr(refill, "make_policy", MagicMock())
    monkeypatch.setattr(refill, "measure", lambda model, format, *_: {"format": format.name})
    monkeypatch.setattr(faults, "make_policy", MagicMock())
    monkeypatch.setattr(faults, "Rig", MagicMock())
    monkeypatch.setattr(faults, "attempt", lambda rig: (None, 0.0))
    monkeypatch.setattr(rollout, "Child", Silent)
    more = {kernels: "--only head", faults: "--n 0"}.get(module, "")
    assert not module.main(f"{words} {more}".replace("RUN", str(tmp_path)).split())
    files = [file.name for file in results.iterdir()] if results.exists() else []
    assert files == ([written.format(timing.device_name())] if written else [])


def test_a_result_says_a_command_that_can_be_typed_again(tmp_path, monkeypatch):
    words = ["run", "learner.optimizer.lr=1e-4", "data.files=[a b, c]", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["x", *words])
    command = json.loads(record.write_file(tmp_path / "r.json", []).read_text())["command"]
    assert shlex.split(command)[3:] == words and "learner.optimizer.lr=1e-4 " in command


def test_what_sleep_frees_is_what_the_driver_sees_awake_and_asleep(monkeypatch):
    """Of 100 bytes 80 are used awake, 30 asleep; torch's own count of 70 stands still, as under vLLM's allocator."""
    used = 80
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 - used, 100))

    def sleep() -> None:
        nonlocal used
        used = 30

    class Rig:
        served: Any = refill_engine.Served.__new__(refill_engine.Served)

        def ask(self, question: str) -> Any:
            return (0.5, 0.25) if question == "keep" else getattr(self.served, question)()

        def sync(self) -> Any:
            nonlocal used
            used = 80
            return None, {"wake": 0.1, "whole": 0.2}

    rig: Any = Rig()
    rig.served.engine = SimpleNamespace(sleep=sleep)
    found = refill.cycles(2, rig)
    assert (found["awake_bytes"], found["asleep_bytes"], found["after"]["device"]) == (80, 30, 80)
    assert (found["n"], found["wake"], found["sync"], found["keep_sleep"]) == (2, 0.1, 0.2, 0.5)


def test_a_speed_is_the_median_of_batches_none_of_which_repeats_a_prompt(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 21.0])
    asked: list[bytes] = []
    monkeypatch.setattr(rollout.time, "perf_counter", lambda: next(clock))

    class Engine:
        def generate(self, prompts: np.ndarray, n_tokens: int) -> int:
            asked.extend(map(bytes, prompts))
            return len(prompts) * n_tokens

    engine: Any = Engine()
    row = rollout.measure(engine, 2, 8, 3)
    assert row == {"tokens_s": 8.0, "tokens_s_min": 4.0, "tokens_s_max": 16.0, "seconds": 2.0}
    assert len(set(asked)) == len(asked) == 2 * (1 + 3)


def test_a_sync_is_measured_stage_by_stage(tmp_path):
    out = tmp_path / "refill.json"
    arguments = ["--tiny", "--carrier", "broadcast", "--peer", "0", "--syncs", "1", "--formats", "w4a16_g32"]
    assert refill.main([*arguments, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["canary"] < 1e-5 and 0 < row["median_s"] <= row["worst_s"]
    assert all(row[f"{stage}_s"] >= 0 for stage in refill.STAGES if stage != "canary")


def test_speeds_are_compared_at_the_same_number_of_sequences():
    speeds = {("qarl", "bf16"): 10.0, ("qarl", "w4a16"): 30.0, ("stock", "bf16"): 20.0}
    rows = [
        {"backend": b, "format": f, "m": m, "tokens_s": s * m}
        for (b, f), s in speeds.items()
        for m in (1, 4)
        if s * m != 80
    ]
    rows.append({"backend": "qarl", "format": "w8a8_int8", "m": 1, "refused": "not here"})
    rollout.compare(rows)
    found = {(row["backend"], row["format"], row["m"]): (row.get("over_bf16"), row.get("over_stock")) for row in rows}
    assert found["qarl", "w4a16", 1] == found["qarl", "w4a16", 4] == (3.0, None)
    assert found["qarl", "bf16", 1] == (1.0, 0.5) and found["qarl", "bf16", 4] == (1.0, None)
    assert found["stock", "bf16", 1] == (1.0, None) and found["qarl", "w8a8_int8", 1] == (None, None)


@pytest.mark.parametrize(
    ("parts", "grid"),
    [
        ({"weight": torch.int8, "weight_scale": torch.float32}, 127),
        ({"weight": torch.float8_e4m3fn, "weight_scale": torch.float32}, 448),
        ({"weight": torch.bfloat16}, None),
    ],
)
def test_random_weights_are_of_the_size_of_trained_ones(parts, grid):
    class Layer(torch.nn.Module):
        config = SimpleNamespace(hidden_size=1024)

    layer: Any = Layer()
    for name, dtype in parts.items():
        values = torch.zeros(64, 1 if "scale" in name else 1024, dtype=dtype)
        layer.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
    rollout_engines.randomize(layer)
    weight = layer.weight.float() * (layer.weight_scale if grid else 1)
    assert weight.std().item() == pytest.approx(1 / 32, rel=0.05) and abs(weight.mean().item()) < 1e-3
    assert grid is None or layer.weight.float().abs().max() <= grid


@pytest.mark.slow
def test_both_engines_generate_and_what_does_not_run_is_kept_as_refused(tmp_path):
    out = tmp_path / "rollout.json"
    sizes = ["--sequences", "2", "--tokens", "16", "--limit", "200", "--out", str(out)]
    assert rollout.main(["--tiny", "--formats", "bf16", "--backends", "qarl", "stock", *sizes]) == 0
    ours, stock = json.loads(out.read_text())["rows"]
    assert ours["over_bf16"] == stock["over_bf16"] == 1.0
    assert ours["over_stock"] == ours["tokens_s"] / stock["tokens_s"]
    assert 0 < ours["tokens_s_min"] <= ours["tokens_s"] <= ours["tokens_s_max"]
    assert (
        rollout.main(["--tiny", "--formats", "w8a8_int8", "--backends", "qarl", *sizes]) == 0
    )  # on a CPU without experts
    (row,) = json.loads(out.read_text())["rows"]
    assert "int8 experts" in row["refused"] and "tokens_s" not in row


def _served(texts: list[list[int]], drawn: list[list[float]], scores: list[list[float]]) -> Served:
    completions = [
        Completion(i, 0, np.array(t, np.int32), np.zeros(len(t)), "", "length", 0) for i, t in enumerate(texts)
    ]
    return Served(completions, [], [np.array(row) for row in scores], [np.array(row) for row in drawn])


def test_a_refilled_engine_is_compared_with_a_fresh_one_and_each_with_itself():
    ours = _served(
        [[1, 2], [3]], [[-1.0, -2.0, -3.0]] * REPEATS, [[-1.0, -2.0, -3.0], [-1.0, -2.25, -3.0], [-1.0, -2.0, -3.0]]
    )
    fresh = _served([[1, 2], [3]], [[-1.0, -2.0, -3.5]] * REPEATS, [[-1.0, -2.0, -3.0625]] * REPEATS)
    row = compare(ours, fresh)
    assert (row["same_sequences"], row["sequences"], row["tokens"]) == (2, 2, 3)
    assert (row["gap_scores"], row["gap_drawn"]) == (0.0625, 0.5)
    assert (row["spread_refilled"], row["spread_fresh"], row["repeats_with_other_tokens"]) == (0.25, 0.0, 0)
    judged = judge({"refills": [row, row | {"same_sequences": 1, "gap_scores": 0.75}]})
    assert (judged["same"], judged["of"], judged["gap"], judged["spread"]) == (3, 4, 0.75, 0.25)


def test_log_probs_of_different_greedy_tokens_are_not_compared():
    ours = _served([[1, 2]], [[-1.0, -2.0]] * REPEATS, [[-1.0, -2.0]] * REPEATS)
    fresh = _served([[1, 4]], [[-1.0, -9.0]] * (REPEATS - 1), [[-1.0, -2.0]] * REPEATS)
    row = compare(ours, fresh)
    assert (row["same_sequences"], row["gap_drawn"], row["repeats_with_other_tokens"]) == (0, None, 1)


def test_a_job_that_hangs_is_killed_with_what_it_started_and_keeps_what_it_wrote(tmp_path, monkeypatch):
    """Its own child holds a port, as an engine's process would hold a GPU's memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "hangs.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        f"listen = 'import socket, time; s = socket.create_server((\"127.0.0.1\", {port})); time.sleep(60)'\n"
        "subprocess.Popen([sys.executable, '-c', listen])\n"
        "import socket\n"
        "for _ in range(200):\n"
        f"    if socket.socket().connect_ex(('127.0.0.1', {port})) == 0: break\n"
        "    time.sleep(0.05)\n"
        "pathlib.Path(sys.argv[1]).write_text('{\"half\": 1}')\n"
        "print('so far', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    out = tmp_path / "row.json"
    row = run_job(["hangs", str(out)], out, {}, 5.0)
    assert row["half"] == 1 and "killed after 5 s" in row["error"] and "so far" in row["error"]
    for _ in range(50):  # the kernel closes the killed child's socket in its own time
        if (refused := socket.socket().connect_ex(("127.0.0.1", port))) != 0:
            break
        time.sleep(0.1)
    assert refused


def test_a_whole_step_is_put_together_from_its_parts():
    """48 layers, on the line through one and three: 1000 + 47 x 500 ms for 100 tokens. The slower bf16 counts not."""
    rollout: dict[str, Any] = {"layers": 48, "prompt_tokens": 10, "new_tokens": 40, "rows": []}
    learner, refill = [], []
    for format, factor in zip(whole_step.FORMATS, (1.0, 0.5, 0.8, 0.8), strict=True):
        rollout["rows"] += [
            {"format": format, "backend": b, "m": 32, "seconds": 900 * factor} for b in ("qarl", "stock")
        ]
        refill.append({"format": format, "median_s": factor})
        for backend in ("none", "auto") if format == "bf16" else ("fused",):
            for name, layers, ms in (("one_expert_layer", 1, 1000.0), ("experts", 3, 2000.0)):
                ms *= factor * (3 if backend == "none" else 1)
                one = {"format": format, "backend": backend, "layers": layers, "m": 100, "ms": ms}
                saved = {"layer": f"{name}, {layers} layers, checkpointing", "score_ms": ms, "forward_ms": 1e9}
                kept = {"layer": f"{name}, {layers} layers", "score_ms": 1e9, "forward_ms": ms}
                learner += [one | saved | {"backward_ms": ms}, one | kept | {"backward_ms": ms / 9}]
    rows = {row["format"]: row for row in whole_step.compose(rollout, learner, refill)}
    assert rows["bf16"]["score_s"] == rows["bf16"]["backward_s"] == pytest.approx(24.5 / 100 * 32 * 50)
    assert rows["bf16"]["step_s"] == pytest.approx(900 + 3 * 392 + 1) and rows["bf16"]["over_bf16"] == 1
    assert rows["w4a16"]["over_bf16"] == pytest.approx(2) and rows["w8a8_fp8"]["over_bf16"] == pytest.approx(1.25)
    assert rows["bf16"]["forward_s"] == rows["bf16"]["score_s"]
    with pytest.raises(KeyError, match="experts with checkpointing, w8a8_fp8"):
        whole_step.compose(
            rollout, [row for row in learner if (row["format"], row["layers"]) != ("w8a8_fp8", 3)], refill
        )
