"""Arrays of any supported library: which library, which dtype, and the checks at the public door.

Operators hold NumPy, torch or CuPy arrays. Values are floating or complex; integer arrays inside an operator are indices.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, torch.Tensor or cupy.ndarray
DType = Any  # numpy.dtype or torch.dtype


def kind(x: Array) -> str | None:
    """The library an array belongs to: ``"numpy"``, ``"torch"``, ``"cupy"``; ``None`` for anything else."""
    if isinstance(x, np.ndarray):
        return "numpy"
    for name, type_name in (("torch", "Tensor"), ("cupy", "ndarray")):
        module = sys.modules.get(name)
        if module is not None and isinstance(x, getattr(module, type_name, ())):
            return name
    return None


def namespace(x: Array) -> Any:
    """The Python array API namespace of an array (through ``array-api-compat``)."""
    if isinstance(x, np.ndarray):
        return np
    from array_api_compat import array_namespace

    return array_namespace(x)


def namespace_of(kind_name: str | None) -> Any:
    """The Python array API namespace of a library given by name (NumPy where there is none)."""
    if kind_name in (None, "numpy"):
        return np
    import importlib

    return importlib.import_module(f"array_api_compat.{kind_name}")


def device(x: Array) -> Any:
    """The device of an array: ``"cpu"`` for NumPy, the library's own device object otherwise."""
    return "cpu" if isinstance(x, np.ndarray) else x.device


def is_torch_dtype(dtype: DType) -> bool:
    """Whether a dtype is torch's (asked without importing torch)."""
    return type(dtype).__module__ == "torch"


def as_dtype(dtype: DType) -> DType:
    """A ``numpy.dtype`` from anything NumPy accepts; torch dtypes are returned as they are."""
    return dtype if is_torch_dtype(dtype) else np.dtype(dtype)


def dtype_for(dtype: DType, kind_name: str | None) -> DType:
    """The dtype of the same name in the library ``kind_name``."""
    if kind_name == "torch" and not is_torch_dtype(dtype):
        return getattr(_optional("torch"), np.dtype(dtype).name)
    if kind_name != "torch" and is_torch_dtype(dtype):
        return np.dtype(str(dtype).removeprefix("torch."))
    return dtype


def promote(*dtypes: DType) -> DType:
    """The dtype that holds all of these: NumPy's promotion, or torch's as soon as one of them is torch's."""
    if any(is_torch_dtype(d) for d in dtypes):
        torch = sys.modules["torch"]
        result = dtype_for(dtypes[0], "torch")
        for d in dtypes[1:]:
            result = torch.promote_types(result, dtype_for(d, "torch"))
        return result
    return np.result_type(*dtypes)


def is_complex(dtype: DType) -> bool:
    """Whether a dtype is complex."""
    return bool(dtype.is_complex) if is_torch_dtype(dtype) else dtype.kind == "c"


def is_inexact(dtype: DType) -> bool:
    """Whether a dtype is floating or complex, i.e. holds values rather than indices."""
    if is_torch_dtype(dtype):
        return bool(dtype.is_floating_point or dtype.is_complex)
    return dtype.kind in "fc" or (dtype.kind == "V" and dtype.name == "bfloat16")  # of ml_dtypes, in CuPy's arrays


def itemsize(dtype: DType) -> int:
    """Bytes per entry."""
    return int(dtype.itemsize)


def on_host(x: Any) -> Any:
    """An array as a NumPy array; anything else as it is."""
    return x if kind(x) is None else convert(x, "numpy")


def cast(x: Array, dtype: DType) -> Array:
    """The array in another dtype of its own library; itself where the dtype is already right."""
    if x.dtype == dtype:
        return x
    return x.astype(dtype) if kind(x) != "torch" else x.to(dtype)


def copy(x: Array) -> Array:
    """A copy that shares no memory (and, in torch, keeps the gradient)."""
    return x.clone() if kind(x) == "torch" else x.copy()


def contiguous(x: Array) -> Array:
    """The array in C order; itself where it is."""
    return x.contiguous() if kind(x) == "torch" else namespace(x).ascontiguousarray(x)


