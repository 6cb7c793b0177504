"""Checkpoints of models that are spread over processes: ``torch.distributed.checkpoint``, and the structure next to it."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structmat.nn import huggingface
from structmat.nn.joint import tie_as
from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import places, put
from structmat.nn.sharding import check_unwrapped, is_sharded, unwrapped_name
from structmat.nn.spec import slots_of, stored_shape
from structmat.nn.storage import describe, empty_layer, read_shared

VERSION = 1  # of the structure file; one of a later version is refused
FILE = "structmat.json"


def save_sharded(
    model: nn.Module, folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write a model to a folder, every process its part, by ``torch.distributed.checkpoint``; a collective call.

    What is written does not depend on how the model is spread: any number of processes, sharded in any way, reads it. The
    structure of the layers stands in ``structmat.json`` beside it.

    Parameters
    ----------
    model
        Plain, or wrapped by DDP, ``fully_shard``, :func:`structmat.nn.parallelize`, ``torch.compile``.
    folder
        Made if it is not there.
    optimizer
        Its state is written too.

    Raises
    ------
    ValueError
        If a tensor is on the meta device.

    Examples
    --------
    >>> import tempfile, torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(snn.StructuredLinear(8, 8, structure="low_rank", rank=2))
    >>> again = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     snn.save_sharded(model, folder)
    ...     snn.load_sharded(snn.apply_structure(again, folder), folder)
    >>> bool((again[0].factors[0] == model[0].factors[0]).all())
    True
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    state = _state(model, optimizer, "save_sharded")
    with _one_process():
        save(state, checkpoint_id=folder, no_dist=not _distributed())
    if _rank() == 0:
        about = {"version": VERSION, "layers": _layers(model)}
        part = Path(folder) / f".{FILE}"
        part.write_text(json.dumps(about, sort_keys=True))
        part.replace(Path(folder) / FILE)
    _wait()


def load_sharded(
    model: nn.Module, folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Read what :func:`save_sharded` wrote into a model of the same structure, strictly; a collective call.

    Everything is read before the first value of the model is changed.

    Parameters
    ----------
    model
        Spread over the processes in whatever way, or not at all. A dense model learns its structure by
        :func:`apply_structure` first; one on the meta device needs ``to_empty`` before.
    folder
        Of the checkpoint.
    optimizer
        One that was written with an optimizer gets its state.

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint.
    ValueError
        If it is damaged or of a later version, its layers, keys or shapes are not those of the model, or layers of the model
        share factors (joint projection) that are several in the checkpoint.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    own, written = _layers(model), _read(folder)
    mine, theirs = _architectures(own), _architectures(written)
    if mine != theirs:
        wrong = sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))
        raise ValueError(
            f"load_sharded: {folder}: structured otherwise than the model: {', '.join(wrong[:5])}; a dense model needs "
            "apply_structure first"
        )
    lost = sorted(
        name
        for name, entry in own.items()
        if not entry.get("shared", {}).items() <= written[name].get("shared", {}).items()
    )
    if lost:
        raise ValueError(
            f"load_sharded: {folder}: {', '.join(lost[:5])}: share factors with another layer in the model, and have their own "
            "in the checkpoint; apply_structure to a dense model, or densify this one first"
        )
    state = _state(model, optimizer, "load_sharded")
    sizes: dict[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    _compare(state, sizes, str(folder))
    buffers: dict[str, Any] = _mapped(state, lambda path, x: _room(x, sizes[path].size))
    with _one_process():
        load(buffers, checkpoint_id=folder, no_dist=not _distributed())
    shaped = dict(_tensors(state))
    found = _mapped(buffers, lambda path, x: _as(x, shaped[path]))
    set_model_state_dict(model, found["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, found["optimizer"])


def apply_structure(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put empty layers of the structure of a checkpoint in the places of the dense ones; returns the model.

    To be followed by wrapping and :func:`load_sharded`: build the dense model on the meta device, ``apply_structure``,
    ``fully_shard``, ``to_empty``, ``load_sharded``. The layers are on the device and of the dtype of those that they replace.

    Raises ``FileNotFoundError`` and ``ValueError`` as :func:`load_sharded`; the model is then as it was.
    """
    check_unwrapped(model, "apply_structure")
    made: dict[str, StructuredLinear] = {}
    layers = _read(folder)
    for name, entry in layers.items():
        layer = empty_layer(model, name, entry)
        like = next(model.get_submodule(name).parameters())
        made |= dict.fromkeys(places(model, name), layer.to_empty(device=like.device).to(like.dtype))
    tie_as(made, read_shared(layers, made))
    for layer in dict.fromkeys(made.values()):
        layer.reset_parameters()
    for name, layer in made.items():
        model = put(model, name, layer.train(model.get_submodule(name).training))
    huggingface.attach(model)
    return model


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of the model of one process, in every process: all shards gathered; a collective call.

    Names are those of the unwrapped model and shapes those of its layers, whatever it is wrapped in. For large models gather
    on one process instead: ``get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))``.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=_distributed()))
    for prefix, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            for i, shape in enumerate(slots_of(module.spec)[0].values()):
                key = unwrapped_name(f"{prefix}.factors.{i}" if prefix else f"factors.{i}", model)
                state[key] = state[key].reshape(stored_shape(shape))
    return state


