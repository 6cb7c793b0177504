"""What the checks of two processes have in common: a network, its training, and differences."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import structmat.nn as snn

SIZE = 2


def network(device: str | None = None) -> nn.Sequential:
    """Layers of several structures; some have as many blocks as processes do not divide."""
    options: dict[str, Any] = {"device": device}
    return nn.Sequential(
        snn.StructuredLinear(64, 128, structure="btt", blocks=8, rank=2, **options),
        nn.GELU(),
        snn.StructuredLinear(128, 64, structure="low_rank", rank=16, **options),
        nn.LayerNorm(64, **options),
        snn.StructuredLinear(64, 64, structure="kronecker", shapes=[(8, 8), (8, 8)], **options),
        snn.StructuredLinear(64, 35, structure="monarch", blocks=(5, 7), rank=2, **options),
        nn.Linear(35, 5, **options),
    )


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, snn.StructuredLinear):
            fully_shard(layer, mesh=mesh, shard_placement_fn=snn.shard_placement)
    return fully_shard(model, mesh=mesh)


def full(x: Any) -> torch.Tensor:
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x.detach()


def difference(a: Any, b: Any) -> float:
    return float((full(a).double() - full(b).double()).abs().max())


def trained(model: nn.Module, rows: slice = slice(None), steps: int = 3) -> nn.Module:
    """Three steps of AdamW with the learning rates of the structure, on the rows of a batch that are this process's."""
    optimizer = torch.optim.AdamW(snn.param_groups(model, 0.01, weight_decay=0.1, base_width=32))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(12, 64, generator=generator)
        y = torch.randint(5, (12,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.optimizer = optimizer  # for the checkpoint
    return model


def largest(model: nn.Module, reference: nn.Module) -> float:
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(difference(full(a).reshape(b.shape), b) for a, b in pairs)


def raised(call: Any) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
