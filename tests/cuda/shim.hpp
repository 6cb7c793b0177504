// Runs CUDA C++ kernels on a CPU, for tests: include this, then the kernel's source, then call shim::launch.
//
// Blocks run one after the other. The threads of a block are fibers, which change places at barriers alone, under a
// schedule that a seed chooses; with SHIM_THREADS they are threads of the operating system, for the sanitizers. Dynamic
// shared memory is filled with 0xFF, a NaN in every floating type, before every block, and has a guard zone behind it.
// Tensor cores and shuffles are emulated: every lane puts its registers down, all lanes meet, every lane picks up.
//
// Stricter than a device: a thread that has returned never counts as arrived at a barrier, and lanes that meet in different
// operations are an error. Not modelled: speed, races between blocks, memory weaker than sequentially consistent.
#pragma once
#define STRUCTMAT_SHIM 1
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#ifdef SHIM_THREADS
#include <barrier>
#include <memory>
#include <thread>
#include <vector>
#else
#include <ucontext.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

// ---- CUDA's types ----

struct uint3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };

namespace shim {

inline float to_float(__half x) {
  _Float16 v;
  memcpy(&v, &x, 2);
  return static_cast<float>(v);
}
inline float to_float(__nv_bfloat16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float v;
  memcpy(&v, &u, 4);
  return v;
}

template <class T> T from_float(float x);  // to nearest, ties to even
template <> inline __half from_float<__half>(float x) {
  const _Float16 v = static_cast<_Float16>(x);
  __half h;
  memcpy(&h, &v, 2);
  return h;
}
template <> inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}

template <class T> unsigned pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;
}
template <class T> float part(unsigned word, int i) { return to_float(T{static_cast<uint16_t>(word >> 16 * i)}); }

// ---- a block ----

enum Error { OK, DEADLOCK, OVERRUN, DIVERGED };
enum Operation { SYNCWARP, MMA, SHUFFLE };
static const char* const MESSAGES[] = {
    "", "deadlock: some threads wait at a barrier that others do not reach",
    "shared memory written past the end of what the launch asked for", "lanes of a warp met in different operations"};

const unsigned MOST_THREADS = 1024, GUARD = 4096;
struct Meeting {  // what lanes put down, twice: a lane is never more than one meeting ahead
  int operation[32];
  float a[16][16], b[8][16], lane[32];
};
static Meeting meetings[MOST_THREADS / 32][2];
static unsigned char* memory;  // dynamic shared memory
static unsigned shared_bytes;
static volatile int error;

static unsigned char* shared_memory() { return memory; }

static void poison() {
#ifdef SHIM_THREADS
  memset(memory, 0xFF, shared_bytes);
#else
  memset(memory, 0xFF, shared_bytes + GUARD);
#endif
}

static void check_guard() {
#ifndef SHIM_THREADS
  for (unsigned i = shared_bytes; i < shared_bytes + GUARD; i++)
    if (memory[i] != 0xFF) error = OVERRUN;
#endif
}

}  // namespace shim

#ifdef SHIM_THREADS
static thread_local uint3 threadIdx, blockIdx;
#else
static uint3 threadIdx, blockIdx;
#endif
static uint3 blockDim, gridDim;

namespace shim {

#ifdef SHIM_THREADS

// ---- threads of the operating system ----

static thread_local unsigned parity;
static std::unique_ptr<std::barrier<>> block_barrier;
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;

static void wait_block() { block_barrier->arrive_and_wait(); }
static void wait_warp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }
static unsigned next_parity() { return parity ^= 1; }