def values(x: Any, what: str, ndim: int = 0) -> Array:
    """An array of floating or complex values, checked: integers and booleans are promoted to the default float.

    Raises ``TypeError`` for other dtypes (object, text, dates) and ``ValueError`` for fewer than ``ndim`` dimensions.
    """
    if kind(x) is None or isinstance(x, np.matrix):
        x = np.asarray(x)
    refused = kind(x) == "numpy" and x.dtype.kind == "V"  # NumPy itself cannot multiply bfloat16
    if refused or not is_inexact(x.dtype):
        if kind(x) == "torch":
            x = x.to(sys.modules["torch"].get_default_dtype())
        elif x.dtype.kind in "iub":
            x = x.astype(np.float64)
        else:
            raise TypeError(f"{what}: expected an array of floating or complex numbers, got dtype {x.dtype}")
    if x.ndim < ndim:
        raise ValueError(f"{what}: expected at least {ndim} dimensions, got shape {tuple(x.shape)}")
    return x


def indices(x: Any, what: str, size: int | None = None) -> Array:
    """A one-dimensional integer index array, checked against ``size`` (negative indices are not allowed)."""
    if kind(x) is None:
        x = np.asarray(x)
        x = x.astype(np.intp) if x.size == 0 else x
    if x.ndim != 1:
        raise ValueError(f"{what}: expected one dimension, got shape {tuple(x.shape)}")
    integral = not is_inexact(x.dtype) and "bool" not in str(x.dtype) and str(x.dtype) != "object"
    if not integral:
        raise TypeError(f"{what}: expected integers, got dtype {x.dtype}")
    if size is not None and x.shape[0] and (int(x.min()) < 0 or int(x.max()) >= size):
        raise ValueError(f"{what}: expected indices in 0..{size - 1}, got {int(x.min())}..{int(x.max())}")
    return x


def common(arrays: tuple[Array, ...], what: str) -> tuple[str | None, Any]:
    """The one library and device of several arrays; ``TypeError`` that names both where they differ."""
    found_kind, found_device = None, None
    for x in arrays:
        k, d = kind(x), device(x)
        if found_kind is None:
            found_kind, found_device = k, d
        elif (k, d) != (found_kind, found_device):
            raise TypeError(f"{what}: cannot mix {found_kind} arrays on {found_device} with {k} arrays on {d}")
    return found_kind, found_device


def operand(x: Any, owner: Any, what: str) -> Array:
    """Check the array that an operator meets: its library and device, and that it holds numbers.

    Lists and scalars become NumPy arrays. Integers and booleans are promoted with the operator's dtype.
    """
    k = kind(x)
    if k is None or isinstance(x, np.matrix):
        if hasattr(x, "__array__") or isinstance(x, (list, tuple, int, float, complex)):
            x, k = np.asarray(x), "numpy"
        else:
            raise TypeError(
                f"{what}: expected an array or an operator, got {type(x).__name__}; "
                "structmat.as_operator(x) takes SciPy's sparse matrices and LinearOperators"
            )
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{what}: a product with masked entries is not defined; use x.filled(0) or x.data")
    if k == "numpy" and x.dtype.kind not in "fciub":
        raise TypeError(f"{what}: expected numbers, got dtype {x.dtype}")
    own = owner.kind
    if own is not None and own != k:
        raise TypeError(f"{what}: the operator holds {own} arrays, the operand is a {k} array; convert one of them")
    if k != "numpy" and own is not None and owner.device != x.device:
        raise TypeError(f"{what}: the operator is on {owner.device}, the operand on {x.device}; move one with .to(...)")
    if k == "torch":
        dtype = promote(owner.dtype, x.dtype)
        return x if x.dtype == dtype else x.to(dtype)
    if k == "cupy" and x.dtype != owner.dtype:
        dtype = joint_dtype(owner.dtype, x.dtype, what)
        if x.dtype.kind in "iub":
            with x.device:  # CuPy allocates on the current one
                return x.astype(dtype)
    return x.astype(promote(owner.dtype, x.dtype)) if x.dtype.kind in "iub" else x


def joint_dtype(own: DType, other: DType, what: str) -> DType:
    """The dtype of an operator times an operand; ``TypeError`` that names both where none holds all values of both."""
    try:
        return promote(own, other)
    except TypeError as error:  # NumPy's DTypePromotionError, of bfloat16
        raise TypeError(
            f"{what}: {own} operator and {other} operand have no common dtype; use x.astype(...) of one that holds both, "
            "such as float32"
        ) from error


