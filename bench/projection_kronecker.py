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


def relative_tail(W: np.ndarray, params: int) -> float:
    """Relative error of the best low-rank matrix with at most as many parameters."""
    s = np.linalg.svd(W, compute_uv=False)
    return math.sqrt(float((s[params // sum(W.shape) :] ** 2).sum() / (s**2).sum()))


def sums(n: int = 256) -> None:
    """Sums of families: planted, under noise, and on a Gaussian, against low rank of as many parameters."""
    rng = np.random.default_rng(1)
    low = sm.LowRank.random((n, n), rank=8, rng=2).to_dense()
    rank8 = (sm.LowRank, {"rank": 8})
    sparse = sm.BlockSparse.random((n, n), block=16, rng=3)
    cases = {
        "low-rank + Monarch": ([rank8, (sm.Monarch, {"rank": 1})], sm.Monarch.random((n, n), rng=3)),
        "block-sparse + low-rank": ([(sm.BlockSparse, {"block": 16}), rank8], sparse),
        "diagonal + low-rank": ([sm.Diagonal, rank8], sm.Diagonal.random(n, rng=3)),
        "Kronecker + low-rank": ([sm.Kronecker, rank8], sm.Kronecker.random((n, n), rng=3)),
    }
    print(f"sums of families, {n}x{n}: relative error (low rank of as many parameters), seconds / dense SVD of W")
    for name, (families, other) in cases.items():
        member = low + other.to_dense()
        noise = rng.standard_normal((n, n))
        noisy = member + 0.1 * np.linalg.norm(member) / np.linalg.norm(noise) * noise
        cells = []
        for W in (member, noisy, noise):
            seconds, _ = once(lambda W=W: np.linalg.svd(W))
            taken, p = once(lambda W=W, families=families: sm.project(W, families))
            cells.append(f"{p.relative_error:.2e} ({relative_tail(W, p.params):.3f}) {taken / seconds:5.0f}x")
        print(f"  {name:24s} planted {cells[0]}   + 10 % noise {cells[1]}   Gaussian {cells[2]}")


def blast() -> None:
    """BLAST by alternating least squares and by L-BFGS from there, against low rank of as many parameters."""
    print("BLAST, relative error: alternating least squares, then L-BFGS, low rank of as many parameters (seconds)")
    rng = np.random.default_rng(4)
    for n, blocks, rank in ((64, 8, 8), (128, 8, 16), (128, 8, 24), (256, 8, 40)):
        patterns = sm.blast_patterns((n, n), blocks, rank)
        member = sm.Chain.random((n, n), patterns, rng=5).to_dense()
        for name, W in (("planted", member), ("Gaussian", rng.standard_normal((n, n)))):
            first, p = once(lambda W=W, patterns=patterns: sm.project(W, sm.Chain, patterns=patterns))
            second, q = once(
                lambda W=W, patterns=patterns: sm.project(W, sm.Chain, patterns=patterns, method="gradient")
            )
            print(
                f"  n {n:3d} blocks {blocks} rank {rank:2d} {name:8s}: {p.relative_error:.2e} ({first:.2f})   "
                f"{q.relative_error:.2e} ({second:.2f})   {relative_tail(W, p.params):.3f}"
            )


def main() -> None:
    """Print everything."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    kronecker(n)
    sums()
    blast()


if __name__ == "__main__":
    main()
