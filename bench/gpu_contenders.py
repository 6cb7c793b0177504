"""Contenders of bench/gpu.py: dense, code in plain torch as it is usually written, and structmat on torch and CuPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_timing import DTYPES
from torch import Tensor
from torch.nn import functional

import structmat as sm
from structmat.backends.torch.fused import CurrentStream

Call = Callable[[], Any]
FAILURES = (
    ImportError,
    RuntimeError,
    TypeError,
    ValueError,
    MemoryError,
    BufferError,
)  # that cost a contender its times


class Problem(NamedTuple):
    """An operator of one structure and size in float32 on the host, and how it is written in plain torch."""

    name: str
    operator: sm.Operator
    eager: Callable[..., Tensor]  # rows, arrays of the operator


def problem(structure: str, n: int) -> Problem:
    """The operator of one row of the table."""
    make: dict[str, tuple[Callable[[], sm.Operator], Callable[..., Tensor]]] = {
        "monarch": (lambda: sm.Monarch.random((n, n), dtype="float32", rng=0), eager_monarch),
        "btt rank 4": (lambda: sm.BlockTensorTrain.random((n, n), rank=4, dtype="float32", rng=0), eager_btt),
        "kronecker": (lambda: sm.Kronecker.random((n, n), dtype="float32", rng=0), eager_kronecker),
        "butterfly": (lambda: sm.Butterfly.random((n, n), dtype="float32", rng=0), eager_butterfly),
        "hadamard": (lambda: sm.hadamard(n, dtype="float32"), eager_hadamard),
    }
    operator, eager = make[structure]
    return Problem(structure, operator(), eager)


STRUCTURES = ("monarch", "btt rank 4", "kronecker", "butterfly", "hadamard")


# ---- plain torch, from the formulas -------------------------------------------------------------------------------------


def eager_monarch(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``M = P L P^T R`` by two batched products with a transposition after each, as public code does it."""
    (_, l, s, kr), (k, _, _, p) = left.shape, right.shape  # blocks (1, l, s, k r), (k, 1, r l, p)
    rows = x.shape[0]
    z = torch.bmm(x.reshape(rows, k, p).transpose(0, 1), right[:, 0].transpose(1, 2))  # (k, B, r l)
    z = z.transpose(0, 1).reshape(rows, kr, l).permute(2, 0, 1).contiguous()  # (l, B, k r)
    y = torch.bmm(z, left[0].transpose(1, 2))  # (l, B, s)
    return y.permute(1, 2, 0).reshape(rows, s * l)


def eager_btt(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The same with the output in contiguous blocks."""
    (_, l, s, kr), (k, _, _, p) = left.shape, right.shape
    rows = x.shape[0]
    z = torch.bmm(x.reshape(rows, k, p).transpose(0, 1), right[:, 0].transpose(1, 2))
    z = z.transpose(0, 1).reshape(rows, kr, l).permute(2, 0, 1).contiguous()
    return torch.bmm(z, left[0].transpose(1, 2)).transpose(0, 1).reshape(rows, l * s)


def eager_kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``vec(A X C^T)`` by two products."""
    rows = x.shape[0]
    return (left @ (x.reshape(rows, left.shape[1], right.shape[1]) @ right.T)).reshape(rows, -1)


def eager_butterfly(x: Tensor, *factors: Tensor) -> Tensor:
    """Level by level, each an einsum over pairs."""
    rows = x.shape[0]
    for factor in reversed(factors):
        a, d, _, c = factor.shape
        x = torch.einsum("adbc,xacd->xabd", factor, x.reshape(rows, a, c, d)).reshape(rows, -1)
    return x


def eager_hadamard(x: Tensor, *_: Tensor) -> Tensor:
    """The fast transform: sums and differences of halves, log2(n) times."""
    rows, n = x.shape
    half = n // 2
    while half:
        x = x.reshape(rows, -1, 2, half)
        x = torch.stack((x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]), 2)
        half //= 2
    return x.reshape(rows, n)


# ---- cells --------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The calls of one row of the table, by name; the first is dense, ``structmat`` is ours."""

    calls: dict[str, Call]
    results: dict[str, Callable[[], Tensor]]  # the first rows of each contender's forward pass
    expected: Tensor
    plans: dict[str, str]  # what structmat says it does, by contender
    notes: dict[str, str]


def cell(found: Problem, batch: int, dtype_name: str, backward: bool, device: str) -> Cell:
    """All contenders on the same data."""
    dtype = DTYPES[dtype_name]
    generator = torch.Generator(device).manual_seed(0)
    n = found.operator.shape[1]
    x = torch.randn(batch, n, device=device, generator=generator).to(dtype).requires_grad_(backward)
    dy = torch.randn(batch, found.operator.shape[0], device=device, generator=generator).to(dtype)
    weight = (torch.randn(n, n, device=device, generator=generator) / n**0.5).to(dtype).requires_grad_(backward)
    parts = found.operator.to(torch.device(device)).astype(dtype)
    trained = found.name != "hadamard"
    operator, leaves = live(parts, backward and trained)
    forward: dict[str, Callable[[Tensor], Any]] = {
        "dense": lambda x: functional.linear(x, weight),
        "eager": lambda x: found.eager(x, *leaves),
        "structmat": lambda x: x @ operator.T,
    }
    wanted = {"dense": [x, weight], "eager": [x, *leaves] if trained else [x]}
    wanted["structmat"] = wanted["eager"]
    calls: dict[str, Call] = {name: step(f, x, dy, wanted[name] if backward else []) for name, f in forward.items()}
    notes: dict[str, str] = {}
    plans = {"structmat": operator.plan(batch, rows=True).kernel}
    if not backward:
        cupy_call(parts, x, calls, plans, notes)
    some = x[: min(batch, 16)].detach()
    results = {name: (lambda f=f: f(some).detach()) for name, f in forward.items() if name != "dense"}
    exact = [v.detach().double() for v in leaves]
    return Cell(calls, results, found.eager(some.double(), *exact), plans, notes)


def live(operator: sm.Operator, grad: bool) -> tuple[sm.Operator, list[Tensor]]:
    """The operator over leaves of autograd."""
    leaves = [v.detach().clone().requires_grad_(grad) for v in operator.arrays]
    replace = {id(old): new for old, new in zip(operator.arrays, leaves, strict=True)}
    return operator._map(lambda v: replace[id(v)]), leaves


def step(forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, wanted: list[Tensor]) -> Call:
    """Forward alone, or forward and backward where something is wanted."""
    if not wanted:
        return torch.no_grad()(lambda: forward(x))
    return lambda: torch.autograd.grad(forward(x), wanted, dy)


def cupy_call(
    operator: sm.Operator, x: Tensor, calls: dict[str, Call], plans: dict[str, str], notes: dict[str, str]
) -> None:
    """The same operator on CuPy arrays, on torch's stream."""
    try:
        import cupy

        on_cupy = operator.to("cupy")
        operand = cupy.from_dlpack(x.detach())
    except FAILURES as error:
        notes["cupy"] = str(error).split("\n")[0]
        return
    stream = cupy.cuda.Stream.from_external(CurrentStream())

    def call() -> Any:
        with stream:
            return operand @ on_cupy.T

    calls["cupy"] = call
    with stream:
        plans["cupy"] = on_cupy.plan(x.shape[0], rows=True).kernel
