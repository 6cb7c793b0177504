// Sylvester's Hadamard matrix of size N = 2^J applied to rows: y = scale * H x, all sums in float, rounded once.
// A thread holds CHUNKS pieces of V neighbours (one 16-byte access each); WARPS > 1 warps or a part of one share a row.
// The index is (chunk, warp, lane, v). Butterflies over v and chunk run in registers, those over the lanes by shuffles;
// then chunk and warp change places through shared memory, after which the warps' digits are in registers as well, and
// neighbouring lanes still hold neighbouring pieces, so that stores are coalesced.
#pragma once
#include "prelude.cuh"

// Sums and differences of elements whose indices differ by STEP, of COUNT held by a thread.
template <int COUNT, int STEP> __device__ __forceinline__ void butterfly(float (&v)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    if (!(i & STEP)) {
      const float a = v[i], b = v[i + STEP];
      v[i] = a + b;
      v[i + STEP] = a - b;
    }
}

// The same for all digits with FIRST <= step < LAST.
template <int COUNT, int FIRST, int LAST> __device__ __forceinline__ void butterflies(float (&v)[COUNT]) {
  if constexpr (FIRST < LAST) {
    butterfly<COUNT, FIRST>(v);
    butterflies<COUNT, 2 * FIRST, LAST>(v);
  }
}

template <class T, int N, int V, int CHUNKS, int WARPS, int ROWS>
__global__ void __launch_bounds__(N / (V * CHUNKS) * ROWS)
hadamard(const T* __restrict__ x, T* __restrict__ y, float scale, int rows, long long x_stride, long long y_stride) {
  constexpr int THREADS = N / (V * CHUNKS);  // of one row
  constexpr int LANES = THREADS < 32 ? THREADS : 32, COUNT = V * CHUNKS;
  static_assert(THREADS * COUNT == N && THREADS == LANES * WARPS && CHUNKS % WARPS == 0, "shapes");
  typedef typename Word<V * sizeof(T)>::type Piece;
  const int thread = threadIdx.x % THREADS;
  const long long row = static_cast<long long>(blockIdx.x) * ROWS + threadIdx.x / THREADS;
  const bool inside = row < rows;  // threads past the end take part in shuffles and barriers
  float v[COUNT];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    union { Piece whole; T part[V]; } word{};
    if (inside) word.whole = load<Piece>(x + row * x_stride + (i * THREADS + thread) * V);
#pragma unroll
    for (int e = 0; e < V; e++) v[i * V + e] = Element<T>::value(word.part[e]);
  }
  butterflies<COUNT, 1, COUNT>(v);
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) {
    const float sign = threadIdx.x & step ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = sign * v[i] + __shfl_xor_sync(0xffffffffu, v[i], step);
  }
  int first = thread, between = THREADS;  // the piece that v holds at chunk 0, and from chunk to chunk
  if constexpr (WARPS > 1) {
    // Of CHUNKS = (outer, WARPS), the inner digit and the warp are exchanged.
    DYNAMIC_SHARED(memory);
    constexpr int PART = V < 4 ? V : 4;  // floats at a time
    typedef typename Word<4 * PART>::type Part;
    float* const z = reinterpret_cast<float*>(memory) + threadIdx.x / THREADS * N;
    const int warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
#pragma unroll
      for (int e = 0; e < V; e += PART) {
        union { float part[PART]; Part whole; } word;
#pragma unroll
        for (int f = 0; f < PART; f++) word.part[f] = v[i * V + e + f];
        store(z + (e / PART * (N / V) + i * THREADS + thread) * PART, word.whole);
      }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
#pragma unroll
      for (int e = 0; e < V; e += PART) {
        const int piece = (i / WARPS * WARPS + warp) * THREADS + i % WARPS * 32 + lane;
        union { Part whole; float part[PART]; } word;
        word.whole = load<Part>(z + (e / PART * (N / V) + piece) * PART);
#pragma unroll
        for (int f = 0; f < PART; f++) v[i * V + e + f] = word.part[f];
      }
    butterflies<COUNT, V, V * WARPS>(v);
    first = warp * THREADS + lane;
    between = 32;
  }
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int piece = WARPS > 1 ? first + i / WARPS * WARPS * THREADS + i % WARPS * between : first + i * between;
    union { T part[V]; Piece whole; } word{};
#pragma unroll
    for (int e = 0; e < V; e++) word.part[e] = Element<T>::rounded(scale * v[i * V + e]);
    if (inside) store(y + row * y_stride + static_cast<long long>(piece) * V, word.whole);
  }
}
