"""Conversion: the layers of a plan become structured, in place, all of them or none."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from structmat.nn import huggingface
from structmat.nn.calibration import Calibration
from structmat.nn.fitting import Job, fit
from structmat.nn.joint import asking, grouped
from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import put
from structmat.nn.plan import Entry, Plan, check
from structmat.nn.sharding import check_unwrapped
from structmat.nn.shared_work import fit_over
from structmat.projection.moments import Moments
from structmat.projection.progress import bar

FEW = 5  # samples for each input below which moments are overfitted, by measurement on a transformer


def convert(
    model: nn.Module,
    plan: Plan,
    moments: Mapping[str, Moments] | None = None,
    *,
    held_out: Mapping[str, Moments] | None = None,
    joint: bool = False,
    centered: bool = True,
    damping: float | None = None,
    optimizer: Any = None,
    group: Any = None,
    threads: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Project the layers of a plan and put structured layers in their places.

    Everything is computed before the first layer is replaced: on any error, and on an interrupt, the model is as it was. With
    moments the outputs are kept near (activation-aware), without them the weights, which ruins trained networks.

    Parameters
    ----------
    model
        The model that was planned for; changed in place and returned.
    plan
        From :func:`structmat.nn.plan`.
    moments
        Of the inputs of the layers by name, from :func:`structmat.nn.calibrate`.
    held_out
        Of other data, for the report alone.
    joint
        True projects low-rank layers that read the same input (query, key and value; gate and up) as one matrix, their weights
        on top of each other: they share its right factor, one parameter in all of them, and the budget buys a larger rank.
        ``"joint": True`` in a config asks for its layers alone. Which layers these are is known from the calibration. There are
        as many parameters and more flops, as every layer multiplies by the shared factor: 0.75 instead of 0.5 of dense for
        three equal square layers. Layers that would need more than dense (small keys and values) are projected alone.
    centered
        True minimises the error of centred inputs and lets the bias take up the mean, for layers that have one.
    damping
        Fraction of the mean diagonal that is added to the moments. Default: 1e-3, and 0.1 for fewer than ``2 n`` samples.
    optimizer
        The optimizer of the model, if there is one: refused if it holds a parameter that is replaced, which it would go on
        updating to no effect.
    group
        A ``torch.distributed`` group (``torch.distributed.group.WORLD``) whose processes all make this call with the same
        model, plan and moments: each projects a part of the layers, largest first, and all get the same ones, bit by bit those
        of one process alone. Default: this process projects all of them.
    threads
        Layers that are projected at once, with one BLAS thread each where threadpoolctl is installed. Default: the cores.
    progress
        True shows a bar on runs of more than a second (needs tqdm).

    Returns
    -------
    torch.nn.Module
        The model; the structured layer itself if the model is one linear layer.

    Raises
    ------
    ValueError
        If the plan is not of this model, a layer is converted already or has no values, moments are missing or of another
        width, layers are to be joined without a :class:`structmat.nn.Calibration`, the optimizer was built before, or the model
        is wrapped already (DDP, ``fully_shard``, ``torch.compile``).

    Warns
    -----
    UserWarning
        Without moments, and for moments of few samples.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> plan = snn.plan(model, {"0": {"structure": "low_rank", "rank": 8}})
    >>> moments = snn.calibrate(model, [torch.randn(1000, 16)], plan)
    >>> snn.convert(model, plan, moments)[0].operator.rank
    8
    """
    check_unwrapped(model, "convert")
    check(plan, model)
    check_optimizer(model, plan, optimizer)
    for given, what in ((moments, "moments"), (held_out, "held_out")):
        if given is not None:
            check_moments(plan, given, what)
    if moments is None:
        warn_data_free(plan)
    else:
        warn_few(plan, moments)
    groups = grouped(plan.converted, _inputs(plan, moments, joint), model, joint)
    jobs = [
        [
            Job(
                entry.name,
                model.get_submodule(entry.name),
                chosen(entry),
                None if moments is None else moments[entry.name],
                None if held_out is None else held_out[entry.name],
                centered,
                damping,
            )
            for entry in together
        ]
        for together in groups
    ]
    with bar(progress, "convert") as advance:
        if group is None:
            found = fit_all(jobs, threads, advance)
        else:
            with _one_blas_thread(_workers(len(jobs), threads)):  # as if all were projected here: the same bits
                found = fit_over(group, jobs, lambda some: fit_all(some, threads, advance))
    pairs = [pair for together, made in zip(groups, found, strict=True) for pair in zip(together, made, strict=True)]
    layers = {entry.name: layer for entry, layer in pairs}
    with all_or_nothing(model) as replaced:
        for entry in plan.converted:
            replaced(entry, layers[entry.name])
    return finished(model, plan, layers)


def _inputs(plan: Plan, moments: Any, joint: bool) -> tuple[tuple[str, ...], ...]:
    """Names of the layers that read the same input, as far as it matters."""
    found = asking(plan.converted, joint, "convert")
    if not found:
        return ()
    if not isinstance(moments, Calibration):
        raise ValueError(
            f"convert: joint: which layers read the same input as {found[0].name or 'the model'} is known from a calibration; "
            f"expected moments from structmat.nn.calibrate, got {type(moments).__name__}"
        )
    return moments.groups


