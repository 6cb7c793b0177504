"""Projection onto chains, as ratios in one run: against a dense SVD, one batched SVD, and peers where they are installed.

Run with one BLAS thread: ``OPENBLAS_NUM_THREADS=1 python bench/projection_chains.py [--large]``.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import interleaved

import structmat as sm
from structmat.projection.two_factor import blocks_of, layout


def bit_reversal(n: int) -> np.ndarray:
    bits = n.bit_length() - 1
    return np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(n)])


def hadamard(n: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def matrices(n: int) -> dict[str, np.ndarray]:
    """The kinds of matrices that butterflies are compared on, radix 2."""
    i, g = np.arange(n), round(n**0.5)
    x = np.linspace(0, 1, g)
    points = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    squares = ((points[:, None] - points[None]) ** 2).sum(-1)
    second = 2 * np.eye(g) - np.eye(g, k=1) - np.eye(g, k=-1)
    cosine = np.sqrt(2 / n) * np.cos(np.pi * (2 * i[None] + 1) * i[:, None] / (2 * n))
    cosine[0] /= np.sqrt(2)
    fourier = np.fft.fft(np.eye(n))
    rng = np.random.default_rng
    return {
        "Hadamard": hadamard(n),
        "DFT, bit-reversed": fourier[:, bit_reversal(n)],
        "DFT, natural": fourier,
        "DCT-II": cosine,
        "Toeplitz": rng(0).standard_normal(2 * n - 1)[i[:, None] - i[None] + n - 1],
        "circulant": rng(0).standard_normal(n)[(i[:, None] - i[None]) % n],
        "Hilbert": 1 / (i[:, None] + i[None] + 1.0),
        "2-D Gaussian kernel": np.exp(-squares / (2 * 0.1**2)),
        "inverse Laplacian": np.linalg.inv(np.kron(second, np.eye(g)) + np.kron(np.eye(g), second)),
        "iid Gaussian": rng(1).standard_normal((n, n)),
    }


def installed(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def peers(W: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The butterfly projections of other libraries, if they are here."""
    found: dict[str, Callable[[], Any]] = {}
    pyfaust = installed("pyfaust.fact")
    if pyfaust is not None:
        found["pyfaust bbtree"] = lambda: pyfaust.butterfly(W, type="bbtree")
    butterfly = installed("lazylinop.butterfly")
    if butterfly is not None:
        chain = butterfly.Chain.square_dyadic(W.shape)
        found["lazylinop ksd"] = lambda: butterfly.ksd(W, chain)
    return found


def relative(W: np.ndarray, peer: Any) -> float:
    dense = peer.toarray() if hasattr(peer, "toarray") else peer @ np.eye(W.shape[1])
    return float(np.linalg.norm(W - dense) / np.linalg.norm(W))


def butterflies(n: int) -> None:
    print(f"butterfly {n}, radix 2: relative errors")
    print(f"{'':22}{'bound':>10}{'one sweep':>11}{'+ 10 ALS':>10}{'searched':>10}  peers")
    for name, W in matrices(n).items():
        plain = sm.project(W, sm.Butterfly, radix=2)
        refined = sm.project(W, sm.Butterfly, radix=2, refine=10)
        searched = sm.project(W, sm.Butterfly, radix=2, permutation="search")
        others = ", ".join(f"{key} {relative(W, call()):.4g}" for key, call in peers(W).items())
        bound = plain.lower_bound / np.linalg.norm(W)
        errors = (bound, plain.relative_error, refined.relative_error, searched.relative_error)
        print(
            f"{name:22}" + "".join(f"{e:>10.4g}" if e > 1e-9 else f"{e:>10.1e}" for e in errors) + f"  {others}",
            flush=True,
        )
    for name in ("Hadamard", "DFT, bit-reversed", "iid Gaussian"):
        W = matrices(n)[name]
        times = interleaved(
            {
                "project": lambda W=W: sm.project(W, sm.Butterfly, radix=2),
                "dense SVD": lambda W=W: np.linalg.svd(W),
                **peers(W),
            }
        )
        ratios = ", ".join(f"{key} {t / times['project']:.1f}x" for key, t in times.items() if key != "project")
        print(f"time of others over ours, {name}: {ratios}", flush=True)


def two_factors(n: int) -> None:
    print(f"two factors {n}: time over one batched SVD of the same blocks")
    W = np.random.default_rng(0).standard_normal((n, n))
    for family, counts in (
        (sm.Monarch, (64, 64)),
        (sm.BlockTensorTrain, (64, 64)),
        (sm.BlockTensorTrain, (n // 16, 16)),
    ):
        blocks = np.ascontiguousarray(blocks_of(W, layout(W.shape, counts, family is sm.BlockTensorTrain)))
        times = {}
        for key, call in (
            ("svd", lambda b=blocks: np.linalg.svd(b, full_matrices=False)),
            ("project", lambda f=family, c=counts: sm.project(W, f, blocks=c, rank=1)),
        ):
            started = time.process_time()
            call()
            times[key] = time.process_time() - started
        ratio = times["project"] / times["svd"]
        print(
            f"{family.__name__} {counts[0]}x{counts[1]} blocks of {blocks.shape[2]}x{blocks.shape[3]}: {ratio:.2f}",
            flush=True,
        )


def growth(small: int, large: int) -> None:
    times = {}
    for n in (small, large):
        W = np.random.default_rng(0).standard_normal((n, n))
        runs = []
        for _ in range(9 if n == small else 1):
            started = time.process_time()
            sm.project(W, sm.Butterfly, radix=2)
            runs.append(time.process_time() - started)
        times[n] = min(runs[1:] or runs)
    print(
        f"butterfly {large} over {small}: {times[large] / times[small]:.1f}x the time, {(large / small) ** 2:.0f}x the entries"
    )


if __name__ == "__main__":
    butterflies(1024)
    two_factors(4096 if "--large" in sys.argv else 1024)
    growth(1024, 8192 if "--large" in sys.argv else 2048)
