"""Every exact identity that the algebra uses, entered into the rule table.

A rule fires only if it is exact and its result is no larger to store and no costlier to apply than its operands; it
declines with ``NotImplemented``. No rule materialises a structured operand. Unless noted, the identities are standard
(Golub and Van Loan, Matrix Computations, 4th ed., sections 1.1-1.3 and 12.3; Van Loan 2000 for Kronecker products).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from structmat import arrays
from structmat.algebra import Inverse, Product, Scaled, Sum, multiply, scaled_dtype
from structmat.arrays import Array, DType
from structmat.blocks import DirectSum, HorizontalStack, VerticalStack
from structmat.indexing import Slice
from structmat.operator import Operator
from structmat.patterns import AxisOrder, axis_order, compose
from structmat.rules import ADD, INVERSE, KRON, MATMUL, SCALE, fallback, find, rule
from structmat.structures import factor
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_sparse import BlockSparse
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.external import as_operator
from structmat.structures.interpolative import Interpolative
from structmat.structures.interpolative_blocks import InterpolativeBlocks
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch
from structmat.structures.padding import diagonal_parts, is_block_diagonal
from structmat.structures.permutation import Permutation
from structmat.structures.toeplitz import Circulant, Toeplitz
from structmat.structures.transforms import Cosine, Fourier

# ---- what vanishes ------------------------------------------------------------------------------------------------------


@rule(MATMUL, Identity, Operator, cancels=True)
def identity_left(i: Identity, a: Operator) -> Any:
    """I A = A."""
    return _promoted(a, i.dtype)


@rule(MATMUL, Operator, Identity, cancels=True)
def identity_right(a: Operator, i: Identity) -> Any:
    """A I = A."""
    return _promoted(a, i.dtype)


@rule(MATMUL, Zero, Operator, cancels=True)
@rule(MATMUL, Operator, Zero, cancels=True)
def zero_product(a: Operator, b: Operator) -> Any:
    """0 A = A 0 = 0."""
    batch = np.broadcast_shapes(a.batch_shape, b.batch_shape)
    return Zero((*batch, a.shape[-2], b.shape[-1]), arrays.promote(a.dtype, b.dtype))


@rule(MATMUL, Scaled, Operator, cancels=True)
def hoist_left(a: Scaled, b: Operator) -> Any:
    """(c A) B = c (A B)."""
    return (a.operator @ b) * a.scalar


@rule(MATMUL, Operator, Scaled, cancels=True)
def hoist_right(a: Operator, b: Scaled) -> Any:
    """A (c B) = c (A B)."""
    return (a @ b.operator) * b.scalar


@rule(MATMUL, Inverse, Operator, cancels=True)
def inverse_left(a: Inverse, b: Operator) -> Any:
    """A^-1 A = I."""
    return _identity_like(b) if a.operator is b else NotImplemented


@rule(MATMUL, Operator, Inverse, cancels=True)
def inverse_right(a: Operator, b: Inverse) -> Any:
    """A A^-1 = I."""
    return _identity_like(a) if b.operator is a else NotImplemented


@rule(MATMUL, Product, Operator, cancels=True)
@rule(MATMUL, Operator, Product, cancels=True)
def flatten_product(a: Operator, b: Operator) -> Any:
    """(A B) C = A B C, the neighbours at the seam merged."""
    return multiply(a, b)


@rule(ADD, Zero, Operator, cancels=True)
def zero_left(z: Zero, a: Operator) -> Any:
    """0 + A = A."""
    return _promoted(a, z.dtype) if _covers(a, z) else NotImplemented


@rule(ADD, Operator, Zero, cancels=True)
def zero_right(a: Operator, z: Zero) -> Any:
    """A + 0 = A."""
    return _promoted(a, z.dtype) if _covers(a, z) else NotImplemented


@rule(ADD, Operator, Operator, cancels=True)
def twice(a: Operator, b: Operator) -> Any:
    """A + A = 2 A."""
    return a * 2 if a is b else NotImplemented


@rule(ADD, Scaled, Scaled)
def collect(a: Scaled, b: Scaled) -> Any:
    """C A + d A = (c + d) A."""
    return a.operator * (a.scalar + b.scalar) if _one_and_the_same(a.operator, b.operator) else NotImplemented


@rule(ADD, Scaled, Operator)
def collect_left(a: Scaled, b: Operator) -> Any:
    """C A + A = (c + 1) A."""
    return a.operator * (a.scalar + 1) if _one_and_the_same(a.operator, b) else NotImplemented


@rule(ADD, Operator, Scaled)
def collect_right(a: Operator, b: Scaled) -> Any:
    """A + d A = (1 + d) A."""
    return collect_left(b, a)


@rule(KRON, Zero, Operator, cancels=True)
@rule(KRON, Operator, Zero, cancels=True)
def zero_kron(a: Operator, b: Operator) -> Any:
    """0 (x) A = A (x) 0 = 0."""
    batch = np.broadcast_shapes(a.batch_shape, b.batch_shape)
    size = (a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1])
    return Zero((*batch, *size), arrays.promote(a.dtype, b.dtype))


@rule(KRON, Identity, Identity, cancels=True)
def identity_kron(a: Identity, b: Identity) -> Any:
    """I_m (x) I_n = I_mn."""
    return Identity(a.n * b.n, arrays.promote(a.dtype, b.dtype))


@rule(KRON, Scaled, Operator, cancels=True)
def hoist_kron_left(a: Scaled, b: Operator) -> Any:
    """(c A) (x) B = c (A (x) B)."""
    return Kronecker(a.operator, b) * a.scalar


@rule(KRON, Operator, Scaled, cancels=True)
def hoist_kron_right(a: Operator, b: Scaled) -> Any:
    """A (x) (c B) = c (A (x) B)."""
    return Kronecker(a, b.operator) * b.scalar


@fallback(KRON)
def kronecker(a: Operator, b: Operator) -> Operator:
    """The Kronecker product as a structure of its own; nested ones are flattened."""
    return Kronecker(a, b)


@fallback("identity")
def _identity_like(a: Operator) -> Operator:
    """The identity of an operator's size, dtype and batch."""
    n = a.shape[-1]
    if not a.batch_shape:
        return Identity(n, a.dtype)
    xp = arrays.namespace_of(a.kind)
    where = {} if a.kind in (None, "numpy") else {"device": a.device}
    return Diagonal(xp.ones((*a.batch_shape, n), dtype=a.dtype, **where))