def finished(model: nn.Module, plan: Plan, layers: Mapping[str, StructuredLinear]) -> nn.Module:
    """The converted model, known to transformers; the layer itself where the model was one linear layer."""
    untie(model, plan)
    huggingface.attach(model)
    return layers.get("", model)


# ---- checks ---------------------------------------------------------------------------------------------------------------


def chosen(entry: Entry) -> Any:
    """The choice of an entry that is converted."""
    if entry.choice is None:
        raise ValueError(f"{entry.name}: planned without a config")
    return entry.choice


def check_optimizer(model: nn.Module, plan: Plan, optimizer: Any) -> None:
    """Raise ``ValueError`` if an optimizer holds parameters that are to be replaced."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [e.name for e in plan.converted if any(id(p) in held for p in model.get_submodule(e.name).parameters())]
    if lost:
        raise ValueError(
            f"convert: the optimizer was built before the conversion and holds parameters of {len(lost)} layers that are "
            f"replaced ({', '.join(lost[:3])}): it would train nothing there; build it after convert"
        )


def check_moments(plan: Plan, moments: Mapping[str, Moments], what: str = "moments") -> None:
    """Raise ``ValueError`` if moments are missing or not as wide as the inputs of a layer."""
    for entry in plan.converted:
        found = moments.get(entry.name)
        if found is None:
            raise ValueError(f"convert: {what}: none for {entry.name or 'the model'}; calibrate with the same plan")
        if not isinstance(found, Moments):
            raise TypeError(f"convert: {what}: {entry.name}: expected structmat.Moments, got {type(found).__name__}")
        if len(found.total) != entry.shape[1]:
            raise ValueError(
                f"convert: {what}: {entry.name} has {entry.shape[1]} inputs, its moments are of {len(found.total)}"
            )


def warn_data_free(plan: Plan) -> None:
    """Warn that a conversion without data ruins a trained model."""
    share = plan.params / plan.dense_params if plan.dense_params else 1.0
    if share <= 0.7:
        warnings.warn(
            f"convert: {len(plan.converted)} layers to {share:.0%} of their parameters without calibration data; measured on a "
            "trained transformer at 50 %, that left a cosine of 0.2 to 0.35 to the original outputs, with moments 0.74 to 0.8: "
            "pass moments=calibrate(...)",
            UserWarning,
            stacklevel=3,
        )


def warn_few(plan: Plan, moments: Mapping[str, Moments]) -> None:
    """Warn of moments of fewer than five samples for each input."""
    thin = [e for e in plan.converted if moments[e.name].count < FEW * e.shape[1]]
    if thin:
        least = min(thin, key=lambda e: moments[e.name].count / e.shape[1])
        warnings.warn(
            f"convert: {len(thin)} layers have seen fewer than {FEW} samples for each input ({least.name}: "
            f"{moments[least.name].count} samples of {least.shape[1]} inputs): their errors on other data will be larger",
            UserWarning,
            stacklevel=3,
        )


# ---- work and placement ---------------------------------------------------------------------------------------------------


def fit_all(
    groups: Iterable[Sequence[Job]], threads: int | None, advance: Callable[[int, int], Any]
) -> list[list[StructuredLinear]]:
    """The layers of all groups of jobs, several groups at once; an error or interrupt cancels those that have not begun."""
    if threads is not None and threads < 1:
        raise ValueError(f"convert: threads: expected at least 1, got {threads}")
    todo = list(groups)
    advance(0, sum(map(len, todo)))
    workers = _workers(len(todo), threads)
    with _one_blas_thread(workers), ThreadPoolExecutor(workers) as pool:
        largest_first = sorted(range(len(todo)), key=lambda i: -sum(job.module.weight.numel() for job in todo[i]))
        futures = {i: pool.submit(fit, todo[i]) for i in largest_first}
        try:
            for future in as_completed(futures.values()):
                advance(len(future.result()), 0)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [futures[i].result() for i in range(len(todo))]


def _workers(count: int, threads: int | None) -> int:
    """Groups of layers that are projected at once."""
    return min(max(1, count), threads or _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_blas_thread(workers: int) -> Any:
    """One BLAS thread for each worker, where threadpoolctl can see to it."""
    if workers == 1 or importlib.util.find_spec("threadpoolctl") is None:
        return nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[Callable[[Entry, nn.Module], None]]:
    """A function that puts a layer in all places of an entry; what it has replaced is put back if the block does not end."""
    undo: list[tuple[str, nn.Module]] = []
    ended = False

    def replaced(entry: Entry, layer: nn.Module) -> None:
        for place in entry.places:
            undo.append((place, model.get_submodule(place)))
            put(model, place, layer)

    try:
        yield replaced
        ended = True
    finally:
        if not ended:
            for place, old in reversed(undo):
                put(model, place, old)


def untie(model: nn.Module, plan: Plan) -> None:
    """Tell transformers that an output head is no longer tied to the embedding, or loading would overwrite it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, StructuredLinear) and any(
        model.get_submodule(e.name) is head for e in plan.converted if e.name
    ):
        model.config.tie_word_embeddings = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
