"""Low rank against NumPy's SVD: exact, interpolative, and randomised where the optimum is known by construction."""

from __future__ import annotations

import math
import time

import numpy as np
from harness import Figure, Part, Table, dense_svd_seconds, interleaved, once
from projection_matrices import matrices, of_spectrum

import structmat as sm

RANK = 64


def run(quick: bool) -> Part:
    large = randomised(2048 if quick else 8192, 1024 if quick else 4096)
    return Part(large.figures, [*large.tables, exact(256 if quick else 1024)])


def randomised(n: int, yardstick: int) -> Part:
    """Rank 64 of matrices with known singular values, which decay like 1/i and exponentially."""
    i = np.arange(1.0, n + 1)
    spectra = {"1/i": 1 / i, "exp(-i/50)": np.exp(-i / 50)}
    dense = dense_svd_seconds(yardstick) * (n / yardstick) ** 3
    figures, rows = [], []
    for name, s in spectra.items():
        W = of_spectrum(s)
        seconds, p = once(lambda W=W: sm.project(W, sm.LowRank, rank=RANK))
        over = p.error / math.sqrt(float(np.square(s[RANK:]).sum()))
        figures += [
            Figure(f"low rank {RANK} of {n}, spectrum {name}: error over optimum", over, 1.01),
            Figure(f"low rank {RANK} of {n}, spectrum {name}: dense SVD over ours", dense / seconds, 20.0, True),
        ]
        rows.append([f"spectrum {name}", dense / seconds, over - 1, p.lower_bound / p.error, seconds, p.method])
    head = ("", "dense SVD over ours", "error over optimum - 1", "bound over error", "our CPU seconds", "method")
    note = (
        f"Time of the dense SVD: measured at {yardstick}, {dense_svd_seconds(yardstick):.1f} s, times "
        f"({n}/{yardstick})^3, by its flops. The optimum is known: the matrix is built from its singular values."
    )
    return Part(figures, [Table(f"Randomised low rank, {n}x{n}, rank {RANK}", head, rows, note)])


def exact(n: int) -> Table:
    """The exact projection over the thin SVD and slices of it, and what the interpolative form gains at equal parameters."""
    rows = []
    for name in ("Gaussian", "Toeplitz", "inverse Laplacian", "2-D Gaussian kernel"):
        W = matrices(n)[name]
        times = interleaved(
            {
                "svd": lambda W=W: np.linalg.svd(W, full_matrices=False),
                "project": lambda W=W: sm.project(W, sm.LowRank, budget=0.25),
                "interpolative": lambda W=W: sm.project(W, sm.LowRank, budget=0.25, interpolative=True),
            },
            0.1,
            time.process_time,
        )
        plain = sm.project(W, sm.LowRank, budget=0.25)
        gauge = sm.project(W, sm.LowRank, budget=0.25, interpolative=True)
        s = np.linalg.svd(W, compute_uv=False)
        kept = plain.operator.rank
        optimum = math.sqrt(float(np.square(s[kept:]).sum() / np.square(s).sum()))
        ratios = [times["svd"] / times[key] for key in ("project", "interpolative")]
        rows.append([name, *ratios, optimum, plain.relative_error, gauge.relative_error, kept, gauge.operator.rank])
    head = (
        "",
        "SVD over ours",
        "over interpolative",
        "truncated SVD",
        "ours",
        "interpolative",
        "rank",
        "interpolative",
    )
    return Table("Exact low rank at 25 % of the parameters: time of numpy.linalg.svd over ours, errors", head, rows)
