"""Fitting: one dense layer becomes a structured one, with a record of how far its weight and its outputs are off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from structmat.nn.choice import Choice
from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import is_conv1d, mark, weight_of
from structmat.projection.moments import Moments
from structmat.projection.project import project

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


def fit(job: Job) -> StructuredLinear:
    """The structured layer, with a ``record`` of its errors; in the dtype and on the device of the dense one.

    Raises ``ValueError`` that names the layer.
    """
    weight = weight_of(job.module)
    exact = weight.double().cpu().numpy()
    options = job.choice.project_options
    target = exact if job.target is None else job.target
    centered = job.centered and job.module.bias is not None and job.moments is not None
    how: list[str] = []
    try:
        if job.moments is None:
            found = project(target, job.choice.family, **options)
        else:
            second, note = checked(job.moments, centered)
            how += note
            damping = default_damping(job.moments) if job.damping is None else job.damping
            mean = job.moments.mean if centered else None
            found = project(target, job.choice.family, weight=second, mean=mean, damping=damping, **options)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise ValueError(f"{job.name or 'the model'}: {error}") from error
    bias = None if job.module.bias is None else job.module.bias.detach().clone()
    if centered and bias is not None and job.moments is not None:
        before = job.moments.mean if job.input_mean is None else job.input_mean
        shift = exact @ before - np.asarray(found.operator @ job.moments.mean)
        bias = (bias.double() + torch.from_numpy(shift).to(bias.device)).to(bias.dtype)
    layer = StructuredLinear.from_operator(found.operator, bias, device=weight.device, dtype=weight.dtype)
    layer.requires_grad_(any(p.requires_grad for p in job.module.parameters()))
    difference = exact - layer.operator.to_dense().detach().double().cpu().numpy()  # after the cast
    record = Record(
        job.choice.label,
        _relative(difference, exact),
        None if job.moments is None else output_error(exact, difference, job.moments, centered),
        None if job.held_out is None else output_error(exact, difference, job.held_out, centered),
        "; ".join([found.method, *how]),
        None if job.moments is None else job.moments.count,
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
