"""Placement: which projections run where the matrix is, and the words that say so."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from structmat import arrays
from structmat.arrays import Array
from structmat.operator import Operator
from structmat.patterns import Pattern
from structmat.projection.device import DeviceArray, place
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.butterfly import Butterfly
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

DEVICES = ("host", "own")
PLAIN = (LowRank, Monarch, BlockTensorTrain, Kronecker, Butterfly, Chain, BlockDiagonal, Dense)
WEIGHTED = (LowRank, Monarch, BlockTensorTrain)
ON_HOST = ("cur", "als", "gradient")  # methods that pivot or iterate in SciPy


def runs_on_device(family: type[Operator], given: dict[str, Any], free: bool, weighted: bool) -> bool:
    """Whether a projection with these options can run where the matrix is; ``free`` with a budget or a tolerance."""
    if family not in (WEIGHTED if weighted else PLAIN) or given.get("method") in ON_HOST:
        return False
    if weighted and (given.get("cores") or 2) > 2:  # longer chains are fitted by SciPy's L-BFGS
        return False
    if family is Kronecker:  # sums of products of three and more factors are alternating least squares
        return len(given.get("shapes") or (0, 0)) == 2 or (given.get("terms") or 1) == 1
    if family is Chain:
        return is_chainable(given.get("patterns") or ())
    return family is not BlockDiagonal or not free


def is_chainable(patterns: Sequence[Pattern]) -> bool:
    """Whether every pair of neighbours is, so that SVDs solve the chain."""
    return all(p.chain_rank(q) is not None for p, q in pairwise(patterns))


def accelerated(x: Array) -> bool:
    """Whether an array is on an accelerator with double precision and the decompositions: CuPy's, torch's of CUDA or ROCm."""
    library = arrays.kind(x)
    return library == "cupy" or (library == "torch" and x.device.type == "cuda")


def where(source: Array, target: Any = None, device: str | None = None) -> str:
    """What ``method`` says of the place: nothing for a matrix of the CPU that was computed there as always."""
    if isinstance(target, DeviceArray):
        return f"; computed on {place(target)}"
    moved = arrays.kind(source) == "cupy" or (arrays.kind(source) == "torch" and source.device.type != "cpu")
    return "; computed on the host" if moved or (device == "own" and arrays.kind(source) == "torch") else ""


def read_device(device: Any) -> str | None:
    """The option ``device``, checked."""
    if device is not None and device not in DEVICES:
        raise ValueError(f"device: expected None, {' or '.join(map(repr, DEVICES))}, got {device!r}")
    return device
