"""Butterflies against every peer, and two factors against one batched SVD of the same blocks."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np
from harness import Figure, Part, Table, interleaved, once
from projection_matrices import hadamard, matrices, relative
from projection_peers import NOT_APPLICABLE, Calls, descend, lazylinop_calls, palm4msa, pyfaust_calls

import structmat as sm
from structmat.projection.two_factor import blocks_of, layout

EXACT = ("Hadamard", "DFT, bit-reversed")  # butterflies in the order in which they are given
THREADED = (*EXACT, "Hilbert")  # where the variants of pyfaust that take seconds are run too
LIMITS = {"Hilbert": 0.1971, "2-D Gaussian kernel": 0.5457, "inverse Laplacian": 0.4406, "Gaussian": 0.984}
SEARCHED = "project, searched"
SLACK = 1 + 1e-6  # two errors that agree so far are the same
ROUNDING = 1e-13  # and so are two that are both smaller than this
TURN = 0.05  # seconds: a projection after the caches of another library is timed over several calls
PATIENCE = 10  # gradient descent may take as many times longer than we do


def run(quick: bool) -> Part:
    butterflies = compare_butterflies(256 if quick else 1024, full=not quick)
    pairs = two_factors(1024 if quick else 4096)
    palm = preset(64 if quick else 128)
    grown = growth(1024, 2048 if quick else 8192)
    return Part(butterflies.figures + pairs.figures + grown, [*butterflies.tables, palm, *pairs.tables])


# ---- butterflies ---------------------------------------------------------------------------------------------------------


def ours(W: np.ndarray) -> Calls:
    """Our contenders, the cheapest first."""

    def call(**options: Any) -> Any:
        return lambda: sm.project(W, sm.Butterfly, radix=2, **options).operator

    return {
        "project": call(),
        "project, refine=1": call(refine=1),
        "project, refine=10": call(refine=10),
        SEARCHED: call(permutation="search"),
    }


def compare_butterflies(n: int, full: bool) -> Part:
    """Errors and times of all contenders on all matrices, and what the figures to reach make of them."""
    errors: dict[str, dict[str, float]] = {}
    seconds: dict[str, dict[str, float]] = {}
    figures: list[Figure] = []
    bounds: list[float] = []
    for name, W in matrices(n).items():
        found, taken = measure(W, permuted=full, threaded=full and name in THREADED)
        for key in found:
            errors.setdefault(key, {})[name] = found[key]
            seconds.setdefault(key, {})[name] = taken[key] / taken["project"]
        bounds.append(sm.project(W, sm.Butterfly, radix=2).lower_bound / float(np.linalg.norm(W)))
        new = against_peers(name, n, found, taken)
        figures += new
        print(*(f"{f.what}: {f.measured:.3g} ({f.note})" for f in new), sep="\n", file=sys.stderr, flush=True)
        seconds.setdefault("project, seconds", {})[name] = taken["project"]
    names = list(matrices(4))
    head = ("", *names)

    def pick(values: dict[str, dict[str, float]]) -> list[list[Any]]:
        return [[key, *(row.get(name, math.nan) for name in names)] for key, row in values.items()]

    tables = [
        Table(f"Butterfly {n}, radix 2: CPU time over that of project", head, pick(seconds), NOT_APPLICABLE),
        Table(
            f"Butterfly {n}, radix 2: relative error",
            head,
            [["lower bound of the best possible", *bounds], *pick(errors)],
            f"Adam and L-BFGS: {PATIENCE} times as long as project with refine=10, or the least that one step takes.",
        ),
    ]
    return Part(figures, tables)


def measure(W: np.ndarray, permuted: bool, threaded: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors and CPU seconds: quick contenders take turns, slow ones and gradient descent have one."""
    quick, permutations, threads = pyfaust_calls(W)
    mine = ours(W)
    patient = {SEARCHED: mine.pop(SEARCHED), **(permutations if permuted else {}), **(threads if threaded else {})}
    contenders = {**mine, **quick, **lazylinop_calls(W)}
    errors = {key: relative(W, call()) for key, call in contenders.items()}
    seconds = interleaved(contenders, 0.0, time.process_time, TURN)
    for key, call in patient.items():
        seconds[key], found = once(call)
        errors[key] = relative(W, found)
    budget = PATIENCE * seconds["project, refine=10"]
    for method in ("Adam", "L-BFGS"):
        seconds[method], (errors[method], _) = once(lambda method=method: descend(W, method, budget))
    return errors, seconds


