"""Options of chains, checked: the order of the splits, the refinement, the axis orders."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np

from structmat.projection.hierarchical import ORDERS

CLASSES = ("strided", "contiguous")


def read_order(value: Any) -> str | tuple[int, ...] | None:
    """A name of :data:`ORDERS` or a tuple of splits, which is checked against the chain later."""
    if value is None or value in ORDERS:
        return value
    if isinstance(value, str) or not np.iterable(value) or any(not hasattr(v, "__index__") for v in value):
        raise ValueError(f"order: expected one of {', '.join(ORDERS)} or a sequence of splits, got {value!r}")
    return tuple(index(v) for v in value)


def read_refine(value: Any) -> int | bool | None:
    """A number of sweeps or ``True``; ``None`` for none."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return True if value else None
    if not hasattr(value, "__index__"):
        raise TypeError(f"refine: expected True or a number of sweeps, got {type(value).__name__}")
    if index(value) < 0:
        raise ValueError(f"refine: expected at least 0 sweeps, got {index(value)}")
    return index(value) or None


def read_layout(value: Any) -> str | tuple[str, str] | None:
    """``"search"`` or ``(rows, columns)``, each strided or contiguous."""
    if value is None or (isinstance(value, str) and value == "search"):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(v in CLASSES for v in value):
        return value[0], value[1]
    raise ValueError(f"layout: expected 'search' or (rows, columns), each of {' and '.join(CLASSES)}; got {value!r}")


def read_search(value: Any) -> str | None:
    """``"search"`` where that is asked for; ``None`` for no permutation and for a given one."""
    if not isinstance(value, str):
        return None
    if value != "search":
        raise ValueError(f"permutation: expected 'search' or an index array, got {value!r}")
    return value
