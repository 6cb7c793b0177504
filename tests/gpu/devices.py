"""torch and CuPy with a CUDA device, as fixtures: tests skip with the reason where there is none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


def missing(library: str) -> str | None:
    """Why a library cannot be used on a device here, or None."""
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    if library == "torch":
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    import cupy

    return None if cupy.cuda.is_available() else "CuPy finds no CUDA device"


def skip_without_any() -> None:
    """Skip a whole module where neither library has a device."""
    reasons = [missing("torch"), missing("cupy")]
    if all(reasons):
        pytest.skip("; ".join(map(str, reasons)), allow_module_level=True)


@pytest.fixture(scope="session")
def on_torch():
    """torch with a device."""
    reason = missing("torch")
    if reason:
        pytest.skip(reason)
    import torch

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return torch


@pytest.fixture(scope="session")
def cupy():
    """CuPy with a device."""
    reason = missing("cupy")
    if reason:
        pytest.skip(reason)
    import cupy

    return cupy
