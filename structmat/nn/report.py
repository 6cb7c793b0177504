"""Report: how far every structured layer of a model is from the dense one that it replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from structmat.nn.fitting import Record
from structmat.nn.joint import shared_factors
from structmat.nn.layer import StructuredLinear
from structmat.nn.table import table


@dataclass(frozen=True)
class Line:
    """One structured layer: its name, sizes, and the record of its conversion, None for one that was not converted.

    ``params`` does not count a factor that a layer before it has too.
    """

    name: str
    shape: tuple[int, int]
    structure: str
    params: int
    flops: int
    record: Record | None


class Report:
    """What :func:`report` returns: iterate over its lines, print it as a table."""

    def __init__(self, lines: tuple[Line, ...]) -> None:
        self.lines = lines

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def params(self) -> int:
        """Stored numbers of all structured weights, shared ones once."""
        return sum(line.params for line in self.lines)

    @property
    def weight_error(self) -> float | None:
        """Mean relative error of the weights of the layers that were converted."""
        return _mean([line.record.weight_error for line in self.lines if line.record])

    @property
    def output_error(self) -> float | None:
        """Mean relative error of the outputs on the calibration data."""
        return _mean([line.record.output_error for line in self.lines if line.record])

    @property
    def held_out_error(self) -> float | None:
        """Mean relative error of the outputs on held-out data."""
        return _mean([line.record.held_out_error for line in self.lines if line.record])

    def __repr__(self) -> str:
        return f"<Report of {len(self)} structured layers>"

    def __str__(self) -> str:
        head = ("layer", "shape", "structure", "params", "flops", "weight error", "output error", "held-out")
        rows = [head, *(_row(line) for line in self.lines)]
        dense = sum(line.shape[0] * line.shape[1] for line in self.lines)
        flops = sum(line.flops for line in self.lines)
        means = [_shown(x) for x in (self.weight_error, self.output_error, self.held_out_error)]
        rows.append(("all", "", "", f"{self.params / dense:.1%}", f"{flops / (2 * dense):.2f}x", *means))
        return "\n".join((*table(rows, left=(0, 2)), *_methods(self.lines)))


def report(model: nn.Module) -> Report:
    """The structured layers of a model with the errors of their weights and of their outputs.

    The errors were measured when the layers were converted, after rounding to their dtype; training since then is not in them.
    Output error is ``||(W - A) X|| / ||W X||`` over the calibration inputs, centred where a bias takes up the mean: it, not the
    weight error, says what a conversion does to a model. The last line has the means.

    Parameters
    ----------
    model
        Any module with structured layers.

    Raises
    ------
    ValueError
        If it has none.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> plan = snn.plan(model, {"0": {"structure": "low_rank", "rank": 8}}, min_speedup=0)
    >>> lines = snn.report(snn.convert(model, plan, snn.calibrate(model, [torch.randn(99, 8)], plan)))
    >>> len(lines), lines.output_error < 1e-5
    (1, True)
    """
    shared = shared_factors(model)
    lines = tuple(
        Line(
            name,
            (module.out_features, module.in_features),
            module.structure,
            module.nparams - sum(module.factors[slot].numel() for slot in shared.get(name, ())),
            module.flops(),
            getattr(module, "record", None),
        )
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear)
    )
    if not lines:
        raise ValueError(f"report: {type(model).__name__} has no structured layers")
    return Report(lines)


def _mean(values: list[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.3f}"


def _row(line: Line) -> tuple[str, ...]:
    m, n = line.shape
    record = line.record
    share, flops = f"{line.params / (m * n):.1%}", f"{line.flops / (2 * m * n):.2f}x"
    sizes = (line.name or "(model)", f"{m}x{n}", record.label if record else line.structure, share, flops)
    errors = (record.weight_error, record.output_error, record.held_out_error) if record else (None, None, None)
    return (*sizes, *map(_shown, errors))


def _methods(lines: tuple[Line, ...]) -> Iterator[str]:
    """How the layers were made, each way once with the number of layers."""
    how = [
        "not converted in this process"
        if line.record is None
        else line.record.method + ("" if line.record.tokens is None else f"; {line.record.tokens} tokens")
        for line in lines
    ]
    for method in dict.fromkeys(how):
        yield f"{how.count(method)} layers: {method}"
