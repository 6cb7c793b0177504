"""A trained transformer at half of the parameters of its encoder, distilled for two minutes.

all-MiniLM-L6-v2 is converted (activation-aware) and its structured layers learn from the original: embeddings of the same
direction, and the same hidden states after every block. ``snn.param_groups`` gives every factor its learning rate. Calibration
and training are on different text; the judge is held-out text of other packages. The budget is in steps. Exits with an error if
a bound is missed.

``--quick`` does the same with the first two of the six blocks and less text.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import minilm
import torch
from minilm import Quality
from torch import Tensor
from torch.nn import functional
from verdict import verdict

import structmat.nn as snn

ENCODER = r"re:encoder\.layer\.\d+\..*"
CONFIGS: dict[str, dict[str, Any]] = {
    "low-rank": {"structure": "low_rank", "interpolative": True},
    "btt": {"structure": "btt", "blocks": 4, "interpolative": True},
}
TOKENS = 24  # of a training text, at most: more texts in the same time are worth more than long ones
POOL = 32  # batches whose texts are sorted by length together, so that little is padded
WARMUP = 8  # steps


class Setting(NamedTuple):
    """How much of everything, and what it must come to."""

    blocks: int
    calibration: int  # texts
    pairs: int  # of test texts
    steps: int
    batch: int  # texts
    rate: float
    every: int  # steps between evaluations
    last: int  # batches whose losses are averaged
    cosine: float
    spearman: float
    mrr: float  # relative to that of the original
    loss: float  # of the last batches, relative to the first


FULL = Setting(6, 768, 250, 400, 16, 2e-4, 200, 20, 0.85, 0.84, 0.88, 0.9)
QUICK = Setting(2, 256, 60, 24, 16, 2e-4, 12, 8, 0.95, 0.95, 0.88, 1.0)


class Point(NamedTuple):
    """Where the training was after some steps."""

    step: int
    seconds: float  # CPU, of the training alone
    quality: Quality


def main() -> None:
    """Convert, distil, check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two of the six blocks, less text")
    parser.add_argument("--plot", type=Path, help="where the picture of cosine and Spearman correlation goes")
    parser.add_argument("--structure", choices=sorted(CONFIGS), default="low-rank")
    options = parser.parse_args()
    setting = QUICK if options.quick else FULL
    torch.set_num_threads(1)  # so that CPU seconds are those of the work
    tokenizer, teacher = minilm.load_model()
    teacher.encoder.layer = teacher.encoder.layer[: setting.blocks]
    needed = setting.calibration + (setting.steps + POOL) * setting.batch
    texts, test = minilm.calibration_texts(needed), minilm.test_pairs(setting.pairs)
    original = minilm.embed(teacher, tokenizer, test)
    student = converted(teacher, tokenizer, texts[: setting.calibration], CONFIGS[options.structure])
    print(f"\n{'step':>5} {'CPU s':>6} {'loss':>7} {'cosine':>7} {'5 %':>6} {'Spearman':>8} {'MRR':>6}")
    points, losses, seconds = [], [], 0.0
    steps = distil(teacher, student, batches(tokenizer, texts[setting.calibration :], setting), setting)
    for step in range(setting.steps + 1):
        if step % setting.every == 0:
            q = minilm.quality(minilm.embed(student, tokenizer, test), original)
            points.append(Point(step, seconds, q))
            loss = f"{mean(losses[-setting.last :]):7.3f}" if losses else " " * 7
            print(
                f"{step:5} {seconds:6.1f} {loss} {q.cosine:7.3f} {q.low:6.2f} {q.spearman:8.3f} {q.mrr:6.3f}",
                flush=True,
            )
        if step < setting.steps:
            started = time.process_time()
            losses.append(next(steps))
            seconds += time.process_time() - started
    reference = minilm.quality(original, original).mrr
    print(f"{len(test)} test texts; MRR of the original {reference:.3f}; loss: mean of {setting.last} batches\n")
    if options.plot:
        draw(points, options.structure, options.plot)
    end = points[-1].quality
    verdict(
        [
            ("cosine to the original embeddings", end.cosine, ">=", setting.cosine),
            ("Spearman correlation of similarities", end.spearman, ">=", setting.spearman),
            ("MRR, relative to the original's", end.mrr / reference, ">=", setting.mrr),
            (
                "loss, last batches over first",
                mean(losses[-setting.last :]) / mean(losses[: setting.last]),
                "<=",
                setting.loss,
            ),
            ("1 - cosine, over that before", (1 - end.cosine) / (1 - points[0].quality.cosine), "<=", 0.9),
        ]
    )


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def converted(teacher: Any, tokenizer: Any, texts: list[str], config: dict[str, Any]) -> Any:
    """A copy of the model with its encoder's layers at half of their parameters."""
    student = copy.deepcopy(teacher)
    plan = snn.plan(student, {ENCODER: config}, budget=0.5)
    started = time.process_time()
    moments = snn.calibrate(student, minilm.batches(tokenizer, texts), plan)
    student = snn.convert(student, plan, moments, joint=config["structure"] == "low_rank")
    print(
        f"{len(plan.converted)} layers at {plan.params / plan.dense_params:.1%} of their parameters, calibrated on "
        f"{moments.tokens} tokens and converted in {time.process_time() - started:.0f} CPU s"
    )
    return student


