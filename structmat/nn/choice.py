"""Choice: what a layer is to become, checked, and an operator of that architecture to count and to time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from structmat.nn.spec import PIXELFLY, STRUCTURES, empty, read_structure
from structmat.operator import Operator
from structmat.projection.low_rank import most_rank
from structmat.projection.project import FAMILIES, project
from structmat.projection.selection import Request, infeasible, parameter_limit
from structmat.structures.block_sparse import BlockSparse
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.interpolative import Interpolative
from structmat.structures.interpolative_blocks import InterpolativeBlocks
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

_TWO_FACTOR = (Monarch, BlockTensorTrain)


@dataclass(frozen=True)
class Choice:
    """A structure and the options with which :func:`structmat.project` makes it.

    Attributes
    ----------
    structure
        ``"low_rank"``, ``"btt"``, ... or an Operator class.
    options
        Keywords of :func:`structmat.project`, and for low-rank layers ``joint``.
    """

    structure: str | type[Operator]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Any:
        """The first argument of :func:`structmat.project`."""
        if self.structure != PIXELFLY:
            return read_structure(self.structure)
        block = {k: self.options[k] for k in ("block",) if k in self.options}
        rank = {k: self.options[k] for k in ("rank",) if k in self.options}
        return [(BlockSparse, block), (LowRank, rank)]

    @property
    def project_options(self) -> dict[str, Any]:
        """The keywords of :func:`structmat.project`."""
        inside = ("block", "rank") if self.structure == PIXELFLY else ("joint",)
        return {k: v for k, v in self.options.items() if k not in inside}

    @property
    def label(self) -> str:
        """Structure and options in a line."""
        name = self.structure if isinstance(self.structure, str) else self.structure.__name__
        options = ", ".join(k if v is True else f"{k}={v}" for k, v in self.options.items())
        return f"{name}({options})" if options else name


def read_choice(config: Any, budget: float | None) -> Choice:
    """The choice that a config stands for; ``budget`` is for those that say nothing of their size.

    Raises ``TypeError`` and ``ValueError`` that name what was found.
    """
    if isinstance(config, Choice):
        config = {"structure": config.structure, **config.options}
    elif isinstance(config, str) or (isinstance(config, type) and issubclass(config, Operator)):
        config = {"structure": config}
    if not isinstance(config, Mapping):
        raise TypeError(f"plan: expected a structure, a dict with one or None as config, got {type(config).__name__}")
    if "structure" not in config:
        raise ValueError(
            f"plan: a config needs a structure, one of {', '.join((*STRUCTURES, PIXELFLY))}; got {dict(config)}"
        )
    options = {k: v for k, v in config.items() if k != "structure"}
    structure = config["structure"]
    if structure == PIXELFLY:
        takes, sizes = ("block", "rank", "budget"), ("rank",)
    else:
        family = read_structure(structure)
        if family not in FAMILIES:
            raise TypeError(f"plan: nothing is known of projecting onto {family.__name__}")
        takes, sizes = (*FAMILIES[family].options, "budget", "tol", "transposed"), FAMILIES[family].sizes
        takes = (*takes, "joint") if family is LowRank else takes
    for option in options:
        if option not in takes:
            raise TypeError(f"plan: {option}: {structure!r} has no such option; it takes {', '.join(takes)}")
    if budget is not None and not any(k in options for k in (*sizes, "budget", "tol")):
        options["budget"] = budget
    if "joint" in options and not isinstance(options["joint"], bool):
        raise TypeError(f"plan: joint: expected True or False, got {options['joint']!r}")
    if options.get("joint") and options.get("transposed"):
        raise ValueError("plan: joint: layers share their right factor; expected no transposed=True with it")
    if "budget" in options:
        parameter_limit(options["budget"], (1, 1))  # refuses one above 1 before any layer is looked at
    return Choice(structure, options)


def example(choice: Choice, shape: tuple[int, int]) -> Operator:
    """An operator of the architecture that a layer of a shape would have; its values mean nothing.

    Where a budget or tolerance leaves the architecture to the values of the matrix, that of a random matrix. Raises
    ``ValueError`` if there is none for the shape.
    """
    options = {k: v for k, v in choice.options.items() if k != "joint"}
    if choice.structure == PIXELFLY:
        return _of_noise(choice, shape) if "budget" in options else empty(PIXELFLY, shape, **options)
    family = read_structure(choice.structure)
    fixed = {k for k, v in options.items() if v not in (None, False)} <= {"rank", "blocks", "budget", "interpolative"}
    if fixed and family is LowRank:
        return _low_rank(shape, options)
    if fixed and family in _TWO_FACTOR and "blocks" in options:
        return _two_factor(family, shape, options)
    if "budget" not in options and "tol" not in options:
        plain = {k: v for k, v in options.items() if k in ("rank", "blocks", "radix", "patterns", "shapes", "cores")}
        return empty(family, shape, **plain)
    return _of_noise(choice, shape)


def joint_rank(choice: Choice, shape: tuple[int, int]) -> int | None:
    """The rank that a budget buys layers of that many rows together; None where the rank is given or left to a tolerance.

    Raises ``ValueError`` if it buys none.
    """
    return _rank(shape, choice.options) if "budget" in choice.options and "tol" not in choice.options else None


def joint_example(choice: Choice, shape: tuple[int, int], rank: int) -> Operator:
    """As :func:`example`, the part of a joint projection of a rank that one layer gets."""
    if not choice.options.get("interpolative"):
        return empty(LowRank, shape, rank=rank)
    return Interpolative.random(shape, rank=rank, side="columns", dtype=np.float32, rng=0)


def _of_noise(choice: Choice, shape: tuple[int, int]) -> Operator:
    noise = np.random.default_rng(0).standard_normal(shape)
    return project(noise, choice.family, **choice.project_options).operator


def _low_rank(shape: tuple[int, int], options: Mapping[str, Any]) -> Operator:
    (m, n), rank = shape, _rank(shape, options)
    if not options.get("interpolative"):
        return empty(LowRank, shape, rank=rank)
    return Interpolative.random(shape, rank=rank, side="rows" if m <= n else "columns", dtype=np.float32, rng=0)


def _rank(shape: tuple[int, int], options: Mapping[str, Any]) -> int:
    m, n = shape
    interpolative = bool(options.get("interpolative"))
    if "budget" in options:
        limit = parameter_limit(options["budget"], shape)
        request = Request(family=LowRank, norm=0.0, limit=limit, interpolative=interpolative)
        rank = most_rank(request, m, n)
        if rank < 1:
            raise infeasible(request, m + n - interpolative)
        return rank
    rank = int(options.get("rank") or max(1, min(shape) // 4))
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank: expected between 1 and {min(shape)} for shape {m}x{n}, got {rank}")
    return rank


def _two_factor(family: type[Operator], shape: tuple[int, int], options: Mapping[str, Any]) -> Operator:
    interpolative, blocks = bool(options.get("interpolative")), options["blocks"]

    def made(rank: int) -> Operator:
        if interpolative:
            return InterpolativeBlocks.random(shape, blocks=blocks, rank=rank, dtype=np.float32, rng=0)
        return empty(family, shape, blocks=blocks, rank=rank)

    if "budget" not in options:
        return made(int(options.get("rank") or 1))
    limit, least = parameter_limit(options["budget"], shape), made(1).nparams
    if least > limit:
        raise infeasible(Request(family=family, norm=0.0, limit=limit), least)
    low, high = 1, max(1, min(shape))
    while low < high:  # the count grows with the rank
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _count(made, middle) <= limit else (low, middle - 1)
    return made(low)


def _count(made: Any, rank: int) -> float:
    try:
        return made(rank).nparams
    except ValueError:  # beyond the size of a block
        return float("inf")
