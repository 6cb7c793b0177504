"""The CUDA C++ kernels, run on the CPU behind the shim against float64 references; planted bugs must be noticed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import problems
import pytest
import shim
from planted import BUGS, UNSAFE
from problems import Problem, hadamard, kron, monarch, transpose

from structmat.backends.cuda import sources
from structmat.backends.cuda.kernel import Kernel

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="g++ is not installed")

SEEDS = (0, 1, 2)  # lockstep and two random schedules

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "monarch one row": lambda: monarch("bfloat16", (16, 16, 16, 16, 1), 1),
    "monarch 37 rows": lambda: monarch("bfloat16", (16, 32, 32, 32, 1), 37, tile=(32, 16)),
    "monarch wide tile": lambda: monarch("float16", (16, 16, 8, 8, 1), 37, "gelu_tanh", tile=(64, 8), padding=0),
    "monarch rank 2": lambda: monarch("float16", (16, 48, 16, 64, 2), 21, "relu", tile=(32, 16)),
    "monarch rank 3": lambda: monarch("bfloat16", (16, 32, 24, 40, 3), 21, "gelu", bias=True, tile=(16, 24)),
    "monarch rank 8": lambda: monarch("bfloat16", (4, 16, 8, 24, 8), 5, "silu", bias=True, lanes=True),
    "monarch lanes": lambda: monarch("float16", (32, 16, 32, 32, 1), 37, "gelu", bias=True, lanes=True, tile=(32, 16)),
    "monarch wide lanes": lambda: monarch("bfloat16", (16, 16, 8, 56, 3), 21, lanes=True, tile=(32, 8)),
    "kron one row": lambda: kron("bfloat16", (16, 16, 16, 16), 1),
    "kron rectangular": lambda: kron("float16", (32, 48, 16, 64), 21, "silu", bias=True),
    "kron 37 rows": lambda: kron("bfloat16", (48, 16, 80, 32), 37, "gelu", bias=True, padding=0),
    "kron 5 rows": lambda: kron("bfloat16", (64, 64, 32, 32), 5, "relu", processors=132),
    **{f"hadamard {n} {t}": lambda n=n, t=t: hadamard(t, n, 5) for t, n in [("float32", 4), ("float16", 8)]},
    **{f"hadamard {n} {t}": lambda n=n, t=t: hadamard(t, n, 21) for t, n in [("bfloat16", 64), ("float32", 256)]},
    **{f"hadamard {n} {t}": lambda n=n, t=t: hadamard(t, n, 5) for t, n in [("float16", 1024), ("bfloat16", 4096)]},
    "hadamard 8192 float32": lambda: hadamard("float32", 8192, 3, padding=0),
    "hadamard 16384 float16": lambda: hadamard("float16", 16384, 1),
    "transpose 2 bytes": lambda: transpose(2, 3, 2, 37, 21),
    "transpose 4 bytes": lambda: transpose(4, 5, 1, 64, 5),
    "transpose 8 bytes": lambda: transpose(8, 1, 3, 1, 70).with_grid(2),
    "transpose 16 bytes": lambda: transpose(16, 21, 1, 33, 34).with_grid(5),
}
HEAVY: dict[str, Callable[[], Problem]] = {
    "monarch 1024": lambda: monarch("bfloat16", (32, 32, 32, 32, 1), 65, "gelu", bias=True, tile=(64, 32)),
    "monarch 4096": lambda: monarch("float16", (64, 64, 64, 64, 1), 21),
    "monarch 1024 rank 4": lambda: monarch("bfloat16", (32, 32, 32, 32, 4), 70, tile=(64, 8)),
    "kron 64": lambda: kron("bfloat16", (64, 64, 64, 64), 13),
    "kron 128": lambda: kron("float16", (128, 128, 128, 128), 5, "gelu", bias=True),
    "hadamard 16384 bfloat16": lambda: hadamard("bfloat16", 16384, 3),
    "hadamard 32768 float32": lambda: hadamard("float32", 32768, 2),
}


def check(name: str) -> None:
    problem = (PROBLEMS | HEAVY)[name]()
    results = {problem.run(seed) for seed in SEEDS}
    assert len(results) == 1, "the result depends on the schedule"


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_kernel_meets_its_reference_in_every_schedule(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_a_large_kernel_meets_its_reference_in_every_schedule(name):
    check(name)


def test_rows_may_be_as_close_or_as_far_as_they_are_long():
    near, far = (kron("float16", (16, 16, 16, 16), 21, padding=p).run() for p in (0, 264))
    assert near == far


def test_relu_passes_nan_on():
    problem = monarch("bfloat16", (16, 16, 16, 16, 1), 2, "relu")
    x = problem.pointers[0]
    assert x is not None
    x[3] = np.nan
    with pytest.raises(AssertionError, match="NaN"):
        problem.run()
    assert np.isnan(problem.output[0, :256].astype(float)).all()
    assert not np.isnan(problem.output[1, :256].astype(float)).any()


# ---- planted bugs ----------------------------------------------------------------------------------------------------


def planted(bug: str) -> Problem:
    name, text, replacement = BUGS[bug]
    problem = PROBLEMS[name]()
    assert problem.kernel.source.count(text) == 1, f"{text!r} is no longer there once"
    return problem.with_kernel(source=problem.kernel.source.replace(text, replacement))


def noticed(problem: Problem, sanitize: str | None = None) -> bool:
    for seed in SEEDS:
        try:
            problem.run(seed, sanitize)
        except (AssertionError, shim.ShimError):
            return True
    return False


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug):
    assert noticed(planted(bug)), "the bug went unnoticed"


@pytest.mark.parametrize(
    "name", ["monarch 37 rows", "kron rectangular", "hadamard 4096 bfloat16", "transpose 16 bytes"]
)
def test_too_little_shared_memory_is_noticed(name):
    problem = PROBLEMS[name]()
    short = problem.with_kernel(shared=problem.kernel.shared - 64)  # more than the padding at the end
    with pytest.raises(shim.ShimError, match="shared memory"):
        short.run()


# ---- sanitizers -----------------------------------------------------------------------------------------------------

SANITIZED = [
    ("address", "monarch rank 3"),
    ("address", "monarch lanes"),
    ("address", "kron rectangular"),
    ("address", "hadamard 4096 bfloat16"),
    ("address", "transpose 16 bytes"),
    ("thread", "monarch rank 8"),
    ("thread", "kron rectangular"),
    ("thread", "hadamard 4096 bfloat16"),
    ("thread", "transpose 16 bytes"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sanitize", "name"), SANITIZED)
def test_sanitizers_find_nothing(sanitize, name):
    PROBLEMS[name]().run(sanitize=sanitize)


@pytest.mark.slow
@pytest.mark.parametrize("bug", UNSAFE)
def test_a_sanitizer_notices(bug):
    name, text, replacement, sanitize, finding = UNSAFE[bug]
    problem = PROBLEMS[name]()
    assert problem.kernel.source.count(text) == 1, f"{text!r} is no longer there once"
    with pytest.raises(shim.ShimError, match=finding):
        problem.with_kernel(source=problem.kernel.source.replace(text, replacement)).run(sanitize=sanitize)


# ---- the shim itself ------------------------------------------------------------------------------------------------

SMALL = """
#define KERNEL __global__ void __launch_bounds__(64) small
KERNEL(float* y, int n) {
  extern_shared
  float* const z = reinterpret_cast<float*>(memory);
  body
}
"""


def small(body: str, shared: int = 256, parameters: tuple[str, ...] = ("float*", "int")) -> Kernel:
    prelude = sources.source("prelude.cuh")
    text = prelude + SMALL.replace("extern_shared", "DYNAMIC_SHARED(memory);").replace("body", body)
    return Kernel(text, "small", 64, shared, 255, parameters, rows=1)


def run_small(body: str, seed: int = 0, **options) -> np.ndarray:
    y = np.zeros(64, np.float32)
    shim.build(small(body, **options), seed)((1, 1, 1), [y, np.int32(64)])
    return y


def test_shared_memory_is_nan_before_it_is_written():
    assert np.isnan(run_small("y[threadIdx.x] = z[threadIdx.x];")).all()


def test_a_shuffle_reads_the_other_lane():
    y = run_small("y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<float>(threadIdx.x), 5);", seed=3)
    assert y.tolist() == [t ^ 5 for t in range(64)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 40) __syncthreads(); y[0] = z[0];", "deadlock"),
        ("if (threadIdx.x % 2) __syncwarp(); y[0] = z[0];", "deadlock"),
        ("z[threadIdx.x + n - 60] = y[0];", "past the end"),
        ("if (threadIdx.x % 2) __syncwarp(); else y[0] = __shfl_xor_sync(~0u, z[0], 1);", "different operations"),
    ],
)
def test_the_shim_reports_what_a_device_would_not(body, message):
    with pytest.raises(shim.ShimError, match=message):
        run_small(body)


def test_code_that_does_not_compile_is_reported():
    with pytest.raises(shim.ShimError, match="nonsense"):
        run_small("nonsense;")


def test_arguments_are_checked_in_number_kind_and_width():
    launch = shim.build(small("y[0] = n + z[0] * 0;"))
    y, n = np.zeros(1, np.float32), np.int32(3)
    for arguments in ([y], [y, n, n], [y, 3], [y, np.int64(3)], [y, np.float32(3)], [np.int32(5), n]):
        with pytest.raises(TypeError, match="expected"):
            launch((1, 1, 1), arguments)
    for grid in ((0, 1, 1), (1, 2, 1)):
        with pytest.raises(shim.ShimError, match="grid"):
            launch(grid, [y, n])


def test_the_declared_parameters_must_be_those_of_the_kernel():
    with pytest.raises(TypeError, match="4"):
        shim.build(small("y[0] = n + z[0];", parameters=("float*", "long long")))


def test_sixteen_bit_types_round_to_nearest_even():
    bits = np.random.default_rng(0).integers(0, 2**32, 64, np.uint32)
    values = bits.view(np.float32)[np.isfinite(bits.view(np.float32))]
    for element, name in (("__half", "float16"), ("__nv_bfloat16", "bfloat16")):
        body = f"if (threadIdx.x < n) y[threadIdx.x] = Element<{element}>::value(Element<{element}>::rounded(y[threadIdx.x]));"
        y = values.copy()
        shim.build(small(body + " (void)z;"))((1, 1, 1), [y, np.int32(len(y))])
        with np.errstate(over="ignore"):
            assert np.array_equal(y, values.astype(problems.TYPES[name]).astype(np.float32))
