"""Operators in files: bit by bit back again, for the whole market, and every damaged or foreign file refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from market import market, names, small_market

import structmat as sm
from structmat import files

safetensors = pytest.importorskip("safetensors.numpy")


def again(operator, tmp_path):
    sm.save(tmp_path / "A.safetensors", operator)
    return sm.load(tmp_path / "A.safetensors")


def same(found, operator):
    assert type(found) is type(operator)
    assert (found.shape, found.dtype, found.kind, found.nparams) == (
        operator.shape,
        operator.dtype,
        operator.kind,
        operator.nparams,
    )
    assert repr(found) == repr(operator)
    for x, y in zip(found.arrays, operator.arrays, strict=True):
        assert (type(x), x.dtype, tuple(x.shape)) == (type(y), y.dtype, tuple(y.shape))
        assert bool((x == y).all())


@pytest.mark.parametrize("pair", market(), ids=names(market()))
def test_every_operator_comes_back_bit_by_bit(pair, tmp_path):
    found = again(pair.operator, tmp_path)
    same(found, pair.operator)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(pair.operator))


TORCH = [
    p for p in small_market() if p.operator.kind == "numpy" and not p.name.startswith(("external", "cosine", "inverse"))
]


@pytest.mark.parametrize("pair", TORCH, ids=names(TORCH))
def test_of_torch_arrays(pair, tmp_path):
    torch = pytest.importorskip("torch")
    operator = pair.operator.to("torch")
    found = again(operator, tmp_path)
    same(found, operator)
    assert torch.equal(found.to_dense(), operator.to_dense())


def test_half_precision_and_parameters(tmp_path):
    torch = pytest.importorskip("torch")
    left = torch.nn.Parameter(torch.randn(6, 2, dtype=torch.bfloat16))
    found = again(sm.LowRank(left, torch.randn(2, 5, dtype=torch.bfloat16)), tmp_path)
    assert torch.equal(found.left, left.detach())
    assert not found.left.requires_grad
    same(again(sm.Dense(np.eye(3, dtype=np.float16)), tmp_path), sm.Dense(np.eye(3, dtype=np.float16)))


def test_arrays_that_share_are_stored_once_and_callers_arrays_are_free(tmp_path):
    a = np.arange(12.0).reshape(3, 4).T
    operator = sm.kron(sm.Dense(a), sm.Dense(a))
    found = again(operator, tmp_path)
    assert len(safetensors.load_file(tmp_path / "A.safetensors")) == len(operator.arrays)
    a[0, 0] = 99.0
    assert np.asarray(found)[0, 0] == 0.0


def test_scalars_keep_their_kind(tmp_path):
    for scalar in (2, 2.5, 1 + 2j, np.float32(3)):
        operator = scalar * (sm.Monarch.random((4, 4), blocks=2, rng=0) + sm.Identity(4))
        same(again(operator, tmp_path), operator)


@pytest.mark.parametrize("dtype", [">f8", ">c8", ">f4"])
def test_arrays_of_the_other_byte_order_come_back_in_the_native_one(dtype, tmp_path):
    left, right = np.arange(3).reshape(3, 1).astype(dtype), np.array([[2, 5]]).astype(dtype)
    found = again(sm.LowRank(left, right), tmp_path)
    assert found.left.dtype == np.dtype(dtype).newbyteorder("=")
    assert found.left.dtype.isnative
    np.testing.assert_array_equal(found.to_dense(), left @ right)
    same(again(sm.Identity(3, dtype=dtype), tmp_path), sm.Identity(3, dtype=dtype))


class Mine(sm.Operator):
    """Somebody else's family."""

    fields = ("values",)

    def __init__(self, values):
        self._init((len(values), len(values)), values.dtype, "numpy", "cpu", values=values)

    def _matmat(self, x):
        return self.values[:, None] * x

    def _transpose(self):
        return self


def test_families_of_others_need_their_module(tmp_path):
    same(again(Mine(np.ones(3)), tmp_path), Mine(np.ones(3)))
    code = f"import structmat as sm; sm.load({str(tmp_path / 'A.safetensors')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "import the module that defines it first" in done.stderr


