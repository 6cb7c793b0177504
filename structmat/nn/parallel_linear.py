"""ParallelLinear: a structured layer of which every process of a mesh holds and computes a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from structmat.nn.collectives import own_part
from structmat.nn.layer import StructuredLinear
from structmat.nn.programs import program_of
from structmat.nn.schemes import Scheme
from structmat.nn.spec import slots_of, stored_shape
from structmat.operator import Operator


class ParallelLinear(StructuredLinear):
    """A structured layer of which every process of a mesh holds and computes a part; made by :func:`structmat.nn.parallelize`.

    Its parameters are DTensors: optimizers, gradient clipping and ``torch.distributed.checkpoint`` know what to do with them.

    Attributes
    ----------
    style
        ``"block"``, ``"column"``, ``"row"`` or ``"rank"``.
    mesh
        The processes.
    """

    style: str
    mesh: DeviceMesh
    scheme: Scheme
    gather: bool

    def forward(self, x: Tensor) -> Tensor:
        """``x A^T + bias`` for ``x`` of shape ``(..., in_features)``, a DTensor of that shape or a tensor that all hold.

        Returns a DTensor with the placement ``Shard(-1)`` where the style splits the outputs and they are not gathered.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"StructuredLinear: expected an input of shape (..., {self.in_features}), got {tuple(x.shape)}; a part of the "
                "features is passed as a DTensor with the placement Shard(-1)"
            )
        x = self._entered(x)
        values, bias = [_local(f) for f in self.factors], None if self.bias is None else _local(self.bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, *values = (t if t.dtype == torch.float64 or t.is_complex() else t.to(dtype) for t in (x, *values))
            bias = None if bias is None else bias.to(x.dtype)
        if x.dtype != values[0].dtype:
            raise RuntimeError(
                f"StructuredLinear: expected an input of the parameters' dtype {values[0].dtype}, got {x.dtype}"
            )
        y = self.scheme.rows(x.reshape(-1, x.shape[-1]), values, self.mesh)
        y = y if bias is None else y + bias
        y = y.contiguous() if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1]).contiguous()
        if not self.scheme.splits_output:
            return y
        split = DTensor.from_local(y, self.mesh, [Shard(y.ndim - 1)], run_check=False)
        return split.full_tensor() if self.gather else split

    def _entered(self, x: Tensor) -> Tensor:
        """What this process needs of the input: all of it, or its part of the features."""
        if isinstance(x, DTensor):
            if x.device_mesh != self.mesh:
                raise ValueError(f"StructuredLinear: expected an input on {self.mesh}, got one on {x.device_mesh}")
            wanted = Shard(x.ndim - 1) if self.scheme.splits_input else Replicate()
            return x.redistribute(placements=[wanted]).to_local()
        return own_part(x, self.mesh, x.ndim - 1) if self.scheme.splits_input else x

    def _full(self) -> list[Tensor]:
        """All factors, in the shapes in which a layer of one process stores them: one all-gather each."""
        shapes = slots_of(self.spec)[0].values()
        return [_whole(f).reshape(stored_shape(s)) for f, s in zip(self.factors, shapes, strict=True)]

    @property
    def operator(self) -> Operator:
        """The operator ``A``, gathered from all processes: a copy, and a collective call."""
        return self._operator([f.detach() for f in self._full()])

    def to_dense(self) -> Tensor:
        """The dense weight ``(out_features, in_features)`` in every process, differentiable; a collective call."""
        values = self._full()
        eye = torch.eye(self.in_features, dtype=values[0].dtype, device=values[0].device)
        return program_of(self.spec).rows(eye, None, values, []).t().contiguous()

    @torch.no_grad()
    def to_structured(self) -> StructuredLinear:
        """The layer of one process, in every process; a collective call."""
        values = self._full()
        layer = StructuredLinear.from_config(self.config, device=values[0].device, dtype=values[0].dtype)
        for own, full in zip(layer.factors, values, strict=True):
            own.copy_(full)
            own.requires_grad_(self.factors[0].requires_grad)
        if self.bias is not None and layer.bias is not None:
            layer.bias.copy_(_whole(self.bias))
            layer.bias.requires_grad_(self.bias.requires_grad)
        return layer.train(self.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer, in every process; a collective call."""
        return self.to_structured().to_linear()

    def extra_repr(self) -> str:
        """As that of the whole layer, and how it is spread."""
        return f"{super().extra_repr()}, {self.style} over {self.mesh.size()} processes: {self.scheme.communication}"


def _local(x: Any) -> Tensor:
    """The own part of a parameter."""
    return x.to_local() if isinstance(x, DTensor) else x


def _whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