@fallback("as_operator")
def _as_operator(x: Any) -> Operator:
    """An array or a SciPy object as an operator."""
    return as_operator(x)


# ---- multiples: the scalar goes into one stored factor, the smallest ----------------------------------------------------


@rule(SCALE, Operator, cancels=True)
def scale_by_one(a: Operator, c: Any) -> Any:
    """1 A = A."""
    exact = arrays.kind(c) is None and not isinstance(c, np.generic)
    return a if exact and not isinstance(c, complex) and c == 1 else NotImplemented


@rule(SCALE, Scaled, cancels=True)
def scale_scaled(a: Scaled, c: Any) -> Any:
    """C (d A) = (c d) A."""
    return a.operator * (c * a.scalar)


@rule(SCALE, Zero)
def scale_zero(a: Zero, c: Any) -> Any:
    """C 0 = 0."""
    return Zero(a.shape, scaled_dtype(a.dtype, c)) if np.isfinite(complex(c)) else NotImplemented


@rule(SCALE, Dense)
def scale_dense(a: Dense, c: Any) -> Any:
    """C A, entrywise."""
    return Dense(c * a.array)


@rule(SCALE, Diagonal)
def scale_diagonal(a: Diagonal, c: Any) -> Any:
    """C diag(v) = diag(c v)."""
    return Diagonal(c * a.values)


@rule(SCALE, Chain)
def scale_chain(a: Chain, c: Any) -> Any:
    """C (K_1 ... K_L) = K_1 ... (c K_i) ... K_L with the smallest K_i."""
    sizes = [p.nparams for p in a.patterns]
    i = sizes.index(min(sizes))
    return a.with_factors((*a.factors[:i], c * a.factors[i], *a.factors[i + 1 :]))


@rule(SCALE, Interpolative)
def scale_interpolative(a: Interpolative, c: Any) -> Any:
    """C (P [I; T] B) = P [I; T] (c B)."""
    return a.with_values(a.coefficients, c * a.basis)


@rule(SCALE, InterpolativeBlocks)
def scale_interpolative_blocks(a: InterpolativeBlocks, c: Any) -> Any:
    """C B [I T] = (c B) [I T], block by block."""
    return a.with_values(a.coefficients, c * a.left)


@rule(SCALE, BlockSparse)
def scale_block_sparse(a: BlockSparse, c: Any) -> Any:
    """C A, blockwise."""
    return BlockSparse(c * a.blocks, a.rows, a.cols, a.shape)


@rule(SCALE, Kronecker)
def scale_kronecker(a: Kronecker, c: Any) -> Any:
    """C (A (x) B) = (c A) (x) B, in the smallest factor that takes a scalar without a wrapper."""
    for i in sorted(range(len(a.factors)), key=lambda i: a.factors[i].nparams):
        scaled = find(SCALE, a.factors[i], c)
        if scaled is not NotImplemented and not isinstance(scaled, Scaled):
            return Kronecker(*a.factors[:i], scaled, *a.factors[i + 1 :])
    return NotImplemented


@rule(SCALE, Toeplitz)
def scale_toeplitz(a: Toeplitz, c: Any) -> Any:
    """C T, column and row."""
    return Toeplitz(c * a.column, c * a.row)


