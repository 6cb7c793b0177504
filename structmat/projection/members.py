"""Members: architectures that one spectrum covers for all ranks, each an arrangement of a matrix in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.algebra import Sum
from structmat.arrays import Array
from structmat.operator import Operator
from structmat.patterns import AxisOrder, Pattern, near_square
from structmat.projection.cost import Stage, chain_stages, kronecker_stages, low_rank_stages
from structmat.projection.interpolative import interpolate
from structmat.projection.kronecker import Shapes, divisors, parameters, unfold
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.chain import Chain, ceil_div
from structmat.structures.dense import Dense
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch, two_factor_patterns


class LowRankMember(NamedTuple):
    """The matrix as one block; ``gauge`` 1 for the interpolative form, which stores ``r**2`` numbers less."""

    shape: tuple[int, int]
    gauge: int = 0

    family = LowRank

    @property
    def step(self) -> int:
        """Parameters for each rank, the gauge aside."""
        return sum(self.shape)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of blocks, their rows and their columns."""
        return 1, *self.shape

    def arrange(self, target: np.ndarray) -> np.ndarray:
        """The blocks ``(1, 1, m, n)``."""
        return target[None, None]

    def build(self, x: np.ndarray, y: np.ndarray) -> Operator:
        """The operator of factors ``(1, 1, m, r)`` and ``(1, 1, r, n)``."""
        x, y = x[0, 0], y[0, 0]
        if not self.gauge:
            return LowRank(*balanced(x, y))
        ones = np.ones(x.shape[-1])
        if x.shape[0] <= y.shape[-1]:  # the side that is selected from has to be orthonormal
            q, r = np.linalg.qr(x)
            return interpolate(q, ones, r @ y, "rows")
        q, r = np.linalg.qr(y.conj().T)
        return interpolate(x @ r.conj().T, ones, q.conj().T, "columns")

    def multiplied_out(self, operator: Any) -> Dense:
        """The dense matrix of the stored factors, in double precision, by one product."""
        return Dense(_exact(operator.left) @ _exact(operator.right))

    def stages(self, rung: int) -> list[Stage]:
        """What applying it takes."""
        return low_rank_stages(self.shape, rung, self.gauge)

    def options(self, rung: int) -> dict[str, Any]:
        """What gives it to ``project``."""
        return {"rank": rung, **({"interpolative": True} if self.gauge else {})}

    def label(self, rung: int) -> str:
        """Its name in a table."""
        return f"LowRank, rank {rung}" + (", interpolative" if self.gauge else "")


