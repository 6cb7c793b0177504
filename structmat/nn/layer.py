"""StructuredLinear: nn.Linear's replacement, whose weight is a structured operator."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from structmat import arrays
from structmat.nn import scaling
from structmat.nn.programs import Program, program_of
from structmat.nn.spec import (
    PIXELFLY,
    Spec,
    build,
    describe,
    empty,
    read_structure,
    slots_of,
    stored_shape,
    structure_name,
)
from structmat.nn.weight import StructuredWeight
from structmat.operator import Operator
from structmat.projection.project import project
from structmat.structures.block_sparse import BlockSparse
from structmat.structures.interpolative import Interpolative
from structmat.structures.interpolative_blocks import InterpolativeBlocks
from structmat.structures.low_rank import LowRank

VERSION = 1  # of the configuration


class ProjectionSummary(NamedTuple):
    """How near a layer is to the dense weight that it was made from; see :class:`structmat.Projection`."""

    error: float
    relative_error: float
    lower_bound: float
    method: str


class StructuredLinear(nn.Module):
    """``y = x A^T + b`` with a structured operator ``A``: drop-in for ``nn.Linear``.

    Takes inputs of any leading shape ``(..., in_features)`` and follows the dtype rules of ``nn.Linear``, autocast included.
    The parameters are the operator's arrays, ``factors.0``, ``factors.1``, ... with the blocks as axis 0, and ``bias``.

    Parameters
    ----------
    in_features, out_features
        Sizes; any, also primes (chains are padded inside).
    bias
        Whether a bias is added.
    structure
        ``"btt"``, ``"monarch"``, ``"low_rank"``, ``"kronecker"``, ``"butterfly"``, ``"block_diagonal"``, ``"pixelfly"``,
        ``"chain"``, ``"dense"``, or a class of operators.
    init
        ``"spectral"``, ``"variance"`` or ``"zero"``, see :func:`structmat.nn.initialize`.
    device, dtype
        As for ``nn.Linear``.
    **options
        Architecture options of the family: ``blocks``, ``rank``, ``cores``, ``shapes``, ``radix``, ``patterns``; ``block`` and
        ``rank`` for pixelfly.

    Raises
    ------
    ValueError
        For sizes below 1, an unknown structure, or options that do not fit the sizes.
    TypeError
        For options that the family does not have.

    Notes
    -----
    A chain of block factors is trained by a path of its own: the batch goes through the cache in chunks, nothing but the
    input is saved, and the intermediates are computed again in the backward pass. Neighbouring factors with small blocks, such
    as those of a butterfly, are multiplied out in every call where the batch is large enough for that to be faster; the small
    factors stay the parameters and get their gradients. Under ``torch.compile``, ``torch.export``,
    ``torch.func``, forward-mode differentiation and dispatch modes the same product is composed of ``bmm`` and views.
    ``weight`` is no tensor (:class:`structmat.nn.StructuredWeight`); ``to_linear()`` multiplies out.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> layer = snn.StructuredLinear(64, 32, structure="btt", blocks=8)
    >>> layer(torch.zeros(2, 5, 64)).shape, sum(p.numel() for p in layer.factors)
    (torch.Size([2, 5, 32]), 768)
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        structure: str | type[Operator] = "btt",
        *,
        init: str = "spectral",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if int(size) != size or size < 1:
                raise ValueError(f"{name}: expected a size of at least 1, got {size}")
        scaling.check_rule(init)
        super().__init__()
        spec, _, _ = describe(empty(structure, (int(out_features), int(in_features)), **options))
        name = structure if isinstance(structure, str) else structure_name_of(structure)
        self._set(name, spec, bias, device, dtype, init)
        self.reset_parameters()

    def _set(self, structure: str, spec: Spec, bias: bool, device: Any, dtype: torch.dtype | None, init: str) -> None:
        """Everything but values: the program, empty parameters and empty index buffers."""
        self.structure, self.spec, self.init = structure, spec, init
        self.program: Program = program_of(spec)
        self.out_features, self.in_features = self.program.shape
        self.projection: ProjectionSummary | None = None
        values, places = slots_of(spec)
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(stored_shape(s), device=device, dtype=dtype)) for s in values.values()
        )
        for i, shape in places.items():
            self.register_buffer(f"places_{i}", torch.empty(shape, device=device, dtype=torch.long))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    # ---- other ways to make one ---------------------------------------------------------------------------------

    @classmethod
    def from_operator(
        cls, operator: Operator, bias: Tensor | None = None, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> Self:
        """A layer that computes ``x A^T + bias`` for a structured operator; its arrays are copied.

        Parameters
        ----------
        operator
            One matrix, of NumPy or torch arrays.
        bias
            ``(m,)`` or None.
        device, dtype
            Of the parameters; default those of the operator.

        Raises
        ------
        TypeError
            If ``operator`` is no operator, or has a field that cannot be stored.
        ValueError
            For a stack of operators, an operator without values, or a bias of another shape.

        Examples
        --------
        >>> import structmat as sm, structmat.nn as snn
        >>> snn.StructuredLinear.from_operator(sm.LowRank.random((4, 6), rank=1, rng=0)).structure
        'low_rank'
        """
        if not isinstance(operator, Operator):
            raise TypeError(f"from_operator: expected an operator, got {type(operator).__name__}")
        spec, values, places = describe(operator)
        if not values:
            raise ValueError(f"from_operator: {operator} stores no values; there is nothing to train")
        if bias is not None and tuple(bias.shape) != (operator.shape[0],):
            raise ValueError(f"from_operator: expected a bias of shape ({operator.shape[0]},), got {tuple(bias.shape)}")
        tensors = [_tensor(v) for v in values]
        dtype = dtype or arrays.promote(*(t.dtype for t in tensors))
        device = device if device is not None else tensors[0].device
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(structure_name(operator), spec, bias is not None, device, dtype, "spectral")
        with torch.no_grad():
            for parameter, tensor in zip(layer.factors, tensors, strict=True):
                parameter.copy_(tensor.reshape(parameter.shape))
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
            for i, place in enumerate(places):
                buffer = layer.get_buffer(f"places_{i}")
                buffer.copy_(_tensor(place))
            layer._exchange_places()
        return layer

    @classmethod
    def from_linear(
        cls, linear: nn.Module, structure: str | type[Operator] = "btt", *, weight: Any = None, **options: Any
    ) -> Self:
        """The structured layer nearest to a dense one, by :func:`structmat.project`.

        Parameters
        ----------
        linear
            A module with ``weight (m, n)`` and ``bias``, as ``nn.Linear``. It is not changed.
        structure
            As for the constructor.
        weight
            Second moments of the inputs, which make the projection activation-aware; see :func:`structmat.project`.
        **options
            Options of :func:`structmat.project`: ``budget``, ``tol``, ``blocks``, ``rank``, ... For pixelfly: ``block``,
            ``places`` and ``rank``.

        Returns
        -------
        StructuredLinear
            With the bias of ``linear`` (None stays None; a ``mean`` of the inputs corrects it), its device, dtype and training
            mode, and the certificate as ``projection``.

        Examples
        --------
        >>> import torch, structmat.nn as snn
        >>> layer = snn.StructuredLinear.from_linear(torch.nn.Linear(8, 8), structure="low_rank", rank=8)
        >>> round(layer.projection.relative_error, 5)
        0.0
        """
        dense: Any = getattr(linear, "weight", None)
        bias: Any = getattr(linear, "bias", None)
        if not isinstance(dense, Tensor) or dense.ndim != 2:
            raise TypeError(f"from_linear: expected a module with a weight matrix, got {type(linear).__name__}")
        target = dense.detach()
        if target.dtype in (torch.bfloat16, torch.float16):
            target = target.float()
        if weight is not None:
            options["weight"] = weight
        found = project(target, **_family(structure, options, (target.shape[0], target.shape[1])))
        requires = bias is not None and bias.requires_grad
        if bias is not None and found.bias_correction is not None:
            bias = bias.detach() + _tensor(found.bias_correction).to(bias.device, bias.dtype)
        layer = cls.from_operator(
            found.operator, None if bias is None else bias.detach(), device=dense.device, dtype=dense.dtype
        )
        if isinstance(structure, str):
            layer.structure = structure
        error, relative = found.error, found.relative_error
        if target.dtype != dense.dtype:  # the error of what is stored, after rounding
            difference = torch.linalg.norm(dense.detach().double() - layer.to_dense().detach().double())
            error = float(difference)
            relative = error / max(float(torch.linalg.norm(dense.detach().double())), torch.finfo(torch.double).tiny)
        layer.projection = ProjectionSummary(error, relative, found.lower_bound, found.method)
        for parameter in layer.factors:
            parameter.requires_grad_(dense.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(requires)
        return layer.train(linear.training)

    @property
    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an empty layer of this architecture: plain JSON."""
        config: dict[str, Any] = {"version": VERSION, "structure": self.structure, "bias": self.bias is not None}
        config |= {"in_features": self.in_features, "out_features": self.out_features, "init": self.init}
        config["operator"] = self.spec
        if self.projection is not None:
            config["projection"] = list(self.projection)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """A layer of the architecture of a configuration, freshly initialised, to be loaded into.

        Raises ``ValueError`` for a configuration of a newer version, of an operator family that is not loaded, or that is
        damaged.

        Examples
        --------
        >>> import structmat.nn as snn
        >>> layer = snn.StructuredLinear(6, 4, structure="monarch", blocks=2)
        >>> snn.StructuredLinear.from_config(layer.config, device="meta").weight.shape
        torch.Size([4, 6])
        """
        if not isinstance(config, dict) or "operator" not in config:
            raise ValueError("from_config: expected the config of a StructuredLinear, got something without 'operator'")
        version = config.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise ValueError(f"from_config: expected version {VERSION} or older, got {version}; update structmat")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        try:
            arguments = (config["structure"], config["operator"], config["bias"])
            layer._set(*arguments, device, dtype, config.get("init", "spectral"))
            if config.get("weight_norm"):
                from structmat.nn.normalization import weight_norm

                weight_norm(layer)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"from_config: damaged or foreign configuration: {error}") from error
        if (layer.in_features, layer.out_features) != (config.get("in_features"), config.get("out_features")):
            raise ValueError(
                f"from_config: the operator is {layer.out_features}x{layer.in_features}, "
                f"the sizes say {config.get('out_features')}x{config.get('in_features')}"
            )
        if config.get("projection"):
            layer.projection = ProjectionSummary(*config["projection"])
        layer.reset_parameters()
        return layer

    # ---- values ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new factors by the rule ``init``, from torch's generator; the bias as ``nn.Linear`` does."""
        for buffer in self._places():
            size = buffer.shape[-1]
            buffer.copy_(torch.arange(size, device=buffer.device).expand(buffer.shape))
        scaling.initialize(self, self.init)

    def _values(self) -> list[Tensor]:
        """The factors as they are applied: what :func:`structmat.nn.weight_norm` changes."""
        return list(self.factors)

    def _places(self) -> list[Tensor]:
        return [self.get_buffer(f"places_{i}") for i in slots_of(self.spec)[1]]

    def _exchange_places(self) -> None:
        """Turn indices of an interpolative operator into gathers or back, where its side needs the inverse permutation."""
        for i, side in _sides(self.spec):
            if side == "rows":
                buffer = self.get_buffer(f"places_{i}")
                buffer.copy_(buffer.argsort(-1))

    @property
    def operator(self) -> Operator:
        """The operator ``A`` over the memory of the parameters: what is written to one is read from the other."""
        return self._operator([f.detach() for f in self._values()])

    def _operator(self, values: list[Tensor]) -> Operator:
        places = self._places()
        for i, side in _sides(self.spec):
            if side == "rows":
                places[i] = places[i].argsort(-1)
        shapes = slots_of(self.spec)[0]
        return build(self.spec, [v.reshape(s) for v, s in zip(values, shapes.values(), strict=True)], places)

    def to_dense(self) -> Tensor:
        """The dense weight ``(out_features, in_features)``, differentiable in the factors."""
        eye = torch.eye(self.in_features, dtype=self.factors[0].dtype, device=self.factors[0].device)
        return self._rows(eye, None, self._values()).t().contiguous()

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer: factors multiplied out in float64 and rounded once, a bias of None kept.

        Examples
        --------
        >>> import structmat.nn as snn
        >>> snn.StructuredLinear(6, 4, bias=False, structure="btt", blocks=2).to_linear()
        Linear(in_features=6, out_features=4, bias=False)
        """
        values = [f.detach() for f in self._values()]
        dtype, device = values[0].dtype, values[0].device
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        if device.type == "meta":
            return linear.train(self.training)
        wide = torch.complex128 if dtype.is_complex else torch.float64 if device.type != "mps" else torch.float32
        eye = torch.eye(self.in_features, dtype=wide, device=device)
        weight = self._rows(eye, None, [v.to(wide) for v in values]).t().to(dtype).contiguous()
        linear.weight = nn.Parameter(weight, any(f.requires_grad for f in self.factors))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def weight(self) -> StructuredWeight:
        """The place of the dense weight: shape, dtype and device, and no entries."""
        first = self.factors[0]
        trained = any(f.requires_grad for f in self.factors)
        return StructuredWeight((self.out_features, self.in_features), first.dtype, first.device, trained)

    # ---- costs ------------------------------------------------------------------------------------------------------

    @property
    def nparams(self) -> int:
        """Number of stored values, without the bias."""
        return sum(f.numel() for f in self.factors)

    def flops(self, batch: int = 1) -> int:
        """Floating-point operations of the product for ``batch`` rows; a multiply-add counts as 2."""
        return batch * self.program.flops

    def extra_repr(self) -> str:
        """Sizes, structure, parameters and flops against dense."""
        dense = self.in_features * self.out_features
        shapes = " ".join("x".join(map(str, f.shape)) for f in self.factors)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"structure={self.structure}, factors {shapes}, {self.nparams:,} parameters ({self.nparams / dense:.1%} of "
            f"dense), {self.flops():,} flops ({self.flops() / (2 * dense):.1%})"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    # ---- applying -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """``x A^T + bias`` for ``x`` of shape ``(..., in_features)``."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"StructuredLinear: expected an input of shape (..., {self.in_features}), got {tuple(x.shape)}"
            )
        values, bias = self._values(), self.bias
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, bias = _autocast(x, dtype), None if bias is None else _autocast(bias, dtype)
            values = [_autocast(v, dtype) for v in values]
        if x.dtype != values[0].dtype:
            raise RuntimeError(
                f"StructuredLinear: expected an input of the parameters' dtype {values[0].dtype}, got {x.dtype}"
            )
        y = self._rows(x.reshape(-1, self.in_features), bias, values)
        if x.ndim == 2:  # no view, as nn.Linear's outputs are none then: FSDP hangs a hook on them
            return y.contiguous()
        return y.reshape(*x.shape[:-1], self.out_features).contiguous()

    def _rows(self, x: Tensor, bias: Tensor | None, values: list[Tensor]) -> Tensor:
        return self.program.rows(x, bias, values, self._places() if self._buffers else [])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        dense = state_dict.get(prefix + "weight")
        if dense is not None and f"{prefix}factors.0" not in state_dict:
            raise RuntimeError(
                f"{prefix}weight is a dense matrix {tuple(dense.shape)}, but the layer is structured ({self.structure}): load "
                "the dense model first and convert it, or use StructuredLinear.from_linear"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def structure_name_of(family: type[Operator]) -> str:
    """The short name of a family, or that of its class."""
    from structmat.nn.spec import STRUCTURES

    return next((name for name, cls in STRUCTURES.items() if cls is family), family.__name__)


def _family(structure: Any, options: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments of project for a structure."""
    if structure != PIXELFLY:
        return {"family": structure if isinstance(structure, (list, tuple)) else read_structure(structure), **options}
    options = dict(options)
    rank, block, places = (options.pop(name, None) for name in ("rank", "block", "places"))
    if "budget" not in options and "tol" not in options:
        default = max(1, round(min(shape) ** 0.5)) if block is None else block
        rank = min(*shape, default if isinstance(default, int) else default[0]) if rank is None else rank
    sparse = {k: v for k, v in (("block", block), ("places", places)) if v is not None}
    low = {} if rank is None else {"rank": rank}
    return {"family": [(BlockSparse, sparse), (LowRank, low)], **options}


def _sides(spec: Any) -> list[tuple[int, str]]:
    """Slot and side of every interpolative operator in a spec."""
    if isinstance(spec, list):
        return [found for child in spec for found in _sides(child)]
    if not isinstance(spec, dict):
        return []
    if spec.get("family") in (Interpolative.__name__, InterpolativeBlocks.__name__):
        return [(spec["fields"][0]["slot"], spec["fields"][-1])]
    return _sides(spec.get("fields", spec.get("tuple", [])))


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts the operands of a product: floating, and not double."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _tensor(x: Any) -> Tensor:
    return x.detach() if isinstance(x, Tensor) else torch.from_numpy(arrays.convert(x, "numpy").copy())
