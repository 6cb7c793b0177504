"""Kernels of our own on CUDA tensors, by pointer on torch's current stream: two factors, or two Kronecker factors, and bias.

They are compiled and launched through CuPy. Where it is not installed, a kernel does not fit, or products are predicted to be
as fast, the products are taken; :meth:`A.plan` says which. A kernel adds the bias before it rounds, products after.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.backends.cuda import roofline, sources
from structmat.backends.cuda.roofline import Rates, Work
from structmat.backends.cupy.fused import CAPABILITY
from structmat.backends.torch import kron as kron_products
from structmat.backends.torch.layout import End, Layout

MANY = 1 << 12  # rows from which the choice of a tile no longer depends on their number


def chain(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor]) -> Tensor | None:
    """``x A^T + bias`` for rows, of a chain of two factors; None, and nothing done, where products are taken."""
    if not usable(x, bias, *factors):
        return None
    kernel = chain_kernel(layout, *key(x, x.shape[0]))
    if kernel is None:
        return None
    y = x.new_empty(x.shape[0], layout.rows)
    left, right = factors
    addresses = (x.data_ptr(), right.data_ptr(), left.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
    launch(sources.monarch_launch(kernel, *addresses, x.shape[0], _stride(x), layout.rows), x.device)
    return y


def kron(x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]) -> Tensor | None:
    """``x A^T + bias`` for rows, of a Kronecker product of two factors; None where products are taken."""
    if len(factors) != 2 or not usable(x, bias, *factors):
        return None
    shapes = ((factors[0].shape[0], factors[0].shape[1]), (factors[1].shape[0], factors[1].shape[1]))
    kernel = kron_kernel(shapes, *key(x, x.shape[0]))
    if kernel is None:
        return None
    m = shapes[0][0] * shapes[1][0]
    y = x.new_empty(x.shape[0], m)
    left, right = factors
    addresses = (x.data_ptr(), left.data_ptr(), right.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
    processors = rates(x.device).value.processors
    launch(sources.kron_launch(kernel, *addresses, x.shape[0], _stride(x), m, processors), x.device)
    return y


def hadamard(x: Tensor, n: int, scale: float) -> Tensor | None:
    """``scale H x`` for rows; None where there is no kernel."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not here(x.device) or not _readable(x):
        return None
    kernel = sources.hadamard_kernel(_name(x.dtype), n)
    if kernel is None:
        return None
    y = x.new_empty(x.shape)
    launch(sources.hadamard_launch(kernel, x.data_ptr(), y.data_ptr(), scale, x.shape[0], _stride(x), n), x.device)
    return y


