"""What is not a cell of the grid: first calls in fresh processes, the overhead of small calls, and two threads."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np
from peers import library, ours
from timing import measure, set_threads

import structmat as sm

IDLE = 1.6  # the speed-up of a dense product on two threads that shows two free cores

FIRST_CALL = """
import json, sys, time
begin = time.perf_counter()
try:
    import numba
except ImportError:
    pass
compiler = time.perf_counter() - begin
import numpy as np, structmat as sm
a = {make}
x = np.ones({shape}, np.float32)
from structmat.backends.selection import backend_for
wall, cpu = time.perf_counter(), time.process_time()
{call}
first, first_cpu = time.perf_counter() - wall, time.process_time() - cpu
cpu = time.process_time()
{call}
second = time.process_time() - cpu
found = dict(compiler=compiler, first=first, cpu=first_cpu, second=second, backend=backend_for("numpy").name)
print(json.dumps(found))
"""

STARTS = {
    "Monarch 1024/32, vector": ("sm.Monarch.random((1024, 1024), blocks=32, dtype=np.float32)", "1024", "a @ x"),
    "Monarch 1024/32, 256 rows": (
        "sm.Monarch.random((1024, 1024), blocks=32, dtype=np.float32)", "(256, 1024)", "x @ a.T",
    ),
    "Butterfly 1024, vector": ("sm.Butterfly.random((1024, 1024), dtype=np.float32)", "1024", "a @ x"),
    "Hadamard 1024, 256 rows": ("sm.hadamard(1024, np.float32)", "(256, 1024)", "x @ a.T"),
    "Kronecker 32x32, 256 rows": ("sm.Kronecker.random((1024, 1024), dtype=np.float32)", "(256, 1024)", "x @ a.T"),
}  # fmt: skip


def start(quick: bool) -> list[dict[str, Any]]:
    """CPU seconds of the first call with an empty and with a filled on-disk cache, and wall seconds; without imports.

    Always the default backend: a fresh process does not know what this one was told.
    """
    rows = []
    for name, (make, shape, call) in list(STARTS.items())[: 2 if quick else None]:
        script = FIRST_CALL.format(make=make, shape=shape, call=call)
        cold, warm = [], []
        for _ in range(1 if quick else 3):
            with tempfile.TemporaryDirectory() as cache:
                cold.append(first_call(script, cache))
                warm.append(first_call(script, cache))
        row: dict[str, Any] = {
            "what": name,
            "cold": statistics.median(r["cpu"] for r in cold),
            "warm": statistics.median(r["cpu"] for r in warm),
            "cold, wall": statistics.median(r["first"] for r in cold),
            "warm, wall": statistics.median(r["first"] for r in warm),
            "second call": statistics.median(r["second"] for r in warm),
            "import numba, wall": statistics.median(r["compiler"] for r in warm),
            "backend": warm[0]["backend"],
        }
        compiled = row["backend"] != "numpy"
        row["met"] = row["cold"] <= 1.5 and row["warm"] <= 0.3 if compiled else "nothing is compiled"
        rows.append(row)
    return rows


def first_call(script: str, cache: str) -> dict[str, float]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"the first call failed in a fresh process:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def overhead(quick: bool) -> list[dict[str, Any]]:
    """Microseconds of one call at n = 256, and of the dense product beside it."""
    rows = []
    for dtype in ("f4",) if quick else ("f4", "f8"):
        x = np.ones(256, dtype)
        column, y = x[:, None].copy(), np.empty((256, 1), dtype)
        for name, a in {
            "Monarch 256/16": sm.Monarch.random((256, 256), blocks=16, dtype=np.dtype(dtype), rng=0),
            "Butterfly 256": sm.Butterfly.random((256, 256), dtype=np.dtype(dtype), rng=0),
            "Kronecker 16x16": sm.Kronecker.random((256, 256), dtype=np.dtype(dtype), rng=0),
            "Hadamard 256": sm.hadamard(256, np.dtype(dtype)),
        }.items():
            matrix = np.ascontiguousarray(a.to_dense())
            calls = {
                "A @ x": partial(a.__matmul__, x),
                "A.matmat(x, out=y)": partial(a.matmat, column, out=y),
                "dense @ x": partial(matrix.__matmul__, x),
            }
            for call in calls.values():
                call()
            times = {k: t.cpu * 1e6 for k, t in measure(calls, 0.15 if quick else 0.5).items()}
            met = times["A @ x"] <= 2.5 and times["A.matmat(x, out=y)"] <= 1.5
            rows.append({"what": f"{name} {dtype}", **times, "met": met})
    return rows


def rested(threads: int) -> None:
    """Set the number of threads, and wait until the workers of the last BLAS call have stopped spinning."""
    set_threads(threads)
    time.sleep(0.1)


def scaling(quick: bool) -> list[dict[str, Any]]:
    """Wall time of one thread over that of two, on compute-bound cases, ours and dense in turns."""
    cases = {
        "Monarch 4096/64, 1024 rows": (partial(sm.Monarch.random, (4096, 4096), blocks=64), "rows", 1024),
        "Monarch 4096/64, 1024 columns": (partial(sm.Monarch.random, (4096, 4096), blocks=64), "columns", 1024),
        "Monarch 4096/4, 256 rows": (partial(sm.Monarch.random, (4096, 4096), blocks=4, rank=256), "rows", 256),
        "BTT 1024/32 r=8, 1024 rows": (
            partial(sm.BlockTensorTrain.random, (1024, 1024), blocks=32, rank=8), "rows", 1024,
        ),
        "Butterfly 4096, 1024 rows": (partial(sm.Butterfly.random, (4096, 4096), radix=2), "rows", 1024),
        "Kronecker 64x64, 1024 rows": (partial(sm.Kronecker.random, (4096, 4096)), "rows", 1024),
    }  # fmt: skip
    rows = []
    for name, (make, layout, batch) in list(cases.items())[: 1 if quick else None]:
        a = make(dtype=np.float32, rng=0)
        x = np.random.default_rng(0).standard_normal((a.shape[1], batch), dtype=np.float32)
        x = x if layout == "columns" else np.ascontiguousarray(x.T)
        square = np.resize(np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32), (1024, 1024))
        calls = {}
        for threads in (1, 2):
            calls[f"ours {threads}"] = ours(a, x, layout)
            calls[f"dense {threads}"] = lambda square=square: square @ square
        prepare = {key: partial(rested, int(key[-1])) for key in calls}
        for key, call in calls.items():
            prepare[key]()
            call()
        times = measure(calls, 0.6 if quick else 2.0, "wall", prepare=prepare)
        gain, dense = (times[f"{k} 1"].wall / times[f"{k} 2"].wall for k in ("ours", "dense"))
        idle = dense >= IDLE  # a BLAS product that does not scale says that the second core is not free
        met = gain >= 1.7 if idle else "inconclusive: cores busy"
        rows.append({"what": name, "speed-up of two threads": gain, "dense 1024": dense, "met": met})
    return rows


def load() -> float | None:
    """The number of runnable processes: with more than cores, figures of two threads say nothing."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def compiler() -> str:
    """The version of Numba, or why it is missing."""
    module = library("numba")
    return module if isinstance(module, str) else module.__version__
