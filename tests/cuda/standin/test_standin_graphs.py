"""Streams, threads and CUDA graphs on the stand-in: what is kept is finished, and a graph's memory is never given to others."""

from __future__ import annotations

import gc
import threading

import cupy
import fakecupy
import fakelibrary
import numpy as np
import pytest
from standin_families import FAMILIES, entries, error, on_device

import structmat as sm
from structmat.backends.cuda.roofline import H200
from structmat.backends.cupy import CupyBackend, capture
from structmat.patterns import AxisOrder

pytestmark = pytest.mark.usefixtures("products_only")
LARGE = {
    "monarch of one kernel": lambda **o: sm.Monarch.random((256, 256), blocks=16, **o),
    "btt of one kernel": lambda **o: sm.BlockTensorTrain.random((256, 256), blocks=16, **o),
    "kronecker of one kernel": lambda **o: sm.Kronecker.random((256, 256), shapes=[(16, 16)] * 2, **o),
}
ORDERS = {"out_order": AxisOrder((3, 4), (1, 0)), "in_order": AxisOrder((2, 2, 3), (2, 0, 1))}
PERMUTED = {  # operand and result are copied into other orders
    f"chain with orders {shape}": lambda shape=shape, **o: sm.Chain(
        [entries((2, 3, 2, 1), o["dtype"]), entries((1, 2, 3, 6), o["dtype"])], shape, **ORDERS
    )
    for shape in ((12, 12), (11, 7))
}
OPERANDS = {  # what is applied, to random numbers of shape (12, 8, n), or the same as integers
    "columns": lambda a, x, _: a @ x[0].T,
    "rows": lambda a, x, _: a.T.rdot(x[0]),
    "rows backwards": lambda a, x, _: a.T.rdot(x[0, ::-1]),
    "columns without a unit stride": lambda a, x, _: a @ x[::2, ::3].swapaxes(-1, -2)[0][:, ::2],
    "many rows that do not follow each other": lambda a, x, _: a.T.rdot(x[:, :3]),
    "integers": lambda a, _, i: a.T.rdot(i[0]),
    "many rows of integers in another order": lambda a, _, i: a.T.rdot(cupy.moveaxis(i.reshape(4, 3, 8, -1), 0, 2)),
    "a stack of columns": lambda a, x, _: a @ x.swapaxes(-1, -2),
    "one after the other": lambda a, x, _: a.T @ (a @ x[0].T),
    "a result of another dtype": lambda a, x, _: a.matmat(x[0].T, out=cupy.zeros((a.shape[0], 8), np.float64)),
}
GROUPS = {
    "products": FAMILIES | PERMUTED,
    "dense": {name: FAMILIES[name] for name in ("monarch", "kronecker")},
    "fused": LARGE,
}


@pytest.fixture
def own(monkeypatch):
    """The handle of our own is of the stand-in's library."""
    made = fakelibrary.library()
    monkeypatch.setattr(capture, "_library", lambda: made)
    capture.handle.cache_clear()
    fakelibrary.calls.clear()
    fakelibrary.spaces.clear()
    yield fakelibrary
    fakelibrary.status = 0
    capture.handle.cache_clear()


def test_work_goes_to_the_current_stream():
    a, x = sm.Monarch.random((16, 16), blocks=4, rng=0).to("cupy"), on_device(entries((16, 3)))
    with cupy.cuda.Stream(7), fakecupy.counted() as c:
        _ = a @ x
    assert c.streams == {7}
    assert c.waits == [], "factors as they were given are not waited for"


# ---- what is kept ---------------------------------------------------------------------------------------------------


def shifted(dtype):
    """A Monarch matrix whose factors no kernel can read where they are."""
    host = sm.Monarch.random((256, 256), blocks=16, rank=1, rng=0).astype(dtype)
    left, right = (
        on_device(np.concatenate([np.zeros(1, dtype), f.ravel()]))[1:].reshape(f.shape) for f in (host.left, host.right)
    )
    return sm.Monarch(left, right)


