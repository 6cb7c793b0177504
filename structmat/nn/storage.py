"""Storage: models with structured layers in one safetensors file, their structure in its metadata."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from structmat import files
from structmat.files import VERSION as VERSION
from structmat.nn import huggingface
from structmat.nn.joint import Shared, shared_factors, tie_as
from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import dense_class, is_dense_linear, mark, places, put, shape_of
from structmat.nn.sharding import check_unwrapped, is_sharded


def save(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's tensors and the structure of its layers to a safetensors file, without pickle.

    The metadata hold one JSON text with a version, the config of every structured layer, tensors that are stored under
    another name (tied ones are stored once) and a checksum. The file is written beside its place and moved there, so that a
    failed call leaves an older file as it was.

    Parameters
    ----------
    model
        Any module; one without structured layers is stored as well.
    path
        The file.

    Raises
    ------
    ValueError
        If a tensor has no values (meta device).
    TypeError
        If the state dict holds something other than tensors, as ``get_extra_state`` may give.
    FileNotFoundError
        If the folder of ``path`` is missing.
    IsADirectoryError
        If ``path`` is a folder.
    ImportError
        If safetensors is missing.

    Examples
    --------
    >>> import tempfile, torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(snn.StructuredLinear(8, 8, structure="low_rank", rank=2), torch.nn.Linear(8, 2))
    >>> fresh = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     snn.save(model, f"{folder}/model.safetensors")
    ...     fresh = snn.load(fresh, f"{folder}/model.safetensors")
    >>> x = torch.randn(3, 8)
    >>> bool((model(x) == fresh(x)).all())
    True
    """
    state = _tensors_of(model, "save")
    spread = [name for name, x in state.items() if is_sharded(x)]
    if spread:
        raise ValueError(
            f"save: {spread[0]} and {len(spread) - 1} more tensors are spread over processes: use save_sharded, or "
            "full_state_dict and a model of one process"
        )
    stored, aliases = _distinct(state)
    lost = [name for name, x in stored.items() if x.is_meta]
    if lost:
        raise ValueError(
            f"save: {lost[0]} and {len(lost) - 1} more tensors are on the meta device: they have no values"
        )
    files.write(path, "model", "torch", stored, {"layers": describe(model), "aliases": aliases})


