"""Kronecker projection, sums of families and BLAST: seconds as ratios to one dense SVD of W, and errors.

Run from the root: ``python -m bench.projection_kronecker [n]`` (default 1024; 4096 is the figure to reach, some minutes).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import structmat as sm
from structmat.projection.kronecker import unfold


def once(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of one call: the dense SVD of a large matrix is not repeated."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def targets(n: int) -> dict[str, np.ndarray]:
    """A Kronecker product under noise, a rearrangement of slowly decaying spectrum, and no structure at all."""
    rng = np.random.default_rng(0)
    root = math.isqrt(n)
    shape = (root, root)
    factors = [rng.standard_normal(shape) for _ in range(6)]
    decaying = sum(np.kron(factors[2 * t], factors[2 * t + 1]) / (1 + t) for t in range(3))
    noise = rng.standard_normal((n, n))
    return {
        "product + 10 % noise": np.kron(factors[0], factors[1]) + 0.1 * noise,
        "three terms + noise": decaying + 0.5 * noise,
        "Gaussian (no gap)": noise,
    }


def kronecker(n: int) -> None:
    """The nearest product of two square factors against the dense SVD of W and the SVD of the rearrangement."""
    root = math.isqrt(n)
    shapes = [(root, root), (root, root)]
    print(f"nearest {root}x{root} (x) {root}x{root} of {n}x{n}: dense SVD of W / projection, certificate included")
    for name, W in targets(n).items():
        seconds, _ = once(lambda W=W: np.linalg.svd(W, full_matrices=False))
        s = np.linalg.svd(unfold(W, ((root, root), (root, root))), compute_uv=False)
        for terms in (1, 4):
            optimum = math.sqrt(float((s[terms:] ** 2).sum()))
            taken, p = once(lambda W=W, terms=terms: sm.project(W, sm.Kronecker, shapes=shapes, terms=terms))
            print(
                f"  {name:22s} terms {terms}: {seconds / taken:6.1f}x   error / optimum - 1 = {p.error / optimum - 1:.1e}   "
                f"1 - bound / optimum = {1 - p.lower_bound / optimum:.1e}   ({p.method})"
            )


def main() -> None:
    """Print everything."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    kronecker(n)


if __name__ == "__main__":
    main()
