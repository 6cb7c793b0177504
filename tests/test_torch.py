"""The market on torch tensors: values, gradients of operator and operand, dtypes, devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from market import names, small_market

import structmat as sm
from structmat import arrays
from structmat.testing import assert_matches, check_operator, tolerance

# SciPy objects stay with NumPy, and so does the iterative inverse
PAIRS = [p for p in small_market() if not p.name.startswith(("external", "cosine")) and "inverse" not in p.name]
on_pairs = pytest.mark.parametrize("pair", PAIRS, ids=names(PAIRS))


@on_pairs
def test_conformance(pair):
    a = pair.operator.to("torch")
    check_operator(a)
    assert_matches(a, pair.dense)
    assert_matches(a.T, np.swapaxes(pair.dense, -1, -2))


@on_pairs
def test_there_and_back(pair):
    back = pair.operator.to("torch").to("numpy")
    assert type(back) is type(pair.operator)
    assert back.dtype == pair.dense.dtype
    assert np.array_equal(back.to_dense(), pair.operator.to_dense())


@on_pairs
def test_gradients_are_those_of_the_dense_matrix(pair):
    operator = pair.operator.to("torch")
    leaves = [x.clone().requires_grad_() if arrays.is_inexact(x.dtype) else x for x in operator.arrays]
    replace = {id(x): y for x, y in zip(operator.arrays, leaves, strict=True)}
    live = operator._map(lambda x: replace[id(x)])
    values = [y for y in leaves if isinstance(y, torch.Tensor) and y.requires_grad]
    n = pair.dense.shape[-1]
    x = torch.tensor(np.cos(np.arange(2.0 * n)).reshape(n, 2), dtype=torch.promote_types(torch.float64, torch.float64))
    x = x.to(torch.complex128) if pair.dense.dtype.kind == "c" else x
    x.requires_grad_()

    def gradients(y):
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
        if not y.requires_grad:
            return None
        return torch.autograd.grad((y * weights).abs().square().sum(), [x, *values], allow_unused=True)

    got = [gradients(live @ x), gradients((x.mT @ live.T).mT), gradients(live.T.T @ x)]
    expected = gradients(live.to_dense() @ x)
    for g in got:
        none = [None] * (1 + len(values))  # a zero operator has no gradient to give
        for u, v in zip(g or none, expected or none, strict=True):
            u, v = (torch.zeros(1) if w is None else w for w in (u, v))
            scale = max(1.0, float(v.abs().max()) if v.numel() else 1.0)
            assert float((u - v).abs().max() if u.numel() else 0) <= 1e3 * tolerance(np.float64) * scale


@pytest.mark.parametrize(
    "family", [sm.LowRank, sm.Monarch, sm.BlockTensorTrain, sm.Butterfly, sm.Kronecker, sm.BlockDiagonal]
)
def test_gradcheck(family):
    a = family.random((6, 6), dtype=torch.float64, rng=0)
    leaves = [x.clone().requires_grad_() for x in a.arrays]
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2).requires_grad_()

    def apply(x, *values):
        replace = {id(old): new for old, new in zip(a.arrays, values, strict=True)}
        return a._map(lambda v: replace[id(v)]) @ x

    assert torch.autograd.gradcheck(apply, (x, *leaves))
    assert torch.autograd.gradgradcheck(apply, (x, *leaves))


def test_a_transpose_made_without_gradients_does_not_lose_them():
    a = sm.Monarch(*(torch.ones(2, 2, 2, requires_grad=True) for _ in range(2)))
    with torch.no_grad():
        _ = a.T @ torch.ones(4)
    (a.T @ torch.ones(4)).sum().backward()
    assert all(x.grad is not None for x in (a.factors[0]._base, a.factors[1]._base))


def test_dtypes_promote_as_in_torch():
    a = sm.Monarch.random((6, 6), dtype=torch.float32, rng=0)
    assert (a @ torch.ones(6)).dtype == torch.float32
    assert (a @ torch.ones(6, dtype=torch.float64)).dtype == torch.float64
    assert (a @ torch.ones(6, dtype=torch.complex64)).dtype == torch.complex64
    assert (a @ torch.ones(6, dtype=torch.int64)).dtype == torch.float32
    assert (a @ torch.ones(6, dtype=torch.float16)).dtype == torch.float32
    assert a.astype(torch.bfloat16).dtype == torch.bfloat16
    assert (a.astype(torch.bfloat16) @ torch.ones(6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert a.astype("float64").dtype == torch.float64
    assert (2.5 * a).dtype == torch.float32
    assert (a + sm.Identity(6, torch.float32)).dtype == torch.float32


def test_modules_can_hold_the_arrays():
    layer = torch.nn.Linear(6, 4, bias=False)
    a = sm.Dense(layer.weight)
    assert a.arrays[0] is layer.weight
    (torch.ones(3, 6) @ a.T).sum().backward()
    assert layer.weight.grad is not None


def test_the_result_lives_where_the_operand_lives():
    a = sm.Kronecker.random((6, 6), dtype=torch.float32, rng=0)
    y = a @ torch.ones(6, 2)
    assert isinstance(y, torch.Tensor)
    assert y.device == torch.device("cpu")
    meta = sm.Monarch(torch.ones(2, 2, 2, device="meta"), torch.ones(2, 2, 2, device="meta"))
    with pytest.raises(TypeError, match=r"meta.*cpu"):
        meta @ torch.ones(4)
    assert (meta @ torch.ones(4, device="meta")).device == torch.device("meta")
    assert a.to(torch.device("meta")).device == torch.device("meta")


def test_index_operators_meet_torch():
    x = torch.arange(4.0)
    assert (sm.Permutation([2, 0, 3, 1], torch.float32) @ x).tolist() == [2.0, 0.0, 3.0, 1.0]
    assert (sm.Identity(4, torch.float32) @ x).dtype == torch.float32
    y = sm.Identity(4, torch.float32) @ x
    y[0] = 7
    assert x[0] == 0
    assert (sm.Zero((2, 4), torch.float32) @ x).tolist() == [0.0, 0.0]
    assert (x @ sm.Permutation([2, 0, 3, 1], torch.float32)).shape == (4,)
