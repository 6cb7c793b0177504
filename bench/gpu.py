"""One command for all figures of a GPU: ``python bench/gpu.py``; ``--cpu`` is a dry run of the same code at small sizes.

Dense cuBLAS, code in plain torch, structmat on torch and on CuPy in one run; medians of event timings with the second-level
cache flushed in between, ceilings measured in the same run, predictions of the cost model beside the measurements.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_contenders import FAILURES, STRUCTURES, Problem, cell, problem
from gpu_timing import DTYPES, Ceilings, Device, ceilings, tf32
from report import markdown

import structmat as sm
from structmat.backends.cuda import roofline
from structmat.patterns import Pattern

RESULTS = Path(__file__).parent / "results"
SIZES, BATCHES = (1024, 2048, 4096, 8192, 16384), (1, 64, 4096, 65536)
DRY_SIZES, DRY_BATCHES = (64, 128), (1, 7)
MODES = ("forward", "both")
ALLOWED = {"bf16": 3e-2, "fp16": 4e-3, "tf32": 4e-3, "fp32": 1e-5}  # relative error of a result, in the Frobenius norm
HEAD = (
    "structure n B dtype pass",
    "dense ms",
    "x dense",
    "x eager",
    "structmat ms",
    "cupy ms",
    "+-",
    "copy %",
    "flop %",
    "kernels",
    "predicted ms",
    "predicted x dense",
    "plan (CuPy's)",
)


class Row(NamedTuple):
    """One row of the table: seconds by contender, shares of the ceilings, what the cost model said."""

    structure: str
    n: int
    batch: int
    dtype: str
    mode: str
    seconds: dict[str, float]
    spread: float
    copy: float
    flops: float
    memcpy: float  # the better of ours on torch and CuPy over the time of a copy of the operand
    kernels: int
    predicted: float
    predicted_dense: float
    plans: dict[str, str]
    errors: dict[str, float]
    notes: dict[str, str]

    def over(self, name: str) -> float:
        """Times of another contender over ours."""
        return self.seconds[name] / self.seconds["structmat"]

    @property
    def title(self) -> str:
        return f"{self.structure} {self.n} {self.batch} {self.dtype} {self.mode}"

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of HEAD."""
        cupy = self.seconds.get("cupy")
        return (
            self.title,
            f"{self.seconds['dense'] * 1e3:.4g}",
            f"{self.over('dense'):.2f}",
            f"{self.over('eager'):.2f}",
            f"{self.seconds['structmat'] * 1e3:.4g}",
            "-" if cupy is None else f"{cupy * 1e3:.4g}",
            f"{self.spread:.0%}",
            f"{self.copy:.0%}",
            f"{self.flops:.0%}",
            str(self.kernels),
            f"{self.predicted * 1e3:.4g}",
            f"{self.predicted_dense / self.predicted:.2f}",
            self.plans["structmat"] + (f" ({self.plans['cupy']})" if "cupy" in self.plans else ""),
        )


def main(arguments: list[str] | None = None) -> int:
    """Run, print, save; 1 where a result was wrong."""
    options = parsed(arguments)
    if not options.cpu and not torch.cuda.is_available():
        print("bench/gpu.py: torch finds no CUDA device; --cpu is a dry run", file=sys.stderr)
        return 2
    device = Device(options.cpu, options.seconds)
    top = ceilings(device)
    print(machine(device, top))
    rows: list[Row] = []
    with sm.use_backend("torch-op"):  # which CUDA tensors take anyway: the dry run is to go through it too
        for found in measured(options, device, top):
            rows.append(found)
            print("  ".join(found.cells()), flush=True)
    wrong = [f"{row.title}: {name} {e:.1e}" for row in rows for name, e in row.errors.items() if e > ALLOWED[row.dtype]]
    text = page(device, top, rows, wrong)
    print(text[text.index("### Figures") :])
    if options.save:
        path = RESULTS / f"{date.today()}-gpu{'-dry-run' * options.cpu}.md"
        path.write_text(text)
        print(f"wrote bench/results/{path.name}")
    return 1 if wrong else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with the defaults of a device or of a dry run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cpu", action="store_true", help="a dry run on the CPU at small sizes; its times mean nothing"
    )
    parser.add_argument("--n", type=int, nargs="+", help="widths, powers of two")
    parser.add_argument("--batch", type=int, nargs="+", help="rows")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=None, help="of every contender in a row")
    parser.add_argument("--no-save", dest="save", action="store_false", default=None)
    parser.add_argument("--save", action="store_true", help="the default but for a dry run")
    options = parser.parse_args(arguments)
    options.n = options.n or (DRY_SIZES if options.cpu else SIZES)
    options.batch = options.batch or (DRY_BATCHES if options.cpu else BATCHES)
    options.seconds = options.seconds or (1e-3 if options.cpu else 0.2)
    options.save = not options.cpu if options.save is None else options.save
    if any(n < 16 or n & (n - 1) for n in options.n) or min(options.batch) < 1:
        parser.error("expected widths that are powers of two from 16 on, and batches of at least 1")
    return options


