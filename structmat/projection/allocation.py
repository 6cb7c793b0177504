"""allocate: one budget of parameters over many matrices."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from structmat.operator import Operator
from structmat.projection.certificate import frobenius
from structmat.projection.drivers import singular_values
from structmat.projection.members import LowRankMember, Member, two_factor_members
from structmat.projection.progress import bar
from structmat.projection.selection import Ladder, parameter_limit
from structmat.projection.svd import tails
from structmat.projection.target import read, safe_scale
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.dense import Dense
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

FAMILIES: tuple[type[Operator], ...] = (LowRank, Monarch, BlockTensorTrain)
MAX_BLOCKS = 16  # numbers of blocks that are tried in each direction: few large blocks fit trained weights best


class Share(NamedTuple):
    """What one matrix gets: ``structmat.project(W, family, **options)``."""

    family: type[Operator]
    options: dict[str, Any]
    params: int
    error: float  # Frobenius norm, predicted from the spectrum
    relative_error: float

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.family.__name__}({options}): {self.params} parameters, relative error {self.relative_error:.4g}"


class Allocation(Mapping[Any, Share]):
    """One budget spread over many matrices, by name; what :func:`structmat.allocate` returns. ``str`` is a table.

    Attributes
    ----------
    params
        Parameters of all matrices together.
    error
        Root of the sum that was minimised, ``sqrt(sum importance error**2)``.
    lower_bound
        No choice among the architectures that were tried is better than this within the budget.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> weights = {"a": np.diag(np.arange(9.0)), "b": np.ones((9, 9))}
    >>> plan = sm.allocate(weights, budget=80)
    >>> [share.options["rank"] for share in plan.values()], plan.params
    ([3, 1], 72)
    """

    def __init__(self, shares: dict[Any, Share], error: float, lower_bound: float) -> None:
        self._shares = dict(shares)
        self.error = error
        self.lower_bound = min(lower_bound, error)

    @property
    def params(self) -> int:
        """Parameters of all matrices together."""
        return sum(share.params for share in self.values())

    def __getitem__(self, name: Any) -> Share:
        return self._shares[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)

    def __str__(self) -> str:
        width = max((len(str(name)) for name in self), default=0)
        lines = [f"{str(name).ljust(width)}  {share}" for name, share in self.items()]
        total = f"{self.params} parameters, error {self.error:.4g} (best possible at least {self.lower_bound:.4g})"
        return "\n".join([*lines, total])

    def __repr__(self) -> str:
        return f"<Allocation: {len(self)} matrices, {self.params} parameters, error {self.error:.4g}>"


class Rung(NamedTuple):
    """One architecture of one matrix: what it costs and the square of its weighted error."""

    cost: int
    loss: float
    member: Member | None  # None: the matrix itself
    rank: int


def allocate(
    weights: Mapping[Any, Any],
    *,
    budget: float,
    families: Iterable[type[Operator]] = (LowRank,),
    relative: bool = True,
    importance: Mapping[Any, float] | None = None,
    least: float = 0.0,
    progress: bool | None = None,
) -> Allocation:
    """Spread one budget of parameters over many matrices so that the sum of their squared errors is least.

    The spectra are computed on the host, wherever the matrices are.

    Warning: this minimises the errors of the *matrices*. Measured on the 36 layers of a transformer, spreading a budget
    freely over the layers in this way made the model clearly worse than the same rank everywhere (cosine of embeddings 0.65
    to 0.69 against 0.74 to 0.81 at 50 %): a few layers are starved. For networks set ``least`` near the budget, or give
    ``importance`` from a measurement of the model's own error, and compare with the even spread.

    Parameters
    ----------
    weights
        Matrices by name, each as for :func:`structmat.project`; never written to.
    budget
        Parameters allowed for all together: a fraction of their dense count (float) or a count (int).
    families
        Of LowRank, Monarch and BlockTensorTrain. A matrix that is better off dense stays dense in any case.
    relative
        True: errors are divided by the norm of their matrix, so that all matrices count alike. False: absolute errors.
    importance
        Positive factors of the squared errors by name; default 1.
    least
        Fraction of its dense parameters that every matrix gets at least, or the nearest architecture above it.
    progress
        True shows a bar on runs of more than a second (needs tqdm).

    Returns
    -------
    Allocation
        For every name the family, the options for ``project``, the parameters and the predicted error; the total error and
        a lower bound of it.

    Raises
    ------
    TypeError, ValueError
        For matrices and budgets as ``project``; for a family that is none of the three, names in ``importance`` that are not
        in ``weights``, an importance that is not positive, ``least`` outside 0 to 1, or a budget below the sum of the
        smallest architectures (the message names that sum).
    ImportError
        If ``progress`` is True and tqdm is missing.

    Notes
    -----
    A multiple-choice knapsack. Every matrix has a ladder of architectures (cost, loss), of which the lower convex hull is
    kept; steps along the hulls are taken in the order of loss saved per parameter. That is the optimum of the continuous
    relaxation for the cost reached (Sinha and Zoltners, Oper. Res. 27, 1979; Dantzig 1957): any choice that saves more costs
    more. What is left of the budget when the next step does not fit goes to the best single changes that do. So the result
    is optimal up to one step, and ``lower_bound``, the relaxed optimum of the whole budget, says how much that is.

    For LowRank the ladders are convex themselves (singular values fall), so that nothing is lost on the hull. Cost: the
    singular values of every matrix, for Monarch and BlockTensorTrain once for each arrangement.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> rng = np.random.default_rng(0)
    >>> weights = {"even": rng.standard_normal((40, 40)), "smooth": np.vander(np.linspace(0, 1, 40), 40)}
    >>> plan = sm.allocate(weights, budget=0.3)
    >>> plan["even"].options, plan["smooth"].options, plan.params <= 0.3 * 3200
    ({'rank': 9}, {'rank': 3}, True)
    """
    names = list(weights)
    if not names:
        raise ValueError("weights: expected at least one matrix, got none")
    chosen = _checked_families(families)
    factors = _checked_importance(importance, names)
    if isinstance(least, bool) or not isinstance(least, (int, float)):
        raise TypeError(f"least: expected a number, got {type(least).__name__}")
    if not 0.0 <= least <= 1.0:
        raise ValueError(f"least: expected a fraction from 0 to 1, got {least}")
    hulls: list[list[Rung]] = []
    ladders: list[list[Rung]] = []
    sizes: list[int] = []
    norms: list[float] = []
    with bar(progress, "allocate") as advance:
        advance(0, len(names))
        for name in names:
            rungs, size, norm = _rungs(weights[name], chosen, bool(relative), factors[name])
            floor = math.ceil(least * size)
            rungs = [r for r in rungs if r.cost >= floor]
            ladders.append(rungs)
            hulls.append(lower_hull(rungs))
            sizes.append(size)
            norms.append(norm)
            advance(1, 0)
    limit = parameter_limit(budget, (1, sum(sizes)))
    places, bound = greedy(hulls, limit)
    final = fill_up([hull[i] for hull, i in zip(hulls, places, strict=True)], ladders, limit)
    shares = {}
    for name, rung, norm in zip(names, final, norms, strict=True):
        weight = factors[name] if relative else factors[name] * norm**2
        shares[name] = _share(rung, math.sqrt(rung.loss / weight) if weight else 0.0, norm)
    return Allocation(shares, math.sqrt(sum(rung.loss for rung in final)), bound)


def _rungs(
    W: Any, families: Sequence[type[Operator]], relative: bool, importance: float
) -> tuple[list[Rung], int, float]:
    """All architectures of a matrix that are smaller than dense, and dense; the number of entries; the norm."""
    target = read(W)[1]
    scale = safe_scale(target)
    prepared = target if scale == 1.0 else target / scale
    shape = (target.shape[0], target.shape[1])
    norm, unit = frobenius(target), frobenius(prepared) or 1.0
    weight = importance if relative else importance * norm**2
    members: list[Member] = [LowRankMember(shape)] if LowRank in families else []
    members += [m for m in two_factor_members(shape, families) if m.columns and max(m.counts) <= MAX_BLOCKS]
    rungs = [Rung(target.size, 0.0, None, 0)]
    for member in members:
        ladder = Ladder(member, member.step, tails(singular_values(member.arrange(prepared))) / unit)
        for r in range(1, len(ladder.errors)):
            if ladder.cost(r) >= target.size:
                break
            rungs.append(Rung(ladder.cost(r), weight * float(ladder.errors[r]) ** 2, member, r))
    return sorted(rungs, key=lambda rung: rung[:2]), target.size, norm


def lower_hull(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs on the lower convex hull of cost and loss, by rising cost and falling loss; ``rungs`` by rising cost."""
    hull: list[Rung] = []
    for rung in rungs:
        if hull and rung.loss >= hull[-1].loss:
            continue
        while hull and rung.cost == hull[-1].cost:
            hull.pop()
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-1], rung):
            hull.pop()
        hull.append(rung)
    return hull


