"""Joint: layers that read the same input, projected as one matrix whose right factor they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from structmat.nn.choice import Choice, joint_rank
from structmat.nn.layer import StructuredLinear
from structmat.operator import Operator
from structmat.projection.interpolative import select
from structmat.structures.interpolative import Interpolative
from structmat.structures.low_rank import LowRank

Shared = dict[int, tuple[str, int]]  # slot of a factor: the layer and slot where the same parameter stands first


def grouped(entries: Sequence[Any], inputs: Iterable[Iterable[str]], model: nn.Module, joint: bool) -> list[list[Any]]:
    """The entries of a plan as they are to be projected: those that ask for it and read the same input together.

    Every layer multiplies by the shared factor itself: those that the joint rank would give more flops than dense are left out
    (:func:`least_height`).

    Parameters
    ----------
    entries
        Of a plan, all to be converted.
    inputs
        Names of the layers that read the same input, for each of the inputs.
    model
        Of the layers: weights of different dtypes or devices, or of which one is frozen, are not joined.
    joint
        Whether all low-rank entries ask for it, not only those whose config says so.
    """
    input_of = {name: i for i, names in enumerate(inputs) for name in names}
    groups: dict[Any, list[Any]] = {}
    for entry in entries:
        key: Any = entry.name
        if wants(entry, joint):
            weight = next(model.get_submodule(entry.name).parameters())
            kind = weight.dtype, weight.device, weight.requires_grad
            key = input_of.get(entry.name, entry.name), entry.choice.label, *kind
        groups.setdefault(key, []).append(entry)
    return [part for group in groups.values() for part in _affordable(group)]


def _affordable(group: list[Any]) -> list[list[Any]]:
    if len(group) == 1:
        return [group]
    least, _ = least_height(group[0].choice, [e.shape[0] for e in group], group[0].shape[1])
    return apart(group, [e.shape[0] >= least for e in group])


def apart(group: Sequence[Any], kept: Sequence[bool]) -> list[list[Any]]:
    """Those that are kept together, and each of the others alone."""
    together = [x for x, stays in zip(group, kept, strict=True) if stays]
    return [*([together] if together else []), *([x] for x, stays in zip(group, kept, strict=True) if not stays)]


def least_height(choice: Choice, heights: Sequence[int], width: int) -> tuple[float, int | None]:
    """Rows that a layer needs for being projected with others of the same input, and the rank that they get.

    The shortest layers are left out until the joint rank ``r`` of the budget gives the shortest that stays at most the flops of
    dense, ``r (m + n) <= m n``. Ranks that are given cost the same either way: all layers stay, and the rank returned is None.
    Where a tolerance decides, it is known after the projection (:func:`dearer`).
    """
    least: float = min(heights)
    while kept := [h for h in heights if h >= least]:
        rank = joint_rank(choice, (sum(kept), width))
        if rank is None or not dearer(rank, min(kept), width, bool(choice.options.get("interpolative"))):
            return least, rank
        least = min(kept) + 1
    return float("inf"), None


def dearer(rank: int, m: int, n: int, interpolative: bool) -> bool:
    """Whether a layer of that rank needs more multiply-adds than the dense one."""
    return rank * (m + n - rank * interpolative) > m * n


def asking(entries: Iterable[Any], joint: bool, who: str) -> list[Any]:
    """The entries that ask to be projected together; ``ValueError`` if ``joint`` says so and none of them can be."""
    found = [entry for entry in entries if wants(entry, joint)]
    if joint and not found:
        raise ValueError(f"{who}: joint: no layer of the plan is low-rank; only these have one right factor to share")
    return found


def wants(entry: Any, joint: bool) -> bool:
    """Whether a layer is to be projected together with the others that read its input."""
    return entry.choice.family is LowRank and (joint or bool(entry.choice.options.get("joint")))


def split(operator: Operator, heights: Sequence[int]) -> list[Operator]:
    """The parts of a low-rank matrix of that many rows each; they hold the same right factor.

    Interpolative ones select columns: all parts then gather the same inputs and share the coefficients.
    """
    ends = np.cumsum(heights)
    rows = [slice(end - height, end) for end, height in zip(ends, heights, strict=True)]
    if isinstance(operator, Interpolative):
        whole = by_columns(operator)
        return [Interpolative(whole.index, whole.coefficients, whole.basis[r], "columns") for r in rows]
    if not isinstance(operator, LowRank):
        raise TypeError(f"joint: expected a low-rank matrix, got {operator}")
    return [LowRank(operator.left[r], operator.right) for r in rows]


def by_columns(operator: Interpolative) -> Interpolative:
    """The same matrix as some of its columns and the coefficients that give the others."""
    if operator.side == "columns":
        return operator
    index, coefficients = select(np.linalg.qr(operator.basis.T)[0])
    columns = operator.left @ operator.basis[:, index[: operator.rank]]
    return Interpolative(index, coefficients.T, columns, "columns")


def tie(layers: Sequence[StructuredLinear]) -> None:
    """Give all layers of one joint projection the first one's right factor, the same parameter."""
    first = layers[0]
    slot = 0 if isinstance(first.operator, Interpolative) else 1
    shared = first.factors[slot]
    for layer in layers[1:]:
        layer.factors[slot] = shared


def shared_factors(model: nn.Module) -> dict[str, Shared]:
    """For the name of every structured layer those of its factors that are a parameter of a layer before it."""
    first: dict[int, tuple[str, int]] = {}
    found: dict[str, Shared] = {}
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            for slot, factor in enumerate(module.factors):
                home = first.setdefault(id(factor), (name, slot))
                if home != (name, slot):
                    found.setdefault(name, {})[slot] = home
    return found


def tie_as(layers: Mapping[str, StructuredLinear], shared: Mapping[str, Shared]) -> None:
    """Make factors of layers one parameter again, as :func:`shared_factors` found them."""
    for name, slots in shared.items():
        for slot, (home, other) in slots.items():
            layers[name].factors[slot] = layers[home].factors[other]
