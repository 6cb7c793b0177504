"""Programs of what is applied by the fast Fourier transform: Toeplitz, circulant and Fourier matrices."""

# ruff: noqa: ARG002 (every program takes the same arguments)
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from structmat.nn.program import Factor, Program
from structmat.structures.toeplitz import fast_size, fft_flops

HALF = (torch.bfloat16, torch.float16)  # which torch's FFT does not take on every device


class ToeplitzProgram(Program):
    """A Toeplitz matrix inside a circulant one; Golub and Van Loan, Matrix Computations, 4th ed., section 4.8."""

    def __init__(self, column: int, row: int, shape: tuple[int, int]) -> None:
        self.column, self.row, self.shape = column, row, shape
        self.size = fast_size(sum(shape) - 1)
        self.flops = fft_flops(self.size)
        slots = dict.fromkeys((column, row))  # one of them where the matrix is symmetric
        self.factors = tuple(Factor(slot, shape[1], shape[0], last=i == 0) for i, slot in enumerate(slots))

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Circular convolution with the first column and, backwards, the first row."""
        column, row = values[self.column], values[self.row]
        gap = column.new_zeros(self.size - sum(self.shape) + 1)
        y = convolved(x, torch.cat((column, gap, row[1:].flip(0))), self.size)[:, : self.shape[0]].contiguous()
        return y if bias is None else y + bias


class CirculantProgram(Program):
    """A circulant matrix."""

    def __init__(self, slot: int, size: int) -> None:
        self.slot, self.shape, self.flops = slot, (size, size), fft_flops(size)
        self.factors = (Factor(slot, size, size, last=True),)

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Circular convolution."""
        y = convolved(x, values[self.slot], self.shape[0])
        return y if bias is None else y + bias


class FourierProgram(Program):
    """The discrete Fourier transform, unnormalised, or its conjugate; rows become complex."""

    def __init__(self, size: int, conjugate: bool, flops: int) -> None:
        self.shape, self.conjugate, self.flops, self.factors = (size, size), conjugate, flops, ()

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """One FFT per row."""
        batch, x = x.shape[0], never_empty(x)
        y = torch.fft.ifft(x, norm="forward") if self.conjugate else torch.fft.fft(x)
        y = y if y.shape[0] == batch else y[:batch]
        return y if bias is None else y + bias


def convolved(x: Tensor, kernel: Tensor, size: int) -> Tensor:
    """Circular convolution of length ``size`` of every row of ``x (B, n)`` with ``kernel (size,)``, rows padded by zeros.

    Half precision is transformed in float32 and rounded at the end.
    """
    batch, dtype = x.shape[0], x.dtype
    x = never_empty(x)
    if dtype in HALF:
        x, kernel = x.float(), kernel.float()
    if dtype.is_complex:
        y = torch.fft.ifft(torch.fft.fft(kernel) * torch.fft.fft(x, n=size))
    else:
        y = torch.fft.irfft(torch.fft.rfft(kernel) * torch.fft.rfft(x, n=size), n=size)
    return (y if y.shape[0] == batch else y[:batch]).to(dtype)


def never_empty(x: Tensor) -> Tensor:
    """Rows, with one of zeros where there are none: MKL's FFT takes no empty batch."""
    return functional.pad(x, (0, 0, 0, 1)) if x.shape[0] == 0 else x
