"""A process that things are tried in: where one crashes or hangs, that is an answer, and the next is tried in another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qarl.errors import ConfigError

PATIENCE_S = 90.0
"""For one answer, in which a process may have to import torch and vLLM."""
GRACE_S = 5.0
"""For a process to end by itself."""


class Broken(Exception):
    """What was tried raised an error, killed its process, or did not end."""


class Sandbox:
    """Functions of a module, called in a process of its own, which is started when it is first needed."""

    def __init__(self, module: str, log: Path) -> None:
        self.module, self.log = module, log
        """`log`: takes all that libraries print."""
        self._process: Any = None
        self._closed = False

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        """Also while another thread waits for an answer, which it gets: `Broken`."""
        self._closed = True
        self.end()

    def ask(self, function: str, *arguments: Any, patience: float = PATIENCE_S) -> Any:
        """What the function returns. Raises `ConfigError` where it does, and `Broken` however else it does not return."""
        if self._closed:
            raise Broken("its process was ended")
        if self._process is None:
            self._start()
        process = self._process
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(patience):
                raise Broken(f"no answer in {patience:.0f} s")
            told = self._pipe.recv()
        except (EOFError, OSError):
            process.join(5)
            told = Broken(f"its process died ({_ending(process.exitcode)})")
        except Broken as silence:
            told = silence
        if isinstance(told, Broken):
            self.end(grace=0)
        if isinstance(told, Exception):
            raise told
        return told

    def end(self, grace: float = GRACE_S) -> None:
        """End the process and all that it started; the next question starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        self._pipe.close()  # which it takes as its end
        process.join(grace)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.module, str(self.log)))
        self._process.start()
        theirs.close()


def _serve(pipe: Connection, module: str, log: str) -> None:
    os.setpgid(0, 0)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    with suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            print(f"--- {function} {arguments}"[:300], file=sys.stderr, flush=True)
            start = time.perf_counter()
            try:
                answer = getattr(import_module(module), function)(*arguments)
            except ConfigError as refusal:
                answer = refusal
            except BaseException as error:  # an interrupted trial, too, is a broken one
                traceback.print_exc()
                answer = Broken(f"{type(error).__name__}: {str(error).strip()}"[:300])
            pipe.send(answer)
            print(f"--- {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
