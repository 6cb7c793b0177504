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


@pytest.fixture(autouse=True)
def default_backend():
    """What is chosen here is not what the next tests find."""
    yield
    sm.backends.register(CupyBackend(), "cupy")


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
        cupy.cuda.get_current_stream().synchronize()  # a non-blocking stream waits for no other
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


def test_a_graph_keeps_what_was_copied_for_a_kernel(cupy):
    capture.prepare()
    host, rng = FAMILIES["monarch"]().astype(np.float16), np.random.default_rng(0)
    with sm.use_backend("cupy"):
        a = host.to("cupy")
        numbers = rng.standard_normal((12, 8, 1024)).astype(np.float16)
        x = cupy.asarray(numbers)
        cupy.cuda.get_current_stream().synchronize()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            _ = x[:, :3] @ a.T  # rows that do not follow each other: copied
            stream.synchronize()
            stream.begin_capture()
            y = x[:, :3] @ a.T
            graph = stream.end_capture()
            others = [cupy.full((36, 1024), 7, np.float16) for _ in range(8)]  # take what was given back
            graph.launch(stream)
            stream.synchronize()
        expected = numbers[:, :3].astype(float) @ host.to_dense().astype(float).T
        assert np.linalg.norm(y.get().astype(float) - expected) < 3e-3 * np.linalg.norm(expected)
        assert all((other == 7).all() for other in others)


def test_two_graphs_run_at_the_same_time(cupy):
    capture.prepare()
    host, rng = FAMILIES["monarch"](), np.random.default_rng(0)
    sm.backends.register(CupyBackend(kernels=("products",)), "cupy")
    with sm.use_backend("cupy"):
        operators = [host.to("cupy") for _ in range(2)]
        streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
        xs = [cupy.asarray(rng.standard_normal((1024, 4096)).astype(np.float32)) for _ in range(2)]
        cupy.cuda.get_current_stream().synchronize()
        ys, graphs = [], []
        for a, x, stream in zip(operators, xs, streams, strict=True):
            with stream:
                _ = a @ x
                stream.synchronize()
                stream.begin_capture()
                ys.append(a @ x)
                graphs.append(stream.end_capture())
        for _ in range(20):
            for graph, stream in zip(graphs, streams, strict=True):
                graph.launch(stream)
        for stream in streams:
            stream.synchronize()
        for x, y in zip(xs, ys, strict=True):
            expected = host.to_dense().astype(float) @ x.get()
            assert np.linalg.norm(y.get() - expected) < 1e-5 * np.linalg.norm(expected)


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
