"""A strict stand-in for CuPy: NumPy behind the slice of its interface that the package uses, for machines without a GPU.

``install()`` puts it at ``sys.modules["cupy"]``, so that the backend's code runs unchanged; it needs a process of its own.
Strict where a lenient one would hide errors: no implicit conversion to NumPy and no mixing with it, no mixing of devices,
reductions are 0-d arrays, new memory is poisoned, and everything that a GPU would launch is written down in ``log``:
``("gemm", ...)``, ``("kernel", name)`` for CuPy's own kernels (copies, conversions, arithmetic), ``("launch", name)``,
``("synchronize", stream)``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import sys
import time
import types
import weakref

import fakecublas
import numpy as np

log = []  # what a GPU would have launched, in order
state = {"device": 0, "limit": None, "seed": 0}


class OutOfMemoryError(MemoryError):
    """As in CuPy: a MemoryError."""


class CUDARuntimeError(RuntimeError):
    """As in CuPy."""


class Device:
    def __init__(self, device=None):
        self.id = state["device"] if device is None else device.id if isinstance(device, Device) else int(device)
        self.attributes = {}

    def __enter__(self):
        self.__dict__.setdefault("_before", []).append(state["device"])
        state["device"] = self.id
        return self

    def __exit__(self, *error):
        state["device"] = self._before.pop()

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __str__(self):
        return f"<CUDA Device {self.id}>"

    __repr__ = __str__


def _unwrapped(x, device=None):
    """What is inside; a TypeError for NumPy arrays, a ValueError for arrays of another device."""
    if isinstance(x, ndarray):
        if x.device.id != state["device"]:
            raise ValueError(f"array on device {x.device.id}, current device {state['device']}")
        return x._a
    if isinstance(x, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: a NumPy array was mixed with a CuPy array")
    if isinstance(x, (list, tuple)) and any(isinstance(v, (ndarray, np.ndarray)) for v in x):
        return type(x)(_unwrapped(v) for v in x)
    return x


def _wrapped(x):
    if isinstance(x, (np.ndarray, np.generic)):
        return ndarray(np.asarray(x))
    if isinstance(x, (list, tuple)) and any(isinstance(v, (np.ndarray, np.generic)) for v in x):
        values = [_wrapped(v) for v in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)
    return x


def _noted(name, result, inputs):
    """Write a kernel down unless the result is a view of an input."""
    for r in result if isinstance(result, (list, tuple)) else (result,):
        shares = any(isinstance(x, np.ndarray) and np.may_share_memory(r, x) for x in inputs)
        if isinstance(r, (np.ndarray, np.generic)) and r.size and not shares:
            log.append(("kernel", name))
            _touched(name, r, *inputs)
            return


def _touched(name, *arrays):
    """What a kernel reads and writes, for the graph that is captured."""
    if fakecublas.state["graph"] is not None:
        found = (fakecublas.whole(a) for a in arrays if isinstance(a, np.ndarray) and a.size)
        fakecublas.state["graph"] += [(weakref.ref(a), name) for a in found]


def _call(name, function, *args, **kwargs):
    inside = [_unwrapped(a) for a in args]
    named = {k: _unwrapped(v) for k, v in kwargs.items()}
    result = function(*inside, **named)
    flat = [x for a in inside for x in (a if isinstance(a, (list, tuple)) else (a,))]
    _noted(name, result, flat)
    if isinstance(result, np.ndarray) and not any(
        isinstance(x, np.ndarray) and np.may_share_memory(result, x) for x in flat
    ):
        _room(result)
    return _wrapped(result)


def _room(result):
    if state["limit"] is not None and isinstance(result, np.ndarray) and result.nbytes > state["limit"]:
        raise OutOfMemoryError(f"Out of memory allocating {result.nbytes:,} bytes")


class _Pointer:
    def __init__(self, ptr):
        self.ptr = ptr


class ndarray:
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, a):
        if not isinstance(a, np.ndarray):
            raise TypeError(f"expected a NumPy array inside, got {type(a).__name__}")
        self._a, self.device = a, Device()
        fakecublas.allocations.add(a, self.device.id)

    # ---- refused ----

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if method != "__call__":
            return NotImplemented
        if out is not None:
            kwargs["out"] = tuple(_unwrapped(o) for o in out)
        return _call(ufunc.__name__, ufunc, *inputs, **kwargs)

    def __array_function__(self, function, types_, args, kwargs):
        return getattr(sys.modules["cupy"], function.__name__)(*args, **kwargs)

    # ---- described ----

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    strides = property(lambda self: self._a.strides)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    itemsize = property(lambda self: self._a.itemsize)
    nbytes = property(lambda self: self._a.nbytes)
    flags = property(lambda self: self._a.flags)
    data = property(lambda self: _Pointer(self._a.__array_interface__["data"][0]))
    T = property(lambda self: self._view(self._a.T))
    real = property(lambda self: self._view(self._a.real))
    imag = property(lambda self: self._view(self._a.imag))

    def _view(self, a):
        with self.device:
            return ndarray(a)

    def get(self):
        if streams[-1].is_capturing():
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: a copy to the host during a capture")
        return self._a.copy()

    def item(self):
        return self._a.item()

    def tolist(self):
        return self._a.tolist()

    def fill(self, value):
        log.append(("kernel", "fill"))
        _touched("fill", self._a)
        self._a.fill(value)

    def view(self, dtype):
        return self._view(self._a.view(dtype))

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __float__(self):
        return float(self._a)

    def __int__(self):
        return int(self._a)

    def __complex__(self):
        return complex(self._a)

    def __bool__(self):
        return bool(self._a)

    def __repr__(self):
        return "fake " + repr(self._a)

    def __reduce__(self):
        return asarray, (self.get(),)

    def __deepcopy__(self, memo):
        return self._view(self._a.copy())

    def __dlpack__(self, **kwargs):
        return self._a.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._a.__dlpack_device__()

    # ---- indexed: CuPy takes NumPy arrays and lists as indices ----

    @staticmethod
    def _index(key):
        if isinstance(key, tuple):
            return tuple(ndarray._index(k) for k in key)
        return key._a if isinstance(key, ndarray) else key

    def __getitem__(self, key):
        result = np.asarray(self._a[self._index(key)])
        if not np.may_share_memory(result, self._a):
            _unwrapped(self)
        _noted("take", result, [self._a])
        return self._view(result)

    def __setitem__(self, key, value):
        _unwrapped(self)
        log.append(("kernel", "copy"))
        value = _unwrapped(value)
        _touched("copy", self._a, value)
        self._a[self._index(key)] = value


def _method(name):
    def method(self, *args, **kwargs):
        with self.device if name in VIEWS.split() else contextlib.nullcontext():
            return _call(name, getattr(np.ndarray, name), self, *args, **kwargs)

    return method


VIEWS = "reshape transpose swapaxes squeeze ravel diagonal"  # of an array on any device
METHODS = (
    "astype copy reshape transpose swapaxes ravel flatten squeeze conj conjugate sum max min mean any all argmax argmin "
    "argsort take dot cumsum prod nonzero diagonal repeat round"
)
for _name in METHODS.split():
    setattr(ndarray, _name, _method(_name))


def _operator(name):
    function = getattr(np.ndarray, name)

    def method(self, other):
        result = function(_unwrapped(self), _unwrapped(other))
        if result is NotImplemented:
            return result
        _noted(name, result, [self._a, other._a if isinstance(other, ndarray) else other])
        return self if name.startswith("__i") and name != "__invert__" else _wrapped(result)

    return method


ARITHMETIC, COMPARISONS = "add sub mul truediv floordiv mod pow matmul and or xor", "eq ne lt le gt ge"
for _name in ARITHMETIC.split():
    for _prefix in ("", "r", "i"):
        setattr(ndarray, f"__{_prefix}{_name}__", _operator(f"__{_prefix}{_name}__"))
for _name in COMPARISONS.split():
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("__neg__", "__pos__", "__abs__", "__invert__"):
    setattr(ndarray, _name, _method(_name))


# ---- functions of the module ------------------------------------------------------------------------------------------


def _poisoned(a):
    if a.dtype.kind == "f" or a.dtype.kind == "c" or a.dtype.name == "bfloat16":
        a.fill(np.nan)
    else:
        a.fill(1 << (6 if a.itemsize == 1 else 14))
    return a


def empty(shape, dtype=float, order="C"):
    """New memory: NaN, so that what is read before it is written is seen."""
    if state["limit"] is not None and np.prod(shape, dtype=float) * np.dtype(dtype).itemsize > state["limit"]:
        raise OutOfMemoryError(f"Out of memory allocating an array of shape {shape}")
    return ndarray(_poisoned(np.empty(shape, dtype, order)))


def asarray(a, dtype=None, order=None, **kwargs):
    """CuPy's explicit transfer to the device; itself for an array that is there."""
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    made = np.array(a, dtype, order=order or "K")
    _room(made)
    log.append(("upload", made.nbytes))
    return ndarray(made)


