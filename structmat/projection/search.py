"""Search: what one call of approximate asks for, what it has found, and how entries are priced, picked and ranked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from structmat import arrays
from structmat.operator import Operator
from structmat.projection.approximations import Approximation, Approximations
from structmat.projection.certificate import Projection, frobenius
from structmat.projection.cost import Cost, Stage, cost
from structmat.projection.members import Member
from structmat.projection.moments import read_weight
from structmat.projection.project import project
from structmat.projection.selection import (
    Ladder,
    Request,
    UnreachableError,
    allowed_error,
    parameter_limit,
    read_tolerance,
)
from structmat.projection.target import read, rounding, safe_scale

SMALL = 2**12  # entries up to which every member gets all its singular values
_EPS = float(np.finfo(np.float64).eps)


class Search:
    """One call of :func:`structmat.approximate`: what is asked for, and what has been found so far."""

    def __init__(
        self,
        W: Any,
        budget: Any,
        tol: Any,
        families: tuple[type[Operator], ...],
        weight: Any,
        batch: Any,
        allow_slower: bool,
        rng: Any,
    ) -> None:
        if (budget is None) == (tol is None):
            raise ValueError(f"approximate: expected exactly one of budget and tol, got budget={budget}, tol={tol}")
        if isinstance(batch, bool) or not hasattr(batch, "__index__"):
            raise TypeError(f"batch: expected an int, got {type(batch).__name__}")
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        self.families = families
        self.W, self.weight, self.batch, self.allow_slower = W, weight, int(batch), bool(allow_slower)
        self.rng = np.random.default_rng(rng)
        self.source, self.target = read(W)
        self.shape = (self.target.shape[0], self.target.shape[1])
        self.size = math.prod(self.shape)
        self.itemsize = arrays.itemsize(self.source.dtype)
        self.scale = safe_scale(self.target)
        self.prepared = self.target if self.scale == 1.0 else self.target / self.scale
        if weight is not None:  # for the screening: the power of every input alone, which leaves blocks independent
            norm, _ = read_weight(weight, None, None, None, None, self.target)
            columns = norm.columns
            power = np.real(np.diagonal(columns.matrix)) if columns is not None else np.ones(self.shape[1])
            self.prepared = self.prepared * np.sqrt(np.maximum(power, 0.0))
        limit = None if budget is None else min(self.size, parameter_limit(budget, self.shape))
        self.request = Request(
            family=Operator,
            norm=frobenius(self.prepared),
            limit=limit,
            tol=None if tol is None else read_tolerance(tol),
            rounding=rounding(self.source),
        )
        self.cap = self.size - 1 if limit is None else limit  # parameters that an entry may have
        self.entries: list[Approximation] = []
        self.points: dict[str, list[tuple[int, float]]] = {}  # for the curves
        self.nearest = self.size  # parameters of the smallest member
        self.least = self.request.norm  # error of the best member within the cap

    def note(self, member: Member) -> None:
        """Keep the smallest parameter count."""
        self.nearest = min(self.nearest, member.step - member.gauge)

    def record(self, name: str, ladder: Ladder) -> None:
        """Keep the points of a ladder that are within the cap."""
        points = self.points.setdefault(name, [])
        for r in range(1, len(ladder.errors)):
            count = ladder.cost(r)
            if count > self.cap:
                break
            points.append((count, float(ladder.errors[r])))
            self.least = min(self.least, float(ladder.errors[r]))

    # ---- which rung ---------------------------------------------------------------------------------------------

    def top(self, member: Member) -> int:
        """The largest rung within the cap."""
        _, b, c = member.sizes
        ladder = Ladder(None, member.step, np.empty(0), member.gauge)
        return last_of(min(b, c), lambda r: ladder.cost(r) <= self.cap)

    def fast_top(self, member: Member) -> int:
        """The largest rung within the cap that is no slower than dense."""
        return last_of(self.top(member), lambda r: not self.cost(member.stages(r)).slower)

    def cost(self, stages: Sequence[Stage]) -> Cost:
        """Flops and speed against dense."""
        return cost(stages, self.shape, self.batch, self.itemsize)

    def pick(self, errors: np.ndarray, most: int, slack: float = 1.0) -> int | None:
        """The smallest rung within the tolerance, or with the least error up to ``most``; None where there is none."""
        most = min(most, len(errors) - 1)
        if most < 1:
            return None
        floor = max(_EPS * max(self.shape), self.request.rounding / 4) * self.request.norm
        if self.request.tol is not None:
            goal = max(allowed_error(self.request), floor)
        else:
            goal, slack = max(float(errors[most]), floor), 1.0
        found = 1 + int(np.argmax(errors[1 : most + 1] <= goal * slack))
        if errors[found] <= goal * slack:
            return found
        unsure = self.weight is not None and self.request.tol is not None  # the diagonal is not all of the weight
        return most if unsure else None

    def rungs(self, best: int | None, fast: int | None) -> list[int]:
        """Those of the two that there are and that are wanted, once each."""
        return [rung for rung in dict.fromkeys((best,) if self.allow_slower else (best, fast)) if rung]

    # ---- entries ------------------------------------------------------------------------------------------------

    def within_tolerance(self, family: type[Operator], options: dict[str, Any]) -> Projection | None:
        """What ``structmat.project`` finds for the tolerance and the weight; None where nothing meets it."""
        try:
            return project(self.W, family, weight=self.weight, tol=self.request.tol, **options)
        except UnreachableError as error:
            self.least = min(self.least, error.best * self.request.norm)
            return None

    def project(self, family: type[Operator], label: str, options: dict[str, Any], stages: Sequence[Stage]) -> None:
        """Enter what ``structmat.project`` finds."""
        found = project(self.W, family, weight=self.weight, **options)
        self.least = min(self.least, found.relative_error * self.request.norm)
        self.add(found, label, family, options, self.cost(stages))

    def add(self, p: Projection, label: str, family: type[Operator], options: Any, price: Cost) -> None:
        """Enter a projection, unless it misses what was asked for."""
        if p.params > self.cap or (self.request.tol is not None and p.relative_error > self.request.tol):
            return
        shared = {f.name: getattr(p, f.name) for f in fields(Projection)}
        entry = Approximation(
            **shared, label=label, family=family, options=options, flops=price.flops, speed=price.speed
        )
        self.entries.append(entry)

    # ---- the result ---------------------------------------------------------------------------------------------

    def result(self) -> Approximations:
        """The entries, ranked; ``ValueError`` where there are none."""
        (m, n), tol, limit = self.shape, self.request.tol, self.request.limit
        if not self.entries:
            names = ", ".join(f.__name__ for f in self.families)
            if limit is not None:
                raise ValueError(
                    f"budget: no member of {names} tried for {m}x{n} has at most {limit} parameters; "
                    f"the nearest feasible count is {self.nearest}"
                )
            best = self.least / self.request.norm if self.request.norm else 0.0
            raise ValueError(
                f"tol: no member of {names} tried with fewer parameters than dense ({self.size}) has a relative error of "
                f"at most {tol:g}; the best relative error reached is {max(best, self.request.rounding):.3g}"
            )

        def key(a: Approximation) -> tuple[Any, ...]:
            error = max(a.relative_error, self.request.rounding, _EPS * max(m, n))  # all exact: the smaller is better
            order = (error, a.params) if tol is None else (a.params, error)
            return (a.slower and not self.allow_slower, *order, a.flops, a.label)

        if limit is not None:
            title = f"{m}x{n} within {limit} parameters ({limit / self.size:.2%} of dense), by error"
        else:
            title = f"{m}x{n} within a relative error of {tol:g}, by parameters"
        curves = {name: self.curve(points) for name, points in self.points.items() if points and self.weight is None}
        return Approximations(sorted(_distinct(self.entries), key=key), self.shape, curves, title)

    def curve(self, points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
        """The least relative error for every parameter count at which it falls."""
        counts, errors = np.array(sorted(points)).T
        lowest = np.minimum.accumulate(errors)
        falls = np.flatnonzero(np.diff(lowest, prepend=np.inf) < 0)
        norm = self.request.norm or 1.0
        return counts[falls].astype(np.int64), lowest[falls] / norm


def _distinct(entries: Iterable[Approximation]) -> Iterator[Approximation]:
    """Without repetitions of one architecture."""
    seen = set()
    for entry in entries:
        if entry.label not in seen:
            seen.add(entry.label)
            yield entry


def last_of(most: int, holds: Callable[[int], bool]) -> int:
    """The last of 1, 2, ... ``most`` for which a condition that is lost once holds; 0 where it never does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
