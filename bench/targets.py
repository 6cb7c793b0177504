"""The figures to reach, T1 to T11: which cells each looks at, what it compares, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from cells import Cell


class Claim(NamedTuple):
    """All chosen cells are at least ``bound`` times faster than a contender; ``bound`` may depend on the cell.

    ``against="roof"`` bounds the share of the roofline from below, ``"memcpy"`` our time over that of a copy from above.
    With ``layout="either"`` our faster layout meets the faster layout of the other side.
    """

    target: str
    what: str
    against: str
    bound: float
    layout: str
    chosen: Callable[[Cell], bool]


def named(*operators: str, batch: tuple[int, ...] = (), least: int = 1, dtype: str = "f4") -> Callable[[Cell], bool]:
    """Cells of some operators, batches and a dtype."""
    return lambda c: (
        c.operator in operators and c.dtype == dtype and c.batch >= least and (not batch or c.batch in batch)
    )


def trains(low: float, high: float) -> Callable[[Cell], bool]:
    """Square Block Tensor-Trains with a ratio of dense to stored parameters in a range."""
    return lambda c: (
        c.part == "btt" and c.batch >= 256 and low <= c.shape[0] * c.shape[1] / c.nparams < high and c.dtype == "f4"
    )


M, S = "monarch 4096/64", "monarch 1024/32"
CLAIMS = (
    Claim("T1", "Monarch 4096/64, B=256", "dense torch", 16, "rows", named(M, batch=(256,))),
    Claim("T1", "Monarch 4096/64, B=256", "roof", 0.45, "rows", named(M, batch=(256,))),
    Claim("T1", "Monarch 4096/64, B=256", "torch M2-style", 1.4, "rows", named(M, batch=(256,))),
    Claim("T2", "Monarch 4096/64, B=4096", "dense torch", 13, "rows", named(M, batch=(4096,))),
    Claim("T2", "Monarch 4096/64, B=4096", "torch M2-style", 3.8, "rows", named(M, batch=(4096,))),
    Claim("T3", "Monarch 1024/32, B=256", "best dense", 8.5, "rows", named(S, batch=(256,))),
    Claim("T3", "Monarch 1024/32, B=256", "torch M2-style", 2.2, "rows", named(S, batch=(256,))),
    Claim("T4", "Monarch 4096/64, B=16", "best dense", 20, "columns", named(M, batch=(16,))),
    Claim("T4", "Monarch 4096/64, B=16", "best dense", 35, "rows", named(M, batch=(16,))),
    Claim("T5", "Monarch 1024/32, B=1", "dense numpy", 30, "columns", named(S, batch=(1,))),
    Claim("T5", "Monarch 1024/32, B=1", "numpy strided", 2.5, "columns", named(S, batch=(1,))),
    Claim("T6", "Monarch 4096/4, B>=256", "best dense", 1.6, "rows", named("monarch 4096/4", least=256)),
    Claim("T7", "Butterfly 4096, B=1", "best dense", 400, "either", named("butterfly 4096", batch=(1,))),
    Claim("T7", "Butterfly 4096, B=1", "scipy rfft", 5, "either", named("butterfly 4096", batch=(1,))),
    Claim("T7", "Butterfly 4096, B=256", "best dense", 40, "either", named("butterfly 4096", batch=(256,))),
    Claim("T7", "Butterfly 4096, B=256", "pyfaust", 8, "either", named("butterfly 4096", batch=(256,))),
    Claim("T7", "Butterfly 4096, B=256", "memcpy", 3, "either", named("butterfly 4096", batch=(256,))),
    Claim(
        "T8", "Hadamard n<=16384, B>=256", "memcpy", 2.5, "either",
        lambda c: c.family == "hadamard" and c.batch >= 256 and c.shape[0] <= 16384,
    ),
    Claim("T9", "Kronecker, B=1", "pyfastkron", 3, "rows", lambda c: c.family == "kronecker" and c.batch == 1),
    Claim("T9", "Kronecker, B>1", "pyfastkron", 1.2, "rows", lambda c: c.family == "kronecker" and c.batch > 1),
    Claim("T9", "Kronecker", "cola", 1.3, "columns", lambda c: c.family == "kronecker"),
    Claim("T9", "Kronecker", "linear_operator", 1.3, "columns", lambda c: c.family == "kronecker"),
    Claim("T10", "Kronecker", "pyfastkron", 1.0, "columns", lambda c: c.family == "kronecker"),
    Claim("T11", "BTT, ratio >= 4, B>=256", "best dense", 2.7, "rows", trains(4, 1e9)),
    Claim("T11", "BTT, ratio 2, B>=256", "best dense", 1.3, "rows", trains(2, 4)),
    Claim(
        "T11", "Monarch and BTT, B>=1024", "torch strided bmm", 0.95, "columns",
        lambda c: c.family in ("monarch", "btt") and c.batch >= 1024,
    ),
    Claim("T11", "all chains", "lazylinop ksm", 1.5, "both", lambda c: "lazylinop ksm" in c.roles),
)  # fmt: skip


class Verdict(NamedTuple):
    """A claim with the worst of its cells."""

    claim: Claim
    measured: float | None
    cell: Cell | None
    count: int
    missed: int

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else not self.missed

    def line(self) -> tuple[str, str, str, str, str]:
        """Target, what, required, measured, verdict."""
        c = self.claim
        required = {
            "roof": f">= {c.bound:.0%} of roofline",
            "memcpy": f"<= {c.bound:g}x memcpy",
        }.get(c.against, f">= {c.bound:g}x {c.against}")
        measured, verdict = "-", "not measured"
        if self.measured is not None and self.cell is not None:
            number = f"{self.measured:.0%}" if c.against == "roof" else f"{self.measured:.2f}x"
            where = f" ({self.cell.title()}; {self.missed} of {self.count} miss)" if self.count > 1 else ""
            measured, verdict = number + where, "met" if self.met else "NOT MET"
        return c.target, f"{c.what}, {c.layout}", required, measured, verdict


def verdicts(cells: list[Cell]) -> Iterator[Verdict]:
    """Every claim, measured or not, by its worst cell."""
    for claim in CLAIMS:
        at_most = claim.against == "memcpy"
        chosen = [c for c in cells if claim.chosen(c) and claim.layout in (c.layout, "either", "both")]
        if claim.layout == "either":
            found = list(of_faster_layouts(chosen, claim.against))
        else:
            found = [(value, c) for c in chosen if (value := figure(c, claim.against)) is not None]
        if not found:
            yield Verdict(claim, None, None, 0, 0)
            continue
        worst, cell = (max if at_most else min)(found, key=lambda pair: pair[0])
        missed = sum(value > claim.bound if at_most else value < claim.bound for value, _ in found)
        yield Verdict(claim, worst, cell, len(found), missed)


def of_faster_layouts(cells: list[Cell], against: str) -> Iterator[tuple[float, Cell]]:
    """One figure for each operator and batch, from the least time of either side over the layouts."""
    for key in dict.fromkeys((c.operator, c.batch) for c in cells):
        both = [c for c in cells if (c.operator, c.batch) == key and c.seconds("structmat")]
        others = [v * (c.seconds("structmat") or 0) for c in both if (v := c.ratio(against))]
        if others:
            own, cell = min(((c.seconds("structmat") or 0, c) for c in both), key=lambda pair: pair[0])
            ratio = min(others) / own
            yield (1 / ratio if against == "memcpy" else ratio), cell


def figure(cell: Cell, against: str) -> float | None:
    if against == "roof":
        return cell.share_of_roof
    ratio = cell.ratio(against)
    return 1 / ratio if ratio and against == "memcpy" else ratio