@rule(SCALE, Circulant)
def scale_circulant(a: Circulant, c: Any) -> Any:
    """C C, the column."""
    return Circulant(c * a.column)


# ---- products -----------------------------------------------------------------------------------------------------------


@rule(MATMUL, Diagonal, Diagonal)
def diagonal_diagonal(a: Diagonal, b: Diagonal) -> Any:
    """diag(v) diag(w) = diag(v w)."""
    return Diagonal(a.values * b.values)


@rule(MATMUL, Diagonal, Dense)
def diagonal_dense(a: Diagonal, b: Dense) -> Any:
    """diag(v) A: rows scaled."""
    if not _covers(b, a):
        return NotImplemented
    return Dense(a.values[..., :, None] * b.array)


@rule(MATMUL, Dense, Diagonal)
def dense_diagonal(a: Dense, b: Diagonal) -> Any:
    """A diag(v): columns scaled."""
    if not _covers(a, b):
        return NotImplemented
    return Dense(a.array * b.values[..., None, :])


@rule(MATMUL, Diagonal, Chain)
def diagonal_chain(a: Diagonal, b: Chain) -> Any:
    """diag(v) K_1 ... = (diag(v') K_1) ..., v' = v in the order of K_1's rows, ones in the padding."""
    if not _covers_array(b.factors[0], a):
        return NotImplemented
    v = _end_values(a.values, b.patterns[0].rows, b.out_order.T if b.out_order else None)
    return b.with_factors((factor.scale_rows(b.factors[0], v), *b.factors[1:]))


@rule(MATMUL, Chain, Diagonal)
def chain_diagonal(a: Chain, b: Diagonal) -> Any:
    """... K_L diag(v) = ... (K_L diag(v')), v' = v in the order of K_L's columns, ones in the padding."""
    if not _covers_array(a.factors[-1], b):
        return NotImplemented
    v = _end_values(b.values, a.patterns[-1].cols, a.in_order)
    return a.with_factors((*a.factors[:-1], factor.scale_cols(a.factors[-1], v)))


@rule(MATMUL, Permutation, Permutation)
def permutation_permutation(a: Permutation, b: Permutation) -> Any:
    """P_p P_q = P_{q[p]}."""
    return Permutation._rebuild(b.index[a.index], arrays.promote(a.dtype, b.dtype))


@rule(MATMUL, Permutation, Dense)
def permutation_dense(a: Permutation, b: Dense) -> Any:
    """P_p A: rows gathered."""
    return _promoted(Dense(b.array[..., a.index, :]), a.dtype)


@rule(MATMUL, Dense, Permutation)
def dense_permutation(a: Dense, b: Permutation) -> Any:
    """A P_p: columns gathered by the inverse permutation."""
    return _promoted(Dense(a.array[..., _inverse_index(b)]), b.dtype)


@rule(MATMUL, Permutation, LowRank)
def permutation_low_rank(a: Permutation, b: LowRank) -> Any:
    """P (U V) = (P U) V."""
    return _promoted(LowRank(b.left[..., a.index, :], b.right), a.dtype)


@rule(MATMUL, LowRank, Permutation)
def low_rank_permutation(a: LowRank, b: Permutation) -> Any:
    """(U V) P = U (V P)."""
    return _promoted(LowRank(a.left, a.right[..., _inverse_index(b)]), b.dtype)


@rule(MATMUL, Permutation, Chain)
def permutation_chain(a: Permutation, b: Chain) -> Any:
    """P K_1 ... : a transposition of digits joins the output order."""
    order = _as_order(a)
    if order is None or b.shape[-2] != b.patterns[0].rows:
        return NotImplemented
    fits, out_order = compose(b.out_order, order)
    return _promoted(_reordered(b, out_order, b.in_order), a.dtype) if fits else NotImplemented


@rule(MATMUL, Chain, Permutation)
def chain_permutation(a: Chain, b: Permutation) -> Any:
    """... K_L P: a transposition of digits joins the input order."""
    order = _as_order(b)
    if order is None or a.shape[-1] != a.patterns[-1].cols:
        return NotImplemented
    fits, in_order = compose(order, a.in_order)
    return _promoted(_reordered(a, a.out_order, in_order), b.dtype) if fits else NotImplemented


@rule(MATMUL, Dense, Dense)
def dense_dense(a: Dense, b: Dense) -> Any:
    """A B, multiplied out; a thin inner size gives A B as a low-rank operator instead, which is smaller."""
    (m, k), n = a.shape[-2:], b.shape[-1]
    if m * n > k * (m + n):
        return LowRank(a.array, b.array)
    return Dense(_matmul(a.array, b.array))


@rule(MATMUL, LowRank, LowRank)
def low_rank_low_rank(a: LowRank, b: LowRank) -> Any:
    """(U V) (X Y) = (U (V X)) Y or U ((V X) Y), the core in the side that ends with the smaller rank."""
    core = _matmul(a.right, b.left)
    if a.rank >= b.rank:
        return LowRank(_matmul(a.left, core), b.right)
    return LowRank(a.left, _matmul(core, b.right))