MADE = {  # kernels, an operator with factors that are made anew, and an operand
    "merged butterfly": (("products",), lambda: sm.Butterfly.random((64, 64), rng=0).to("cupy"), np.float64),
    "merged kronecker": (("products",), lambda: (sm.hadamard(64) * 1).to("cupy"), np.float64),
    "cast": (("products",), lambda: sm.Monarch.random((64, 64), rng=0, dtype=np.float32).to("cupy"), np.float64),
    "dense": (("dense",), lambda: sm.Monarch.random((64, 64), rng=0, dtype=np.float32).to("cupy"), np.float32),
    "aligned": (("fused",), lambda: shifted(np.float16), np.float16),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_kept_is_finished_before_other_streams_read_it(name):
    kernels, make, dtype = MADE[name]
    sm.backends.register(CupyBackend(H200._replace(call=1e-3), kernels), "cupy")
    with sm.use_backend("cupy"):
        a = make()
        x, y = (on_device(entries((3, a.shape[1]), dtype)) for _ in range(2))
        with cupy.cuda.Stream(7), fakecupy.counted() as c:
            first = len(fakecupy.log)
            _ = a.T.rdot(x)
        assert c.kernels, "something is made"
        assert set(c.waits) == {7}
        written = fakecupy.log[first:]
        last = max(i for i, (what, _) in enumerate(written) if what == "kernel")
        assert ("synchronize", 7) in written[last:], "after it has been made"
        with cupy.cuda.Stream(9), fakecupy.counted() as c:
            _ = a.T.rdot(y)
        assert (c.kernels, c.waits) == ([], []), "and only once"


@pytest.mark.parametrize("name", MADE)
def test_what_is_kept_is_not_made_during_a_capture(name, own):
    kernels, make, dtype = MADE[name]
    sm.backends.register(CupyBackend(H200._replace(call=1e-3), kernels), "cupy")
    with sm.use_backend("cupy"):
        a = make()
        x = entries((3, a.shape[1]), dtype)
        there = on_device(x)
        for _ in range(2):
            with fakecupy.capturing(), pytest.raises(RuntimeError, match=r"apply it once.*before the capture begins"):
                a.T.rdot(there)
        expected = x.astype(float) @ a.to_dense().get().astype(float).T
        assert error(a.T.rdot(there), expected) < 2e-3
        with fakecupy.capturing() as graph:
            y = a.T.rdot(there)
        assert error(y, expected) < 2e-3
        graph.launch()


def test_schedules_forgotten_by_another_thread_are_still_applied(monkeypatch):
    host = sm.Monarch.random((64, 64), blocks=8, rng=0)
    a, x, other = host.to("cupy"), on_device(entries((64, 3))), on_device(entries((64, 7)))

    class Forgetful(dict):
        """Another thread comes in between."""

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=lambda: a @ other)
                thread.start()
                thread.join()

    monkeypatch.setattr("structmat.backends.cupy.products.KEPT", 1)
    a._plan().products._prepared = Forgetful()
    assert error(a @ x, host @ x.get()) < 1e-12


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------


def test_products_are_captured_by_a_handle_of_our_own(own):
    host = sm.Monarch.random((48, 40), blocks=8, rng=0, dtype=np.float32)
    a, x = host.to("cupy"), on_device(entries((40, 24), np.float32))
    a._plan()
    capture.prepare()
    with cupy.cuda.Stream(5), fakecupy.capturing(), fakecupy.counted() as c:
        y = a @ x
    assert len(c.gemms) == 2
    assert c.kernels == []
    assert own.calls == ["create", "stream 5", "workspace", "gemm", "stream 5", "workspace", "gemm"]
    assert error(y, host @ x.get()) < 1e-6
    kept = {v.data.ptr: v.size for v in a._plan().products.captured}
    assert sorted(kept.values()) == sorted([x.size, 64 * 24, y.size, capture.WORKSPACE]), "what the graph touches"
    assert {x.data.ptr, y.data.ptr, own.spaces[0]} < set(kept)
    own.status = 7
    with fakecupy.capturing(), pytest.raises(RuntimeError, match="cublasSetStream failed with status 7"):
        a @ x


