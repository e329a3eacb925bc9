"""A scorer that does what the response says. A module of its own, because worker processes import it by name."""

import os
import signal
import time
from collections.abc import Mapping


def act(response: str, answer: str, extras: Mapping[str, object]) -> float:
    if response == "loop":
        while True:
            pass
    if response == "allocate":
        hoard = []
        while True:
            hoard.append(bytearray(16 * 2**20))
    if response == "exit":
        os._exit(3)
    if response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "recurse":
        return act(response, answer, extras)
    if response == "digits":
        print(int("9" * 1_000_000))
    if response == "nan":
        return float("nan")
    if response.startswith("sleep "):
        time.sleep(float(response.split()[1]))
        return 1.0
    return float(response == answer)


def dies_at_once(response: str, answer: str, extras: Mapping[str, object]) -> float:
    os._exit(7)
