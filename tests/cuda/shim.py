"""Compiles CUDA C++ kernels with g++ behind ``shim.hpp`` and runs them on host memory.

``build(kernel, seed, sanitize)(grid, arguments)`` is one launch. Shared libraries are kept in pytest's cache folder under
the hash of everything that they depend on.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from structmat.backends.cuda.kernel import SCALARS, Kernel, width

HEADER = Path(__file__).with_name("shim.hpp")
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "shim"
FLAGS = (
    "-std=c++20",
    "-U_FORTIFY_SOURCE",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
)
SANITIZERS = {"address": "address,undefined", "thread": "thread"}

CALL = """
extern "C" int shim_run(const unsigned* grid, unsigned seed, void** arguments) {{
  return shim::run(&{name}, grid, {threads}, {shared}, seed, arguments);
}}
extern "C" int shim_widths(int* of) {{ return shim::widths(&{name}, of); }}
extern "C" const char* shim_message(int error) {{ return shim::MESSAGES[error]; }}
"""

# Files 0, 1, ... hold the arguments, those of pointers what they point to; each goes into an allocation of its exact size.
MAIN = """
int main(int, char** argv) {{
  std::vector<void*> values;
  std::vector<std::pair<void*, long>> held;
  for (int i = 0; i < {count}; i++) {{
    char path[4096];
    snprintf(path, sizeof path, "%s/%d", argv[1], i);
    FILE* file = fopen(path, "rb");
    fseek(file, 0, SEEK_END);
    const long bytes = ftell(file);
    rewind(file);
    void* data = bytes ? malloc(bytes) : nullptr;
    if (bytes && fread(data, 1, bytes, file) != static_cast<size_t>(bytes)) return 3;
    fclose(file);
    held.push_back({{data, bytes}});
  }}
  const char* pointers = "{pointers}";
  for (int i = 0; i < {count}; i++) values.push_back(pointers[i] == 'p' ? static_cast<void*>(&held[i].first) : held[i].first);
  const unsigned grid[3] = {{static_cast<unsigned>(atoi(argv[2])), 1, 1}};
  if (const int error = shim_run(grid, 0, values.data())) return fprintf(stderr, "%s\\n", shim_message(error)), 2;
  for (int i = 0; i < {count}; i++) {{
    char path[4096];
    snprintf(path, sizeof path, "%s/%d", argv[1], i);
    FILE* file = fopen(path, "wb");
    if (held[i].first) fwrite(held[i].first, 1, held[i].second, file);
    fclose(file);
    free(held[i].first);
  }}
}}
"""


class ShimError(RuntimeError):
    """What a device would not have reported: a deadlock, an overrun, a sanitizer's finding."""


@cache
def compiler() -> str | None:
    """The C++ compiler, or ``None``."""
    return shutil.which("g++")


