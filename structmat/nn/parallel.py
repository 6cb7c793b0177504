"""Tensor parallelism: the factors of structured layers, spread over the processes of a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from structmat.nn.layer import StructuredLinear
from structmat.nn.selection import match
from structmat.nn.sharding import check_unwrapped

if TYPE_CHECKING:  # torch.distributed is loaded by those who use it, and not every torch has it
    from torch.distributed.device_mesh import DeviceMesh

    from structmat.nn.schemes import Held, Scheme

STYLES = ("block", "column", "row", "rank")


def parallelize(
    model: nn.Module, mesh: DeviceMesh, style: str | Mapping[Any, str | None] = "block", *, gather: bool = False
) -> nn.Module:
    """Spread the structured layers of a model over the processes of a mesh; in place, and returned.

    ============  ===================================  =====================  ============================================
    style         structures                           input -> output        exchanged by ``P`` processes, ``b`` rows
    ============  ===================================  =====================  ============================================
    ``"block"``   btt, block_diagonal                  split -> split         all-to-all of ``b k l r / P`` numbers; nothing
    ``"block"``   low_rank                             split -> split         all-reduce of ``b r``
    ``"column"``  btt, block_diagonal                  full -> split          nothing
    ``"column"``  low_rank                             full -> split          all-gather of ``b r``
    ``"row"``     btt, monarch                         split -> full          all-reduce of ``b m``
    ``"row"``     low_rank (inner factor by columns,   full -> full           all-reduce of ``b m``
                  outer by rows), as ``"rank"``
    ``"rank"``    btt, monarch, low_rank               full -> full           all-reduce of ``b m``
    all but rank  kronecker of two factors             as for btt             all-to-all: 2, 1; all-reduce
    ============  ===================================  =====================  ============================================

    *Full*: an ordinary tensor, the same in all processes. *Split*: a DTensor with the placement ``Shard(-1)``, of which every
    process holds neighbouring features. A layer takes either: what is full is cut without an exchange, what is split is
    gathered where it is needed full. ``column`` and then ``row`` need nothing in between, as for dense layers (Shoeybi et al.,
    "Megatron-LM", arXiv 1909.08053), nor do ``block`` and ``block``; functions entry by entry (GELU, dropout) go in between.

    Parameters
    ----------
    model
        A structured layer, or a module with some, with the same values in every process (those of the first are taken); also
        on the meta device. Not wrapped yet: ``fully_shard`` (over another dimension of the mesh) comes afterwards.
    mesh
        Of one dimension, such as ``init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "tp"))["tp"]``.
    style
        One for all layers, or ``{pattern: style}`` with the patterns of :func:`structmat.nn.plan`; None leaves a layer, and so
        does no pattern.
    gather
        True makes every output full, at the price of an all-gather.

    Returns
    -------
    nn.Module
        ``model``. Its parameters are other objects: make the optimizer afterwards.

    Raises
    ------
    ValueError
        If there is no structured layer, a structure has no scheme, the number of processes does not divide what the style
        splits (all such layers are named, with the numbers), the sizes are padded, the mesh has several dimensions, or the
        model is wrapped. The model is then as it was.
    TypeError
        If ``mesh`` is no DeviceMesh.

    Examples
    --------
    >>> import torch.distributed as dist, structmat.nn as snn
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    >>> layer = snn.parallelize(snn.StructuredLinear(8, 8, structure="btt", blocks=4), mesh, "block")
    >>> layer.factors[0].placements, layer.scheme.communication
    ((Shard(dim=0),), 'one all-to-all of the intermediate')
    >>> dist.destroy_process_group()
    """
    from torch.distributed.device_mesh import DeviceMesh

    from structmat.nn.parallel_linear import ParallelLinear
    from structmat.nn.schemes import scheme_of

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"parallelize: expected a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"parallelize: expected a mesh of one dimension, got {mesh.ndim}: pass one of them, mesh['tp']"
        )
    check_unwrapped(model, "parallelize")
    styles = _styles(model, style)
    schemes: dict[str, Scheme] = {}
    problems = []
    for name, chosen in styles.items():
        layer: Any = model.get_submodule(name)
        try:
            if type(layer) is not StructuredLinear:
                raise ValueError(f"expected a StructuredLinear, got a {type(layer).__name__}")
            schemes[name] = scheme_of(layer.spec, (layer.out_features, layer.in_features), chosen, mesh.size())
        except ValueError as error:
            problems.append(f"{name or 'the model'} ({layer.structure}, {chosen}): {error}")
    problems += _conflicts(model, schemes)
    if problems:
        raise ValueError(f"parallelize: {'; '.join(problems)}")
    made: dict[Any, nn.Parameter] = {}
    tensors = {name: _spread(model.get_submodule(name), scheme, mesh, made) for name, scheme in schemes.items()}
    for name, (factors, bias) in tensors.items():  # nothing from here on can fail
        layer = model.get_submodule(name)
        layer.__class__ = ParallelLinear
        layer.scheme, layer.mesh, layer.style, layer.gather = schemes[name], mesh, styles[name], gather
        layer.factors = nn.ParameterList(factors)
        layer.bias = bias
    return model


def _styles(model: nn.Module, style: str | Mapping[Any, str | None]) -> dict[str, str]:
    """The style of every layer that is to be spread."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    if not layers:
        raise ValueError("parallelize: the model has no structured layer; convert it first")
    patterns = list((style if isinstance(style, Mapping) else {"re:.*": style}).items())
    for _, chosen in patterns:
        if chosen is not None and chosen not in STYLES:
            raise ValueError(f"parallelize: style: expected one of {', '.join(STYLES)}, got {chosen!r}")
    found = {name: chosen for name, chosen in match(layers, patterns, "parallelize").items() if chosen is not None}
    if not found:
        raise ValueError(f"parallelize: no pattern names one of the structured layers {', '.join(list(layers)[:5])}")
    return found


def _conflicts(model: nn.Module, schemes: Mapping[str, Scheme]) -> list[str]:
    """Parameters that two layers share and would hold in different ways."""
    seen: dict[int, tuple[Held, str]] = {}
    problems = []
    for name, scheme in schemes.items():
        layer: Any = model.get_submodule(name)
        for factor, held in zip(layer.factors, scheme.held, strict=True):
            first, other = seen.setdefault(id(factor), (held, name))
            if first != held:
                problems.append(f"{name} shares a factor with {other}, and would split it otherwise")
    return problems


def _spread(
    layer: Any, scheme: Scheme, mesh: DeviceMesh, made: dict[Any, nn.Parameter]
) -> tuple[list[nn.Parameter], nn.Parameter | None]:
    """The factors and the bias of a layer as DTensors; what layers share is made once."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from structmat.nn.schemes import Held

    bias = Held(tuple(layer.bias.shape), 0 if scheme.splits_output else None) if layer.bias is not None else None
    pairs = [*zip(layer.factors, scheme.held, strict=True), *([(layer.bias, bias)] if bias is not None else [])]
    for parameter, (shape, axis) in pairs:
        if (id(parameter), axis) not in made:
            placement = Replicate() if axis is None else Shard(axis)
            spread = distribute_tensor(parameter.detach().reshape(shape), mesh, [placement])
            made[id(parameter), axis] = nn.Parameter(spread, parameter.requires_grad)
    found = [made[id(parameter), held.axis] for parameter, held in pairs]
    return (found, None) if bias is None else (found[:-1], found[-1])
