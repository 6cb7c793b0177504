// Rows with two digits of their index exchanged: y[b, h, l, o] = x[b, h, o, l], for elements of any type of one size.
// x (rows, heads, outer, lanes) and y (rows, heads, lanes, outer), contiguous but for the strides of their rows.
// A block of 32 x 8 threads moves a tile of 32 x 32 through shared memory: reads and writes are both coalesced.
#pragma once
#include "prelude.cuh"

template <int BYTES>
__global__ void __launch_bounds__(256)
transpose(const void* __restrict__ from, void* __restrict__ to, int rows, int heads, int outer, int lanes,
          long long x_stride, long long y_stride) {
  typedef typename Word<BYTES>::type T;
  const T* const x = static_cast<const T*>(from);
  T* const y = static_cast<T*>(to);
  DYNAMIC_SHARED(memory);
  T* const tile = reinterpret_cast<T*>(memory);
  constexpr int LD = 33;
  const int across = (lanes + 31) / 32, down = (outer + 31) / 32;
  const int i = threadIdx.x % 32, k = threadIdx.x / 32;
  const long long tiles = static_cast<long long>(rows) * heads * down * across;
  for (long long u = blockIdx.x; u < tiles; u += gridDim.x) {
    const int l0 = static_cast<int>(u % across) * 32, o0 = static_cast<int>(u / across % down) * 32;
    const long long h = u / across / down % heads, b = u / across / down / heads;
    const T* const xb = x + b * x_stride + h * outer * lanes;
    T* const yb = y + b * y_stride + h * outer * lanes;
#pragma unroll
    for (int r = k; r < 32; r += 8)
      if (o0 + r < outer && l0 + i < lanes) tile[r * LD + i] = xb[static_cast<long long>(o0 + r) * lanes + l0 + i];
    __syncthreads();
#pragma unroll
    for (int r = k; r < 32; r += 8)
      if (l0 + r < lanes && o0 + i < outer) yb[static_cast<long long>(l0 + r) * outer + o0 + i] = tile[i * LD + r];
    __syncthreads();  // the next tile overwrites this one
  }
}
