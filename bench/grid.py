"""The grid: which operators are applied to how many vectors, in which layout and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

import structmat as sm

LAYOUTS = ("columns", "rows")
PARTS = ("monarch", "btt", "low-rank", "butterfly", "hadamard", "kronecker", "nn")


class Entry(NamedTuple):
    """An operator by name: made when its turn comes."""

    family: str
    name: str
    make: Callable[..., Any]  # (dtype=) -> Operator
    flops: float = 0  # of one column, where the operator's own count is not that of the best algorithm


class Spec(NamedTuple):
    """Operators of one shape, which share the dense contenders, and what they are applied to."""

    part: str
    shape: tuple[int, int]
    entries: tuple[Entry, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...] = ("f4",)


class Group(NamedTuple):
    """What is measured together: all operators of a shape on one operand."""

    spec: Spec
    dtype: str
    layout: str
    batch: int


def groups(parts: tuple[str, ...], quick: bool) -> Iterator[Group]:
    """All groups of the parts; operators of one shape and dtype follow each other."""
    for part in parts:
        for spec in SPECS[part](quick):
            for dtype, batch, layout in itertools.product(spec.dtypes, spec.batches, LAYOUTS):
                yield Group(spec, dtype, layout, batch)


@lru_cache(maxsize=24)
def operator(entry: Entry, dtype: str) -> Any:
    return entry.make(dtype=np.dtype(dtype))


def operand(group: Group) -> np.ndarray:
    """A vector for one column, otherwise contiguous ``(n, B)`` or ``(B, n)``."""
    n, k = group.spec.shape[1], group.batch
    x = np.random.default_rng(1).standard_normal(n * k, dtype=np.dtype(group.dtype))
    return x.reshape(k, n) if group.layout == "rows" else x if k == 1 else x.reshape(n, k)


@lru_cache(maxsize=1)
def dense_matrix(shape: tuple[int, int], dtype: str) -> np.ndarray:
    """A dense opponent of the shape; its values do not matter for its time."""
    block = np.random.default_rng(2).standard_normal(1 << 16, dtype=np.dtype(dtype))
    return np.resize(block, shape)


def monarch(quick: bool) -> Iterator[Spec]:
    """Blocks of n/b x n/b, as in the M2 layers: rank 1 for sqrt(n) of them, n/16 (half the dense parameters) for 4."""
    for n in (256, 1024, 4096) if quick else (256, 1024, 4096, 16384):
        entries = tuple(
            Entry("monarch", f"monarch {n}/{b}", partial(sm.Monarch.random, (n, n), blocks=b, rank=n // b**2, rng=0))
            for b in (round(n**0.5), 4)
        )
        batches = ((1,) if n == 256 else (1, 16, 256)) if quick else (1, 16, 256, 4096)
        yield Spec("monarch", (n, n), entries, batches, ("f4",) if quick else ("f4", "f8"))


def btt(quick: bool) -> Iterator[Spec]:
    for n in (1024,) if quick else (1024, 4096):
        b = round(n**0.5)
        entries = tuple(
            Entry("btt", f"btt {n}/{b} r={r}", partial(sm.BlockTensorTrain.random, (n, n), blocks=b, rank=r, rng=0))
            for r in ((1, 4, 8) if quick else (1, 2, 4, 8, 16))
        )
        yield Spec("btt", (n, n), entries, (256, 1024) if quick else (1, 16, 256, 2048))


def low_rank(quick: bool) -> Iterator[Spec]:
    for n, ranks in ((1024, (16, 256)),) if quick else ((1024, (16, 64, 128, 256)), (4096, (16, 64, 512, 1024))):
        entries = tuple(
            Entry("low rank", f"low rank {n} r={r}", partial(sm.LowRank.random, (n, n), rank=r, rng=0)) for r in ranks
        )
        yield Spec("low-rank", (n, n), entries, (16, 256) if quick else (1, 16, 256, 2048))


def butterfly(quick: bool) -> Iterator[Spec]:
    for n in (1024, 4096) if quick else (1024, 4096, 16384, 65536):
        entry = Entry("butterfly", f"butterfly {n}", partial(sm.Butterfly.random, (n, n), radix=2, rng=0))
        yield Spec("butterfly", (n, n), (entry,), (1, 256) if quick else (1, 16, 256, 1024))


def hadamard(quick: bool) -> Iterator[Spec]:
    for n in (1024, 4096) if quick else (1024, 4096, 16384, 65536):
        entry = Entry("hadamard", f"hadamard {n}", partial(sm.hadamard, n), flops=n * (n.bit_length() - 1))
        yield Spec("hadamard", (n, n), (entry,), (1, 256) if quick else (1, 16, 256, 1024))


KRONECKER = {  # every row of the reference table
    "32^2": ((32, 32),) * 2,
    "64^2": ((64, 64),) * 2,
    "16^3": ((16, 16),) * 3,
    "8^4": ((8, 8),) * 4,
    "4^6": ((4, 4),) * 6,
    "32^3": ((32, 32),) * 3,
    "128^2": ((128, 128),) * 2,
    "24x16,16x24,32x16": ((24, 16), (16, 24), (32, 16)),
    "10,12,7": ((10, 10), (12, 12), (7, 7)),
    "2^12": ((2, 2),) * 12,
}


def random_product(shapes: tuple[tuple[int, int], ...], dtype: Any) -> sm.Kronecker:
    rng = np.random.default_rng(0)
    return sm.Kronecker(*(rng.standard_normal(s).astype(dtype) / s[1] ** 0.5 for s in shapes))


def kronecker(quick: bool) -> Iterator[Spec]:
    for name, shapes in KRONECKER.items():
        if quick and name not in ("64^2", "8^4", "10,12,7"):
            continue
        m, n = (int(np.prod([s[i] for s in shapes])) for i in (0, 1))
        entry = Entry("kronecker", f"kronecker {name}", partial(random_product, shapes))
        dtypes = ("f4", "f8") if name in ("64^2", "8^4") and not quick else ("f4",)
        yield Spec("kronecker", (m, n), (entry,), (1, 256) if quick else (1, 16, 256, 1024), dtypes)


def nn(quick: bool) -> Iterator[Spec]:
    """Linear layers: two families at about a quarter of the dense parameters, and Monarch with more blocks."""
    for m, n in ((1536, 384),) if quick else ((1536, 384), (384, 1536), (4096, 11008)):
        large, shape = max(m, n) > 4096, (m, n)
        r, low, blocks = (192, 768, 64) if large else (16, 64, 8)
        wide = partial(sm.Monarch.random, shape, blocks=blocks, rank=8, rng=0)
        entries = (
            Entry("monarch", f"monarch {m}x{n}/{blocks} r=8", wide),
            Entry("btt", f"btt {m}x{n}/4 r={r}", partial(sm.BlockTensorTrain.random, shape, blocks=4, rank=r, rng=0)),
            Entry("low rank", f"low rank {m}x{n} r={low}", partial(sm.LowRank.random, shape, rank=low, rng=0)),
        )
        yield Spec("nn", shape, entries, (256,) if quick else (1, 16, 256, 1024 if large else 4096))


SPECS: dict[str, Callable[[bool], Iterator[Spec]]] = {
    "monarch": monarch,
    "btt": btt,
    "low-rank": low_rank,
    "butterfly": butterfly,
    "hadamard": hadamard,
    "kronecker": kronecker,
    "nn": nn,
}
