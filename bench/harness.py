"""Interleaved timing: contenders take turns in one process, and only ratios are reported. Tables and figures to reach."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


def interleaved(
    contenders: dict[str, Callable[[], object]],
    seconds: float = 0.4,
    clock: Callable[[], float] = time.perf_counter,
    turn: float = 2e-3,
) -> dict[str, float]:
    """Median seconds of one call of each contender, taking turns so that drift of the machine meets all alike.

    A turn has at least about ``turn`` seconds, so that neither the clock nor the caches of the one before matter.
    """
    calls = {}
    for name, call in contenders.items():
        call()
        start = clock()
        call()
        calls[name] = max(1, int(turn / max(clock() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, call in contenders.items():
            start = clock()
            for _ in range(calls[name]):
                call()
            times[name].append((clock() - start) / calls[name])
    return {name: statistics.median(t) for name, t in times.items()}


def once(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and result of one call, for what takes too long to be repeated."""
    gc.collect()
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


@functools.cache
def dense_svd_seconds(n: int) -> float:
    """CPU seconds of one thin SVD of a Gaussian ``n x n`` matrix: the yardstick of a run."""
    W = np.random.default_rng(0).standard_normal((n, n))
    return once(lambda: np.linalg.svd(W, full_matrices=False))[0]


def check(result: object, expected: np.ndarray, what: str) -> None:
    """A contender that is wrong has no time."""
    got = np.asarray(result)
    error = np.abs(got - expected).max() / max(1e-30, np.abs(expected).max())
    if not error < 1e-3:
        raise SystemExit(f"{what}: relative error {error:.1e}")


class Figure(NamedTuple):
    """A figure to reach, and what was measured."""

    what: str
    measured: float
    target: float
    at_least: bool = False  # the larger the better
    note: str = ""

    @property
    def margin(self) -> float:
        """How many times better than the target; 1 and above is met."""
        better, worse = (self.measured, self.target) if self.at_least else (self.target, self.measured)
        return better / worse if worse else np.inf

    @property
    def met(self) -> bool:
        return self.margin >= 1.0


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown, aligned so that it reads well in a terminal too."""
        cells = [list(self.head), *([shown(v) for v in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.head))]
        lines = ["| " + " | ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


class Part(NamedTuple):
    """What one part of a benchmark found."""

    figures: list[Figure]
    tables: list[Table]


def figures_table(figures: Sequence[Figure]) -> Table:
    """Targets, measured values and how many times better than the target they are."""
    rows = [
        (
            f.what,
            f.margin,
            "yes" if f.met else "no",
            f.measured,
            f"{'>=' if f.at_least else '<='} {shown(f.target)}",
            f.note,
        )
        for f in figures
    ]
    return Table("Figures to reach", ("figure", "margin", "met", "measured", "target", "note"), rows)


def shown(value: Any) -> str:
    """Numbers in four digits, rounding errors in two, and nothing for what was not measured."""
    if not isinstance(value, (float, np.floating)):
        return str(value)
    if np.isnan(value):
        return ""
    if np.isinf(value):
        return "inf"
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.4g}"
