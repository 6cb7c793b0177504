"""The NumPy backend: strided batched ``np.matmul`` straight into place.

A Kronecker-sparse factor is a batched matrix product over its ``a*d`` blocks. BLAS takes a leading dimension, so
reading ``(a, c, d)`` and writing ``(a, b, d)`` as ``(a, d, c)`` and ``(a, d, b)`` costs no copy: the permutations between
the factors, and an axis order at either end whose digits are compatible with the pattern, are views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.backends import base
from structmat.backends.base import ChainLayout
from structmat.patterns import AxisOrder, Pattern

CACHE_BYTES = 1 << 19  # activations of one chunk of rows: input, intermediate and output together stay in L2


class NumpyBackend(base.Backend):
    """The reference: NumPy and its BLAS."""

    name = "numpy"

    def chain(self, layout: ChainLayout, blocks: Sequence[np.ndarray]) -> base.Plan:
        """The plan of a chain; stacks of chains and empty factors take the plan made of broadcasting products."""
        if any(b.ndim > 4 or b.size == 0 for b in blocks):
            return base.ChainPlan(layout, blocks)
        return StridedChainPlan(layout, blocks)


class Step(NamedTuple):
    """One factor: ``weights @ view_in -> view_out``, the views being reshapes and transpositions of flat indices."""

    weights: np.ndarray  # (*batch, b, c)
    in_shape: tuple[int, ...]
    in_axes: tuple[int, ...] | None  # to (*batch, c, k); None where the reshape is already right
    out_shape: tuple[int, ...]
    out_axes: tuple[int, ...] | None
    rows: int


class StridedChainPlan(base.ChainPlan):
    """A chain of factors without a batch, for operands of two dimensions; others take the general plan."""

    def __init__(self, layout: ChainLayout, blocks: Sequence[np.ndarray]) -> None:
        super().__init__(layout, blocks)
        last = len(blocks) - 1
        steps: list[Step] = []
        self.in_order, self.out_order = layout.in_order, layout.out_order
        for i in range(last, -1, -1):
            a, b, c, d = pattern = layout.patterns[i]
            in_order = layout.in_order if i == last else None
            out_order = layout.out_order.T if i == 0 and layout.out_order else None
            entering = aligned_view(in_order, (a, c, d))
            leaving = aligned_view(out_order, (a, b, d))
            if in_order and entering and _batch(entering) == _batch(_plain((a, b, d))):
                self.in_order = None
            if out_order and leaving and _batch(leaving) == _batch(_plain((a, c, d))):
                self.out_order = None
            entering = entering if self.in_order is None or i != last else None
            leaving = leaving if self.out_order is None or i != 0 else None
            steps.append(_step(pattern, blocks[i], entering or _plain((a, c, d)), leaving or _plain((a, b, d))))
        self.steps = tuple(steps)
        self.shaped: tuple[int, tuple[Step, ...]] = (-1, ())
        self.padded = layout.cols != layout.patterns[-1].cols
        self.truncated = layout.rows != layout.patterns[0].rows
        self.dtype = np.result_type(*blocks)
        self.widest = max(p.rows for p in layout.patterns) + layout.patterns[-1].cols
        self.rows_in = self.in_order is None and _inner_is_fastest(self.steps[0].in_shape, self.steps[0].in_axes)
        self.rows_out = (
            self.out_order is None
            and not self.truncated
            and _inner_is_fastest(self.steps[-1].out_shape, self.steps[-1].out_axes)
        )

    def columns(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """``A x`` for ``x`` of shape ``(n, k)``; other dimensions go the general way."""
        if x.ndim != 2:
            return super().columns(x, out)
        dtype = self.dtype if x.dtype == self.dtype else np.result_type(self.dtype, x.dtype)
        if self.padded:
            x = base.pad(x, self.layout.patterns[-1].cols)
        direct = out is not None and not self.truncated and self.out_order is None
        if out is not None:
            arrays.check_out(out, (self.layout.rows, x.shape[1]), dtype)
            direct = direct and out.dtype == dtype and out.flags.c_contiguous and not np.may_share_memory(x, out)
        y = self._columns(base.reorder(x, self.in_order) if self.in_order else x, dtype, out if direct else None)
        if direct:
            return y
        y = base.reorder(y, self.out_order) if self.out_order else y
        y = y[: self.layout.rows] if self.truncated else y
        return arrays.copy_into(y, out)

    def _steps_for(self, k: int) -> tuple[Step, ...]:
        """The steps with the number of columns in their shapes; those of the last call are kept."""
        known, steps = self.shaped
        if known != k:
            steps = tuple(s._replace(in_shape=(*s.in_shape, k), out_shape=(*s.out_shape, k)) for s in self.steps)
            self.shaped = k, steps
        return steps

    def _columns(self, x: np.ndarray, dtype: Any, out: np.ndarray | None) -> np.ndarray:
        """All factors on ``x (n, k)``, in natural order at both ends."""
        k = x.shape[1]
        *steps, last = self._steps_for(k)
        for weights, in_shape, in_axes, out_shape, out_axes, rows in steps:
            x = x.reshape(in_shape)
            if in_axes is not None:
                x = x.transpose(in_axes)
            if out_axes is None:
                x = np.matmul(weights, x)
            else:
                y = np.empty((rows, k), dtype)
                np.matmul(weights, x, out=y.reshape(out_shape).transpose(out_axes))
                x = y
        weights, in_shape, in_axes, out_shape, out_axes, rows = last
        x = x.reshape(in_shape)
        if in_axes is not None:
            x = x.transpose(in_axes)
        if out_axes is None and out is None:
            return np.matmul(weights, x).reshape(rows, k)
        y = np.empty((rows, k), dtype) if out is None else out
        view = y.reshape(out_shape)
        np.matmul(weights, x, out=view if out_axes is None else view.transpose(out_axes))
        return y

    def rows(self, x: np.ndarray) -> np.ndarray:
        """``x A^T`` for ``x`` of shape ``(..., n)``, in chunks of rows whose intermediates stay in cache."""
        m, n = self.layout.rows, self.layout.cols
        lead = x.shape[:-1]
        x = x.reshape(math.prod(lead), n)
        if x.shape[0] == 1:  # one row is one column
            return self.columns(x.reshape(n, 1)).reshape(*lead, m)
        dtype = np.result_type(self.dtype, x.dtype)
        y = np.empty((x.shape[0], m), dtype)
        chunk = max(64, CACHE_BYTES // (dtype.itemsize * max(1, self.widest)))
        for start in range(0, x.shape[0], chunk):
            self._row_chunk(x[start : start + chunk], y[start : start + chunk], dtype)
        return y.reshape(*lead, m)

    def _row_chunk(self, x: np.ndarray, y: np.ndarray, dtype: Any) -> None:
        """One chunk, read and written as rows where strides allow; the intermediates are columns ``(size, k)``."""
        k = x.shape[0]
        first, last = self.steps[0], self.steps[-1]
        if self.rows_in and not self.padded and x.flags.c_contiguous:
            view = _rows_view(x, first.in_shape, first.in_axes)
        else:
            z = np.ascontiguousarray(x.T)
            z = base.pad(z, self.layout.patterns[-1].cols) if self.padded else z
            view = _columns_view(base.reorder(z, self.in_order), first.in_shape, first.in_axes)
        for step, following in pairwise(self.steps):
            z = np.empty((step.rows, k), dtype)
            np.matmul(step.weights, view, out=_columns_view(z, step.out_shape, step.out_axes))
            view = _columns_view(z, following.in_shape, following.in_axes)
        if self.rows_out:
            target = _rows_view(y, last.out_shape, last.out_axes).swapaxes(-1, -2)
            np.matmul(view.swapaxes(-1, -2), last.weights.swapaxes(-1, -2), out=target)
            return
        z = np.empty((last.rows, k), dtype)
        np.matmul(last.weights, view, out=_columns_view(z, last.out_shape, last.out_axes))
        y[...] = base.reorder(z, self.out_order)[: self.layout.rows].T


class View(NamedTuple):
    """A flat index of shape ``(outer, inner, stride)`` seen in storage order: reshape, then bring digits together."""

    shape: tuple[int, ...]  # digits in storage order
    outer: tuple[int, ...]  # positions of the digits of the outer axis, slow to fast
    stride: tuple[int, ...]  # positions of the digits of the stride axis
    inner: int  # position of the inner axis


def _plain(sizes: tuple[int, int, int]) -> View:
    view = aligned_view(None, sizes)
    if view is None:  # cannot be: without an axis order the digits are the sizes themselves
        raise ValueError(f"no view for {sizes}")
    return view


def _batch(view: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The radices over which a view's batch is spread: both ends of a factor must agree on them."""
    return tuple(view.shape[i] for i in view.outer), tuple(view.shape[i] for i in view.stride)