def _rate(a: Rung, b: Rung) -> float:
    """Loss saved per parameter from ``a`` to ``b``."""
    return (a.loss - b.loss) / (b.cost - a.cost)


def greedy(hulls: Sequence[Sequence[Rung]], limit: int) -> tuple[list[int], float]:
    """How far to go on every hull, and a lower bound of the root of the sum of losses.

    The bound is the relaxed optimum: all steps that fit, and the fraction of the next one that does.
    """
    spent = sum(hull[0].cost for hull in hulls)
    if spent > limit:
        raise ValueError(
            f"budget: {limit} parameters are fewer than the smallest architectures of all matrices take: {spent}"
        )
    places = [0] * len(hulls)
    steps = [(-_rate(hull[0], hull[1]), i) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        rate, i = heapq.heappop(steps)
        hull, at = hulls[i], places[i]
        cost = hull[at + 1].cost - hull[at].cost
        if spent + cost > limit:
            total = math.fsum(hull[p].loss for hull, p in zip(hulls, places, strict=True))
            return places, math.sqrt(max(0.0, total + rate * (limit - spent)))
        spent += cost
        places[i] += 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_rate(hull[at + 1], hull[at + 2]), i))
    return places, math.sqrt(math.fsum(hull[p].loss for hull, p in zip(hulls, places, strict=True)))