template <class Body> int launch(uint3 grid, unsigned threads, unsigned shared, unsigned, Body body) {
  gridDim = grid, blockDim = {threads, 1, 1}, shared_bytes = shared, error = OK;
  memory = static_cast<unsigned char*>(malloc(shared ? shared : 1));  // exactly: AddressSanitizer watches its end
  block_barrier = std::make_unique<std::barrier<>>(threads);
  warp_barriers.clear();
  for (unsigned w = 0; w < threads; w += 32)
    warp_barriers.push_back(std::make_unique<std::barrier<>>(threads - w < 32 ? threads - w : 32));
  std::vector<std::thread> all;
  for (unsigned t = 0; t < threads; t++)
    all.emplace_back([=] {
      threadIdx = {t, 0, 0};
      for (unsigned b = 0; b < grid.x; b++) {
        blockIdx = {b, 0, 0};
        if (t == 0) poison();
        wait_block();
        body();
        wait_block();
      }
    });
  for (auto& thread : all) thread.join();
  free(memory);
  return error;
}

#else

// ---- fibers ----

enum State { READY, AT_BLOCK, AT_WARP, DONE };
const size_t STACK = 96 << 10;
struct Fiber {
  jmp_buf here;
  ucontext_t entry;
  State state;
  bool started;
  unsigned parity;
};
static Fiber* fibers;
static unsigned current;
static jmp_buf scheduler;
static void (*run_body)();

