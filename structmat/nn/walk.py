"""Walk: through the blocks of a model one after another, with the inputs of layers in the original and the converted model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from structmat.nn.layer import StructuredLinear
from structmat.nn.plan import Entry, Plan
from structmat.nn.running import first_input, real_rows

Call = tuple[tuple[Any, ...], dict[str, Any]]
Recipe = dict[Any, Any]  # position or name of an argument: where it comes from


class _Stop(Exception):  # noqa: N818 (no error: the rest of a pass is not needed)
    """Ends a pass at the layer whose input was wanted."""


class _Chained:
    """Stands in the arguments of a block for the output of the block before it."""


class Walk:
    """The blocks of a model one after another, with what goes into each in the original and in the converted model."""

    def __init__(self, model: nn.Module, units: dict[str, list[Entry]], calls: list[Call]) -> None:
        self.model, self.calls = model, calls
        self._templates = self._record([name for name in units if name])
        order = [*self._templates, *([""] if "" in units else [])]
        silent = [name for name in units if name not in order]
        if silent:
            raise ValueError(f"convert_sequentially: {', '.join(silent)}: never ran on the batches")
        self.units = [(name, units[name]) for name in order]
        self._before: list[Any] = [None] * len(calls)  # outputs of the last block of the original model
        self._now: list[Any] = [None] * len(calls)  # and of the converted one
        self._outputs: dict[tuple[str, int], torch.Tensor] = {}  # of layers of the block that are converted, by batch

    def _record(self, names: list[str]) -> dict[str, list[Call]]:
        """For every block its arguments for every batch, in the order in which blocks run; outputs of others left out.

        The first batch runs through the whole model. Where all later blocks take the output of the one before, constants, and
        what the first block was given too, the other batches need not run beyond that one.
        """
        templates: dict[str, list[Call]] = {}
        last: list[Any] = [None]
        stop_at: list[str | None] = [None]

        def before(name: str) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen = templates.setdefault(name, [])
                mine = tuple(_mark(x, last[0]) for x in args), {k: _mark(x, last[0]) for k, x in kwargs.items()}
                seen.append(mine)
                if name == stop_at[0]:
                    raise _Stop

            return hook

        def after(_: Any, __: Any, output: Any) -> None:
            last[0] = _hidden(output)

        if not names:
            return templates
        modules = {name: self.model.get_submodule(name) for name in names}
        hooks = [m.register_forward_pre_hook(before(n), with_kwargs=True) for n, m in modules.items()]
        hooks += [m.register_forward_hook(after) for m in modules.values()]
        recipes: dict[str, Recipe] | None = None
        with _removed(hooks):
            for i, (args, kwargs) in enumerate(self.calls):
                last[0] = None
                try:
                    self.model(*args, **kwargs)
                except _Stop:
                    for name, recipe in (recipes or {}).items():
                        templates[name].append(_followed(recipe, next(iter(templates.values()))[i]))
                if i == 0 and all(len(seen) == 1 for seen in templates.values()):
                    recipes = _recipes(templates)
                    stop_at[0] = next(iter(templates), None) if recipes is not None else None
        for name, seen in templates.items():
            if len(seen) != len(self.calls):
                raise ValueError(
                    f"convert_sequentially: {name} ran {len(seen)} times on {len(self.calls)} batches, expected once"
                )
        return templates

    def original(
        self, unit: str, entries: list[Entry], masks: Sequence[torch.Tensor | None]
    ) -> tuple[dict[str, list[torch.Tensor]], list[tuple[str, ...]]]:
        """For the first layer of every group its original inputs, and the groups of layers with the same input in order."""
        rows: dict[str, list[torch.Tensor]] = {}
        leaders: dict[str, str] = {}
        current: list[tuple[Any, str]] = []  # the tensors themselves: their identity is what counts
        at = [0]

        def listen(name: str) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = first_input(args, kwargs)
                known = next((first for tensor, first in current if tensor is x), None)
                if known is None:
                    known = name
                    current.append((x, name))
                    rows.setdefault(name, []).append(real_rows(x, masks[at[0]], name))
                if leaders.setdefault(name, known) != known:
                    raise ValueError(f"convert_sequentially: {name} shares its input on some batches only")

            return hook

        hooks = [
            self.model.get_submodule(e.name).register_forward_pre_hook(listen(e.name), with_kwargs=True)
            for e in entries
        ]
        module = self.model.get_submodule(unit)
        with _removed(hooks):
            for i in range(len(self.calls)):
                at[0] = i
                current.clear()
                args, kwargs = self._call(unit, i, self._before)
                self._before[i] = _hidden(module(*args, **kwargs))
        silent = [e.name for e in entries if e.name not in leaders]
        if silent:
            raise ValueError(f"convert_sequentially: {', '.join(silent)}: never ran on the batches")
        for name, found in rows.items():
            if len(found) != len(self.calls):
                raise ValueError(
                    f"convert_sequentially: {name} ran {len(found)} times on {len(self.calls)} batches, expected once"
                )
        groups: dict[str, list[str]] = {leader: [] for leader in rows}
        for name, leader in leaders.items():
            groups[leader].append(name)
        return rows, [tuple(names) for names in groups.values()]

    def inputs_now(self, unit: str, name: str) -> Iterator[torch.Tensor]:
        """The inputs of a layer in the model as it is now, batch by batch."""
        for i in range(len(self.calls)):
            module, call = self.model.get_submodule(unit), self._call(unit, i, self._now)
            with self._remembering(unit, i):
                args, kwargs = _stopped(self.model.get_submodule(name), module, call)
            yield first_input(args, kwargs)

    def leave(self, unit: str) -> None:
        """Run the block as it is now, so that the next one knows its inputs."""
        if unit != self.units[-1][0]:
            module = self.model.get_submodule(unit)
            for i in range(len(self.calls)):
                args, kwargs = self._call(unit, i, self._now)
                with self._remembering(unit, i):
                    self._now[i] = _hidden(module(*args, **kwargs))
        self._outputs.clear()

    @contextmanager
    def _remembering(self, unit: str, i: int) -> Iterator[None]:
        """Within, layers of a block that are converted give what they gave for this batch before: their inputs are the same."""
        layers = {e.name: self.model.get_submodule(e.name) for e in dict(self.units)[unit]} if unit else {}
        hooks, known = [], []
        for name, layer in layers.items():
            if not isinstance(layer, StructuredLinear):
                continue
            output = self._outputs.get((name, i))
            if output is None:
                hooks.append(layer.register_forward_hook(partial(self._remember, name, i)))
            else:
                known.append(layer)
                layer.forward = partial(_recalled, output)
        try:
            with _removed(hooks):
                yield
        finally:
            for layer in known:
                del layer.forward

    def _remember(self, name: str, i: int, _: Any, __: Any, output: torch.Tensor) -> None:
        self._outputs[name, i] = output

    def _call(self, unit: str, i: int, outputs: list[Any]) -> Call:
        """The arguments of a block for a batch; a block that is not chained to one before runs the model up to it."""
        if not unit:
            return self.calls[i]
        args, kwargs = self._templates[unit][i]
        chained = any(isinstance(x, _Chained) for x in (*args, *kwargs.values()))
        if chained:
            return tuple(_fill(x, outputs[i]) for x in args), {k: _fill(x, outputs[i]) for k, x in kwargs.items()}
        if outputs is self._before or unit == self.units[0][0]:
            return args, kwargs
        return _stopped(self.model.get_submodule(unit), self.model, self.calls[i])


def _stopped(wanted: nn.Module, whole: nn.Module, call: Call) -> Call:
    """What a module is called with while another runs, which ends there."""
    found: list[Call] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Stop

    with _removed([wanted.register_forward_pre_hook(hook, with_kwargs=True)]):
        try:
            whole(*call[0], **call[1])
        except _Stop:
            return found[0]
    raise ValueError("convert_sequentially: a layer that ran on the original model does not run on the converted one")


@contextmanager
def _removed(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mark(x: Any, output: Any) -> Any:
    return _Chained() if output is not None and x is output else x


def _fill(x: Any, output: Any) -> Any:
    return output if isinstance(x, _Chained) else x


def _recalled(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 (a forward)
    return output


def _recipes(templates: Mapping[str, list[Call]]) -> dict[str, Recipe] | None:
    """How the arguments of the later blocks follow from those of the first, seen on one batch; None where they do not."""
    (_, [(args, kwargs)]), *others = templates.items()
    given = {**dict(enumerate(args)), **kwargs}
    found: dict[str, Recipe] = {}
    for name, [(more, named)] in others:
        recipe = {key: _origin(x, given) for key, x in (*enumerate(more), *named.items())}
        if None in recipe.values() or not any(isinstance(x, _Chained) for x in (*more, *named.values())):
            return None
        found[name] = recipe
    return found


def _origin(x: Any, given: Mapping[Any, Any]) -> tuple[Any, bool] | None:
    """``(value, False)`` for what is the same for all batches, ``(key, True)`` for an argument of the first block."""
    if x is None or isinstance(x, (_Chained, bool, str)):
        return x, False
    return next(((key, True) for key, y in given.items() if y is x), None)


def _followed(recipe: Recipe, first: Call) -> Call:
    """The arguments of a block from those of the first."""
    given = {**dict(enumerate(first[0])), **first[1]}
    values = {key: given[origin] if taken else origin for key, (origin, taken) in recipe.items()}
    args = tuple(x for key, x in values.items() if isinstance(key, int))
    return args, {key: x for key, x in values.items() if isinstance(key, str)}


def _hidden(output: Any) -> Any:
    """What a block hands on: its output, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def units_of(model: nn.Module, plan: Plan) -> dict[str, list[Entry]]:
    """The entries by block: the outermost member of an ``nn.ModuleList`` around them, ``""`` for those outside of all."""
    units: dict[str, list[Entry]] = {}
    for entry in plan.converted:
        parts = entry.name.split(".")
        block = ""
        for depth in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
                block = ".".join(parts[: depth + 1])
                break
        units.setdefault(block if block != entry.name else "", []).append(entry)
    return units
