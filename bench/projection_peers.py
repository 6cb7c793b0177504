"""Butterflies by other means: pyfaust in every variant, lazylinop's ksd, and gradient descent on the factors."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import structmat as sm

Calls = dict[str, Callable[[], Any]]

NOT_APPLICABLE = (
    "Of pyfaust, `hierarchical`, `hierarchical_mhtp` and `palm4msa` take sparsity constraints instead of our supports, but for "
    "the preset of Hadamard matrices (below); the preset `rectmat` gives sparse factors of no butterfly structure; `svdtj`, "
    "`eigtj` and `pinvtj` are Givens rotations of singular vectors. `butterfly` of the types `left` and `right` "
    "takes seconds in threads of its own, all of them counted: on three matrices, and not with the eight permutations. Of "
    "lazylinop, `suksd` adds several butterflies, which is another family."
)


def pyfaust_calls(W: np.ndarray) -> tuple[Calls, Calls, Calls]:
    """The butterfly projections of pyfaust: quick ones, that which tries permutations, those that take seconds."""
    fact = silently_imported("pyfaust.fact")
    if fact is None:
        return {}, {}, {}
    count = len(W).bit_length() - 1
    quick: Calls = {
        "pyfaust butterfly, bbtree": lambda: fact.butterfly(W, type="bbtree"),
        "pyfaust fdb, left to right": lambda: fact.fdb(W, n_factors=count),
        "pyfaust fdb, balanced": lambda: fact.fdb(W, n_factors=count, hierarchical_order="balanced"),
        "pyfaust fdb, not orthonormal": lambda: fact.fdb(W, n_factors=count, orthonormalize=False),
    }
    permuted: Calls = {"pyfaust bbtree, 8 permutations": lambda: fact.butterfly(W, type="bbtree", perm="default_8")}
    threaded: Calls = {
        "pyfaust butterfly, left": lambda: muted(lambda: fact.butterfly(W, type="left")),
        "pyfaust butterfly, right": lambda: muted(lambda: fact.butterfly(W, type="right")),
    }
    return quick, permuted, threaded


def palm4msa(W: np.ndarray) -> Any:
    """pyfaust's hierarchical PALM4MSA in the preset for Hadamard matrices."""
    fact = silently_imported("pyfaust.fact")
    return None if fact is None else muted(lambda: fact.hierarchical(W, "hadamard"))


def lazylinop_calls(W: np.ndarray) -> Calls:
    """The Kronecker-sparse decompositions of lazylinop."""
    butterfly = silently_imported("lazylinop.butterfly")
    if butterfly is None:
        return {}
    chain = butterfly.Chain.square_dyadic(W.shape)
    return {
        "lazylinop ksd, left to right": lambda: butterfly.ksd(W, chain),
        "lazylinop ksd, balanced": lambda: butterfly.ksd(W, chain, order="balanced"),
    }


def descend(W: np.ndarray, method: str, seconds: float, rate: float = 0.03) -> tuple[float, int]:
    """Relative error of a radix-2 butterfly after some CPU seconds of Adam or L-BFGS on all factors, and the steps taken.

    Random rotations at the start, single precision, the best of all steps.
    """
    import torch

    torch.manual_seed(0)
    n, kind = len(W), torch.complex64 if np.iscomplexobj(W) else torch.float32
    target = torch.from_numpy(W * (math.sqrt(n) / np.linalg.norm(W))).to(kind)
    factors = [rotations(p, kind) for p in sm.Butterfly.random((n, n), radix=2, rng=0).patterns]
    optimiser: Any
    if method == "Adam":
        optimiser = torch.optim.Adam(factors, lr=rate)
    else:
        optimiser = torch.optim.LBFGS(factors, max_iter=1, history_size=10, line_search_fn="strong_wolfe")
    best, steps, end = math.inf, 0, time.process_time() + seconds

    def loss() -> Any:
        nonlocal best, steps
        optimiser.zero_grad()
        value = (target - product(factors, n)).abs().square().sum() / n
        value.backward()
        best, steps = min(best, float(value.detach())), steps + 1
        return value

    while time.process_time() < end:
        optimiser.step(loss)
    return math.sqrt(best), steps


def rotations(pattern: Any, kind: Any) -> Any:
    """Blocks ``(a, d, 2, 2)`` of random rotations."""
    import torch

    angle = 2 * math.pi * torch.rand(pattern.a, pattern.d)
    cosine, sine = angle.cos(), angle.sin()
    blocks = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
    return blocks.to(kind).requires_grad_()


def product(factors: list[Any], n: int) -> Any:
    """The dense matrix of a chain of blocks ``(a, d, b, c)``."""
    import torch

    x = torch.eye(n, dtype=factors[0].dtype)
    for f in reversed(factors):
        a, d, b, c = f.shape
        x = torch.matmul(f, x.reshape(a, c, d, n).transpose(1, 2)).transpose(1, 2).reshape(a * b * d, n)
    return x


def silently_imported(name: str) -> Any:
    """A module if it is installed; its warnings about what it could not import are not ours."""
    import importlib

    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
    return None


def muted(call: Callable[[], Any]) -> Any:
    """The result of a call whose native code writes to the terminal."""
    with no_output():
        return call()


@contextlib.contextmanager
def no_output() -> Iterator[None]:
    sys.stdout.flush()
    saved, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nothing)