# ---- the structure ------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> dict[str, Any]:
    """The descriptions of all structured layers by their names in the unwrapped model."""
    found = {}
    for name, entry in describe(model).items():
        homes = entry.get("shared", {}).items()
        shared = {slot: [unwrapped_name(home, model), other] for slot, (home, other) in homes}
        found[unwrapped_name(name, model)] = entry | ({"shared": shared} if shared else {})
    return found


def _architectures(layers: Mapping[str, Any]) -> dict[str, Any]:
    """What two models must have in common, as JSON has it: not the projection that a layer came from, nor how it was drawn."""
    left_out = ("projection", "init")
    kept = {n: {k: v for k, v in entry["config"].items() if k not in left_out} for n, entry in layers.items()}
    return json.loads(json.dumps(kept))


def _read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} in {folder}: not a checkpoint of structmat.nn.save_sharded")
    try:
        about = json.loads(path.read_text())
        version, layers = about["version"], about["layers"]
        known = isinstance(version, int) and all("config" in entry for entry in layers.values())
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not known or version > VERSION:
        raise ValueError(f"{path} has version {version} of the structure, this structmat reads up to {VERSION}")
    return layers


# ---- the tensors --------------------------------------------------------------------------------------------------------


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None, who: str) -> dict[str, Any]:
    """The sharded state of a model and its optimizer."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    lost = [name for name, x in state["model"].items() if isinstance(x, torch.Tensor) and x.is_meta]
    if lost:
        raise ValueError(
            f"{who}: {lost[0]} and {len(lost) - 1} more tensors are on the meta device: use to_empty first"
        )
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def _tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of nested mappings and lists, by the names that torch.distributed.checkpoint gives them."""
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        path = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            yield path, value
        else:
            yield from _tensors(value, f"{path}.")


def _mapped(tree: Any, change: Any, prefix: str = "") -> Any:
    """The same tree with every tensor changed."""
    if isinstance(tree, Mapping):
        return {k: _mapped(v, change, f"{prefix}{k}.") for k, v in tree.items()}
    if isinstance(tree, list):
        return [_mapped(v, change, f"{prefix}{i}.") for i, v in enumerate(tree)]
    return change(prefix[:-1], tree) if isinstance(tree, torch.Tensor) else tree


def _compare(state: Mapping[str, Any], sizes: Mapping[str, Any], where: str) -> None:
    """Raise ``ValueError`` that names what is missing, too much or of another number of entries."""
    wanted = dict(_tensors(state))
    there = {k for k, x in sizes.items() if hasattr(x, "size") and k.split(".")[0] in state}
    wrong = {
        "missing": sorted(set(wanted) - there),
        "unexpected": sorted(there - set(wanted)),
        "of another shape": [
            f"{k} {tuple(sizes[k].size)} instead of {tuple(x.shape)}"
            for k, x in wanted.items()
            if k in there and sizes[k].size.numel() != x.numel()
        ],
    }
    text = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in wrong.items() if names)
    if text:
        raise ValueError(f"load_sharded: {where} does not fit the model: {text}")


def _room(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Where a tensor is read to: spread as the model's own, unless it was written in another view; then all of it."""
    if x.shape == size:
        return torch.empty_like(x)
    return torch.empty(size, dtype=x.dtype, device=x.to_local().device if is_sharded(x) else x.device)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def _as(x: torch.Tensor, like: Any) -> torch.Tensor:
    """What was read, in the shape and spread in the way of the model's own."""
    if x.shape == like.shape and is_sharded(x) == is_sharded(like):
        return x
    if not is_sharded(like):
        return x.reshape(like.shape)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.reshape(like.shape), like.device_mesh, like.placements)


# ---- processes ----------------------------------------------------------------------------------------------------------


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _wait() -> None:
    if _distributed():
        torch.distributed.barrier()


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Without torch's warning that there is one process only, which is as it should be."""
    with warnings.catch_warnings():
        if not _distributed():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
        yield
