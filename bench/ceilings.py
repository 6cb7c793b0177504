"""What the machine can do: GEMM peak by dtype and bandwidth by size, measured in the run that they judge."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from timing import measure


class Ceilings(NamedTuple):
    """Flops a second of the best GEMM, and bytes a second of the best copy or triad of each size."""

    peak: dict[str, float]
    bandwidth: dict[int, float]

    def roof(self, flops: float, size: float, dtype: str) -> float:
        """Seconds that no implementation can go below whose operands are not already in a faster cache."""
        sizes = np.array(list(self.bandwidth))
        bandwidth = np.interp(np.log(size), np.log(sizes), list(self.bandwidth.values()))
        return max(flops / self.peak[dtype], size / float(bandwidth))


def ceilings(quick: bool, clock: str) -> Ceilings:
    """Both ceilings; seconds, the fastest quartile counts."""
    return Ceilings({t: gemm_peak(t, quick, clock) for t in ("f4", "f8")}, bandwidths(quick, clock))


def gemm_peak(dtype: str, quick: bool, clock: str) -> float:
    best = 0.0
    for n in (1024,) if quick else (1024, 2048):
        a, b = np.random.default_rng(0).standard_normal((2, n, n)).astype(dtype)
        contenders = {"numpy": lambda a=a, b=b: a @ b, **torch_product(a, b)}
        for call in contenders.values():
            call()
        timings = measure(contenders, 0.4 if quick else 1.5, clock)
        best = max(best, *(2 * n**3 / t.low for t in timings.values()))
    return best


def torch_product(a: np.ndarray, b: np.ndarray) -> dict:
    try:
        import torch
    except ImportError:
        return {}
    s, t = torch.from_numpy(a), torch.from_numpy(b)
    return {"torch": lambda: s @ t}


def bandwidths(quick: bool, clock: str) -> dict[int, float]:
    """Of a copy (2 streams) and a triad (3 streams) by the bytes that they touch altogether."""
    found = {}
    for megabytes in (0.25, 1, 4, 32, 128) if quick else (0.25, 1, 4, 32, 128, 512):
        size = int(megabytes * 2**20)
        x, y = np.ones((2, size // 8), np.float32)
        a, b, c = np.ones((3, size // 12), np.float32)
        calls = {"copy": lambda x=x, y=y: np.copyto(y, x), "triad": lambda a=a, b=b, c=c: np.add(a, b, out=c)}
        for call in calls.values():
            call()
        found[size] = size / min(t.low for t in measure(calls, 0.1 if quick else 0.4, clock).values())
    return found
