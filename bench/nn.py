"""StructuredLinear against nn.Linear and against autograd through reshapes: forward and backward, inference, peak memory.

``python bench/nn.py [--quick]``; one thread, process time, contenders taking turns; ratios are to nn.Linear in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import measure, relative_error, set_threads
from torch import Tensor, nn

import structmat.nn as snn


class Reshaped(nn.Module):
    """A Monarch layer as it is usually written: two einsums and reshapes, differentiated by autograd."""

    def __init__(self, layer: snn.StructuredLinear) -> None:
        super().__init__()
        left, right = (nn.Parameter(f.detach().clone()) for f in layer.factors)
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        """Rows."""
        k, _, p = self.right.shape
        l, s, r = self.left.shape
        z = torch.einsum("bkp,kqp->bkq", x.view(-1, k, p), self.right).reshape(-1, r, l)
        return torch.einsum("brj,jsr->bsj", z, self.left).reshape(-1, s * l)


# (what, structure, width, options, batch, dtype, target against nn.Linear, target against autograd)
TRAINING = (
    ("monarch", 4096, {"blocks": 64}, 512, torch.float32, 7.0, 2.5),
    ("btt", 4096, {"blocks": 64}, 512, torch.float32, 7.0, 2.5),
    ("monarch", 1024, {"blocks": 32}, 512, torch.float32, 2.5, 2.0),
    ("btt", 1024, {"blocks": 32}, 512, torch.float32, 2.5, 2.0),
    ("low_rank", 4096, {"rank": 128}, 512, torch.float32, 13.0, None),
    ("monarch", 4096, {"blocks": 64}, 512, torch.bfloat16, 2.5, None),
    ("btt", 4096, {"blocks": 64}, 512, torch.bfloat16, 2.5, None),
    ("kronecker", 4096, {}, 512, torch.float32, None, None),
    ("butterfly", 4096, {}, 512, torch.float32, None, None),
)
INFERENCE = (
    ("monarch", 4096, {"blocks": 64}, 4096, 12.0),
    ("btt", 4096, {"blocks": 64}, 4096, 12.0),
    ("butterfly", 4096, {}, 512, None),
    ("low_rank", 4096, {"rank": 128}, 512, None),
)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without batches of 4096")
    options = parser.parse_args()
    set_threads(1)
    torch.set_num_threads(1)  # again: Numba's first use sets the count of the OpenMP library that torch uses too
    torch.manual_seed(0)
    print("forward and backward, one thread\n")
    print(f"{'layer':34} {'nn.Linear':>10} {'x dense':>8} {'target':>7} {'x autograd':>11} {'target':>7} {'saved':>8}")
    for structure, d, arguments, batch, dtype, target, against in TRAINING:
        training(structure, d, arguments, batch, dtype, target, against)
    print("\ninference, float32, one thread\n")
    for structure, d, arguments, batch, target in INFERENCE:
        if batch < 4096 or not options.quick:
            inference(structure, d, arguments, batch, target)


def training(
    structure: str,
    d: int,
    arguments: dict[str, int],
    batch: int,
    dtype: torch.dtype,
    target: float | None,
    against: float | None,
) -> None:
    """One row: ratios, and the bytes kept for the backward pass beyond input and parameters."""
    layer = snn.StructuredLinear(d, d, bias=False, structure=structure, dtype=dtype, **arguments)
    x = torch.randn(batch, d).to(dtype).requires_grad_()
    contenders = {"dense": nn.Linear(d, d, bias=False, dtype=dtype), structure: layer}
    if against is not None:
        contenders["autograd"] = Reshaped(layer)
    calls = {name: step(module, x, torch.randn(batch, d).to(dtype)) for name, module in contenders.items()}
    if structure == "monarch":
        error = relative_error(layer(x).detach().float(), contenders.get("autograd", layer)(x).detach().float().numpy())
        if error > 1e-3:
            raise SystemExit(f"{structure}: the contenders differ by {error:.1e}")
    for call in calls.values():
        call()
    times = {name: t.cpu for name, t in measure(calls, seconds=3).items()}
    what = f"{structure} {d}, {arguments}, B={batch}, {str(dtype).removeprefix('torch.')}"
    ratio = f"{times['dense'] / times[structure]:8.2f} {target or '-':>7}"
    other = f"{times['autograd'] / times[structure]:11.2f} {against:>7}" if against else f"{'-':>11} {'-':>7}"
    print(f"{what:34} {times['dense'] * 1e3:7.1f} ms {ratio} {other} {saved(layer, x) / 1e6:5.1f} MB", flush=True)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward with fresh gradients."""

    def call() -> None:
        for p in module.parameters():
            p.grad = None
        x.grad = None
        module(x).backward(dy)

    return call


def saved(layer: snn.StructuredLinear, x: Tensor) -> int:
    """Bytes kept for the backward pass, without the input and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(kept.values())


@torch.no_grad()
def inference(structure: str, d: int, arguments: dict[str, int], batch: int, target: float | None) -> None:
    """One row."""
    layer, dense = snn.StructuredLinear(d, d, structure=structure, **arguments), nn.Linear(d, d)
    x = torch.randn(batch, d)
    calls = {"dense": torch.no_grad()(lambda: dense(x)), structure: torch.no_grad()(lambda: layer(x))}
    expected = nn.functional.linear(x[:32], layer.to_dense(), layer.bias)
    if relative_error(layer(x)[:32], expected.numpy()) > 1e-4:
        raise SystemExit(f"{structure}: wrong result")
    for call in calls.values():
        call()
    times = {name: t.cpu for name, t in measure(calls, seconds=3).items()}
    what = f"{structure} {d}, {arguments}, B={batch}"
    ratio = times["dense"] / times[structure]
    print(f"{what:34} {times['dense'] * 1e3:7.1f} ms {ratio:8.2f} {target or '-':>7}", flush=True)


if __name__ == "__main__":
    main()
