"""What is printed and saved: lines of cells, verdicts of the targets, lost cells, Markdown, JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from ceilings import Ceilings
from cells import Cell
from latency import compiler, load
from peers import default_backend, versions
from targets import verdicts

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
COLUMNS = ("dense numpy", "dense torch", "numpy", "best peer")
HEAD = (
    "cell",
    "x dense NumPy",
    "x dense torch",
    "x NumPy chain",
    "x best peer",
    "roofline",
    "us",
    "+-",
    "A/A",
    "each peer",
)


def head(ceilings: Ceilings, threads: int) -> None:
    """The machine and the columns."""
    print(machine(ceilings, threads))
    print(
        f"{'cell':44}{'x numpy':>9}{'x torch':>9}{'x chain':>9}{'x peer':>9}{'roof':>7}{'us':>11}{'+-':>6}{'A/A':>6}  each peer"
    )


def machine(ceilings: Ceilings, threads: int) -> str:
    """Versions, ceilings and load, in four lines."""
    installed = ", ".join(f"{name} {number}" for name, number in versions().items())
    peak = ", ".join(f"{t} {p / 1e9:.0f} GF/s" for t, p in ceilings.peak.items())
    bandwidth = ", ".join(f"{s / 2**20:g} MB {b / 1e9:.0f} GB/s" for s, b in ceilings.bandwidth.items())
    busy = load()
    return "\n".join(
        (
            f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores, {processor()}, Python "
            f"{platform.python_version()}; NumPy arrays go to the {default_backend()} backend (numba: {compiler()})",
            f"{installed}",
            f"GEMM {peak}; copy or triad {bandwidth}",
            f"load {busy:.1f}" if busy is not None else "load unknown",
        )
    )


def processor() -> str:
    """The name of the CPU where the system tells it."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", path.read_text()) if path.exists() else []
    return names[0] if names else platform.machine()


def fields(cell: Cell) -> tuple[str, ...]:
    """Ratios first, in the order of HEAD; a dash where there is nothing."""
    chain = cell.best("numpy")
    ratios = [cell.ratio(name) if name != "numpy" else chain and cell.ratio(chain[0]) for name in COLUMNS]
    best, own = cell.best("peer"), cell.seconds("structmat")
    texts = ["-" if r is None else f"{r:.2f}" for r in ratios]
    if best:
        texts[-1] += "*" if cell.times[best[0]].rounds < 3 else ""
    roof, spread = cell.share_of_roof, cell.spread
    return (
        cell.title(),
        *texts,
        "-" if roof is None else f"{roof:.0%}",
        cell.notes.get("structmat", "-") if own is None else f"{own * 1e6:.1f}",
        "-" if spread is None else f"{spread:.0%}",
        "-" if cell.noise is None else f"{cell.noise:.0%}",
        "; ".join(others(cell)),
    )


def others(cell: Cell) -> Iterator[str]:
    """Every peer, yardstick and missing contender of a cell."""
    for name, role in cell.roles.items():
        ratio = cell.ratio(name)
        if role in ("peer", "yardstick") and ratio is not None:
            yield f"{name} {ratio:.2f}"
        elif name in cell.notes and name != "structmat":
            yield f"{name} {cell.notes[name]}"


def line(cell: Cell) -> str:
    title, *numbers, each = fields(cell)
    widths = (9, 9, 9, 9, 7, 11, 6, 6)
    return f"{title:44}" + "".join(f"{n:>{w}}" for n, w in zip(numbers, widths, strict=True)) + f"  {each}"


def summary(cells: list[Cell], extras: dict[str, list[dict[str, Any]]]) -> str:
    """Extras, targets, lost cells and everything that has no time, as Markdown."""
    parts = [table(rows, name) for name, rows in extras.items()]
    if "scaling" in extras:
        parts.append(f"Two threads mean something on an idle machine only; load average now {load() or 0:.1f}.")
    targets = [("target", "what", "required", "measured (worst cell)", "")]
    targets += [verdict.line() for verdict in verdicts(cells)]
    parts += ["### Targets", markdown(targets), noise(cells)] if cells else []
    for title, against in (
        ("the better of dense and plain NumPy chain (the rule of the planner: never below 0.95)", "best plain"),
        ("the best peer", "best peer"),
    ):
        parts += [f"### Cells below 1.0x of {title}", lost(cells, against)]
    missing = sorted({f"{name}: {note}" for cell in cells for name, note in cell.notes.items()})
    parts += ["### Without a time", "\n".join(f"- {m}" for m in missing) or "Nothing."]
    return "\n\n".join(parts)


