"""Inference on the CPU: the compiled row kernels of the Numba backend on the parameters' memory."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.backends.base import ChainLayout

LEAST_ROWS = 16  # below, making sure that the packed values are current costs too much beside the product
LEAST_ROWS_OF_DENSE = 1024  # of products of dense factors, for which BLAS is as good up to there


class Inference:
    """The plan of a chain in the Numba backend, made again whenever a parameter has changed.

    The kernels pack copies of the values. What is packed is current if memory, version counter and fingerprint of every
    factor are what they were; the fingerprint is there because a write through ``.data`` is no new version.
    """

    def __init__(self, layout: ChainLayout) -> None:
        self.layout = layout
        self._plan: Any = None
        self._key: tuple[Any, ...] = ()

    def __getstate__(self) -> ChainLayout:
        return self.layout  # a copy of a layer, or one read from a file, makes its own plan

    def __setstate__(self, state: ChainLayout) -> None:
        self.__init__(state)

    def rows(self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]) -> Tensor | None:
        """``x A^T + bias`` for factors ``(blocks, b, c)``; None where a gradient is wanted or no kernel is faster."""
        least = LEAST_ROWS_OF_DENSE if all(p.a * p.d == 1 for p in self.layout.patterns) else LEAST_ROWS
        if x.shape[0] < least or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
            return None
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *factors)):
            return None
        if not _numba():
            return None
        key = tuple(_state(f) for f in factors)
        if self._plan is None or key != self._key:
            self._plan, self._key = self._made(factors), key
        threads = torch.get_num_threads()
        y = torch.from_numpy(self._plan.rows(x.detach().numpy()))
        if (
            torch.get_num_threads() != threads
        ):  # Numba's first use sets the count of the OpenMP library that torch uses too
            torch.set_num_threads(threads)
        return y if bias is None else y.add_(bias.detach())

    def _made(self, factors: Sequence[Tensor]) -> Any:
        from structmat.backends.numba import NumbaBackend

        shapes = [(p.a, p.d, p.b, p.c) for p in self.layout.patterns]
        # of a copy: FSDP frees a parameter's memory between calls, and cannot where NumPy has seen it
        blocks = [f.detach().clone().numpy().reshape(s) for f, s in zip(factors, shapes, strict=True)]
        return NumbaBackend().chain(self.layout, blocks)


def _state(factor: Tensor) -> tuple[Any, ...]:
    """What changes when the values do: memory, version, and a product with fixed random numbers."""
    version = -1 if factor.is_inference() else factor._version
    flat = factor.detach().reshape(-1)
    return factor.data_ptr(), version, float(torch.dot(flat, _weights(flat.numel(), flat.dtype)))


_kept: dict[torch.dtype, Tensor] = {}


def _weights(size: int, dtype: torch.dtype) -> Tensor:
    """Random numbers of magnitude about 1, the same ones for every factor."""
    kept = _kept.get(dtype)
    if kept is None or kept.numel() < size:
        generator = torch.Generator().manual_seed(0)
        kept = _kept[dtype] = torch.randn(2 * size, generator=generator, dtype=dtype)
    return kept[:size]


@functools.cache
def _numba() -> bool:
    return importlib.util.find_spec("numba") is not None
