"""BlockSparse: dense blocks at given places of a grid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator
from structmat.structures.chain import ceil_div, check_size


class BlockSparse(Operator):
    """Matrix with equal dense blocks at listed places of a grid: ``y[rows[t]] += blocks[t] @ x[cols[t]]``.

    The adjoint has the adjoint blocks at the exchanged places. With :func:`flat_block_butterfly` and a
    :class:`LowRank` term it is the Pixelfly matrix (Chen et al., "Pixelated Butterfly", ICLR 2022).

    Parameters
    ----------
    blocks
        ``(*batch, count, p, q)``.
    rows, cols
        Integers ``(count,)``: block row and block column of each block. A place that is listed twice holds the sum.
    shape
        Logical ``(m, n)``; the grid has ``ceil(m/p)`` by ``ceil(n/q)`` places.

    Raises
    ------
    ValueError
        If the counts differ or a place is outside the grid.

    Notes
    -----
    ``count p q`` stored numbers, ``2 count p q`` flops per column. A place that is not listed is exactly zero.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.BlockSparse(np.ones((2, 2, 3)), rows=[0, 1], cols=[1, 0], shape=(4, 6))
    >>> (A @ np.arange(6.0)).tolist()
    [12.0, 12.0, 3.0, 3.0]
    """

    __slots__ = ("blocks", "rows", "cols", "grid", "layers")
    fields = ("blocks", "rows", "cols", "shape")
    blocks: Array
    rows: np.ndarray  # places stay on the host: they index the arrays of every library
    cols: np.ndarray
    grid: tuple[int, int]
    layers: tuple[np.ndarray, ...]

    def __init__(self, blocks: Any, rows: Any, cols: Any, shape: tuple[int, ...]) -> None:
        blocks = arrays.values(blocks, "BlockSparse", 3)
        m, n = check_size((shape[-2], shape[-1]))
        count, p, q = blocks.shape[-3:]
        grid = (ceil_div(m, p) if p else 0, ceil_div(n, q) if q else 0)
        rows = arrays.indices(arrays.on_host(rows), "BlockSparse rows", grid[0])
        cols = arrays.indices(arrays.on_host(cols), "BlockSparse cols", grid[1])
        if rows.shape[0] != count or cols.shape[0] != count:
            raise ValueError(f"BlockSparse: {count} blocks but {rows.shape[0]} rows and {cols.shape[0]} columns")
        self._set_blocks(blocks, rows, cols, (m, n))

    def _set_blocks(self, blocks: Array, rows: np.ndarray, cols: np.ndarray, shape: tuple[int, ...]) -> None:
        m, n = shape[-2:]
        p, q = blocks.shape[-2:]
        grid = (ceil_div(m, p) if p else 0, ceil_div(n, q) if q else 0)
        self._init(
            (*tuple(blocks.shape[:-3]), m, n),
            blocks.dtype,
            arrays.kind(blocks),
            arrays.device(blocks),
            blocks=blocks,
            rows=rows,
            cols=cols,
            grid=grid,
            layers=_layers(rows),
        )

    @classmethod
    def _rebuild(cls, *values: Any) -> BlockSparse:
        operator = object.__new__(cls)
        operator._set_blocks(*values)
        return operator

    def _moved(self, library: str, device: Any) -> Operator:
        return self._rebuild(arrays.convert(self.blocks, library, device), self.rows, self.cols, self.shape)

    def _matmat(self, x: Array) -> Array:
        xp = arrays.namespace(x)
        p, q = self.blocks.shape[-2:]
        k, (block_rows, block_cols) = x.shape[-1], self.grid
        dtype = arrays.promote(self.dtype, x.dtype)
        blocks = arrays.cast(self.blocks, dtype)
        x = arrays.cast(x, dtype)
        lead = tuple(x.shape[:-2])
        if block_cols * q != x.shape[-2]:
            zeros = xp.zeros((*lead, block_cols * q - x.shape[-2], k), dtype=dtype, device=arrays.device(x))
            x = xp.concat((x, zeros), axis=-2)
        x = x.reshape(*lead, block_cols, q, k)
        lead = np.broadcast_shapes(self.batch_shape, lead)
        y = xp.zeros((*lead, block_rows, p, k), dtype=dtype, device=arrays.device(x))
        for layer in self.layers:  # block rows are distinct within a layer
            y[..., self.rows[layer], :, :] += blocks[..., layer, :, :] @ x[..., self.cols[layer], :, :]
        return y.reshape(*lead, block_rows * p, k)[..., : self.shape[-2], :]

    def _transpose(self) -> Operator:
        shape = (self.shape[-1], self.shape[-2])
        return self._rebuild(self.blocks.swapaxes(-1, -2), self.cols, self.rows, shape)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        *,
        block: int | tuple[int, int] | None = None,
        places: tuple[Any, Any] | None = None,
        dtype: DType = float,
        rng: Any = None,
    ) -> BlockSparse:
        """Random blocks at given places, scaled so that ``A x`` has about the variance of ``x``.

        Parameters
        ----------
        shape
            ``(m, n)``.
        block
            Shape of a block, or one number for both; default about the square root of the smaller size.
        places
            ``(rows, cols)`` of the blocks; default a flat block butterfly.
        dtype, rng
            Dtype and seed or generator.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.BlockSparse.random((8, 8), block=2, rng=0).nparams
        48
        """
        m, n = check_size(shape)
        default = max(1, round(min(m, n) ** 0.5))
        p, q = (block or default, block or default) if not isinstance(block, tuple) else block
        grid = (ceil_div(m, p), ceil_div(n, q))
        rows, cols = flat_block_butterfly(grid) if places is None else places
        per_row = len(rows) / max(1, grid[0])
        scale = max(1.0, q * per_row) ** -0.5
        return cls(arrays.random((len(rows), p, q), dtype, rng, scale), rows, cols, (m, n))


def flat_block_butterfly(grid: tuple[int, int], levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Places of the blocks of a flat block butterfly: the union of the supports of butterfly factors on a grid.

    Block row ``i`` holds the blocks ``i`` and ``i xor 2^t`` for ``t < levels``, on a square grid of ``2^J`` blocks that is
    stretched to the shape asked for. Source: Chen et al., "Pixelated Butterfly", ICLR 2022, section 3.

    Parameters
    ----------
    grid
        Numbers of block rows and block columns.
    levels
        Number of butterfly factors; default all ``J``.

    Returns
    -------
    (rows, cols)
        Integer arrays for :class:`BlockSparse`, sorted by row.

    Examples
    --------
    >>> import structmat as sm
    >>> rows, cols = sm.flat_block_butterfly((4, 4), levels=1)
    >>> list(zip(rows.tolist(), cols.tolist()))
    [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
    """
    block_rows = grid[0]
    if min(grid) < 1:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    size = 2 ** math.ceil(math.log2(min(grid)))
    full = int(math.log2(size))
    levels = full if levels is None else levels
    if not 0 <= levels <= full:
        raise ValueError(f"levels: expected between 0 and {full} for grid {grid}, got {levels}")
    near_rows, near_cols = (np.arange(count) * size // count for count in grid)  # the square grid's row of each row
    starts = np.searchsorted(near_cols, np.arange(size + 1))  # its columns are runs of the stretched columns
    steps = np.array([0, *(1 << t for t in range(levels))])
    partners = np.sort(near_rows[:, None] ^ steps, axis=1).ravel()
    lengths = np.diff(starts)[partners]
    rows = np.repeat(np.repeat(np.arange(block_rows), len(steps)), lengths)
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return rows, np.repeat(starts[partners], lengths) + offsets


def _layers(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Indices of the blocks split so that no block row occurs twice in a group."""
    order = np.argsort(rows, kind="stable")
    if not order.size:
        return ()
    starts = np.flatnonzero(np.r_[True, np.diff(rows[order]) != 0])
    place = np.arange(order.size) - np.repeat(starts, np.diff(np.r_[starts, order.size]))
    return tuple(order[place == t] for t in range(int(place.max()) + 1))