@rule(MATMUL, Chain, LowRank)
@rule(MATMUL, Operator, LowRank)
def operator_low_rank(a: Operator, b: LowRank) -> Any:
    """A (U V) = (A U) V."""
    if not _no_larger((a.shape[-2], b.rank, b.shape[-1]), a, b):
        return NotImplemented
    left = a._matmat(_cast_operand(b.left, a))
    return LowRank(left, b.right)


@rule(MATMUL, LowRank, Chain)
@rule(MATMUL, LowRank, Operator)
def low_rank_operator(a: LowRank, b: Operator) -> Any:
    """(U V) A = U (V A)."""
    if not _no_larger((a.shape[-2], a.rank, b.shape[-1]), a, b):
        return NotImplemented
    right = b.T._rows(_cast_operand(a.right, b))
    return LowRank(a.left, right)


@rule(MATMUL, Chain, Chain)
def chain_chain(a: Chain, b: Chain) -> Any:
    """(K_1 ... K_L) (K'_1 ... K'_M) is a longer chain; the factors at the seam are multiplied out where that costs nothing."""
    if a.shape[-1] != a.patterns[-1].cols or b.shape[-2] != b.patterns[0].rows:
        return NotImplemented
    if len(a.factors) == 1 and a.in_order is None and a.out_order is None and b.out_order is not None:
        moved = _through(a.factors[0], b.out_order)
        fused = factor.fuse(moved[0], b.factors[0]) if moved else None
        if moved and fused is not None:
            return type(b)._rebuild((fused, *b.factors[1:]), (a.shape[-2], b.shape[-1]), moved[1], b.in_order)
    if len(b.factors) == 1 and b.in_order is None and b.out_order is None and a.in_order is not None:
        moved = _through(b.factors[0].swapaxes(-1, -2), a.in_order.T)
        fused = factor.fuse(a.factors[-1], moved[0].swapaxes(-1, -2)) if moved else None
        if moved and fused is not None:
            in_order = moved[1].T if moved[1] else None
            return type(a)._rebuild((*a.factors[:-1], fused), (a.shape[-2], b.shape[-1]), a.out_order, in_order)
    fits, seam = compose(b.out_order, a.in_order)
    if not fits or seam is not None:
        return NotImplemented
    shape = (a.shape[-2], b.shape[-1])
    fused = factor.fuse(a.factors[-1], b.factors[0])
    if fused is None:
        return Chain._rebuild((*a.factors, *b.factors), shape, a.out_order, b.in_order)
    family = type(b) if len(a.factors) == 1 else type(a) if len(b.factors) == 1 else Chain
    return family._rebuild((*a.factors[:-1], fused, *b.factors[1:]), shape, a.out_order, b.in_order)


@rule(MATMUL, Circulant, Circulant)
def circulant_circulant(a: Circulant, b: Circulant) -> Any:
    """C(v) C(w) = C(v * w), the circular convolution of the columns."""
    return Circulant(a._matmat(_cast_operand(b.column, a)[:, None])[:, 0])


@rule(MATMUL, Fourier, Fourier)
def fourier_fourier(a: Fourier, b: Fourier) -> Any:
    """F conj(F) = n I."""
    if a.conjugate == b.conjugate:
        return NotImplemented
    return Scaled(float(a.n), Identity(a.n, arrays.promote(a.dtype, b.dtype)))


@rule(MATMUL, Cosine, Cosine)
def cosine_cosine(a: Cosine, b: Cosine) -> Any:
    """C C^T = I for the orthonormal transform."""
    return Identity(a.n, arrays.promote(a.dtype, b.dtype)) if a.type != b.type else NotImplemented


@rule(MATMUL, Kronecker, Kronecker)
def kronecker_kronecker(a: Kronecker, b: Kronecker) -> Any:
    """(A (x) B) (C (x) D) = (A C) (x) (B D) if the inner sizes agree factor by factor."""
    inner = [f.shape[-1] for f in a.factors], [f.shape[-2] for f in b.factors]
    if inner[0] != inner[1]:
        return NotImplemented
    result = Kronecker(*(f @ g for f, g in zip(a.factors, b.factors, strict=True)))
    return result if result._flops() <= a._flops() + b._flops() else NotImplemented


@rule(MATMUL, DirectSum, DirectSum)
def direct_sum_product(a: DirectSum, b: DirectSum) -> Any:
    """diag(A, B) diag(C, D) = diag(A C, B D) if the partitions agree."""
    if [f.shape[-1] for f in a.blocks] != [f.shape[-2] for f in b.blocks]:
        return NotImplemented
    return DirectSum(*(f @ g for f, g in zip(a.blocks, b.blocks, strict=True)))


