"""Files: arrays and one JSON text in a safetensors file, written whole or not at all and read strictly, without pickle."""

from __future__ import annotations

import json
import os
import secrets
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array

VERSION = 1  # of the JSON text; a file of a later one is refused
KEY = "structmat"  # of the JSON text in the metadata
HOMES = {"model": "structmat.nn", "operator": "structmat"}  # who saves and loads what kind of file
_ARTICLES = {"model": "a model", "operator": "an operator"}


def write(
    path: str | os.PathLike[str], kind: str, library: str, tensors: Mapping[str, Array], about: Mapping[str, Any]
) -> None:
    """Write tensors, all contiguous on the host and of one library, and what is to be known about them.

    The JSON text also holds the version, the kind, the library and a checksum. The file is written beside its place and moved
    there, so that a failed call leaves an older file as it was; it gets the mode of that file, or the usual one. A symbolic
    link stays one: the file that it leads to is written. Raises ``ImportError`` if safetensors is missing,
    ``FileNotFoundError`` if the folder is and ``IsADirectoryError`` if the path is one.
    """
    save_file = _safetensors(library).save_file
    text = {"version": VERSION, "kind": kind, "library": library, "checksum": checksum(tensors), **about}
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"save: expected the path of a file, got the folder {path}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save: no folder {target.parent}")
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    part.touch(exist_ok=False)
    mode = stat.S_IMODE((target if target.exists() else part).stat().st_mode)
    try:
        save_file(dict(tensors), part, metadata={"format": _SHORT[library], KEY: json.dumps(text, sort_keys=True)})
        part.chmod(mode)  # safetensors leaves one that only its owner can read
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors of a file, of the library that they were saved from, and the JSON text; every check has been made.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, not one of structmat's, of another kind or of a later version.
    ImportError
        If safetensors is missing, or torch for a file with torch tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"load: no file {path}")
    about = _about(path, kind)
    tensors = _tensors(path, about.get("library", "torch"))
    if about["checksum"] != checksum(tensors):
        raise ValueError(f"load: {path} is damaged: its values do not have the checksum {about['checksum']}")
    return tensors, about


def _about(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    safetensors = _safetensors("numpy")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: {path} is damaged or no safetensors file: {error}") from error
    if KEY not in metadata:
        raise ValueError(f"load: {path} is not of {HOMES[kind]}.save: its metadata have no {KEY!r}")
    try:
        about = json.loads(metadata[KEY])
        version, found, _ = about["version"], about.get("kind", "model"), about["checksum"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"load: {path}: its {KEY!r} metadata cannot be read: {error}") from error
    if found != kind:
        what = f"a {found}" if found not in HOMES else f"{_ARTICLES[found]}; use {HOMES[found]}.load"
        raise ValueError(f"load: {path} is not of {HOMES[kind]}.save: it holds {what}")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"load: {path} has version {version} of the metadata, this structmat reads up to {VERSION}")
    return about


def _tensors(path: str | os.PathLike[str], library: str) -> dict[str, Array]:
    if library not in _SHORT:
        raise ValueError(f"load: {path}: its {KEY!r} metadata cannot be read: arrays of {library!r}")
    safetensors = _safetensors(library)
    try:
        with safetensors.safe_open(path, framework=_SHORT[library]) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: {path} is damaged: {error}") from error


def checksum(tensors: Mapping[str, Array]) -> int:
    """CRC-32 of all values, in the order of the names."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), total))
    return total


def _bytes(x: Array) -> Any:
    if arrays.kind(x) == "torch":
        import torch

        return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


_SHORT = {"numpy": "np", "torch": "pt"}


class _Safetensors:
    """The parts of safetensors that are needed, for one library."""

    def __init__(self, package: Any, module: Any) -> None:
        self.safe_open, self.SafetensorError, self.save_file = (
            package.safe_open,
            package.SafetensorError,
            module.save_file,
        )


def _safetensors(library: str) -> Any:
    from importlib import import_module

    try:
        return _Safetensors(import_module("safetensors"), import_module(f"safetensors.{library}"))
    except ImportError as error:
        needed = "safetensors" if library == "numpy" else "safetensors and torch"
        raise ImportError(f"save and load need {needed}: pip install {needed.replace(' and', '')}") from error
