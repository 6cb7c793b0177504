"""The matrices that projections are compared on."""

from __future__ import annotations

import numpy as np


def bit_reversal(n: int) -> np.ndarray:
    bits = n.bit_length() - 1
    return np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(n)])


def hadamard(n: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def matrices(n: int) -> dict[str, np.ndarray]:
    """Transforms, kernels, inverses and random matrices of a size that is a power of four."""
    i, g = np.arange(n), round(n**0.5)
    x = np.linspace(0, 1, g)
    points = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    squares = ((points[:, None] - points[None]) ** 2).sum(-1)
    second = 2 * np.eye(g) - np.eye(g, k=1) - np.eye(g, k=-1)
    cosine = np.sqrt(2 / n) * np.cos(np.pi * (2 * i[None] + 1) * i[:, None] / (2 * n))
    cosine[0] /= np.sqrt(2)
    fourier = np.exp(-2j * np.pi * (np.outer(i, i) % n) / n)
    rng = np.random.default_rng
    return {
        "Hadamard": hadamard(n),
        "DFT, bit-reversed": np.ascontiguousarray(fourier[:, bit_reversal(n)]),
        "DFT": fourier,
        "DCT-II": cosine,
        "Toeplitz": rng(0).standard_normal(2 * n - 1)[i[:, None] - i[None] + n - 1],
        "circulant": rng(0).standard_normal(n)[(i[:, None] - i[None]) % n],
        "Hilbert": 1 / (i[:, None] + i[None] + 1.0),
        "2-D Gaussian kernel": np.exp(-squares / (2 * 0.1**2)),
        "inverse Laplacian": np.linalg.inv(np.kron(second, np.eye(g)) + np.kron(np.eye(g), second)),
        "Gaussian": rng(1).standard_normal((n, n)),
    }


def of_spectrum(s: np.ndarray, seed: int = 0) -> np.ndarray:
    """``(n, n)`` with the given singular values: cosine transforms of random signs on both sides, ``O(n^2 log n)``."""
    from scipy.fft import dct

    n, rng = len(s), np.random.default_rng(seed)
    signs = rng.choice((-1.0, 1.0), (2, n))
    W = np.diag(s)
    for flip in signs:
        W = dct(W, axis=0, norm="ortho", overwrite_x=True)
        W *= flip[:, None]
        W = np.ascontiguousarray(dct(W, axis=0, norm="ortho", overwrite_x=True).T)
    return W


def relative(W: np.ndarray, found: object) -> float:
    """``||W - A|| / ||W||`` of whatever a library calls an operator."""
    toarray = getattr(found, "toarray", None)
    dense = toarray() if toarray else np.asarray(found)
    return float(np.linalg.norm(W - dense) / np.linalg.norm(W))
