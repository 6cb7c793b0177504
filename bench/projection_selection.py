"""structmat.approximate on known matrices: what it finds, its time against a dense SVD, and its memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
from harness import Part, Table, dense_svd_seconds, once
from projection_matrices import matrices

import structmat as sm

LEFT_OUT = ("DFT, bit-reversed", "circulant")  # nothing in them that the DFT and the Toeplitz matrix do not show


def run(quick: bool) -> Part:
    n = 256 if quick else 1024
    found = {name: W for name, W in matrices(n).items() if name not in LEFT_OUT}
    sm.approximate(found["Gaussian"][:128, :128], budget=0.25)  # imports and first calls
    rows = []
    for name, W in found.items():
        for budget in (0.02, 0.25):
            seconds, best = once(lambda W=W, budget=budget: sm.approximate(W, budget=budget))
            plain = min((e.relative_error for e in best if e.family is sm.LowRank), default=np.nan)
            rows.append(
                [
                    name,
                    f"{budget:.0%}",
                    seconds / dense_svd_seconds(n),
                    best.best.relative_error,
                    plain,
                    best.best.label,
                ]
            )
    memory = peak(lambda: sm.approximate(found["Gaussian"], budget=0.25)) / found["Gaussian"].nbytes
    head = ("", "budget", "time over dense SVD", "relative error", "low rank", "found")
    note = (
        "A complex SVD takes longer than the real one of the yardstick. "
        f"Memory at most, Gaussian, 25 %: {memory:.1f} times W."
    )
    return Part([], [Table(f"Selection, n = {n}", head, rows, note)])


def peak(call: Callable[[], object]) -> int:
    """Bytes that NumPy held at most during a call."""
    tracemalloc.start()
    call()
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return top