class TwoFactorMember(NamedTuple):
    """``counts = (l, k)`` blocks of one rank; a class of rows or columns is contiguous, or has those of equal residue."""

    shape: tuple[int, int]
    counts: tuple[int, int]
    family: type[Chain]
    rows: bool  # whether classes of rows are contiguous
    columns: bool  # whether classes of columns are contiguous
    interpolative: bool = False  # stores r**2 numbers less in every block

    @property
    def gauge(self) -> int:
        """Identity blocks of the interpolative form."""
        return math.prod(self.counts) if self.interpolative else 0

    @property
    def patterns(self) -> list[Pattern]:
        """Patterns of the two factors at rank 1."""
        return [Pattern(*p) for p in two_factor_patterns(self.shape, self.counts, 1)]

    @staticmethod
    def trivial(classes: int, size: int) -> bool:
        """Whether classes of this number and size are runs and strided at once."""
        return 1 in (classes, size)

    @property
    def layout(self) -> tuple[str, str]:
        """The classes of rows and columns by name."""
        names = {True: "contiguous", False: "strided"}
        return names[self.rows], names[self.columns]

    @property
    def step(self) -> int:
        """Parameters for each rank."""
        return sum(p.nparams for p in self.patterns)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of blocks, their rows and their columns."""
        (m, n), (l, k) = self.shape, self.counts
        return l * k, ceil_div(m, l), ceil_div(n, k)

    def arrange(self, target: np.ndarray) -> np.ndarray:
        """The blocks ``(k, l, s, p)``, a view unless zeros are appended."""
        (m, n), (l, k), (_, s, p) = self.shape, self.counts, self.sizes
        if (m, n) != (l * s, k * p):
            target = np.pad(target, [(0, l * s - m), (0, k * p - n)])
        first, second = (l, s) if self.rows else (s, l), (k, p) if self.columns else (p, k)
        tensor = target.reshape(*first, *second)
        tensor = tensor if self.rows else tensor.swapaxes(0, 1)
        tensor = tensor if self.columns else tensor.swapaxes(2, 3)
        return tensor.transpose(2, 0, 1, 3)

    def build(self, x: np.ndarray, y: np.ndarray) -> Operator:
        """The operator of factors ``(k, l, s, r)`` and ``(k, l, r, p)``."""
        x, y = balanced(x, y)
        (k, l, s, r), p = x.shape, y.shape[-1]
        left = x.transpose(1, 2, 0, 3).reshape(1, l, s, k * r)
        right = y.transpose(0, 2, 1, 3).reshape(k, 1, r * l, p)
        out_order = AxisOrder((s, l), (1, 0)) if self.rows and not self.trivial(l, s) else None
        in_order = None if self.columns else AxisOrder((p, k), (1, 0))
        if self.family is BlockTensorTrain:
            return BlockTensorTrain([left, right], self.shape)
        return Monarch._rebuild((left, right), self.shape, out_order, in_order)

    def multiplied_out(self, operator: Any) -> Dense:
        """The dense matrix of the stored factors and orders, in double precision, block by block.

        The chain applied to the identity would hold ``n k l r`` numbers on the way.
        """
        left, right = (_exact(f) for f in operator.factors)
        (_, l, s, kr), (k, _, rl, p) = left.shape, right.shape
        x = left.reshape(l, s, k, kr // k).transpose(2, 0, 1, 3)
        y = right.reshape(k, rl // l, l, p).transpose(0, 2, 1, 3)
        whole = (x @ y).transpose(2, 1, 0, 3).reshape(s * l, k * p)
        if operator.out_order is not None:
            whole = whole[operator.out_order.permutation()]
        if operator.in_order is not None:
            whole = whole[:, operator.in_order.T.permutation()]
        m, n = operator.shape
        return Dense(whole[:m, :n])

    def stages(self, rung: int) -> list[Stage]:
        """What applying it takes."""
        left, right = chain_stages(Pattern(*p) for p in two_factor_patterns(self.shape, self.counts, rung))
        saved = self.gauge * rung**2
        return [left, Stage(right.flops - 2.0 * saved, right.values - saved, right.width)]

    def options(self, rung: int) -> dict[str, Any]:
        """What gives it to ``project``."""
        own = self.family is BlockTensorTrain or self.layout == ("strided", "contiguous")
        form = {"interpolative": True} if self.interpolative else {}
        return {"blocks": self.counts, "rank": rung, **({} if own else {"layout": self.layout}), **form}

    def label(self, rung: int) -> str:
        """Its name in a table."""
        (l, k), name = self.counts, self.family.__name__
        layout = self.options(rung).get("layout")
        order = "" if layout is None else f", {layout[0]} rows, {layout[1]} columns"
        return f"{name}, {l}x{k} blocks, rank {rung}{order}" + (", interpolative" if self.interpolative else "")


class KroneckerMember(NamedTuple):
    """Sums of Kronecker products of two factors of these shapes: the rearranged matrix is one block."""

    shapes: Shapes

    family = Kronecker
    gauge = 0

    @property
    def step(self) -> int:
        """Parameters of one term."""
        return parameters(self.shapes)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of blocks, their rows and their columns."""
        return 1, math.prod(self.shapes[0]), math.prod(self.shapes[1])

    def arrange(self, target: np.ndarray) -> np.ndarray:
        """The rearranged matrix ``(1, 1, m1 n1, m2 n2)``."""
        return unfold(target, self.shapes)[None, None]

    def build(self, x: np.ndarray, y: np.ndarray) -> Operator:
        """The operator of factors ``(1, 1, m1 n1, terms)`` and ``(1, 1, terms, m2 n2)``."""
        x, y = balanced(x[0, 0], y[0, 0])
        columns = [np.ascontiguousarray(c).reshape(self.shapes[0]) for c in x.T]
        terms = [Kronecker(c, row.reshape(self.shapes[1])) for c, row in zip(columns, y, strict=True)]
        return terms[0] if len(terms) == 1 else Sum(*terms)

    def stages(self, rung: int) -> list[Stage]:
        """What applying it takes."""
        return kronecker_stages(self.shapes, rung)

    def options(self, rung: int) -> dict[str, Any]:
        """What gives it to ``project``."""
        return {"shapes": list(self.shapes), "terms": rung}

    def label(self, rung: int) -> str:
        """Its name in a table."""
        name = " (x) ".join(f"{a}x{b}" for a, b in self.shapes)
        return f"Kronecker, {name}" + (f", {rung} terms" if rung > 1 else "")

    def multiplied_out(self, operator: Any) -> Dense:
        """The dense matrix of the stored factors, in double precision, by one product instead of a sum."""
        terms: tuple[Any, ...] = operator.terms if isinstance(operator, Sum) else (operator,)
        x, y = (np.stack([_exact(t.factors[i].array).ravel() for t in terms]) for i in (0, 1))
        (m1, n1), (m2, n2) = self.shapes
        folded = (x.T @ y).reshape(m1, n1, m2, n2).transpose(0, 2, 1, 3)
        return Dense(folded.reshape(m1 * m2, n1 * n2))


