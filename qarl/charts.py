"""Charts as inline SVG: the page's CSS colours them (`.c0` … `.c8`), for light and for dark, and dashes them (`.d0` … `.d4`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 34
BUCKETS = 240
"""Points drawn at most; more steps are combined, by mean or maximum."""
TINY = 1e-300
"""Below it powers of ten are not exact any more: no axis resolves that, and a log axis has a gap there."""


@dataclass(frozen=True)
class Series:
    """One line: a value per step. NaN where there is none: a line has a gap there, points are joined across it."""

    label: str
    values: np.ndarray
    color: int
    kind: Literal["line", "points"] = "line"
    combine: Literal["mean", "max"] = "mean"
    smooth: bool = False
    """Draw the values faintly, and a running mean over about a tenth of them."""
    dash: int = 0
    band: tuple[np.ndarray, np.ndarray] | None = None
    """Lowest and highest per step, shaded behind the line."""


@dataclass(frozen=True)
class Axis:
    """From step or value to pixel."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (
            (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return round(self.start + (v - low) / (high - low) * (self.end - self.start), 1)


def line_chart(steps: np.ndarray, series: Sequence[Series], *, log: bool = False, percent: bool = False) -> str:
    """`steps` [S] increasing; on a log axis what is not positive is a gap."""
    drawn = []
    for one in series:
        values = _usable(one.values, log)
        at = np.isfinite(values) if one.kind == "points" else np.ones(len(steps), dtype=bool)
        if np.isfinite(values).any():
            rows = [values, *(_usable(edge, log) for edge in one.band or ())]
            drawn.append((one, [_combined(steps[at], row[at], one.combine) for row in rows]))
    if not drawn:
        return EMPTY
    finite = np.concatenate([values[np.isfinite(values)] for _, rows in drawn for _, values in rows])
    x, y = _step_axis(steps), _log_axis(finite) if log else _linear_axis(finite)
    body = [_grid(x, y, percent)]
    body += [_band(x, y, low, high, one.color) for one, (_, *band) in drawn if band for low, high in [band]]
    body += [(_points if one.kind == "points" else _line)(x, y, *rows[0], one) for one, rows in drawn]
    body.append(_hover(x, steps, [one for one, _ in drawn], percent))
    return _svg(body, ", ".join(one.label for one, _ in drawn))


def _usable(values: np.ndarray, log: bool) -> np.ndarray:
    """NaN where the axis has no place for a value."""
    return np.where(np.isfinite(values) & ((values > TINY) | (not log)), values, np.nan)


def area_chart(steps: np.ndarray, series: Sequence[Series]) -> str:
    """Series stacked on each other, the first at the bottom; NaN counts as 0."""
    series = [s for s in series if np.nansum(s.values) > 0]
    if not series:
        return EMPTY
    combined = [_combined(steps, np.nan_to_num(s.values), "mean") for s in series]
    at, rows = combined[0][0], np.array([values for _, values in combined])
    tops = np.cumsum(rows, axis=0)
    middle = (at[:-1] + at[1:]) / 2
    gap = at[1] - at[0] if len(at) > 1 else 1
    edges = np.concatenate([[at[0] - gap / 2], middle, [at[-1] + gap / 2]])
    sides = np.repeat(edges, 2)[1:-1]  # each step is flat from its left edge to its right one
    x, y = _step_axis(edges), _linear_axis(np.append(tops[-1], 0.0))
    body = [_grid(x, y, False)]
    floor = np.zeros_like(tops[0])
    for one, top in zip(series, tops, strict=True):
        outline = [
            *zip(sides, np.repeat(top, 2), strict=True),
            *zip(sides[::-1], np.repeat(floor, 2)[::-1], strict=True),
        ]
        body.append(f'<path class="area c{one.color}" d="{_path(x, y, outline)}Z"/>')
        floor = top
    body.append(_hover(x, steps, series, False))
    return _svg(body, ", ".join(s.label for s in series))


def tick_label(value: float, percent: bool = False, more: int = 0) -> str:
    """`20%`, `0.05`, `1.5k`, `1e-4`. `more`: digits than usual."""
    if percent:
        return f"{100 * value:.{6 + more}g}%"  # 99.9998% and 100% are two ticks
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{more}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value / 1000:.{4 + more}g}k" if abs(value) >= 10_000 else f"{value:.{4 + more}g}"