def load(model: torch.nn.Module, path: str | os.PathLike[str]) -> torch.nn.Module:
    """Put structured layers and all tensors of a file written by :func:`save` into a model, strictly.

    Every check comes before the first change: on any error the model is as it was.

    Parameters
    ----------
    model
        The dense model, one that has been converted in the same way, or one of these on the meta device, as a whole or in
        part. Tensors are cast to its dtypes and moved to its devices (meta: those of the file, on the CPU). Tied parameters
        stay tied and frozen ones frozen: the factors are where the weight was.
    path
        The file.

    Returns
    -------
    torch.nn.Module
        The model; another module only if the whole model is one linear layer.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, not of :func:`save`, of a later version, or its layers, keys or shapes are not those of the model; or
        if the model is spread over processes.
    TypeError
        If the state dict of the model holds something other than tensors.
    """
    check_unwrapped(model, "load", compiled=True)
    _tensors_of(model, "load")
    tensors, layers = _read(path)
    made: dict[str, StructuredLinear] = {}
    for name, entry in layers.items():
        layer = empty_layer(model, name, entry)
        made |= dict.fromkeys(places(model, name), layer)  # a module that is used twice is replaced twice
    structured = {name for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    if structured - set(made):
        names = ", ".join(sorted(structured - set(made)))
        raise ValueError(
            f"load: {names}: structured in the model, dense in the file; load into a model with them dense"
        )
    try:
        shared = read_shared(layers, made)
    except ValueError as error:
        raise ValueError(f"load: {path}: {error}") from error
    _compare(_expected(model, made), tensors, str(path), model)
    for name in layers:
        _fill(made[name], model.get_submodule(name), name, tensors)
    for name, slots in shared.items():  # trained if one of those that share it is, as when it was joined
        for slot, (home, other) in slots.items():
            made[home].factors[other].requires_grad_(
                made[home].factors[other].requires_grad or made[name].factors[slot].requires_grad
            )
    tie_as(made, shared)
    for name, layer in made.items():  # nothing from here on can fail: keys and shapes have been compared
        model = put(model, name, layer)
    _load_rest(model, {k: x for k, x in tensors.items() if _owner(k, made) is None})
    huggingface.attach(model)
    return model


def _tensors_of(model: torch.nn.Module, who: str) -> dict[str, torch.Tensor]:
    """The state dict; ``TypeError`` if it holds something else too."""
    state = model.state_dict()
    for name, x in state.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{who}: expected tensors alone in the state dict, got {name}: {type(x).__name__}")
    return state


def _load_rest(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what is in no structured layer; what has no memory gets some first, once where it is tied."""
    made: dict[int, torch.Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, x in named:
        if x.is_meta and name in tensors:
            memory = torch.empty_like(tensors[name])
            new = torch.nn.Parameter(memory, x.requires_grad) if isinstance(x, torch.nn.Parameter) else memory
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made.setdefault(id(x), new))
    model.load_state_dict(model.state_dict() | dict(tensors), strict=True)


def _fill(layer: StructuredLinear, old: torch.nn.Module, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an empty layer its values, in the dtype and on the device of the one that it replaces, trained where that is."""
    prefix, like = f"{name}." if name else "", next(old.parameters())
    device = torch.device("cpu") if like.is_meta else like.device
    state = {}
    for key in layer.state_dict():
        x = tensors[prefix + key]
        state[key] = x.to(device, like.dtype if x.is_floating_point() and not like.is_meta else x.dtype).clone()
    layer.load_state_dict(state, strict=True, assign=True)
    trained = {key: p.requires_grad for key, p in old.named_parameters()}
    weight = any(flag for key, flag in trained.items() if key != "bias")
    for key, p in layer.named_parameters():
        p.requires_grad_(trained.get(key, weight))
    layer.train(old.training)


def describe(model: torch.nn.Module) -> dict[str, Any]:
    """For the name of every structured layer its config, the class of dense layer that it stands for, and shared factors."""
    shared = shared_factors(model)
    return {
        name: {"config": module.config, "class": dense_class(module)}
        | ({"shared": {str(slot): list(home) for slot, home in shared[name].items()}} if name in shared else {})
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear)
    }


def read_shared(layers: Mapping[str, Any], known: Mapping[str, StructuredLinear]) -> dict[str, Shared]:
    """The shared factors of descriptions; ``ValueError`` if one is not where it is said to be, or of another shape."""
    found: dict[str, Shared] = {}
    for name, entry in layers.items():
        for slot, home in entry.get("shared", {}).items():
            try:
                mine, other = known[name].factors[int(slot)], known[home[0]].factors[int(home[1])]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(f"{name}: shares factor {slot} with {home}, which there is not") from error
            if mine.shape != other.shape:
                raise ValueError(f"{name}: factor {slot} {tuple(mine.shape)} is said to be {home} {tuple(other.shape)}")
            found.setdefault(name, {})[int(slot)] = home[0], int(home[1])
    return found


def build(entry: Mapping[str, Any], device: Any = None, dtype: Any = None) -> StructuredLinear:
    """An empty structured layer from its description.

    Raises ``ValueError`` if the description is none.
    """
    try:
        layer = StructuredLinear.from_config(entry["config"], device=device, dtype=dtype)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the description of a structured layer: {dict(entry)} ({error})") from error
    mark(layer, entry.get("class", "Linear"))
    return layer


def empty_layer(model: torch.nn.Module, name: str, entry: Mapping[str, Any]) -> StructuredLinear:
    """The empty layer for a name, on the meta device, checked against what it replaces."""
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        hint = _unfuse_hint(model, [name])
        raise ValueError(f"load: the model has no layer {name!r}, which is structured in the file{hint}") from error
    try:
        layer = build(entry, "meta")
    except ValueError as error:
        raise ValueError(f"load: {name}: {error}") from error
    if not (is_dense_linear(old) or isinstance(old, StructuredLinear)):
        raise ValueError(f"load: {name}: expected a linear layer in the model, got {type(old).__name__}")
    if shape_of(old) != shape_of(layer):
        raise ValueError(f"load: {name}: the file has shape {shape_of(layer)}, the model {shape_of(old)}")
    if (layer.bias is None) != (old.bias is None) and isinstance(old, StructuredLinear):
        raise ValueError(f"load: {name}: a bias in {'the model' if layer.bias is None else 'the file'} alone")
    return layer


def _expected(model: torch.nn.Module, made: Mapping[str, StructuredLinear]) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of the model once the layers are in their places."""
    expected = {k: x.shape for k, x in model.state_dict().items() if _owner(k, made) is None}
    for name, layer in made.items():
        expected |= {f"{name}.{k}" if name else k: x.shape for k, x in layer.state_dict().items()}
    return expected


def _unfuse_hint(model: torch.nn.Module, names: Iterable[str]) -> str:
    """What to do where names are those of projections that are fused in the model; else nothing."""
    fused = [name for name, m in model.named_modules() if isinstance(m, torch.nn.MultiheadAttention)]
    parts = tuple(f"{name}.{part}".lstrip(".") for name in fused for part in ("query", "key", "value"))
    missing = any(name == part or name.startswith(f"{part}.") for name in names for part in parts)
    return "; call unfuse_attention first, its attention is fused" if missing else ""


def _compare(
    expected: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor], where: str, model: torch.nn.Module
) -> None:
    """Raise ``ValueError`` that names what is missing, too much or of another shape."""
    found = {
        "missing": sorted(set(expected) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(expected)),
        "of another shape": [
            f"{k} {tuple(tensors[k].shape)} instead of {tuple(shape)}"
            for k, shape in expected.items()
            if k in tensors and tensors[k].shape != shape
        ],
    }
    wrong = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in found.items() if names)
    if wrong:
        hint = _unfuse_hint(model, found["unexpected"])
        raise ValueError(f"load: {where} does not fit the model: {wrong}{hint}")


def _owner(key: str, made: Mapping[str, Any]) -> str | None:
    """The structured layer to which a tensor belongs."""
    if "" in made:
        return ""
    parts = key.split(".")
    return next((name for n in range(len(parts) - 1, 0, -1) if (name := ".".join(parts[:n])) in made), None)


def _distinct(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor once, in memory of its own, and the names under which it occurs again."""
    first: dict[Any, str] = {}
    stored, aliases = {}, {}
    for name, x in state.items():
        key = (x.device, x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)
        if x.numel() and not x.is_meta and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        shares = not x.is_meta and x.untyped_storage().nbytes() != x.nbytes
        stored[name] = x.detach().clone(memory_format=torch.contiguous_format) if shares else x.detach().contiguous()
    return stored, aliases


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file by all their names, and the descriptions of its layers; ``ValueError`` that says what is wrong."""
    tensors, about = files.read(path, "model")
    try:
        layers, aliases = dict(about["layers"]), dict(about["aliases"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {path}: its metadata cannot be read: {error}") from error
    unknown = sorted(set(aliases.values()) - set(tensors))
    if unknown:
        raise ValueError(f"load: {path}: its metadata name tensors that it does not hold: {', '.join(unknown)}")
    return tensors | {name: tensors[first] for name, first in aliases.items()}, layers
