"""What StructuredLinear works with: every feature of torch against every family, each cell the result of running it.

``python bench/compatibility.py`` prints the table; ``bench/nn.py --save`` includes it. A cell is ``yes`` (or what share of the
flops torch counts), or the number of a note with the error.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import structmat as sm
import structmat.nn as snn

N, M = 8, 6  # in and out


def families() -> dict[str, Callable[[torch.dtype], snn.StructuredLinear]]:
    """Makers of a layer of every family, for a dtype."""

    def new(
        structure: str | type[sm.Operator], shape: tuple[int, int] = (M, N), **options: object
    ) -> Callable[..., snn.StructuredLinear]:
        return lambda dtype: snn.StructuredLinear(shape[1], shape[0], structure=structure, dtype=dtype, **options)

    def of(operator: sm.Operator) -> Callable[..., snn.StructuredLinear]:
        bias = torch.ones(operator.shape[0], dtype=torch.float64)
        return lambda dtype: snn.StructuredLinear.from_operator(operator, bias, dtype=dtype)

    rng = np.random.default_rng(0)
    monarch, low = sm.Monarch.random((M, N), rng=rng), sm.LowRank.random((M, N), rank=2, rng=rng)
    return {
        "btt": new("btt"),
        "btt, rank 2": new("btt", blocks=2, rank=2),
        "btt, 3 cores": new("btt", cores=3, rank=2),
        "monarch": new("monarch"),
        "monarch, padded": new("monarch", (7, 11), rank=2),
        "low_rank": new("low_rank", rank=2),
        "kronecker": new("kronecker"),
        "butterfly": new("butterfly"),
        "block_diagonal": new("block_diagonal"),
        "pixelfly": new("pixelfly"),
        "chain": new("chain"),
        "dense": new("dense"),
        "Interpolative": new(sm.Interpolative),
        "InterpolativeBlocks": new(sm.InterpolativeBlocks, rank=2, blocks=2),
        "Toeplitz": new(sm.Toeplitz),
        "Circulant": new(sm.Circulant, (N, N)),
        "Diagonal": new(sm.Diagonal, (N, N)),
        "BlockSparse": new(sm.BlockSparse),
        "sum": of(monarch + low),
        "product": of(monarch @ sm.Permutation(rng.permutation(N)) @ (0.5 * sm.Diagonal(rng.standard_normal(N)))),
        "stack": of(sm.vstack([sm.hstack([monarch, low]), sm.block_diag(low, monarch)])),
        "slice": of(sm.Monarch.random((9, 9), rng=rng)[1:7, :8]),
    }


def rows(layer: snn.StructuredLinear, *lead: int, grad: bool = False) -> torch.Tensor:
    """A batch in the dtype of the layer."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*lead, layer.in_features, generator=generator, dtype=torch.float64).to(layer.factors[0].dtype)
    return x.requires_grad_(grad)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """An ``AssertionError`` where two results differ by more than float32 rounding."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ---- features -------------------------------------------------------------------------------------------------------


def shapes(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """One sample, no sample, strides, against the dense layer."""
    layer = make(torch.float32)
    linear, x = layer.to_linear(), rows(layer, 4, 3)
    for part in (x, x[0, 0], x[:0], x[:, :0], x.transpose(0, 1), x[:, ::2], x.flip(-1)[..., ::1], x[None, :, None]):
        close(layer(part), linear(part))
    empty = x[:0].clone().requires_grad_()
    layer(empty).sum().backward()
    if empty.grad is None or any(p.grad is None or float(p.grad.abs().sum()) for p in layer.parameters()):
        raise AssertionError("gradients of an empty batch are not zero")


def gradients(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """gradcheck and gradgradcheck."""
    layer = make(torch.float64)
    names = [n for n, _ in layer.named_parameters()]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    inputs = (rows(layer, 3, grad=True), *layer.parameters())
    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)


def compiled(make: Callable[[torch.dtype], snn.StructuredLinear], backend: str = "inductor") -> None:
    """``torch.compile(fullgraph=True, dynamic=True)``, no graph break, forward and backward, several batch sizes."""
    torch._dynamo.reset()
    layer = make(torch.float32)
    if torch._dynamo.explain(layer)(rows(layer, 4, 3)).graph_break_count:
        raise AssertionError("graph breaks")
    call = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for lead in ((4, 3), (5, 2)):
        x = rows(layer, *lead, grad=True)
        wanted = [x, *layer.parameters()]
        expected = torch.autograd.grad(layer(x).square().sum(), wanted)
        for a, b in zip(torch.autograd.grad(call(x).square().sum(), wanted), expected, strict=True):
            close(a, b)


def exported(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """``torch.export`` with dynamic batch and sequence, strict and not."""
    layer = make(torch.float32)
    sizes = {i: torch.export.Dim(name, min=2, max=1 << 20) for i, name in enumerate(("batch", "tokens"))}
    for strict in (False, True):
        program = torch.export.export(layer, (rows(layer, 4, 3),), dynamic_shapes={"x": sizes}, strict=strict)
        close(program.module()(rows(layer, 6, 5)), layer(rows(layer, 6, 5)))


def onnx(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """``torch.onnx.export(dynamo=True)`` with dynamic sizes, evaluated by ONNX's reference implementation."""
    from onnx.reference import ReferenceEvaluator

    layer = make(torch.float32)
    sizes = {i: torch.export.Dim(name, min=2, max=4096) for i, name in enumerate(("batch", "tokens"))}
    program = torch.onnx.export(layer, (rows(layer, 4, 3),), dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    if program is None:
        raise AssertionError("no program")
    got = ReferenceEvaluator(program.model_proto).run(None, {"x": rows(layer, 6, 5).numpy()})[0]
    close(torch.from_numpy(got), layer(rows(layer, 6, 5)).detach())


def autocast(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """The dtype of the result, or the refusal, for parameters x inputs x autocast, as ``nn.Linear``."""

    def outcome(module: nn.Module, x: torch.Tensor, enabled: bool) -> object:
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = module(x)
            y.float().sum().backward()
        except RuntimeError:
            return RuntimeError
        return y.dtype

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        layer = make(dtype)
        linear = nn.Linear(layer.in_features, layer.out_features, dtype=dtype)
        for given in (torch.float32, torch.float64, torch.bfloat16):
            for enabled in (False, True):
                x = torch.ones(3, layer.in_features, dtype=given)
                mine, theirs = outcome(layer, x, enabled), outcome(linear, x, enabled)
                if mine != theirs:
                    raise AssertionError(f"{dtype} x {given}, autocast {enabled}: {mine}, nn.Linear: {theirs}")


def per_sample(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """``vmap(grad)``: gradients per sample add up to the gradient."""
    layer = make(torch.float64)
    x = rows(layer, 4, 3)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x)
    for got, total in zip(samples.values(), expected, strict=True):
        close(got.sum(0), total)


@torch.no_grad()
def tangents(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """Forward-mode differentiation."""
    layer = make(torch.float64)
    x, v = rows(layer, 4), rows(layer, 4).flip(0)
    close(torch.func.jvp(layer, (x,), (v,))[1], v @ layer.to_dense().T)


def checkpointed(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """Gradient checkpointing, in both forms."""
    layer = make(torch.float64)
    x = rows(layer, 4, 3, grad=True)
    wanted = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x).square().sum(), wanted)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), wanted)
    checkpoint(layer, x, use_reentrant=True).square().sum().backward()
    for a, b, c in zip(plain, again, wanted, strict=True):
        close(b, a)
        close(c.grad, a)


