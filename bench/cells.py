"""One cell of the grid: everything that was measured for one operator on one operand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ceilings import Ceilings
from grid import Group, dense_matrix, operand, operator
from peers import contenders, dense, plain
from timing import Timing, measure, relative_error

LONGEST_DENSE = 10.0  # seconds of a dense product that is still run, and bytes of its matrix
LARGEST_DENSE = 4 * 2**30
LONGEST = 0.5  # seconds at the roofline of a structured product that is run without a dense one to compare with


@dataclass
class Cell:
    """Times by contender; ``notes`` says why there is none."""

    part: str
    family: str
    operator: str
    shape: tuple[int, int]
    dtype: str
    layout: str
    batch: int
    threads: int
    nparams: int
    flops: float
    bytes: float
    roof: float  # seconds
    times: dict[str, Timing] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def seconds(self, name: str) -> float | None:
        """Seconds on the deciding clock: CPU time of one thread, wall time of several."""
        timing = self.times.get(name)
        return timing and (timing.cpu if self.threads == 1 else timing.wall)

    def best(self, *roles: str) -> tuple[str, float] | None:
        """The fastest contender of some roles."""
        found = [(s, name) for name in self.times if self.roles[name] in roles and (s := self.seconds(name))]
        if not found:
            return None
        seconds, name = min(found)
        return name, seconds

    def ratio(self, name: str) -> float | None:
        """How many times faster than a contender; ``"best dense"``, ``"best peer"``, ``"best plain"`` name the fastest."""
        own = self.seconds("structmat")
        if name in BEST:
            found = self.best(*BEST[name])
            other = found and found[1]
        else:
            other = self.seconds(name)
        return other / own if own and other else None

    @property
    def share_of_roof(self) -> float | None:
        own = self.seconds("structmat")
        return own and self.roof / own

    @property
    def spread(self) -> float | None:
        """Half the distance of the quartiles over the median."""
        own = self.times.get("structmat")
        median = self.seconds("structmat")
        return (own.high - own.low) / 2 / median if own and median else None

    @property
    def noise(self) -> float | None:
        """Distance from 1.0 of the ratio of structmat to itself, as another contender of the same turns."""
        again = self.ratio("again")
        return again and max(again, 1 / again) - 1

    def title(self) -> str:
        return f"{self.operator} {self.layout} {self.batch} {self.dtype}"

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "times": {name: timing._asdict() for name, timing in self.times.items()}}


BEST = {"best dense": ("dense",), "best peer": ("peer",), "best plain": ("dense", "numpy")}


def run_group(
    group: Group, ceilings: Ceilings, threads: int, seconds: float, wanted: Callable[[str], bool] = lambda _: True
) -> list[Cell]:
    """Measure all operators of a group in turns with the dense products, which they share."""
    spec, dtype, layout, batch = group
    (m, n), itemsize = spec.shape, np.dtype(dtype).itemsize
    clock = "cpu" if threads == 1 else "wall"
    peak = ceilings.peak[dtype]
    x: Any = None
    calls: dict[str, Callable[[], Any]] = {}
    cells: list[tuple[Cell, dict[str, str]]] = []
    for i, entry in enumerate(spec.entries):
        if not wanted(f"{entry.name} {layout} {batch} {dtype}"):
            continue
        a = operator(entry, dtype)
        flops = (entry.flops or a.flops(1)) * batch
        size = (m + n) * batch * itemsize + a.nbytes
        cell = Cell(
            spec.part, entry.family, entry.name, spec.shape, dtype, layout, batch, threads, a.nparams, flops, size,
            ceilings.roof(flops, size, dtype),
        )  # fmt: skip
        keys: dict[str, str] = {}
        cells.append((cell, keys))
        if cell.roof > LONGEST and 2 * m * n * batch / peak > LONGEST_DENSE:
            cell.notes["structmat"] = (
                f"skipped: dense takes more than {LONGEST_DENSE:g} s, the roofline {cell.roof:.1f} s"
            )
            continue
        x = operand(group) if x is None else x
        expected = np.asarray(plain(a, x, layout)())
        for name, (role, call) in contenders(entry.family, a, x, layout).items():
            cell.roles[name] = role
            why = call if isinstance(call, str) else fault(call, expected, role)
            if why:
                cell.notes[name] = why
            else:
                keys[name] = f"{i} {name}"
                calls[keys[name]] = call  # pyright: ignore[reportArgumentType]
    shared = dense_calls(group, x, peak) if x is not None else {}
    for name, call in shared.items():
        for cell, keys in cells:
            cell.roles[name] = "dense"
            if isinstance(call, str):
                cell.notes[name] = call
            else:
                keys[name] = name
                calls[name] = call
    timings = measure(calls, seconds, clock) if calls else {}
    for cell, keys in cells:
        cell.times = {name: timings[key] for name, key in keys.items()}
    return [cell for cell, _ in cells]


def fault(call: Callable[[], Any], expected: np.ndarray, role: str) -> str | None:
    """The first call: why a contender has no time, if it fails or is wrong."""
    try:
        result = call()
    except Exception as error:
        return f"failed ({type(error).__name__}: {str(error)[:80]})"
    if role == "yardstick":
        return None
    if not np.asarray(result).flags.c_contiguous:
        return "not comparable (its result is a transposed view)"
    error = relative_error(result, expected)
    return None if error < (1e-3 if expected.dtype.itemsize == 4 else 1e-9) else f"wrong (relative error {error:.0e})"


def dense_calls(group: Group, x: np.ndarray, peak: float) -> dict[str, Any]:
    (m, n), itemsize = group.spec.shape, np.dtype(group.dtype).itemsize
    names = ("dense numpy", "dense torch")
    if m * n * itemsize >= LARGEST_DENSE:
        return dict.fromkeys(names, f"skipped: matrix of {m * n * itemsize / 2**30:.0f} GiB")
    if 2 * m * n * group.batch / peak > LONGEST_DENSE:
        return dict.fromkeys(names, f"skipped: more than {LONGEST_DENSE:g} s a call")
    calls = dense(dense_matrix(group.spec.shape, group.dtype), x, group.layout)
    for call in calls.values():
        if callable(call) and 2 * m * n * group.batch / peak < 1:  # a longer one is timed once, without another before
            call()
    return calls
