"""Every CUDA kernel compiles for the architectures that count, within its bounds, without a device."""

from __future__ import annotations

from functools import cache

import compiled
import pytest

from structmat.backends.cuda.kernel import Kernel


@pytest.fixture(scope="module", autouse=True)
def _toolkit():
    try:
        compiled.toolkit()
    except compiled.NoCompilerError as e:
        pytest.skip(f"no CUDA compiler: {e}")


@cache
def facts(name: str, arch: str) -> compiled.Facts:
    return compiled.facts(compiled.market()[name], arch)


QUICK = (  # the others are slow: together they take half a minute
    "monarch 32x32 gelu, fp16",
    "monarch 64x64",
    "monarch 32x32 rank 4",
    "monarch 32x32 lanes",
    "kron 64x64",
    "kron 32x64, 48x16, silu",
    "hadamard 4096, fp16",
    "hadamard 16384, fp32",
    "transpose 2 bytes",
)
NARROW = {  # accesses of less than 16 bytes
    "monarch 16x16": 32,  # sizes that are not multiples of 32: 8 bytes
    "kron 16x16": 16,
    "kron 32x64, 48x16, silu": 48,
    "monarch 32x32 lanes": 16,  # a bias across the order of the weights
    "monarch 64x64 lanes": 32,
    "transpose 2 bytes": 8,  # elements
}
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in compiled.market()]


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_compiles_within_its_bounds(name, arch):
    kernel, found = compiled.market()[name], facts(name, arch)
    assert (found.stack, found.local) == (0, 0), "registers spill to local memory"
    assert 0 < found.registers <= kernel.registers
    assert kernel.threads * found.registers <= 65536, "a block needs more registers than a multiprocessor has"
    assert kernel.shared <= compiled.SHARED_LIMITS[arch]
    assert (found.hmma > 0) == name.startswith(("monarch", "kron")), "tensor cores"
    if name not in NARROW:
        assert found.wide > 0
    assert found.narrow <= NARROW.get(name, 0), "device memory is accessed by less than 16 bytes"


def test_a_spill_would_be_noticed():
    kernel = compiled.market()["monarch 32x32"]
    squeezed = kernel._replace(source=kernel.source.replace("16 / WARPS)", "4)"))
    assert squeezed.source != kernel.source
    found = compiled.facts(squeezed, "80")
    assert found.stack > 0
    assert found.local > 0


def test_an_error_of_the_compiler_is_reported():
    broken = Kernel("nonsense;", "nothing", 32, 0, 255, (), rows=1)
    with pytest.raises(RuntimeError, match="nonsense"):
        compiled.cubin(broken, "90")
