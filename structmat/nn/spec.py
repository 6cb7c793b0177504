"""Specs: the architecture of an operator as plain JSON, without its values; and empty operators of every family.

A spec is ``{"family": name, "fields": [...]}``, the fields of the operator's class in order. An array of values becomes
``{"values": shape, "slot": i}``, the ``i``-th of the values that are stored apart; an index array of an interpolative family
``{"places": shape, "slot": j}``; any other index array ``{"indices": [...]}``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from structmat import arrays
from structmat.algebra import Sum
from structmat.arrays import Array
from structmat.operator import Operator
from structmat.specs import Spec, decode, encode
from structmat.specs import family_name as family_name
from structmat.specs import family_of as family_of
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_sparse import BlockSparse
from structmat.structures.block_tensor_train import BlockTensorTrain, balanced_radices, chain_patterns
from structmat.structures.butterfly import Butterfly, butterfly_patterns
from structmat.structures.chain import Chain, ceil_div, split_counts
from structmat.structures.dense import Dense
from structmat.structures.interpolative import Interpolative
from structmat.structures.interpolative_blocks import InterpolativeBlocks
from structmat.structures.kronecker import Kronecker, kronecker_shapes
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch, two_factor_patterns

INTERPOLATIVE = (Interpolative, InterpolativeBlocks)

STRUCTURES: dict[str, type[Operator]] = {
    "btt": BlockTensorTrain,
    "monarch": Monarch,
    "low_rank": LowRank,
    "kronecker": Kronecker,
    "butterfly": Butterfly,
    "block_diagonal": BlockDiagonal,
    "chain": Chain,
    "dense": Dense,
}
PIXELFLY = "pixelfly"


# ---- operator to spec and back ------------------------------------------------------------------------------------------


def describe(operator: Operator) -> tuple[Spec, tuple[Array, ...], tuple[Array, ...]]:
    """The spec of an operator, its arrays of values and its index arrays, each in the order of their slots.

    Raises ``ValueError`` for a stack of operators and ``TypeError`` for a field that JSON cannot hold.
    """
    if operator.batch_shape:
        raise ValueError(f"expected an operator that is one matrix, got a stack of shape {operator.shape}")
    values: list[Array] = []
    places: list[Array] = []

    def keep(array: Array, owner: type[Operator]) -> dict[str, Any]:
        if arrays.is_inexact(array.dtype):
            return {"values": list(array.shape), "slot": _slot(array, values)}
        if issubclass(owner, INTERPOLATIVE):
            return {"places": list(array.shape), "slot": _slot(array, places)}
        return {"indices": arrays.convert(array, "numpy").tolist()}

    return encode(operator, keep), tuple(values), tuple(places)


def _slot(array: Array, known: list[Array]) -> int:
    for i, other in enumerate(known):
        if other is array:
            return i
    known.append(array)
    return len(known) - 1


def build(spec: Spec, values: Sequence[Array], places: Sequence[Array] = ()) -> Operator:
    """The operator of a spec with these arrays, of the shapes that the spec names.

    Raises ``ValueError`` for a family that is not known: one of somebody else's has to be imported first.
    """

    def kept(field: dict[str, Any]) -> Array:
        if "values" in field:
            return values[field["slot"]]
        return places[field["slot"]] if "places" in field else np.asarray(field["indices"], dtype=np.intp)

    def dtype(field: dict[str, Any]) -> Any:
        return values[0].dtype if values else getattr(torch, field["dtype"])

    return decode(spec, kept, dtype)


def slots_of(spec: Spec) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """Shapes of the arrays of values and of the index arrays, by slot."""
    found: tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]] = ({}, {})

    def walk(node: Any) -> None:
        if isinstance(node, list):
            for child in node:
                walk(child)
        elif isinstance(node, dict):
            for kind, shapes in zip(("values", "places"), found, strict=True):
                if kind in node:
                    shapes[node["slot"]] = tuple(node[kind])
            for key in ("fields", "tuple"):
                walk(node.get(key, []))

    walk(spec)
    return tuple(dict(sorted(shapes.items())) for shapes in found)  # pyright: ignore[reportReturnType]


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a layer stores an array: its blocks as axis 0, which FSDP shards, and which is not of size 1.

    Blocks ``(a, d, b, c)`` become ``(a*d, b, c)``, a single block ``(b, c)``, a single row ``(1, c)`` a column ``(c, 1)`` (the
    same numbers in the same order), a scalar ``(1,)``.
    """
    if len(shape) >= 3:
        blocks = math.prod(shape[:-2])
        shape = (blocks, *shape[-2:]) if blocks != 1 else shape[-2:]
    if len(shape) == 2 and shape[0] == 1:
        return (shape[1], 1)
    return shape or (1,)


# ---- empty operators ------------------------------------------------------------------------------------------------------


def empty(structure: str | type[Operator], shape: tuple[int, int], **options: Any) -> Operator:
    """An operator without values (torch's meta device) of the architecture that ``family.random`` has.

    ``pixelfly`` is a :class:`structmat.BlockSparse` on a flat block butterfly plus a LowRank, with the options ``block`` and
    ``rank``. Raises ``ValueError`` for a structure that is not known, and what the family raises for its options.
    """
    if structure == PIXELFLY:
        return _pixelfly(shape, **options)
    family = read_structure(structure)
    make = _EMPTY.get(family)
    try:
        if make is not None:
            return make(shape, **options)
        random: Any = family.random  # pyright: ignore[reportAttributeAccessIssue]
        made = random(shape, **options, rng=0)
    except TypeError as error:
        raise TypeError(f"{family.__name__}: {error}") from None
    return made._map(_blank)