def _exact(array: Array) -> np.ndarray:
    """Stored values in double precision, NumPy's."""
    host = array.detach().cpu() if arrays.kind(array) == "torch" else array
    values = np.complex128 if arrays.is_complex(host.dtype) else np.float64
    return arrays.convert(arrays.cast(host, arrays.dtype_for(np.dtype(values), arrays.kind(host))), "numpy")


Member = LowRankMember | TwoFactorMember | KroneckerMember


def balanced(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``(..., b, r)`` and ``(..., r, c)`` of the same product, of equal norms rank by rank."""
    before, after = np.linalg.norm(x, axis=-2), np.linalg.norm(y, axis=-1)
    alive = (before > 0.0) & (after > 0.0)
    scale = np.sqrt(np.divide(after, before, out=np.zeros_like(after), where=alive))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0.0)
    return x * scale[..., None, :], y * inverse[..., None]


def two_factor_members(shape: tuple[int, int], families: Iterable[type[Operator]]) -> list[TwoFactorMember]:
    """Monarch and BlockTensorTrain members of every pair of block counts, in all four orders of rows and columns.

    Contiguous rows and columns are Block Tensor-Train, strided rows and contiguous columns Monarch, and the other two Monarch
    with another order (the DFT is exact in one of them). Orders that coincide, as for one class of rows, are listed once.
    """
    families = set(families)
    members = []
    for l in block_counts(shape[0]):
        for k in block_counts(shape[1]):
            if l * k == 1:
                continue
            row_orders = (True,) if TwoFactorMember.trivial(l, ceil_div(shape[0], l)) else (True, False)
            column_orders = (True,) if TwoFactorMember.trivial(k, ceil_div(shape[1], k)) else (True, False)
            for rows in row_orders:
                for columns in column_orders:
                    plain = rows and columns
                    trivial = plain and len(row_orders) == 1  # both families hold it
                    if BlockTensorTrain in families and plain:
                        members.append(TwoFactorMember(shape, (l, k), BlockTensorTrain, rows, columns))
                    elif Monarch in families and (trivial or not plain):
                        members.append(TwoFactorMember(shape, (l, k), Monarch, rows, columns))
    return members


def block_counts(size: int) -> list[int]:
    """Numbers of blocks that are tried: divisors and powers of two; of large sizes those near powers of two and the root."""
    powers = [2**i for i in range(size.bit_length()) if 2**i <= size]
    if size <= 64:
        return sorted({*divisors(size), *powers})
    exact = divisors(size)
    near = [min(exact, key=lambda d: (abs(math.log2(d / power)), d)) for power in powers]
    counts = {d if 2 * abs(math.log2(d / power)) <= 1 else power for d, power in zip(near, powers, strict=True)}
    return sorted({*counts, *(near_square(size) if size <= 4 * near_square(size)[0] ** 2 else ())})


def kronecker_members(shape: tuple[int, int], most: int) -> list[KroneckerMember]:
    """Pairs of factor shapes, the most balanced first, at most ``most``: factors alike in aspect and in size."""
    m, n = shape
    splits: Sequence[Shapes] = [((a, b), (m // a, n // b)) for a in divisors(m) for b in divisors(n)]
    splits = [s for s in splits if min(math.prod(f) for f in s) > 1]
    return [KroneckerMember(s) for s in sorted(splits, key=_imbalance)[:most]]


def _imbalance(shapes: Shapes) -> tuple[float, Shapes]:
    (m1, n1), (m2, n2) = shapes
    aspect = abs(math.log(m1 / n1) - math.log(m2 / n2)) / 2 + min(abs(math.log(m1 / n1)), abs(math.log(m2 / n2)))
    return round(aspect + abs(math.log(m1 * n1 / (m2 * n2))) / 4, 9), shapes
