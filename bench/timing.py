"""Timing of contenders that take turns in one process, on two clocks, with quartiles."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

TURN = 1e-3  # seconds of one turn at least, so that the clock does not matter
WARMED = 10e-3  # shorter calls start with warm caches


class Timing(NamedTuple):
    """Seconds of one call: medians on both clocks, quartiles on the one that decides."""

    cpu: float  # of the whole process
    wall: float
    low: float
    high: float
    rounds: int


def turn(call: Callable[[], object], calls: int) -> tuple[float, float]:
    """CPU and wall seconds of one call, averaged over ``calls`` of them."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls


def measure(
    contenders: dict[str, Callable[[], object]],
    seconds: float = 1.2,
    clock: str = "cpu",
    patience: float = 6.0,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time contenders that have been called once before, in turns, for about ``seconds`` altogether.

    At least 5 rounds; 2 or more where 5 would take longer than ``patience`` seconds, and there the calibration counts as
    another. Above a second, a contender that needs three times as long as the first one has its calibration only. The order
    is shuffled in every round, and short calls are made once outside their time before each turn: otherwise whoever
    follows a large dense product would pay for its cold caches.
    ``prepare`` is called before a contender's turn, outside its time.
    """
    prepare = prepare or {}
    calls, samples = {}, {}
    gc.collect()
    gc.disable()
    try:
        for name, call in contenders.items():
            prepare.get(name, int)()
            sample = turn(call, 1)
            if sample[1] < TURN:
                calls[name] = math.ceil(TURN / max(sample[1], 1e-7))
                sample = turn(call, calls[name])
            calls[name] = max(1, math.ceil(TURN / max(sample[1], 1e-7)))
            samples[name] = [sample]
        spent = {name: wall for name, [(_, wall)] in samples.items()}
        first = next(iter(spent.values()))
        slow = {name for name, wall in spent.items() if wall > max(1.0, 3 * first)}
        one_round = sum((calls[name] + (s < WARMED)) * s for name, s in spent.items() if name not in slow)
        rounds = max(5, min(200, int(seconds / max(one_round, 1e-6))))
        if rounds * one_round > max(patience, seconds):
            rounds = max(2, int(patience / one_round))
        for name in contenders:
            if name not in slow and rounds > 3:
                samples[name].clear()  # the calibration met cold caches and was not interleaved
        names, rng = list(contenders), np.random.default_rng(0)
        for _ in range(rounds):
            for name in rng.permutation(names):
                if name in slow:
                    continue
                prepare.get(name, int)()
                if spent[name] < WARMED:
                    contenders[name]()
                for _ in range(3 if rounds < 5 and spent[name] < one_round / 20 else 1):  # cheap beside the others
                    samples[name].append(turn(contenders[name], calls[name]))
    finally:
        gc.enable()
    return {name: _timing(taken, clock) for name, taken in samples.items()}


def _timing(samples: list[tuple[float, float]], clock: str) -> Timing:
    cpu, wall = zip(*samples, strict=True)
    low, high = np.quantile(cpu if clock == "cpu" else wall, (0.25, 0.75))
    return Timing(statistics.median(cpu), statistics.median(wall), float(low), float(high), len(samples))


def set_threads(count: int) -> None:
    """The number of threads of every BLAS, of torch and of Numba."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(count)
    if importlib.util.find_spec("numba"):
        import numba

        numba.set_num_threads(min(count, os.cpu_count() or 1))
    if importlib.util.find_spec("torch"):  # last: starting Numba's pool changes torch's number
        import torch

        torch.set_num_threads(count)


def relative_error(result: Any, expected: np.ndarray) -> float:
    """Largest deviation relative to the largest expected entry."""
    got = np.asarray(result)
    if got.size != expected.size:
        return float("inf")
    return float(np.abs(got.reshape(expected.shape) - expected).max() / max(1e-30, np.abs(expected).max()))