def measured(options: argparse.Namespace, device: Device, top: Ceilings) -> Iterator[Row]:
    """Row by row; one that needs more memory than there is is named and left out."""
    for structure, n in itertools.product(options.structures, options.n):
        found = problem(structure, n)
        for batch, dtype, mode in itertools.product(options.batch, options.dtypes, options.modes):
            need = (6 + 6 * (mode == "both")) * batch * n * DTYPES[dtype].itemsize * (4 if "rank" in structure else 1)
            if need > device.free():
                print(f"{structure} {n} {batch} {dtype} {mode}: needs about {need / 1e9:.0f} GB, left out")
                continue
            try:
                with tf32(dtype == "tf32"):
                    made = row(found, batch, dtype, mode, device, top)
            except torch.OutOfMemoryError as error:
                print(f"{structure} {n} {batch} {dtype} {mode}: {str(error).splitlines()[0]}")
                device.release()
                continue
            device.release()
            yield made


def row(found: Problem, batch: int, dtype: str, mode: str, device: Device, top: Ceilings) -> Row:
    """Check every contender, then time it."""
    backward, n = mode == "both", found.operator.shape[1]
    made = cell(found, batch, dtype, backward, device.name)
    errors = {}
    for name, result in made.results.items():
        difference = torch.linalg.norm(result().double() - made.expected)
        errors[name] = float(difference / torch.linalg.norm(made.expected))
    if "cupy" in made.calls:
        try:
            some = made.calls["cupy"]()[: len(made.expected)].astype("float32")
            difference = torch.from_dlpack(some).double() - made.expected
            errors["cupy"] = float(torch.linalg.norm(difference) / torch.linalg.norm(made.expected))
        except FAILURES as error:
            made.calls.pop("cupy")
            made.notes["cupy"] = f"{found.name}, {dtype}: {str(error).splitlines()[0]}"
    times = {name: device.median(call) for name, call in made.calls.items()}
    seconds = {name: taken for name, (taken, _) in times.items()}
    work, dense = predictions(found.operator, n, batch, dtype, backward, made.plans["structmat"])
    rates = roofline.H200 if device.cpu else measured_rates(top)
    kind, precision = KIND[dtype]
    ours = seconds["structmat"]
    return Row(
        structure=found.name,
        n=n,
        batch=batch,
        dtype=dtype,
        mode=mode,
        seconds=seconds,
        spread=times["structmat"][1],
        copy=work.traffic / ours / top.copy,
        flops=work.operations / ours / top.flops[dtype],
        memcpy=min(ours, seconds.get("cupy", ours)) * top.copy / (2 * n * batch * DTYPES[dtype].itemsize),
        kernels=device.kernels(made.calls["structmat"]),
        predicted=roofline.seconds(work, rates, kind, precision),
        predicted_dense=roofline.seconds(dense, rates, kind, precision),
        plans=made.plans,
        errors=errors,
        notes=made.notes,
    )


KIND = {
    "bf16": ("bfloat16", "exact"),
    "fp16": ("float16", "exact"),
    "tf32": ("float32", "tf32"),
    "fp32": ("float32", "exact"),
}


def measured_rates(top: Ceilings) -> roofline.Rates:
    """The cost model's device with the ceilings of this run."""
    flops = {KIND[d][0] if d != "tf32" else "tf32": rate for d, rate in top.flops.items()}
    return roofline.H200._replace(copy=top.copy, flops={**roofline.FLOPS, **flops}, call=2 * top.launch)


def predictions(
    operator: sm.Operator, n: int, batch: int, dtype: str, backward: bool, plan: str
) -> tuple[roofline.Work, roofline.Work]:
    """The work of ours and that of dense: one pass over memory per product, or one pass where it is one kernel.

    Backward: what is computed again, and two products for each one forward.
    """
    size = DTYPES[dtype].itemsize
    dense, patterns = roofline.dense_work(n, n, batch, size), merged_patterns(operator)
    work = roofline.chain_work(patterns, batch, size)
    forward = work
    if plan == "fused":
        weights = sum(p.nparams for p in patterns)
        forward = roofline.Work(work.operations, float(size * (2 * n * batch + weights)))
    if backward:
        dense = roofline.Work(3 * dense.operations, 3 * dense.traffic, 0.0, 3)
        again = 1 - patterns[0].nparams / sum(p.nparams for p in patterns)  # all but the product that comes last
        factor = 2 + again
        operations = forward.operations + factor * work.operations
        traffic = forward.traffic + factor * work.traffic
        forward = roofline.Work(operations, traffic, 0.0, forward.calls + round(factor * work.calls))
    return forward, dense


