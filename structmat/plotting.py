"""Pictures: error against parameters. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from structmat.projection.certificate import Projection


def plot_errors(projections: Mapping[str, Iterable[Projection]], ax: Any = None, title: str = "") -> Any:
    """Draw relative error against parameters, one line per name, with a band down to the best possible.

    Parameters
    ----------
    projections
        For each name (of a family, say) projections of one matrix.
    ax
        A matplotlib ``Axes`` to draw on; default a new figure.
    title
        Title of the axes.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    ImportError
        If matplotlib is missing.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> import matplotlib; matplotlib.use("Agg")
    >>> W = np.random.default_rng(0).standard_normal((16, 16))
    >>> ax = sm.plotting.plot_errors({"low rank": [sm.project(W, sm.LowRank, rank=r) for r in (2, 4)]})
    >>> ax.get_ylabel()
    'relative error'
    """
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("plot_errors needs matplotlib: pip install 'structmat[plot]'") from error
        ax = pyplot.figure(layout="constrained").add_subplot()
    for name, members in projections.items():
        members = sorted(members, key=lambda p: p.params)
        fractions = [100 * p.params / math.prod(p.operator.shape) for p in members]
        bounds = [p.relative_error * p.lower_bound / p.error if p.error else 0.0 for p in members]
        (line,) = ax.plot(fractions, [p.relative_error for p in members], marker="o", label=name)
        ax.fill_between(fractions, bounds, [p.relative_error for p in members], color=line.get_color(), alpha=0.15)
    ax.set(xlabel="parameters, % of dense", ylabel="relative error", title=title)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax
