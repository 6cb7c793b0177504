"""The operator market on CuPy arrays and on CUDA tensors: values, both layouts, gradients, projection."""

# ruff: noqa: F811 (fixtures are imported)
from __future__ import annotations

import numpy as np
import pytest
from devices import cupy, on_torch, skip_without_any  # noqa: F401
from market import market, names, small_market

import structmat as sm
from structmat.testing import assert_matches, check_operator

pytestmark = pytest.mark.gpu
skip_without_any()
# SciPy objects stay with NumPy, and so does the iterative inverse
PAIRS = [p for p in market() if not p.name.startswith(("external", "cosine")) and "inverse" not in p.name]
SMALL = [p for p in small_market() if p in PAIRS]


@pytest.mark.parametrize("pair", PAIRS, ids=names(PAIRS))
def test_cupy(pair, cupy):
    operator = pair.operator.to("cupy")
    assert_matches(operator, pair.dense)
    assert_matches(operator.T, np.swapaxes(pair.dense, -1, -2))
    back = operator.to("numpy")
    assert np.array_equal(back.to_dense(), pair.operator.to_dense())


@pytest.mark.parametrize("pair", SMALL, ids=names(SMALL))
def test_conformance_on_cupy(pair, cupy):
    check_operator(pair.operator.to("cupy"))


@pytest.mark.parametrize("pair", PAIRS, ids=names(PAIRS))
def test_torch_on_a_cuda_device(pair, on_torch):
    operator = pair.operator.to(on_torch.device("cuda"))
    assert_matches(operator, pair.dense)
    assert_matches(operator.T, np.swapaxes(pair.dense, -1, -2))


@pytest.mark.parametrize("pair", SMALL, ids=names(SMALL))
def test_conformance_on_a_cuda_device(pair, on_torch):
    check_operator(pair.operator.to(on_torch.device("cuda")))


@pytest.mark.parametrize(
    "family", [sm.LowRank, sm.Monarch, sm.BlockTensorTrain, sm.Butterfly, sm.Kronecker, sm.BlockDiagonal]
)
def test_gradients_on_a_cuda_device_are_those_on_the_cpu(family, on_torch):
    torch = on_torch
    on_cpu = family.random((24, 24), dtype=torch.float64, rng=0)

    def gradients(operator):
        leaves = [x.clone().requires_grad_() for x in operator.arrays]
        replace = {id(old): new for old, new in zip(operator.arrays, leaves, strict=True)}
        live = operator._map(lambda v: replace[id(v)])
        x = torch.linspace(-1, 1, 24 * 5, dtype=torch.float64, device=operator.device).reshape(5, 24).requires_grad_()
        found = torch.autograd.grad((x @ live.T).square().sum() + (live @ x.mT).sum(), [x, *leaves], create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in found), [x, *leaves])
        return [g.cpu() for g in (*found, *again)]

    torch.testing.assert_close(gradients(on_cpu.to(torch.device("cuda"))), gradients(on_cpu))


@pytest.mark.parametrize("family", [sm.Monarch, sm.LowRank, sm.Kronecker])
def test_projection_on_a_device_has_the_certificate_of_the_cpu(family, cupy, on_torch):
    W = np.random.default_rng(0).standard_normal((64, 64))
    expected = sm.project(W, family)
    for moved in (cupy.asarray(W), on_torch.from_numpy(W).cuda()):
        found = sm.project(moved, family)
        assert found.error == pytest.approx(expected.error, rel=1e-6)
        assert found.lower_bound == pytest.approx(expected.lower_bound, rel=1e-6)
        assert found.operator.kind == (
            "cupy" if moved is not None and type(moved).__module__.startswith("cupy") else "torch"
        )
