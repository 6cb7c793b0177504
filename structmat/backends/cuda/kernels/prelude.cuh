// What the kernels share: element types, the tensor-core product of a warp, the epilogue of an output.
// One source for NVRTC and, behind a shim that defines STRUCTMAT_SHIM and emulates these few device features, for g++.
#pragma once
#ifdef STRUCTMAT_SHIM
#define DYNAMIC_SHARED(name) unsigned char* const name = shim::shared_memory()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// ---- element types ----

template <class T> struct Element;

template <> struct Element<float> {
  static __device__ __forceinline__ float value(float x) { return x; }
  static __device__ __forceinline__ float rounded(float x) { return x; }
};

// Two neighbouring elements in one register, and D += A B with A 16 x 16, B 16 x 8, D 16 x 8 in float.
#ifdef STRUCTMAT_SHIM
template <class T> struct ShimElement {
  static float value(T x) { return shim::to_float(x); }
  static T rounded(float x) { return shim::from_float<T>(x); }
  static unsigned pack(float low, float high) { return shim::pack<T>(low, high); }
  static void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { shim::mma16816<T>(d, a, b); }
};
template <> struct Element<__half> : ShimElement<__half> {};
template <> struct Element<__nv_bfloat16> : ShimElement<__nv_bfloat16> {};
#else
#define MMA16816(type)                                                                         \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                          \
               ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                       \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <> struct Element<__half> {
  static __device__ __forceinline__ float value(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half rounded(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ unsigned pack(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&v);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    MMA16816("f16");
  }
};

template <> struct Element<__nv_bfloat16> {
  static __device__ __forceinline__ float value(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 rounded(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ unsigned pack(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&v);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    MMA16816("bf16");
  }
};
#endif

// ---- loads and stores of BYTES = 4, 8 or 16 at once ----

template <int BYTES> struct Word;
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<16> { typedef uint4 type; };

template <class W> __device__ __forceinline__ W load(const void* from) { return *reinterpret_cast<const W*>(from); }
template <class W> __device__ __forceinline__ void store(void* to, W value) { *reinterpret_cast<W*>(to) = value; }

// 2, 4 or 8 neighbours, rounded once.
template <class T> __device__ __forceinline__ unsigned rounded(const float (&v)[2]) {
  return Element<T>::pack(v[0], v[1]);
}
template <class T> __device__ __forceinline__ uint2 rounded(const float (&v)[4]) {
  return {Element<T>::pack(v[0], v[1]), Element<T>::pack(v[2], v[3])};
}
template <class T> __device__ __forceinline__ uint4 rounded(const float (&v)[8]) {
  return {Element<T>::pack(v[0], v[1]), Element<T>::pack(v[2], v[3]), Element<T>::pack(v[4], v[5]),
          Element<T>::pack(v[6], v[7])};
}

// ---- the product of a warp ----

__host__ __device__ constexpr int largest_divisor(int n, int most) {
  int best = 1;
  for (int i = 1; i <= most; i++) best = n % i == 0 ? i : best;
  return best;
}

// Tiles whose columns are dealt out together: 1, 2 or 4, so that a lane owns 2, 4 or 8 neighbouring outputs of a row.
__host__ __device__ constexpr int dealt(int tiles) { return tiles % 4 == 0 ? 4 : tiles % 2 == 0 ? 2 : 1; }

// The output column that column `c` of tile `n` stands for. A lane holds columns 2j and 2j + 1 of every tile (j = lane % 4);
// dealt like this, the columns it holds in `W` tiles follow each other.
template <int W> __device__ __forceinline__ int column(int n, int c) {
  return n / W * (8 * W) + c / 2 * (2 * W) + n % W * 2 + c % 2;
}

// acc[m][n] += A B^T for 16 MT rows of A and 8 NT rows of B, both contiguous along the contraction index of length DEPTH.
// With g = lane / 4 and j = lane % 4, row_a(m, half) gives the address of row 16m + 8 half + g of A, and row_b(n) that of
// the g-th row of tile n of B: but for the lane's own part, addresses are then constant offsets, which costs no registers.
// The contraction index is permuted alike in A and B: lane j takes elements 8j .. 8j + 7 of every 32, so that fragments are
// loaded 16 bytes at a time and nothing is transposed. Element i of acc[m][n] belongs to row g + 8 (i / 2) and column
// 2j + i % 2 of the tile (PTX ISA, mma.m16n8k16).
template <class T, int DEPTH, int MT, int NT, class RowA, class RowB>
__device__ __forceinline__ void warp_product(float (&acc)[MT][NT][4], RowA row_a, RowB row_b) {
  static_assert(DEPTH % 16 == 0, "the contraction goes by 16");
  const int j = threadIdx.x % 4;
#pragma unroll 2
  for (int k = 0; k + 32 <= DEPTH; k += 32) {
    uint4 low[MT], high[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      low[m] = load<uint4>(row_a(m, 0) + k + 8 * j);
      high[m] = load<uint4>(row_a(m, 1) + k + 8 * j);
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 b = load<uint4>(row_b(n) + k + 8 * j);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        Element<T>::mma(acc[m][n], {low[m].x, high[m].x, low[m].y, high[m].y}, {b.x, b.y});
        Element<T>::mma(acc[m][n], {low[m].z, high[m].z, low[m].w, high[m].w}, {b.z, b.w});
      }
    }
  }
  if (DEPTH % 32) {  // the last 16: lane j takes elements 4j .. 4j + 3
    const int k = DEPTH - 16 + 4 * j;
    uint2 low[MT], high[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      low[m] = load<uint2>(row_a(m, 0) + k);
      high[m] = load<uint2>(row_a(m, 1) + k);
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint2 b = load<uint2>(row_b(n) + k);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        Element<T>::mma(acc[m][n], {low[m].x, high[m].x, low[m].y, high[m].y}, {b.x, b.y});
      }
    }
  }
}

// ---- the epilogue ----

enum Activation { NONE, RELU, GELU, GELU_TANH, SILU };

template <int ACTIVATION> __device__ __forceinline__ float activated(float x) {
  if (ACTIVATION == RELU) return x > 0.f || x != x ? x : 0.f;  // NaN stays NaN
  if (ACTIVATION == GELU) return 0.5f * x * (1.f + erff(x * 0.70710678f));
  if (ACTIVATION == GELU_TANH) return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
  if (ACTIVATION == SILU) return x / (1.f + expf(-x));
  return x;
}

// to[i] = act(v[i] + bias[i]), in float, rounded once; bias may be null.
template <class T, int ACTIVATION, int COUNT>
__device__ __forceinline__ void finish(T* to, const T* bias, float (&v)[COUNT]) {
  if (bias) {
    union { typename Word<2 * COUNT>::type whole; T part[COUNT]; } word{load<typename Word<2 * COUNT>::type>(bias)};
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] += Element<T>::value(word.part[i]);
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) v[i] = activated<ACTIVATION>(v[i]);
  const auto word = rounded<T>(v);
  __stcg(reinterpret_cast<decltype(rounded<T>(v))*>(to), word);  // a plain store is split into words by the compiler
}
