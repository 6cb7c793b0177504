"""Speed: a structured layer timed against the dense one, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from structmat.nn.layer import StructuredLinear
from structmat.operator import Operator

SECONDS = 0.1  # of a comparison
LEAST = 5  # turns at least


def measured_speed(operator: Operator, batch: int, dtype: torch.dtype, device: torch.device) -> float:
    """Time of the dense layer over that of the structured one, for ``batch`` rows without gradients.

    The least time of each over at least five turns, with as many threads as torch has; the values are random.
    """
    m, n = operator.shape
    random: dict[str, Any] = {"device": device, "dtype": dtype}
    dense = nn.Linear(n, m, **random)
    layer = StructuredLinear.from_operator(operator, torch.zeros(m))
    empty = next(layer.parameters()).is_meta
    layer = (layer.to_empty(device=device) if empty else layer.to(device)).to(dtype)
    x = torch.randn(batch, n, **random)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.05)
        return _ratio(lambda: dense(x), lambda: layer(x), device)


def _ratio(first: Callable[[], Any], second: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    best = [float("inf"), float("inf")]
    for call in (first, second):
        call()
    wait()
    end, turns = time.perf_counter() + SECONDS, 0
    while turns < LEAST or time.perf_counter() < end:
        for i, call in enumerate((first, second)):
            started = time.perf_counter()
            call()
            wait()
            best[i] = min(best[i], time.perf_counter() - started)
        turns += 1
    return best[0] / best[1]