def counted(make: Callable[[torch.dtype], snn.StructuredLinear]) -> str:
    """The share of the flops that ``FlopCounterMode`` sees: products, no additions, diagonals or FFTs; thrice with backward."""
    layer = make(torch.float32)
    with FlopCounterMode(display=False) as counter:
        layer(rows(layer, 5, 3))
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        layer(rows(layer, 5, 3, grad=True)).sum().backward()
    if counter.get_total_flops() != 3 * forward:
        raise AssertionError(f"{counter.get_total_flops() / forward:.2f} times with the backward pass")
    return f"{forward / layer.flops(15):.0%}"


def copied(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """deepcopy and pickle, bit by bit."""
    layer = make(torch.float32)
    x = rows(layer, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        if not torch.equal(other(x), layer(x)):
            raise AssertionError("a copy differs")


def on_meta(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """Made, called and given memory on the meta device."""
    layer = make(torch.float32)
    empty = snn.StructuredLinear.from_config(layer.config, device="meta")
    if empty(torch.empty(2, 3, layer.in_features, device="meta")).shape != (2, 3, layer.out_features):
        raise AssertionError("another shape")
    filled = empty.to_empty(device="cpu")
    filled.reset_parameters()
    if not torch.isfinite(filled(rows(layer, 4))).all():
        raise AssertionError("not finite")


def saved(make: Callable[[torch.dtype], snn.StructuredLinear]) -> None:
    """A state dict through a file into a layer made from the configuration as JSON, strict and bit by bit."""
    layer = make(torch.float32)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = snn.StructuredLinear.from_config(json.loads(json.dumps(layer.config)))
    other.load_state_dict(torch.load(file), strict=True)
    if not torch.equal(other(rows(layer, 4)), layer(rows(layer, 4))):
        raise AssertionError("another result")


FEATURES: dict[str, Callable[..., str | None]] = {
    "shapes": shapes,
    "gradgradcheck": gradients,
    "compile": compiled,
    "export": exported,
    "ONNX": onnx,
    "autocast": autocast,
    "vmap(grad)": per_sample,
    "jvp": tangents,
    "checkpoint": checkpointed,
    "FlopCounter": counted,
    "deepcopy": copied,
    "meta": on_meta,
    "state_dict": saved,
}


def table(only: str = "", skip: str = "") -> str:
    """Markdown: a line per family, a column per feature."""
    features = {k: f for k, f in FEATURES.items() if only in k and (not skip or skip not in k)}
    lines = [f"| family | {' | '.join(features)} |", "|---|" + "---|" * len(features)]
    notes: list[str] = []
    for name, make in families().items():
        cells = [cell(check, make, notes, f"{name}, {feature}") for feature, check in features.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes])


def cell(check: Callable[..., str | None], make: Callable[..., object], notes: list[str], where: str) -> str:
    """``yes``, or the number of a note that says what went wrong."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(make) or "yes"
    except Exception as error:  # whatever it is, it is what the table is for
        notes.append(
            f"{len(notes) + 1}. {where}: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]}"
        )
        return f"no [{len(notes)}]"


if __name__ == "__main__":
    import sys

    print(table(*sys.argv[1:]))
