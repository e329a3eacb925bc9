"""Which kernel, which backend, and refusals that say why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from qarl.errors import ConfigError
from qarl.formats import FORMATS
from qarl.kernels import dispatch, w4a16, w8a8_fp8, w8a8_int8, w8a8_int8_engine


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_but_bf16_has_a_definition_that_runs_anywhere(name: str) -> None:
    if name == "bf16":
        with pytest.raises(ConfigError, match="'bf16' has no kernel"):
            dispatch.load(name, "emulated")
    else:
        for device in ("cpu", "cuda"):
            assert dispatch.backends(name, device, torch.float32)["emulated"] is None
            assert dispatch.choose(name, "emulated", device, torch.float32) == "emulated"


def test_formats_share_a_module_where_only_the_group_differs() -> None:
    assert dispatch.load("w4a16", "emulated") is dispatch.load("w4a16_g32", "emulated") is w4a16
    assert dispatch.load("w8a8_int8", "emulated") is w8a8_int8 and dispatch.load("w8a8_fp8", "emulated") is w8a8_fp8
    assert dispatch.load("w8a8_int8", "engine") is w8a8_int8_engine


def test_codes_are_made_by_the_definition_on_a_cpu_and_by_triton_on_a_gpu() -> None:
    for name in ("w8a8_int8", "w8a8_fp8", "w4a16"):
        assert dispatch.quantizer(name, "cpu") is dispatch.load(name, "emulated")
        assert dispatch.quantizer(name, "cuda") is dispatch.load(name, "fused")


@pytest.mark.parametrize(("capability", "backend"), [((8, 0), "emulated"), ((8, 9), "fused"), ((9, 0), "fused")])
def test_e4m3_is_made_by_the_definition_where_triton_does_not_compile_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], backend: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert dispatch.quantizer("w8a8_fp8", "cuda") is dispatch.load("w8a8_fp8", backend)
    assert dispatch.quantizer("w8a8_int8", "cuda") is dispatch.load("w8a8_int8", "fused")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="rollout.format: 'w3a16' has no kernel; .*'w4a16'"):
        dispatch.load("w3a16", "emulated")
    with pytest.raises(ConfigError, match="learner.backend: 'cutlass' .* choices: .*'fused'"):
        dispatch.load("w4a16", "cutlass")
    with pytest.raises(ConfigError, match="learner.backend: 'cutlass' does not run w4a16 on cpu"):
        dispatch.choose("w4a16", "cutlass", "cpu", torch.float32)


class Runs:
    """A module that runs where `reason` is `None`."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def refusal(self, device_type: str, dtype: torch.dtype) -> str | None:
        return self.reason


def machine(monkeypatch: pytest.MonkeyPatch, **reasons: str | None) -> None:
    """Backends that run, or do not for a reason."""
    monkeypatch.setattr(dispatch, "load", lambda format_name, backend: Runs(reasons[backend]))


@pytest.mark.parametrize(
    ("device", "engine", "fused", "choice"),
    [
        ("cpu", None, None, "engine"),
        ("cpu", "no vLLM", None, "emulated"),
        ("cuda", None, None, "engine"),
        ("cuda", "no vLLM", None, "fused"),
        ("cuda", "no vLLM", "float32", "emulated"),
    ],
)
def test_auto_takes_the_fastest_that_runs(
    device: str, engine: str | None, fused: str | None, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, engine=engine, fused=fused, emulated=None)
    assert dispatch.backends("w8a8_int8", device, torch.bfloat16) == {
        "engine": engine,
        "fused": fused,
        "emulated": None,
    }
    assert dispatch.choose("w8a8_int8", "auto", device, torch.bfloat16) == choice


def test_int4_has_no_engine_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Marlin takes 1.8 times"):
        dispatch.load("w4a16_g32", "engine")
    machine(monkeypatch, fused=None, emulated=None)
    assert dispatch.choose("w4a16", "auto", "cuda", torch.bfloat16) == "fused"
    assert dispatch.choose("w4a16", "auto", "cpu", torch.bfloat16) == "emulated"
    with pytest.raises(
        ConfigError, match=r"'engine' does not run w4a16 on cuda .*Marlin.*\['auto', 'emulated', 'fused'\]"
    ):
        dispatch.choose("w4a16", "engine", "cuda", torch.bfloat16)


def test_what_was_asked_for_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, engine="it is not here", fused="no GPU", emulated=None)
    message = (
        r"learner.backend: 'engine' does not run w8a8_int8 on cpu in torch.float32 \(it is not here\); "
        r"choices: \['auto', 'emulated'\]"
    )
    with pytest.raises(ConfigError, match=message):
        dispatch.choose("w8a8_int8", "engine", "cpu", torch.float32)
    with pytest.raises(ConfigError, match="learner.backend: 'fused' does not run w4a16 on cpu"):
        dispatch.choose("w4a16", "fused", "cpu", torch.float32)


@pytest.mark.parametrize("path", sorted(Path(w8a8_int8.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_vllm_is_imported_inside_functions_of_the_engine_backend_only(path: Path) -> None:
    """A learner without it must run, and one with it should not pay 3 s before it is asked for."""

    def imports(body: list[ast.stmt]) -> list[str]:
        nodes = [node for statement in body for node in ast.walk(statement)]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        return names + [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]

    for statement in ast.parse(path.read_text()).body:
        if any(name.split(".")[0] == "vllm" for name in imports([statement])):
            assert isinstance(statement, ast.FunctionDef) and "engine" in statement.name
