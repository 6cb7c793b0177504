"""A trained transformer with its 36 encoder layers at half of their parameters, without any fine-tuning.

Plan, calibrate, convert, report: all-MiniLM-L6-v2, judged by its embeddings of 500 held-out texts of other packages than those
that it is calibrated on (768 paragraphs, 384 of them in the sequential conversion; damping 1e-3 of the mean diagonal). Exits
with an error if a bound is missed; speed is reported, not asserted.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import minilm
import numpy as np
import torch
from minilm import Quality
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import structmat.nn as snn

ENCODER = r"re:encoder\.layer\.\d+\..*"
LOW_RANK = {"structure": "low_rank"}
INTERPOLATIVE = {"structure": "low_rank", "interpolative": True}
BTT = {"structure": "btt", "blocks": 4}
BTT_INTERPOLATIVE = {"structure": "btt", "blocks": 4, "interpolative": True}
SECONDS = 30.0  # CPU seconds of a conversion, at most


class Case(NamedTuple):
    """One conversion of the model, and the cosine that it must reach."""

    name: str
    config: dict[str, Any]
    budget: float = 0.5
    how: str = "aware"  # or "data-free", "sequential"
    least: float | None = None
    quick: bool = False


CASES = (
    Case("low-rank", LOW_RANK, how="data-free"),
    Case("low-rank, interpolative", INTERPOLATIVE, how="data-free", quick=True),
    Case("low-rank", LOW_RANK, least=0.72),
    Case("low-rank, interpolative", INTERPOLATIVE, least=0.77, quick=True),
    Case("low-rank, interpolative", INTERPOLATIVE, how="sequential", least=0.80),
    Case("BTT 4x4", BTT, least=0.73),
    Case("BTT 4x4, interpolative", BTT_INTERPOLATIVE, least=0.73),
    Case("low-rank, interpolative", INTERPOLATIVE, budget=0.7, least=0.89),
)


class Result(NamedTuple):
    """A case, and what came of it."""

    case: Case
    params: float
    report: snn.Report
    quality: Quality
    seconds: float  # of the conversion: CPU
    speed: float  # of encoding, against dense


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two conversions, half of the text")
    parser.add_argument("--plot", type=Path, default=Path("minilm_compress.png"), help="where the picture goes")
    options = parser.parse_args()
    cases = [case for case in CASES if case.quick or not options.quick]
    tokenizer, model = minilm.load_model()
    texts = minilm.calibration_texts()
    test = minilm.test_pairs(100 if options.quick else 250)
    original = minilm.embed(model, tokenizer, test)
    with threadpool_limits(1, user_api="blas"):
        seen = minilm.batches(tokenizer, texts[: 256 if options.quick else 768])
        fewer = minilm.batches(tokenizer, texts[:384])  # for the sequential conversion, which runs them several times
        held = minilm.batches(tokenizer, texts[1000:1128])
        plan = snn.plan(model, {ENCODER: LOW_RANK}, budget=0.5)
        started = time.process_time()
        moments = snn.calibrate(model, seen, plan)
        calibrated = time.process_time() - started
        held_out = snn.calibrate(model, held, plan)
        results = []
        for case in tqdm(cases, desc="converting", file=sys.stderr):
            results.append(convert(case, model, fewer, moments, held_out, tokenizer, test, original))
    print(plan, "\n")
    best = max((r for r in results if r.case.how == "aware"), key=lambda r: r.quality.cosine)
    print(f"{best.case.name}, {best.case.how}, {best.case.budget:.0%}:\n{best.report}\n")
    reference = minilm.quality(original, original)
    print(
        f"{len(test)} held-out texts; original MRR {reference.mrr:.3f}; calibrated on {moments.tokens} tokens in "
        f"{calibrated:.1f} CPU s, damping 1e-3\n\n{HEADER}"
    )
    for result in results:
        print(row(result))
    print("\nencoding: dense time / structured time, one batch of 16 texts of 48 tokens, taking turns; not asserted")
    draw(results, options.plot)
    print(f"picture: {options.plot}\n")
    failures = verify(results, options.quick)
    if failures:
        raise SystemExit("; ".join(failures))


HEADER = (
    f"{'':24} {'':10} {'params':>6} {'output':>7} {'held-out':>8} {'cosine':>7} {'5 %':>6} {'Spearman':>8} {'MRR':>6} "
    f"{'CPU s':>6} {'encoding':>8}"
)


def convert(
    case: Case,
    model: Any,
    batches: list[Any],
    moments: snn.Calibration,
    held_out: snn.Calibration,
    tokenizer: Any,
    test: list[str],
    original: np.ndarray,
) -> Result:
    """A converted copy of the model, measured."""
    copied = copy.deepcopy(model)
    plan = snn.plan(copied, {ENCODER: case.config}, budget=case.budget)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that data-free ruins the model is what is shown here
        if case.how == "sequential":
            copied = snn.convert_sequentially(copied, plan, batches)
        else:
            given = moments if case.how == "aware" else None
            copied = snn.convert(copied, plan, given, held_out=held_out)
    seconds = time.process_time() - started
    found = minilm.quality(minilm.embed(copied, tokenizer, test), original)
    params = plan.params / plan.dense_params
    return Result(case, params, snn.report(copied), found, seconds, speed(model, copied, tokenizer))


def speed(dense: Any, structured: Any, tokenizer: Any) -> float:
    """Median ratio of the times of the two models on one batch, taking turns."""
    batch = tokenizer(["word " * 46] * (minilm.BATCH // 2), return_tensors="pt")
    ratios = []
    with torch.no_grad():
        for _ in range(5):
            times = []
            for model in (dense, structured):
                started = time.process_time()
                model(**batch)
                times.append(time.process_time() - started)
            ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])


def row(result: Result) -> str:
    """One line of the table."""
    case, q = result.case, result.quality
    errors = [x if x is not None else float("nan") for x in (result.report.output_error, result.report.held_out_error)]
    return (
        f"{case.name:24} {case.how:10} {result.params:6.1%} {errors[0]:7.3f} {errors[1]:8.3f} {q.cosine:7.3f} {q.low:6.2f} "
        f"{q.spearman:8.3f} {q.mrr:6.3f} {result.seconds:6.1f} {result.speed:7.2f}x"
    )


def verify(results: list[Result], quick: bool) -> list[str]:
    """Print measured and required figures; the names of those that are missed."""
    checks = []
    found = {(r.case.name, r.case.how, r.case.budget): r for r in results}
    for r in results:
        title = f"{r.case.name}, {r.case.how}, {r.case.budget:.0%}"
        checks.append((f"{title}: layers", float(len(r.report)), ">=", 36.0))
        if r.case.least is not None:
            checks.append((f"{title}: cosine", r.quality.cosine, ">=", r.case.least - (0.02 if quick else 0.0)))
        if r.case.how != "sequential":
            checks.append((f"{title}: CPU seconds of the conversion", r.seconds, "<=", SECONDS))
        if r.case.how == "data-free":
            gain = found[r.case.name, "aware", 0.5].quality.cosine / r.quality.cosine
            checks.append((f"{r.case.name}, 50%: cosine, aware over data-free", gain, ">=", 1.8 if quick else 1.9))
    plain = found.get(("BTT 4x4", "aware", 0.5))
    if plain is not None:
        gain = found["BTT 4x4, interpolative", "aware", 0.5].quality.cosine / plain.quality.cosine
        checks.append(("BTT 4x4, 50%: cosine, interpolative over plain", gain, ">=", 1.0))
    failures = []
    for what, measured, sign, required in checks:
        good = measured >= required if sign == ">=" else measured <= required
        print(f"{'ok    ' if good else 'MISSED'} {what}: {measured:.3f}, required {sign} {required:g}")
        if not good:
            failures.append(f"{what}: {measured:.3f}, required {sign} {required:g}")
    return failures


def draw(results: list[Result], path: Path) -> None:
    """Output errors by layer, and cosines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (errors, cosines) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for how, offset in (("data-free", -0.2), ("aware", 0.2)):
        lines = next(
            r for r in results if r.case.config is INTERPOLATIVE and r.case.how == how and r.case.budget == 0.5
        )
        values = [line.record.held_out_error if line.record else None for line in lines.report]
        errors.bar(np.arange(len(values)) + offset, [v or 0.0 for v in values], 0.4, label=how)
    errors.set(title="low-rank, interpolative, 50 %", xlabel="layer", ylabel="relative output error, held-out text")
    errors.legend()
    labels = [f"{r.case.name}, {r.case.how}, {r.case.budget:.0%}" for r in results]
    cosines.barh(labels, [r.quality.cosine for r in results])
    cosines.set(
        xlim=(0, 1), xlabel="cosine of embeddings to the original", title="all 36 encoder layers, no fine-tuning"
    )
    cosines.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