def convert(x: Array, target: str, target_device: Any = None) -> Array:
    """The array in another library (``"numpy"``, ``"torch"``, ``"cupy"``), on a device of that library."""
    k = kind(x)
    if target == "numpy":
        if k == "torch":
            if x.dtype == sys.modules["torch"].bfloat16:
                raise TypeError("to: NumPy has no bfloat16; use A.astype(torch.float32) first")
            return x.detach().cpu().resolve_conj().resolve_neg().numpy()
        if k == "cupy" and x.dtype.name == "bfloat16":
            raise TypeError("to: NumPy has no bfloat16; use A.astype(numpy.float32) first")
        return x.get() if k == "cupy" else x
    if target == "torch":
        torch = _optional("torch")
        if k == "cupy":
            x = torch.from_dlpack(x)
        elif k == "numpy":
            x = torch.from_numpy(x if x.flags.writeable else x.copy())
        return x if target_device is None else x.to(target_device)
    if target == "cupy":
        cupy = cupy_with_device("to")
        if k == "torch" and x.device.type == "cuda":
            return cupy.from_dlpack(x.detach().resolve_conj().resolve_neg())
        if k == "torch" and x.dtype == sys.modules["torch"].bfloat16:
            bits = x.detach().cpu().resolve_neg().view(sys.modules["torch"].int16).numpy()
            return _moved(cupy, bits).view(_optional("ml_dtypes").bfloat16)
        return _moved(cupy, convert(x, "numpy") if k == "torch" else x)
    raise ValueError(f"to: expected 'numpy', 'torch', 'cupy' or a torch device, got {target!r}")


def cupy_with_device(what: str) -> Any:
    """CuPy; ``ImportError`` where it cannot be imported, ``RuntimeError`` where it finds no driver or no device."""
    cupy = _optional("cupy")
    if not cupy.cuda.is_available():
        try:
            reason = f"{cupy.cuda.runtime.getDeviceCount()} devices"
        except RuntimeError as error:  # CuPy's CUDARuntimeError
            reason = str(error)
        raise RuntimeError(
            f"{what}: CuPy {cupy.__version__} is installed but finds no CUDA device ({reason}); a GPU and an NVIDIA driver "
            "for its version of CUDA are needed (python -c 'import cupy; cupy.show_config()' says what is there)"
        )
    return cupy


def _moved(cupy: Any, x: Array) -> Array:
    """A NumPy or CuPy array on the current device; ``MemoryError`` with advice where there is no room."""
    try:
        return cupy.asarray(x)
    except MemoryError as error:
        raise MemoryError(
            f"to: the GPU is out of memory ({error}); nothing has been changed, and "
            "cupy.get_default_memory_pool().free_all_blocks() gives back what CuPy keeps for later"
        ) from error


def _optional(name: str) -> Any:
    import importlib
    import importlib.util

    try:
        return importlib.import_module(name)
    except ImportError as error:
        if name not in sys.modules and importlib.util.find_spec(name) is not None:
            raise ImportError(f"{name} is installed but cannot be imported: {error}") from error
        extra = {"cupy": "cuda", "ml_dtypes": "cuda"}.get(name, name)
        raise ImportError(f"{name} is needed here: pip install 'structmat[{extra}]'") from error


def copy_into(y: Array, out: Array | None) -> Array:
    """Write a result into the caller's ``out`` after checking shape and dtype; without ``out`` return it."""
    if out is None:
        return y
    check_out(out, tuple(y.shape), y.dtype)
    out[...] = y
    return out


def check_out(out: Array, shape: tuple[int, ...], dtype: DType) -> None:
    """``ValueError``/``TypeError`` unless ``out`` can take a result of this shape and dtype."""
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected shape {shape}, got {tuple(out.shape)}")
    native = out.dtype.newbyteorder("=") if isinstance(out.dtype, np.dtype) else out.dtype
    if promote(native, dtype) != native:
        raise TypeError(f"out: dtype {out.dtype} cannot hold a result of dtype {dtype}")


def random(shape: tuple[int, ...], dtype: DType, rng: Any, scale: float = 1.0) -> Array:
    """Independent normal entries of variance ``scale**2`` (complex: circular), in the library of the dtype."""
    dtype = as_dtype(dtype)
    target = dtype_for(dtype, "numpy") if "bfloat16" not in str(dtype) else np.dtype(np.float32)
    if target.kind not in "fc":
        raise TypeError(f"random: expected a floating or complex dtype, got {dtype}")
    rng = np.random.default_rng(rng)
    x = rng.standard_normal(shape)
    if target.kind == "c":
        x = (x + 1j * rng.standard_normal(shape)) / np.sqrt(2.0)
    x = (x * scale).astype(target)
    return cast(convert(x, "torch"), dtype) if is_torch_dtype(dtype) else x
