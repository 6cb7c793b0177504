"""Speed-up over dense against size and batch, and where structure breaks even."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cells import Cell


def draw(cells: list[Cell], stem: Path) -> list[str]:
    """Write ``<stem>-speedup.svg`` and ``<stem>-breakeven.svg``; the names of those that had something to show."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "structmat"  # the same picture from the same numbers
    done = []
    for name, picture in (("speedup", speedup), ("breakeven", breakeven)):
        figure = picture([c for c in cells if c.dtype == "f4" and c.ratio("best dense")])
        if figure is not None:
            figure.savefig(f"{stem}-{name}.svg", metadata={"Date": None})
            done.append(name)
    return done


def curves(cells: list[Cell]) -> dict[str, dict[int, dict[int, float]]]:
    """Of square families: title -> batch -> size -> speed-up over dense, the faster layout."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for c in cells:
        if c.part in ("monarch", "butterfly", "hadamard"):
            title = {"monarch": "Monarch, sqrt(n) blocks"}.get(c.family, c.family.capitalize())
            if c.operator.endswith("/4"):
                title = "Monarch, 4 blocks"
            sizes = found.setdefault(title, {}).setdefault(c.batch, {})
            sizes[c.shape[0]] = max(sizes.get(c.shape[0], 0.0), c.ratio("best dense") or 0.0)
    return found


def speedup(cells: list[Cell]):
    from matplotlib import pyplot as plt

    found = curves(cells)
    if not found:
        return None
    figure, axes = plt.subplots(
        1, len(found), figsize=(3.2 * len(found), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    batches = sorted({b for by_batch in found.values() for b in by_batch})
    colours = dict(zip(batches, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(batches))), strict=True))
    for ax, (title, by_batch) in zip(axes[0], found.items(), strict=True):
        for batch, sizes in sorted(by_batch.items()):
            ax.plot(*zip(*sorted(sizes.items()), strict=True), "o-", ms=4, color=colours[batch], label=f"B = {batch}")
        ax.axhline(1, color="0.4", lw=1, ls="--")
        ax.set(title=title, xlabel="n", xscale="log", yscale="log")
        ax.set_xscale("log", base=2)
        ax.grid(color="0.92")
    axes[0][0].set_ylabel("times faster than dense")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def breakeven(cells: list[Cell]):
    """One row for each operator and layout, one column for each batch; blue is faster than dense."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    rows = list(dict.fromkeys((c.operator, c.layout) for c in cells))
    batches = sorted({c.batch for c in cells})
    if not rows:
        return None
    values = np.full((len(rows), len(batches)), np.nan)
    for c in cells:
        values[rows.index((c.operator, c.layout)), batches.index(c.batch)] = np.log2(c.ratio("best dense") or np.nan)
    figure, ax = plt.subplots(figsize=(2.6 + 0.75 * len(batches), 0.8 + 0.2 * len(rows)), layout="constrained")
    ax.imshow(values, cmap="RdBu", norm=TwoSlopeNorm(0, -3, 8), aspect="auto")
    for (i, j), v in np.ndenumerate(values):
        if not np.isnan(v):
            ax.text(j, i, f"{2**v:.3g}", ha="center", va="center", fontsize=6, color="w" if v > 5 or v < -2 else "k")
    ax.set_xticks(range(len(batches)), [f"B={b}" for b in batches], fontsize=7)
    ax.set_yticks(range(len(rows)), [f"{name}, {layout}" for name, layout in rows], fontsize=6)
    ax.set_title("Times faster than dense (float32)", fontsize=9)
    return figure