def array(a, dtype=None, copy=True, order="K", **kwargs):
    return ndarray(np.array(a._a, dtype)) if isinstance(a, ndarray) and copy else asarray(a, dtype)


def ascontiguousarray(a, dtype=None):
    return _call("ascontiguousarray", np.ascontiguousarray, a, dtype)


def from_dlpack(x):
    return ndarray(np.from_dlpack(x))


def _made(name):
    def function(*args, dtype=None, **kwargs):
        result = getattr(np, name)(*args, dtype=dtype, **kwargs)
        log.append(("kernel", name))
        _touched(name, result)
        _room(result)
        return ndarray(result)

    return function


CONSTANTS = (
    "bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 intp float16 float32 float64 complex64 complex128 dtype finfo "
    "iinfo pi e inf nan newaxis integer floating complexfloating inexact number result_type can_cast issubdtype isscalar "
    "promote_types ndindex broadcast_shapes"
)
CREATE = "zeros ones full arange eye linspace identity"
LINALG = "inv svd qr eigh eigvalsh cholesky solve norm det slogdet lstsq pinv"
FFT = "fft ifft fftn ifftn rfft irfft rfftn irfftn hfft ihfft fftfreq rfftfreq fftshift ifftshift"
FUNCTIONS = (
    "abs absolute add subtract multiply divide true_divide floor_divide power negative sqrt exp exp2 log log2 log10 log1p "
    "expm1 "
    "sin cos tan sinh cosh tanh arcsin arccos arctan arctan2 arcsinh arccosh arctanh left_shift right_shift invert "
    "bitwise_and bitwise_or bitwise_xor conj conjugate real imag angle sign floor ceil trunc rint round around square "
    "maximum minimum max min amax amin sum prod mean std var any all argmax argmin argsort sort nonzero count_nonzero "
    "cumsum cumprod where clip isnan isinf isfinite isclose allclose equal not_equal less less_equal greater greater_equal "
    "logical_and logical_or logical_not logical_xor matmul dot tensordot einsum kron outer inner vdot trace diagonal diag "
    "triu tril transpose swapaxes moveaxis reshape ravel squeeze expand_dims broadcast_to broadcast_arrays concatenate "
    "stack hstack vstack split array_split flip roll repeat tile take take_along_axis unique searchsorted isin meshgrid "
    "empty_like zeros_like ones_like full_like copyto bincount may_share_memory shares_memory ndim shape hypot copysign "
    "nextafter reciprocal signbit remainder fmod logaddexp copy array_equal iscomplexobj"
)