def fill_up(taken: Sequence[Rung], ladders: Sequence[Sequence[Rung]], limit: int) -> list[Rung]:
    """Spend what is left: as long as one fits, the single change that saves most."""
    final = list(taken)
    while True:
        left = limit - sum(rung.cost for rung in final)
        changes = [
            (now.loss - rung.loss, i, rung)
            for i, (now, ladder) in enumerate(zip(final, ladders, strict=True))
            for rung in ladder
            if rung.cost - now.cost <= left and rung.loss < now.loss
        ]
        if not changes:
            return final
        _, i, rung = max(changes, key=lambda change: (change[0], -change[1], -change[2].cost))
        final[i] = rung


def _share(rung: Rung, relative_error: float, norm: float) -> Share:
    if rung.member is None:
        return Share(Dense, {}, rung.cost, 0.0, 0.0)
    return Share(rung.member.family, rung.member.options(rung.rank), rung.cost, relative_error * norm, relative_error)


def _checked_families(families: Any) -> tuple[type[Operator], ...]:
    given = (families,) if isinstance(families, type) else tuple(families)
    for f in given:
        if f not in FAMILIES:
            names, shown = ", ".join(x.__name__ for x in FAMILIES), getattr(f, "__name__", type(f).__name__)
            raise TypeError(f"families: expected operator classes of {names}; got {shown}")
    if not given:
        raise ValueError("families: expected at least one operator class, got none")
    return given


def _checked_importance(importance: Mapping[Any, float] | None, names: Sequence[Any]) -> dict[Any, float]:
    factors = dict.fromkeys(names, 1.0)
    for name, value in (importance or {}).items():
        if name not in factors:
            raise ValueError(f"importance: no matrix is named {name!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(f"importance: expected numbers, got {type(value).__name__} for {name!r}")
        if not 0.0 < value < math.inf:
            raise ValueError(f"importance: expected positive numbers, got {value} for {name!r}")
        factors[name] = float(value)
    return factors
