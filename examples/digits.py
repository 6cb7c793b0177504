"""What the examples on digits share: scikit-learn's digits, enlarged and transformed, a residual network and its training.

Nothing is downloaded; results repeat exactly on one machine, and vary between machines by less than between seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import structmat.nn as snn

STEPS, WARMUP, BATCH = 250, 20, 128
BASE = 64  # width at which learning rates are stated


class Data(NamedTuple):
    """Standardised images of 16x16 with their pixels permuted, so that no structure profits from the grid; classes."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


def load() -> Data:
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


class Network(nn.Module):
    """256 pixels, three hidden layers with layer norms and GELU, the last two residual, a dense head of zeros."""

    def __init__(self, width: int, structure: str, **options: Any) -> None:
        super().__init__()
        sizes = [(256, width), (width, width), (width, width)]
        self.norms = nn.ModuleList(nn.LayerNorm(m) for _, m in sizes)
        self.hidden = nn.ModuleList(snn.StructuredLinear(n, m, structure=structure, **options) for n, m in sizes)
        if structure == "dense":
            snn.densify(self)
        self.head = nn.Linear(width, 10)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for i, (norm, layer) in enumerate(zip(self.norms, self.hidden, strict=True)):
            h = nn.functional.gelu(norm(layer(x)))
            x = h if i == 0 else x + h
        return self.head(x)

    @property
    def weights(self) -> int:
        """Numbers that the matrices of the hidden layers are made of."""
        return sum(p.numel() for n, p in self.hidden.named_parameters() if not n.endswith("bias"))

    @property
    def macs(self) -> int:
        """Multiply-adds of the hidden layers for one sample."""
        return sum(
            m.flops() // 2 if isinstance(m, snn.StructuredLinear) else m.in_features * m.out_features
            for m in self.hidden
            if isinstance(m, (snn.StructuredLinear, nn.Linear))
        )


def new(width: int, structure: str, seed: int, **options: Any) -> Network:
    """A network drawn from a seed."""
    torch.manual_seed(seed)
    return Network(width, structure, **options)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Adam:
    """Adam with the learning rates of the structure."""
    return torch.optim.Adam(snn.param_groups(model, rate, base_width=BASE))


def schedule(step: int, _group: dict[str, Any]) -> float:
    """Fraction of the learning rate: 20 steps of warm-up, and a cosine to zero."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    rate: float,
    order: torch.Generator,
    steps: Iterable[int] = range(STEPS),
    fraction: Callable[[int, dict[str, Any]], float] = schedule,
) -> list[float]:
    """Take steps, at ``rate`` times the multiplier of every parameter group times its fraction; the losses of the batches."""
    losses = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["multiplier"] * fraction(step, group)
        batch = torch.randint(len(data.train), (BATCH,), generator=order)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data.train[batch]), data.train_classes[batch])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def evaluated(model: nn.Module, data: Data) -> tuple[float, float]:
    """Loss on the training set, accuracy on the test set."""
    loss = nn.functional.cross_entropy(model(data.train), data.train_classes)
    accuracy = (model(data.test).argmax(1) == data.test_classes).float().mean()
    return float(loss), float(accuracy)
