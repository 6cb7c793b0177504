"""Reverse sparsification: train structured for most of the steps, multiply out, go on dense.

A network of three hidden layers of width 1024 learns scikit-learn's digits (augmented, pixels permuted) in 250 steps: dense all
the way; with Block Tensor-Train layers for 200 steps, then ``snn.densify`` and 50 dense steps; and structured all the way.
Source: Dao et al., "Monarch", ICML 2022, section 4. Nothing is downloaded. Exits with an error if a bound is missed.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import structmat.nn as snn

WARMUP, BATCH, BASE, RATE = 20, 128, 64, 0.03


class Data(NamedTuple):
    """Standardised images of 16x16 with their pixels permuted, and classes."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


class Network(nn.Module):
    """256 pixels, three hidden layers with layer norms and GELU, the last two residual, a dense head."""

    def __init__(self, width: int, structure: str, **options: int) -> None:
        super().__init__()
        sizes = [(256, width), (width, width), (width, width)]
        self.norms = nn.ModuleList(nn.LayerNorm(m) for _, m in sizes)
        self.hidden = nn.ModuleList(snn.StructuredLinear(n, m, structure=structure, **options) for n, m in sizes)
        self.head = nn.Linear(width, 10)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for i, (norm, layer) in enumerate(zip(self.norms, self.hidden, strict=True)):
            h = nn.functional.gelu(norm(layer(x)))
            x = h if i == 0 else x + h
        return self.head(x)


class Result(NamedTuple):
    """What a run came to."""

    loss: float
    accuracy: float
    seconds: float
    losses: list[float]
    difference: float = 0.0  # of the outputs before and after densify, relative
    before: tuple[float, float] = (0.0, 0.0)  # loss and accuracy before densify


def main() -> None:
    """Run the three ways and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half the width, one seed")
    parser.add_argument("--plot", type=Path, help="where the picture of the training losses goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    width, seeds = (512, (0,)) if options.quick else (1024, (0, 1))
    data = digits()
    ways = {
        "dense all the way": ("dense", {}, None),
        "btt r=2, dense from step 200": ("btt", {"rank": 2}, 200),
        "btt r=2 all the way": ("btt", {"rank": 2}, None),
    }
    results: dict[str, list[Result]] = {
        name: [run(data, width, structure, arguments, switch, seed) for seed in seeds]
        for name, (structure, arguments, switch) in ways.items()
    }
    print(f"width {width}, {len(seeds)} seeds, rate {RATE}\n")
    print(f"{'':30} {'loss':>7} {'accuracy':>9} {'CPU s':>7}")
    means = {}
    for name, runs in results.items():
        means[name] = [sum(getattr(r, field) for r in runs) / len(runs) for field in ("loss", "accuracy", "seconds")]
        loss, accuracy, seconds = means[name]
        print(f"{name:30} {loss:7.4f} {accuracy:9.4f} {seconds:7.1f}")
    dense, reverse, _ = means.values()
    runs = results["btt r=2, dense from step 200"]
    before = [sum(r.before[i] for r in runs) / len(runs) for i in (0, 1)]
    print(f"{'  before the switch':30} {before[0]:7.4f} {before[1]:9.4f}")
    bounds = [
        ("difference of the outputs at the switch", max(r.difference for r in runs), 1e-5),
        ("loss, relative to dense", reverse[0] / dense[0], 1.15 if not options.quick else 1.5),
        ("accuracy lost against dense", dense[1] - reverse[1], 0.01 if not options.quick else 0.02),
        ("loss, relative to that before the switch", reverse[0] / before[0], 1.0),
    ]
    print()
    for what, measured, bound in bounds:
        print(f"{what:45} {measured:9.2e}   required: at most {bound:g}")
    print(f"{'CPU time, relative to dense':45} {reverse[2] / dense[2]:9.2f}   reported")
    print("\nStaying structured is as good here, and cheaper: switch where the model is to be deployed dense.")
    if options.plot:
        draw({name: runs[0].losses for name, runs in results.items()}, options.plot)
    missed = [what for what, measured, bound in bounds if not measured <= bound]
    if missed:
        raise SystemExit(f"bounds missed: {', '.join(missed)}")


def digits() -> Data:
    """12 transformed copies of 1297 training images, 4 of 500 test images."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    small = torch.tensor(images[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    large = nn.functional.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    labels = torch.tensor(classes[order])
    generator = torch.Generator().manual_seed(7)
    train = transformed(large[:1297].repeat(12, 1, 1, 1), generator)
    test = transformed(large[1297:].repeat(4, 1, 1, 1), generator)
    pixels = torch.randperm(256, generator=generator)
    mean, deviation = train.mean(0), train.std(0) + 1e-3
    train, test = (((t - mean) / deviation)[:, pixels] for t in (train, test))
    return Data(train, labels[:1297].repeat(12), test, labels[1297:].repeat(4))