def build(
    kernel: Kernel, seed: int = 0, sanitize: str | None = None
) -> Callable[[tuple[int, int, int], Sequence[Any]], None]:
    """Compile a kernel; the result launches it, given a grid and arguments.

    Parameters
    ----------
    kernel
        What to compile.
    seed
        0: lockstep, blocks in order. Else the seed of a random schedule.
    sanitize
        ``"address"`` (with undefined behaviour) or ``"thread"``: runs in a process of its own.

    Returns
    -------
    callable
        Takes a grid and one argument for each parameter: for pointers addresses of host memory, or NumPy arrays, whose
        contents are then replaced (with ``sanitize`` arrays alone; 0 or ``None`` is a null pointer); for the others
        NumPy scalars. Their number, kinds and byte widths must be those of the parameters, else ``TypeError``.

    Raises
    ------
    ShimError
        If the compiler finds fault; at launches if the schedule or a sanitizer does.
    """
    if sanitize:
        program = _compiled(kernel, sanitize)
        return lambda grid, arguments: _run_process(kernel, program, grid, arguments)
    library = _loaded(_compiled(kernel, None))
    of = (ctypes.c_int * 64)()
    actual = list(of[: library.shim_widths(of)])
    expected = [width(p) for p in kernel.parameters]
    if actual != expected:
        raise TypeError(f"{kernel.name}: its parameters have {actual} bytes, Kernel.parameters says {expected}")

    def launch(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        values = [_packed(*pair) for pair in zip(kernel.parameters, _counted(kernel, arguments), strict=True)]
        addresses = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        error = library.shim_run((ctypes.c_uint * 3)(*_flat(grid)), seed, addresses)
        if error:
            raise ShimError(f"{kernel.name}, seed {seed}: {library.shim_message(error).decode()}")

    return launch


def _flat(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(grid) != 3 or grid[0] < 1 or grid[1:] != (1, 1):
        raise ShimError(f"expected a grid (blocks, 1, 1), got {grid}")
    return grid


def _counted(kernel: Kernel, arguments: Sequence[Any]) -> Sequence[Any]:
    if len(arguments) != len(kernel.parameters):
        raise TypeError(f"{kernel.name}: expected {len(kernel.parameters)} arguments, got {len(arguments)}")
    return arguments


def _packed(parameter: str, value: Any) -> np.ndarray:
    """The bytes that CUDA would copy."""
    if parameter.endswith("*"):
        if isinstance(value, np.ndarray):
            value = value.ctypes.data
        if isinstance(value, np.generic) and (value.itemsize != 8 or value.dtype.kind not in "ui"):
            raise TypeError(f"expected 8 bytes for {parameter!r}, got {value.dtype}")
        return np.array([int(value or 0)], np.uintp)
    kind = np.dtype(SCALARS[parameter])
    if not isinstance(value, np.generic) or value.dtype != kind:
        raise TypeError(f"expected {kind} for {parameter!r}, got {getattr(value, 'dtype', type(value).__name__)}")
    return np.array([value])


def _compiled(kernel: Kernel, sanitize: str | None) -> Path:
    gxx = compiler()
    if gxx is None:
        raise ShimError("g++ is not installed")
    text = f'#include "shim.hpp"\n{kernel.source}\n' + CALL.format(**kernel._asdict())
    flags = [*FLAGS, "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-fvisibility=hidden"]
    if sanitize:
        pointers = "".join("p" if p.endswith("*") else "v" for p in kernel.parameters)
        text += MAIN.format(count=len(pointers), pointers=pointers)
        flags = [*FLAGS, "-O0", "-g1", "-DSHIM_THREADS", "-fno-sanitize-recover=all", "-pthread"]
        flags.append(f"-fsanitize={SANITIZERS[sanitize]}")
    else:
        text = text.replace('extern "C"', 'extern "C" __attribute__((visibility("default")))')
    key = hashlib.sha256("\0".join([HEADER.read_text(), text, *flags]).encode()).hexdigest()[:24]
    CACHE.mkdir(parents=True, exist_ok=True)
    made = CACHE / f"{key}.{'out' if sanitize else 'so'}"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            (Path(folder) / "kernel.cpp").write_text(text)
            command = [gxx, *flags, f"-I{HEADER.parent}", "kernel.cpp", "-o", "made"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise ShimError(f"g++ on {kernel.name}:\n{done.stderr}")
            os.replace(Path(folder) / "made", made)  # another process may do the same at the same time
    return made


@cache
def _loaded(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.shim_message.restype = ctypes.c_char_p
    return library


def _run_process(kernel: Kernel, program: Path, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    pairs = list(zip(kernel.parameters, _counted(kernel, arguments), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(i) for i in range(len(pairs))]
        for file, (parameter, value) in zip(files, pairs, strict=True):
            if not parameter.endswith("*"):
                data = _packed(parameter, value).tobytes()
            elif isinstance(value, np.ndarray):
                data = value.tobytes()
            elif value:
                raise TypeError(f"expected an array for {parameter!r}: a sanitizer needs its size, got {value!r}")
            else:
                data = b""
            file.write_bytes(data)
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        command = [str(program), folder, str(_flat(grid)[0])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ShimError(f"{kernel.name}: exit {done.returncode}\n{done.stderr[-4000:]}")
        for file, (parameter, value) in zip(files, pairs, strict=True):
            if isinstance(value, np.ndarray) and not parameter.startswith("const "):
                value[...] = np.frombuffer(file.read_bytes(), value.dtype).reshape(value.shape)