def _function(name):
    function = getattr(np, name)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        return _call(name, function, *args, **kwargs)

    if name == "add":
        wrapped.at = _add_at
    return wrapped


def _add_at(a, index, values):
    log.append(("kernel", "add.at"))
    np.add.at(_unwrapped(a), ndarray._index(index), _unwrapped(values))


class RawModule:
    """Compiles the CUDA C++ text with g++ behind the shim, at the first launch, and runs it on host memory."""

    def __init__(self, *, code, options=(), name_expressions=None, backend="nvrtc"):
        if not all(isinstance(o, str) for o in options):
            raise TypeError("options: expected strings")
        self.code, self.names = code, tuple(name_expressions or ())

    def get_function(self, name):
        if name not in self.names:
            raise CUDARuntimeError(f"cudaErrorNotFound: {name} is not among the name expressions {self.names}")
        return RawKernel(self.code, name)


C_TYPES = {"int32": "int", "int64": "long long", "uint64": "void*", "float32": "float"}


class RawKernel:
    """A kernel: the number and the byte widths of its arguments are checked, which CUDA does not do."""

    def __init__(self, code, name):
        self.code, self.name = code, name
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(self, grid, block, args, *, shared_mem=0):
        import shim

        from structmat.backends.cuda.kernel import Kernel

        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise CUDARuntimeError("CUDA_ERROR_INVALID_VALUE: max_dynamic_shared_size_bytes has not been raised")
        if shared_mem > 227 << 10 or not 0 < block[0] <= 1024 or block[1:] != (1, 1):
            raise CUDARuntimeError(f"CUDA_ERROR_INVALID_VALUE: block {block}, {shared_mem} bytes of shared memory")
        if not all(isinstance(a, np.generic) for a in args):
            raise TypeError(f"kernel arguments: expected NumPy scalars of exact widths, got {args}")
        pointers = [int(a) for a in args if a.dtype == np.uint64 and a]
        for pointer in pointers:
            fakecublas.allocations.check(pointer, 1, self.name)
        devices = {fakecublas.allocations.device(pointer) for pointer in pointers}
        if devices - {state["device"]}:
            raise CUDARuntimeError(f"illegal address: arrays of the devices {devices}, current {state['device']}")
        parameters = tuple(C_TYPES[a.dtype.name] for a in args)
        kernel = Kernel(self.code, self.name, block[0], shared_mem, 0, parameters, 1)
        shim.build(kernel, seed=state["seed"])(grid, args)
        log.append(("launch", self.name))


class Event:
    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        """Nothing runs later here."""