def test_without_the_library_a_capture_is_refused():
    a, x = sm.Monarch.random((16, 16), blocks=4, rng=0).to("cupy"), on_device(entries((16, 3)))
    a._plan()
    with fakecupy.capturing(), pytest.raises(RuntimeError, match=r"libcublas.*cannot be captured into a CUDA graph"):
        a @ x


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("group", GROUPS)
def test_no_memory_of_a_graph_is_given_to_others(group, operand, own):
    sm.backends.register(CupyBackend(H200._replace(call=1e-3), (group,)), "cupy")
    with sm.use_backend("cupy"):
        for make in GROUPS[group].values():
            a = make(rng=0, dtype=np.float32).to("cupy")
            for operator in (a, a.T) if group != "fused" else (a.astype(np.float16),):
                numbers = 9 * entries((12, 8, operator.shape[1]))
                x, i = on_device(numbers.astype(operator.dtype)), on_device(numbers.astype(np.int8))
                _ = OPERANDS[operand](operator, x, i)  # compiles, casts, merges
                with fakecupy.capturing() as graph:
                    y = OPERANDS[operand](operator, x, i)
                gc.collect()
                assert graph.touched
                graph.launch()
                assert y.ndim


def test_the_dense_matrix_of_a_graph_is_kept(own, monkeypatch):
    times = iter([1.0, 2.0])
    monkeypatch.setattr("structmat.backends.cupy.plan._time", lambda function: (function(), next(times))[1])
    sm.backends.register(CupyBackend(H200._replace(call=1e-3), ("dense",)), "cupy")
    with sm.use_backend("cupy"):
        a, x = sm.Monarch.random((64, 64), rng=0).to("cupy"), on_device(entries((64, 5)))
        assert a.plan(batch=5).kernel == "dense"
        _ = a @ x
        with fakecupy.capturing() as graph:
            y = a @ x
        assert sm.tune(a, batch=5).kernel == "2 products"
        gc.collect()
        graph.launch()
        assert y.shape == (64, 5)


def test_graphs_of_two_streams_have_a_workspace_each(own):
    a, x = sm.LowRank.random((16, 16), rank=2, rng=0).to("cupy"), on_device(entries((16, 3)))
    _ = a @ x

    def captured(stream):
        own.spaces.clear()
        with stream, fakecupy.capturing() as graph:
            _ = a @ x
        gc.collect()
        assert len(set(own.spaces)) == 1
        return graph, own.spaces[0]

    first, second = cupy.cuda.Stream(5), cupy.cuda.Stream(6)
    graphs, spaces = zip(*map(captured, (first, second, first)), strict=True)
    assert spaces[0] == spaces[2] != spaces[1]
    assert own.calls.count("create") == 1
    del first
    again, space = captured(cupy.cuda.Stream(5))  # an address that was another stream's
    assert space not in spaces, "graphs of the stream that is gone may still be launched"
    for graph in (*graphs, again):
        graph.launch()


def test_every_thread_has_a_handle_of_its_own(own):
    capture.prepare()
    at_once = threading.Barrier(2)
    threads = [threading.Thread(target=lambda: (at_once.wait(), capture.prepare(), at_once.wait())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert own.calls == ["create"] * 3
    capture.prepare()
    assert own.calls == ["create"] * 3


def test_the_stand_in_sees_memory_that_was_freed():
    x = on_device(np.ones((4, 4)))
    with fakecupy.capturing() as graph:
        y = (x + x) * x
    with pytest.raises(MemoryError, match="add"):
        graph.launch()
    assert y.shape == (4, 4)
    with fakecupy.capturing(), pytest.raises(RuntimeError, match="CaptureUnsupported"):
        cupy.cuda.get_current_stream().synchronize()