def noise(cells: list[Cell]) -> str:
    """How far structmat is from itself in this run."""
    found = [cell.noise for cell in cells if cell.noise is not None]
    if not found:
        return ""
    half, most = np.quantile(found, (0.5, 0.9))
    return (
        f"Noise of this run: structmat against itself is {half:.0%} from 1.0 in half of the cells and more than {most:.0%} in "
        f"one of ten; load average now {load() or 0:.1f}. Margins smaller than that decide nothing."
    )


def lost(cells: list[Cell], against: str) -> str:
    """The cells where something is faster than structmat, worst first."""
    below = sorted(((r, cell) for cell in cells if (r := cell.ratio(against)) and r < 1), key=lambda pair: pair[0])
    timed = sum(cell.ratio(against) is not None for cell in cells)
    if not below:
        return f"None of {timed}."
    rows = [("cell", "x", "faster", "A/A")]
    roles = {"best peer": ("peer",), "best plain": ("dense", "numpy")}[against]
    rows += [(cell.title(), f"{r:.2f}", (cell.best(*roles) or ("",))[0], f"{cell.noise or 0:.0%}") for r, cell in below]
    return f"{len(below)} of {timed}.\n\n{markdown(rows)}"


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Rows of one part that is not a grid: seconds and microseconds as they are, ``met`` in words."""
    limits = {
        "start": "CPU seconds of the first call (cold <= 1.5, warm <= 0.3)",
        "overhead": "microseconds (A @ x <= 2.5, matmat <= 1.5)",
        "scaling": "wall time of one thread over that of two (>= 1.7)",
    }
    shown = [tuple(rows[0])]
    for row in rows:
        shown.append(tuple(cell_text(v) for v in row.values()))
    return f"### {title.capitalize()}: {limits[title]}\n\n{markdown(shown)}"


def cell_text(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "met" if value else "NOT MET"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows: Iterable[tuple[str, ...]]) -> str:
    """A table whose first row is its head, aligned so that it reads well in a terminal too."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


EXPLANATION = """Ratios are times of others over ours within one interleaved run: above 1, structmat is faster. *x NumPy
chain* is the faster of the NumPy backend and one strided `np.matmul` for each factor. *roofline* is
max(flops / GEMM peak, bytes / bandwidth) over our time, both ceilings measured in this run, the bandwidth at the size of the
operands; above 100 % the operands came from a faster cache. *+-* is half the distance of the quartiles, *A/A* how far structmat
was from itself, entered twice: smaller margins decide nothing. Outputs are allocated by the call and contiguous in the layout
of the operand, for us as for the others; calls below 10 ms start with warm caches. The best peer carries a * where it was too
slow for three rounds. `scipy rfft` and `memcpy` are yardsticks, not peers."""


def save(
    cells: list[Cell], extras: dict[str, list[dict[str, Any]]], ceilings: Ceilings, threads: int, quick: bool
) -> None:
    """Write JSON, Markdown and plots, and turn the link of the README to them."""
    from plots import draw

    RESULTS.mkdir(exist_ok=True)
    stem = f"{date.today()}-cpu" + "-2-threads" * (threads == 2) + "-quick" * quick
    data = {
        "versions": versions(),
        "processor": processor(),
        "backend": default_backend(),
        "threads": threads,
        "peak": ceilings.peak,
        "bandwidth": ceilings.bandwidth,
        "cells": [cell.as_dict() for cell in cells],
        "extras": extras,
        "targets": [verdict.line() for verdict in verdicts(cells)],
    }
    (RESULTS / f"{stem}.json").write_text(json.dumps(data, indent=1, default=float) + "\n")
    drawn = "\n\n".join(f"![{name}]({stem}-{name}.svg)" for name in draw(cells, RESULTS / stem))
    text = f"# CPU: structmat against dense and its peers, {date.today()}\n\n{EXPLANATION}\n\n```\n"
    text += f"{machine(ceilings, threads)}\n```\n\n{drawn}\n\n{summary(cells, extras)}\n\n### All cells\n\n"
    (RESULTS / f"{stem}.md").write_text(text + markdown([HEAD, *map(fields, cells)]) + "\n")
    print(f"wrote bench/results/{stem}.json, .md, .svg")
    if not quick and threads == 1:
        link(f"bench/results/{stem}.md")


def link(path: str) -> None:
    """Turn the README's link to these results, wherever it stands."""
    before = README.read_text()
    after = re.sub(r"\(bench/results/[\d-]+-(operators|cpu)\.md\)", f"({path})", before)
    if after == before and f"({path})" not in before:
        print(f"the README has no link to bench/results: add ({path})")
    README.write_text(after)