def against_peers(name: str, n: int, errors: dict[str, float], seconds: dict[str, float]) -> list[Figure]:
    """Our error against that of every peer, and our quickest call that is no worse than a peer against that peer's time.

    The worst ratio over all peers counts. Axis orders are searched only against the peer that tries permutations too.
    """
    mine = [key for key in errors if key.startswith("project")]
    peers = [key for key in errors if key not in mine]
    faust = [key for key in peers if key.startswith("pyfaust")]
    found: list[Figure] = []
    if name in EXACT:
        found.append(Figure(f"{name} {n}: error", errors["project"], 1e-15))
        if faust:
            quickest = min(faust, key=lambda key: seconds[key])
            least = 9.0 if name == "Hadamard" else 8.0
            ratio = seconds[quickest] / seconds["project"]
            found.append(Figure(f"{name} {n}: time of the fastest pyfaust over ours", ratio, least, True, quickest))
    if name in LIMITS and n == 1024:
        found.append(Figure(f"{name} {n}: error", errors["project, refine=10"], LIMITS[name]))
    by_error, by_time = [], []
    for peer in peers:
        level = max(errors[peer] * SLACK, ROUNDING)
        fair = [key for key in mine if key != SEARCHED or "permutations" in peer]
        best = min(fair, key=lambda key: errors[key])
        by_error.append((max(errors[best], ROUNDING) / max(errors[peer], ROUNDING), f"{best}; {peer}"))
        quick = min((key for key in fair if errors[key] <= level), key=lambda key: seconds[key], default=None)
        if quick is None:
            by_time.append((0.0, f"none of ours reaches the error of {peer}"))
        else:
            by_time.append((seconds[peer] / seconds[quick], f"{quick}; {peer}"))
    (error, who), (time_ratio, whom) = max(by_error), min(by_time)
    return [
        *found,
        Figure(f"{name} {n}: error over that of the best peer", error, SLACK, False, who),
        Figure(f"{name} {n}: time of any peer over ours at its error", time_ratio, 1.0, True, whom),
    ]


def preset(n: int) -> Table:
    """PALM4MSA in pyfaust's preset of Hadamard matrices, which takes minutes beyond a few hundred."""
    W = hadamard(n)
    mine = interleaved({"project": ours(W)["project"]}, 0.1, time.process_time, TURN)["project"]
    seconds, found = once(lambda: palm4msa(W))
    ratio, error = (seconds / mine, relative(W, found)) if found is not None else (math.nan, math.nan)
    return Table(
        f"Hadamard {n}: hierarchical PALM4MSA of pyfaust",
        ("CPU time over ours", "its error", "our error"),
        [[ratio, error, relative(W, ours(W)["project"]())]],
    )


def growth(small: int, large: int) -> list[Figure]:
    """Time of a large butterfly over that of a small one, real Gaussian."""

    def projection(n: int) -> Any:
        W = np.random.default_rng(0).standard_normal((n, n))
        return lambda: sm.project(W, sm.Butterfly, radix=2)

    first, second = projection(small), projection(large)
    first()
    times = {small: min(once(first)[0] for _ in range(9)), large: min(once(second)[0] for _ in range(2))}
    target = 60.0 * (large / small / 8) ** 2
    return [Figure(f"Butterfly {large} over {small}, real: time", times[large] / times[small], target)]


# ---- two factors ---------------------------------------------------------------------------------------------------------


def two_factors(n: int) -> Part:
    """Monarch and Block Tensor-Train over one batched SVD: square blocks, and long ones where a Gram matrix will do."""
    W = np.random.default_rng(0).standard_normal((n, n))
    side = math.isqrt(n)
    figures, rows = [], []
    for family, counts in (
        (sm.Monarch, (side, side)),
        (sm.BlockTensorTrain, (side, side)),
        (sm.Monarch, (n // 16, 16)),
        (sm.BlockTensorTrain, (n // 16, 16)),
        (sm.Monarch, (n // 4, 4)),
    ):
        blocks = np.ascontiguousarray(blocks_of(W, layout(W.shape, counts, family is sm.BlockTensorTrain)))
        contenders = {
            "svd": lambda b=blocks: np.linalg.svd(b, full_matrices=False),
            "project": lambda f=family, c=counts: sm.project(W, f, blocks=c, rank=1),
        }
        times = {key: min(once(call)[0] for _ in range(2)) for key, call in contenders.items()}
        s, p = np.linalg.svd(blocks, compute_uv=False), contenders["project"]()
        optimum = math.sqrt(float(np.square(s[..., 1:]).sum()))
        long = blocks.shape[3] >= 2 * blocks.shape[2]
        label = f"{family.__name__} {n}, {counts[0]}x{counts[1]} blocks of {blocks.shape[2]}x{blocks.shape[3]}"
        if long:
            figures.append(
                Figure(f"{label}: batched SVD over ours", times["svd"] / times["project"], 5.0, True, "Gram")
            )
        else:
            figures.append(Figure(f"{label}: ours over batched SVD", times["project"] / times["svd"], 1.3))
        rows.append([label, times["svd"] / times["project"], p.error / optimum - 1, times["project"]])
    head = ("", "batched SVD over ours", "error over optimum - 1", "our CPU seconds")
    return Part(figures, [Table("Two factors", head, rows, "Error, certificate and operator included on our side.")])
