"""Bugs to plant in the kernels: the problem that notices, a text that occurs once in its source, and what replaces it."""

from __future__ import annotations

FIRST_SYNC = "  __syncthreads();\n\n  // Second product."
BUGS: dict[str, tuple[str, str, str]] = {
    "monarch: no barrier between the products": ("monarch 37 rows", FIRST_SYNC, "\n\n  // Second product."),
    "monarch: no barrier before the exchange": (
        "monarch lanes",
        "  __syncthreads();\n\n  // The paper's",
        "\n  // The paper's",
    ),
    "monarch: rows past the end stored": ("monarch 37 rows", "} else if (row < rows) {", "} else {"),
    "monarch: rows past the end stored, lanes": ("monarch lanes", "if (row < rows) __stcg", "__stcg"),
    "monarch: wrong accumulator row": (
        "monarch 37 rows",
        "(m0 + g + 8 * (i / 2)) * LD + d0",
        "(m0 + g + 4 * (i / 2)) * LD + d0",
    ),
    "monarch: wrong accumulator column": (
        "monarch 37 rows",
        "(n0 + 8 * n + 2 * j + i % 2) * PLANE",
        "(n0 + 8 * n + j + 4 * (i % 2)) * PLANE",
    ),
    "monarch: wrong leading dimension": (
        "monarch 37 rows",
        "(m0 + g + 16 * m + 8 * half) * LD",
        "(m0 + g + 16 * m + 8 * half) * DEPTH",
    ),
    "monarch: planes overlap": ("monarch 37 rows", "PLANE = ROWS * LD + 8;", "PLANE = ROWS * LD - 24;"),
    "monarch: stride of x ignored": (
        "monarch 37 rows",
        "x + (high < rows ? high : last) * x_stride",
        "x + (high < rows ? high : last) * (K * P)",
    ),
    "monarch: stride of y ignored": (
        "monarch 37 rows",
        "finish<T, ACTIVATION>(y + row * y_stride",
        "finish<T, ACTIVATION>(y + row * (Q * S)",
    ),
    "monarch: weights of another block": (
        "monarch 37 rows",
        "w1 + (static_cast<long long>(d0) * Q + q0",
        "w1 + (static_cast<long long>(d0) * Q + 0",
    ),
    "monarch: rank ignored": ("monarch rank 2", "STEP % R == 0 ? i / R", "STEP % R == 0 ? i"),
    "monarch: rank ignored in general": ("monarch rank 3", "(d0 + i) / R - d0 / R", "0"),
    "monarch: rest of the contraction dropped": (
        "monarch rank 2",
        "if constexpr (P % 32) part",
        "if constexpr (P % 16) part",
    ),
    "monarch: columns not dealt to the weights": (
        "monarch 37 rows",
        "s0 + column<W>(n, g)) * DEPTH",
        "s0 + 8 * n + g) * DEPTH",
    ),
    "monarch: bias in the other order": ("monarch lanes", "bias[(s + i) * Q + q0 + q]", "bias[(q0 + q) * S + s + i]"),
    "tensor cores: registers swapped": (
        "monarch 37 rows",
        "{low[m].x, high[m].x, low[m].y, high[m].y}, {b.x, b.y});\n        E",
        "{low[m].x, low[m].y, high[m].x, high[m].y}, {b.x, b.y});\n        E",
    ),
    "tensor cores: halves of 32 swapped": (
        "kron 37 rows",
        "{low[m].z, high[m].z, low[m].w, high[m].w}, {b.z, b.w}",
        "{low[m].z, high[m].z, low[m].w, high[m].w}, {b.x, b.y}",
    ),
    "tensor cores: the last 16 twice": (
        "kron one row",
        "const int k = DEPTH - 16 + 4 * j;",
        "const int k = DEPTH - 16 + 2 * j;",
    ),
    "epilogue: bias added after the activation": (
        "kron 37 rows",
        "v[i] += Element<T>::value(word.part[i]);",
        "v[i] = 2 * v[i];",
    ),
    "epilogue: a wrong constant": ("kron 37 rows", "0.70710678f", "0.79788456f"),
    "kron: no barrier between the products": ("kron rectangular", "    __syncwarp();\n    {", "    {"),
    "kron: one sample too many": ("kron 37 rows", "b < rows;", "b <= rows;"),
    "kron: one sample too few": ("kron 37 rows", "b < rows;", "b < rows - 1;"),
    "kron: warps share memory": ("kron rectangular", "+ warp * S * LD", "+ warp % 2 * S * LD"),
    "kron: stride of x ignored": ("kron rectangular", "x + b * x_stride", "x + b * (P * Q)"),
    "kron: stride of y ignored": ("kron rectangular", "y + b * y_stride", "y + b * (R * S)"),
    "kron: wrong leading dimension": (
        "kron rectangular",
        "return z + (s0 + column<W>(n, g)) * LD;",
        "return z + (s0 + column<W>(n, g)) * P;",
    ),
    "kron: wrong accumulator row": (
        "kron rectangular",
        "(r0 + 16 * m + g + 8 * half) * S",
        "(r0 + 16 * m + g + 4 * half) * S",
    ),
    "hadamard: no barrier": ("hadamard 4096 bfloat16", "    __syncthreads();\n", ""),
    "hadamard: rows past the end stored": ("hadamard 64 bfloat16", "if (inside) store", "store"),
    "hadamard: a stage missing": ("hadamard 64 bfloat16", "step < LANES;", "2 * step < LANES;"),
    "hadamard: sign of the lanes": ("hadamard 256 float32", "? -1.f : 1.f", "? 1.f : -1.f"),
    "hadamard: a stage of the warps missing": ("hadamard 8192 float32", "V, V * WARPS>(v)", "V, V * WARPS / 2>(v)"),
    "hadamard: stored where it was loaded": ("hadamard 4096 bfloat16", "between = 32;", "between = THREADS;"),
    "hadamard: rows share memory": ("hadamard 4096 bfloat16", "+ threadIdx.x / THREADS * N", ""),
    "transpose: no barrier before reading": ("transpose 2 bytes", "    __syncthreads();\n#pragma", "#pragma"),
    "transpose: no barrier before writing": (
        "transpose 16 bytes",
        "    __syncthreads();  // the next",
        "    // the next",
    ),
    "transpose: edge of the tile ignored": (
        "transpose 4 bytes",
        "if (l0 + r < lanes && o0 + i < outer)",
        "if (o0 + i < outer)",
    ),
    "transpose: stride of y ignored": ("transpose 4 bytes", "y + b * y_stride", "y + b * heads * outer * lanes"),
}

UNSAFE = {  # what only a sanitizer sees: reads out of bounds, and what it must say
    "x read past its end": (
        "monarch 37 rows",
        "(low < rows ? low : last)",
        "low",
        "address",
        "heap-buffer-overflow",
    ),
    "x read past its end, hadamard": (
        "hadamard 64 bfloat16",
        "if (inside) word",
        "word",
        "address",
        "heap-buffer-overflow",
    ),
    "misaligned access": (
        "kron rectangular",
        "constexpr int LD = P + 8;",
        "constexpr int LD = P + 4;",
        "address",
        "misaligned",
    ),
    "race between the products": ("monarch 37 rows", FIRST_SYNC, "\n\n  // Second product.", "thread", "data race"),
    "race of a warp": ("kron rectangular", "    __syncwarp();\n    {", "    {", "thread", "data race"),
    "race between warps": ("hadamard 4096 bfloat16", "    __syncthreads();\n", "", "thread", "data race"),
    "race from tile to tile": (
        "transpose 16 bytes",
        "    __syncthreads();  // the next",
        "    // the next",
        "thread",
        "data race",
    ),
}
