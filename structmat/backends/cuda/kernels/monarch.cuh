// Two factors of blocks in one pass over device memory, for 16-bit tensor cores:
//   y[b, (q, s)] = act(bias[(q, s)] + sum_{k,r} w2[q, s, k, r] * sum_p w1[k, r, q, p] * x[b, k, p])
// x (rows, K, P) with row stride x_stride; w1 (K, R, Q, P); w2 (Q, S, K, R); y (rows, Q, S) with row stride y_stride, or
// (rows, S, Q) if LANES, which is the paper's Monarch order; bias, if not null, in the order of y.
// A block of threads owns ROWS samples and COLS of the Q blocks. It keeps
//   t[b, q, (k, r)] = sum_p w1[k, r, q, p] x[b, k, p]
// in shared memory, rounded to T, as t[q][b][(k, r)]: both products then run along contiguous indices.
#pragma once
#include "prelude.cuh"

template <int N> struct Length { static const int VALUE = N; };

template <int DEPTH, int ROWS, int COLS> struct MonarchTile {
  static const int LD = DEPTH + 8;              // 16 bytes more: rows start in different banks
  static const int PLANE = ROWS * LD + 8;       // and so do the planes of neighbouring q
  static const int BYTES = 2 * COLS * PLANE;
};

template <class T, int K, int P, int Q, int S, int R, int ROWS, int COLS, int WARPS, int ACTIVATION, bool LANES>
__global__ void __launch_bounds__(32 * WARPS, 16 / WARPS)  // at most 128 registers
monarch(const T* __restrict__ x, const T* __restrict__ w1, const T* __restrict__ w2, const T* __restrict__ bias,
        T* __restrict__ y, int rows, long long x_stride, long long y_stride) {
  constexpr int DEPTH = K * R;  // contracted by the second product
  static_assert(P % 16 == 0 && DEPTH % 16 == 0 && S % 8 == 0, "shapes");
  static_assert(ROWS % 16 == 0 && COLS % 8 == 0 && Q % COLS == 0, "tiles");
  using Tile = MonarchTile<DEPTH, ROWS, COLS>;
  constexpr int LD = Tile::LD, PLANE = Tile::PLANE;
  DYNAMIC_SHARED(memory);
  T* const t = reinterpret_cast<T*>(memory);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  const long long row0 = static_cast<long long>(blockIdx.x / (Q / COLS)) * ROWS;
  const int q0 = blockIdx.x % (Q / COLS) * COLS;
  const long long last = rows - 1;

  // First product. A step makes 16 rows, 8 or 16 q and 4 of (k, r), so that a lane stores 4 neighbours of t at once.
  constexpr int STEP = 4, NT = COLS % 16 == 0 ? 2 : 1;
  for (int u = warp; u < DEPTH / STEP * (ROWS / 16) * (COLS / (8 * NT)); u += WARPS) {
    const int n0 = u % (COLS / (8 * NT)) * (8 * NT), m0 = u / (COLS / (8 * NT)) % (ROWS / 16) * 16;
    const int d0 = u / (COLS / (8 * NT)) / (ROWS / 16) * STEP;
    // Rows past the end repeat the last one: their results are not stored.
    const long long low = row0 + m0 + g, high = low + 8;
    const T* const x_low = x + (low < rows ? low : last) * x_stride + d0 / R * P;
    const T* const x_high = x + (high < rows ? high : last) * x_stride + d0 / R * P;
    const T* const w = w1 + (static_cast<long long>(d0) * Q + q0 + n0 + g) * P;
    float acc[STEP][1][NT][4] = {};
    const auto part = [&](auto length, int p) {  // adds elements p .. p + length of the contraction
#pragma unroll
      for (int i = 0; i < STEP; i++) {  // (k, r) = d0 + i
        const int k = STEP % R == 0 ? i / R : R % STEP == 0 ? 0 : (d0 + i) / R - d0 / R;
        warp_product<T, decltype(length)::VALUE>(
            acc[i], [&](int, int half) { return (half ? x_high : x_low) + k * P + p; },
            [&](int n) { return w + (i * Q + 8 * n) * P + p; });
      }
    };
#pragma unroll 1
    for (int p = 0; p + 32 <= P; p += 32) part(Length<32>(), p);
    if constexpr (P % 32) part(Length<16>(), P - 16);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float v[STEP];
#pragma unroll
        for (int d = 0; d < STEP; d++) v[d] = acc[d][0][n][i];
        store(t + (n0 + 8 * n + 2 * j + i % 2) * PLANE + (m0 + g + 8 * (i / 2)) * LD + d0, rounded<T>(v));
      }
  }
  __syncthreads();

  // Second product. A step makes 16 or 32 rows and up to 32 outputs of one q; all outputs if LANES.
  constexpr int TILES = largest_divisor(S / 8, LANES ? 8 : 4), W = dealt(TILES);
  constexpr int MT = ROWS % 32 == 0 && TILES <= 4 ? 2 : 1;
  static_assert(!LANES || (8 * TILES == S && S <= LD), "in the order of lanes, outputs replace t in shared memory");
  for (int u = warp; u < COLS * (ROWS / (16 * MT)) * (S / (8 * TILES)); u += WARPS) {
    const int s0 = u % (S / (8 * TILES)) * (8 * TILES), m0 = u / (S / (8 * TILES)) % (ROWS / (16 * MT)) * (16 * MT);
    const int q = u / (S / (8 * TILES)) / (ROWS / (16 * MT));
    T* const plane = t + q * PLANE;
    float acc[MT][TILES][4] = {};
    warp_product<T, DEPTH>(
        acc, [&](int m, int half) { return plane + (m0 + g + 16 * m + 8 * half) * LD; },
        [&](int n) { return w2 + (static_cast<long long>(q0 + q) * S + s0 + column<W>(n, g)) * DEPTH; });
    if (LANES) __syncwarp();  // t of these rows has been read by all lanes
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < TILES; n += W) {
          float v[2 * W];
#pragma unroll
          for (int i = 0; i < 2 * W; i++) v[i] = acc[m][n + i / 2][2 * half + i % 2];
          const int r = m0 + 16 * m + g + 8 * half, s = s0 + column<W>(n, 2 * j);
          const long long row = row0 + r;
          if (LANES) {
#pragma unroll
            for (int i = 0; i < 2 * W; i++) {
              const float b = bias ? Element<T>::value(bias[(s + i) * Q + q0 + q]) : 0.f;
              v[i] = activated<ACTIVATION>(v[i] + b);
            }
            store(plane + r * LD + s, rounded<T>(v));
          } else if (row < rows) {
            const long long at = static_cast<long long>(q0 + q) * S + s;
            finish<T, ACTIVATION>(y + row * y_stride + at, bias ? bias + at : nullptr, v);
          }
        }
  }
  if (!LANES) return;
  __syncthreads();

  // The paper's order: neighbours in y are neighbouring q, which lie in different planes.
  for (int u = threadIdx.x; u < ROWS * S * (COLS / 8); u += 32 * WARPS) {
    const int q = u % (COLS / 8) * 8, s = u / (COLS / 8) % S, r = u / (COLS / 8) / S;
    const long long row = row0 + r;
    union { T part[8]; uint4 whole; } word{};
#pragma unroll
    for (int i = 0; i < 8; i++) word.part[i] = t[(q + i) * PLANE + r * LD + s];
    if (row < rows) __stcg(reinterpret_cast<uint4*>(y + row * y_stride + static_cast<long long>(s) * Q + q0 + q), word.whole);
  }
}