def aligned_view(order: AxisOrder | None, sizes: tuple[int, int, int]) -> View | None:
    """The stored axis of which ``order`` makes the natural index ``(outer, inner, stride)``, as a view.

    ``None`` where digits of the order and of ``sizes`` interleave, or where the inner axis is split: then the order
    needs a copy.
    """
    outer, inner, stride = sizes
    n = outer * inner * stride
    radices, axes = order if order is not None else ((n,), (0,))
    moved = [radices[i] for i in axes]
    bounds = {n, stride, stride * inner}
    step = 1
    for radix in reversed(moved):
        bounds.add(step)
        step *= radix
    ladder = sorted(bounds)
    if any(small == 0 or big % small for small, big in pairwise(ladder)):
        return None
    if any(stride < bound < stride * inner for bound in ladder):
        return None
    digits = [(small, big // small) for small, big in pairwise(ladder)][::-1]  # slow to fast
    weights = []  # weight of each moved radix in the natural index
    step = 1
    for radix in reversed(moved):
        weights.append((step, step * radix))
        step *= radix
    weights = weights[::-1]
    stored: list[int] = []  # natural digits in the order in which they are stored
    for j in range(len(radices)):
        low, high = weights[axes.index(j)]
        stored += [i for i, (weight, _) in enumerate(digits) if low <= weight < high]
    position = {digit: place for place, digit in enumerate(stored)}
    groups: dict[str, list[int]] = {"outer": [], "inner": [], "stride": []}
    for i, (weight, _) in enumerate(digits):
        name = "stride" if weight < stride else "inner" if weight < stride * inner else "outer"
        groups[name].append(position[i])
    shape = [digits[i][1] for i in stored]
    if not groups["inner"]:  # an axis of length one
        shape.append(1)
        groups["inner"].append(len(shape) - 1)
    return View(tuple(shape), tuple(groups["outer"]), tuple(groups["stride"]), groups["inner"][0])


def _step(pattern: Pattern, blocks: np.ndarray, entering: View, leaving: View) -> Step:
    batch = sum(_batch(entering), ())
    weights = blocks.reshape(*batch, pattern.b, pattern.c)
    return Step(weights, entering.shape, _axes(entering), leaving.shape, _axes(leaving), pattern.rows)


def _axes(view: View) -> tuple[int, ...] | None:
    axes = (*view.outer, *view.stride, view.inner, len(view.shape))
    return None if axes == tuple(range(len(axes))) else axes


def _inner_is_fastest(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> bool:
    """Whether the matrix axis of a view has stride one in a row of storage."""
    return axes is None or axes[-2] == len(shape) - 1


def _columns_view(x: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> np.ndarray:
    """The columns ``x (n, k)`` as ``(*batch, inner, k)``."""
    x = x.reshape(*shape, x.shape[-1])
    return x if axes is None else x.transpose(axes)


def _rows_view(x: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> np.ndarray:
    """The rows ``x (k, n)`` as ``(*batch, inner, k)``."""
    digits = len(shape)
    order = tuple(range(digits + 1)) if axes is None else axes
    places = tuple(0 if i == digits else i + 1 for i in order)
    return x.reshape(x.shape[0], *shape).transpose(places)