@rule(MATMUL, HorizontalStack, VerticalStack)
def stack_product(a: HorizontalStack, b: VerticalStack) -> Any:
    """[A B] [C; D] = A C + B D if the partitions agree."""
    if [f.shape[-1] for f in a.blocks] != [f.shape[-2] for f in b.blocks]:
        return NotImplemented
    first, *others = (f @ g for f, g in zip(a.blocks, b.blocks, strict=True))
    for other in others:
        first = first + other
    return first


# ---- sums ---------------------------------------------------------------------------------------------------------------


@rule(ADD, Diagonal, Diagonal)
def diagonal_sum(a: Diagonal, b: Diagonal) -> Any:
    """diag(v) + diag(w) = diag(v + w)."""
    return Diagonal(a.values + b.values)


@rule(ADD, Identity, Diagonal)
def identity_diagonal(a: Identity, b: Diagonal) -> Any:
    """I + diag(v) = diag(1 + v)."""
    return _promoted(Diagonal(1 + b.values), a.dtype)


@rule(ADD, Diagonal, Identity)
def diagonal_identity(a: Diagonal, b: Identity) -> Any:
    """diag(v) + I = diag(v + 1)."""
    return identity_diagonal(b, a)


@rule(ADD, Diagonal, Scaled)
def diagonal_shift(a: Diagonal, b: Scaled) -> Any:
    """diag(v) + c I = diag(v + c)."""
    if not isinstance(b.operator, Identity):
        return NotImplemented
    return Diagonal(arrays.cast(a.values, arrays.dtype_for(arrays.promote(a.dtype, b.dtype), a.kind)) + b.scalar)


@rule(ADD, Scaled, Diagonal)
def shift_diagonal(a: Scaled, b: Diagonal) -> Any:
    """C I + diag(v) = diag(c + v)."""
    return diagonal_shift(b, a)


@rule(ADD, Identity, Identity)
def identity_identity(a: Identity, b: Identity) -> Any:
    """I + I = 2 I."""
    return Scaled(2, Identity(a.n, arrays.promote(a.dtype, b.dtype)))


@rule(ADD, Dense, Dense)
def dense_sum(a: Dense, b: Dense) -> Any:
    """A + B, entrywise."""
    return Dense(a.array + b.array)


@rule(ADD, LowRank, LowRank)
def low_rank_sum(a: LowRank, b: LowRank) -> Any:
    """U V + X Y = [U X] [V; Y]; ``compress`` brings the rank down again."""
    if a.batch_shape != b.batch_shape:
        return NotImplemented
    return LowRank(_join((a.left, b.left), -1), _join((a.right, b.right), -2))


@rule(ADD, Chain, Chain)
def chain_sum(a: Chain, b: Chain) -> Any:
    """K + K' for single factors of one pattern: blocks are added."""
    if len(a.factors) != 1 or a.patterns != b.patterns or not _same_ends(a, b):
        return NotImplemented
    family = type(a) if type(a) is type(b) else Chain
    return family._rebuild((a.factors[0] + b.factors[0],), a.shape[-2:], a.out_order, a.in_order)


@rule(ADD, Monarch, Monarch)
@rule(ADD, BlockTensorTrain, BlockTensorTrain)
def block_rank_sum(a: Chain, b: Chain) -> Any:
    """Two factors with the same blocks of rank r and s: blocks of rank r + s, as long as that is smaller than dense."""
    if len(a.factors) != 2 or len(b.factors) != 2 or not _same_ends(a, b):
        return NotImplemented
    (p, q), (t, u) = a.patterns, b.patterns
    if (p.a, q.d) != (1, 1):  # a transpose of the normal form
        total = block_rank_sum(a.T, b.T) if (p.d, q.a) == (1, 1) else NotImplemented  # pyright: ignore[reportArgumentType]
        return total if total is NotImplemented else total.T
    if (p.d, q.a) != (t.d, u.a) or a.batch_shape or b.batch_shape or a.nparams + b.nparams > a.shape[-1] * a.shape[-2]:
        return NotImplemented
    k, l = q.a, p.d
    left = _join(tuple(f.reshape(*f.shape[:-1], k, -1) for f in (a.factors[0], b.factors[0])), -1)
    right = _join(tuple(f.reshape(*f.shape[:-2], -1, l * f.shape[-1]) for f in (a.factors[1], b.factors[1])), -2)
    left = left.reshape(*left.shape[:-2], -1)
    right = right.reshape(*right.shape[:-2], -1, q.c)
    return type(a)._rebuild((left, right), a.shape[-2:], a.out_order, a.in_order)


@rule(ADD, Kronecker, Kronecker)
def kronecker_sum(a: Kronecker, b: Kronecker) -> Any:
    """A (x) B + A (x) D = A (x) (B + D) if all factors but one are the same stored arrays."""
    if [f.shape for f in a.factors] != [f.shape for f in b.factors]:
        return NotImplemented
    differing = [i for i, (f, g) in enumerate(zip(a.factors, b.factors, strict=True)) if not _same(f, g)]
    if len(differing) != 1:
        return NotImplemented
    i = differing[0]
    return Kronecker(*a.factors[:i], a.factors[i] + b.factors[i], *a.factors[i + 1 :])


