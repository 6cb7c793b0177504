"""What stands in the place of ``weight``: it knows shape, dtype and device, and refuses to be computed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch


class StructuredWeight:
    """The place of the dense weight of a structured layer: shape, dtype and device, and no entries.

    Model code that asks ``layer.weight.dtype`` goes on working; arithmetic and torch functions raise ``TypeError``, so that no
    fused path multiplies by a dense matrix behind the layer's back.

    Examples
    --------
    >>> import structmat.nn as snn
    >>> weight = snn.StructuredLinear(6, 4, structure="low_rank", rank=1).weight
    >>> weight.shape, weight.dtype
    (torch.Size([4, 6]), torch.float32)
    """

    __slots__ = ("shape", "dtype", "device", "requires_grad")

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, requires_grad: bool) -> None:
        self.shape = torch.Size(shape)
        self.dtype, self.device, self.requires_grad = dtype, device, requires_grad

    ndim = 2

    def dim(self) -> int:
        """2."""
        return 2

    def size(self, dim: int | None = None) -> Any:
        """The shape ``(out_features, in_features)``, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Number of entries of the dense matrix, not of the parameters."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether the dtype is floating."""
        return self.dtype.is_floating_point

    @property
    def is_cuda(self) -> bool:
        """Whether the parameters are on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        """Whether the parameters are without memory."""
        return self.device.type == "meta"

    def __repr__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return (
            f"<place of a {sizes} weight, {self.dtype} on {self.device}; call the layer, or layer.to_linear().weight>"
        )

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise _refusal(f"torch's {getattr(function, '__name__', function)}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"the weight of a structured layer has no {name!r}: {_INSTEAD}")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal("numpy")


_INSTEAD = (
    "it has no dense entries; call the layer itself, change its factors, "
    "or take layer.to_linear().weight or layer.operator"
)


def _refusal(what: str) -> TypeError:
    return TypeError(f"{what} cannot take the weight of a structured layer: {_INSTEAD}")


def _refuse(name: str) -> Callable[..., NoReturn]:
    def method(_self: Any, *_others: Any) -> NoReturn:
        raise _refusal(name)

    method.__name__ = name
    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _form in (f"__{_name}__", f"__r{_name}__", f"__i{_name}__"):
        setattr(StructuredWeight, _form, _refuse(_form))
for _form in ("neg", "pos", "abs", "getitem", "setitem", "len", "iter", "float", "int", "bool"):
    setattr(StructuredWeight, f"__{_form}__", _refuse(f"__{_form}__"))