# ---- which kernel ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def chain_kernel(
    layout: Layout, dtype: str, batch: int, device: HashableRates, contiguous: bool = True
) -> sources.Kernel | None:
    """The kernel for batches up to ``batch``, a power of two, where it is predicted to be faster than two products.

    With ``contiguous`` results those take a copy more where the order of the outputs is the paper's.
    """
    sizes = monarch_sizes(layout)
    if sizes is None or device.value.capability < CAPABILITY:
        return None
    (k, p, q, s, r), lanes = sizes
    rows = None if batch >= MANY else batch
    kernel = sources.monarch_kernel(dtype, k, p, q, s, r, lanes=lanes, rows=rows, shared=device.value.shared_bytes)
    if kernel is None:
        return None
    size, weights = sources.ITEMSIZE[dtype], k * r * q * (p + s)
    tile = size * (kernel.rows * (layout.cols + layout.rows / kernel.columns) + weights / kernel.columns)
    tiles = -(-batch // kernel.rows) * kernel.columns
    work = roofline.fused_work(layout.rows, layout.cols, batch, size, weights, weights, tile, tiles, device.value)
    products = roofline.chain_work(layout.patterns, batch, size, copies=int(lanes and contiguous))
    return _faster(kernel, work, products, dtype, device.value)


@functools.lru_cache(maxsize=4096)
def kron_kernel(
    shapes: tuple[tuple[int, int], tuple[int, int]], dtype: str, batch: int, device: HashableRates
) -> sources.Kernel | None:
    """The same for two Kronecker factors."""
    if device.value.capability < CAPABILITY:
        return None
    (r, p), (s, q) = shapes
    kernel = sources.kron_kernel(dtype, r, p, s, q, shared=device.value.shared_bytes)
    if kernel is None:
        return None
    size, steps = sources.ITEMSIZE[dtype], kron_products.steps(shapes)
    traffic = float(size * (batch * (p * q + r * s) + r * p + s * q))
    work = Work(2.0 * batch * (p * s * q + r * p * s), traffic, traffic)
    moved = size * (batch * sum(t.before * t.after * (t.m + t.n) for t in steps) + r * p + s * q)
    operations = 2.0 * batch * sum(t.before * t.after * t.m * t.n for t in steps)
    return _faster(kernel, work, Work(operations, float(moved), 0.0, 2), dtype, device.value)


def monarch_sizes(layout: Layout) -> tuple[tuple[int, int, int, int, int], bool] | None:
    """``(K, P, Q, S, R)`` and whether outputs are in the paper's order; None for a chain of another kind."""
    if len(layout.patterns) != 2:
        return None
    (a, s, depth, q), (k, middle, p, d) = layout.patterns
    if (a, d) != (1, 1) or 0 in (s, depth, q, k, middle, p) or depth % k or middle % q:
        return None
    if layout.rows != s * q or layout.cols != k * p or layout.ins[1] != End(k, p, 1):
        return None
    lanes = layout.outs[0] == End(1, s, q) and q > 1
    if not lanes and layout.outs[0] != End(q, s, 1):
        return None
    return (k, p, q, s, depth // k), lanes


def _faster(kernel: sources.Kernel, work: Work, products: Work, dtype: str, device: Rates) -> sources.Kernel | None:
    return kernel if roofline.seconds(work, device, dtype) < roofline.seconds(products, device, dtype) else None


# ---- the device -------------------------------------------------------------------------------------------------------------


def usable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels can read these tensors: on one CUDA device with CuPy, of 16 bits, aligned, with unit strides."""
    if not suits(x) or not _readable(x):
        return False
    return all(t is None or _weights(t, x.device) for t in others)


def _readable(x: Tensor) -> bool:
    """Whether there are rows as they are in memory, of unit stride, and 16 bytes can be read at a time."""
    rows = x.shape[0]
    if not 0 < rows < 1 << 31 or x.stride(1) != 1 or x.is_neg():  # a negation that is still to be done
        return False
    return sources.aligned(x.data_ptr(), _stride(x), _name(x.dtype), rows)


def _weights(t: Tensor, device: torch.device) -> bool:
    """Whether factors or a bias are on the operand's device, as they are in memory, contiguous and aligned."""
    return t.device == device and t.is_contiguous() and not t.is_neg() and t.data_ptr() % 16 == 0


def suits(x: Tensor) -> bool:
    """Whether there are kernels for a dtype, and a device to run them on."""
    return x.dtype in (torch.float16, torch.bfloat16) and here(x.device)


def here(device: torch.device) -> bool:
    """Whether kernels run on a device."""
    return device.type == "cuda" and torch.version.hip is None and _cupy_works()


def key(x: Tensor, batch: int) -> tuple[str, int, HashableRates]:
    """What the choice of a kernel depends on besides its shape."""
    return _name(x.dtype), _class(batch), rates(x.device)


@functools.cache
def _cupy_works() -> bool:
    """Whether CuPy is installed and finds the device that torch has found; warns where it is installed and does not."""
    if importlib.util.find_spec("cupy") is None:
        return False
    try:
        import cupy

        works = cupy.cuda.is_available()
        reason = "it finds no device"
    except (ImportError, RuntimeError, OSError) as error:  # built for another CUDA, or broken
        works, reason = False, str(error)
    if not works:
        message = f"CuPy cannot be used ({reason}): CUDA tensors go through products, not through kernels of structmat"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return works


class HashableRates:
    """The rates of a device as a part of a key: one object for each device."""

    def __init__(self, value: Rates) -> None:
        self.value = value


@functools.cache
def rates(device: torch.device) -> HashableRates:
    """The rates of a device for the cost model."""
    from structmat.backends.cupy.device import rates as measured

    return HashableRates(measured(device.index or 0))


class CurrentStream:
    """Torch's current stream of a device as others take it; torch's own streams have this method from 2.10 on.

    Parameters
    ----------
    device
        A CUDA device; ``None`` for the current one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.stream = torch.cuda.current_stream(device)

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of the protocol, and the address of the stream."""
        return 0, self.stream.cuda_stream


def launch(call: sources.Launch, device: torch.device) -> None:
    """Launch on torch's current stream, with torch's own memory; it can be captured into a CUDA graph once compiled."""
    import cupy

    from structmat.backends.cupy.launch import launch as launched

    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(CurrentStream(device)):
        launched(call)


def _class(rows: int) -> int:
    """The power of two at or above a number of rows, up to where it no longer matters."""
    return min(1 << (rows - 1).bit_length(), 16 * MANY)


def _stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
