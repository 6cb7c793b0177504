"""Specs: operators as plain JSON, apart from their arrays; what files and torch layers are made from.

A spec is ``{"family": name, "fields": [...]}``, the fields of the operator's class in order. What stands for an array is up to
whoever keeps the arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from structmat import arrays
from structmat.operator import Operator
from structmat.patterns import AxisOrder

Spec = dict[str, Any]


Keep = Callable[[Any, type[Operator]], Any]  # (array or foreign object, family of its owner) -> what stands for it


def encode(operator: Operator, keep: Keep, foreign: Keep | None = None) -> Spec:
    """The spec of an operator; ``keep(array, family)`` takes an array and gives the JSON object that stands for it.

    ``foreign`` does so for what is neither array, number nor operator; it gives None for what it does not know. Raises
    ``TypeError`` for a field that JSON cannot hold.
    """
    cls = type(operator)
    return {"family": family_name(cls), "fields": [_encode(value, cls, keep, foreign) for value in operator._values()]}


def _encode(value: Any, owner: type[Operator], keep: Keep, foreign: Keep | None) -> Any:
    if isinstance(value, Operator):
        return encode(value, keep, foreign)
    if isinstance(value, AxisOrder):
        return {"order": [list(value.radices), list(value.axes)]}
    if type(value) is tuple:
        return {"tuple": [_encode(v, owner, keep, foreign) for v in value]}
    if arrays.kind(value) is not None:
        return keep(value, owner)
    if isinstance(value, (np.dtype, type)) or arrays.is_torch_dtype(value):
        dtype = arrays.as_dtype(value)
        library = "torch" if arrays.is_torch_dtype(dtype) else "numpy"
        return {"dtype": str(dtype).removeprefix("torch."), "of": library}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    found = None if foreign is None else foreign(value, owner)
    if found is not None:
        return found
    raise TypeError(f"{owner.__name__}: a field of type {type(value).__name__} cannot be stored")


def decode(spec: Spec, kept: Callable[[dict[str, Any]], Any], dtype: Callable[[dict[str, Any]], Any]) -> Operator:
    """The operator of a spec; ``kept`` gives what ``keep`` and ``foreign`` have left an object for, ``dtype`` a dtype.

    Raises ``ValueError`` for a family that is not known: one of somebody else's has to be imported first.
    """
    fields = [_decode(field, kept, dtype) for field in spec["fields"]]
    return family_of(spec["family"])._rebuild(*fields)


def _decode(field: Any, kept: Callable[[dict[str, Any]], Any], dtype: Callable[[dict[str, Any]], Any]) -> Any:
    if not isinstance(field, dict):
        return field
    if "family" in field:
        return decode(field, kept, dtype)
    if "tuple" in field:
        return tuple(_decode(f, kept, dtype) for f in field["tuple"])
    if "order" in field:
        radices, axes = field["order"]
        return AxisOrder(tuple(radices), tuple(axes))
    if "dtype" in field:
        return dtype(field)
    if "complex" in field:
        real, imag = field["complex"]
        return complex(real, imag)
    return kept(field)


def family_name(cls: type[Operator]) -> str:
    """The name of a family in a spec: its own for structmat's, with the module for those of others."""
    return cls.__name__ if cls.__module__.startswith("structmat.") else f"{cls.__module__}:{cls.__qualname__}"


def family_of(name: str) -> type[Operator]:
    """The class with this name in a spec, among those that are loaded: a spec never imports anything."""
    todo = list(Operator.__subclasses__())
    while todo:
        cls = todo.pop()
        if family_name(cls) == name:
            return cls
        todo += cls.__subclasses__()
    raise ValueError(f"no operator family {name!r} is loaded; import the module that defines it first")
