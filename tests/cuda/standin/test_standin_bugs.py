"""Errors planted into the code that launches products, each found by a test."""

from __future__ import annotations

import fakecublas
import pytest
import test_standin_copies as copies
import test_standin_numbers as numbers

from structmat.backends.cupy import memory, products

pytestmark = pytest.mark.usefixtures("products_only")


def _multiply(change):
    """``multiply`` with one of its arguments changed."""
    from structmat.backends.cupy import cublas

    original = cublas.multiply

    def wrong(calls, compute, itemsize, left, right, out, add=False):
        given = {"calls": calls, "compute": compute, "add": add} | change(calls, compute, add)
        return original(given["calls"], given["compute"], itemsize, left, right, out, given["add"])

    return "structmat.backends.cupy.cublas.multiply", wrong


BUGS = {  # what is replaced, and the test that finds it
    "sums overwrite": (
        lambda: _multiply(lambda calls, compute, add: {"add": False}),
        copies.test_sums_accumulate_in_the_last_product,
    ),
    "offsets forgotten": (
        lambda: _multiply(lambda calls, compute, add: {"calls": [c._replace(out_offset=0) for c in calls]}),
        lambda: copies.test_products_and_copies_are_counted("block diagonal padded"),
    ),
    "float64 as float32": (
        lambda: _multiply(lambda calls, compute, add: {"compute": compute._replace(data_type=0, compute_type=68)}),
        lambda: numbers.test_all_dtypes("btt", "float64"),
    ),
    "bfloat16 as float16": (
        lambda: _multiply(lambda calls, compute, add: {"compute": compute._replace(data_type=2)}),
        lambda: numbers.test_all_dtypes("btt", "bfloat16"),
    ),
    "always in TF32": (
        lambda: _multiply(lambda calls, compute, add: {"compute": compute._replace(compute_type=77)}),
        numbers.test_precision_is_chosen_by_the_caller,
    ),
    "chunks all at the start": (
        lambda: ("structmat.backends.cupy.products.Part", lambda start, made, part=products.Part: part(0, made)),
        copies.test_large_batches_go_in_chunks_whose_intermediates_stay_in_the_cache,
    ),
    "operands copied": (
        lambda: ("structmat.backends.cupy.memory.strides", _copying_strides),
        lambda: copies.test_padded_strided_and_stacked_operands_take_no_copy("btt"),
    ),
}


def _copying_strides(x, original=memory.strides):
    return original(x) if x.flags.c_contiguous else None


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug, monkeypatch):
    replaced, finds = BUGS[bug]
    finds()
    monkeypatch.setattr(*replaced())
    with pytest.raises((AssertionError, fakecublas.CUBLASError, MemoryError)):
        finds()
