"""structmat.approximate on known matrices: what it finds, and its time and memory against one dense SVD in the same run.

Run with one BLAS thread. ``--size`` 1024 is the size of the figures in the docs; ``--full`` prints whole tables.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

import numpy as np
import scipy.fft
import scipy.linalg
from threadpoolctl import threadpool_limits

import structmat as sm


def zoo(n: int) -> dict[str, np.ndarray]:
    side = round(n**0.5)
    rng = np.random.default_rng(0)
    i = np.arange(n)
    one = 2 * np.eye(side) - np.eye(side, k=1) - np.eye(side, k=-1)
    x = np.arange(side) / side
    kernel = np.exp(-((x[:, None] - x) ** 2) / 0.02)
    return {
        "inverse Laplacian": np.linalg.inv(np.kron(one, np.eye(side)) + np.kron(np.eye(side), one)),
        "Hadamard": scipy.linalg.hadamard(n).astype(float),
        "DFT": np.exp(-2j * np.pi * (np.outer(i, i) % n) / n),
        "DCT-II": scipy.fft.dct(np.eye(n), axis=0, norm="ortho"),
        "Toeplitz": scipy.linalg.toeplitz(rng.standard_normal(n), rng.standard_normal(n)),
        "Hilbert": 1 / (i[:, None] + i + 1.0),
        "2-D Gaussian kernel": np.kron(kernel, kernel),
        "Gaussian": rng.standard_normal((n, n)),
    }


def seconds(call) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def peak(call) -> int:
    """Bytes that NumPy held at most during a call."""
    tracemalloc.start()
    call()
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return top


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="a power of 4")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.02, 0.25])
    parser.add_argument("--full", action="store_true", help="print every table")
    options = parser.parse_args()
    matrices = zoo(options.size)
    sm.approximate(matrices["Gaussian"][:128, :128], budget=0.25)  # imports and first calls
    print(f"NumPy {np.__version__}, n = {options.size}, one thread; SVD: full, of the same matrix, before and after")
    print(f"{'matrix':20} {'budget':>7} {'SVDs':>6} {'memory/W':>9} {'low rank':>10} {'best':>10}  found")
    with threadpool_limits(1):
        for name, W in matrices.items():
            for budget in options.budgets:
                before, _ = seconds(lambda W=W: np.linalg.svd(W, full_matrices=False))
                ours, found = seconds(lambda W=W, budget=budget: sm.approximate(W, budget=budget))
                after, _ = seconds(lambda W=W: np.linalg.svd(W, full_matrices=False))
                memory = peak(lambda W=W, budget=budget: sm.approximate(W, budget=budget)) / W.nbytes
                plain = min(e.relative_error for e in found if e.family is sm.LowRank)
                ratio = 2 * ours / (before + after)
                print(
                    f"{name:20} {budget:7.0%} {ratio:6.2f} {memory:9.1f} {plain:10.2e} "
                    f"{found.best.relative_error:10.2e}  {found.best.label}",
                    flush=True,
                )
                if options.full:
                    print(found, "\n")


if __name__ == "__main__":
    main()
