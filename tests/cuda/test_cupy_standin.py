"""Runs the tests in ``standin`` in a process of their own, with the stand-in where ``import cupy`` finds it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import fakecupy
import pytest
import shim

STANDIN = Path(__file__).with_name("standin")
MARKET = "test_standin_market.py"
OTHERS = sorted(path.name for path in STANDIN.glob("test_*.py") if path.name != MARKET)
LEAST = {"market": 2000, "others": 220}  # tests that must have run


@pytest.mark.parametrize(("group", "names"), [("market", [MARKET]), ("others", OTHERS)], ids=["market", "others"])
@pytest.mark.skipif(shim.compiler() is None, reason="g++ is not installed")
def test_on_the_stand_in(group, names):
    options = ["-o", "addopts=--strict-markers", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(str(STANDIN / name) for name in names)]
    environment = {**os.environ, "STRUCTMAT_STANDIN": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=STANDIN.parents[2], check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= LEAST[group]


def test_the_stand_in_offers_nothing_that_cupy_lacks():
    cupy = pytest.importorskip("cupy")
    names = [*fakecupy.CONSTANTS.split(), *fakecupy.CREATE.split(), *fakecupy.FUNCTIONS.split()]
    names += ["ndarray", "RawModule", "asarray", "array", "asnumpy", "from_dlpack", "empty", "ascontiguousarray"]
    assert [n for n in names if not hasattr(cupy, n)] == []
    assert [n for n in fakecupy.LINALG.split() if not hasattr(cupy.linalg, n)] == []
    assert [n for n in fakecupy.FFT.split() if not hasattr(cupy.fft, n)] == []
    own = {n for n in vars(fakecupy.ndarray) if not n.startswith("_")}
    assert [n for n in own if not hasattr(cupy.ndarray, n)] == []
    assert [
        n for n in ("Device", "Event", "Stream", "is_available", "get_elapsed_time") if not hasattr(cupy.cuda, n)
    ] == []
    own = {n for n in vars(fakecupy.Stream) if not n.startswith("_")}
    assert [n for n in own if not hasattr(cupy.cuda.Stream, n)] == []
    assert weakref.ref(cupy.cuda.Stream.null)
    assert cupy.cuda.Stream.__hash__ is not None, "workspaces are found by streams, weakly"
    assert hasattr(cupy.cuda.device, "get_cublas_handle")
    assert {"getDevice", "getDeviceCount", "getDeviceProperties"} <= set(dir(cupy.cuda.runtime))