// The first entry goes through a context; after that, jumps: they spare the system calls of swapcontext.
__attribute__((noinline)) static void resume(unsigned t) {
  Fiber& fiber = fibers[current = t];
  threadIdx = {t, 0, 0};
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

__attribute__((noinline)) static void leave(State state) {
  fibers[current].state = state;
  if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

static void enter() {
  run_body();
  fibers[current].state = DONE;
  _longjmp(scheduler, 1);
}

static void wait_block() { leave(AT_BLOCK); }
static void wait_warp() { leave(AT_WARP); }
static unsigned next_parity() { return fibers[current].parity ^= 1; }

struct Schedule {
  unsigned threads, seed, state, warp = 0;

  unsigned random(unsigned below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
  }
  unsigned warps() const { return (threads + 31) / 32; }
  unsigned end(unsigned w) const { return 32 * w + 32 < threads ? 32 * w + 32 : threads; }

  bool ready(unsigned w) const {
    for (unsigned t = 32 * w; t < end(w); t++)
      if (fibers[t].state == READY) return true;
    return false;
  }

  void run(unsigned w) {
    const unsigned first = 32 * w, count = end(w) - first, offset = seed ? random(count) : 0;
    for (unsigned i = 0; i < count; i++) {
      const unsigned t = first + (offset + i) % count;
      if (fibers[t].state == READY) resume(t);
    }
    for (unsigned t = first; t < end(w); t++)
      if (fibers[t].state != AT_WARP) return;
    for (unsigned t = first; t < end(w); t++) fibers[t].state = READY;
  }

  // One block. Seed 0: all warps in turn, each to its next barrier. Else: a random warp, as far as it gets.
  int block() {
    for (;;) {
      bool ran = false;
      if (seed) {
        const unsigned from = random(warps());
        for (unsigned i = 0; i < warps() && !ready(warp); i++) warp = (from + i) % warps();
        if ((ran = ready(warp))) run(warp);
      } else {
        for (unsigned w = 0; w < warps(); w++)
          if (ready(w)) run(w), ran = true;
      }
      if (error) return error;
      if (ran) continue;
      unsigned done = 0, waiting = 0;
      for (unsigned t = 0; t < threads; t++) done += fibers[t].state == DONE, waiting += fibers[t].state == AT_BLOCK;
      if (done == threads) return OK;
      if (waiting != threads) return DEADLOCK;
      for (unsigned t = 0; t < threads; t++) fibers[t].state = READY;
    }
  }
};

template <class Body> int launch(uint3 grid, unsigned threads, unsigned shared, unsigned seed, Body body) {
  static Body* the_body;
  the_body = &body;
  run_body = [] { (*the_body)(); };
  gridDim = grid, blockDim = {threads, 1, 1}, shared_bytes = shared, error = OK;
  memory = static_cast<unsigned char*>(aligned_alloc(64, (shared + GUARD + 63) / 64 * 64));
  fibers = new Fiber[threads];
  char* const stacks = static_cast<char*>(malloc(STACK * threads));
  Schedule schedule{threads, seed, seed * 2654435761u + 1};
  for (unsigned i = 0; i < grid.x && !error; i++) {
    blockIdx = {seed % 2 ? grid.x - 1 - i : i, 0, 0};
    poison();
    for (unsigned t = 0; t < threads; t++) {
      Fiber& fiber = fibers[t];
      getcontext(&fiber.entry);
      fiber.entry.uc_stack.ss_sp = stacks + STACK * t;
      fiber.entry.uc_stack.ss_size = STACK;
      fiber.entry.uc_link = nullptr;
      makecontext(&fiber.entry, enter, 0);
      fiber.state = READY, fiber.started = false, fiber.parity = 0;
    }
    if (const int found = schedule.block()) error = found;
    check_guard();
  }
  free(stacks);
  delete[] fibers;
  free(memory);
  return error;
}

#endif

// ---- what a warp does together ----

static Meeting& meet_at(Operation operation, unsigned at) {
  Meeting& m = meetings[threadIdx.x / 32][at];
  m.operation[threadIdx.x % 32] = operation;
  return m;
}
static void meet(Meeting& m) {
  wait_warp();
  const unsigned lane = threadIdx.x % 32, in_warp = blockDim.x - threadIdx.x / 32 * 32 < 32 ? blockDim.x % 32 : 32;
  if (m.operation[lane] != m.operation[(lane + 1) % in_warp]) error = DIVERGED;
}

// mma.sync.aligned.m16n8k16.row.col with the fragments of the PTX ISA. Lane 4 g + j holds, of A, rows g + 8 (i % 2) and
// columns 2j, 2j + 1 (+ 8 if i > 1) in register i; of B, rows 2j, 2j + 1 (+ 8 i) of column g; of D, row g + 8 (i / 2) and
// column 2j + i % 2.
template <class T> void mma16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  Meeting& m = meet_at(MMA, next_parity());
  for (int i = 0; i < 4; i++)
    for (int e = 0; e < 2; e++) m.a[g + 8 * (i % 2)][2 * j + e + 8 * (i / 2)] = part<T>(a[i], e);
  for (int i = 0; i < 2; i++)
    for (int e = 0; e < 2; e++) m.b[g][2 * j + e + 8 * i] = part<T>(b[i], e);
  meet(m);
  for (int i = 0; i < 4; i++) {
    float sum = 0;
    for (int k = 0; k < 16; k++) sum += m.a[g + 8 * (i / 2)][k] * m.b[2 * j + i % 2][k];
    d[i] += sum;
  }
}

// ---- a kernel behind CUDA's calling convention: an array of addresses of the arguments ----

template <class... P, size_t... I> void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}
template <class... P>
int run(void (*kernel)(P...), const unsigned* grid, unsigned threads, unsigned shared, unsigned seed, void** arguments) {
  return launch({grid[0], grid[1], grid[2]}, threads, shared, seed,
                [=] { call(kernel, arguments, std::index_sequence_for<P...>()); });
}
template <class... P> int widths(void (*)(P...), int* of) {
  const int all[] = {static_cast<int>(sizeof(P))...};
  memcpy(of, all, sizeof all);
  return sizeof...(P);
}

}  // namespace shim

// ---- CUDA's functions ----

template <class W> void __stcg(W* to, W value) { *to = value; }

inline void __syncthreads() { shim::wait_block(); }
inline void __syncwarp(unsigned = ~0u) { shim::meet(shim::meet_at(shim::SYNCWARP, shim::next_parity())); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  shim::Meeting& m = shim::meet_at(shim::SHUFFLE, shim::next_parity());
  m.lane[threadIdx.x % 32] = value;
  shim::meet(m);
  return m.lane[threadIdx.x % 32 ^ mask];
}
inline float __shfl_sync(unsigned, float value, int lane) {
  shim::Meeting& m = shim::meet_at(shim::SHUFFLE, shim::next_parity());
  m.lane[threadIdx.x % 32] = value;
  shim::meet(m);
  return m.lane[lane % 32];
}