def tick_labels(ticks: Sequence[float], percent: bool = False) -> list[str]:
    """One each, with as many digits as tell them apart: those of a correlation near 1 would all be `1`."""
    for more in range(13):
        labels = [tick_label(tick, percent, more) for tick in ticks]
        if len(set(labels)) == len(labels):
            break
    return labels


EMPTY = '<p class="empty">Nothing to draw yet.</p>'


def _linear_axis(values: np.ndarray) -> Axis:
    low, high = float(values.min()), float(values.max())
    if low > 0 and low < high / 2:
        low = 0.0  # a share or a count is read from zero
    if high - low < max(TINY, 1e-12 * max(abs(low), abs(high))):  # less than labels and doubles can tell
        low, high = (0.0, 1.0) if abs(low) < TINY else (low - abs(low) / 2, high + abs(high) / 2)
    ticks = _ticks(low, high)
    return Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)


def _log_axis(values: np.ndarray) -> Axis:
    low, high = _round_number(float(values.min()), up=False), _round_number(float(values.max()), up=True)
    return Axis(low, high if high > low else 2 * low, HEIGHT - BOTTOM, TOP, log=True)


def _round_number(value: float, up: bool) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    decade = 10.0 ** math.floor(math.log10(value))
    if up:
        return next(m * decade for m in (1, 2, 5, 10) if m * decade >= value * (1 - 1e-9))
    return next(m * decade for m in (5, 2, 1) if m * decade <= value * (1 + 1e-9))


