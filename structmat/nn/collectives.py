"""Collectives: what the processes of a mesh exchange in the forward pass, and what that means for gradients.

All of them are of ``torch.distributed``. A tensor is *full* where every process holds all of it, and *split* where every
process holds its part of an axis. Each function is linear, and its gradient is the adjoint exchange.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def copied(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """A full tensor that every process uses otherwise: itself; its gradient is the sum over the processes."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the processes, in all of them, which then do the same with it: one all-reduce."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def joined(x: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
    """A split tensor as a full one: one all-gather."""
    return DTensor.from_local(x, mesh, [Shard(axis)], run_check=False).redistribute(placements=[Replicate()]).to_local()


def own_part(x: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
    """The own part of a full tensor, without an exchange; an all-gather in the backward pass."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(axis)]).to_local()


def exchanged(x: Tensor, mesh: DeviceMesh, split: int, join: int) -> Tensor:
    """A tensor that is split along ``join`` as one that is split along ``split``: one all-to-all.

    ``x.shape[split]`` must be a multiple of the number of processes; every process sends all but its own share of it.
    """
    size = mesh.size()
    parts = x.unflatten(split, (size, x.shape[split] // size)).movedim(split, 0)
    parts = _AllToAll.apply(parts.contiguous(), mesh.get_group())
    return parts.movedim(0, join).flatten(join, join + 1)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


class _AllToAll(torch.autograd.Function):
    """Entry ``i`` along axis 0 goes to process ``i``; its own adjoint.

    torch's DTensor does the same exchange for CUDA alone: on a CPU it gathers everything and cuts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        y = torch.empty_like(x)
        dist.all_to_all_single(y, x, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _AllToAll.apply(gradients[0].contiguous(), ctx.group), None
