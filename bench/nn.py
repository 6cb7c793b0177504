"""StructuredLinear against nn.Linear and autograd through reshapes: time and memory of forward and backward, inference.

``python bench/nn.py [--quick] [--save]``; one thread, process time, contenders taking turns; ratios are to nn.Linear in the
same run. ``--save`` adds what the layer works with (``compatibility.py``) and writes ``results/DATE-nn.md``.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compatibility
import torch
from timing import measure, relative_error, set_threads
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import structmat.nn as snn

RESULTS = Path(__file__).parent / "results"


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


F, B = torch.float32, torch.bfloat16
# (structure, width, options, dtype, target against nn.Linear, target against autograd); 512 rows
TRAINING = (
    ("monarch", 4096, {"blocks": 64}, F, 7.0, 2.5),
    ("btt", 4096, {"blocks": 64}, F, 7.0, 2.5),
    ("monarch", 1024, {"blocks": 32}, F, 2.5, 2.0),
    ("btt", 1024, {"blocks": 32}, F, 2.5, 2.0),
    ("low_rank", 4096, {"rank": 128}, F, 13.0, None),
    ("kronecker", 4096, {}, F, None, None),
    ("butterfly", 1024, {}, F, None, None),
    ("butterfly", 2048, {}, F, None, None),
    ("butterfly", 4096, {}, F, None, None),
    ("monarch", 4096, {"blocks": 64}, B, 2.5, 2.5),
    ("btt", 4096, {"blocks": 64}, B, 2.5, 2.5),
    ("monarch", 1024, {"blocks": 32}, B, None, 2.0),
    ("low_rank", 4096, {"rank": 128}, B, None, None),
    ("butterfly", 4096, {}, B, None, None),
)
INFERENCE = (  # (structure, width, options, rows, dtype, target)
    ("monarch", 4096, {"blocks": 64}, 4096, F, 12.0),
    ("btt", 4096, {"blocks": 64}, 4096, F, 12.0),
    ("monarch", 4096, {"blocks": 64}, 512, B, None),
    ("butterfly", 1024, {}, 512, F, None),
    ("butterfly", 4096, {}, 512, F, None),
    ("low_rank", 4096, {"rank": 128}, 512, F, None),
)
ROWS = 512


def main() -> None:
    """Print the tables, and save them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, without batches of 4096")
    parser.add_argument("--save", action="store_true", help="with the compatibility matrix, into bench/results")
    parser.add_argument("--resident", nargs=3, metavar=("WHAT", "WIDTH", "BLOCKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_threads(1)
    torch.set_num_threads(1)  # again: Numba's first use sets the count of the OpenMP library that torch uses too
    torch.manual_seed(0)
    if options.resident:
        what, width, blocks = options.resident
        print(resident(what, int(width), int(blocks)))
        return
    seconds = 1.0 if options.quick else 4.0
    written = [show(heading())]
    written.append(show("### Forward and backward, 512 rows\n"))
    head = "| layer | dtype | nn.Linear, ms | x nn.Linear | target | x autograd of reshapes | target | saved beside x, MB |"
    written.append(show(head + "\n" + "|---|" + "---|" * 7))
    written += [show(training(*case, seconds)) for case in TRAINING]
    written.append(show("\n### How fast it could be: products of blocks alone, forward and backward, 512 rows\n"))
    written += [show(roofline(4096, 64, seconds)), show(roofline(1024, 32, seconds))]
    written.append(show("\n### Peak memory of forward and backward beside parameters and x, 512 rows, float32\n"))
    written.append(show("| layer | allocated at most, MB | growth of the resident set, MB |\n|---|---|---|"))
    written += [
        show(memory(what, d, k)) for d, k in ((4096, 64), (1024, 32)) for what in ("nn.Linear", "monarch", "autograd")
    ]
    written.append(
        show("\n### Inference\n\n| layer | dtype | nn.Linear, ms | x nn.Linear | target |\n|---|---|---|---|---|")
    )
    written += [show(inference(*case, seconds)) for case in INFERENCE if case[3] < 4096 or not options.quick]
    if options.save:
        written.append(show("\n### Compatibility matrix, every cell run\n\n" + compatibility.table()))
        (RESULTS / f"{datetime.date.today()}-nn.md").write_text("\n".join(written) + "\n")


def show(text: str) -> str:
    """Print and return."""
    print(text, flush=True)
    return text


def heading() -> str:
    """What was run on what."""
    date = datetime.date.today()
    machine = (
        f"a shared two-core {platform.machine()} machine; python {platform.python_version()}, torch {torch.__version__}"
    )
    return (
        f"# nn.Linear's replacement, {date}\n\n`python bench/nn.py --save`, one thread of {machine}. CPU time of contenders "
        "that take turns, median; `x` is their time over ours. Targets are those of the project; below the first table is what "
        "bounds those that are missed.\n"
    )


def training(
    structure: str, d: int, arguments: dict[str, Any], dtype: torch.dtype, target: Any, against: Any, seconds: float
) -> str:
    """One row: ratios, and the bytes kept for the backward pass beyond input and parameters."""
    layer = snn.StructuredLinear(d, d, bias=False, structure=structure, dtype=dtype, **arguments)
    x = torch.randn(ROWS, d).to(dtype).requires_grad_()
    contenders = {"dense": nn.Linear(d, d, bias=False, dtype=dtype), structure: layer}
    if against is not None:
        contenders["autograd"] = Reshaped(layer)
    calls = {name: step(module, x, torch.randn(ROWS, d).to(dtype)) for name, module in contenders.items()}
    if structure == "monarch":
        error = relative_error(layer(x).detach().float(), contenders["autograd"](x).detach().float().numpy())
        if error > (1e-3 if dtype == F else 3e-2):
            raise SystemExit(f"{structure}: the contenders differ by {error:.1e}")
    for call in calls.values():
        call()
    times = {name: t.cpu for name, t in measure(calls, seconds=seconds).items()}
    other = f"{times['autograd'] / times[structure]:.2f} | {against}" if against else "- | -"
    return (
        f"| {name_of(structure, d, arguments)} | {str(dtype).removeprefix('torch.')} | {times['dense'] * 1e3:.1f} "
        f"| {times['dense'] / times[structure]:.2f} | {target or '-'} | {other} | {saved(layer, x) / 1e6:.1f} |"
    )


def name_of(structure: str, d: int, arguments: dict[str, Any]) -> str:
    """Structure, size and options."""
    return ", ".join([f"{structure} {d}", *(f"{v} {k}" if k == "blocks" else f"{k} {v}" for k, v in arguments.items())])


def step(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward with fresh gradients."""

    def call() -> None:
        forget(module, x)
        module(x).backward(dy)

    return call


def forget(module: nn.Module, x: Tensor) -> None:
    """Drop all gradients."""
    x.grad = None
    for p in module.parameters():
        p.grad = None


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


def roofline(d: int, blocks: int, seconds: float) -> str:
    """What the products of a two-factor layer take on contiguous blocks, and so what no layer of ``bmm`` can beat."""
    p = d // blocks
    K, z, g = torch.randn(blocks, p, p), torch.randn(blocks, p, ROWS), torch.randn(blocks, p, ROWS)
    layer = snn.StructuredLinear(d, d, bias=False, structure="monarch", blocks=blocks)
    x, dy, y = torch.randn(ROWS, d).requires_grad_(), torch.randn(ROWS, d), torch.empty(ROWS, d)
    calls = {
        "applied": lambda: torch.bmm(K, z),
        "outer": lambda: torch.bmm(g, z.transpose(1, 2)),
        "order": lambda: y.view(-1, blocks).copy_(dy.view(blocks, -1).t()),
        "autograd": step(Reshaped(layer), x, dy),
        "monarch": step(layer, x, dy),
        "btt": step(snn.StructuredLinear(d, d, bias=False, structure="btt", blocks=blocks), x, dy),
    }
    for call in calls.values():
        call()
    times = {name: t.cpu for name, t in measure(calls, seconds=seconds).items()}
    flops, products = 2 * ROWS * d * p, 5 * times["applied"] + 2 * times["outer"]
    least = {"btt": products, "monarch": products + 2 * times["order"]}
    rates = f"{flops / times['applied'] / 1e9:.0f} and {flops / times['outer'] / 1e9:.0f} GFLOP/s"
    lines = [
        f"* {blocks} blocks of {p}x{p} (d={d}): one product {times['applied'] * 1e3:.2f} ms, one gradient of a factor "
        f"{times['outer'] * 1e3:.2f} ms ({rates}); Monarch's order of the outputs {times['order'] * 1e3:.2f} ms.",
        "  A layer that saves nothing but x makes seven products (the intermediate twice), Monarch two transpositions:",
    ]
    lines += [
        f"  {name}: at least {bound * 1e3:.1f} ms, which is {times['autograd'] / bound:.2f} times autograd of reshapes "
        f"({times['autograd'] * 1e3:.1f} ms); measured {times[name] * 1e3:.1f} ms, {bound / times[name]:.0%} of that limit."
        for name, bound in least.items()
    ]
    return "\n".join(lines)


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(what: str, d: int, blocks: int) -> str:
    """One row: bytes that torch's allocator handed out at most at a time, and the peak of a process of its own."""
    module, x, dy = training_case(what, d, blocks)
    call = step(module, x, dy)
    call()
    forget(module, x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    command = [sys.executable, __file__, "--resident", what, str(d), str(blocks)]
    grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    return f"| {what} {d} | {most / 1e6:.1f} | {grown} |"


def training_case(what: str, d: int, blocks: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer and its rows; ``autograd`` is the Monarch layer of reshapes."""
    layer = snn.StructuredLinear(d, d, bias=False, structure="monarch", blocks=blocks)
    modules = {
        "nn.Linear": lambda: nn.Linear(d, d, bias=False),
        "monarch": lambda: layer,
        "autograd": lambda: Reshaped(layer),
    }
    return modules[what](), torch.randn(ROWS, d).requires_grad_(), torch.randn(ROWS, d)


def resident(what: str, d: int, blocks: int) -> str:
    """Megabytes by which the resident set of this process grew at its peak (Linux), after a first small step."""
    module, x, dy = training_case(what, d, blocks)
    step(module, x[:1].detach().requires_grad_(), dy[:1])()
    forget(module, x)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step(module, x, dy)()
    return f"{(status('VmHWM') - before) / 1e3:.1f}"


def status(key: str) -> int:
    """Kilobytes of this process by one of the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


# ---- inference ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def inference(
    structure: str, d: int, arguments: dict[str, Any], rows: int, dtype: torch.dtype, target: Any, seconds: float
) -> str:
    """One row."""
    layer = snn.StructuredLinear(d, d, structure=structure, dtype=dtype, **arguments)
    dense, x = nn.Linear(d, d, dtype=dtype), torch.randn(rows, d).to(dtype)
    calls = {"dense": torch.no_grad()(lambda: dense(x)), structure: torch.no_grad()(lambda: layer(x))}
    expected = nn.functional.linear(x[:32], layer.to_dense(), layer.bias)
    if relative_error(layer(x)[:32].float(), expected.float().numpy()) > (1e-4 if dtype == F else 3e-2):
        raise SystemExit(f"{structure}: wrong result")
    for call in calls.values():
        call()
    times = {name: t.cpu for name, t in measure(calls, seconds=seconds).items()}
    return (
        f"| {name_of(structure, d, arguments)}, {rows} rows | {str(dtype).removeprefix('torch.')} "
        f"| {times['dense'] * 1e3:.1f} | {times['dense'] / times[structure]:.2f} | {target or '-'} |"
    )


if __name__ == "__main__":
    main()