@rule(ADD, Toeplitz, Toeplitz)
def toeplitz_sum(a: Toeplitz, b: Toeplitz) -> Any:
    """Columns and rows are added."""
    return Toeplitz(a.column + b.column, a.row + b.row)


@rule(ADD, Circulant, Circulant)
def circulant_sum(a: Circulant, b: Circulant) -> Any:
    """C(v) + C(w) = C(v + w)."""
    return Circulant(a.column + b.column)


@rule(ADD, DirectSum, DirectSum)
def direct_sum_sum(a: DirectSum, b: DirectSum) -> Any:
    """diag(A, B) + diag(C, D) = diag(A + C, B + D) if the partitions agree."""
    if [f.shape[-2:] for f in a.blocks] != [f.shape[-2:] for f in b.blocks]:
        return NotImplemented
    return DirectSum(*(f + g for f, g in zip(a.blocks, b.blocks, strict=True)))


# ---- inverses -----------------------------------------------------------------------------------------------------------


@rule(INVERSE, Inverse, cancels=True)
def inverse_inverse(a: Inverse) -> Any:
    """(A^-1)^-1 = A."""
    return a.operator


@rule(INVERSE, Identity)
def inverse_identity(a: Identity) -> Any:
    """I^-1 = I."""
    return a


@rule(INVERSE, Zero)
def inverse_zero(a: Zero) -> Any:
    """0 has no inverse."""
    if a.shape[-1]:
        raise np.linalg.LinAlgError(f"inv: the zero matrix of shape {a.shape} is singular")
    return a


@rule(INVERSE, Scaled)
def inverse_scaled(a: Scaled) -> Any:
    """(c A)^-1 = (1/c) A^-1."""
    if not abs(a.scalar) > 0:
        raise np.linalg.LinAlgError(f"inv: {a.scalar} times an operator of shape {a.shape} is singular")
    return a.operator.inv() * (1 / a.scalar)


@rule(INVERSE, Diagonal)
def inverse_diagonal(a: Diagonal) -> Any:
    """diag(v)^-1 = diag(1/v)."""
    if bool((a.values == 0).any()):
        raise np.linalg.LinAlgError(f"inv: a diagonal of shape {a.shape} with a zero entry is singular")
    return Diagonal(1 / a.values)


@rule(INVERSE, Permutation)
def inverse_permutation(a: Permutation) -> Any:
    """P^-1 = P^T."""
    return a.T


@rule(INVERSE, Dense)
def inverse_dense(a: Dense) -> Any:
    """A^-1, by LU."""
    return Dense(factor.inverse(a.array))


@rule(INVERSE, Chain)
def inverse_chain(a: Chain) -> Any:
    """(K_1 ... K_L)^-1 = K_L^-1 ... K_1^-1 for square blocks, the orders exchanged; a narrow waist is singular."""
    waist = min(p.rows for p in (*a.patterns, a.patterns[-1].T))
    if waist < a.shape[-1]:
        raise np.linalg.LinAlgError(f"inv: {a} has rank at most {waist} and is singular")
    if a.padded and is_block_diagonal(a):
        parts = diagonal_parts(a)
        return DirectSum(*(p.inv() for p in parts)) if all(p.is_square for p in parts) else NotImplemented
    if a.padded or any(p.b != p.c for p in a.patterns):
        return NotImplemented
    return a._rebuild(
        tuple(factor.inverse(f) for f in reversed(a.factors)),
        a.shape[-2:],
        a.in_order.T if a.in_order else None,
        a.out_order.T if a.out_order else None,
    )


@rule(INVERSE, Circulant)
def inverse_circulant(a: Circulant) -> Any:
    """C(v)^-1 = F^-1 diag(1 / F v) F."""
    xp = arrays.namespace(a.column)
    spectrum = xp.fft.fft(a.column)
    size = xp.abs(spectrum)
    if not bool((size > xp.finfo(a.dtype).eps * a.shape[0] * xp.max(size)).all()):
        raise np.linalg.LinAlgError(f"inv: {a} is singular to working precision")
    column = xp.fft.ifft(1 / spectrum)
    return Circulant(arrays.cast(column if arrays.is_complex(a.dtype) else xp.real(column), a.dtype))


@rule(INVERSE, Fourier)
def inverse_fourier(a: Fourier) -> Any:
    """F^-1 = conj(F) / n."""
    return Scaled(1 / a.n, a.conj())


@rule(INVERSE, Cosine)
def inverse_cosine(a: Cosine) -> Any:
    """C^-1 = C^T for the orthonormal transform."""
    return a.T


