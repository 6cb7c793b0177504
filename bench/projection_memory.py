"""Peak memory of a projection in multiples of the matrix, W itself included; every figure is of a process of its own.

``python bench/projection_memory.py METHOD N`` prints that of one method, without arguments what is documented of each.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import Figure, Part, Table, once

import structmat as sm


class Method(NamedTuple):
    """A way of projecting: its options, and how many times W it may hold, W included."""

    family: type
    options: dict[str, Any]
    limit: float  # as in docs/projection.md
    largest: int = 8192  # beyond it takes minutes


METHODS = {
    "LowRank, exact": Method(sm.LowRank, {"rank": 64, "method": "svd"}, 10.0, 2048),
    "LowRank, randomised": Method(sm.LowRank, {"rank": 64}, 3.0),
    "Monarch": Method(sm.Monarch, {"rank": 1}, 4.0),
    "BlockTensorTrain": Method(sm.BlockTensorTrain, {"rank": 1}, 4.0),
    "Kronecker": Method(sm.Kronecker, {}, 4.0),
    "Butterfly": Method(sm.Butterfly, {"radix": 2}, 4.0),
    "Butterfly, refined": Method(sm.Butterfly, {"radix": 2, "refine": 1}, 7.0),
    "BlockDiagonal": Method(sm.BlockDiagonal, {"blocks": 64}, 4.0),
}


def run(quick: bool) -> Part:
    figures, rows = [], []
    for name, method in METHODS.items():
        n = min(2048 if quick else 8192, method.largest)
        multiple, seconds, how = peak(name, n)
        what = f"memory of {name} at {n}, times W, W included"
        figures.append(
            Figure(
                what, multiple, method.limit, note="documented" if name != "Butterfly" else "the figure of the issue"
            )
        )
        rows.append([name, n, multiple, method.limit, seconds, how])
    head = ("", "n", "peak / W", "documented", "CPU seconds", "method")
    note = (
        "Resident memory of a process at its peak less that before W was made, over the bytes of W (float64, Gaussian)."
    )
    return Part(figures, [Table("Memory", head, rows, note)])


def peak(name: str, n: int) -> tuple[float, float, str]:
    """Peak memory over the bytes of W, CPU seconds, and the method, from a new process."""
    done = subprocess.run(
        [sys.executable, __file__, name, str(n)], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{name}, {n}: {done.stderr}")
    multiple, seconds, how = json.loads(done.stdout)
    if multiple < 1:  # W itself has been counted
        raise RuntimeError(f"{name}, {n}: {multiple:.2f} times W is no peak")
    return multiple, seconds, how


def held() -> int:
    """Bytes of resident memory at the peak so far. Linux hands ``ru_maxrss`` on from the parent process, but not VmHWM."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(name: str, n: int) -> None:
    family, options, *_ = METHODS[name]
    sm.project(np.eye(64), family, **{k: min(v, 8) if isinstance(v, int) else v for k, v in options.items()})  # imports
    before = held()
    W = np.random.default_rng(0).standard_normal((n, n))
    seconds, p = once(lambda: sm.project(W, family, **options))
    print(json.dumps([(held() - before) / W.nbytes, seconds, p.method]))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(sys.argv[1], int(sys.argv[2]))
    else:
        for name, method in METHODS.items():
            print(name, method.limit, method.largest)
