"""Which kernels exist, with which tiles and arguments, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from structmat.backends.cuda import kernel as kernels
from structmat.backends.cuda import sources

KIBI = 1 << 10


def some(kernel: sources.Kernel | None) -> sources.Kernel:
    assert kernel is not None
    return kernel


@pytest.mark.parametrize(
    "sizes",
    [
        (16, 15, 16, 16, 1),
        (16, 8, 16, 16, 1),
        (15, 16, 16, 16, 1),
        (16, 16, 12, 16, 1),
        (16, 16, 16, 12, 1),
        (0, 16, 16, 16, 1),
    ],
)
def test_shapes_that_do_not_fit_have_no_monarch_kernel(sizes):
    assert sources.monarch_kernel("float16", *sizes) is None


def test_there_is_no_kernel_for_other_types():
    for dtype in ("float64", "complex64", "int32"):
        assert sources.monarch_kernel(dtype, 16, 16, 16, 16) is None
        assert sources.kron_kernel(dtype, 16, 16, 16, 16) is None
        assert sources.hadamard_kernel(dtype, 64) is None
    assert sources.monarch_kernel("float32", 16, 16, 16, 16) is None


def test_outputs_in_the_order_of_lanes_are_at_most_64_and_as_many_as_fit():
    assert sources.monarch_kernel("float16", 16, 16, 16, 32, lanes=True) is None  # 32 > 16 + 8
    assert sources.monarch_kernel("float16", 32, 16, 16, 32, lanes=True) is not None
    assert sources.monarch_kernel("float16", 64, 16, 16, 72, lanes=True) is None
    assert sources.monarch_kernel("float16", 64, 16, 16, 64, lanes=True) is not None


def test_shared_memory_decides_on_the_tile_and_on_whether_there_is_one():
    sizes = (64, 64, 64, 64)
    tiles = [some(sources.monarch_kernel("bfloat16", *sizes, shared=s * KIBI)) for s in (20, 99, 163, 227)]
    for tile, limit in zip(tiles, (20, 99, 163, 227), strict=True):
        assert tile.shared <= limit * KIBI
    assert tiles[0].shared < tiles[1].shared < tiles[2].shared
    assert sources.monarch_kernel("bfloat16", *sizes, shared=16 * KIBI) is None
    assert sources.kron_kernel("bfloat16", 128, 128, 128, 128, shared=30 * KIBI) is None
    assert some(sources.kron_kernel("bfloat16", 128, 128, 128, 128, shared=99 * KIBI)).threads == 64


@pytest.mark.parametrize("rows", [1, 5, 64, 1000, 4096, None])
@pytest.mark.parametrize(
    "sizes", [(16, 16, 16, 16, 1), (32, 64, 24, 40, 1), (32, 16, 48, 48, 4), (128, 128, 128, 128, 1)]
)
def test_a_tile_covers_all_outputs_and_meets_its_formula(sizes, rows):
    K, _, Q, _, R = sizes
    kernel = some(sources.monarch_kernel("float16", *sizes, rows=rows))
    cols = Q // kernel.columns
    assert Q % kernel.columns == 0
    assert cols % 8 == 0
    assert kernel.rows % 16 == 0
    assert kernel.shared == sources.monarch_shared(K * R, kernel.rows, cols) <= sources.SHARED_LIMIT
    assert kernel.grid(rows or 10**6)[0] == -(-(rows or 10**6) // kernel.rows) * kernel.columns


def test_few_rows_are_spread_over_more_blocks_than_many():
    few, many = (some(sources.monarch_kernel("float16", 64, 64, 64, 64, rows=rows)) for rows in (1, None))
    assert few.grid(1)[0] > many.grid(1)[0]


def test_a_persistent_grid_has_a_bounded_number_of_blocks():
    kernel = some(sources.kron_kernel("float16", 64, 64, 64, 64))
    assert kernel.grid(3) == (1, 1, 1)
    assert kernel.grid(10**8, processors=132)[0] == kernel.resident * 132


def test_an_unknown_activation_is_refused():
    for make in (sources.monarch_kernel, sources.kron_kernel):
        with pytest.raises(ValueError, match="'softmax'"):
            make("float16", 16, 16, 16, 16, activation="softmax")


def test_hadamard_sizes():
    for dtype, least, most in (("float32", 4, 32768), ("float16", 8, 16384), ("bfloat16", 8, 16384)):
        sizes = [n for n in range(0, 1 << 17) if not n & (n - 1)]
        assert [n for n in sizes if sources.hadamard_kernel(dtype, n)] == [n for n in sizes if least <= n <= most]
    for n in (least << i for i in range(3, 12)):
        kernel = some(sources.hadamard_kernel("bfloat16", n))
        assert 128 <= kernel.threads <= 512


def test_arguments_are_as_wide_as_the_parameters():
    kernel = some(sources.monarch_kernel("float16", 16, 16, 16, 16))
    launch = sources.monarch_launch(kernel, 2**60, 32, 48, 0, 64, 7, 2**40, 256)
    assert (
        [a.itemsize for a in launch.arguments] == [kernels.width(p) for p in kernel.parameters] == [8] * 5 + [4, 8, 8]
    )
    assert launch.arguments[:1] == (2**60,)
    hadamard = some(sources.hadamard_kernel("float32", 64))
    arguments = sources.hadamard_launch(hadamard, 16, 32, 0.1, 3, 64, 64).arguments
    assert [type(a) for a in arguments] == [np.uintp, np.uintp, np.float32, np.int32, np.int64, np.int64]


def test_what_a_kernel_cannot_take_is_refused_by_name():
    kernel = some(sources.monarch_kernel("float16", 16, 16, 16, 16))
    good = {"x": 16, "w1": 32, "w2": 48, "bias": 0, "y": 64, "rows": 7, "x_stride": 256, "y_stride": 264}
    sources.monarch_launch(kernel, **good)
    for name in ("x", "w1", "w2", "bias", "y"):
        with pytest.raises(ValueError, match=f"expected {name} at a multiple of 16 bytes"):
            sources.monarch_launch(kernel, **good | {name: 8})
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=f"rows of {name} multiples of 16 bytes apart, got 260"):
            sources.monarch_launch(kernel, **good | {f"{name}_stride": 260})
        sources.monarch_launch(kernel, **good | {f"{name}_stride": 260, "rows": 1})
    with pytest.raises(ValueError, match="at least one row, got 0"):
        sources.monarch_launch(kernel, **good | {"rows": 0})
    with pytest.raises(ValueError, match="blocks"):
        kernel.grid(2**40)
    with pytest.raises(ValueError, match="'int'"):
        kernel.launch((1, 1, 1), 16, 32, 48, 0, 64, 2**31, 256, 256)
    with pytest.raises(TypeError, match="expected 8 arguments, got 2"):
        kernel.launch((1, 1, 1), 1, 2)
    with pytest.raises(ValueError, match="sizes of at least 1"):
        sources.transpose_launch(some(sources.transpose_kernel(4)), 0, 0, 1, 1, 0, 5, 5, 5)


def test_every_file_of_a_kernel_is_self_contained_and_says_what_it_computes():
    files = sorted(kernels.FOLDER.glob("*.cuh"))
    assert [f.name for f in files] == ["hadamard.cuh", "kron.cuh", "monarch.cuh", "prelude.cuh", "transpose.cuh"]
    for file in files:
        text = kernels.source(file.name)
        assert text.startswith("// ")
        assert '#include "' not in text
        assert text.count("struct Element<float>") == 1


def test_kernels_can_be_keys():
    makers = itertools.chain.from_iterable(
        [(sources.transpose_kernel(n), sources.hadamard_kernel("float32", 64)) for n in (2, 4)]
    )
    assert len(set(makers)) == 3