@rule(INVERSE, LowRank)
def inverse_low_rank(a: LowRank) -> Any:
    """(U V)^-1, multiplied out, where the rank exceeds the size; then U V is the larger of the two."""
    return Dense(factor.inverse(_matmul(a.left, a.right))) if a.rank > a.shape[-1] else NotImplemented


@rule(INVERSE, Kronecker)
def inverse_kronecker(a: Kronecker) -> Any:
    """(A (x) B)^-1 = A^-1 (x) B^-1; a square product of rectangular factors is singular."""
    if all(f.is_square for f in a.factors):
        return Kronecker(*(f.inv() for f in a.factors))
    raise np.linalg.LinAlgError(f"inv: {a} has rectangular factors, so its rank is below its size")


@rule(INVERSE, Product)
def inverse_product(a: Product) -> Any:
    """(A B)^-1 = B^-1 A^-1 if every factor is square."""
    if not all(f.is_square for f in a.factors):
        return NotImplemented
    first, *others = (f.inv() for f in reversed(a.factors))
    for other in others:
        first = first @ other
    return first


@rule(INVERSE, DirectSum)
def inverse_direct_sum(a: DirectSum) -> Any:
    """diag(A, B)^-1 = diag(A^-1, B^-1) for square blocks."""
    return DirectSum(*(b.inv() for b in a.blocks)) if all(b.is_square for b in a.blocks) else NotImplemented


@rule(INVERSE, Sum)
def inverse_woodbury(a: Sum) -> Any:
    """(D + U V)^-1 = D^-1 - D^-1 U (I + V D^-1 U)^-1 V D^-1 for D with an inverse in closed form (Woodbury 1950)."""
    if len(a.terms) != 2:
        return NotImplemented
    d, low = a.terms if isinstance(a.terms[1], LowRank) else reversed(a.terms)
    if not isinstance(low, LowRank):
        return NotImplemented
    try:
        inverse = find(INVERSE, d)
    except np.linalg.LinAlgError:  # the sum may have an inverse all the same
        return NotImplemented
    if inverse is NotImplemented or inverse.nparams > d.nparams:
        return NotImplemented
    left, right = inverse._matmat(_cast_operand(low.left, inverse)), inverse.T._rows(_cast_operand(low.right, inverse))
    core = _matmul(low.right, left)
    xp = arrays.namespace(core)
    core = xp.eye(low.rank, dtype=core.dtype, device=arrays.device(core)) + core
    return inverse + LowRank(_matmul(left, factor.inverse(core)) * -1, right)


# ---- blocks and submatrices ---------------------------------------------------------------------------------------------


@rule("block_diag", tuple)
def dense_blocks(blocks: tuple[Operator, ...]) -> Any:
    """Dense blocks of one shape are one block-diagonal array."""
    if not all(type(b) is Dense for b in blocks) or len({b.shape for b in blocks}) != 1 or blocks[0].batch_shape:
        return NotImplemented
    if len({(b.kind, b.device) for b in blocks}) != 1:
        return NotImplemented
    dtype = arrays.promote(*(b.dtype for b in blocks))
    stacked = [arrays.cast(b.array, dtype) for b in blocks]  # pyright: ignore[reportAttributeAccessIssue]
    return BlockDiagonal(arrays.namespace(stacked[0]).stack(stacked))


@rule("slice", Dense)
def slice_dense(a: Dense, places: tuple[Any, Any]) -> Any:
    """Entries gathered."""
    return Dense(a.array[..., places[0], :][..., places[1]])


@rule("slice", LowRank)
def slice_low_rank(a: LowRank, places: tuple[Any, Any]) -> Any:
    """(U V)[rows, cols] = U[rows, :] V[:, cols]."""
    return LowRank(a.left[..., places[0], :], a.right[..., places[1]])


@rule("slice", Zero)
def slice_zero(a: Zero, places: tuple[Any, Any]) -> Any:
    """A part of zero is zero."""
    return Zero((*a.batch_shape, len(places[0]), len(places[1])), a.dtype)


@rule("slice", Slice)
def slice_slice(a: Slice, places: tuple[Any, Any]) -> Any:
    """A[r, c][s, d] = A[r[s], c[d]]."""
    return Slice(a.operator, a.rows[places[0]], a.cols[places[1]])


@rule("slice", Scaled)
def slice_scaled(a: Scaled, places: tuple[Any, Any]) -> Any:
    """(c A)[rows, cols] = c A[rows, cols]."""
    return a.operator[np.ix_(*places)] * a.scalar


@rule("slice", Sum)
def slice_sum(a: Sum, places: tuple[Any, Any]) -> Any:
    """(A + B)[rows, cols] = A[rows, cols] + B[rows, cols]."""
    first, *others = (t[(..., *np.ix_(*places))] for t in a.terms)
    for other in others:
        first = first + other
    return first


# ---- conditions and small steps -------------------------------------------------------------------------------------------


