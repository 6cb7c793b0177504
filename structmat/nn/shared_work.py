"""Shared work: the projections of one conversion, spread over processes by ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from structmat.nn.fitting import Job
from structmat.nn.layer import StructuredLinear


def fit_over(
    group: Any,
    groups: Sequence[Sequence[Job]],
    fit_all: Callable[[list[Sequence[Job]]], list[list[StructuredLinear]]],
) -> list[list[StructuredLinear]]:
    """The layers of all groups of jobs, in every process of a ``torch.distributed`` group; a collective call.

    The groups go round the processes, largest first; every process projects its own and broadcasts them. Raises
    ``RuntimeError`` if ``torch.distributed`` is not initialised and ``ValueError``, in all processes, if they were given
    other jobs or one of them fails.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("convert: group: torch.distributed is not initialised in this process")
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(set(_gathered([_about(job) for jobs in groups for job in jobs], group))) != 1:
        raise ValueError(
            "convert: group: the processes have other plans or moments of other numbers of samples; plan in one process "
            "(timings differ) and broadcast, and reduce the moments"
        )
    order = sorted(range(len(groups)), key=lambda i: -sum(job.module.weight.numel() for job in groups[i]))
    mine = order[rank::size]
    failure: str | None = "stopped"
    made: list[list[StructuredLinear]] = []
    try:
        made = fit_all([groups[i] for i in mine])
        failure = None
    except ValueError as error:
        failure = str(error)
    finally:  # whatever happened here, the others must not wait for layers that will not come
        failures = _gathered(failure, group)
    found = next((f"process {i}: {text}" for i, text in enumerate(failures) if text is not None), None)
    if found is not None:
        raise ValueError(f"convert: {found}")
    own = dict(zip(mine, made, strict=True))
    layers: list[list[StructuredLinear]] = [[] for _ in groups]
    for place, i in enumerate(order):
        sent: list[Any] = [own.get(i)]
        dist.broadcast_object_list(sent, group=group, group_src=place % size)
        here = next(groups[i][0].module.parameters()).device
        layers[i] = own[i] if i in own else [layer.to(here) for layer in sent[0]]
    return layers


def _about(job: Job) -> str:
    """What has to agree between processes."""
    count = None if job.moments is None else job.moments.count
    return f"{job.name}: {job.choice.label} of {tuple(job.module.weight.shape)}, {count} samples"


def _gathered(thing: Any, group: Any) -> list[Any]:
    """One object of every process; lists as text, so that they can be compared."""
    import torch.distributed as dist

    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, "\n".join(thing) if isinstance(thing, list) else thing, group=group)
    return everyones