def read_structure(structure: str | type[Operator]) -> type[Operator]:
    """The family that a name stands for, or the family itself; ``ValueError`` that lists the names."""
    if isinstance(structure, str) and structure in STRUCTURES:
        return STRUCTURES[structure]
    if isinstance(structure, type) and issubclass(structure, Operator):
        return structure
    names = ", ".join((*STRUCTURES, PIXELFLY))
    raise ValueError(f"structure: expected one of {names} or an Operator class, got {structure!r}")


def structure_name(operator: Operator) -> str:
    """The name of an operator's structure: the short one where it has one."""
    if type(operator) is Sum and [type(t) for t in operator.terms] == [BlockSparse, LowRank]:
        return PIXELFLY
    return next((name for name, cls in STRUCTURES.items() if cls is type(operator)), type(operator).__name__)


def _blank(x: Array) -> Array:
    return _meta(*x.shape) if arrays.is_inexact(x.dtype) else x


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _blocks(patterns: Sequence[tuple[int, int, int, int]]) -> tuple[torch.Tensor, ...]:
    return tuple(_meta(a, d, b, c) for a, b, c, d in patterns)


def _empty_btt(shape: tuple[int, int], *, cores: int = 2, blocks: Any = None, rank: int = 1) -> Operator:
    m, n = shape
    if cores < 2 or (blocks is not None and cores != 2):
        raise ValueError(f"cores: expected at least 2, and 2 where blocks are given; got {cores}")
    if cores == 2:
        patterns = two_factor_patterns(shape, split_counts(blocks, shape), rank)
    else:
        ranks = (1, *([rank] * (cores - 1)), 1)
        patterns = chain_patterns(balanced_radices(m, cores), balanced_radices(n, cores), ranks)
    return BlockTensorTrain(_blocks(patterns), shape)


def _empty_monarch(shape: tuple[int, int], *, blocks: Any = None, rank: int = 1) -> Operator:
    left, right = _blocks(two_factor_patterns(shape, split_counts(blocks, shape), rank))
    return Monarch(left[0], right[:, 0], shape)


def _empty_low_rank(shape: tuple[int, int], *, rank: int | None = None) -> Operator:
    m, n = shape
    r = max(1, min(m, n) // 4) if rank is None else rank
    if not 1 <= r <= min(m, n):
        raise ValueError(f"rank: expected between 1 and {min(m, n)} for shape {m}x{n}, got {r}")
    return LowRank(_meta(m, r), _meta(r, n))


def _empty_kronecker(shape: tuple[int, int], *, shapes: Sequence[tuple[int, int]] | None = None) -> Operator:
    shapes = kronecker_shapes(shape) if shapes is None else shapes
    product = (math.prod(s[0] for s in shapes), math.prod(s[1] for s in shapes))
    if product != shape:
        raise ValueError(f"shapes: {shapes} multiply to {product}, expected {shape}")
    return Kronecker(*(Dense(_meta(*s)) for s in shapes))


def _empty_butterfly(shape: tuple[int, int], *, radix: int | None = None) -> Operator:
    return Butterfly(_blocks(butterfly_patterns(shape, radix)), shape)


def _empty_block_diagonal(shape: tuple[int, int], *, blocks: Any = None) -> Operator:
    if isinstance(blocks, int) or blocks is None:
        (count, _) = split_counts(blocks, (min(shape), min(shape)))
        return BlockDiagonal(_meta(count, ceil_div(shape[0], count), ceil_div(shape[1], count)), shape)
    raise ValueError(f"blocks: expected the number of blocks, got {blocks}")


def _empty_chain(shape: tuple[int, int], *, patterns: Sequence[tuple[int, int, int, int]] | None = None) -> Operator:
    return Chain(_blocks(patterns or [(1, *shape, 1)]), shape)


def _empty_dense(shape: tuple[int, int]) -> Operator:
    return Dense(_meta(*shape))


def _pixelfly(shape: tuple[int, int], *, block: Any = None, places: Any = None, rank: int | None = None) -> Operator:
    """Flat block butterfly plus low rank (Chen et al., "Pixelated Butterfly", ICLR 2022); default rank: one block."""
    sparse = BlockSparse.random(shape, block=block, places=places, dtype=np.float32, rng=0)
    sparse = BlockSparse(_blank(sparse.blocks), sparse.rows, sparse.cols, shape)
    return Sum(sparse, _empty_low_rank(shape, rank=min(*shape, sparse.blocks.shape[-1]) if rank is None else rank))


_EMPTY: dict[type[Operator], Any] = {
    BlockTensorTrain: _empty_btt,
    Monarch: _empty_monarch,
    LowRank: _empty_low_rank,
    Kronecker: _empty_kronecker,
    Butterfly: _empty_butterfly,
    BlockDiagonal: _empty_block_diagonal,
    Chain: _empty_chain,
    Dense: _empty_dense,
}
