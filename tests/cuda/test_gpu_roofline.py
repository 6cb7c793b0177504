"""The cost model of the GPU backends: the derived tables that it stands for, and what it decides."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from structmat.backends.cuda import sources
from structmat.backends.cuda.roofline import (
    H200,
    Work,
    best_grouping,
    chain_work,
    chunked_work,
    dense_work,
    fused_work,
    seconds,
)
from structmat.backends.cupy.backend import CupyBackend
from structmat.patterns import Pattern

BATCH = 65536
NO_CALLS = H200._replace(call=0.0)
SIZE = {"bfloat16": 2, "tf32": 4, "float32": 4}


def monarch(n: int) -> list[Pattern]:
    k = 1 << (n.bit_length() - 1) // 2
    p = n // k
    return [Pattern(1, k, k, p), Pattern(k, p, p, 1)]


def times(n: int, name: str) -> tuple[float, float]:
    """Milliseconds of dense and of two products, launches left out."""
    dtype, precision = ("float32", name) if name == "tf32" else (name, "exact")
    works = dense_work(n, n, BATCH, SIZE[name]), chain_work(monarch(n), BATCH, SIZE[name])
    dense, products = (1e3 * seconds(work, NO_CALLS, dtype, precision) for work in works)
    return dense, products


@pytest.mark.parametrize(
    ("n", "name", "dense", "products"),
    [
        (1024, "bfloat16", 0.174, 0.125),
        (4096, "bfloat16", 2.78, 0.500),
        (16384, "bfloat16", 44.5, 2.00),
        (4096, "tf32", 5.57, 1.0),
        (2048, "float32", 11.0, 0.515),
        (16384, "float32", 704, 11.0),
    ],
)
def test_derived_times(n, name, dense, products):
    assert times(n, name) == (pytest.approx(dense, rel=0.02), pytest.approx(products, rel=0.03))


def test_products_break_even_with_dense_near_735():
    assert times(512, "bfloat16")[0] < times(512, "bfloat16")[1]
    assert times(1024, "bfloat16")[0] > times(1024, "bfloat16")[1]


def test_few_rows_are_bound_by_launches():
    work = chain_work(monarch(4096), 1, 2)
    assert seconds(work, H200, "bfloat16") == pytest.approx(2 * H200.call)
    assert seconds(Work(0, 0), H200, "bfloat16") == H200.call


def test_chunks_pay_where_the_cache_is_faster_than_memory():
    plain, chunked = chain_work(monarch(4096), BATCH, 2), chunked_work(monarch(4096), BATCH, 2, 2048)
    assert seconds(chunked, H200, "bfloat16") < seconds(plain, H200, "bfloat16")
    slow = H200._replace(call=1e-3)
    assert seconds(chunked, slow, "bfloat16") > seconds(plain, slow, "bfloat16")
    assert chunked.calls == 2 * math.ceil(BATCH / 2048)


@pytest.mark.parametrize(("n", "wins"), [(1024, True), (8192, False), (16384, False)])
def test_fusion_pays_for_small_operators_only(n, wins):
    k = 1 << (n.bit_length() - 1) // 2
    p = n // k
    kernel = sources.monarch_kernel("bfloat16", k, p, p, k, lanes=False, shared=H200.shared_bytes)
    if kernel is None:
        assert not wins
        return
    weights = sum(pattern.nparams for pattern in monarch(n))
    tile = 2 * (kernel.rows * (n + n / kernel.columns) + weights / kernel.columns)
    tiles = -(-BATCH // kernel.rows) * kernel.columns
    fused = fused_work(n, n, BATCH, 2, weights, weights, tile, tiles, H200)
    assert (seconds(fused, H200, "bfloat16") < seconds(chain_work(monarch(n), BATCH, 2), H200, "bfloat16")) == wins


def test_groups_are_the_cheapest_of_all():
    rng = random.Random(0)
    for count in range(1, 7):
        costs = {(i, j): rng.random() for i in range(count) for j in range(i + 1, count + 1)}
        for pair in list(costs):
            if pair[1] - pair[0] > 1 and rng.random() < 0.3:
                costs[pair] = None
        every = [
            sum(parts)
            for r in range(count)
            for cut in itertools.combinations(range(1, count), r)
            if None not in (parts := [costs[p] for p in itertools.pairwise((0, *cut, count))])
        ]
        found = best_grouping(count, lambda i, j, costs=costs: costs[i, j])
        assert [i for i, _ in found] + [count] == [0] + [j for _, j in found]
        assert sum(costs[p] for p in found) == pytest.approx(min(every))


def test_the_backend_refuses_unknown_kernels():
    with pytest.raises(ValueError, match="expected kernels"):
        CupyBackend(kernels=("tensor",))
