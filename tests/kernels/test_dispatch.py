"""Which kernel, which backend, and refusals that say why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from qarl.errors import ConfigError
from qarl.formats import FORMATS
from qarl.kernels import dispatch, w4a16, w8a8_fp8, w8a8_int8


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_but_bf16_has_a_kernel_that_runs_emulated(name: str) -> None:
    if name == "bf16":
        with pytest.raises(ConfigError, match="'bf16' has no kernel"):
            dispatch.kernel(name)
    else:
        for device in ("cpu", "cuda"):
            assert dispatch.backends(name, device, torch.float32)["emulated"] is None
            assert dispatch.choose(name, "emulated", device, torch.float32) == "emulated"


def test_formats_share_a_kernel_where_only_the_group_differs() -> None:
    assert dispatch.kernel("w4a16") is dispatch.kernel("w4a16_g32") is w4a16
    assert dispatch.kernel("w8a8_int8") is w8a8_int8 and dispatch.kernel("w8a8_fp8") is w8a8_fp8


def test_an_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="rollout.format: 'w3a16' has no kernel; .*'w4a16'"):
        dispatch.kernel("w3a16")


@pytest.mark.parametrize("reason", [None, "it is not here"])
def test_auto_takes_the_engine_where_it_runs(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w8a8_int8, "_engine_refusal", lambda device: reason)
    assert dispatch.backends("w8a8_int8", "cpu", torch.float32) == {"engine": reason, "emulated": None}
    assert dispatch.choose("w8a8_int8", "auto", "cpu", torch.float32) == ("engine" if reason is None else "emulated")
    assert dispatch.choose("w8a8_fp8", "auto", "cpu", torch.float32) == "emulated"


def test_what_was_asked_for_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w8a8_int8, "_engine_refusal", lambda device: "it is not here")
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
