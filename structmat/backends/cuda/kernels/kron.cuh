// A Kronecker product in one pass over device memory, for 16-bit tensor cores:
//   y[b, (r, s)] = act(bias[(r, s)] + sum_p a[r, p] * sum_q c[s, q] * x[b, (p, q)])
// a (R, P), c (S, Q), x (rows, P, Q) with row stride x_stride, y (rows, R, S) with row stride y_stride; bias (R, S) or null.
// A warp takes one sample after the other (persistent grid); z = c x_b^T, rounded to T, stays in its shared memory as
// z[s][p], so that both products run along contiguous indices. The factors come from the L1 cache.
#pragma once
#include "prelude.cuh"

__host__ __device__ constexpr int kron_bytes(int p, int s, int warps) { return 2 * warps * s * (p + 8); }

template <class T, int R, int P, int S, int Q, int WARPS, int ACTIVATION>
__global__ void __launch_bounds__(32 * WARPS, kron_bytes(P, S, WARPS) <= 112 * 1024 ? 16 / WARPS : 1)  // two: 128 registers
kron(const T* __restrict__ x, const T* __restrict__ a, const T* __restrict__ c, const T* __restrict__ bias,
     T* __restrict__ y, int rows, long long x_stride, long long y_stride) {
  static_assert(R % 16 == 0 && P % 16 == 0 && S % 16 == 0 && Q % 16 == 0, "shapes");
  constexpr int LD = P + 8;  // 16 bytes more: rows start in different banks
  DYNAMIC_SHARED(memory);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  T* const z = reinterpret_cast<T*>(memory) + warp * S * LD;

  const long long stride = static_cast<long long>(gridDim.x) * WARPS;
  for (long long b = static_cast<long long>(blockIdx.x) * WARPS + warp; b < rows; b += stride) {
    {
      const T* const xb = x + b * x_stride;
      constexpr int MT = largest_divisor(S / 16, 2), NT = largest_divisor(P / 8, 4), W = dealt(NT);
#pragma unroll 1
      for (int u = 0; u < P / (8 * NT) * (S / (16 * MT)); u++) {
        const int s0 = u % (S / (16 * MT)) * (16 * MT), p0 = u / (S / (16 * MT)) * (8 * NT);
        float acc[MT][NT][4] = {};
        warp_product<T, Q>(
            acc, [&](int m, int half) { return c + (s0 + g + 16 * m + 8 * half) * Q; },
            [&](int n) { return xb + (p0 + column<W>(n, g)) * Q; });
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < NT; n += W) {
              float v[2 * W];
#pragma unroll
              for (int i = 0; i < 2 * W; i++) v[i] = acc[m][n + i / 2][2 * half + i % 2];
              store(z + (s0 + 16 * m + g + 8 * half) * LD + p0 + column<W>(n, 2 * j), rounded<T>(v));
            }
      }
    }
    __syncwarp();
    {
      T* const yb = y + b * y_stride;
      constexpr int MT = largest_divisor(R / 16, 2), NT = largest_divisor(S / 8, 4), W = dealt(NT);
#pragma unroll 1
      for (int u = 0; u < R / (16 * MT) * (S / (8 * NT)); u++) {
        const int s0 = u % (S / (8 * NT)) * (8 * NT), r0 = u / (S / (8 * NT)) * (16 * MT);
        float acc[MT][NT][4] = {};
        warp_product<T, P>(
            acc, [&](int m, int half) { return a + (r0 + g + 16 * m + 8 * half) * P; },
            [&](int n) { return z + (s0 + column<W>(n, g)) * LD; });
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < NT; n += W) {
              float v[2 * W];
#pragma unroll
              for (int i = 0; i < 2 * W; i++) v[i] = acc[m][n + i / 2][2 * half + i % 2];
              const int at = (r0 + 16 * m + g + 8 * half) * S + s0 + column<W>(n, 2 * j);
              finish<T, ACTIVATION>(yb + at, bias ? bias + at : nullptr, v);
            }
      }
    }
    __syncwarp();  // the next sample overwrites z
  }
}
