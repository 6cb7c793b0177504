"""``libcublas`` for the stand-in: a C library with the prototypes of ``cublas_api.h`` that hands its arguments back to Python.

What ctypes passes thereby meets real C types: an argument of the wrong width or in the wrong place arrives as another number.
"""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import c_int, c_longlong, c_size_t, c_void_p

import fakecublas
import shim

SOURCE = """
#include <stddef.h>
typedef struct context* cublasHandle_t;
typedef struct stream* cudaStream_t;
typedef enum { OP_N, OP_T } cublasOperation_t;
typedef enum { R_32F } cudaDataType;
typedef enum { COMPUTE_32F = 68 } cublasComputeType_t;
typedef enum { GEMM_DEFAULT = -1 } cublasGemmAlgo_t;
typedef int (*create_t)(cublasHandle_t*);
typedef int (*stream_t)(cublasHandle_t, cudaStream_t);
typedef int (*workspace_t)(cublasHandle_t, void*, size_t);
typedef int (*gemm_t)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void*, const void*,
                      cudaDataType, int, long long int, const void*, cudaDataType, int, long long int, const void*, void*,
                      cudaDataType, int, long long int, int, cublasComputeType_t, cublasGemmAlgo_t);
static create_t on_create; static stream_t on_stream; static workspace_t on_workspace; static gemm_t on_gemm;
#define API extern "C" __attribute__((visibility("default")))
API void connect(create_t a, stream_t b, workspace_t c, gemm_t d) {
  on_create = a; on_stream = b; on_workspace = c; on_gemm = d;
}
API int cublasCreate_v2(cublasHandle_t* handle) { return on_create(handle); }
API int cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) { return on_stream(handle, stream); }
API int cublasSetWorkspace_v2(cublasHandle_t handle, void* space, size_t bytes) { return on_workspace(handle, space, bytes); }
API int cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
    const void* alpha, const void* A, cudaDataType At, int lda, long long int sa, const void* B, cudaDataType Bt, int ldb,
    long long int sb, const void* beta, void* C, cudaDataType Ct, int ldc, long long int sc, int batch,
    cublasComputeType_t compute, cublasGemmAlgo_t algo) {
  return on_gemm(h, ta, tb, m, n, k, alpha, A, At, lda, sa, B, Bt, ldb, sb, beta, C, Ct, ldc, sc, batch, compute, algo);
}
"""

calls: list[str] = []
spaces: list[int] = []  # addresses of workspaces, one for every product
status = 0
held: list[object] = []


def _create(handle):
    calls.append("create")
    ctypes.cast(handle, ctypes.POINTER(c_void_p))[0] = fakecublas.OWN
    return 0


def _stream(handle, stream):
    assert handle == fakecublas.OWN
    calls.append(f"stream {stream}")
    return status


def _workspace(handle, address, size):
    fakecublas.allocations.check(address, size, "the workspace")
    assert (handle, size) == (fakecublas.OWN, 32 << 20)
    calls.append("workspace")
    spaces.append(address)
    return status


def _gemm(*arguments):
    assert arguments[-1] == -1
    fakecublas.gemmStridedBatchedEx(*arguments)
    calls.append("gemm")
    return status


def library():
    """The compiled library, connected to the functions above."""
    shim.CACHE.mkdir(parents=True, exist_ok=True)
    path = shim.CACHE / "libcublas_of_the_stand_in.so"
    command = [shim.compiler(), "-shared", "-fPIC", "-O1", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    made = ctypes.CDLL(str(path))
    pointers, ints = (c_void_p, c_int, c_int), (c_void_p, c_int, c_int, c_longlong)
    kinds = (
        ctypes.CFUNCTYPE(c_int, c_void_p),
        ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p),
        ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t),
        ctypes.CFUNCTYPE(c_int, *pointers, *[c_int] * 3, c_void_p, *ints, *ints, c_void_p, *ints, *[c_int] * 3),
    )
    held[:] = [kind(f) for kind, f in zip(kinds, (_create, _stream, _workspace, _gemm), strict=True)]
    made.connect(*held)
    return made
