"""Interleaved timing: contenders take turns in one process, and only ratios are reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float = 0.4) -> dict[str, float]:
    """Median seconds of one call of each contender, taking turns so that drift of the machine meets all alike."""
    calls = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        calls[name] = max(1, int(2e-3 / once))  # at least about 2 ms per turn, so that the clock does not matter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(t) for name, t in times.items()}


def check(result: object, expected: np.ndarray, what: str) -> None:
    """A contender that is wrong has no time."""
    got = np.asarray(result)
    error = np.abs(got - expected).max() / max(1e-30, np.abs(expected).max())
    if not error < 1e-3:
        raise SystemExit(f"{what}: relative error {error:.1e}")