def _step_axis(steps: np.ndarray) -> Axis:
    low, high = float(steps[0]), float(steps[-1])
    return Axis(low, high, LEFT, WIDTH - RIGHT) if high > low else Axis(low - 1, low + 1, LEFT, WIDTH - RIGHT)


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, at most about `most` of them, that enclose [low, high]."""
    rough = (high - low) / (most - 1)
    unit = 10 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(axis: Axis) -> list[float]:
    """Powers of ten; 1, 2 and 5 times those where the axis has fewer than three of them."""
    first, last = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
    every = math.ceil((last - first) / 6)
    ticks = [10.0**e for e in range(first, last + 1, max(every, 1))]
    inside = [t for t in ticks if axis.low * 0.999 <= t <= axis.high * 1.001]
    if len(inside) >= 3:
        return inside
    finer = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    return [t for t in finer if axis.low * 0.999 <= t <= axis.high * 1.001]


def _grid(x: Axis, y: Axis, percent: bool) -> str:
    parts = []
    ticks = _log_ticks(y) if y.log else _ticks(y.low, y.high)
    for tick, label in zip(ticks, tick_labels(ticks, percent), strict=True):
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{label}</text>')
    for tick in _ticks(x.low, x.high, 7):
        if x.low <= tick <= x.high and float(tick).is_integer():
            parts.append(f'<text x="{x(tick)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.0f}</text>')
    return "".join(parts)


def _combined(steps: np.ndarray, values: np.ndarray, how: str, most: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """`values` [S] over at most `most` steps; a bucket without a number stays NaN."""
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), most + 1).astype(int)
    out = np.full(most, np.nan)
    for i in range(most):
        part = values[edges[i] : edges[i + 1]]
        part = part[np.isfinite(part)]
        if len(part):
            out[i] = part.max() if how == "max" else part.mean()
    return steps[(edges[:-1] + edges[1:] - 1) // 2], out


def _line(x: Axis, y: Axis, at: np.ndarray, values: np.ndarray, one: Series) -> str:
    css = f"line c{one.color} d{one.dash}"
    if not (one.smooth and np.isfinite(values).sum() >= 20):
        return _segments(x, y, at, values, css)
    return _segments(x, y, at, values, f"{css} faint") + _segments(x, y, at, _running_mean(values), css)


def _band(x: Axis, y: Axis, low: tuple[np.ndarray, np.ndarray], high: tuple[np.ndarray, np.ndarray], color: int) -> str:
    """Shaded between two lines, each (steps, values), wherever both have a value."""
    at, floor, top = low[0], low[1], high[1]
    parts = []
    for start, end in _runs(np.isfinite(floor) & np.isfinite(top)):
        there = zip(at[start:end], top[start:end], strict=True)
        back = zip(at[start:end][::-1], floor[start:end][::-1], strict=True)
        parts.append(_path(x, y, [*there, *back]) + "Z")
    return f'<path class="band c{color}" d="{"".join(parts)}"/>' if parts else ""


def _runs(where: np.ndarray) -> np.ndarray:
    """Start and end of each stretch of True, int [N, 2]."""
    return np.flatnonzero(np.diff(where, prepend=False, append=False)).reshape(-1, 2)


def _segments(x: Axis, y: Axis, at: np.ndarray, values: np.ndarray, css: str) -> str:
    parts: list[str] = []
    lonely: list[str] = []
    for start, end in _runs(np.isfinite(values)):
        points = list(zip(at[start:end], values[start:end], strict=True))
        (lonely if end - start == 1 else parts).append(_path(x, y, points))
    dots = "".join(f'<circle class="dot {css}" cx="{p[1:].split()[0]}" cy="{p.split()[1]}" r="2"/>' for p in lonely)
    return (f'<path class="{css}" d="{"".join(parts)}"/>' if parts else "") + dots


def _points(x: Axis, y: Axis, at: np.ndarray, values: np.ndarray, one: Series) -> str:
    points = list(zip(at, values, strict=True))
    line = f'<path class="line c{one.color} d{one.dash}" d="{_path(x, y, points)}"/>' if len(points) > 1 else ""
    radius = 3.5 if len(points) <= 40 else 2
    return line + "".join(
        f'<circle class="mark c{one.color}" cx="{x(a)}" cy="{y(v)}" r="{radius}"/>' for a, v in points
    )


def _path(x: Axis, y: Axis, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x(a):g} {y(v):g}" for a, v in points)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred, gaps left out of the mean and kept as gaps."""
    half = max(len(values) // 20, 1)
    kernel = np.ones(2 * half + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel)[half:-half]
    count = np.convolve(finite.astype(float), kernel)[half:-half]
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _hover(x: Axis, steps: np.ndarray, series: Sequence[Series], percent: bool) -> str:
    """A column a step (or bucket) that lights up under the mouse and tells its numbers; no script is needed. The more
    lines, the fewer columns: the page stays small.
    """
    most = min(BUCKETS, max(BUCKETS // 4, 2 * BUCKETS // len(series)))
    combined = [_combined(steps, s.values, s.combine, most) for s in series]
    at = combined[0][0]
    parts = []
    for i, step in enumerate(at):
        left = LEFT if i == 0 else (x(at[i - 1]) + x(step)) / 2
        right = WIDTH - RIGHT if i == len(at) - 1 else (x(step) + x(at[i + 1])) / 2
        numbers = ((s.label, values[i]) for s, (_, values) in zip(series, combined, strict=True))
        lines = [f"step {step:.0f}"]
        lines += [f"{label} {f'{100 * v:.3g}%' if percent else f'{v:.4g}'}" for label, v in numbers if np.isfinite(v)]
        parts.append(
            f'<rect class="hover" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - BOTTOM - TOP}">'
            f"<title>{escape(chr(10).join(lines))}</title></rect>"
        )
    return "".join(parts)


def _svg(body: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'
