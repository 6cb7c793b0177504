"""The Numba backend among others: threads, forks, other processes, memory, the cache on disk."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from chains import DTYPES, composites, kernels, operators
from market import entries

import structmat as sm

pytest.importorskip("numba")

from structmat.backends.numba import threads
from structmat.backends.numba.plan import NumbaPlan

on_all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


@pytest.fixture(autouse=True)
def _numba():
    with sm.use_backend("numba"):
        yield


# ---- threads --------------------------------------------------------------------------------------------------------


@on_all_dtypes
def test_eight_threads_share_an_operator(dtype):
    for a in (*operators(dtype), next(composites(dtype))):
        fresh = type(a)._rebuild(*a._values())  # its plan is made by all threads at once
        operands = [entries((96, k), dtype, k) for k in (1, 2, 5, 16, 33, 64, 130, 300)]
        expected = [(a @ x, x.T @ a.T) for x in operands]

        def work(i, fresh=fresh, operands=operands, expected=expected):
            with sm.use_backend("numba"):
                for j in range(10):
                    x, (columns, rows) = operands[(i + j) % 8], expected[(i + j) % 8]
                    np.testing.assert_array_equal(fresh @ x, columns)
                    np.testing.assert_array_equal(x.T @ fresh.T, rows)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


@on_all_dtypes
def test_a_split_batch_gives_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(threads, "SERIAL_SECONDS", 0.0)
    for a in operators(dtype):
        plan = a._plan()
        assert isinstance(plan, NumbaPlan) or isinstance(a, sm.Kronecker)
        if not isinstance(plan, NumbaPlan):
            continue
        m, n = a.shape
        for rows in (False, True):
            x = entries((700, n) if rows else (n, 700), dtype, 1).reshape(-1)
            for name, apply in kernels(plan, 700, rows).items():
                results = []
                for count in (1, 2, 5):
                    monkeypatch.setattr(threads, "get_num_threads", lambda count=count: count)
                    results.append(np.full(m * 700, np.nan, dtype))
                    apply(x, results[-1], 0)
                np.testing.assert_array_equal(results[0], results[1], err_msg=name)
                np.testing.assert_array_equal(results[0], results[2], err_msg=name)


@on_all_dtypes
@pytest.mark.parametrize("n", [512, 8192])
def test_a_short_part_of_a_butterfly_gives_the_same_bits(n, dtype, monkeypatch):
    """The last part has fewer samples than a vector has lanes: few samples alone would take another kernel."""
    monkeypatch.setattr(threads, "SERIAL_SECONDS", 0.0)
    for a in (sm.Butterfly.random((n, n), radix=2, dtype=dtype, rng=0), 0.5 * sm.hadamard(n, dtype)):
        chosen = getattr(a, "operator", a)._plan()
        for rows in (False, True):
            x = entries((33, n) if rows else (n, 33), dtype, 1).reshape(-1)
            apply = kernels(chosen, 33, rows)["levels"]
            results = []
            for count in (1, 2):
                monkeypatch.setattr(threads, "get_num_threads", lambda count=count: count)
                results.append(np.full(n * 33, np.nan, dtype))
                apply(x, results[-1], 0)
            np.testing.assert_array_equal(*results)


def test_an_error_in_one_part_is_raised_when_all_parts_have_ended(monkeypatch):
    monkeypatch.setattr(threads, "get_num_threads", lambda: 3)
    ended = []

    def part(start, stop):
        if start == 4:
            raise MemoryError("on purpose")
        time.sleep(0.02 if start == 8 else 0)
        ended.append((start, stop))

    with pytest.raises(MemoryError, match="on purpose"):
        threads.split(part, 12, 4, 1.0)
    assert sorted(ended) == [(0, 4), (8, 12)]


def test_parts_are_multiples_of_the_tile(monkeypatch):
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(threads, "get_num_threads", lambda count=count: count)
        for total, grain in ((1, 16), (16, 16), (17, 16), (1000, 32), (5, 1)):
            parts = []
            threads.split(lambda start, stop, parts=parts: parts.append((start, stop)), total, grain, 1.0)
            parts.sort()
            assert len(parts) == min(count, -(-total // grain))
            assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
            assert parts[-1][1] == total
            assert all(start % grain == 0 for start, _ in parts)
    short = []
    threads.split(lambda start, stop: short.append((start, stop)), 1000, 16, threads.SERIAL_SECONDS / 2)
    assert short == [(0, 1000)], "short work is not worth a second thread"


def test_pools_of_different_sizes_at_once(monkeypatch):
    """The number of threads is a property of the calling thread: one pool must serve them all."""
    monkeypatch.setattr(threads, "get_num_threads", lambda: 2 + np.random.default_rng().integers(7))

    def work(_):
        done = []
        for _ in range(50):
            threads.split(lambda start, stop: done.append(stop - start), 64, 1, 1.0)
        return sum(done)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(16))) == [50 * 64] * 16


def test_scratch_is_aligned_kept_and_per_thread():
    for dtype in DTYPES:
        scratch = threads.Scratch.of(np.dtype(dtype))
        one = scratch.grow(10_000)
        assert one.size >= 10_000
        assert one.ctypes.data % 64 == 0
        assert scratch.kept is one
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda scratch=scratch: scratch.grow(10_000)).result()
        assert not np.shares_memory(one, other)


def test_a_huge_scratch_is_given_back(monkeypatch):
    monkeypatch.setattr(threads, "KEPT_BYTES", 1 << 17)
    scratch = threads.Scratch(np.dtype(np.float32))
    small = scratch.grow(10_000)
    assert scratch.grow(100_000).size >= 100_000
    assert scratch.kept is small


THREADS = """
    import threading, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # Python says that forks and threads do not mix: they must here
    import multiprocessing
    import numba, numpy as np, structmat as sm

    sm.use_backend("numba")
    a = sm.Monarch.random((1024, 1024), dtype=np.float32, rng=0)
    x = np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float32)
    numba.set_num_threads(1)
    alone = x @ a.T
    assert not [t for t in threading.enumerate() if t.name.startswith("structmat")]
    numba.set_num_threads(2)
    together = x @ a.T
    assert len([t for t in threading.enumerate() if t.name.startswith("structmat")]) == 1
    assert (alone == together).all()

    def child(queue):
        queue.put(bool((x @ a.T == alone).all()))

    if "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        assert queue.get(timeout=60)
        process.join(60)
        assert process.exitcode == 0, process.exitcode
    print("done")
