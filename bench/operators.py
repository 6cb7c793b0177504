"""Operators of the NumPy and torch backends against dense and against bare library calls, in one run: `make bench`.

Ratios first: how many times faster than dense NumPy, and how much of the bare calls' time is our overhead.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import numpy as np
from harness import check, interleaved
from threadpoolctl import threadpool_limits

import structmat as sm


def bare_monarch(a: sm.Monarch, x: np.ndarray):
    """The two products without a library around them, columns (n, k)."""
    left, right = np.ascontiguousarray(a.left), np.ascontiguousarray(a.right)
    (l, s, kr), (k, _, p) = left.shape, right.shape
    m = x.shape[1]

    def call():
        z = np.matmul(right, x.reshape(k, p, m))
        y = np.empty((s, l, m), x.dtype)
        np.matmul(left, z.reshape(kr, l, m).transpose(1, 0, 2), out=y.transpose(1, 0, 2))
        return y.reshape(s * l, m)

    return call


def cases(dtype, quick: bool):
    sizes = ((256, 16), (1024, 32)) if quick else ((256, 16), (1024, 32), (4096, 64))
    for n, blocks in sizes:
        shape = (n, n)
        yield f"monarch {n}/{blocks}", sm.Monarch.random(shape, blocks=blocks, dtype=dtype, rng=0)
        yield f"btt {n}/{blocks}", sm.BlockTensorTrain.random(shape, blocks=blocks, dtype=dtype, rng=0)
        yield f"low rank {n}, r={n // 16}", sm.LowRank.random(shape, rank=n // 16, dtype=dtype, rng=0)
        yield f"kronecker {blocks}x{blocks}", sm.Kronecker.random(shape, dtype=dtype, rng=0)
        yield f"butterfly {n}, radix 16", sm.Butterfly.random(shape, radix=16, dtype=dtype, rng=0)
    yield "btt 1536x384, 4x4, r=32", sm.BlockTensorTrain.random((1536, 384), blocks=4, rank=32, dtype=dtype, rng=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one thread")
    parser.add_argument("--save", action="store_true", help="write bench/results/<date>-operators.json")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="numbers of BLAS threads")
    options = parser.parse_args()
    rows = []
    dtype = np.float32
    batches = (1, 256) if options.quick else (1, 16, 256, 4096)
    print(
        f"NumPy {np.__version__}, {platform.machine()}, {np.dtype(dtype).name}; times faster than dense NumPy in the same run"
    )
    print(f"{'operator':26} {'threads':>7} {'batch':>6} {'columns A@X':>12} {'rows X@A.T':>11} {'bare/ours':>10}")
    for threads in (1,) if options.quick else options.threads:
        with threadpool_limits(threads):
            for name, a in cases(dtype, options.quick):
                dense = np.ascontiguousarray(a.to_dense())
                for batch in batches:
                    rng = np.random.default_rng(0)
                    x = rng.standard_normal((a.shape[1], batch)).astype(dtype)
                    r = np.ascontiguousarray(x.T)
                    at, dt = a.T, dense.T
                    expected = dense @ x
                    contenders = {
                        "dense columns": lambda d=dense, x=x: d @ x,
                        "columns": lambda a=a, x=x: a @ x,
                        "dense rows": lambda d=dt, r=r: r @ d,
                        "rows": lambda a=at, r=r: r @ a,
                    }
                    if isinstance(a, sm.Monarch):
                        contenders["bare"] = bare_monarch(a, x)
                    for contender in contenders:
                        want = expected if "columns" in contender or contender == "bare" else expected.T
                        check(contenders[contender](), want, f"{name} {contender}")
                    t = interleaved(contenders, 0.15 if options.quick else 0.3)
                    columns, row_form = t["dense columns"] / t["columns"], t["dense rows"] / t["rows"]
                    bare = f"{t['bare'] / t['columns']:10.2f}" if "bare" in t else " " * 10
                    print(f"{name:26} {threads:7} {batch:6} {columns:12.2f} {row_form:11.2f} {bare}", flush=True)
                    rows.append({"operator": name, "threads": threads, "batch": batch, "seconds": t})
    overhead()
    if options.save:
        results = Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        versions = {"numpy": np.__version__, "python": platform.python_version(), "machine": platform.machine()}
        path = results / f"{date.today()}-operators.json"
        path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
        print(f"wrote {path.name}")


def overhead() -> None:
    """What ``A @ x`` costs at n = 64 beyond the bare ``np.matmul`` calls; one float64 vector, one thread."""
    x = np.random.default_rng(0).standard_normal(64)
    a = sm.Monarch.random((64, 64), blocks=8, rng=0)
    k = sm.Kronecker.random((64, 64), rng=0)
    left, right = np.ascontiguousarray(a.left), np.ascontiguousarray(a.right)
    first, second = (np.asarray(f) for f in k.factors)
    stack, square = x.reshape(8, 8, 1), x.reshape(8, 8)
    turned = stack.transpose(1, 0, 2)
    dense = a.to_dense()
    with threadpool_limits(1):
        t = interleaved(
            {
                "monarch": lambda: a @ x,
                "two batched np.matmul": lambda: (np.matmul(right, stack), np.matmul(left, turned)),
                "kronecker": lambda: k @ x,
                "two np.matmul": lambda: (np.matmul(square, second), np.matmul(first, square)),
                "dense": lambda: dense @ x,
            }
        )
    print("\nn = 64, one vector, microseconds: " + ", ".join(f"{name} {1e6 * s:.1f}" for name, s in t.items()))
    print(
        f"overhead beyond the bare calls: monarch {1e6 * (t['monarch'] - t['two batched np.matmul']):.1f}, "
        f"kronecker {1e6 * (t['kronecker'] - t['two np.matmul']):.1f} (limit 5)"
    )


if __name__ == "__main__":
    main()
