"""Reverse sparsification: train structured for most of the steps, multiply out, go on dense.

A network of three hidden layers of width 1024 learns scikit-learn's digits (augmented, pixels permuted) in 250 steps: dense all
the way; with Block Tensor-Train layers for 200 steps, then ``snn.densify`` and 50 dense steps; and structured all the way.
Source: Dao et al., "Monarch", ICML 2022, section 4. Nothing is downloaded. Exits with an error if a bound is missed.

Where the switch comes late, the schedule has decayed and the dense weights, whose averages in Adam begin anew, would hardly
move in what is left: they alone have a warm-up of their own, of ten steps, and three times the rate of a dense layer. All
other parameters keep their state and the schedule.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import digits
import numpy as np
import torch
from verdict import verdict

import structmat.nn as snn

RATE, SWITCH = 0.03, 200
WARMUP, FASTER = 10, 3.0  # of the dense weights after the switch


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
    data = digits.load()
    results = {
        "dense all the way": [run(data, width, "dense", None, seed) for seed in seeds],
        f"btt r=2, dense from step {SWITCH}": [run(data, width, "btt", SWITCH, seed) for seed in seeds],
        "btt r=2 all the way": [run(data, width, "btt", None, seed) for seed in seeds],
    }
    print(f"width {width}, {len(seeds)} seeds, rate {RATE}\n\n{'':30} {'loss':>7} {'accuracy':>9} {'CPU s':>7}")
    means = {}
    for name, runs in results.items():
        means[name] = [sum(getattr(r, field) for r in runs) / len(runs) for field in ("loss", "accuracy", "seconds")]
        loss, accuracy, seconds = means[name]
        print(f"{name:30} {loss:7.4f} {accuracy:9.4f} {seconds:7.1f}")
    dense, reverse, _ = means.values()
    runs = results[f"btt r=2, dense from step {SWITCH}"]
    before = [sum(r.before[i] for r in runs) / len(runs) for i in (0, 1)]
    print(f"{'  before the switch':30} {before[0]:7.4f} {before[1]:9.4f}")
    print(
        f"\nCPU time relative to dense {reverse[2] / dense[2]:.2f}, reported only. Staying structured is as good here, and"
    )
    print("cheaper: switch where the model is to be deployed dense.\n")
    if options.plot:
        draw({name: runs[0].losses for name, runs in results.items()}, options.plot)
    quick = options.quick
    verdict(
        [
            ("difference of the outputs at the switch", max(r.difference for r in runs), "<=", 1e-5),
            ("loss, relative to dense", reverse[0] / dense[0], "<=", 1.3 if quick else 1.15),
            ("accuracy lost against dense", dense[1] - reverse[1], "<=", 0.02 if quick else 0.01),
            ("loss, relative to that before the switch", reverse[0] / before[0], "<=", 0.95),
        ]
    )


def run(data: digits.Data, width: int, structure: str, switch: int | None, seed: int) -> Result:
    """250 steps of Adam; at ``switch`` the layers become dense."""
    model = digits.new(width, structure, seed, **({"rank": 2} if structure == "btt" else {}))
    optimizer, order = digits.optimizer_of(model, RATE), torch.Generator().manual_seed(seed)
    started = time.process_time()
    losses = digits.train(model, optimizer, data, RATE, order, range(switch or digits.STEPS))
    seconds = time.process_time() - started
    difference, before = 0.0, (0.0, 0.0)
    if switch is not None:
        before, outputs = digits.evaluated(model, data), logits(model, data)
        for group in optimizer.param_groups:  # densify takes over the current rates: let them be those of a whole step
            group["lr"] = RATE * group["multiplier"]
        started = time.process_time()
        snn.densify(model, optimizer)
        seconds += time.process_time() - started
        difference = float((logits(model, data) - outputs).abs().max() / outputs.abs().max())
        dense = {id(layer.weight) for layer in model.hidden}

        def fraction(step: int, group: dict[str, Any]) -> float:
            if not dense & {id(p) for p in group["params"]}:
                return digits.schedule(step, group)
            return FASTER * min(1.0, (step - switch + 1) / WARMUP) * digits.schedule(step, group)

        started = time.process_time()
        losses += digits.train(model, optimizer, data, RATE, order, range(switch, digits.STEPS), fraction)
        seconds += time.process_time() - started
    return Result(*digits.evaluated(model, data), seconds, losses, difference, before)


@torch.no_grad()
def logits(model: torch.nn.Module, data: digits.Data) -> torch.Tensor:
    """Outputs of the test samples."""
    return model(data.test)


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Training losses, smoothed over ten steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, values in losses.items():
        ax.plot(np.convolve(values, np.ones(10) / 10, mode="valid"), label=name)
    ax.axvline(SWITCH, color="grey", linestyle=":")
    ax.set(xlabel="step", ylabel="training loss", yscale="log")
    ax.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
