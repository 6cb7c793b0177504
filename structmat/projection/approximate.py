"""approximate: one matrix, all families, ranked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, overload

import numpy as np

from structmat import arrays, rules
from structmat.operator import Operator
from structmat.patterns import Pattern
from structmat.projection.certificate import Projection, certify, frobenius
from structmat.projection.cost import Cost, Stage, chain_stages, cost
from structmat.projection.hierarchical import pad, sweep
from structmat.projection.members import (
    KroneckerMember,
    LowRankMember,
    Member,
    TwoFactorMember,
    kronecker_members,
    two_factor_members,
)
from structmat.projection.progress import bar
from structmat.projection.project import project
from structmat.projection.screening import GRAM_FLOOR, Factors, Screened, decompose, lower_bound, screen, split
from structmat.projection.selection import Ladder, Request, allowed_error, parameter_limit
from structmat.projection.support import _block_counts
from structmat.projection.svd import tails
from structmat.projection.target import like, read, rounding, safe_scale, scaled
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_tensor_train import BlockTensorTrain, balanced_radices, chain_patterns
from structmat.structures.butterfly import Butterfly, butterfly_patterns
from structmat.structures.chain import Chain, ceil_div
from structmat.structures.interpolative import Interpolative
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

FAMILIES: tuple[type[Operator], ...] = (
    LowRank,
    Kronecker,
    Monarch,
    BlockTensorTrain,
    BlockDiagonal,
    Butterfly,
    Chain,
)
SMALL = 2**12  # entries up to which every member gets all its singular values
SAMPLES = (4, 32)  # blocks looked at in the first and in the second round
SECOND_ROUND = 8  # members of two factors that reach the second round
SPLITS = 24  # pairs of Kronecker factor shapes of large matrices
VERIFIED = 3  # members of two factors that are projected onto
ASPECT = 8.0  # block counts of large matrices differ from the aspect of the matrix by at most this
SLACK = 1.02  # estimates of the error are a little high
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, repr=False)
class Approximation(Projection):
    """A projection with what it costs; one entry of :class:`Approximations`.

    Attributes
    ----------
    label
        The architecture in words.
    family, options
        ``structmat.project(W, family, **options)`` gives the same projection.
    flops
        Flops of applying it, as a fraction of dense.
    speed
        Predicted speed over dense; see :func:`approximate`.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> best = sm.approximate(np.kron(np.ones((4, 4)), np.arange(16.0).reshape(4, 4)), budget=0.2).best
    >>> best.family.__name__, best.options["shapes"], best.params
    ('Kronecker', [(4, 4), (4, 4)], 32)
    """

    label: str = ""
    family: type[Operator] = Operator
    options: dict[str, Any] = field(default_factory=dict)
    flops: float = math.nan
    speed: float = math.nan

    @property
    def slower(self) -> bool:
        """Whether it is worse than dense in flops or in predicted speed."""
        return Cost(self.flops, self.speed).slower


class Approximations(Sequence[Approximation]):
    """Projections of one matrix onto several families, ranked; what :func:`structmat.approximate` returns.

    A sequence of :class:`Approximation`; ``str`` is a table.

    Attributes
    ----------
    shape
        ``(m, n)`` of the matrix.
    curves
        For every family the errors that were read off spectra, ``(parameters, relative errors)``, before verification;
        empty with a weight.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> found = sm.approximate(np.eye(8), budget=0.5)
    >>> found.best is found[0], found.best.error < 1e-12
    (True, True)
    """

    def __init__(
        self,
        entries: Iterable[Approximation],
        shape: tuple[int, int],
        curves: dict[str, tuple[np.ndarray, np.ndarray]],
        title: str = "",
    ) -> None:
        self._entries = tuple(entries)
        self.shape = shape
        self.curves = curves
        self.title = title

    @overload
    def __getitem__(self, index: int) -> Approximation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Approximation, ...]: ...
    def __getitem__(self, index: int | slice) -> Approximation | tuple[Approximation, ...]:
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def best(self) -> Approximation:
        """The first entry."""
        return self._entries[0]

    def plot(self, ax: Any = None) -> Any:
        """Draw error against parameters: a line for every family, a mark for every entry; returns the ``Axes``.

        Raises ``ImportError`` if matplotlib is missing.
        """
        return rules.FALLBACKS["plot"](self, ax)

    def __str__(self) -> str:
        head = ("", "architecture", "parameters", "rel. error", "best possible", "flops", "speed", "")
        rows = [head, *(self._row(i, entry) for i, entry in enumerate(self._entries))]
        widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
        lines = []
        for row in rows:
            cells = [cell.ljust(w) if c in (1, 7) else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths))]  # noqa: B905
            lines.append("  ".join(cells).rstrip())
        return "\n".join([self.title, *lines] if self.title else lines)

    def _row(self, i: int, a: Approximation) -> tuple[str, ...]:
        bound = a.relative_error * a.lower_bound / a.error if a.error else 0.0
        share = a.params / math.prod(self.shape)
        note = "slower than dense" if a.slower else ""
        return (
            str(i + 1),
            a.label,
            f"{share:.2%}",
            f"{a.relative_error:.3g}",
            f">= {bound:.3g}",
            f"{a.flops:.3g}x",
            f"{a.speed:.3g}x",
            note,
        )

    def __repr__(self) -> str:
        return f"<Approximations of {self.shape[0]}x{self.shape[1]}: {len(self)}, best {self.best}>"


def approximate(
    W: Any,
    *,
    budget: float | None = None,
    tol: float | None = None,
    families: Iterable[type[Operator]] | None = None,
    weight: Any = None,
    batch: int = 1,
    allow_slower: bool = False,
    progress: bool | None = None,
    rng: Any = 0,
) -> Approximations:
    """Find the family that fits a matrix: project it onto many architectures of each, and rank the best of them.

    The spectrum of every arrangement of the matrix gives the errors for all ranks at once; it is estimated for many
    arrangements, from samples, and computed exactly for the few that look best. What is returned is certified, as by
    :func:`structmat.project`.

    Parameters
    ----------
    W
        ``(m, n)``, as for ``project``; never written to.
    budget
        Parameters allowed, a fraction of ``m n`` (float) or a count (int). Entries are ranked by error.
    tol
        Relative Frobenius error allowed. Entries are ranked by parameters. Exactly one of ``budget`` and ``tol``.
    families
        Operator classes, default all: LowRank (plain and interpolative), Kronecker (sums of products of two factors), Monarch
        and BlockTensorTrain (numbers of blocks; classes of rows and columns as runs or strided, four orders), BlockDiagonal
        (numbers of blocks), Butterfly (radices), Chain (three factors).
    weight
        Second moment of the inputs, as for ``project``; with a budget only. Architectures are screened without it, and then
        projected onto and ranked in the norm of the outputs.
    batch
        Columns to which the result is applied at once, for the predicted speed.
    allow_slower
        By default what is worse than dense in flops or predicted speed is marked and ranks after all others: a Kronecker sum
        with half the parameters can cost nine times the flops. True ranks it with the others.
    progress
        True shows a bar on runs of more than a second (needs tqdm). An interrupted run leaves nothing behind.
    rng
        Seed or ``numpy.random.Generator`` of the samples; results are the same for the same seed.

    Returns
    -------
    Approximations
        Ranked; at least one entry.

    Raises
    ------
    TypeError, ValueError, numpy.linalg.LinAlgError
        As ``project``; if not exactly one of ``budget`` and ``tol`` is given, a family is none of those above, ``batch`` is
        below 1, or nothing tried meets the budget (the message names the nearest count) or the tolerance with fewer
        parameters than dense (it names the best error).
    ImportError
        If ``progress`` is True and tqdm is missing.

    Notes
    -----
    ``flops`` is a ratio to dense; ``speed`` is predicted: every product takes the longer of its flops and its memory traffic
    at 8 flops a byte (the roofline model), with no overhead for calls and small blocks. It tells families apart, it
    promises nothing.

    Screening looks, above 64 x 64, at no more than 24 pairs of Kronecker shapes and at block counts near powers of two whose
    blocks are at most eight times as flat as the matrix; 4, then 32 blocks stand for all. The best is within about 1 % of an
    exhaustive search. Cost for ``n x n``: 3 to 6 dense SVDs. Memory: about 8 times ``W`` in double precision, results included,
    and 14 times with Chain below 2048 x 2048.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> x = np.arange(16.0)
    >>> kernel = np.exp(-((x[:, None] - x) ** 2) / 50)
    >>> found = sm.approximate(np.kron(kernel, kernel), budget=0.02)
    >>> found.best.label, found.best.relative_error < 1e-12
    ('Kronecker, 16x16 (x) 16x16', True)
    >>> print(str(found).splitlines()[0])
    256x256 within 1310 parameters (2.00% of dense), by error
    """
    search = _Search(W, budget, tol, families, weight, batch, allow_slower, rng)
    with bar(progress, "approximate") as advance:
        search.run(advance)
    return search.result()


Advance = Callable[[int, int], Any]


class _Search:
    """One call of :func:`approximate`: what is asked for, and what has been found so far."""

    def __init__(
        self,
        W: Any,
        budget: Any,
        tol: Any,
        families: Any,
        weight: Any,
        batch: Any,
        allow_slower: bool,
        rng: Any,
    ) -> None:
        if (budget is None) == (tol is None):
            raise ValueError(f"approximate: expected exactly one of budget and tol, got budget={budget}, tol={tol}")
        if weight is not None and budget is None:
            raise ValueError("weight: expected with a budget; a tolerance is read off spectra that know no weight")
        if isinstance(batch, bool) or not hasattr(batch, "__index__"):
            raise TypeError(f"batch: expected an int, got {type(batch).__name__}")
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        self.families = _checked(families)
        self.W, self.weight, self.batch, self.allow_slower = W, weight, int(batch), bool(allow_slower)
        self.rng = np.random.default_rng(rng)
        self.source, self.target = read(W)
        self.shape = (self.target.shape[0], self.target.shape[1])
        self.size = math.prod(self.shape)
        self.itemsize = arrays.itemsize(self.source.dtype)
        self.scale = safe_scale(self.target)
        self.prepared = self.target if self.scale == 1.0 else self.target / self.scale
        limit = None if budget is None else min(self.size, parameter_limit(budget, self.shape))
        self.request = Request(
            family=Operator,
            norm=frobenius(self.prepared),
            limit=limit,
            tol=None if tol is None else _tolerance(tol),
            rounding=rounding(self.source),
        )
        self.cap = self.size - 1 if limit is None else limit  # parameters that an entry may have
        self.entries: list[Approximation] = []
        self.points: dict[str, list[tuple[int, float]]] = {}  # for the curves
        self.nearest = self.size  # parameters of the smallest member
        self.least = self.request.norm  # error of the best member within the cap

    # ---- the search ---------------------------------------------------------------------------------------------

    def run(self, advance: Advance) -> None:
        """Screen and verify every family."""
        if LowRank in self.families:
            advance(0, 1)
            self.verify(self.low_rank())
            advance(1, 0)
        if Kronecker in self.families:
            self.verify_all(self.kronecker(advance), advance)
        if Monarch in self.families or BlockTensorTrain in self.families:
            self.verify_all(self.two_factor(advance), advance)
        if BlockDiagonal in self.families:
            self.block_diagonal()
        if Butterfly in self.families:
            self.chains(Butterfly, self.butterflies(), advance)
        if Chain in self.families:
            self.chains(Chain, self.three_factors(), advance)

    def verify_all(self, finalists: Sequence[Screened], advance: Advance) -> None:
        """Verify one after another."""
        advance(0, len(finalists))
        for s in finalists:
            self.verify(s)
            advance(1, 0)

    def low_rank(self) -> Screened:
        """Not screened: it is verified in any case."""
        ladder = Ladder(None, sum(self.shape), np.array([self.request.norm, 0.0]))
        return Screened(LowRankMember(self.shape), ladder, False)

    def kronecker(self, advance: Advance) -> list[Screened]:
        """The best factor shapes within the cap, and the best of those that are no slower than dense."""
        members = kronecker_members(self.shape, self.size if self.size <= SMALL else SPLITS)
        fast, full = [], []
        advance(0, len(members))
        for i, member in enumerate(members):
            top = self.fast_top(member)
            if not self.allow_slower and top > 0:
                fast.append(self.screen(member, top, SAMPLES[1]))
            if i < len(members) // 4 + 1 or self.allow_slower or self.size <= SMALL:
                full.append(self.screen(member, self.top(member), SAMPLES[1]))
            advance(1, 0)
        best = self.ranked(fast, slower=False)[:1] + self.ranked(full)[:1]
        return list({s.member: s for s in best}.values())

    def two_factor(self, advance: Advance) -> list[Screened]:
        """The best numbers of blocks and orders, in two rounds."""
        members: list[TwoFactorMember] = []
        for member in two_factor_members(self.shape, self.families):
            self.note(member._replace(interpolative=True))
            if any(self.top(m) for m in self.forms(member)):
                members.append(member)
        if self.size > SMALL:
            aspect = self.shape[0] / self.shape[1]
            members = [
                m for m in members if 1 / ASPECT <= m.counts[0] / m.counts[1] / aspect <= ASPECT or 1 in m.counts
            ]
        rounds = SAMPLES if self.size > SMALL else (self.size,)
        found: list[Screened] = []
        for i, samples in enumerate(rounds):
            advance(0, len(members))
            found = []
            for member in members:
                most = max(self.top(m) for m in self.forms(member))
                found.append(self.screen(member, most, samples, record=i + 1 == len(rounds)))
                advance(1, 0)
            members = [s.member for s in self.ranked(found)[:SECOND_ROUND]]  # pyright: ignore[reportAssignmentType]
        best = self.ranked(found)
        kept = best[:VERIFIED]
        for family in (Monarch, BlockTensorTrain):
            kept += [s for s in best if s.member.family is family][:1]
        kept = list({s.member: s for s in kept}.values())
        exact = [s.member for s in kept if self.unresolved(s)][1:]  # one of them is enough: each costs a whole SVD
        return [s for s in kept if s.member not in exact]

    def unresolved(self, screened: Screened) -> bool:
        """Whether the least error within the cap is below what screening can tell from zero."""
        most = min(self.top(screened.member), len(screened.ladder.errors) - 1)
        return float(screened.ladder.errors[most]) <= GRAM_FLOOR * self.request.norm

    def screen(self, member: Member, most: int, samples: int, record: bool = True) -> Screened:
        """The ladder of a member, noted for the curves and for the messages of errors."""
        found = screen(member, self.prepared, max(1, most), samples, self.rng, exact=self.size <= SMALL)
        self.note(member)
        if record:
            self.record(member.family.__name__, found.ladder)
        return found

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

    def forms(self, member: Member) -> list[Member]:
        """The member, and its interpolative form where that buys a larger rank."""
        other: Member | None = None
        if isinstance(member, LowRankMember):
            other = member._replace(gauge=1)
        elif isinstance(member, TwoFactorMember):
            other = member._replace(interpolative=True)
            other = other if self.top(other) > self.top(member) or self.request.tol is not None else None
        return [member] if other is None else [member, other]

    # ---- which rung ---------------------------------------------------------------------------------------------

    def top(self, member: Member) -> int:
        """The largest rung within the cap."""
        _, b, c = member.sizes
        ladder = Ladder(None, member.step, np.empty(0), member.gauge)
        return _last(min(b, c), lambda r: ladder.cost(r) <= self.cap)

    def fast_top(self, member: Member) -> int:
        """The largest rung within the cap that is no slower than dense."""
        return _last(self.top(member), lambda r: not self.cost(member.stages(r)).slower)

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
        return found if errors[found] <= goal * slack else None

    def ranked(self, screened: Iterable[Screened], *, slower: bool = True) -> list[Screened]:
        """By error for a budget, by parameters for a tolerance; those that do not meet it are left out."""
        keyed = []
        for s in screened:
            orders = []
            for member in self.forms(s.member):
                most = self.top(member) if slower or self.allow_slower else self.fast_top(member)
                rung = self.pick(s.ladder.errors, most, 1.0 if s.exact else SLACK)
                if rung is not None:
                    error = max(float(s.ladder.errors[rung]), 1e-8 * self.request.norm)  # less is not resolved
                    count = s.ladder._replace(gauge=member.gauge).cost(rung)
                    orders.append((error, count) if self.request.tol is None else (count, error))
            if orders:
                keyed.append((min(orders), s))
        return [s for _, s in sorted(keyed, key=lambda pair: pair[0])]

    # ---- verification -------------------------------------------------------------------------------------------

    def verify(self, screened: Screened) -> None:
        """Project onto a member at the rungs that are wanted, from one decomposition."""
        member = screened.member
        members = self.forms(member)
        for m in members:
            self.note(m)
        if self.weight is not None:
            for m in members:
                for rung in self.rungs(self.top(m), self.fast_top(m)):
                    self.project(m.family, m.label(rung), m.options(rung), m.stages(rung))
            return
        blocks = member.arrange(self.prepared)
        most = self.top(member)
        fine = isinstance(member, LowRankMember) or not self.unresolved(screened)
        gram = fine and min(blocks.shape[-2:]) > 8 and (self.request.tol or 1.0) > 10 * GRAM_FLOOR
        factors = decompose(blocks, gram, self.rng)
        if gram and self.indistinct(tails(factors.s), most):
            factors = decompose(blocks, False, self.rng)
        if isinstance(member, LowRankMember):
            self.record("LowRank", Ladder(member, member.step, tails(factors.s)))
        for m in members:
            self.realise_all(m, blocks, factors)

    def indistinct(self, errors: np.ndarray, most: int) -> bool:
        """Whether the rung that would be picked is below what Gram matrices resolve."""
        rung = self.pick(errors, most)
        return rung is not None and float(errors[rung]) <= GRAM_FLOOR * self.request.norm

    def realise_all(self, member: Member, blocks: np.ndarray, factors: Factors) -> None:
        """The best rung, and the best that is no slower than dense where that is another."""
        errors = tails(factors.s)
        self.least = min([self.least, *errors[1 : self.top(member) + 1].tolist()])
        rungs = self.rungs(self.pick(errors, self.top(member)), self.pick(errors, self.fast_top(member)))
        for rung in rungs:
            if isinstance(member, TwoFactorMember) and member.interpolative:
                self.project(member.family, member.label(rung), member.options(rung), member.stages(rung))
            else:
                self.realise(member, blocks, factors, rung)

    def rungs(self, best: int | None, fast: int | None) -> list[int]:
        """Those of the two that there are and that are wanted, once each."""
        return [rung for rung in dict.fromkeys((best,) if self.allow_slower else (best, fast)) if rung]

    def realise(self, member: Member, blocks: np.ndarray, factors: Factors, rung: int) -> None:
        """Project onto a member of this rank, and certify."""
        names = {
            LowRankMember: "truncated SVD",
            TwoFactorMember: "blockwise SVD",
            KroneckerMember: "Van Loan-Pitsianis SVD",
        }
        started = time.perf_counter()
        x, y = split(blocks, factors, rung)
        bound = lower_bound(factors, rung, max(member.sizes[1:]), self.request.norm)
        result = like(scaled(member.build(x, y), self.scale), self.source)
        found = certify(
            member.multiplied_out(result), self.target, bound * self.scale, f"{names[type(member)]} (optimal)", started
        )
        found = replace(found, operator=result, params=result.nparams)
        if isinstance(result, Interpolative):
            found = replace(found, method=f"{found.method}, interpolative form")
        self.add(found, member.label(rung), member.family, member.options(rung), self.cost(member.stages(rung)))

    def add(self, p: Projection, label: str, family: type[Operator], options: Any, price: Cost) -> None:
        """Enter a projection, unless it misses what was asked for."""
        if p.params > self.cap or (self.request.tol is not None and p.relative_error > self.request.tol):
            return
        shared = {f.name: getattr(p, f.name) for f in fields(Projection)}
        entry = Approximation(
            **shared, label=label, family=family, options=options, flops=price.flops, speed=price.speed
        )
        self.entries.append(entry)

    def project(self, family: type[Operator], label: str, options: dict[str, Any], stages: Sequence[Stage]) -> None:
        """Enter what ``structmat.project`` finds."""
        found = project(self.W, family, weight=self.weight, **options)
        self.add(found, label, family, options, self.cost(stages))

    # ---- families without a spectrum ----------------------------------------------------------------------------

    def block_diagonal(self) -> None:
        """All numbers of blocks, from sums of squares."""
        ladders = _block_counts(self.prepared)
        self.nearest = min([self.nearest, *(a.step for a in ladders)])
        fitting = [a for a in ladders if a.step <= self.cap]
        for a in fitting:
            self.record("BlockDiagonal", a)
        if self.request.tol is None:
            order = sorted(fitting, key=lambda a: (float(a.errors[1]), a.step))
        else:
            goal = allowed_error(self.request)
            order = sorted((a for a in fitting if a.errors[1] <= goal), key=lambda a: a.step)
        for a in order[:1]:
            m, n = self.shape
            stages = chain_stages([Pattern(a.member, ceil_div(m, a.member), ceil_div(n, a.member), 1)])
            self.project(BlockDiagonal, f"BlockDiagonal, {a.member} blocks", {"blocks": a.member}, stages)

    def butterflies(self) -> list[tuple[Pattern, ...]]:
        """Butterflies of the default radices and of 2, 4, 8, ... that leave two factors."""
        radices = (None, *(2**i for i in range(1, max(self.shape).bit_length() + 1)))
        found = {tuple(butterfly_patterns(self.shape, radix)) for radix in radices}
        return [c for c in found if len(c) >= 2]

    def three_factors(self) -> list[tuple[Pattern, ...]]:
        """Chains of three factors, of ranks 1, 2, 4, ... and the largest within the cap."""
        (m, n), found = self.shape, []
        q, p = balanced_radices(m, 3), balanced_radices(n, 3)
        top = min(max(q[0], 1), max(p[-1], 1))

        def of_rank(rank: int) -> tuple[Pattern, ...]:
            return tuple(Pattern(*t) for t in chain_patterns(q, p, (1, rank, rank, 1)))

        if min(q[0], p[0]) < 2:
            return []
        last = _last(top, lambda r: sum(t.nparams for t in of_rank(r)) <= self.cap)
        ranks = [last] if self.request.tol is None else [*(2**i for i in range(last.bit_length())), last]
        found += [of_rank(r) for r in dict.fromkeys(ranks) if r > 0]
        if last == 0:
            self.nearest = min(self.nearest, sum(t.nparams for t in of_rank(1)))
        return found

    def chains(self, family: type[Chain], candidates: Sequence[tuple[Pattern, ...]], advance: Advance) -> None:
        """Sweep over the candidates within the cap; the best of them, and of those no slower than dense, are projected."""
        order = sorted(candidates, key=lambda c: (sum(p.nparams for p in c), c))
        self.nearest = min([self.nearest, *(sum(p.nparams for p in c) for c in order)])
        fitting = [c for c in order if sum(p.nparams for p in c) <= self.cap]
        advance(0, len(fitting))
        swept: list[tuple[float, tuple[Pattern, ...]]] = []
        for c in fitting:
            error = sweep(pad(self.prepared, c), c, bounds=False).error
            swept.append((error, c))
            count = sum(p.nparams for p in c)
            self.record(family.__name__, Ladder(None, count, np.array([self.request.norm, error])))
            advance(1, 0)
            if self.request.tol is not None and error <= allowed_error(self.request):
                break  # by size: the first one that is near enough is the smallest
        fast = [s for s in swept if not self.cost(chain_stages(s[1])).slower]
        best = [min(group, key=lambda s: s[0]) for group in (swept, fast) if group]
        for _, c in dict.fromkeys(best[:1] if self.allow_slower else best):
            label = f"{family.__name__}, {len(c)} factors, patterns {_patterns(c)}"
            self.project(family, label, {"patterns": [tuple(p) for p in c]}, chain_stages(c))

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


def _checked(families: Any) -> tuple[type[Operator], ...]:
    if families is None:
        return FAMILIES
    given = (families,) if isinstance(families, type) else tuple(families)
    for f in given:
        if f not in FAMILIES:
            names, shown = ", ".join(x.__name__ for x in FAMILIES), getattr(f, "__name__", type(f).__name__)
            raise TypeError(f"families: expected operator classes of {names}; got {shown}")
    if not given:
        raise ValueError("families: expected at least one operator class, got none")
    return tuple(f for f in FAMILIES if f in given)


def _tolerance(tol: Any) -> float:
    if isinstance(tol, (bool, np.bool_)) or not isinstance(tol, (int, float, np.integer, np.floating)):
        raise TypeError(f"tol: expected a number, got {type(tol).__name__}")
    if not 0.0 < tol <= 1.0:
        raise ValueError(f"tol: expected a relative error in (0, 1], got {tol}")
    return float(tol)


def _last(most: int, holds: Callable[[int], bool]) -> int:
    """The last of 1, 2, ... ``most`` for which a condition that is lost once holds; 0 where it never does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _patterns(patterns: Sequence[Pattern]) -> str:
    shown = [f"({p.a},{p.b},{p.c},{p.d})" for p in patterns]
    return " ".join(shown if len(shown) <= 3 else [shown[0], "...", shown[-1]])
