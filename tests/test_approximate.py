"""approximate and allocate: the best family for a matrix, and one budget over many matrices."""

from __future__ import annotations

import itertools
import math
import sys
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import torch

import structmat as sm
from structmat.projection import search_blocks
from structmat.projection.allocation import Rung, fill_up, greedy, lower_hull
from structmat.projection.approximate import FAMILIES
from structmat.projection.cost import Stage, chain_stages, cost, kronecker_stages, low_rank_stages
from structmat.projection.members import KroneckerMember, LowRankMember, two_factor_members
from structmat.projection.screening import decompose, draw, leading_energies, split

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]


def gaussian(shape, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def inverse_laplacian(side):
    one = 2 * np.eye(side) - np.eye(side, k=1) - np.eye(side, k=-1)
    return np.linalg.inv(np.kron(one, np.eye(side)) + np.kron(np.eye(side), one))


def double(x):
    return np.asarray(x).astype(np.complex128 if np.asarray(x).dtype.kind == "c" else np.float64)


def certified(found, W, limit=None, tol=None):
    """Every entry against dense matrices; the order of the entries."""
    W = double(W)
    norm = np.linalg.norm(W)
    for entry in found:
        operator = entry.operator.to("numpy") if entry.operator.kind != "numpy" else entry.operator
        error = np.linalg.norm(W - double(operator.astype(np.result_type(operator.dtype, np.float64)).to_dense()))
        assert np.isclose(entry.error, error, rtol=1e-6, atol=1e-12 * norm), entry.label
        assert entry.lower_bound <= entry.error
        assert np.isclose(entry.relative_error, entry.error / norm)
        assert entry.params == entry.operator.nparams
        assert entry.operator.shape == W.shape
        assert limit is None or entry.params <= limit
        assert tol is None or entry.relative_error <= tol
    fast = [e for e in found if not e.slower]
    keys = [(e.params if tol else e.relative_error) for e in fast]
    assert all(a <= b * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(keys))
    assert [e.slower for e in found] == sorted(e.slower for e in found)
    assert len({e.label for e in found}) == len(found)


# ---- known answers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inverse_laplacian_is_a_kronecker_sum():
    W = inverse_laplacian(32)
    found = sm.approximate(W, budget=0.02)
    certified(found, W, limit=int(0.02 * 1024**2))
    assert found.best.family is sm.Kronecker
    assert found.best.options == {"shapes": [(32, 32), (32, 32)], "terms": 10}
    assert 4.2e-8 < found.best.relative_error < 4.3e-8  # Kronecker sum of ten terms, in the literature 4.25e-8
    others = [e for e in found if e.family is not sm.Kronecker]
    assert min(e.relative_error for e in others) > 0.3


def test_inverse_laplacian_small():
    W = inverse_laplacian(16)
    found = sm.approximate(W, budget=0.1)
    certified(found, W, limit=6553)
    assert found.best.family is sm.Kronecker
    assert found.best.relative_error < 1e-7
    best = sm.approximate(W, tol=1e-2).best
    assert (best.family, best.options["terms"]) == (sm.Kronecker, 3)


def test_hadamard_is_exact_with_fewest_parameters():
    W = scipy.linalg.hadamard(256).astype(float)
    found = sm.approximate(W, budget=0.15)
    certified(found, W, limit=9830)
    assert found.best.relative_error < 1e-13
    assert found.best.params == 512
    exact = {e.family for e in found if e.relative_error < 1e-13}
    assert {sm.Kronecker, sm.Monarch, sm.Butterfly} <= exact


def test_toeplitz_is_a_kronecker_sum_and_slower_than_dense():
    W = scipy.linalg.toeplitz(gaussian(256, seed=1), gaussian(256, seed=2))
    usual = sm.approximate(W, budget=0.25)
    certified(usual, W)
    assert not usual.best.slower
    assert usual[-1].slower
    assert usual[-1].family is sm.Kronecker
    assert usual[-1].relative_error < 1e-12  # exact, but at 3.9 times the flops of dense
    assert usual[-1].flops > 3
    assert str(usual).splitlines()[-1].endswith("slower than dense")
    asked = sm.approximate(W, budget=0.25, allow_slower=True)
    assert asked.best.family is sm.Kronecker
    assert asked.best.relative_error < 1e-12


def test_gaussian_has_no_family():
    W = gaussian((256, 256))
    found = sm.approximate(W, budget=0.25)
    certified(found, W)
    low_rank = next(
        e for e in found if e.label.startswith("LowRank") and e.family is sm.LowRank and "inter" not in e.label
    )
    errors = [min(e.relative_error for e in found if e.family is f) for f in (sm.Monarch, sm.BlockTensorTrain)]
    assert all(0.9 * low_rank.relative_error < e < 1.05 * low_rank.relative_error for e in errors)


def test_fourier_is_found_in_its_order():
    W = np.fft.fft(np.eye(144)) / 12
    best = sm.approximate(W, budget=0.2).best
    assert best.relative_error < 1e-12
    assert best.options["layout"] == ("strided", "strided")
    again = sm.project(W, best.family, **best.options)
    assert again.relative_error < 1e-12
    assert again.params == best.params


def test_a_kronecker_sum_with_half_the_parameters_costs_more_than_dense():
    found = sm.approximate(gaussian((256, 256)), budget=0.5, families=sm.Kronecker)
    worst = max(found, key=lambda e: e.params)
    assert worst.slower
    assert worst.flops > 4
    assert found[0].flops <= 1


# ---- against exhaustive search ------------------------------------------------------------------------------------------


def exhaustive(W, limit):
    """Least relative error over low rank, all blocks and layouts, and all Kronecker shapes, by dense SVDs."""
    m, n = W.shape
    norm, best = np.linalg.norm(W), math.inf

    def tail(blocks, rank):
        s = np.linalg.svd(blocks, compute_uv=False)
        return math.sqrt(float(np.square(s[..., rank:]).sum())) / norm

    for l, k in itertools.product(range(1, m + 1), range(1, n + 1)):
        if m % l or n % k:
            continue
        s, p = m // l, n // k
        for rank in range(1, min(s, p) + 1):
            if l * k * rank * (s + p - rank) > limit:  # interpolative, the smaller form
                break
            for rows, cols in itertools.product((True, False), repeat=2):
                index = np.arange(m).reshape(l, s) if rows else np.arange(m).reshape(s, l).T
                other = np.arange(n).reshape(k, p) if cols else np.arange(n).reshape(p, k).T
                best = min(best, tail(W[index[:, None, :, None], other[None, :, None, :]], rank))
        terms = limit // (l * k + s * p)
        if l * k > 1 and s * p > 1 and terms:
            r = W.reshape(l, s, k, p).transpose(0, 2, 1, 3).reshape(l * k, s * p)
            flops = 2 * min(k * s * p + s * l * k, p * l * k + l * s * p)
            terms = min(terms, (2 * m * n) // flops)
            best = min(best, tail(r, terms)) if terms else best
    return best


@pytest.mark.parametrize("name", ["gaussian", "kernel", "rectangular", "blocks", "low"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_within_one_percent_of_exhaustive_search(name, share):
    x = np.linspace(0, 1, 24)
    W = {
        "gaussian": gaussian((24, 24)),
        "kernel": np.exp(-30 * (x[:, None] - x) ** 2) + 0.01 * gaussian((24, 24)),
        "rectangular": gaussian((32, 16), seed=3),
        "blocks": np.kron(np.eye(4), gaussian((6, 6))) + 0.1 * gaussian((24, 24), seed=4),
        "low": gaussian((24, 3)) @ gaussian((3, 24), seed=1) + 0.1 * gaussian((24, 24), seed=2),
    }[name]
    limit = int(share * W.size)
    found = sm.approximate(W, budget=limit)
    certified(found, W, limit=limit)
    assert found.best.relative_error <= 1.01 * exhaustive(W, limit)


def test_sampled_screening_is_near_the_exact_one(monkeypatch):
    x = np.linspace(0, 1, 96)
    matrices = [gaussian((96, 96)), 1 / (0.05 + np.abs(x[:, None] - x)), inverse_laplacian(10)]
    for W in matrices:
        sampled = sm.approximate(W, budget=0.2, families=[sm.Monarch, sm.BlockTensorTrain])
        with monkeypatch.context() as patch:
            patch.setattr(search_blocks, "SMALL", W.size)
            exact = sm.approximate(W, budget=0.2, families=[sm.Monarch, sm.BlockTensorTrain])
        assert sampled.best.relative_error <= 1.01 * exact.best.relative_error


# ---- parts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(12, 20), (13, 7)])
def test_every_layout_is_built_as_it_is_arranged(shape, dtype):
    W = gaussian(shape, dtype)
    members = two_factor_members(shape, [sm.Monarch, sm.BlockTensorTrain])
    assert len(members) > 20
    for member in members:
        blocks = member.arrange(W)
        count, s, p = member.sizes
        assert blocks.shape[2:] == (s, p)
        assert blocks.shape[0] * blocks.shape[1] == count
        for gram in (False, True):
            factors = decompose(blocks, gram)
            operator = member.build(*split(blocks, factors, min(s, p)))
            assert np.allclose(operator.to_dense(), W)  # full rank: exact
            assert np.allclose(member.multiplied_out(operator).to_dense(), W)
            assert type(operator) is member.family
            assert operator.nparams == min(s, p) * member.step
        again = sm.project(W, member.family, **member.options(1))
        x, y = split(blocks, decompose(blocks, False), 1)
        assert np.isclose(np.linalg.norm(W - member.build(x, y).to_dense()), again.error)
        form = member._replace(interpolative=True)
        p = sm.project(W, form.family, **form.options(1))
        assert p.params == form.step - form.gauge
        assert sum(stage.values for stage in form.stages(1)) == p.params


def test_low_rank_and_kronecker_members():
    W = gaussian((12, 20))
    for member in (LowRankMember((12, 20)), LowRankMember((12, 20), 1), KroneckerMember(((3, 4), (4, 5)))):
        blocks = member.arrange(W)
        operator = member.build(*split(blocks, decompose(blocks, True), 3))
        best = sm.project(W, member.family, **member.options(3))
        assert np.allclose(operator.to_dense(), best.operator.to_dense())
        assert np.allclose(member.multiplied_out(operator).to_dense(), operator.to_dense())
        assert operator.nparams == 3 * (member.step - 3 * member.gauge) == sum(s.values for s in member.stages(3))


def test_samples_stand_for_all_blocks():
    rng = np.random.default_rng(0)
    blocks = gaussian((6, 7, 5, 4)) * np.exp(2 * gaussian((6, 7, 1, 1), seed=1))
    totals = [
        float(weights @ np.square(stack).sum(axis=(1, 2)))
        for stack, weights in (draw(blocks, 8, rng) for _ in range(50))
    ]
    assert np.allclose(totals, np.square(blocks).sum())  # in proportion to energy: the total has no variance
    tails = []
    for _ in range(400):
        stack, weights = draw(blocks, 8, rng)
        tails.append(weights @ np.square(np.linalg.svd(stack)[1][:, 2:]).sum(axis=1))
    assert np.isclose(np.mean(tails), np.square(np.linalg.svd(blocks)[1][..., 2:]).sum(), rtol=0.05)
    assert draw(np.zeros((4, 4, 2, 2)), 3, rng)[0].shape[1:] == (2, 2)


@pytest.mark.parametrize("most", [3, 60])
@pytest.mark.parametrize("shape", [(2, 90, 70), (2, 70, 90), (3, 20, 90)])
def test_leading_energies(shape, most):
    stack = gaussian(shape) * 0.9 ** np.arange(shape[2])
    s = np.square(np.linalg.svd(stack, compute_uv=False))
    found = leading_energies(stack, most, np.random.default_rng(0))
    kept = min(most, found.shape[1], s.shape[1])
    assert kept >= min(most, min(shape[1:]))
    assert np.all(found[:, :kept] <= s[:, :kept] * (1 + 1e-9) + 1e-12)
    assert np.allclose(found[:, :3], s[:, :3], rtol=0.05)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_small_ranks_are_decomposed_in_a_random_basis(dtype):
    x = gaussian((1, 2, 200, 9), dtype) @ (gaussian((1, 2, 9, 160), dtype, 1) * np.logspace(0, -8, 160))
    u, s, vh = decompose(x, False)
    assert s.shape[-1] < 160
    assert np.allclose(s, np.linalg.svd(x, compute_uv=False)[..., : s.shape[-1]], atol=1e-13 * np.linalg.norm(x))
    assert np.allclose((u * s[..., None, :]) @ vh, x, rtol=0, atol=1e-12)
    noisy = x + 1e-10 * gaussian(x.shape, dtype, 2)
    assert decompose(noisy, False).s.shape[-1] == 160


def test_cost_counts_what_operators_count():
    low, kron, monarch = sm.LowRank.random((30, 20), rank=4), sm.Kronecker.random((24, 20)), sm.Monarch.random((30, 20))
    for operator, stages in (
        (low, low_rank_stages((30, 20), 4)),
        (sm.Interpolative.random((30, 20), rank=4), low_rank_stages((30, 20), 4, 1)),
        (kron, kronecker_stages([f.shape for f in kron.factors])),
        (monarch, chain_stages(monarch.patterns)),
    ):
        assert sum(s.flops for s in stages) == operator.flops()
        assert sum(s.values for s in stages) == operator.nparams
    same = cost([Stage(2.0 * 30 * 20, 600, 50)], (30, 20), 8, 8)
    assert same == (1.0, 1.0)
    assert not same.slower
    many = cost(kronecker_stages([(16, 16), (16, 16)], 64), (256, 256), 256, 8)
    assert many.slower
    assert np.isclose(many.flops, 8)
    assert cost(low_rank_stages((256, 256), 16), (256, 256), 1, 8).speed == pytest.approx(8, rel=0.1)


# ---- the front door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 24), (17, 31)])
def test_dtypes_and_shapes(shape, dtype):
    W = gaussian(shape, dtype)
    kept = W.copy()
    found = sm.approximate(W, budget=0.4)
    certified(found, W, limit=int(0.4 * W.size))
    assert all(e.operator.dtype == dtype for e in found)
    assert np.array_equal(W, kept)
    found = sm.approximate(W, tol=0.6)
    certified(found, W, tol=0.6)


def test_torch_and_scipy_and_operators():
    W = gaussian((20, 16))
    found = sm.approximate(torch.tensor(W, dtype=torch.float32), budget=0.4)
    assert all(e.operator.dtype == torch.float32 for e in found)
    for other in (sm.as_operator(W), scipy.sparse.csr_array(W), W.tolist()):
        assert np.isclose(sm.approximate(other, budget=0.4).best.error, sm.approximate(W, budget=0.4).best.error)


def test_every_entry_can_be_had_from_project():
    W = gaussian((30, 24)) * np.exp(-np.arange(24) / 5)
    for entry in (*sm.approximate(W, budget=0.4), *sm.approximate(W, tol=0.3)):
        again = sm.project(W, entry.family, **entry.options)
        assert np.isclose(again.error, entry.error), entry.label
        assert again.params == entry.params
        assert type(again.operator) is type(entry.operator)


def test_families_can_be_chosen():
    W = gaussian((32, 32))
    for family in FAMILIES:
        found = sm.approximate(W, budget=0.6, families=[family])
        assert {e.family for e in found} == {family}
    both = sm.approximate(W, budget=0.5, families=[sm.LowRank, sm.BlockDiagonal])
    assert {e.family for e in both} == {sm.LowRank, sm.BlockDiagonal}
    assert sm.approximate(W, budget=0.5, families=sm.Monarch).best.family is sm.Monarch


def test_scale_and_special_matrices():
    for scale in (1e-200, 1e180):
        W = gaussian((24, 24))
        small, usual = sm.approximate(scale * W, budget=0.4).best, sm.approximate(W, budget=0.4).best
        assert small.label == usual.label
        assert np.isclose(small.relative_error, usual.relative_error)
    zero = sm.approximate(np.zeros((12, 12)), budget=0.5)
    assert zero.best.error == 0
    assert zero.best.relative_error == 0
    assert sm.approximate(np.eye(30), budget=0.2).best.relative_error < 1e-12
    assert sm.approximate(np.ones((1, 9)), budget=1.0).best.error < 1e-12
    assert sm.approximate(np.ones((90, 80)), tol=1e-8).best.params <= 170
    rank_two = gaussian((90, 2)) @ gaussian((2, 80))
    assert sm.approximate(rank_two, tol=1e-10, families=sm.LowRank).best.operator.rank == 2


def test_a_weight_ranks_by_the_error_of_the_outputs():
    W, X = gaussian((24, 16)), gaussian((16, 200), seed=1) * 0.7 ** np.arange(16)[:, None]
    C = X @ X.T / 200
    families = [sm.LowRank, sm.Monarch, sm.BlockTensorTrain, sm.BlockDiagonal, sm.Kronecker]
    found = sm.approximate(W, budget=0.4, weight=C, families=families)
    S = np.linalg.cholesky(C)
    for entry in found:
        assert np.isclose(entry.error, np.linalg.norm((W - entry.operator.to_dense()) @ S), rtol=1e-6)
    plain = sm.approximate(W, budget=0.4, families=families).best
    assert found.best.error < np.linalg.norm((W - plain.operator.to_dense()) @ S)
    assert not found.curves


@pytest.mark.parametrize("family", [None, *FAMILIES], ids=lambda f: "all" if f is None else f.__name__)
def test_a_tolerance_is_met_in_the_norm_of_a_weight(family):
    X = gaussian((24, 200), seed=1) * 0.6 ** np.arange(24)[:, None] + 0.05
    W, C = gaussian((24, 24)), X @ X.T / 200
    tol = 0.2 if family in (None, sm.LowRank, sm.Monarch, sm.BlockTensorTrain) else 0.75
    found = sm.approximate(W, tol=tol, weight=C, families=family, allow_slower=True)
    norm = math.sqrt(np.trace(W @ C @ W.T))
    for entry in found:
        E = W - entry.operator.to_dense()
        assert entry.relative_error == pytest.approx(math.sqrt(np.trace(E @ C @ E.T)) / norm, abs=1e-7)
        assert entry.relative_error <= tol
        again = sm.project(W, entry.family, weight=C, **entry.options)
        assert again.error == pytest.approx(entry.error, rel=1e-6, abs=1e-9)
    assert [e.params for e in found] == sorted(e.params for e in found)
    if family is None:
        assert found.best.params < sm.approximate(W, tol=tol, allow_slower=True).best.params, "few inputs matter"


def test_a_tolerance_in_the_norm_of_a_weight_that_nothing_meets():
    W, C = gaussian((16, 16)), np.diag(np.arange(1.0, 17.0))
    for families in (sm.LowRank, sm.BlockDiagonal, sm.Butterfly, [sm.Kronecker, sm.Monarch]):
        with pytest.raises(ValueError, match=r"at most 1e-09; the best relative error reached is 0\.\d"):
            sm.approximate(W, tol=1e-9, weight=C, families=families)


def test_results_repeat_for_a_seed():
    W = gaussian((96, 96))
    first, second = (sm.approximate(W, budget=0.2, rng=3) for _ in range(2))
    assert [e.label for e in first] == [e.label for e in second]
    assert [e.error for e in first] == [e.error for e in second]
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.operator.to_dense(), b.operator.to_dense())
    assert sm.approximate(W, budget=0.2, rng=np.random.default_rng(3)).best.error == first.best.error


def test_table_and_plot():
    import matplotlib

    matplotlib.use("Agg")
    found = sm.approximate(gaussian((48, 32)), budget=0.3)
    lines = str(found).splitlines()
    assert lines[0] == "48x32 within 460 parameters (29.95% of dense), by error"
    assert lines[1].split() == ["architecture", "parameters", "rel.", "error", "best", "possible", "flops", "speed"]
    assert len(lines) == 2 + len(found)
    assert found.best.label in lines[2]
    assert repr(found).startswith("<Approximations of 48x32")
    assert found[:2] == (found[0], found[1])
    for name, (counts, errors) in found.curves.items():
        assert name in {f.__name__ for f in FAMILIES}
        assert np.all(np.diff(counts) > 0)
        assert np.all(np.diff(errors) < 0)
        assert counts.max() <= 460
    ax = found.plot()
    assert len(ax.lines) == len(found.curves) + len(found)
    assert found.plot(ax) is ax
    matplotlib.pyplot.close("all")


def test_memory_is_a_few_times_the_matrix():
    W = gaussian((512, 512))
    families = [sm.LowRank, sm.Kronecker, sm.Monarch, sm.BlockTensorTrain, sm.Butterfly]
    sm.approximate(W[:96, :96], budget=0.2)  # imports
    tracemalloc.start()
    sm.approximate(W, budget=0.2, families=families)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 * W.nbytes


BAD = [
    ({}, ValueError, "exactly one of budget and tol"),
    ({"budget": 0.5, "tol": 0.1}, ValueError, "exactly one of budget and tol"),
    ({"budget": 0.0}, ValueError, "budget"),
    ({"budget": True}, TypeError, "budget"),
    ({"tol": 2.0}, ValueError, "tol"),
    ({"tol": "a"}, TypeError, "tol"),
    ({"budget": 0.5, "batch": 0}, ValueError, "batch: expected at least 1, got 0"),
    ({"budget": 0.5, "batch": 1.5}, TypeError, "batch"),
    ({"budget": 0.5, "families": [sm.Toeplitz]}, TypeError, "families: .*LowRank.*; got Toeplitz"),
    ({"budget": 0.5, "families": []}, ValueError, "families"),
    ({"budget": 3}, ValueError, "nearest feasible count is 8"),
    ({"budget": 10, "families": sm.LowRank}, ValueError, "nearest feasible count is 15"),
    ({"tol": 1e-9}, ValueError, "the best relative error reached is 0"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_input(options, kind, message):
    with pytest.raises(kind, match=message):
        sm.approximate(gaussian((8, 8)), **options)


def test_bad_matrices():
    for W, kind in ((np.full((4, 4), np.nan), ValueError), (np.ones(4), ValueError), (np.array(["a"]), TypeError)):
        with pytest.raises(kind):
            sm.approximate(W, budget=0.5)
        with pytest.raises(kind):
            sm.allocate({"a": W}, budget=0.5)


def test_progress(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    made = []

    class Recorder(tqdm.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "delay": 0, "disable": False, "file": open("/dev/null", "w")})  # noqa: SIM115
            made.append(self)

        def close(self):
            self.closed = True
            super().close()
            if not self.fp.closed:
                self.fp.close()

    monkeypatch.setattr(tqdm, "tqdm", Recorder)
    sm.approximate(gaussian((16, 16)), budget=0.5, progress=True)
    sm.allocate({"a": gaussian((16, 16))}, budget=0.5, progress=True)
    assert all(bar.n == bar.total > 0 and bar.closed for bar in made)
    assert len(made) == 2
    sm.approximate(gaussian((16, 16)), budget=0.5)
    assert len(made) == 2
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="tqdm"):
        sm.approximate(gaussian((16, 16)), budget=0.5, progress=True)


def test_an_interrupted_run_leaves_nothing_behind(monkeypatch):
    W = gaussian((80, 80))
    kept, expected = W.copy(), sm.approximate(W, budget=0.3)
    calls = itertools.count()
    real = search_blocks.sampled

    def interrupted(*args, **options):
        if next(calls) == 20:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(search_blocks, "sampled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sm.approximate(W, budget=0.3, progress=True)
    assert np.array_equal(W, kept)
    assert [e.error for e in sm.approximate(W, budget=0.3)] == [e.error for e in expected]


# ---- allocate -----------------------------------------------------------------------------------------------------------


def matrices(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "flat": rng.standard_normal((8, 10)),
        "steep": rng.standard_normal((9, 7)) * 0.4 ** np.arange(7),
        "small": 0.1 * rng.standard_normal((6, 6)),
    }


def brute_force(weights, limit, relative):
    """Least sum of squared errors over all ranks and dense, by dense SVDs."""
    options = []
    for W in weights.values():
        (m, n), s = W.shape, np.linalg.svd(W, compute_uv=False)
        scale = np.linalg.norm(W) if relative else 1.0
        rungs = [(r * (m + n), float((s[r:] ** 2).sum()) / scale**2) for r in range(1, len(s)) if r * (m + n) < m * n]
        options.append([*rungs, (m * n, 0.0)])
    return min(
        math.fsum(loss for _, loss in choice)
        for choice in itertools.product(*options)
        if sum(count for count, _ in choice) <= limit
    )


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.7, 0.9, 1.0])
def test_allocation_is_optimal_up_to_a_step(share, relative):
    for seed in range(4):
        weights = matrices(seed)
        limit = int(share * sum(W.size for W in weights.values()))
        plan = sm.allocate(weights, budget=share, relative=relative)
        best = math.sqrt(brute_force(weights, limit, relative))
        assert plan.params <= limit
        assert plan.lower_bound <= best * (1 + 1e-12) + 1e-14
        assert best <= plan.error * (1 + 1e-12) + 1e-14
        total, step = 0.0, 0.0
        for name, W in weights.items():
            p = sm.project(W, plan[name].family, **plan[name].options)
            assert p.params == plan[name].params
            assert np.isclose(p.error, plan[name].error, atol=1e-12)
            scale = np.linalg.norm(W) if relative else 1.0
            total += (p.error / scale) ** 2
            step = max(step, (np.linalg.svd(W, compute_uv=False)[0] / scale) ** 2)
        assert np.isclose(math.sqrt(total), plan.error, atol=1e-12)
        assert plan.error**2 <= best**2 + step


def test_allocation_is_exact_where_steps_are_equal():
    weights = {i: gaussian((12, 12), seed=i) * 0.8 ** np.arange(12) ** (i / 2) for i in range(3)}
    for rungs in range(3, 16):  # every rank costs 24; dense costs 6 of them
        plan = sm.allocate(weights, budget=24 * rungs, relative=False)
        best = brute_force(weights, 24 * rungs, relative=False)
        if all(share.family is sm.LowRank for share in plan.values()):
            assert np.isclose(plan.error**2, best) or plan.lower_bound**2 <= best


def test_allocation_with_blocks_is_no_worse():
    weights = {"blocks": np.kron(np.eye(2), np.ones((8, 8))) + 0.01 * gaussian((16, 16)), "flat": gaussian((16, 24))}
    plain = sm.allocate(weights, budget=0.5)
    wide = sm.allocate(weights, budget=0.5, families=(sm.LowRank, sm.Monarch, sm.BlockTensorTrain))
    assert wide.error <= plain.error * (1 + 1e-12)
    for name, share in wide.items():
        p = sm.project(weights[name], share.family, **share.options)
        assert np.isclose(p.error, share.error, atol=1e-12)
        assert p.params == share.params


def test_floors_and_importance():
    weights = matrices()
    free = sm.allocate(weights, budget=0.6)
    even = sm.allocate(weights, budget=0.6, least=0.4)
    assert all(share.params >= 0.4 * weights[name].size for name, share in even.items())
    assert even.error >= free.error
    loud = sm.allocate(weights, budget=0.6, importance={"small": 100.0})
    assert loud["small"].relative_error <= free["small"].relative_error
    assert loud["flat"].params <= free["flat"].params
    assert list(free) == list(weights)
    assert len(str(free).splitlines()) == 4
    assert sm.allocate({"zero": np.zeros((9, 9)), "x": gaussian((9, 9))}, budget=0.5)["zero"].error == 0


def test_hull_greedy_and_fill():
    rungs = [
        Rung(1, 10.0, None, 1),
        Rung(2, 9.0, None, 2),
        Rung(3, 2.0, None, 3),
        Rung(4, 2.5, None, 4),
        Rung(5, 1.0, None, 5),
    ]
    hull = lower_hull(rungs)
    assert [r.cost for r in hull] == [1, 3, 5]
    places, bound = greedy([hull], 4)
    assert places == [1]
    assert np.isclose(bound, math.sqrt(1.5))
    assert fill_up([hull[0]], [rungs], 2) == [rungs[1]]


ALLOCATION_BAD = [
    ({"budget": 20}, ValueError, "smallest architectures of all matrices take: 46"),
    ({"budget": 0.5, "families": [sm.Kronecker]}, TypeError, "families.*got Kronecker"),
    ({"budget": 0.5, "importance": {"other": 1.0}}, ValueError, "no matrix is named 'other'"),
    ({"budget": 0.5, "importance": {"flat": 0.0}}, ValueError, "positive"),
    ({"budget": 0.5, "importance": {"flat": "a"}}, TypeError, "numbers"),
    ({"budget": 0.5, "least": 1.5}, ValueError, "least"),
    ({"budget": 0.5, "least": "a"}, TypeError, "least"),
    ({"budget": 0.5, "least": 0.9}, ValueError, "smallest architectures"),
]


@pytest.mark.parametrize(("options", "kind", "message"), ALLOCATION_BAD)
def test_bad_allocations(options, kind, message):
    with pytest.raises(kind, match=message):
        sm.allocate(matrices(), **options)
    with pytest.raises(ValueError, match="at least one matrix"):
        sm.allocate({}, budget=0.5)
