"""Search among members that a spectrum covers (low rank, Kronecker, two factors): screened by samples, then verified."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from structmat.projection.certificate import certify
from structmat.projection.members import (
    KroneckerMember,
    LowRankMember,
    Member,
    TwoFactorMember,
    kronecker_members,
    two_factor_members,
)
from structmat.projection.placement import where
from structmat.projection.progress import Advance
from structmat.projection.screening import GRAM_FLOOR, Factors, Screened, decompose, lower_bound, split
from structmat.projection.screening import screen as sampled
from structmat.projection.search import SMALL, Search, last_of
from structmat.projection.selection import Ladder
from structmat.projection.svd import tails
from structmat.projection.target import like, scaled
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.interpolative import Interpolative
from structmat.structures.monarch import Monarch

SAMPLES = (4, 32)  # blocks looked at in the first and in the second round
SECOND_ROUND = 8  # members of two factors that reach the second round
SPLITS = 24  # pairs of Kronecker factor shapes of large matrices
VERIFIED = 3  # members of two factors that are projected onto
ASPECT = 8.0  # block counts of large matrices differ from the aspect of the matrix by at most this
SLACK = 1.02  # estimates of the error are a little high


def low_rank(search: Search) -> Screened:
    """Not screened: it is verified in any case."""
    ladder = Ladder(None, sum(search.shape), np.array([search.request.norm, 0.0]))
    return Screened(LowRankMember(search.shape), ladder, False)


def kronecker(search: Search, advance: Advance) -> list[Screened]:
    """The best factor shapes within the cap, and the best of those that are no slower than dense."""
    members = kronecker_members(search.shape, search.size if search.size <= SMALL else SPLITS)
    fast, full = [], []
    advance(0, len(members))
    for i, member in enumerate(members):
        top = search.fast_top(member)
        if not search.allow_slower and top > 0:
            fast.append(screen(search, member, top, SAMPLES[1]))
        if i < len(members) // 4 + 1 or search.allow_slower or search.size <= SMALL:
            full.append(screen(search, member, search.top(member), SAMPLES[1]))
        advance(1, 0)
    best = ranked(search, fast, slower=False)[:1] + ranked(search, full)[:1]
    return list({s.member: s for s in best}.values())


def two_factor(search: Search, advance: Advance) -> list[Screened]:
    """The best numbers of blocks and orders, in two rounds."""
    members: list[TwoFactorMember] = []
    for member in two_factor_members(search.shape, search.families):
        search.note(member._replace(interpolative=True))
        if any(search.top(m) for m in forms(search, member)):
            members.append(member)
    if search.size > SMALL:
        aspect = search.shape[0] / search.shape[1]
        members = [m for m in members if 1 / ASPECT <= m.counts[0] / m.counts[1] / aspect <= ASPECT or 1 in m.counts]
    rounds = SAMPLES if search.size > SMALL else (search.size,)
    found: list[Screened] = []
    for i, samples in enumerate(rounds):
        advance(0, len(members))
        found = []
        for member in members:
            most = max(search.top(m) for m in forms(search, member))
            found.append(screen(search, member, most, samples, record=i + 1 == len(rounds)))
            advance(1, 0)
        members = [s.member for s in ranked(search, found)[:SECOND_ROUND]]  # pyright: ignore[reportAssignmentType]
    best = ranked(search, found)
    kept = best[:VERIFIED]
    for family in (Monarch, BlockTensorTrain):
        kept += [s for s in best if s.member.family is family][:1]
    kept = list({s.member: s for s in kept}.values())
    exact = [s.member for s in kept if unresolved(search, s)][1:]  # one of them is enough: each costs a whole SVD
    return [s for s in kept if s.member not in exact]


def unresolved(search: Search, screened: Screened) -> bool:
    """Whether the least error within the cap is below what screening can tell from zero."""
    most = min(search.top(screened.member), len(screened.ladder.errors) - 1)
    return float(screened.ladder.errors[most]) <= GRAM_FLOOR * search.request.norm


def screen(search: Search, member: Member, most: int, samples: int, record: bool = True) -> Screened:
    """The ladder of a member, noted for the curves and for the messages of errors."""
    found = sampled(member, search.prepared, max(1, most), samples, search.rng, exact=search.size <= SMALL)
    search.note(member)
    if record:
        search.record(member.family.__name__, found.ladder)
    return found


def forms(search: Search, member: Member) -> list[Member]:
    """The member, and its interpolative form where that buys a larger rank."""
    other: Member | None = None
    if isinstance(member, LowRankMember):
        other = member._replace(gauge=1)
    elif isinstance(member, TwoFactorMember):
        other = member._replace(interpolative=True)
        other = other if search.top(other) > search.top(member) or search.request.tol is not None else None
    return [member] if other is None else [member, other]


def ranked(search: Search, screened: Iterable[Screened], *, slower: bool = True) -> list[Screened]:
    """By error for a budget, by parameters for a tolerance; those that do not meet it are left out."""
    keyed = []
    for s in screened:
        orders = []
        for member in forms(search, s.member):
            most = search.top(member) if slower or search.allow_slower else search.fast_top(member)
            rung = search.pick(s.ladder.errors, most, 1.0 if s.exact else SLACK)
            if rung is not None:
                error = max(float(s.ladder.errors[rung]), 1e-8 * search.request.norm)  # less is not resolved
                count = s.ladder._replace(gauge=member.gauge).cost(rung)
                orders.append((error, count) if search.request.tol is None else (count, error))
        if orders:
            keyed.append((min(orders), s))
    return [s for _, s in sorted(keyed, key=lambda pair: pair[0])]


# ---- verification ---------------------------------------------------------------------------------------------------


def verify(search: Search, screened: Screened) -> None:
    """Project onto a member at the rungs that are wanted, from one decomposition."""
    member = screened.member
    members = forms(search, member)
    for m in members:
        search.note(m)
    if search.weight is not None and search.request.tol is not None:
        for m in members:
            smallest(search, m)
        return
    if search.weight is not None:
        for m in members:
            for rung in search.rungs(search.top(m), search.fast_top(m)):
                search.project(m.family, m.label(rung), m.options(rung), m.stages(rung))
        return
    blocks = member.arrange(search.prepared)
    most = search.top(member)
    fine = isinstance(member, LowRankMember) or not unresolved(search, screened)
    gram = fine and min(blocks.shape[-2:]) > 8 and (search.request.tol or 1.0) > 10 * GRAM_FLOOR
    factors = decompose(blocks, gram, search.rng)
    if gram and indistinct(search, tails(factors.s), most):
        factors = decompose(blocks, False, search.rng)
    if isinstance(member, LowRankMember):
        search.record("LowRank", Ladder(member, member.step, tails(factors.s)))
    for m in members:
        realise_all(search, m, blocks, factors)


def smallest(search: Search, member: Member) -> None:
    """Enter the member of the smallest rank that meets a tolerance in the norm of the weight."""
    architecture = {name: value for name, value in member.options(1).items() if name not in ("rank", "terms")}
    found = search.within_tolerance(member.family, architecture)
    if found is None or found.params > search.cap:
        top = search.top(member)
        if top:  # for the error that can be reached
            search.project(member.family, member.label(top), member.options(top), member.stages(top))
        return
    ladder = Ladder(None, member.step, np.empty(0), member.gauge)
    rung = last_of(min(member.sizes[1:]), lambda r: ladder.cost(r) <= found.params)
    search.add(found, member.label(rung), member.family, member.options(rung), search.cost(member.stages(rung)))


def indistinct(search: Search, errors: np.ndarray, most: int) -> bool:
    """Whether the rung that would be picked is below what Gram matrices resolve."""
    rung = search.pick(errors, most)
    return rung is not None and float(errors[rung]) <= GRAM_FLOOR * search.request.norm


def realise_all(search: Search, member: Member, blocks: np.ndarray, factors: Factors) -> None:
    """The best rung, and the best that is no slower than dense where that is another."""
    errors = tails(factors.s)
    search.least = min([search.least, *errors[1 : search.top(member) + 1].tolist()])
    rungs = search.rungs(search.pick(errors, search.top(member)), search.pick(errors, search.fast_top(member)))
    for rung in rungs:
        if isinstance(member, TwoFactorMember) and member.interpolative:
            search.project(member.family, member.label(rung), member.options(rung), member.stages(rung))
        else:
            realise(search, member, blocks, factors, rung)


def realise(search: Search, member: Member, blocks: np.ndarray, factors: Factors, rung: int) -> None:
    """Project onto a member of this rank, and certify."""
    names = {
        LowRankMember: "truncated SVD",
        TwoFactorMember: "blockwise SVD",
        KroneckerMember: "Van Loan-Pitsianis SVD",
    }
    started = time.perf_counter()
    x, y = split(blocks, factors, rung)
    bound = lower_bound(factors, rung, max(member.sizes[1:]), search.request.norm)
    result = like(scaled(member.build(x, y), search.scale), search.source)
    name = f"{names[type(member)]} (optimal){where(search.source, search.target)}"
    found = certify(member.multiplied_out(result), search.target, bound * search.scale, name, started)
    found = replace(found, operator=result, params=result.nparams)
    if isinstance(result, Interpolative):
        found = replace(found, method=f"{found.method}, interpolative form")
    search.add(found, member.label(rung), member.family, member.options(rung), search.cost(member.stages(rung)))