def batches(tokenizer: Any, texts: list[str], setting: Setting) -> Iterator[Any]:
    """Batches of texts of similar length, in an order that repeats."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(texts), generator=generator)
    size = setting.batch * POOL
    for start in range(0, len(order), size):
        pool = [texts[i] for i in order[start : start + size]]
        lengths = [len(ids) for ids in tokenizer(pool, truncation=True, max_length=TOKENS)["input_ids"]]
        pool = [pool[i] for i in sorted(range(len(pool)), key=lengths.__getitem__)]
        for i in torch.randperm(math.ceil(len(pool) / setting.batch), generator=generator):
            some = pool[int(i) * setting.batch : (int(i) + 1) * setting.batch]
            yield tokenizer(some, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")


def distil(teacher: Any, student: Any, batches: Iterator[Any], setting: Setting) -> Iterator[float]:
    """AdamW on the encoder, with warm-up and a cosine to zero; the loss of every step."""
    student.requires_grad_(False)
    student.encoder.requires_grad_(True)
    groups = snn.param_groups(student.encoder, setting.rate, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, fused=True)
    for step in range(setting.steps):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / setting.steps))
            group["lr"] = setting.rate * group["multiplier"] * min(1.0, (step + 1) / WARMUP) * cosine
        batch = next(batches)
        mask = batch["attention_mask"][..., None].float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # the original is read, not trained
            wanted = teacher(**batch, output_hidden_states=True).hidden_states[1:]
        found = student(**batch, output_hidden_states=True).hidden_states[1:]
        loss = distance(found, wanted, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.encoder.parameters(), 1.0)
        optimizer.step()
        yield float(loss.detach())


def distance(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """``2 (1 - cosine)`` of the embeddings, and the mean squared error of every block over the variance of what is wanted."""
    ours, theirs = ((states[-1] * mask).sum(1) / mask.sum(1) for states in (found, wanted))
    total = 2 * (1 - functional.cosine_similarity(ours, theirs).mean())
    count = mask.sum() * wanted[0].shape[-1]
    for a, b in zip(found, wanted, strict=True):
        centre = (b * mask).sum() / count
        total = total + ((a - b) * mask).square().sum() / ((b - centre) * mask).square().sum()
    return total


def draw(points: list[Point], structure: str, path: Path) -> None:
    """Cosine and Spearman correlation against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6, 4), layout="constrained")
    steps = [p.step for p in points]
    ax.plot(steps, [p.quality.cosine for p in points], "o-", label="cosine to the original embeddings")
    ax.plot(steps, [p.quality.spearman for p in points], "s-", label="Spearman correlation of similarities")
    ax.set(xlabel="step", title=f"MiniLM, encoder at 50 %, {structure}, distilled")
    ax.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
