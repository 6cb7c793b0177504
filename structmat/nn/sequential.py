"""Sequential conversion: layer after layer, each fitted to the inputs that the layers before it, converted, will give it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from structmat.nn.calibration import Sums
from structmat.nn.conversion import all_or_nothing, check_optimizer, chosen, finished, fit_all, warn_few
from structmat.nn.fitting import Job, default_damping
from structmat.nn.joint import asking, grouped
from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import weight_of
from structmat.nn.plan import Entry, Plan, check
from structmat.nn.running import Mask, arguments, evaluating, read_mask, real_rows
from structmat.nn.sharding import check_unwrapped
from structmat.nn.walk import Walk, units_of
from structmat.projection.moments import Moments
from structmat.projection.progress import Advance, bar


def convert_sequentially(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    joint: bool = False,
    blend: float = 0.5,
    damping: float | None = None,
    mask: Mask = "attention_mask",
    dtype: torch.dtype = torch.float32,
    optimizer: Any = None,
    threads: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Convert the layers of a plan in the order in which they run, each compensating the errors of those before it.

    With the inputs ``x`` of a layer in the original model and ``y`` in the partly converted one, centred where there is a bias,
    the target of the projection is

        ``(1 - blend) W + blend W (E[x y^T] + d I) (E[y y^T] + d I)^-1``,

    the weight and its least-squares compensation, in the norm of ``E[y y^T]``; the bias takes up the means. The full
    compensation (``blend=1``) gains little, because what skip connections carry along is not compensated; half of it was the
    better one by far on a trained transformer. Calibration is part of the call: the batches run through the model as it was and
    as it becomes, block after block where its blocks are a chain, every converted layer once. Memory: the inputs and outputs of
    all planned layers of one block, for all batches.

    Parameters
    ----------
    model, plan, joint, optimizer, threads, progress
        As for :func:`structmat.nn.convert`.
    batches, mask, dtype
        As for :func:`structmat.nn.calibrate`; all batches are kept.
    blend
        Share of the compensation, 0 to 1.
    damping
        ``d``, as a fraction of the mean diagonal; default 1e-3, and 0.1 for fewer than ``2 n`` samples.

    Returns
    -------
    torch.nn.Module
        The model, as :func:`structmat.nn.convert` does; on any error it is as it was.

    Raises
    ------
    ValueError
        As :func:`structmat.nn.convert` and :func:`structmat.nn.calibrate`, and for layers that run twice in a pass.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
    >>> plan = snn.plan(model, {"structure": "low_rank", "rank": 4})
    >>> model = snn.convert_sequentially(model, plan, [torch.randn(500, 16)])
    >>> [type(layer).__name__ for layer in model]
    ['StructuredLinear', 'ReLU', 'StructuredLinear']
    """
    check_unwrapped(model, "convert_sequentially")
    check(plan, model)
    check_optimizer(model, plan, optimizer)
    asking(plan.converted, joint, "convert_sequentially")
    if not 0.0 <= blend <= 1.0:
        raise ValueError(f"convert_sequentially: blend: expected a number from 0 to 1, got {blend}")
    data = list(batches)
    if not data:
        raise ValueError("convert_sequentially: expected at least one batch, got none")
    masks = [read_mask(mask, batch) for batch in data]
    modes = {e.name: model.get_submodule(e.name).training for e in plan.converted}
    layers: dict[str, StructuredLinear] = {}
    found: dict[str, Moments] = {}
    with bar(progress, "convert") as advance, evaluating(model), all_or_nothing(model) as replaced:
        advance(0, len(plan.converted))
        walk = Walk(model, units_of(model, plan), [arguments(batch) for batch in data])
        for unit, entries in walk.units:
            original, order = walk.original(unit, entries, masks)
            for stage in order:
                group = [e for e in entries if e.name in stage]
                own, cross = _stage_moments(walk, unit, group, original[stage[0]], masks, dtype)
                together = grouped(group, [stage], model, joint)
                jobs = [[_job(model, e, own, cross, blend, damping) for e in part] for part in together]
                for part, made in zip(together, fit_all(jobs, threads, _no_longer(advance)), strict=True):
                    for entry, layer in zip(part, made, strict=True):
                        replaced(entry, layer)
                        layers[entry.name], found[entry.name] = layer, own
                del original[stage[0]]
            walk.leave(unit)
        for name, layer in layers.items():
            layer.train(modes[name])
        warn_few(plan, found)  # inside: an error where warnings are errors
    return finished(model, plan, layers)


def _no_longer(advance: Advance) -> Advance:
    """Moves the bar without lengthening it: the length is known."""
    return lambda done, _: advance(done, 0)


# ---- one layer ------------------------------------------------------------------------------------------------------------


def _stage_moments(
    walk: Walk,
    unit: str,
    group: list[Entry],
    original: list[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    dtype: torch.dtype,
) -> tuple[Moments, Moments]:
    """Moments of the inputs as they are now, and ``sum x y^T``, ``sum x`` with those of the original model."""
    own, cross = Sums(dtype), Sums(dtype)
    name = group[0].name
    for i, y in enumerate(walk.inputs_now(unit, name)):
        rows = real_rows(y, masks[i], name)
        own.add(rows)
        cross.add(original[i], rows)
    return own.moments(name), Moments(cross.gram.cpu().numpy(), cross.total.cpu().numpy(), cross.count)


def _job(model: nn.Module, entry: Entry, own: Moments, cross: Moments, blend: float, damping: float | None) -> Job:
    """The job of one layer: its blended target, and the moments of its inputs as they are now."""
    module: Any = model.get_submodule(entry.name)
    weight = weight_of(module).double().cpu().numpy()
    second, between = own.second_moment, cross.second_moment
    if module.bias is not None:
        second = second - np.multiply.outer(own.mean, own.mean)
        between = between - np.multiply.outer(cross.mean, own.mean)
    share = default_damping(own) if damping is None else damping
    ridge = max(share, 1e-9) * float(np.trace(second)) / len(second) * np.eye(len(second))
    compensated = np.linalg.solve(second + ridge, (weight @ (between + ridge)).T).T
    target = blend * compensated + (1.0 - blend) * weight
    return Job(entry.name, module, chosen(entry), own, None, True, share, target, cross.mean)
