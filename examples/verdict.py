"""Measured against required, the last lines of every example that asserts numbers."""

from __future__ import annotations

Bound = tuple[str, float, str, float]  # what, measured, ">=" or "<=", required


def verdict(bounds: list[Bound]) -> None:
    """Print measured and required; exit with an error that names what is missed, NaN included."""
    missed = []
    for what, measured, sign, required in bounds:
        good = measured >= required if sign == ">=" else measured <= required
        print(f"{'ok    ' if good else 'MISSED'} {what}: {measured:.4g}, required {sign} {required:g}")
        if not good:
            missed.append(what)
    if missed:
        raise SystemExit(f"bounds missed: {', '.join(missed)}")
