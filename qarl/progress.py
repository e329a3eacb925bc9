"""What a person watching a run sees: a bar on a terminal, a line a step elsewhere."""

import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

WINDOW = 20
"""Newest steps whose mean time predicts the time left: the first ones compile and warm up."""


class ProgressDisplay:
    """Shows the step, a few facts and the time left. Only what was measured since the start enters the prediction."""

    def __init__(self, total: int, done: int = 0, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._total = total
        self._times = deque([time.monotonic()], maxlen=WINDOW + 1)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(24),
                TextColumn("{task.fields[facts]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=total, completed=done, facts="waiting for the first step")
            self._bar.start()

    def update(self, done: int, facts: str) -> None:
        """`done` steps of the total lie behind; `facts` describe the newest. A row after the last step is no step."""
        done = min(done, self._total)
        self._times.append(time.monotonic())
        each = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        text = f"{facts} · {duration(each * max(self._total - done, 0))} left"
        if self._bar is None:
            # No wrapping and no markup: one line a step is what log files and grep want.
            self._console.out(f"step {done}/{self._total} · {text}", highlight=False)
        else:
            self._bar.update(self._task, completed=done, facts=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """`120 ms`, `9.4 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
