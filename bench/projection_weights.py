"""Real weights: every encoder matrix of all-MiniLM-L6-v2 at 25 % and 50 % of its parameters, data-free and activation-aware.

Weight error is ``||W - A|| / ||W||``; output error is ``||(W - A) X|| / ||W X||`` for centred inputs, on the calibration text
and on held-out text. Model and text are those of the examples, so that nothing is downloaded; the figures move in the third
digit with the versions of the packages that the text is from. CPU seconds are of the projections alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from harness import Figure, Part, Table
from tqdm import tqdm

import structmat as sm

FIRST = "layer.0.attention.output.dense"
INTERPOLATIVE = "low-rank, interpolative"
SVD_LLM = (
    "SVD-LLM (arXiv 2403.07378): truncated SVD of W S, then S^-1, with the Cholesky factor S of the second moment, not centred "
    "as published, or centred; written by us."
)


class Layer(NamedTuple):
    """A linear layer: its weight, the moments of its inputs on calibration and held-out text."""

    name: str
    weight: np.ndarray
    seen: sm.Moments
    held: sm.Moments


class Contender(NamedTuple):
    """A family with its options for a budget; ``aware`` says whether it takes the weight."""

    name: str
    project: Callable[..., Any]
    most: float = 1.0  # of the dense parameters: more are dearer to apply than the dense matrix
    slow: bool = False  # tens of minutes for all matrices: aware for one of them alone
    peer: bool = False  # aware only, and without a certificate


def family(kind: type, **options: Any) -> Callable[..., Any]:
    def project(W: np.ndarray, budget: float, **weight: Any) -> Any:
        chosen = {k: v(budget) if callable(v) else v for k, v in options.items()}
        size = {} if "blocks" in chosen and kind is sm.BlockDiagonal else {"budget": budget}
        return sm.project(W, kind, **chosen, **size, **weight)

    return project


class Fit(NamedTuple):
    """What a peer gives: an operator and its number of parameters."""

    operator: np.ndarray
    params: int


def svd_llm(W: np.ndarray, budget: float, weight: sm.Moments, mean: bool = True, centred: bool = False) -> Fit:
    """The closed form of SVD-LLM: Cholesky-whitened truncated SVD; a ridge is added only where Cholesky needs one."""
    del mean  # the bias takes up the mean for every contender
    m, n = W.shape
    rank = int(budget * m * n) // (m + n)
    C = np.array(weight.second_moment, dtype=np.float64)
    if centred:
        C -= np.multiply.outer(weight.mean, weight.mean)
    S = cholesky(C)
    u, s, vh = np.linalg.svd(W.astype(np.float64) @ S, full_matrices=False)
    right = scipy.linalg.solve_triangular(S, (s[:rank, None] * vh[:rank]).T, trans=1, lower=True).T
    return Fit(u[:, :rank] @ right, rank * (m + n))


def cholesky(C: np.ndarray) -> np.ndarray:
    ridge = 0.0
    while True:
        try:
            return np.linalg.cholesky(C + ridge * np.trace(C) / len(C) * np.eye(len(C)))
        except np.linalg.LinAlgError:
            ridge = max(1e-12, 10 * ridge)


CONTENDERS = (
    Contender("low-rank", family(sm.LowRank)),
    Contender("SVD-LLM (peer)", svd_llm, peer=True),
    Contender("SVD-LLM, centred (peer)", partial(svd_llm, centred=True), peer=True),
    Contender(INTERPOLATIVE, family(sm.LowRank, interpolative=True)),
    Contender("Monarch 4x4", family(sm.Monarch, blocks=4)),
    Contender("BTT 4x4", family(sm.BlockTensorTrain, blocks=4)),
    Contender("BTT 4x4, interpolative", family(sm.BlockTensorTrain, blocks=4, interpolative=True)),
    Contender("Kronecker sum", family(sm.Kronecker), most=0.05),
    Contender("block-diagonal", family(sm.BlockDiagonal, blocks=lambda budget: round(1 / budget))),
    Contender("butterfly", family(sm.Butterfly), slow=True),
)


def run(quick: bool) -> Part:
    layers = load_layers(64 if quick else 512, quick)
    return report(measure(layers, CONTENDERS, (0.25, 0.5), quick), layers)


class Row(NamedTuple):
    contender: str
    budget: float
    aware: bool
    layer: str
    weight_error: float
    seen: float
    held: float
    bound: float
    seconds: float
    params: float


def measure(
    layers: list[Layer], contenders: tuple[Contender, ...], budgets: tuple[float, ...], quick: bool
) -> list[Row]:
    rows = []
    pairs = dict.fromkeys((c, min(b, c.most)) for c in contenders for b in budgets)
    jobs = [
        (c, b, aware, layer)
        for c, b in pairs
        for aware in (False, True)
        for layer in layers
        if aware or not c.peer
        if not (aware and c.slow) or (layer.name == FIRST and not quick)
    ]
    for contender, budget, aware, layer in tqdm(jobs, desc="projecting", file=sys.stderr):
        weight = {"weight": layer.seen, "mean": True} if aware else {}
        started = time.process_time()
        try:
            p = contender.project(layer.weight, budget, **weight)
        except ValueError as error:
            if "budget" not in str(error):
                raise
            continue
        seconds = time.process_time() - started
        difference = layer.weight - np.asarray(p.operator, dtype=np.float64)
        seen, held = (output_error(layer.weight, difference, moments) for moments in (layer.seen, layer.held))
        if aware and not contender.peer and not (abs(seen - p.relative_error) <= 1e-6 and p.lower_bound <= p.error):
            raise SystemExit(
                f"{contender.name}, {layer.name}: certificate {p.relative_error}, dense computation {seen}"
            )
        bound = p.relative_error * p.lower_bound / p.error if aware and not contender.peer and p.error else np.nan
        plain = float(np.linalg.norm(difference) / np.linalg.norm(layer.weight))
        share = p.params / layer.weight.size
        rows.append(Row(contender.name, budget, aware, layer.name, plain, seen, held, bound, seconds, share))
    return rows


def output_error(W: np.ndarray, difference: np.ndarray, moments: sm.Moments) -> float:
    """Relative output error for centred inputs (the bias takes up the mean)."""
    C = moments.second_moment - np.multiply.outer(moments.mean, moments.mean)
    W = W.astype(np.float64)
    return float(np.sqrt(np.vdot(difference, difference @ C) / np.vdot(W, W @ C)))


def report(rows: list[Row], layers: list[Layer]) -> Part:
    """Means over the matrices, and what the figures to reach make of them."""
    table: list[list[Any]] = []
    means: dict[tuple[str, float, bool], tuple[float, float]] = {}
    for key in dict.fromkeys((r.contender, r.budget, r.aware) for r in rows):
        part = [r for r in rows if (r.contender, r.budget, r.aware) == key]
        weight, seen, held, bound, share = (
            float(np.mean([getattr(r, f) for r in part])) for f in ("weight_error", "seen", "held", "bound", "params")
        )
        seconds = sum(r.seconds for r in part)
        means[key] = seen, seconds
        name, budget, aware = key
        how = "aware" if aware else "data-free"
        table.append([name, f"{budget:.0%}", f"{share:.1%}", how, weight, seen, held, bound, seconds, len(part)])
    first = [r for r in rows if r.layer == FIRST and r.budget == 0.5 and r.aware]
    single = {r.contender: r.seen for r in first}
    count = len(layers)
    figures = [
        Figure(
            "attention output, layer 0, 50 %, aware interpolative low-rank: output error", single[INTERPOLATIVE], 0.225
        ),
        Figure(
            "the same over SVD-LLM's closed form, as published",
            single[INTERPOLATIVE] / single["SVD-LLM (peer)"],
            1.0,
            note=f"SVD-LLM {single['SVD-LLM (peer)']:.4f}",
        ),
    ]
    for budget in (0.25, 0.5):
        train, seconds = means["BTT 4x4", budget, True]
        ratio = train / means["low-rank", budget, True][0]
        figures += [
            Figure(f"BTT 4x4 over low-rank, aware, {budget:.0%}, mean output error of {count}", ratio, 1.08),
            Figure(f"BTT 4x4, aware, {budget:.0%}: CPU seconds of {count} matrices", seconds, 15.0 * count / 36),
        ]
    head = ("", "budget", "params", "", "weight error", "output error", "held-out", "best >=", "CPU s", "matrices")
    tokens = f"Calibration on {layers[0].seen.count} tokens, held-out {layers[0].held.count} tokens. {SVD_LLM}"
    return Part(
        figures,
        [
            Table(f"Real weights: means over {count} matrices of all-MiniLM-L6-v2", head, table, tokens),
            Table(
                "Attention output, layer 0, 50 %, aware",
                ("", "output error", "held-out", "weight error"),
                [[r.contender, r.seen, r.held, r.weight_error] for r in first],
            ),
        ],
    )


# ---- the model and its inputs --------------------------------------------------------------------------------------------


def load_layers(texts: int, quick: bool) -> list[Layer]:
    """The linear layers of the encoder with the moments of their inputs."""
    sys.path.append(str(Path(__file__).parent.parent / "examples"))
    import minilm  # pyright: ignore[reportMissingImports]
    import torch

    import structmat.nn as snn

    torch.set_num_threads(1)
    tokenizer, model = minilm.load_model()
    linears = {name: m for name, m in model.encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    if quick:
        linears = {name: linears[name] for name in (FIRST, "layer.5.output.dense")}
    found = minilm.calibration_texts(1000) if quick else minilm.calibration_texts()
    parts = found[:texts], found[texts : texts + max(64, texts // 4)]
    names = [f"encoder.{name}" for name in linears]
    seen, held = (
        snn.calibrate(model, minilm.batches(tokenizer, part), names, dtype=torch.float64, progress=True)
        for part in parts
    )
    return [
        Layer(name, m.weight.detach().numpy().copy(), seen[f"encoder.{name}"], held[f"encoder.{name}"])
        for name, m in linears.items()
    ]
