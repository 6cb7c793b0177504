"""Compiles CUDA C++ kernels with NVRTC, without a device, and reads what became of them.

``python tests/cuda/compiled.py`` prints the table of registers, stack, shared memory and instructions of every kernel in
:data:`MARKET` for compute capability 8.0 and 9.0. Needs the packages of the extra ``cuda-compiler``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from structmat.backends.cuda.sources import (
    Kernel,
    hadamard_kernel,
    kron_kernel,
    monarch_kernel,
    transpose_kernel,
)

SHARED_LIMITS = {"80": 163 << 10, "90": 227 << 10}


class Facts(NamedTuple):
    """What the compiler made of a kernel for one architecture."""

    registers: int
    stack: int
    local: int  # instructions that read or write local memory
    hmma: int  # tensor-core products of 16 x 8 x 16
    wide: int  # 16-byte loads and stores of global memory
    narrow: int  # others


class NoCompilerError(RuntimeError):
    """A package of the extra ``cuda-compiler`` is missing."""


@cache
def toolkit() -> Path:
    """The folder of the CUDA packages, with ``include`` and ``bin``."""
    try:
        import nvidia
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except ImportError as e:
        raise NoCompilerError(f"NVRTC: {e}") from None
    for folder in nvidia.__path__:
        root = Path(folder) / "cu13"
        if (root / "bin" / "cuobjdump").exists() and (root / "include" / "cuda_fp16.h").exists():
            return root
    raise NoCompilerError("nvidia-cuda-cuobjdump or nvidia-cuda-runtime is not installed")


def cubin(kernel: Kernel, arch: str) -> bytes:
    """The binary of a kernel for ``sm_<arch>``.

    Raises
    ------
    RuntimeError
        With the compiler's log, if it finds fault.
    """
    root = toolkit()
    from cupy_backends.cuda.libs import nvrtc

    options = (f"-arch=sm_{arch}", "-std=c++17", "-default-device", f"-I{root}/include", f"-I{root}/include/cccl")
    program = nvrtc.createProgram(kernel.source, "kernel.cu", (), ())
    try:
        nvrtc.addNameExpression(program, kernel.name)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            raise RuntimeError(f"{kernel.name}, sm_{arch}:\n{nvrtc.getProgramLog(program)}") from None
        return nvrtc.getCUBIN(program) + b"\0"  # the binding strips the last byte of the image
    finally:
        nvrtc.destroyProgram(program)


def facts(kernel: Kernel, arch: str) -> Facts:
    """Compile a kernel and read its resources and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin(kernel, arch))
        file.flush()

        def dump(option: str) -> str:
            command = [str(toolkit() / "bin" / "cuobjdump"), option, file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout + done.stderr

        usage, sass = dump("-res-usage"), dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{kernel.name}: no resource usage in\n{usage}")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    wide = r"\b(?:LDG|STG)\.E(?:\.\w+)*\.128\b"
    every = count(r"\b(?:LDG|STG)\b")
    return Facts(
        int(found[1]),
        int(found[2]),
        count(r"\b(?:LDL|STL)\b"),
        count(r"\bHMMA\.16816"),
        count(wide),
        every - count(wide),
    )


def _made(kernel: Kernel | None) -> Kernel:
    if kernel is None:
        raise ValueError("there is no such kernel")
    return kernel


def market() -> dict[str, Kernel]:
    """Instantiations that stand for all: sizes, ranks, orders, epilogues, types."""
    found = {
        "monarch 16x16": monarch_kernel("float16", 16, 16, 16, 16),
        "monarch 32x32": monarch_kernel("bfloat16", 32, 32, 32, 32),
        "monarch 32x32 gelu, fp16": monarch_kernel("float16", 32, 32, 32, 32, activation="gelu"),
        "monarch 32x64": monarch_kernel("bfloat16", 32, 64, 64, 32),
        "monarch 64x64": monarch_kernel("bfloat16", 64, 64, 64, 64),
        "monarch 64x64, 8 rows": monarch_kernel("bfloat16", 64, 64, 64, 64, rows=8),
        "monarch 128x128, 8 rows": monarch_kernel("float16", 128, 128, 128, 128, rows=8),
        "monarch 32x32 rank 4": monarch_kernel("bfloat16", 32, 32, 32, 32, 4, activation="gelu_tanh"),
        "monarch 32x32 lanes": monarch_kernel("bfloat16", 32, 32, 32, 32, lanes=True, activation="silu"),
        "monarch 64x64 lanes": monarch_kernel("float16", 64, 64, 64, 64, lanes=True),
        "kron 16x16": kron_kernel("bfloat16", 16, 16, 16, 16),
        "kron 32x32": kron_kernel("float16", 32, 32, 32, 32),
        "kron 64x64": kron_kernel("bfloat16", 64, 64, 64, 64),
        "kron 128x128": kron_kernel("bfloat16", 128, 128, 128, 128),
        "kron 32x64, 48x16, silu": kron_kernel("float16", 32, 64, 48, 16, "silu"),
        "hadamard 64": hadamard_kernel("bfloat16", 64),
        "hadamard 1024, fp32": hadamard_kernel("float32", 1024),
        "hadamard 4096, fp16": hadamard_kernel("float16", 4096),
        "hadamard 16384": hadamard_kernel("bfloat16", 16384),
        "hadamard 16384, fp32": hadamard_kernel("float32", 16384),
        "hadamard 32768, fp32": hadamard_kernel("float32", 32768),
        "transpose 2 bytes": transpose_kernel(2),
        "transpose 16 bytes": transpose_kernel(16),
    }
    return {name: _made(kernel) for name, kernel in found.items()}


def main() -> None:
    """Print the table."""
    heads = ("kernel", "sm", "threads", "registers", "stack", "local", "shared", "HMMA", "128-bit", "narrower")
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name, kernel in market().items():
        for arch in SHARED_LIMITS:
            f = facts(kernel, arch)
            row = (name, arch, kernel.threads, f.registers, f.stack, f.local, kernel.shared, f.hmma, f.wide, f.narrow)
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(f"\n{len(market())} kernels; NVRTC from {toolkit()}", file=sys.stderr)


if __name__ == "__main__":
    main()
