"""What a launch of a CUDA C++ kernel needs, in plain numbers: source, sizes, and arguments of exact byte widths."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).parent / "kernels"
SCALARS = {"int": np.int32, "long long": np.int64, "float": np.float32}
TENSOR_CORE_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
TYPES = {**TENSOR_CORE_TYPES, "float32": "float"}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
GRID_LIMIT = 2**31 - 1  # blocks along the first axis of a grid


class Kernel(NamedTuple):
    """One instantiation of a kernel template, which NVRTC compiles for any architecture and g++ behind the tests' shim."""

    source: str
    """CUDA C++ text without includes of our own."""
    name: str
    """Name expression, such as ``hadamard<float, 64, 4, 1, 1, 8>``."""
    threads: int
    """Threads of a block."""
    shared: int
    """Dynamic shared memory of a block in bytes. Above 48 KiB a launch must raise the function's limit first."""
    registers: int
    """Bound on the registers of a thread that the tests hold the compiler to."""
    parameters: tuple[str, ...]
    """C types of the parameters, in order; those of pointers end in ``*``."""
    rows: int
    """Samples of a block."""
    columns: int = 1
    """Blocks that share the same samples."""
    resident: int = 0
    """Blocks per multiprocessor of a persistent grid, whose blocks take samples in turns; 0: one block for each group."""

    def grid(self, rows: int, processors: int = 132) -> tuple[int, int, int]:
        """Blocks to launch for ``rows`` samples on a device of ``processors`` multiprocessors.

        Raises
        ------
        ValueError
            If there is no sample, or the grid would exceed the limit of CUDA.

        Examples
        --------
        >>> from structmat.backends.cuda.sources import hadamard_kernel
        >>> kernel = hadamard_kernel("float32", 64)
        >>> kernel.rows, kernel.grid(17)
        (8, (3, 1, 1))
        """
        if rows < 1:
            raise ValueError(f"{self.name}: expected at least one row, got {rows}")
        blocks = -(-rows // self.rows) * self.columns
        if self.resident:
            blocks = min(blocks, self.resident * processors)
        if blocks > GRID_LIMIT:
            raise ValueError(f"{self.name}: {rows} rows need {blocks} blocks, more than the {GRID_LIMIT} of a grid")
        return blocks, 1, 1

    def launch(self, grid: tuple[int, int, int], *arguments: int | float) -> Launch:
        """The launch with these arguments: addresses and numbers, converted to the parameters' types.

        Raises
        ------
        TypeError
            If their number is not that of the parameters.
        ValueError
            If an integer does not fit into its parameter.
        """
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name}: expected {len(self.parameters)} arguments, got {len(arguments)}")
        return Launch(self, grid, tuple(map(_scalar, self.parameters, arguments)))


class Launch(NamedTuple):
    """A kernel with its grid and arguments."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[np.generic, ...]
    """NumPy scalars as wide as the parameters; CUDA copies that many bytes of each and checks nothing."""


def width(parameter: str) -> int:
    """Bytes of a parameter of the given C type.

    Examples
    --------
    >>> width("const float*"), width("int"), width("long long")
    (8, 4, 8)
    """
    return 8 if parameter.endswith("*") else np.dtype(SCALARS[parameter]).itemsize


def check_alignment(
    kernel: Kernel, rows: int, arrays: dict[str, int], strides: dict[str, int], itemsize: int = 2
) -> None:
    """Raise ``ValueError`` unless addresses and the strides of more than one row are multiples of 16 bytes."""
    for name, address in arrays.items():
        if address % 16:
            raise ValueError(f"{kernel.name}: expected {name} at a multiple of 16 bytes, got address {address:#x}")
    for name, stride in strides.items():
        if rows > 1 and stride * itemsize % 16:
            what = f"rows of {name} multiples of 16 bytes apart"
            raise ValueError(f"{kernel.name}: expected {what}, got {stride} elements")


def _scalar(parameter: str, value: int | float) -> np.generic:
    kind = np.uintp if parameter.endswith("*") else SCALARS[parameter]
    if kind is np.float32:
        return np.float32(value)
    limits = np.iinfo(kind)
    if not limits.min <= value <= limits.max:
        raise ValueError(f"expected a value of type {parameter!r}, got {value}")
    return kind(value)


@cache
def source(file: str) -> str:
    """Text of a kernel file with the files that it includes put in their places, each once.

    Examples
    --------
    >>> '#include "' in source("hadamard.cuh")
    False
    """
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        raw = (FOLDER / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "(.+)"\n', lambda found: text(found[1]), raw, flags=re.MULTILINE)

    return text(file)
