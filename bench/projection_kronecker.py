"""Kronecker projection, sums of families and BLAST: time against one dense SVD of W, and errors."""

from __future__ import annotations

import math

import numpy as np
from harness import Figure, Part, Table, dense_svd_seconds, once

import structmat as sm
from structmat.projection.kronecker import unfold

OPTIMUM = 1024  # up to this size the optimum is computed, by the SVD of the rearranged matrix


def run(quick: bool) -> Part:
    small = kronecker(1024)
    parts = [small] if quick else [small._replace(figures=[]), kronecker(4096)]
    tables = [table for part in parts for table in part.tables]
    return Part(parts[-1].figures, [*tables, sums(128 if quick else 256), blast(quick)])


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


def kronecker(n: int) -> Part:
    """The nearest products of two square factors over the dense SVD of W, certificate included on our side."""
    root = math.isqrt(n)
    shapes = [(root, root), (root, root)]
    dense = dense_svd_seconds(n)
    figures, rows = [], []
    for name, W in targets(n).items():
        for terms in (1, 4):
            taken, p = once(lambda W=W, terms=terms: sm.project(W, sm.Kronecker, shapes=shapes, terms=terms))
            over = math.nan
            if n <= OPTIMUM:
                s = np.linalg.svd(unfold(W, ((root, root), (root, root))), compute_uv=False)
                over = p.error / math.sqrt(float(np.square(s[terms:]).sum())) - 1
            rows.append([f"{name}, terms {terms}", dense / taken, over, 1 - p.lower_bound / p.error, taken, p.method])
            if terms == 1:
                what = f"nearest {root}x{root} (x) {root}x{root} of {n}, {name}: dense SVD over ours"
                figures.append(Figure(what, dense / taken, 20.0, True))
    head = ("", "dense SVD over ours", "error over optimum - 1", "1 - bound over error", "our CPU seconds", "method")
    return Part(figures, [Table(f"Kronecker, {n}x{n}", head, rows, f"Dense SVD: {dense:.1f} CPU seconds.")])


def relative_tail(W: np.ndarray, params: int) -> float:
    """Relative error of the best low-rank matrix with at most as many parameters."""
    s = np.linalg.svd(W, compute_uv=False)
    return math.sqrt(float((s[params // sum(W.shape) :] ** 2).sum() / (s**2).sum()))


def sums(n: int = 256) -> Table:
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
    rows = []
    for name, (families, other) in cases.items():
        member = low + other.to_dense()
        noise = rng.standard_normal((n, n))
        noisy = member + 0.1 * np.linalg.norm(member) / np.linalg.norm(noise) * noise
        for kind, W in (("planted", member), ("planted + 10 % noise", noisy), ("Gaussian", noise)):
            taken, p = once(lambda W=W, families=families: sm.project(W, families))
            rows.append([f"{name}, {kind}", taken / dense_svd_seconds(n), p.relative_error, relative_tail(W, p.params)])
    head = ("", "ours over dense SVD, time", "relative error", "low rank, equal parameters")
    return Table(f"Sums of families, {n}x{n}", head, rows)


def blast(quick: bool) -> Table:
    """BLAST by alternating least squares and by L-BFGS from there, against low rank of as many parameters."""
    rows, rng = [], np.random.default_rng(4)
    for n, blocks, rank in ((64, 8, 8), (128, 8, 16), (128, 8, 24))[: 2 if quick else None]:
        patterns = sm.blast_patterns((n, n), blocks, rank)
        member = sm.Chain.random((n, n), patterns, rng=5).to_dense()
        for name, W in (("planted", member), ("Gaussian", rng.standard_normal((n, n)))):
            first, p = once(lambda W=W, patterns=patterns: sm.project(W, sm.Chain, patterns=patterns))
            second, q = once(
                lambda W=W, patterns=patterns: sm.project(W, sm.Chain, patterns=patterns, method="gradient")
            )
            label = f"n {n}, {blocks} blocks, rank {rank}, {name}"
            tail = relative_tail(W, p.params)
            rows.append([label, p.relative_error, q.relative_error, tail, first, second])
    head = ("", "alternating least squares", "then L-BFGS", "low rank, equal parameters", "CPU s", "CPU s, L-BFGS")
    return Table("BLAST, relative error", head, rows)