def test_a_new_process_loads_without_torch(tmp_path):
    operator = sm.BlockTensorTrain.random((12, 10), blocks=2, rank=2, rng=0) + sm.Identity(12)[:, :10]
    sm.save(tmp_path / "A.safetensors", operator)
    code = (
        f"import sys, structmat as sm; A = sm.load({str(tmp_path / 'A.safetensors')!r}); "
        "print(repr(float((A @ ([1.0] * 10)).sum())), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [repr(float((operator @ np.ones(10)).sum())), "False"]


def test_what_cannot_be_stored_is_named_and_leaves_no_file(tmp_path):
    scipy_linalg = pytest.importorskip("scipy.sparse.linalg")
    path = tmp_path / "A.safetensors"
    lazy = sm.as_operator(scipy_linalg.LinearOperator((3, 3), matvec=lambda x: x, rmatvec=lambda x: x, dtype=float))
    with pytest.raises(TypeError, match=r"External: a field of type .* cannot be stored"):
        sm.save(path, lazy)
    with pytest.raises(TypeError, match="expected a path and an operator, got ndarray"):
        sm.save(path, np.eye(3))
    if np.dtype(np.longdouble).itemsize > 8:
        with pytest.raises(TypeError, match="no dtype"):
            sm.save(path, sm.Dense(np.eye(2, dtype=np.longdouble)))
    with pytest.raises(FileNotFoundError, match="no file"):
        sm.load(path)
    assert list(tmp_path.iterdir()) == []


def rewritten(path, tensors=None, **about):
    with safetensors.safe_open(path, "np") as file:
        old = json.loads(file.metadata()["structmat"])
    found = safetensors.load_file(path) if tensors is None else tensors
    safetensors.save_file(found, path, {"structmat": json.dumps(old | about)})


def operator_in(path):
    with safetensors.safe_open(path, "np") as file:
        return json.loads(file.metadata()["structmat"])["operator"]


def another_shape(path):
    tensors = {k: x.reshape(-1) for k, x in safetensors.load_file(path).items()}
    rewritten(path, tensors, checksum=files.checksum(tensors))


def missing_array(path):
    tensors = safetensors.load_file(path)
    del tensors["arrays.0"]
    rewritten(path, tensors, checksum=files.checksum(tensors))


def a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "damaged or no safetensors"),
    "a pickle": (lambda p: p.write_bytes(b"\x80\x04K\x01." * 20), "damaged or no safetensors"),
    "a bit": (a_bit, "checksum"),
    "foreign": (lambda p: safetensors.save_file({"weight": np.zeros(2)}, p), r"not of structmat\.save"),
    "later version": (lambda p: rewritten(p, version=99), "version 99"),
    "no JSON": (lambda p: safetensors.save_file({"a": np.zeros(2)}, p, {"structmat": "{"}), "cannot be read"),
    "no object": (lambda p: safetensors.save_file({"a": np.zeros(2)}, p, {"structmat": "[1]"}), "cannot be read"),
    "a model": (lambda p: rewritten(p, kind="model"), r"holds a model; use structmat\.nn\.load"),
    "another kind": (lambda p: rewritten(p, kind="poem"), "holds a poem"),
    "another library": (lambda p: rewritten(p, library="jax"), "arrays of 'jax'"),
    "no operator": (lambda p: rewritten(p, operator=7), "cannot be built"),
    "unknown family": (lambda p: rewritten(p, operator=operator_in(p) | {"family": "os:system"}), "no operator family"),
    "fields missing": (lambda p: rewritten(p, operator=operator_in(p) | {"fields": []}), "cannot be built"),
    "another shape of an array": (another_shape, "has shape"),
    "an array missing": (missing_array, "cannot be built"),
    "another shape": (lambda p: rewritten(p, shape=[9, 9]), r"says \[9, 9\]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_damaged_or_foreign_is_refused(name, tmp_path):
    harm, message = DAMAGE[name]
    path = tmp_path / "A.safetensors"
    sm.save(path, sm.LowRank.random((6, 5), rank=2, rng=0))
    harm(path)
    with pytest.raises(ValueError, match=message):
        sm.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "A.safetensors"
    sm.save(path, sm.Identity(3))
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        sm.save(path, sm.Dense(np.eye(3)))
    assert repr(sm.load(path)) == repr(sm.Identity(3))
    assert [p.name for p in tmp_path.iterdir()] == ["A.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_the_file_has_the_usual_mode_or_that_of_the_old_one_and_links_stay(tmp_path):
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data" / "A.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(target)
    old = os.umask(0o027)
    try:
        sm.save(link, sm.Identity(3))
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        target.chmod(0o604)
        sm.save(link, sm.Identity(4))
    finally:
        os.umask(old)
    assert stat.S_IMODE(target.stat().st_mode) == 0o604
    assert link.is_symlink()
    assert sm.load(target).shape == (4, 4)
    assert [p.name for p in target.parent.iterdir()] == ["A.safetensors"], "nothing is left beside it"


def test_a_folder_that_is_missing_or_in_the_way_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"save: no folder .*nowhere$"):
        sm.save(tmp_path / "nowhere" / "A.safetensors", sm.Identity(3))
    with pytest.raises(IsADirectoryError, match="expected the path of a file, got the folder"):
        sm.save(tmp_path, sm.Identity(3))
    assert list(tmp_path.iterdir()) == []


def test_models_and_operators_are_told_apart(tmp_path):
    torch = pytest.importorskip("torch")
    import structmat.nn as snn

    sm.save(tmp_path / "A.safetensors", sm.Identity(3))
    with pytest.raises(ValueError, match=r"holds an operator; use structmat\.load"):
        snn.load(torch.nn.Linear(3, 3), tmp_path / "A.safetensors")
    snn.save(torch.nn.Linear(3, 3), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"use structmat\.nn\.load"):
        sm.load(tmp_path / "m.safetensors")
