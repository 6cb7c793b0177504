"""Plan: which layers of a model are to be converted into what, what that saves, and what is left alone and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from structmat.nn.choice import Choice, example, joint_example
from structmat.nn.joint import least_height, wants
from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import is_dense_linear, obstacle, places, shape_of, tied_to
from structmat.nn.selection import match, read_selection
from structmat.nn.speed import measured_speed
from structmat.nn.table import table
from structmat.operator import Operator

TIED = ("skip", "error", "untie")


@dataclass(frozen=True)
class Entry:
    """One layer of a plan.

    Attributes
    ----------
    name, places
        Its name in the model, and all names under which the same module stands.
    kind
        ``"Linear"``, the class of a subclass of it, or ``"Conv1D"``.
    shape
        ``(out, in)``.
    choice
        What it is to become: structure and options; None where a pattern says None.
    params, dense_params
        Stored numbers of the weight, without the bias.
    flops, dense_flops
        For one row; a multiply-add counts as 2.
    speed
        Time of the dense layer over that of the structured one, above 1 is faster; None where it was not measured.
    joint_rank
        Where it asks to be projected jointly: the rank that ``flops`` and ``speed`` are for, if its budget buys one together
        with the layers of its module that are as wide and have the same config. ``params`` are those of the layer apart.
    skipped
        Why the layer stays as it is; None where it is converted.
    """

    name: str
    places: tuple[str, ...]
    kind: str
    shape: tuple[int, int]
    choice: Choice | None = None
    params: int = 0
    flops: int = 0
    speed: float | None = None
    joint_rank: int | None = None
    skipped: str | None = None

    @property
    def dense_params(self) -> int:
        """Entries of the dense weight."""
        return self.shape[0] * self.shape[1]

    @property
    def dense_flops(self) -> int:
        """Those of the dense product for one row."""
        return 2 * self.dense_params


class Plan:
    """What :func:`plan` returns: iterate over its entries, print it as a table.

    Attributes
    ----------
    entries
        One :class:`Entry` for each linear layer that a pattern names, in the order of the model.
    notes
        What holds for the model as a whole.
    """

    def __init__(self, entries: tuple[Entry, ...], notes: tuple[str, ...] = (), batch: int | None = None) -> None:
        self.entries, self.notes, self.batch = entries, notes, batch

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def converted(self) -> tuple[Entry, ...]:
        """The layers that will be structured."""
        return tuple(e for e in self.entries if e.skipped is None)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """The layers that stay as they are."""
        return tuple(e for e in self.entries if e.skipped is not None)

    @property
    def params(self) -> int:
        """Stored numbers of the weights that are converted."""
        return sum(e.params for e in self.converted)

    @property
    def dense_params(self) -> int:
        """Entries of the same weights today."""
        return sum(e.dense_params for e in self.converted)

    def __repr__(self) -> str:
        return f"<Plan: {len(self.converted)} layers converted, {len(self.skipped)} left as they are>"

    def __str__(self) -> str:
        head = ("layer", "shape", "structure", "params", "of dense", "flops", "speed", "")
        rows = [head, *(_row(e) for e in self.entries)]
        lines = table(rows, left=(0, 2, 7))
        share = f" = {self.params / self.dense_params:.1%} of {self.dense_params}" if self.dense_params else ""
        lines.append(f"{len(self.converted)} of {len(self)} layers, {self.params} parameters{share}")
        if self.batch is None:
            lines.append("speed: not measured (give batch=, the rows of one call); flops are a ratio to dense")
        else:
            lines.append(
                f"speed: dense time / structured time, measured on this machine, {self.batch} rows, no gradient"
            )
        return "\n".join((*lines, *self.notes))


def plan(
    model: nn.Module,
    selection: Any,
    *,
    budget: float | None = None,
    batch: int | None = None,
    min_speedup: float = 1.0,
    tied: str = "skip",
) -> Plan:
    """Say which linear layers of a model would be converted into what; nothing is changed.

    Parameters
    ----------
    model
        Any module, on any device. ``nn.Linear``, its subclasses without a forward of their own and transformers' ``Conv1D``
        are found.
    selection
        ``{pattern: config}``. A pattern is a layer's exact name, the end of names behind a dot (``"query"``,
        ``"attention.output.dense"``), ``"re:..."`` or a compiled expression that matches the whole name, or a function
        ``(module, name) -> bool``. None as config wins over everything; then an exact name; then the first pattern that
        matches. A config is a structure (``"low_rank"``, ``"btt"``, an Operator class) or a dict of ``structure`` and the
        options of :func:`structmat.project`: ``{"structure": "btt", "blocks": 4, "budget": 0.5}``. One config alone stands
        for all linear layers.
    budget
        Share of its dense parameters that each layer keeps, for configs without a size of their own.
    batch
        Rows of one call of a layer (texts times tokens). With it, layers are timed against dense ones, and those slower than
        ``min_speedup`` stay dense; without it only those that need more flops than dense do.
    min_speedup
        0 converts whatever is named.
    tied
        What becomes of a weight that another module holds too (an output head tied to the embedding): ``"skip"`` leaves it,
        ``"untie"`` converts the layer alone, ``"error"`` raises.

    Returns
    -------
    Plan
        Prints as a table; :func:`structmat.nn.calibrate` and :func:`structmat.nn.convert` take it.

    Raises
    ------
    ValueError
        If no layer matches or a config fits none of those that it names, a budget is above 1, or a tied weight is met with
        ``tied="error"``.
    TypeError
        If a pattern or config is none, or a structure does not take an option.

    Warns
    -----
    UserWarning
        For every pattern that matches nothing.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    >>> print(snn.plan(model, {"0": {"structure": "low_rank", "rank": 8}, "2": None}))
    layer  shape  structure         params  of dense  flops  speed
    0      64x64  low_rank(rank=8)    1024     25.0%  0.25x
    2      10x64                                                    skipped: as asked
    1 of 2 layers, 1024 parameters = 25.0% of 4096
    speed: not measured (give batch=, the rows of one call); flops are a ratio to dense
    """
    if tied not in TIED:
        raise ValueError(f"plan: tied: expected one of {', '.join(TIED)}, got {tied!r}")
    if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise ValueError(f"plan: batch: expected a number of rows of at least 1, got {batch!r}")
    patterns = read_selection(selection, budget)
    linears = {n: m for n, m in model.named_modules() if is_dense_linear(m) or isinstance(m, StructuredLinear)}
    matched = match(linears, patterns)
    if not matched:
        raise ValueError(f"plan: no linear layer matches; {type(model).__name__} has {_some(list(linears)) or 'none'}")
    others = tied_to(model)
    examples: dict[tuple[str, tuple[int, int]], Operator | str] = {}
    entries = []
    for name, choice in matched.items():
        module = linears[name]
        entry = Entry(name, tuple(places(model, name)), _kind(module), shape_of(module), choice)
        why = _reason(model, entry, module, others, tied)
        if why is None and choice is not None:
            key = choice.label, entry.shape
            if key not in examples:
                examples[key] = _example_or_reason(choice, entry.shape)
            found = examples[key]
            if isinstance(found, str):
                why = found
            else:
                entry = replace(entry, params=found.nparams, flops=found.flops())
        entries.append(replace(entry, skipped=why))
    _check_fit(entries, examples)
    entries = _jointly(entries, examples)
    entries = _slow_ones_out(entries, linears, examples, batch, min_speedup)
    return Plan(tuple(entries), _notes(model, linears, matched), batch)


# ---- judging the layers ---------------------------------------------------------------------------------------------------


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _reason(model: nn.Module, entry: Entry, module: nn.Module, others: Mapping[str, str], tied: str) -> str | None:
    """Why a layer must be left, apart from its size and speed."""
    if entry.choice is None:
        return "as asked"
    if isinstance(module, StructuredLinear):
        return "structured already"
    why = obstacle(model, entry.name, module)
    if why is None and entry.name in others and tied != "untie":
        why = f"tied to {others[entry.name]}"
        if tied == "error":
            raise ValueError(f"plan: {entry.name}: its weight is {why}; tied='untie' converts it alone")
    return why


def _example_or_reason(choice: Choice, shape: tuple[int, int]) -> Operator | str:
    try:
        return example(choice, shape)
    except ValueError as error:
        return str(error)


def _check_fit(entries: list[Entry], examples: Mapping[Any, Operator | str]) -> None:
    """Raise if a config fits none of the layers that it names, or if nothing is left to be converted."""
    asked = [e for e in entries if e.choice is not None]
    for label in dict.fromkeys(e.choice.label for e in asked if e.choice):
        tried = [e for e in asked if e.choice and e.choice.label == label and (label, e.shape) in examples]
        if tried and all(isinstance(examples[label, e.shape], str) for e in tried):
            raise ValueError(f"plan: {label} fits none of {len(tried)} layers; {tried[0].name}: {tried[0].skipped}")
    if asked and all(e.skipped == "structured already" for e in asked):
        raise ValueError(
            f"plan: {_some([e.name for e in asked])}: converted already; use densify first to convert anew"
        )
    if asked and all(e.skipped for e in asked):
        raise ValueError(f"plan: no layer can be converted; {asked[0].name}: {asked[0].skipped}")


def _jointly(entries: list[Entry], examples: dict[Any, Operator | str]) -> list[Entry]:
    """Entries whose config asks to be joint, with the flops of the rank that a budget buys them together.

    Who reads the same input is not known before calibration: those of one module that are as wide and have the same config are
    taken to. The operators of the joint rank are added to ``examples``, for :func:`_slow_ones_out` to time.
    """
    groups: dict[Any, list[int]] = {}
    for i, entry in enumerate(entries):
        if entry.skipped is None and entry.choice is not None and wants(entry, False):
            key = entry.name.rpartition(".")[0], entry.shape[1], entry.choice.label
            groups.setdefault(key, []).append(i)
    result = list(entries)
    for group in groups.values():
        choice = entries[group[0]].choice
        if choice is None or len(group) == 1:
            continue
        heights = [entries[i].shape[0] for i in group]
        least, rank = least_height(choice, heights, entries[group[0]].shape[1])
        for i in group:
            shape = entries[i].shape
            if rank is not None and shape[0] >= least:
                found = examples[choice.label, shape, rank] = joint_example(choice, shape, rank)
                result[i] = replace(entries[i], flops=found.flops(), joint_rank=rank)
    return result


def _slow_ones_out(
    entries: list[Entry],
    linears: Mapping[str, nn.Module],
    examples: Mapping[Any, Any],
    batch: int | None,
    min_speedup: float,
) -> list[Entry]:
    """Entries with their speeds; those below the wanted one are skipped."""
    speeds: dict[Any, float] = {}
    result = []
    for entry in entries:
        if entry.skipped is None and entry.choice is not None:
            module = linears[entry.name]
            weight = next(module.parameters())
            if batch is not None and not weight.is_meta:
                which = entry.choice.label, entry.shape, *(() if entry.joint_rank is None else (entry.joint_rank,))
                key = which, weight.dtype, weight.device
                if key not in speeds:
                    speeds[key] = measured_speed(examples[which], batch, weight.dtype, weight.device)
                entry = replace(entry, speed=speeds[key])
            if min_speedup > 0:
                if entry.speed is not None and entry.speed < min_speedup:
                    why = f"measured {entry.speed:.2f} times as fast as dense at {batch} rows, expected {min_speedup:g}"
                    entry = replace(entry, skipped=why)
                elif entry.flops > entry.dense_flops:
                    why = f"{entry.flops / entry.dense_flops:.2f} times the flops of dense"
                    entry = replace(entry, skipped=why)
        result.append(entry)
    return result


def _notes(model: nn.Module, linears: Mapping[str, nn.Module], matched: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    rest = [n for n, m in linears.items() if n not in matched and not isinstance(m, StructuredLinear)]
    if rest:
        notes.append(f"matched by no pattern: {_some(rest)}")
    if any(choice is not None and choice.options.get("joint") for choice in matched.values()):
        notes.append(
            "joint: flops and speeds are those of the rank that the alike layers of a module have together, with as many "
            "parameters as apart; those that would need more flops than dense are projected alone"
        )
    fused = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    if fused:
        notes.append(
            f"fused attention, not converted: {_some(fused)}; structmat.nn.unfuse_attention makes layers of it"
        )
    return tuple(notes)


def _some(names: list[str]) -> str:
    return ", ".join(n or "the model itself" for n in names[:5]) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )


def _row(entry: Entry) -> tuple[str, ...]:
    shown = (entry.name or "(model)", "x".join(map(str, entry.shape)), entry.choice.label if entry.choice else "")
    also = f" (also {', '.join(p for p in entry.places if p != entry.name)})" if len(entry.places) > 1 else ""
    note = (f"skipped: {entry.skipped}" if entry.skipped else "") + also
    if not entry.params:
        return (*shown, "", "", "", "", note)
    share = f"{entry.params / entry.dense_params:.1%}"
    flops = f"{entry.flops / entry.dense_flops:.2f}x"
    return (*shown, str(entry.params), share, flops, "" if entry.speed is None else f"{entry.speed:.2f}x", note)


def check(plan_: Plan, model: nn.Module) -> None:
    """Raise ``ValueError`` if the model is not the one that was planned for: other layers, converted since."""
    for entry in plan_.converted:
        try:
            module: Any = model.get_submodule(entry.name)
        except AttributeError as error:
            raise ValueError(f"{entry.name}: in the plan, not in the model") from error
        if isinstance(module, StructuredLinear):
            raise ValueError(f"{entry.name}: converted already; make a new plan, or densify first")
        if not is_dense_linear(module) or shape_of(module) != entry.shape:
            raise ValueError(f"{entry.name}: the plan is for a linear layer {entry.shape}, the model has {module}")
        if next(module.parameters()).is_meta:
            raise ValueError(f"{entry.name}: on the meta device, without values to project")
