"""Fitting: dense layers become structured ones, with a record of how far its weight and its outputs are off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from structmat.nn.choice import Choice
from structmat.nn.joint import apart, dearer, split, tie
from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import is_conv1d, mark, weight_of
from structmat.projection.moments import Moments
from structmat.projection.project import project
from structmat.structures.interpolative import Interpolative

DAMPING, MORE_DAMPING = 1e-3, 0.1  # of the mean diagonal; more where there are fewer than 2 n samples


@dataclass(frozen=True)
class Record:
    """How a layer was converted.

    Attributes
    ----------
    label
        Structure and options.
    weight_error
        Relative Frobenius error of the weight.
    output_error
        Relative error of the outputs on the calibration data, ``||(W - A) X|| / ||W X||``, centred where the bias takes up
        the mean; None where there were no moments.
    held_out_error
        The same on other data, where moments of it were given.
    method
        The algorithm, and what was done to the moments.
    tokens
        Samples behind the moments.
    """

    label: str
    weight_error: float
    output_error: float | None
    held_out_error: float | None
    method: str
    tokens: int | None


@dataclass(frozen=True)
class Job:
    """What it takes to convert one layer, apart from the model.

    Attributes
    ----------
    name
        For messages.
    module
        The dense layer, which is only read.
    choice
        What it becomes.
    moments, held_out
        Of its inputs on the calibration data and on other data.
    centered
        Whether the bias takes up the mean of the error.
    damping
        Fraction of the mean diagonal that is added to the second moment; None for the default.
    target
        ``(out, in)``: what is projected instead of the weight (error-compensating conversion).
    input_mean
        ``(in,)``: the mean input of the dense layer where it differs from that of the moments.
    """

    name: str
    module: Any
    choice: Choice
    moments: Moments | None = None
    held_out: Moments | None = None
    centered: bool = True
    damping: float | None = None
    target: np.ndarray | None = None
    input_mean: np.ndarray | None = None

    @property
    def weight(self) -> np.ndarray:
        """The dense weight ``(out, in)`` in double precision."""
        return weight_of(self.module).double().cpu().numpy()


def fit(jobs: Sequence[Job]) -> list[StructuredLinear]:
    """The structured layers of one job, or of several that read the same input, with a ``record`` of their errors.

    Several are projected as one matrix, their weights on top of each other, and share its right factor. Every layer has the
    dtype and device of the dense one. Where a tolerance leads to a joint rank that gives the shortest of them more flops than
    dense, those are projected alone and the others together. Raises ``ValueError`` that names the layers.
    """
    first, moments = jobs[0], jobs[0].moments
    centered = first.centered and moments is not None and all(job.module.bias is not None for job in jobs)
    options = first.choice.project_options
    target = np.concatenate([job.weight if job.target is None else job.target for job in jobs])
    how: list[str] = []
    try:
        if moments is None:
            found = project(target, first.choice.family, **options)
        else:
            second, note = checked(moments, centered)
            how += note
            damping = default_damping(moments) if first.damping is None else first.damping
            mean = moments.mean if centered else None
            found = project(target, first.choice.family, weight=second, mean=mean, damping=damping, **options)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise ValueError(f"{', '.join(job.name or 'the model' for job in jobs)}: {error}") from error
    heights = [weight_of(job.module).shape[0] for job in jobs]
    if len(jobs) > 1 and "tol" in options and _too_high(found.operator, min(heights)):
        parts = apart(jobs, [height > min(heights) for height in heights])
        made = {id(job): layer for part in parts for job, layer in zip(part, fit(part), strict=True)}
        return [made[id(job)] for job in jobs]
    operators = [found.operator] if len(jobs) == 1 else split(found.operator, heights)
    layers = []
    for job, operator in zip(jobs, operators, strict=True):
        with_whom = [other.name.rpartition(".")[2] for other in jobs if other is not job]
        joined = [f"jointly with {', '.join(with_whom)}"] if with_whom else []
        layers.append(_layer(job, operator, centered, "; ".join([found.method, *how, *joined])))
    if len(jobs) > 1:
        tie(layers)
    return layers


def _too_high(operator: Any, height: int) -> bool:
    """Whether the rank that a tolerance took for several layers gives one of so many rows more flops than dense."""
    return dearer(operator.rank, height, operator.shape[1], isinstance(operator, Interpolative))


def _layer(job: Job, operator: Any, centered: bool, method: str) -> StructuredLinear:
    """The layer of an operator, its bias corrected, with the record of its errors as they are after rounding."""
    weight, exact, moments = weight_of(job.module), job.weight, job.moments
    bias = None if job.module.bias is None else job.module.bias.detach().clone()
    if centered and bias is not None and moments is not None:
        before = moments.mean if job.input_mean is None else job.input_mean
        shift = exact @ before - np.asarray(operator @ moments.mean)
        bias = (bias.double() + torch.from_numpy(shift).to(bias.device)).to(bias.dtype)
    layer = StructuredLinear.from_operator(operator, bias, device=weight.device, dtype=weight.dtype)
    layer.factors.requires_grad_(job.module.weight.requires_grad)
    if layer.bias is not None and job.module.bias is not None:
        layer.bias.requires_grad_(job.module.bias.requires_grad)
    difference = exact - layer.operator.to_dense().detach().double().cpu().numpy()  # after the cast
    record = Record(
        job.choice.label,
        _relative(difference, exact),
        None if moments is None else output_error(exact, difference, moments, centered),
        None if job.held_out is None else output_error(exact, difference, job.held_out, centered),
        method,
        None if moments is None else moments.count,
    )
    mark(layer, "Conv1D" if is_conv1d(job.module) else "Linear", record)
    return layer.train(job.module.training)


def default_damping(moments: Moments) -> float:
    """1e-3 of the mean diagonal; 0.1 for fewer than ``2 n`` samples, which would be overfitted."""
    return DAMPING if moments.count >= 2 * len(moments.total) else MORE_DAMPING


def checked(moments: Moments, centered: bool) -> tuple[np.ndarray, list[str]]:
    """The second moment, lifted by its most negative eigenvalue where it is indefinite, and a note that says so."""
    second = (moments.second_moment + moments.second_moment.T) / 2
    center = np.multiply.outer(moments.mean, moments.mean) if centered else 0.0
    scale = float(np.trace(second)) / len(second)
    try:
        np.linalg.cholesky(second - center + 1e-9 * scale * np.eye(len(second)))
    except np.linalg.LinAlgError:
        values = np.linalg.eigvalsh(second - center)
        if values[0] < 0:
            lifted = second - 1.001 * values[0] * np.eye(len(second))
            notable = values[0] < -1e-6 * abs(values[-1])
            note = [f"indefinite moments, lowest eigenvalue {values[0] / values[-1]:.1e} of the largest: lifted to 0"]
            return lifted, note if notable else []
    return second, []


def output_error(weight: np.ndarray, difference: np.ndarray, moments: Moments, centered: bool) -> float:
    """``sqrt(tr(D C D^T) / tr(W C W^T))`` with the second moment ``C`` of the inputs, centred or not."""
    second = moments.second_moment - (np.multiply.outer(moments.mean, moments.mean) if centered else 0.0)
    whole = float(np.vdot(weight, weight @ second))
    return math.sqrt(max(0.0, float(np.vdot(difference, difference @ second))) / whole) if whole > 0 else 0.0


def _relative(difference: np.ndarray, whole: np.ndarray) -> float:
    norm = float(np.linalg.norm(whole))
    return float(np.linalg.norm(difference)) / norm if norm else 0.0
