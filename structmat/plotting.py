"""Pictures: error against parameters. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from structmat import rules
from structmat.projection.approximations import Approximations
from structmat.projection.certificate import Projection

FLOOR = 1e-16  # errors below are drawn here: a logarithmic axis has no zero


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
    ax = _axes(ax)
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


@rules.fallback("plot")
def plot_approximations(approximations: Approximations, ax: Any = None) -> Any:
    """Draw what :func:`structmat.approximate` found: a line of error against parameters for every family, a mark an entry.

    Lines are the errors read off spectra, of all ranks and arrangements that were looked at; marks the certified entries,
    hollow where they are slower than dense. The axis of the errors is logarithmic.

    Parameters
    ----------
    approximations
        The result of ``structmat.approximate``.
    ax
        A matplotlib ``Axes`` to draw on; default a new figure.

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
    >>> x = np.arange(64.0)
    >>> found = sm.approximate(1 / (x[:, None] + x + 1), budget=0.25)
    >>> found.plot().get_xlabel()
    'parameters, % of dense'
    """
    ax = _axes(ax)
    size, colours = math.prod(approximations.shape), {}
    for name, (counts, errors) in approximations.curves.items():
        (line,) = ax.plot(100 * counts / size, errors.clip(FLOOR), drawstyle="steps-post", label=name, alpha=0.7)
        colours[name] = line.get_color()
    for entry in approximations:
        colour = colours.get(entry.family.__name__, "black")
        face = "none" if entry.slower else colour
        error = max(entry.relative_error, FLOOR)
        ax.plot(100 * entry.params / size, error, marker="o", color=colour, markerfacecolor=face)
    ax.set(xlabel="parameters, % of dense", ylabel="relative error", title=approximations.title, yscale="log")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def _axes(ax: Any) -> Any:
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'structmat[plot]'") from error
    return pyplot.figure(layout="constrained").add_subplot()
