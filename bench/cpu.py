"""The comparison on the CPU: every family against dense, plain NumPy chains and other libraries, in one run.

Contenders take turns in one process; times are CPU time of the process for one thread and wall time for two; only ratios
within a cell mean anything. A case where structmat loses is in the table like any other, and in a list at the end.

    python bench/cpu.py --quick                        # about a minute
    python bench/cpu.py --save                         # the whole grid, about 20 minutes, into bench/results
    python bench/cpu.py --part monarch --only "4096/64 rows 256 f4"
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before any library starts its threads: spinning ones steal time

import argparse
import re
import time
import warnings

import report
from ceilings import ceilings
from cells import Cell, run_group
from grid import PARTS, groups
from latency import overhead, scaling, start
from timing import set_threads

import structmat as sm

EXTRAS = {"overhead": overhead, "start": start, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the cells that the targets need, at small sizes")
    parser.add_argument("--part", nargs="*", choices=(*PARTS, *EXTRAS), help="default: all")
    parser.add_argument("--only", metavar="REGEX", help="cells whose 'operator layout batch dtype' it is found in")
    parser.add_argument("--backend", help="of structmat, for NumPy arrays; default: its own choice")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1)
    parser.add_argument("--save", action="store_true", help="write bench/results and link it from the README")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # those of the peers
    if options.backend:
        sm.use_backend(options.backend)
    parts = options.part or ((*PARTS, *EXTRAS) if not options.only else PARTS)
    wanted = re.compile(options.only or "").search
    began = time.perf_counter()
    set_threads(options.threads)
    found = ceilings(options.quick, "cpu" if options.threads == 1 else "wall")
    report.head(found, options.threads)
    cells: list[Cell] = []
    for group in groups(tuple(p for p in PARTS if p in parts), options.quick):
        new = run_group(group, found, options.threads, 0.25 if options.quick else 0.8, lambda t: wanted(t) is not None)
        for cell in new:
            print(report.line(cell), flush=True)
        cells += new
    extras = {name: run(options.quick) for name, run in EXTRAS.items() if name in parts}
    set_threads(options.threads)
    print(report.summary(cells, extras))
    print(f"\n{time.perf_counter() - began:.0f} s, of which {time.process_time():.0f} s on the CPU in this process")
    if options.save:
        report.save(cells, extras, found, options.threads, options.quick)


if __name__ == "__main__":
    main()
