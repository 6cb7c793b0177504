"""Sharding: parameters that are spread over processes, how they are drawn, and models that are wrapped already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold a part only."""
    home = sys.modules.get("torch.distributed.tensor")  # where it is not loaded no tensor can be of its class
    return home is not None and isinstance(x, home.DTensor)


def drawn(parameter: Tensor, draw: Callable[[Tensor], Any]) -> None:
    """Overwrite a parameter by what ``draw`` writes to a tensor of its shape.

    A sharded one gets the parts of one full draw, that of the first process: what a single process would have with the same
    seed, and never the same numbers in two parts, which a draw of the own part on every process would lead to. Every process
    draws, so that generators of the same seed stay in step; a collective call.
    """
    if not is_sharded(parameter) or parameter.is_meta:
        draw(parameter)
        return
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    local = sharded.to_local()
    full = torch.empty(sharded.shape, dtype=sharded.dtype, device=local.device)
    draw(full)
    local.copy_(distribute_tensor(full, sharded.device_mesh, sharded.placements).to_local())


_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # what wrappers put into names


def unwrapped_name(name: str, model: nn.Module) -> str:
    """The name of a module or parameter of a model as of before the model was wrapped.

    ``module.`` in front comes from DDP and DataParallel; elsewhere it is an attribute of the model's own.
    """
    for infix in _WRAPPERS:
        name = f"{name}.".replace(infix, "")[:-1]
    return f"{name}.".removeprefix("module.")[:-1] if _is_replicated(model) else name


def _is_replicated(model: nn.Module) -> bool:
    """Whether a model is DDP or DataParallel, compiled or not."""
    inner = model._modules.get("_orig_mod")
    return isinstance(model, (DistributedDataParallel, DataParallel)) or (inner is not None and _is_replicated(inner))


def shard_placement(parameter: nn.Parameter, processes: int | None = None) -> Any:
    """Which axis of a parameter FSDP2 is to shard; pass it to ``fully_shard`` as ``shard_placement_fn``.

    The first axis, as by default, wherever it has an entry for every process. Otherwise (a rank, a block count or a height
    below the number of processes) the longest axis that they divide, so that none of them is left with nothing.

    Parameters
    ----------
    parameter
        Of any shape.
    processes
        Number of processes that share it. Default: all of ``torch.distributed``; for a smaller mesh use
        ``functools.partial(snn.shard_placement, processes=mesh.size())``.

    Returns
    -------
    torch.distributed.tensor.Shard or None
        None stands for FSDP2's default, axis 0.

    Raises
    ------
    RuntimeError
        Without ``processes`` where ``torch.distributed`` is not initialised.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> factor = torch.nn.Parameter(torch.zeros(1, 8, 8))
    >>> snn.shard_placement(factor, processes=2)
    Shard(dim=1)
    """
    from torch.distributed.tensor import Shard

    if processes is None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("shard_placement: torch.distributed is not initialised; pass processes=")
        processes = dist.get_world_size()
    if parameter.ndim < 2 or parameter.shape[0] >= processes:
        return None
    axes = [axis for axis in range(1, parameter.ndim) if parameter.shape[axis] % processes == 0]
    return Shard(max(axes, key=lambda axis: parameter.shape[axis])) if axes else None


_CLASSES = (  # home and name of the class of a wrapper, and what users call it
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "DistributedDataParallel"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "DataParallel"),
    ("torch.distributed.fsdp", "FSDPModule", "fully_shard"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "FullyShardedDataParallel"),
)


def wrapper_of(model: nn.Module) -> str | None:
    """By what a model, or a part of it, has been wrapped; None where it is plain, torch.compile where it is that alone."""
    modules = list(model.modules())
    for home, name, known_as in _CLASSES:
        cls = getattr(sys.modules.get(home), name, None)
        if cls is not None and any(isinstance(module, cls) for module in modules):
            return known_as
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return "parallelize"
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return "torch.compile" if compiled is not None and any(isinstance(m, compiled) for m in modules) else None


def check_unwrapped(model: nn.Module, who: str, compiled: bool = False) -> None:
    """Raise ``ValueError`` if a model is wrapped, unless by torch.compile and ``compiled``: replacing layers comes first."""
    wrapper = wrapper_of(model)
    if wrapper is not None and not (compiled and wrapper == "torch.compile"):
        raise ValueError(f"{who}: the model is wrapped already ({wrapper}); call {who} first and wrap the result")