def merged_patterns(operator: sm.Operator) -> tuple[Pattern, ...]:
    """The factors of a chain of two, or the two that a longer chain and a Kronecker product are merged to."""
    n = operator.shape[1]
    if isinstance(operator, sm.Chain) and len(operator.patterns) <= 2:
        return operator.patterns
    half = 1 << ((n.bit_length() - 1) // 2)
    return Pattern(1, n // half, n // half, half), Pattern(n // half, half, half, 1)


# ---- the page ---------------------------------------------------------------------------------------------------------


def machine(device: Device, top: Ceilings) -> str:
    """Versions and ceilings."""
    if device.cpu:
        title = "DRY RUN on the CPU: the times mean nothing"
    else:
        title = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    try:
        import cupy

        version = cupy.__version__
    except ImportError:
        version = "not installed"
    rates = ", ".join(f"{d} {f / 1e12:.1f} TF/s" for d, f in top.flops.items())
    return "\n".join(
        (
            f"{title}; Python {sys.version.split()[0]}, torch {torch.__version__}, CuPy {version}",
            f"copy {top.copy / 1e12:.2f} TB/s; product {rates}; smallest operation {top.launch * 1e6:.1f} us",
        )
    )


def targets(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """The figures to reach, with the worst row of each; those without a row say so."""

    def worst(what: str, bound: float, measure: Any, chosen: Any, most: bool = False) -> tuple[str, str, str, str]:
        values = [measure(r) for r in rows if chosen(r)]
        sign = "<=" if most else ">="
        if not values:
            return what, f"{sign} {bound:g}", "not in this run", ""
        value = (max if most else min)(values)
        met = value <= bound if most else value >= bound
        return what, f"{sign} {bound:g}", f"{value:.3g}", "met" if met else "NOT MET"

    def large(r: Row, structure: str) -> bool:
        return (r.structure, r.batch, r.mode) == (structure, 65536, "forward")

    found = [("figure", "target", "measured", "")]
    for n, bound in ((4096, 4.0), (8192, 8.0), (16384, 16.0)):
        what = f"Monarch bf16, B = 65536, n = {n}: times dense"
        chosen = lambda r, n=n: large(r, "monarch") and (r.n, r.dtype) == (n, "bf16")  # noqa: E731
        found.append(worst(what, bound, lambda r: r.over("dense"), chosen))
    wide = lambda r: large(r, "monarch") and r.dtype == "bf16" and r.n >= 4096  # noqa: E731
    found.append(worst("Monarch bf16, B = 65536, n >= 4096: share of copy bandwidth", 0.7, lambda r: r.copy, wide))
    found.append(worst("the same: times eager torch", 1.5, lambda r: r.over("eager"), wide))
    structured = lambda r: r.mode == "forward" and r.plans.get("cupy", "dense") != "dense"  # noqa: E731
    what = "CuPy: never slower than dense where the planner chose structure"
    found.append(worst(what, 1.0, lambda r: r.seconds["dense"] / r.seconds["cupy"], structured))
    what = "Hadamard, B = 65536: times a copy"
    found.append(worst(what, 1.3, lambda r: r.memcpy, lambda r: large(r, "hadamard"), most=True))
    half = lambda r: large(r, "kronecker") and r.dtype in ("bf16", "fp16")  # noqa: E731
    found.append(
        worst("Kronecker, 16 bit, B = 65536: times two products in plain torch", 1.5, lambda r: r.over("eager"), half)
    )
    return found


def page(device: Device, top: Ceilings, rows: list[Row], wrong: list[str]) -> str:
    """The results as Markdown."""
    dry = "\n**Dry run on the CPU: every time below is without meaning.**\n" if device.cpu else ""
    notes = sorted({f"{name}: {note}" for r in rows for name, note in r.notes.items()})
    return (
        "\n\n".join(
            (
                f"# GPU: structmat against dense and plain torch, {date.today()}\n{dry}",
                EXPLANATION,
                f"```\n{machine(device, top)}\n```",
                "### Figures to reach",
                markdown(targets(rows)),
                "### Wrong results",
                "\n".join(f"- {w}" for w in wrong) or "None.",
                "### Without a time",
                "\n".join(f"- {n}" for n in notes) or "Nothing.",
                "### All rows",
                markdown([HEAD, *(r.cells() for r in rows)]),
            )
        )
        + "\n"
    )


EXPLANATION = """*x dense*, *x eager*: times of `torch.nn.functional.linear` and of plain torch code over ours, above 1
structmat is faster. *pass*: forward alone, or both: forward and backward with the gradients of operand and factors. *copy %*
and *flop %*: bytes and operations that one pass per product has to move and do, over our time, in parts of the copy and of the
large product of the same dtype measured in this run. *kernels*: launched by one call of ours. *predicted*: by
`structmat/backends/cuda/roofline.py` with the ceilings of this run; a row far from it, on either side, wants an explanation.
*plan*: what the operator says it does. *+-*: half the distance of the quartiles."""


if __name__ == "__main__":
    sys.exit(main())
