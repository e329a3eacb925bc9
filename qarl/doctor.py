"""What this machine can run, tried rather than guessed, and the traps of this field that are open here.

    python -m qarl.doctor                           every format, on vLLM and in the learner, then the traps
    python -m qarl.doctor recipe=NAME key=value …   the same in the run's dtype, and whether that run can run here

With a tiny Qwen3 and a tiny Qwen3-MoE: vLLM starts, is refilled twice and writes a few tokens at temperature 0.7; then each of the
learner's backends goes forward and backward on them. Numbers are the mean |difference| of log-probs between learner and sampler, in
nats a token; the sampler is vLLM where it runs, else the torch engine. All of it happens in processes that may crash or hang, one
for each model.

Ends with 1 where something is broken, or refused that the run needs; with 2 for a mistake in the command.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from qarl import cli
from qarl.ability import MODELS, Table, abilities, unmet
from qarl.config import RunConfig
from qarl.errors import ConfigError
from qarl.machine import Machine, look
from qarl.sandbox import Broken, Sandbox
from qarl.traps import Patient, traps


def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    run = _composed(arguments) if arguments else None
    machine = look(Path(run.out if run else RunConfig.out))
    print(describe(machine), flush=True)
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # on a busy machine, threads of tiny products mostly wait for each other
    log = Path(tempfile.mkstemp(prefix="qarl-doctor-", suffix=".log")[1])
    with tempfile.TemporaryDirectory(prefix="qarl-doctor-") as folder, ExitStack() as stack:
        sandboxes = {model: stack.enter_context(Sandbox("qarl.trials", log)) for model in MODELS}
        try:
            broken = examine(machine, run, sandboxes, Path(folder))
        except Broken as error:  # not even torch runs, or no engine at all
            broken = [f"the trials: {error}"]
    if broken:
        print("", *(f"BROKEN  {what}" for what in broken), f"what libraries said stands in {log}", sep="\n")
        return 1
    log.unlink()
    return 0


def _composed(arguments: Sequence[str]) -> RunConfig:
    """The run in question. A mistake ends with exit 2."""
    try:
        return cli.compose(*arguments)
    except ConfigError as error:
        cli.fail(error)
        raise


def examine(machine: Machine, run: RunConfig | None, sandboxes: Mapping[str, Sandbox], root: Path) -> list[str]:
    """Print what is found, as it is found; returns what is broken, or refused and needed by the run.

    `sandboxes`: of each of the models, which are tried side by side.
    """
    sandbox = next(iter(sandboxes.values()))
    around = sandbox.ask("surroundings")
    sandbox.ask("make_models", root)
    dtypes = [run.model.dtype] if run else ["bfloat16"] if around["gpus"] else ["float32", "bfloat16"]
    table, tried = Table(), []
    print(
        f"\nformats, on {'the GPU' if around['gpus'] else 'the CPU'}: does vLLM run; how far is each learner from the sampler"
    )
    print(table.header, flush=True)
    for one in abilities(sandboxes, root, dtypes):
        tried.append(one)
        print(table.line(one), flush=True)
    print(table.notes())
    for box in sandboxes.values():
        box.end()  # the next trials get a process that no engine ran in
    print("\ntraps")
    checks = []
    for check in traps(Patient(machine, around, tried, run, sandbox, root)):
        checks.append(check)
        print(check, flush=True)
    broken = [what for one in tried for what in one.broken]
    broken += [f"{check.name}: {check.found}" for check in checks if check.status == "BROKEN"]
    return broken + (list(unmet(run, tried)) if run else [])


def describe(machine: Machine) -> str:
    shm = "none" if machine.shm is None else f"{machine.shm:.1f}"
    usable = "" if machine.usable >= machine.cores else f" ({machine.usable:g} usable)"
    lines = {
        "versions": " · ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "cpu": f"{machine.cpu} · {machine.cores} cores{usable} · {' '.join(machine.isa) or 'no vector extensions'}",
        "gpu": "\n          ".join(machine.gpus) or "none",
        "memory": f"{machine.memory:.1f} GiB, {machine.free:.1f} free · /dev/shm {shm} GiB",
        "disk": f"{machine.disk:.0f} GiB free for runs, {machine.temporary:.0f} in {tempfile.gettempdir()}",
    }
    return "\n".join(f"{name:<9} {what}" for name, what in lines.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
