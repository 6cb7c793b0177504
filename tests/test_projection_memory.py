"""The memory that docs/projection.md promises, measured in processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = ROOT / "bench" / "projection_memory.py"
PROMISED = {
    name.strip(): float(limit)
    for name, limit in re.findall(
        r"^\| ([A-Z][^|]*)\| +(\d+) +\|$", (ROOT / "docs" / "projection.md").read_text(), re.M
    )
}


def probe(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(PROBE), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_benchmark_knows_every_promise():
    rows = [line.rsplit(" ", 2) for line in probe().splitlines()]
    assert {name: float(limit) for name, limit, _ in rows} == PROMISED


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of one process is read from /proc")
@pytest.mark.parametrize("name", sorted(PROMISED))
def test_peak_memory_is_a_small_multiple_of_the_matrix(name):
    size = next(line.rsplit(" ", 1)[1] for line in probe().splitlines() if line.startswith(f"{name} "))
    peak = float(probe(name, size).split(",")[0].lstrip("["))
    assert 1.0 <= peak <= PROMISED[name]
