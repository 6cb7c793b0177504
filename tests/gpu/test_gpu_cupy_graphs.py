"""CuPy on a device: CUDA graphs of products and of fused kernels, streams, precisions, the second device."""

# ruff: noqa: F811 (fixtures are imported)
from __future__ import annotations

import numpy as np
import pytest
from devices import cupy, skip_without_any  # noqa: F401

import structmat as sm
from structmat.backends.cupy import CupyBackend, capture

pytestmark = pytest.mark.gpu
skip_without_any()

FAMILIES = {
    "monarch": lambda: sm.Monarch.random((1024, 1024), blocks=32, rng=0, dtype=np.float32),
    "transposed monarch": lambda: sm.Monarch.random((1024, 1024), blocks=32, rng=0, dtype=np.float32).T,
    "butterfly": lambda: sm.Butterfly.random((1024, 1024), radix=2, rng=0, dtype=np.float32),
    "kronecker": lambda: sm.Kronecker.random((1024, 1024), rng=0, dtype=np.float32),
    "hadamard": lambda: sm.hadamard(1024, np.float32) * 1,
}


@pytest.mark.parametrize("kernels", [("products",), ("products", "fused")], ids=["products", "fused"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_graph_gives_what_the_launch_gave(name, dtype, kernels, cupy):
    sm.backends.register(CupyBackend(kernels=kernels), "cupy")
    capture.prepare()
    host = FAMILIES[name]()
    with sm.use_backend("cupy"):
        a, rng = host.to("cupy").astype(dtype), np.random.default_rng(0)
        x = cupy.asarray(rng.standard_normal((64, 1024)).astype(dtype))
        with cupy.cuda.Stream(non_blocking=True) as stream:
            _ = x @ a.T
            stream.synchronize()
            stream.begin_capture()
            y = x @ a.T
            graph = stream.end_capture()
            for _ in range(2):
                x[...] = cupy.asarray(rng.standard_normal((64, 1024)).astype(dtype))
                graph.launch(stream)
                stream.synchronize()
                expected = x.get().astype(float) @ host.to_dense().astype(float).T
                error = np.linalg.norm(y.get().astype(float) - expected) / np.linalg.norm(expected)
                assert error < (3e-3 if dtype == np.float16 else 1e-5)


def test_tf32_rounds_and_exact_does_not(cupy):
    sm.backends.register(CupyBackend(kernels=("products",)), "cupy")
    host = sm.Monarch.random((1024, 1024), blocks=32, rng=0, dtype=np.float32)
    x = np.random.default_rng(0).standard_normal((1024, 256)).astype(np.float32)
    expected = host.to_dense().astype(float) @ x
    with sm.use_backend("cupy"):
        a, on_device = host.to("cupy"), cupy.asarray(x)
        error = lambda: np.linalg.norm((a @ on_device).get() - expected) / np.linalg.norm(expected)  # noqa: E731
        assert error() < 1e-6
        with sm.backends.use_precision("tf32"):
            assert 1e-5 < error() < 2e-3


def test_out_of_memory_says_what_helps(cupy):
    a = sm.LowRank.random((1 << 20, 64), rank=2, rng=0, dtype=np.float32).to("cupy")
    with pytest.raises(MemoryError, match="free_all_blocks"):
        a @ cupy.broadcast_to(cupy.ones((64, 1), np.float32), (64, 1 << 20))
    assert (a @ cupy.ones(64, np.float32)).shape == (1 << 20,)
