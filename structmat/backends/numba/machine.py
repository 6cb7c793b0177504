"""What the planner knows about the machine: a few rates, defaults until ``structmat.tune()`` has measured them.

Measured rates are kept in a small JSON file in the user's cache directory (``$XDG_CACHE_HOME/structmat``, by default
``~/.cache/structmat``), one entry per kind of processor and width of vectors.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from structmat.backends.numba.simd import VECTOR_BYTES


class Machine(NamedTuple):
    """Rates of one core, and the fixed costs of calls."""

    flops: float = 1.1e11  # float32 operations per second of a register-tiled product; float64 runs at half of it
    near: float = 9e10  # bytes per second from the second-level cache
    shared: float = 3.5e10  # bytes per second from the cache that cores share
    far: float = 1.6e10  # bytes per second from memory
    cache: int = 1 << 20  # bytes of the second-level cache
    shared_cache: int = 1 << 24  # bytes of the shared cache that one core may count on
    product: float = 1.5e-7  # seconds of one small product through BLAS, beside its flops
    call: float = 4e-6  # seconds of one NumPy chain, beside its products
    dense: float = 1.4e-6  # seconds of one dense product, beside its flops
    start: float = 2e-6  # seconds of one program, beside its instructions
    instruction: float = 1.2e-8  # seconds of one step of a program, beside its flops

    def peak(self, itemsize: int) -> float:
        """Operations per second for an element size."""
        return self.flops * 4 / itemsize

    def bandwidth(self, size: float) -> float:
        """Bytes per second for data of this size that is used again and again."""
        if size <= self.cache / 2:
            return self.near
        return self.shared if size <= self.shared_cache else self.far


def machine() -> Machine:
    """The rates of this machine: as measured by :func:`measure` and kept, else the defaults."""
    return _known()


@cache
def _known() -> Machine:
    try:
        stored = json.loads(_file().read_text())[_key()]
        rates = Machine(**stored)
        if all(0 < rate < math.inf for rate in rates):
            return rates
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # no file or no home, or of another version
        pass
    return Machine()


def remember(rates: Machine) -> None:
    """Keep measured rates, for this process and later ones; ``OSError`` where they cannot be written."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        stored = None
    known = stored if isinstance(stored, dict) else {}
    known[_key()] = rates._asdict()
    partial = path.with_suffix(f".{os.getpid()}")  # a reader never sees half a file
    partial.write_text(json.dumps(known, indent=2))
    partial.replace(path)
    _known.cache_clear()


def measure() -> Machine:
    """Measure the rates of one core, about half a second."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((512, 512)).astype(np.float32) for _ in range(2))
    c = np.empty_like(a)
    flops = 2 * 512**3 / _best(lambda: np.matmul(a, b, out=c), 15)
    level2 = _cache_size("SC_LEVEL2_CACHE_SIZE", Machine().cache)
    level3 = _cache_size("SC_LEVEL3_CACHE_SIZE", 2 * Machine().shared_cache) // 2  # others use it too
    blocks, x = rng.standard_normal((64, 4, 4)), rng.standard_normal((64, 4, 4))
    one = rng.standard_normal((1, 4, 4))
    many, single = _best(lambda: blocks @ x, 50), _best(lambda: one @ one, 50)
    return Machine(
        flops=flops,
        near=_reading(level2 // 4),
        shared=_reading(level3 // 4),
        far=_reading(8 * level3),
        cache=level2,
        shared_cache=level3,
        product=max(1e-8, (many - single) / 63),
    )


def _reading(size: int) -> float:
    """Bytes per second of a sum over an array of so many bytes, read again and again."""
    values = np.ones(size // 4, np.float32)
    return size / _best(lambda: values.dot(values) if size < 1 << 20 else values.max(), max(5, (1 << 27) // size))


def _best(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return max(min(times), 1e-9)


def _cache_size(name: str, default: int) -> int:
    try:
        return os.sysconf(name) or default
    except (ValueError, OSError, AttributeError):
        return default


def _key() -> str:
    return f"{platform.machine()} {_processor()} {8 * VECTOR_BYTES} bit"


def _processor() -> str:
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name()


def _file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "structmat" / "machine.json"