def _promoted(a: Operator, dtype: DType) -> Operator:
    return a.astype(arrays.dtype_for(arrays.promote(a.dtype, dtype), a.kind or _kind_of(a.dtype)))


def _kind_of(dtype: DType) -> str | None:
    return "torch" if arrays.is_torch_dtype(dtype) else None


def _covers(a: Operator, b: Operator) -> bool:
    """Whether the batch of ``a`` already is the common batch of both."""
    return np.broadcast_shapes(a.batch_shape, b.batch_shape) == a.batch_shape


def _covers_array(x: Array, b: Operator) -> bool:
    """Whether the batch of a factor's blocks already is the common batch of both."""
    batch = tuple(x.shape[:-4])
    return np.broadcast_shapes(batch, b.batch_shape) == batch


def _one_and_the_same(a: Operator, b: Operator) -> bool:
    """The same object, or two identities of one dtype."""
    return a is b or (isinstance(a, Identity) and isinstance(b, Identity) and a.dtype == b.dtype)


def _matmul(a: Array, b: Array) -> Array:
    dtype = arrays.promote(a.dtype, b.dtype)
    return arrays.cast(a, dtype) @ arrays.cast(b, dtype)


def _cast_operand(x: Array, a: Operator) -> Array:
    """Torch's ``@`` refuses mixed dtypes: cast what an operator's private kernels are given."""
    return arrays.cast(x, arrays.dtype_for(arrays.promote(x.dtype, a.dtype), arrays.kind(x)))


def _join(parts: tuple[Array, Array], axis: int) -> Array:
    xp = arrays.namespace(parts[0])
    dtype = arrays.promote(*(p.dtype for p in parts))
    batch = np.broadcast_shapes(*(tuple(p.shape[:-2]) for p in parts))
    return xp.concat([xp.broadcast_to(arrays.cast(p, dtype), (*batch, *p.shape[-2:])) for p in parts], axis=axis)


def _no_larger(sizes: tuple[int, int, int], a: Operator, b: Operator) -> bool:
    """Policy for a low-rank result ``(m, r) (r, n)``: no larger to store, no costlier to apply."""
    m, r, n = sizes
    stack = math.prod(np.broadcast_shapes(a.batch_shape, b.batch_shape))
    params = r * (m + n)
    return stack * params <= a.nparams + b.nparams and 2 * params <= a._flops() + b._flops()


def _same(f: Operator, g: Operator) -> bool:
    """Whether two operators are one, judged by the identity of their stored arrays, never by values."""
    if f is g:
        return True
    if type(f) is not type(g) or f.shape != g.shape or f.dtype != g.dtype:
        return False
    if not f.arrays:
        return isinstance(f, (Identity, Zero))
    return isinstance(f, (Dense, Diagonal)) and f.arrays[0] is g.arrays[0]


def _same_ends(a: Chain, b: Chain) -> bool:
    return (a.out_order, a.in_order, a.shape[-2:]) == (b.out_order, b.in_order, b.shape[-2:]) and (
        a.patterns[0].rows,
        a.patterns[-1].cols,
    ) == (b.patterns[0].rows, b.patterns[-1].cols)


def _end_values(v: Array, size: int, order: AxisOrder | None) -> Array:
    """A diagonal in a chain's own order at one end, with ones in the padding."""
    if v.shape[-1] != size:
        xp = arrays.namespace(v)
        ones = xp.ones((*v.shape[:-1], size - v.shape[-1]), dtype=v.dtype, device=arrays.device(v))
        v = xp.concat((v, ones), axis=-1)
    return v if order is None else v[..., order.permutation()]


def _inverse_index(p: Permutation) -> Array:
    """``A P_p`` gathers columns by the inverse of ``p``."""
    return p.T.index  # pyright: ignore[reportAttributeAccessIssue]


def _as_order(p: Permutation) -> AxisOrder | None:
    return axis_order(arrays.convert(p.index, "numpy"))


def _reordered(a: Chain, out_order: AxisOrder | None, in_order: AxisOrder | None) -> Chain:
    family = Chain if isinstance(a, BlockDiagonal) else type(a)  # its blocks no longer lie on the diagonal
    return family._rebuild(a.factors, a.shape[-2:], out_order, in_order)


def _through(blocks: Array, order: AxisOrder) -> tuple[Array, AxisOrder | None] | None:
    """Move a contiguous block-diagonal factor behind an axis order that swaps block index and position.

    ``D order = order' D'`` with ``D`` of pattern ``(a, b, c, 1)``, ``order`` the transposition of ``(c, a)``, ``D'`` of
    pattern ``(1, b, c, a)`` and ``order'`` the transposition of ``(b, a)``.
    """
    a, d, b, c = blocks.shape[-4:]
    if d != 1 or order != AxisOrder((c, a), (1, 0)):
        return None
    return blocks.swapaxes(-4, -3), AxisOrder((b, a), (1, 0))
