"""Running a model over batches: calls, masks and the rows that count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Mask = str | Callable[[Any], torch.Tensor | None] | None


def layer_names(plan: Iterable[Any]) -> list[str]:
    """The layers of a plan that are to be converted, or the names themselves; each once."""
    chosen = getattr(plan, "converted", plan)
    return list(dict.fromkeys(entry if isinstance(entry, str) else entry.name for entry in chosen))


def submodule(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module of a name; ``KeyError`` that names it."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise KeyError(f"{type(model).__name__} has no layer {name!r}") from error


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: torch.nn.Module, batch: Any) -> Any:
    """The model's output for a batch."""
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positions and keywords that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The input of a layer, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def read_mask(mask: Mask, batch: Any) -> torch.Tensor | None:
    """Which rows of a batch are real, ``(batch, tokens)`` of booleans; None where all are."""
    if mask is None:
        return None
    found = mask(batch) if callable(mask) else batch.get(mask) if isinstance(batch, Mapping) else None
    if found is None:
        return None
    if found.ndim != 2:
        raise ValueError(f"calibrate: mask: expected (batch, tokens), got shape {tuple(found.shape)}")
    return found != 0


def real_rows(x: torch.Tensor, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """The rows ``(tokens, n)`` of an input that are not padding."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    lead = x.shape[:-1]
    if lead == mask.shape or tuple(lead) == (mask.numel(),):
        return rows[mask.reshape(-1)]
    if lead == mask.T.shape:
        return rows[mask.T.reshape(-1)]
    if tuple(lead) == tuple(mask.shape[:1]):  # one row a text, as of a pooler
        return rows
    raise ValueError(
        f"calibrate: {name}: its input {tuple(x.shape)} does not fit the mask {tuple(mask.shape)}; "
        "give mask= a function of the batch, or None"
    )
