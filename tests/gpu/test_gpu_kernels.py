"""What only a device can show: how many kernels a call launches, every type of cuBLAS, graphs, streams, compute-sanitizer."""

# ruff: noqa: F811 (fixtures are imported)
from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from devices import cupy, on_torch, skip_without_any  # noqa: F401

import structmat as sm

pytestmark = pytest.mark.gpu
skip_without_any()
PROGRAM = Path(__file__).with_name("kernels_alone.py")
BOUNDS = {
    "float16": 2e-3,
    "bfloat16": 1.5e-2,
    "float32": 1e-5,
    "float64": 1e-13,
    "complex64": 1e-5,
    "complex128": 1e-13,
}


def launched(torch, call) -> int:
    """Kernels of one call; the profiler sees those of CuPy too."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    kernels = [e for e in profile.key_averages() if e.device_type == device and "split" not in e.key.lower()]
    return sum(e.count for e in kernels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_copies_on_torch(dtype, on_torch):
    torch = on_torch
    n = 8192  # beyond where one kernel is predicted to be faster
    A = sm.BlockTensorTrain.random((n, n), dtype=getattr(torch, dtype), rng=0).to(torch.device("cuda"))
    M = sm.Monarch.random((n, n), dtype=torch.float32, rng=0).to(torch.device("cuda"))
    x = torch.randn(4096, n, device="cuda").to(A.dtype).requires_grad_()
    leaves = [f.clone().requires_grad_() for f in A.factors]
    live, dy = A.with_factors(tuple(leaves)), torch.randn(4096, n, device="cuda").to(A.dtype)
    assert A.plan(4096, rows=True).kernel == "2 products"
    with torch.no_grad():
        assert launched(torch, lambda: x @ A.T) == 2
        assert launched(torch, lambda: A @ x.t()) == 2
        assert launched(torch, lambda: x.float() @ M.T) == 2 + (dtype != "float32")
    both = launched(torch, lambda: torch.autograd.grad(x @ live.T, [x, *leaves], dy))
    assert both == 2 + 5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_copies_on_cupy(dtype, cupy, on_torch):
    n = 8192
    A = sm.BlockTensorTrain.random((n, n), dtype="float32", rng=0).astype(dtype).to("cupy")
    x = cupy.ones((4096, n), dtype)
    kernel = A.plan(4096, rows=True).kernel
    assert kernel.startswith("2 products")
    width = re.search(r"(\d+) rows at a time", kernel)
    chunks = math.ceil(4096 / int(width[1])) if width else 1
    assert launched(on_torch, lambda: x @ A.T) == 2 * chunks


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("batch", [1, 5, 64, 1001])
def test_every_type_and_stride_of_the_strided_batched_product(dtype, batch, cupy):
    rng = np.random.default_rng(0)
    kind = "complex128" if dtype.startswith("complex") else "float64"
    for operator in (
        sm.BlockTensorTrain.random((96, 80), blocks=(8, 4), rank=2, dtype=kind, rng=0),
        sm.Monarch.random((96, 80), blocks=(8, 4), dtype=kind, rng=0),
        sm.Kronecker.random((96, 80), dtype=kind, rng=0),  # stride 0
        sm.BlockDiagonal.random((96, 80), blocks=8, dtype=kind, rng=0),
    ):
        low = (
            operator.to("cupy").astype(dtype)
            if dtype != "bfloat16"
            else operator.astype("float32").to("cupy").astype(bf16())
        )
        x = rng.standard_normal((batch, 80)).astype(kind)
        moved = cupy.asarray(x).astype(low.dtype)
        for got in (
            moved @ low.T,
            (low @ cupy.ascontiguousarray(moved.T)).T,
            cupy.asarray(x, order="F").astype(low.dtype) @ low.T,
        ):
            expected = x @ operator.to_dense().T
            error = np.linalg.norm(got.get().astype(kind) - expected) / np.linalg.norm(expected)
            assert error < 3 * BOUNDS[dtype]


def bf16():
    return pytest.importorskip("ml_dtypes").bfloat16


def test_tf32_is_chosen_and_left_again(cupy):
    A = sm.BlockTensorTrain.random((1024, 1024), dtype="float32", rng=0)
    x = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    expected = x.astype(np.float64) @ A.astype("float64").to_dense().T

    def error():
        y = (cupy.asarray(x) @ A.to("cupy").T).get()
        return np.linalg.norm(y - expected) / np.linalg.norm(expected)

    with sm.backends.use_precision("tf32"):
        rough = error()
    assert error() < 1e-6 < rough < 2e-3


def test_graphs_and_streams_of_torch(on_torch):
    torch = on_torch
    A = sm.BlockTensorTrain.random((1024, 1024), dtype=torch.bfloat16, rng=0).to(torch.device("cuda"))
    x = torch.randn(64, 1024, device="cuda").bfloat16()
    with torch.no_grad():
        expected = x @ A.T  # compiles what it needs
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            y = x @ A.T
        torch.cuda.current_stream().wait_stream(other)
        torch.testing.assert_close(y, expected)
        graph = torch.cuda.CUDAGraph()
        held = x.clone()
        with torch.cuda.graph(graph):
            y = held @ A.T
        held.copy_(2 * x)
        graph.replay()
        torch.testing.assert_close(y, 2 * expected, rtol=2e-2, atol=2e-2)


def test_dlpack_shares_memory_on_one_stream(cupy, on_torch):
    torch = on_torch
    A = sm.Monarch.random((256, 256), dtype="float32", rng=0)
    x = torch.randn(7, 256, device="cuda")

    class TorchStream:  # torch's own streams have this from 2.10 on
        def __cuda_stream__(self):
            return 0, torch.cuda.current_stream().cuda_stream

    with cupy.cuda.Stream.from_external(TorchStream()):
        operand = cupy.from_dlpack(x)
        assert operand.data.ptr == x.data_ptr()
        y = torch.from_dlpack(operand @ A.to("cupy").T)
    torch.testing.assert_close(y, x @ A.to(torch.device("cuda")).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["monarch", "kron", "hadamard", "transpose"])
def test_every_kernel_alone(name, cupy):
    subprocess.run([sys.executable, str(PROGRAM), name], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tool"), list(itertools.product(["monarch", "kron", "hadamard", "transpose"], ["memcheck", "racecheck"]))
)
def test_compute_sanitizer(name, tool, cupy):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(PROGRAM), name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
