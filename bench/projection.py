"""Projection against its peers, all in one run and on one thread: ``make bench-projection``.

    python bench/projection.py [--part chains] [--quick] [--save]

Every figure to reach stands in the first table with its margin: how many times better than the target it is. Times are CPU
seconds, peers take turns with us, and only ratios of times of one run mean anything. ``--quick`` takes smaller sizes, for which
the targets are not meant.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy is imported, and for the processes that are started

from harness import Figure, Part, Table, figures_table  # noqa: E402

PARTS = ("chains", "kronecker", "low-rank", "weights", "selection", "memory")
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "scipy", "torch", "pyfaust", "lazylinop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="can be given several times; default: all parts")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, about a minute")
    parser.add_argument(
        "--save",
        action="store_true",
        help="write bench/results/<date>-projection.json and .md; other parts in them stay",
    )
    options = parser.parse_args()
    found: dict[str, Part] = {}
    for name in options.part or PARTS:
        found[name] = importlib.import_module(f"projection_{name.replace('-', '_')}").run(options.quick)
        for table in (figures_table(found[name].figures), *found[name].tables):
            if table.rows:
                print(table.markdown(), end="\n\n", flush=True)
        if options.save:
            save({name: found[name]}, options.quick)
    if len(found) > 1:
        print(summary(found).markdown())


def summary(parts: dict[str, Part]) -> Table:
    return figures_table([figure for part in parts.values() for figure in part.figures])


def save(parts: dict[str, Part], quick: bool) -> None:
    """Write the results beside those of the other parts that were run on the same day."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"{date.today()}-projection{'-quick' if quick else ''}"
    path = RESULTS / f"{stem}.json"
    if path.exists():
        parts = read(json.loads(path.read_text())["parts"]) | parts
    parts = {name: parts[name] for name in PARTS if name in parts}
    found = {"python": platform.python_version(), "machine": platform.machine()} | {p: installed(p) for p in PACKAGES}
    stored = {
        name: {"figures": [f._asdict() for f in part.figures], "tables": [t._asdict() for t in part.tables]}
        for name, part in parts.items()
    }
    path.write_text(json.dumps({"versions": found, "parts": stored}, indent=1, default=float) + "\n")
    (RESULTS / f"{stem}.md").write_text(page(parts, found))
    print(f"wrote {stem}.json and {stem}.md")


def read(stored: dict[str, Any]) -> dict[str, Part]:
    return {
        name: Part([Figure(**f) for f in part["figures"]], [Table(**t) for t in part["tables"]])
        for name, part in stored.items()
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def page(parts: dict[str, Part], versions: dict[str, str]) -> str:
    """The results as Markdown: the figures to reach, then the tables of every part."""
    figures = [figure for part in parts.values() for figure in part.figures]
    intro = (
        "`make bench-projection`, one thread of a shared two-core x86-64 machine; "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}. Times are CPU seconds, given as ratios within "
        "one run; a margin is how many times better than its target a figure is. "
        f"{sum(f.met for f in figures)} of {len(figures)} figures are met."
    )
    tables = [table.markdown() for part in parts.values() for table in part.tables]
    return "\n\n".join([f"# Projection, {date.today()}", intro, summary(parts).markdown(), *tables]) + "\n"


if __name__ == "__main__":
    main()
