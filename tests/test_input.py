"""Bad and unusual input: the right exception at the call that made the mistake, and nothing changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from market import market, names, small_market

import structmat as sm

CONSTRUCTORS = {
    "dense": (lambda x: sm.Dense(x), (2, 3)),
    "diagonal": (lambda x: sm.Diagonal(x), (4,)),
    "block_diagonal": (lambda x: sm.BlockDiagonal(x), (2, 2, 3)),
    "low_rank": (lambda x: sm.LowRank(x, x.T), (3, 2)),
    "kronecker": (lambda x: sm.Kronecker(x, x), (2, 3)),
    "monarch": (lambda x: sm.Monarch(x, x), (2, 3, 2)),
    "btt": (lambda x: sm.BlockTensorTrain([x, x.swapaxes(-1, -2)]), (2, 3, 2)),
    "butterfly": (lambda x: sm.Butterfly([x]), (1, 1, 2, 3)),
    "chain": (lambda x: sm.Chain([x]), (2, 2, 2, 3)),
    "block_sparse": (lambda x: sm.BlockSparse(x, [0, 1], [1, 0], (4, 6)), (2, 2, 3)),
}
by_constructor = pytest.mark.parametrize("name", CONSTRUCTORS)


def make(name, dtype=float):
    build, shape = CONSTRUCTORS[name]
    if name == "monarch":
        shape = (2, 2, 2)
    return build, np.arange(1.0, 1 + np.prod(shape)).reshape(shape).astype(dtype)


@by_constructor
def test_integers_are_promoted_to_float64(name):
    build, x = make(name, int)
    assert build(x).dtype == np.float64
    assert build(x.astype(bool)).dtype == np.float64


@by_constructor
def test_objects_and_text_are_refused(name):
    build, x = make(name)
    for bad in (x.astype(object), x.astype(str)):
        with pytest.raises(TypeError, match="dtype"):
            build(bad)


@by_constructor
def test_the_callers_array_is_neither_copied_written_nor_frozen(name):
    build, x = make(name)
    kept = x.copy()
    a = build(x)
    _ = a @ np.ones((a.shape[-1], 3)), a.T @ np.ones(a.shape[-2]), 2 * a, a + a, a.H, a.conj(), a.to_dense().sum()
    assert np.array_equal(x, kept)
    assert x.flags.writeable
    assert np.shares_memory(x, a.arrays[0])


@by_constructor
def test_too_few_dimensions(name):
    build, _ = make(name)
    with pytest.raises((ValueError, TypeError)):
        build(np.float64(1.0) if name == "diagonal" else np.ones(2))


@by_constructor
def test_read_only_and_strided_arrays(name):
    build, x = make(name)
    expected = build(x).to_dense()
    frozen = x.copy()
    frozen.flags.writeable = False
    strided = np.repeat(x, 2, axis=-1)[..., ::2]
    for y in (frozen, strided, np.asfortranarray(x)):
        assert np.array_equal(build(y).to_dense(), expected)


@by_constructor
def test_mixed_libraries(name):
    build, x = make(name)
    a = build(x)
    with pytest.raises(TypeError, match=r"numpy.*torch|torch.*numpy"):
        a @ torch.ones(a.shape[-1], dtype=torch.float64)
    with pytest.raises(TypeError, match=r"numpy.*torch|torch.*numpy"):
        build(torch.tensor(x)) @ np.ones(a.shape[-1])
    with pytest.raises(TypeError, match=r"numpy.*torch|torch.*numpy"):
        a + build(torch.tensor(x))
    with pytest.raises(TypeError, match=r"numpy.*torch|torch.*numpy"):
        a @ build(torch.tensor(x)).T
    with pytest.raises(TypeError, match=r"numpy.*torch|torch.*numpy"):
        sm.kron(a, build(torch.tensor(x)))


def test_mixed_libraries_inside_one_operator():
    x = np.ones((2, 2))
    for make_mixed in (
        lambda: sm.LowRank(x, torch.tensor(x)),
        lambda: sm.Kronecker(x, torch.tensor(x)),
        lambda: sm.Monarch(x[None], torch.tensor(x)[None]),
        lambda: sm.hstack([sm.Dense(x), sm.Dense(torch.tensor(x))]),
    ):
        with pytest.raises(TypeError, match=r"numpy.*torch"):
            make_mixed()


SMALL = small_market()


@pytest.mark.parametrize("pair", SMALL, ids=names(SMALL))
def test_wrong_shapes_name_both(pair):
    a, d = pair.operator, pair.dense
    n = d.shape[-1]
    shape = r"\(" + ", ".join(map(str, d.shape)) + r",?\)"
    for wrong in ((n + 1,), (n + 1, 2), (2, n + 1, 2), ()):
        with pytest.raises(ValueError, match=shape):
            a @ np.ones(wrong)
    with pytest.raises(ValueError, match=shape):
        np.ones(d.shape[-2] + 1) @ a
    with pytest.raises(ValueError, match=shape):
        a.matmat(np.ones(n))
    with pytest.raises(ValueError, match=shape):
        a @ sm.Identity(n + 1)
    with pytest.raises(ValueError, match="shapes differ"):
        a + sm.Zero((d.shape[-2] + 1, n))


@pytest.mark.parametrize("pair", SMALL, ids=names(SMALL))
def test_not_a_number_propagates(pair):
    if "inverse" in pair.name:
        return  # iterative: refuses, below
    a, d = pair.operator, pair.dense
    for value in (np.nan, np.inf):
        x = np.ones((d.shape[-1], 2))
        x[0, 0] = value
        with np.errstate(invalid="ignore"):  # NumPy says so too
            y = a @ x
        touched = np.broadcast_to(np.abs(d[..., :, :1]) > 0, (*d.shape[:-1], 1))[..., 0]
        assert not np.isfinite(y[..., 0][touched]).any()
        assert np.isfinite(y[..., 1]).all()


def test_the_lazy_inverse_refuses_what_it_cannot_solve():
    singular = sm.Monarch.random((6, 6), rank=2, rng=0) @ sm.Zero((6, 6)) + sm.LowRank.random((6, 6), rank=2) * 1.0
    with pytest.raises(np.linalg.LinAlgError, match="singular"):
        singular.inv()
    hidden = sm.algebra.Sum(sm.Dense(np.diag([1.0, 1.0, 0.0])), sm.Kronecker(np.zeros((3, 3)), np.zeros((1, 1))))
    with pytest.raises(np.linalg.LinAlgError, match="GMRES"):
        hidden.inv() @ np.ones(3)


def test_operands_of_wrong_kinds():
    a = sm.Dense(np.ones((3, 3)))
    for wrong in ("text", None, {1: 2}, object()):
        with pytest.raises(TypeError):
            a @ wrong
    for wrong in (np.array(["x"] * 3), np.array([None] * 3), np.array(["2020-01-01"] * 3, "M8[D]")):
        with pytest.raises(TypeError, match="dtype"):
            a @ wrong
    with pytest.raises(TypeError, match=r"structmat\.as_operator"):
        a + np.ones((3, 3))
    with pytest.raises(TypeError, match="Identity"):
        a + 1.0
    with pytest.raises(TypeError, match="Identity"):
        1.0 - a
    with pytest.raises(TypeError, match="use @"):
        a * a
    with pytest.raises(TypeError, match="use @"):
        a * np.ones(3)
    with pytest.raises(TypeError):
        2 / a
    with pytest.raises(TypeError):
        a / a
    with pytest.raises(TypeError):
        a**0.5
    with pytest.raises(TypeError):
        iter(a)


def test_zero_sizes():
    for m, n in ((0, 3), (3, 0), (0, 0)):
        for a in (
            sm.Dense(np.ones((m, n))),
            sm.Zero((m, n)),
            sm.LowRank(np.ones((m, 2)), np.ones((2, n))),
            sm.BlockDiagonal(np.ones((2, m, n))),
        ):
            rows, cols = a.shape
            assert (a @ np.ones((cols, 4))).shape == (rows, 4)
            assert (a @ np.ones(cols)).shape == (rows,)
            assert (np.ones((5, cols)) @ a.T).shape == (5, rows)
            assert not (a @ np.ones(cols)).any()
            assert np.asarray(a).shape == (rows, cols)
    assert (sm.Identity(0) @ np.ones((0, 2))).shape == (0, 2)
    assert (sm.LowRank(np.ones((3, 0)), np.ones((0, 4))) @ np.ones(4)).tolist() == [0.0] * 3


MISFITS = {
    "low rank": (lambda: sm.LowRank(np.ones((3, 2)), np.ones((3, 4))), ValueError, r"\(3, 2\).*\(3, 4\)"),
    "monarch": (lambda: sm.Monarch(np.ones((2, 3, 3)), np.ones((2, 4, 5))), ValueError, r"\(2, 3, 3\).*\(2, 4, 5\)"),
    "monarch shape": (lambda: sm.Monarch(np.ones((2, 2, 2)), np.ones((2, 2, 2)), (5, 4)), ValueError, r"\(5, 4\).*\(4, 4\)"),
    "btt": (lambda: sm.BlockTensorTrain([np.ones((2, 3, 3)), np.ones((2, 4, 5))]), ValueError, "do not fit"),
    "btt one core": (lambda: sm.BlockTensorTrain([np.ones((1, 1, 2, 2))]), ValueError, "at least two"),
    "chain": (lambda: sm.Chain([np.ones((1, 1, 2, 3)), np.ones((1, 1, 4, 5))]), ValueError, "3 columns.*4 rows"),
    "chain empty": (lambda: sm.Chain([]), ValueError, "at least one"),
    "chain order": (
        lambda: sm.Chain([np.ones((1, 1, 2, 3))], None, sm.patterns.AxisOrder((2, 2), (1, 0))),
        ValueError,
        "4 entries, expected 2",
    ),
    "butterfly": (lambda: sm.Butterfly([np.ones((1, 2, 2, 4)), np.ones((2, 1, 4, 2))]), ValueError, "rank 2"),
    "permutation": (lambda: sm.Permutation([0, 0, 1]), ValueError, r"0\.\.2 once"),
    "permutation of floats": (lambda: sm.Permutation([0.0, 1.0]), TypeError, "integers"),
    "permutation dims": (lambda: sm.Permutation([[0, 1]]), ValueError, "one dimension"),
    "block sparse": (lambda: sm.BlockSparse(np.ones((1, 2, 2)), [3], [0], (4, 4)), ValueError, r"0\.\.1"),
    "block sparse count": (lambda: sm.BlockSparse(np.ones((2, 2, 2)), [0], [0, 1], (4, 4)), ValueError, "2 blocks"),
    "identity": (lambda: sm.Identity(-1), ValueError, "-1"),
    "identity dtype": (lambda: sm.Identity(2, int), TypeError, "int"),
    "kronecker": (lambda: sm.Kronecker(), ValueError, "at least one"),
    "kronecker random": (lambda: sm.Kronecker.random((4, 4), shapes=[(2, 3)]), ValueError, r"\(2, 3\).*\(4, 4\)"),
    "blocks": (lambda: sm.Monarch.random((4, 4), blocks=9), ValueError, "between 1 and 4"),
    "rank": (lambda: sm.Monarch.random((4, 4), rank=0), ValueError, "at least 1"),
    "hstack": (lambda: sm.hstack([np.ones((2, 2)), np.ones((3, 2))]), ValueError, r"\(2, 2\).*\(3, 2\)"),
    "vstack": (lambda: sm.vstack([np.ones((2, 2)), np.ones((2, 3))]), ValueError, r"\(2, 2\).*\(2, 3\)"),
    "backend": (lambda: sm.use_backend("abacus"), ValueError, "numpy"),
    "astype": (lambda: sm.Identity(2).astype(int), TypeError, "floating"),
    "batches": (lambda: sm.Dense(np.ones((2, 3, 3))) @ sm.Dense(np.ones((4, 3, 3))), ValueError, "broadcast"),
    "to": (lambda: sm.Dense(np.ones((2, 2))).to("cupy"), (ImportError, RuntimeError), "(?i)cuda"),
    "asarray": (lambda: np.asarray(sm.Identity(2), copy=False), ValueError, "to_dense"),
    "inverse": (lambda: sm.Zero((2, 3)).inv(), np.linalg.LinAlgError, r"\(2, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_misfits(case):
    build, error, message = MISFITS[case]
    with pytest.raises(error, match=message):
        build()


def test_any_size_is_legal_for_every_family():
    families = (
        sm.Dense,
        sm.BlockDiagonal,
        sm.LowRank,
        sm.Kronecker,
        sm.Monarch,
        sm.BlockTensorTrain,
        sm.Butterfly,
        sm.Chain,
        sm.BlockSparse,
    )
    for family in families:
        for m, n in ((1, 1), (1, 7), (13, 1), (13, 17), (31, 64), (97, 97), (6, 35)):
            a = family.random((m, n), rng=0)
            assert a.shape == (m, n)
            x = np.linspace(-1, 1, n)
            assert np.allclose(a @ x, a.to_dense() @ x)
            assert np.allclose(a.T.to_dense(), a.to_dense().T)


def test_random_is_reproducible_and_takes_dtypes():
    for family in (sm.LowRank, sm.Monarch, sm.Butterfly, sm.Kronecker, sm.BlockSparse):
        a, b = family.random((12, 12), rng=3), family.random((12, 12), rng=np.random.default_rng(3))
        assert np.array_equal(a.to_dense(), b.to_dense())
        for dtype in (np.float32, np.complex64, torch.float32, torch.complex128):
            c = family.random((12, 12), dtype=dtype, rng=0)
            assert c.dtype == dtype
        with pytest.raises(TypeError):
            family.random((12, 12), dtype=int)


def test_random_keeps_the_variance():
    for family in (
        sm.LowRank,
        sm.Monarch,
        sm.BlockTensorTrain,
        sm.Butterfly,
        sm.BlockDiagonal,
        sm.Dense,
        sm.BlockSparse,
        sm.Kronecker,
    ):
        variances = []
        for seed in range(20):
            x = np.random.default_rng(seed).standard_normal((256, 20))
            variances.append((family.random((256, 256), rng=seed) @ x).var())
        assert 0.5 < np.mean(variances) < 2, family.__name__


def test_market_has_no_surprises_left_out():
    assert len(market()) > 350


def test_diagonal_plus_low_rank_with_a_zero_on_the_diagonal_is_not_called_singular():
    a = sm.Diagonal([0.0, 1.0, 2.0]) + sm.LowRank(np.ones((3, 1)), np.ones((1, 3)))
    assert np.allclose(a.inv() @ (a @ np.arange(3.0)), np.arange(3.0))
