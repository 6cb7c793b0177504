"""Storage: an operator in one safetensors file, its structure in the metadata."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from structmat import arrays, files
from structmat.arrays import Array
from structmat.operator import Operator
from structmat.specs import decode, encode


def save(path: str | os.PathLike[str], A: Operator) -> None:
    """Write an operator to a safetensors file: its arrays as tensors, its structure as JSON in the metadata, no pickle.

    Every structure, sums, products, multiples, block operators, inverses and stacks of them included, bit by bit: values,
    dtypes, complex numbers (as pairs of real ones) and the library, NumPy or torch. Arrays on a device are copied to the host,
    those of the other byte order come back in the native one. An array that occurs several times is stored once. A failed call
    leaves an older file as it was.

    Parameters
    ----------
    path
        The file.
    A
        The operator. One of a family that is not structmat's can be loaded where its module has been imported.

    Raises
    ------
    TypeError
        If ``A`` is no operator, or holds something other than arrays, numbers and dtypes (a SciPy LinearOperator).
    FileNotFoundError
        If the folder of ``path`` is missing.
    IsADirectoryError
        If ``path`` is a folder.
    ImportError
        If safetensors is missing.

    Examples
    --------
    >>> import tempfile, structmat as sm
    >>> A = 2.0 * sm.Monarch.random((8, 8), blocks=2, rng=0) + sm.Identity(8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sm.save(f"{folder}/A.safetensors", A)
    ...     B = sm.load(f"{folder}/A.safetensors")
    >>> B, bool((B.to_dense() == A.to_dense()).all())
    (<Monarch(8x8, patterns (1,4,2,2) (2,2,4,1)) + Identity(8x8): 8x8 float64>, True)
    """
    if not isinstance(A, Operator):
        raise TypeError(f"save: expected a path and an operator, got {type(A).__name__}")
    kept: list[Array] = []

    def keep(array: Array, _: Any) -> dict[str, Any]:
        slot = next((i for i, other in enumerate(kept) if other is array), len(kept))
        if slot == len(kept):
            kept.append(array)
        library = "torch" if arrays.kind(array) == "torch" else "numpy"
        dtype = str(array.dtype).removeprefix("torch.") if library == "torch" else array.dtype.name
        return {"array": slot, "library": library, "type": dtype, "shape": list(array.shape)}

    def foreign(value: Any, _: Any) -> dict[str, Any] | None:
        sparse = sys.modules.get("scipy.sparse")
        if sparse is None or not sparse.issparse(value):
            return None
        rows = value.tocsr()
        return {"csr": [keep(x, None) for x in (rows.data, rows.indices, rows.indptr)], "shape": list(rows.shape)}

    spec = encode(A, keep, foreign)
    library = "torch" if any(arrays.kind(x) == "torch" for x in kept) else "numpy"
    tensors = {f"arrays.{i}": _stored(x, library) for i, x in enumerate(kept)}
    about = {"operator": spec, "shape": list(A.shape), "dtype": str(A.dtype)}
    files.write(path, "operator", library, tensors, about)


def load(path: str | os.PathLike[str]) -> Operator:
    """The operator of a file written by :func:`save`, strictly: the same structure, values, dtypes and library.

    Nothing is unpickled and nothing imported on behalf of the file but torch, where it holds torch tensors; those come back on
    the CPU, arrays of CuPy as NumPy's.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, not of :func:`save`, of a later version, or of a family that has not been imported.
    ImportError
        If safetensors is missing, or torch for a file with torch tensors.

    Examples
    --------
    >>> import tempfile, numpy as np, structmat as sm
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sm.save(f"{folder}/A.safetensors", sm.LowRank(np.ones((3, 1)), np.ones((1, 2))))
    ...     sm.load(f"{folder}/A.safetensors")
    <LowRank(3x2, rank 1): 3x2 float64>
    """
    tensors, about = files.read(path, "operator")

    def kept(field: dict[str, Any]) -> Any:
        if "csr" in field:
            from scipy.sparse import csr_array

            return csr_array(tuple(map(kept, field["csr"])), shape=field["shape"])
        x = tensors[f"arrays.{field['array']}"]
        found = _restored(x, field["type"], field["library"])
        if list(found.shape) != field["shape"]:
            raise ValueError(f"array {field['array']} has shape {tuple(found.shape)}, expected {tuple(field['shape'])}")
        return found

    try:
        A = decode(about["operator"], kept, _dtype)
        shape, dtype = list(A.shape), str(A.dtype)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"load: {path}: its operator cannot be built: {error}") from error
    if shape != about.get("shape") or dtype != about.get("dtype"):
        raise ValueError(
            f"load: {path} is damaged: it says {about.get('shape')} {about.get('dtype')}, its operator is {shape} {dtype}"
        )
    return A


def _stored(x: Array, library: str) -> Array:
    """An array as the file holds it: on the host, contiguous, of native byte order, complex numbers as pairs."""
    if library == "torch":
        import torch

        x = x if arrays.kind(x) == "torch" else torch.from_numpy(_on_host(x).copy())
        x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
        return x.cpu().clone(memory_format=torch.contiguous_format)
    x = _on_host(x)
    if x.dtype.kind == "c":
        x = np.ascontiguousarray(x).reshape(*x.shape, 1).view(x.real.dtype)
    if x.dtype.kind not in "fiub" or x.dtype.itemsize > 8:
        raise TypeError(f"save: safetensors has no dtype {x.dtype}")
    return np.array(x, order="C")


def _on_host(x: Array) -> Array:
    """A NumPy array of native byte order: torch has no other, and a checksum is of the bytes that are read back."""
    x = arrays.convert(x, "numpy")
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def _restored(x: Array, dtype: str, library: str) -> Array:
    """The array of a dtype and library from what the file holds."""
    if arrays.kind(x) == "torch":
        import torch

        x = x.clone()  # the file's memory is mapped, and aligned to 8 bytes where torch's complex kernels need 16
        x = torch.view_as_complex(x) if dtype.startswith("complex") else x
        x = x.numpy() if library == "numpy" else x
    elif dtype.startswith("complex"):
        x = x.view(dtype)[..., 0]
    if str(x.dtype).removeprefix("torch.") != dtype:
        raise ValueError(f"an array of dtype {x.dtype}, expected {dtype}")
    return x


def _dtype(field: dict[str, Any]) -> Any:
    if field["of"] == "numpy":
        return np.dtype(field["dtype"])
    import torch

    found = getattr(torch, field["dtype"], None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {field['dtype']!r} in torch")
    return found