"""


def script(text, **env):
    """What a script prints in a process of its own."""
    env = {**os.environ, **env}
    code = textwrap.dedent(text)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_two_threads_and_a_fork():
    assert script(THREADS, NUMBA_NUM_THREADS="4") == ["done"]


def _apply(a, x):
    with sm.use_backend("numba"):
        return a @ x


def test_another_process_takes_an_operator_that_has_a_plan():
    a = sm.Monarch.random((96, 96), blocks=8, rng=0)
    x = entries((96, 40), np.float64, 1)
    expected = a @ x
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(_apply, (a, x)), expected)


# ---- memory ---------------------------------------------------------------------------------------------------------


@on_all_dtypes
def test_a_plan_keeps_what_it_points_to(dtype):
    for a in list(operators(dtype)):
        dense, plan = a.to_dense(), a._plan()
        if not isinstance(plan, NumbaPlan):
            continue
        m, n = a.shape
        plan = type(a)._rebuild(*[copy.deepcopy(v) for v in a._values()])._plan()  # nobody else holds these arrays
        made = [(rows, apply) for rows in (False, True) for apply in kernels(plan, 33, rows).values()]
        gc.collect()
        litter = [np.full(size, np.nan, dtype) for size in range(16, 4096, 16)]
        for rows, apply in made:
            out = np.empty((33, m) if rows else (m, 33), dtype)
            apply(np.ones(33 * n, dtype), out.reshape(-1), 0)
            expected = dense.sum(axis=1)
            np.testing.assert_allclose(out if rows else out.T, np.tile(expected, (33, 1)), atol=1e-3)
        del litter


@on_all_dtypes
def test_copies_of_an_operator_that_has_a_plan(dtype):
    for a in operators(dtype):
        x = entries((96, 19), dtype, 1)
        expected = a @ x, x.T @ a.T
        for other in (copy.copy(a), copy.deepcopy(a), pickle.loads(pickle.dumps(a)), a.T.T, a.astype(dtype)):
            np.testing.assert_array_equal(other @ x, expected[0])
            np.testing.assert_array_equal(x.T @ other.T, expected[1])
        assert len(pickle.dumps(a)) < a.nbytes + 4000, "a plan is not pickled"


# ---- the cache on disk ----------------------------------------------------------------------------------------------

CACHE = """
    import numpy as np, structmat as sm
    from structmat.backends.numba.machine import Machine
    from structmat.backends.numba.program import run

    sm.use_backend("numba")
    plan = sm.Monarch.random((64, 64), rng=0)._plan()
    tile = next(kernel for kernel in plan.candidates(64, True, Machine()) if kernel.name.startswith("tile"))
    tile.make()(np.ones(64 * 64), np.ones(64 * 64), 0)
    print(sum(run.stats.cache_hits.values()), sum(run.stats.cache_misses.values()))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    assert script(CACHE, NUMBA_CACHE_DIR=str(tmp_path)) == ["0", "1"]
    assert script(CACHE, NUMBA_CACHE_DIR=str(tmp_path)) == ["1", "0"]