def transformed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images rotated by up to 0.6, scaled by 1 +- 0.25, shifted by up to 0.25; flat."""

    def uniform(size: float) -> Tensor:
        return (2 * torch.rand(len(x), generator=generator) - 1) * size

    angle, scale = uniform(0.6), 1 + uniform(0.25)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([torch.stack([cos, -sin, uniform(0.25)], 1), torch.stack([sin, cos, uniform(0.25)], 1)], 1)
    grid = nn.functional.affine_grid(rows, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, align_corners=False).flatten(1)


def run(data: Data, width: int, structure: str, options: dict[str, int], switch: int | None, seed: int) -> Result:
    """250 steps of Adam, warm-up and cosine; at ``switch`` the layers become dense, with a warm-up of their own."""
    torch.manual_seed(seed)
    model = Network(width, structure, **options)
    if structure == "dense":
        snn.densify(model)
    optimizer = torch.optim.Adam(snn.param_groups(model, RATE, base_width=BASE))
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    difference, before, start = 0.0, (0.0, 0.0), time.process_time()
    tested = 0.0
    for step in range(250):
        if step == switch:
            paused = time.process_time()
            before, outputs = evaluated(model, data), logits(model, data.test)
            tested += time.process_time() - paused
            set_rate(optimizer, 1.0)
            snn.densify(model, optimizer)
            paused = time.process_time()
            difference = float((logits(model, data.test) - outputs).abs().max() / outputs.abs().max())
            tested += time.process_time() - paused
        since = step - (switch if switch is not None and step >= switch else 0)
        warm = min(1.0, (since + 1) / WARMUP)
        set_rate(optimizer, max(1e-6, warm * 0.5 * (1 + math.cos(math.pi * step / 250))))
        batch = torch.randint(len(data.train), (BATCH,), generator=order)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data.train[batch]), data.train_classes[batch])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    seconds = time.process_time() - start - tested
    return Result(*evaluated(model, data), seconds, losses, difference, before)


def set_rate(optimizer: torch.optim.Optimizer, fraction: float) -> None:
    """Learning rates as a fraction of those at the full rate, which each group's multiplier says."""
    for group in optimizer.param_groups:
        group["lr"] = RATE * group["multiplier"] * fraction


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs of all samples."""
    return model(x)


def evaluated(model: nn.Module, data: Data) -> tuple[float, float]:
    """Loss on a third of the training set, accuracy on the test set."""
    sample = slice(0, len(data.train) // 3)
    loss = nn.functional.cross_entropy(logits(model, data.train[sample]), data.train_classes[sample])
    accuracy = (logits(model, data.test).argmax(1) == data.test_classes).float().mean()
    return float(loss), float(accuracy)


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Training losses, smoothed over ten steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, values in losses.items():
        ax.plot(np.convolve(values, np.ones(10) / 10, mode="valid"), label=name)
    ax.axvline(200, color="grey", linestyle=":")
    ax.set(xlabel="step", ylabel="training loss", yscale="log")
    ax.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