class Stream:
    """A stream: which one is current is all that matters here; two of one address are equal, as in CuPy."""

    def __init__(self, ptr=1):
        self.ptr = ptr

    def __enter__(self):
        streams.append(self)
        fakecublas.state["stream"] = self.ptr
        return self

    def __exit__(self, *error):
        streams.pop()
        fakecublas.state["stream"] = streams[-1].ptr

    def __eq__(self, other):
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self):
        return hash(self.ptr)

    def is_capturing(self):
        return fakecublas.state["capturing"] and self.ptr == fakecublas.state["stream"]

    def synchronize(self):
        if self.is_capturing():
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing"
            )
        log.append(("synchronize", self.ptr))


streams = [Stream(0)]  # the current one is last


class Graph:
    """What was captured: the memory that is read and written whenever it is launched."""

    def __init__(self):
        self.touched = []

    def launch(self, stream=None):
        """MemoryError if anything of it has been freed: by now it may be another's."""
        gone = sorted({what for allocation, what in self.touched if allocation() is None})
        if gone:
            raise MemoryError(f"illegal address: the graph's memory was freed, of {gone}")


@contextlib.contextmanager
def capturing():
    """As between ``begin_capture`` and ``end_capture``: the graph."""
    graph = Graph()
    fakecublas.state.update(capturing=True, graph=graph.touched)
    try:
        yield graph
    finally:
        fakecublas.state.update(capturing=False, graph=None)


@contextlib.contextmanager
def counted():
    """What is launched inside: lists of products, of CuPy's own kernels, and of ours."""
    found = types.SimpleNamespace(gemms=[], kernels=[], launches=[], uploads=[], waits=[], streams=set())
    start, products = len(log), len(fakecublas.log)
    yield found
    for *sizes, stream in fakecublas.log[products:]:
        found.gemms.append(tuple(sizes))
        found.streams.add(stream)
    lists = {"kernel": found.kernels, "launch": found.launches, "upload": found.uploads, "synchronize": found.waits}
    for kind, what in log[start:]:
        lists[kind].append(what)


@contextlib.contextmanager
def memory_limit(nbytes):
    """No array larger than this can be allocated inside."""
    state["limit"] = nbytes
    try:
        yield
    finally:
        state["limit"] = None


def _module(name, **contents):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__path__ = []
    vars(made).update(contents)
    sys.modules[name] = made
    return made


def install():
    """Put the stand-in where ``import cupy`` finds it; only before CuPy has been imported."""
    if "cupy" in sys.modules:
        raise RuntimeError("cupy is imported already: the stand-in needs a process of its own")
    made = {name: getattr(np, name) for name in CONSTANTS.split()}
    made |= {name: _made(name) for name in CREATE.split()} | {name: _function(name) for name in FUNCTIONS.split()}
    for name in ("zeros", "ones"):
        made[name] = functools.partial(lambda f, shape, dtype=float, **kwargs: f(shape, dtype=dtype), made[name])
    runtime = _module("cupy_backends.cuda.api.runtime", CUDARuntimeError=CUDARuntimeError)
    cublas = _module("cupy_backends.cuda.libs.cublas", gemmStridedBatchedEx=fakecublas.gemmStridedBatchedEx)
    _module("cupy_backends")
    _module("cupy_backends.cuda")
    _module("cupy_backends.cuda.api", runtime=runtime)
    _module("cupy_backends.cuda.libs", cublas=cublas)
    device = _module("cupy.cuda.device", Device=Device, get_cublas_handle=lambda: 1 + state["device"])
    memory = _module("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError)
    runtime = types.SimpleNamespace(
        getDevice=lambda: state["device"],
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda i: {"name": b"NVIDIA H200", "major": 9, "minor": 0},
    )
    cuda = _module(
        "cupy.cuda", device=device, memory=memory, runtime=runtime, Device=Device, Event=Event, Stream=Stream,
        is_available=lambda: True, get_elapsed_time=lambda start, stop: 1e3 * (stop.time - start.time),
        get_current_stream=lambda: streams[-1],
    )  # fmt: skip
    linalg = {n: _function_of(np.linalg, n) for n in LINALG.split()}
    fft = {n: _function_of(np.fft, n) for n in FFT.split()}
    cupy = _module("cupy", **made, cuda=cuda, __version__="14.2.0+stand-in")
    cupy.linalg, cupy.fft = _module("cupy.linalg", **linalg), _module("cupy.fft", **fft)
    for own in (ndarray, RawModule, empty, asarray, array, ascontiguousarray, from_dlpack):
        setattr(cupy, own.__name__, own)
    cupy.asnumpy = lambda a: a.get()
    cupy.get_array_module = lambda *a: cupy if any(isinstance(x, ndarray) for x in a) else np
    return cupy


def _function_of(module, name):
    return lambda *args, **kwargs: _call(name, getattr(module, name), *args, **kwargs)
