"""Projection where the matrix is: torch on the CPU against NumPy, nothing copied to the host, the words that say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from projection_cases import HOST, PLAIN, WEIGHTED, matrix, same, samples

import structmat as sm
from structmat import arrays
from structmat.projection.device import DeviceArray, beside, host
from structmat.projection.svd import truncated

DTYPES = [np.float32, np.float64, np.complex128]


def by(table):
    return pytest.mark.parametrize(("family", "options", "shape"), table.values(), ids=list(table))


# ---- the same as NumPy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@by(PLAIN)
def test_the_same_certificate_as_in_numpy(family, options, shape, dtype):
    W = matrix(shape, dtype)
    found = sm.project(torch.from_numpy(W), family, device="own", **options)
    assert found.method.endswith("; computed on cpu by torch")
    assert found.operator.kind == "torch"
    assert found.operator.dtype == arrays.dtype_for(np.dtype(dtype), "torch")
    same(found, sm.project(W, family, **options), W)


@pytest.mark.parametrize("dtype", DTYPES)
@by(WEIGHTED)
def test_the_same_in_a_weighted_norm(family, options, shape, dtype):
    W, X = matrix((24, 16), dtype), samples(shape)
    found = sm.project(torch.from_numpy(W), family, device="own", activations=torch.from_numpy(X), **options)
    expected = sm.project(W, family, activations=X, **options)
    assert found.method.endswith("; computed on cpu by torch")
    same(found, expected, W)
    if expected.bias_correction is not None:
        assert found.bias_correction.dtype == arrays.dtype_for(np.dtype(dtype), "torch")
        assert np.allclose(found.bias_correction.numpy(), expected.bias_correction, atol=1e-5)


def test_weights_of_any_library():
    W, X = matrix((24, 16)), samples(200)
    expected = sm.project(W, sm.Monarch, blocks=4, activations=X)
    second = X.T @ X / len(X)
    for weight in (second, torch.from_numpy(second), sm.Moments.of(X), sm.Moments.of(torch.from_numpy(X))):
        same(sm.project(torch.from_numpy(W), sm.Monarch, blocks=4, weight=weight, device="own"), expected, W)
    same(sm.project(torch.from_numpy(W), sm.Monarch, blocks=4, activations=X, device="own"), expected, W)


def test_members_are_recovered():
    for family in (sm.Monarch, sm.BlockTensorTrain, sm.LowRank, sm.Kronecker, sm.Butterfly):
        W = torch.from_numpy(family.random((36, 16), rng=0).to_dense())
        found = sm.project(W, family, device="own")
        assert found.relative_error <= 1e-13, family


@pytest.mark.parametrize("start", range(0, 210, 30))
def test_random_certificates_hold(start):
    for seed in range(start, start + 30):
        rng = np.random.default_rng(seed)
        m, n = (int(v) for v in rng.integers(2, 25, 2))
        W = matrix((m, n), rng.choice(DTYPES[1:]), seed) * 10.0 ** rng.integers(-3, 4)
        if rng.random() < 0.3:  # nearly of low rank
            W = W @ matrix((n, 2), seed=seed) @ matrix((2, n), seed=seed) + 1e-9 * W
        kind = (sm.LowRank, sm.Monarch, sm.BlockTensorTrain, sm.Butterfly, sm.Kronecker)[seed % 5]
        options = {"rank": int(rng.integers(1, 4))} if kind in (sm.LowRank, sm.Monarch, sm.BlockTensorTrain) else {}
        if kind in (sm.Monarch, sm.BlockTensorTrain):
            options["blocks"] = (int(rng.integers(1, m + 1)), int(rng.integers(1, n + 1)))
        found = sm.project(torch.from_numpy(W), kind, device="own", **options)
        error = np.linalg.norm(W - found.operator.to_dense().resolve_conj().numpy())
        expected = sm.project(W, kind, **options)
        norm = np.linalg.norm(W)
        assert 0.0 <= found.lower_bound <= found.error, (seed, found)
        assert abs(found.error - error) <= 1e-12 * norm, (seed, found)
        assert found.lower_bound <= expected.error + 1e-12 * norm, (
            seed,
            found,
        )  # a member's error: no bound is above it
        assert expected.lower_bound <= found.error + 1e-12 * norm, (seed, found)
        if kind is not sm.Butterfly:
            assert abs(found.error - expected.error) <= 1e-9 * norm, (seed, found)
            assert abs(found.lower_bound - expected.lower_bound) <= 1e-6 * norm, (seed, found)


@pytest.mark.parametrize("scale", [1e-160, 1e155])
def test_extreme_entries(scale):
    W = matrix((12, 8)) * scale
    found = sm.project(torch.from_numpy(W), sm.Monarch, blocks=4, device="own")
    expected = sm.project(W, sm.Monarch, blocks=4)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-9)
    assert found.error == pytest.approx(expected.error, rel=1e-9)


@pytest.mark.parametrize("entries", [700, 1 << 24])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        (sm.Monarch, {"blocks": (7, 9)}),
        (sm.Monarch, {"blocks": (7, 9), "rank": 3}),
        (sm.BlockTensorTrain, {"blocks": (9, 7), "rank": 2}),
        (sm.LowRank, {"rank": 5}),
        (sm.Butterfly, {}),
        (sm.BlockTensorTrain, {"cores": 3, "rank": 2}),
        (sm.Kronecker, {}),
    ],
)
def test_certificates_some_rows_at_a_time(family, options, entries, monkeypatch):
    W = matrix((300, 270))
    expected = sm.project(W, family, **options)
    monkeypatch.setattr("structmat.projection.certificate._DEVICE_ENTRIES", entries)
    monkeypatch.setattr("structmat.projection.certificate._LARGE", 1)
    monkeypatch.setattr("structmat.projection.chain_bounds._LARGE", 1 if entries == 700 else 1 << 24)
    monkeypatch.setattr("structmat.projection.svd._DEVICE_PIECE", entries)
    found = sm.project(torch.from_numpy(W), family, device="own", **options)
    assert found.error == pytest.approx(expected.error, rel=1e-9)
    assert found.error == pytest.approx(np.linalg.norm(W - found.operator.to_dense().numpy()), rel=1e-12)
    assert found.lower_bound <= expected.lower_bound * (1.0 + 1e-9)  # fewer splits of a large chain are looked at
    assert found.lower_bound >= (0.5 if entries == 700 else 1.0 - 1e-9) * expected.lower_bound


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5, 2, 7), (3, 4, 4), (2, 3, 9, 3), (6, 2, 2), (1, 8, 3)])
def test_truncated_stacks(shape, rank):
    blocks = matrix(shape, np.complex128)
    found, expected = truncated(beside(blocks, DeviceArray(torch.empty(0))), rank), truncated(blocks, rank)
    assert np.allclose(host(found.u @ found.y), expected.u @ expected.y)
    assert found.discarded == pytest.approx(expected.discarded, abs=1e-12)
    assert found.bound == pytest.approx(expected.bound, abs=1e-9)


# ---- nothing is copied ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_large_copies(monkeypatch):
    """Whatever makes a NumPy array of a torch tensor of more than these many entries raises; the sizes of the others."""
    seen = []

    def guarded(name, limit):
        real = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            seen.append(self.numel())
            if self.numel() > limit:
                raise AssertionError(f"torch.Tensor.{name} of {tuple(self.shape)}")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, method)

    def start(limit):
        for name in ("numpy", "cpu", "tolist", "__array__"):
            guarded(name, limit)
        return seen

    return start


LARGE = {
    "low rank": (sm.LowRank, {"rank": 4}),
    "low rank, interpolative": (sm.LowRank, {"rank": 4, "interpolative": True}),
    "low rank, tolerance": (sm.LowRank, {"tol": 0.9}),
    "low rank, randomised": (sm.LowRank, {"rank": 2, "method": "randomized"}),
    "monarch": (sm.Monarch, {}),
    "monarch, orders": (sm.Monarch, {"layout": "search", "blocks": 16}),
    "monarch, interpolative": (sm.Monarch, {"blocks": 8, "interpolative": True}),
    "train": (sm.BlockTensorTrain, {"budget": 0.2}),
    "train of three": (sm.BlockTensorTrain, {"cores": 3}),
    "butterfly": (sm.Butterfly, {"radix": 2}),
    "butterfly, refined": (sm.Butterfly, {"radix": 4, "refine": 1}),
    "butterfly, orders": (sm.Butterfly, {"radix": 4, "permutation": "search"}),
    "kronecker": (sm.Kronecker, {"shapes": [(16, 16), (16, 16)]}),
    "kronecker, lanczos": (sm.Kronecker, {"shapes": [(16, 16), (16, 16)], "method": "lanczos"}),
    "kronecker of three": (sm.Kronecker, {"shapes": [(4, 4), (8, 8), (8, 8)]}),
    "weighted low rank": (sm.LowRank, {"rank": 4, "activations": 600}),
    "weighted monarch": (sm.Monarch, {"blocks": 16, "activations": 600}),
    "weighted train, outputs": (sm.BlockTensorTrain, {"blocks": 16, "activations": 600, "row_weight": np.eye(256)}),
}


@pytest.mark.parametrize(("family", "options"), LARGE.values(), ids=list(LARGE))
def test_no_copy_of_the_matrix_on_the_host(family, options, no_large_copies):
    W = torch.from_numpy(matrix((256, 256)))
    options = dict(options)
    if "activations" in options:
        options["activations"] = torch.from_numpy(samples(options["activations"], 256))
    no_large_copies(W.numel() // 8)
    found = sm.project(W, family, device="own", **options)
    assert found.method.endswith("computed on cpu by torch")
    assert 0.0 <= found.lower_bound <= found.error


def test_the_guard_sees_the_host_path(no_large_copies):
    no_large_copies(256 * 256 // 8)
    with pytest.raises(AssertionError, match="256"):
        sm.project(torch.from_numpy(matrix((256, 256))), sm.Monarch, device="host")


def test_inputs_are_left_alone_and_need_no_gradient():
    W = torch.from_numpy(matrix((24, 16))).requires_grad_()
    before = W.detach().clone()
    for family in (sm.LowRank, sm.Monarch, sm.Butterfly, sm.Kronecker, sm.Dense):
        found = sm.project(W, family, device="own")
        assert not any(x.requires_grad for x in found.operator.arrays)
        assert not any(x.data_ptr() == W.data_ptr() for x in found.operator.arrays)
    assert torch.equal(W.detach(), before)


# ---- what is said -----------------------------------------------------------------------------------------------------


@by(HOST)
def test_what_stays_on_the_host_says_so(family, options, shape):
    W = matrix(shape)
    found = sm.project(torch.from_numpy(W), family, device="own", **options)
    assert found.method.endswith("; computed on the host")
    assert found.operator.to_dense().dtype == torch.float64
    same(found, sm.project(W, family, **options), W)


def test_the_default_is_where_the_matrix_is(monkeypatch):
    W = matrix((24, 16))
    for plain in (
        sm.project(W, sm.Monarch),
        sm.project(W, sm.Monarch, device="own"),
        sm.project(torch.from_numpy(W), sm.Monarch),
        sm.project(torch.from_numpy(W), sm.Monarch, device="host"),
    ):
        assert plain.method == "blockwise SVD (optimal)"
    monkeypatch.setattr("structmat.projection.target.accelerated", lambda x: True)
    assert sm.project(torch.from_numpy(W), sm.Monarch).method == "blockwise SVD (optimal); computed on cpu by torch"
    assert sm.project(torch.from_numpy(W), sm.Monarch, device="host").method == "blockwise SVD (optimal)"


def test_short_dtypes_are_computed_in_double_precision():
    W = torch.from_numpy(matrix((32, 32))).to(torch.bfloat16)
    found = sm.project(W, sm.Monarch, device="own")
    assert found.operator.dtype == torch.bfloat16
    assert found.error == pytest.approx(sm.project(W, sm.Monarch).error, rel=1e-6)
    with pytest.raises(ValueError, match="best relative error reachable"):
        sm.project(W, sm.LowRank, tol=1e-6, device="own")


def test_errors_are_those_of_the_host():
    W = torch.from_numpy(matrix((24, 16)))
    with pytest.raises(ValueError, match=r"device: expected None, 'host' or 'own', got 'gpu'"):
        sm.project(W, sm.Monarch, device="gpu")
    bad = W.clone()
    bad[3, 5] = torch.nan
    bad[7, 1] = torch.inf
    with pytest.raises(ValueError, match=r"2 of 384 entries are NaN or infinite, the first at \(3, 5\)"):
        sm.project(bad, sm.Monarch, device="own")
    with pytest.raises(ValueError, match="nearest feasible count"):
        sm.project(W, sm.Monarch, blocks=4, budget=10, device="own")
    indefinite = torch.diag(torch.linspace(-1.0, 1.0, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"positive semidefinite matrix, got the eigenvalue -1"):
        sm.project(W, sm.LowRank, weight=indefinite, device="own")
    with pytest.raises(ValueError, match="activations: expected finite numbers"):
        sm.project(W, sm.LowRank, activations=torch.full((3, 16), torch.nan), device="own")


def test_a_decomposition_that_fails_names_the_device(monkeypatch):
    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    W = torch.from_numpy(matrix((24, 16)))
    linalg = arrays.namespace(W).linalg
    monkeypatch.setattr(linalg, "svd", fails)
    with pytest.raises(np.linalg.LinAlgError, match=r"svd of \(24, 16\) on cpu: did not converge"):
        sm.project(W, sm.LowRank, rank=2, device="own")
    monkeypatch.setattr(linalg, "eigh", lambda x: (torch.full_like(x[..., 0], torch.nan), x))  # as CuPy may
    with pytest.raises(np.linalg.LinAlgError, match=r"svd of .* on cpu: did not converge"):  # its second road
        sm.project(W, sm.Monarch, blocks=4, device="own")


# ---- the array --------------------------------------------------------------------------------------------------------


def test_an_array_of_a_device_meets_no_numpy_array():
    x = DeviceArray(torch.ones(3, 4, dtype=torch.float64))
    ones = np.ones((3, 4))
    for mixed in (
        lambda: x + ones,
        lambda: ones + x,
        lambda: ones.T @ x,
        lambda: np.where(x > 0.0, x, ones),
        lambda: x.__setitem__(0, ones[0]),
        lambda: np.asarray(x),
        lambda: np.cumsum(x),
        lambda: np.linalg.eig(x),
        lambda: np.add.outer(x, x),
        lambda: np.tanh(x),
    ):
        with pytest.raises(TypeError):
            mixed()


@pytest.mark.parametrize(
    "index",
    [0, (0, 1), slice(1, 3), (..., 0), (..., None, slice(1)), np.array([2, 0]), (slice(None), np.array([1, 1])),
     (slice(None, None, -1),), (..., slice(None, None, -1)), (1, slice(None, None, -1), None),
     (..., slice(None, None, -1), 0), np.ix_([0, 2], [1, 3])],
)  # fmt: skip
def test_indices_are_numpys(index):
    x = np.arange(60.0).reshape(3, 4, 5)
    found = beside(x, DeviceArray(torch.empty(0)))[index]
    assert np.array_equal(host(found), x[index])


def test_slices_backwards_are_whole():
    with pytest.raises(TypeError, match="slices forwards"):
        DeviceArray(torch.ones(4))[::-2]


# ---- other devices ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@by(PLAIN)
def test_torch_on_a_gpu(family, options, shape):
    W = matrix(shape)
    expected, there = sm.project(W, family, **options), torch.from_numpy(W).cuda()
    found = sm.project(there, family, **options)
    assert found.method.endswith("; computed on cuda:0 by torch")
    assert found.operator.device == there.device
    same(found, expected, W)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@by(WEIGHTED)
def test_torch_on_a_gpu_in_a_weighted_norm(family, options, shape):
    W, X = matrix((24, 16)), samples(shape)
    expected = sm.project(W, family, activations=X, **options)
    found = sm.project(torch.from_numpy(W).cuda(), family, activations=torch.from_numpy(X).cuda(), **options)
    assert found.method.endswith("; computed on cuda:0 by torch")
    same(found, expected, W)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("family", "options"), LARGE.values(), ids=list(LARGE))
def test_no_copy_of_the_matrix_leaves_a_gpu(family, options, no_large_copies):
    W = torch.from_numpy(matrix((256, 256))).cuda()
    options = dict(options)
    if "activations" in options:
        options["activations"] = torch.from_numpy(samples(options["activations"], 256)).cuda()
    no_large_copies(W.numel() // 8)
    assert sm.project(W, family, **options).method.endswith("; computed on cuda:0 by torch")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*PLAIN, *(f"weighted {name}" for name in WEIGHTED)])
def test_cupy_on_a_gpu(name):
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weighted = name.startswith("weighted ")
    family, options, shape = WEIGHTED[name.removeprefix("weighted ")] if weighted else PLAIN[name]
    W = matrix((24, 16) if weighted else shape)
    given = {"activations": samples(shape)} if weighted else {}
    there = {key: cupy.asarray(x) for key, x in given.items()}
    found = sm.project(cupy.asarray(W), family, **options, **there)
    assert found.method.endswith("; computed on cuda:0 by CuPy")
    assert found.operator.kind == "cupy"
    same(found, sm.project(W, family, **options, **given), W)
