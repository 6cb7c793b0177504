"""What approximate returns: certified projections with what they cost, ranked, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from structmat import rules
from structmat.operator import Operator
from structmat.projection.certificate import Projection
from structmat.projection.cost import Cost


@dataclass(frozen=True, repr=False)
class Approximation(Projection):
    """A projection with what it costs; one entry of :class:`Approximations`.

    Attributes
    ----------
    label
        The architecture in words.
    family, options
        ``structmat.project(W, family, **options)`` gives the same projection.
    flops
        Flops of applying it, as a fraction of dense.
    speed
        Predicted speed over dense; see :func:`approximate`.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> best = sm.approximate(np.kron(np.ones((4, 4)), np.arange(16.0).reshape(4, 4)), budget=0.2).best
    >>> best.family.__name__, best.options["shapes"], best.params
    ('Kronecker', [(4, 4), (4, 4)], 32)
    """

    label: str = ""
    family: type[Operator] = Operator
    options: dict[str, Any] = field(default_factory=dict)
    flops: float = math.nan
    speed: float = math.nan

    @property
    def slower(self) -> bool:
        """Whether it is worse than dense in flops or in predicted speed."""
        return Cost(self.flops, self.speed).slower


class Approximations(Sequence[Approximation]):
    """Projections of one matrix onto several families, ranked; what :func:`structmat.approximate` returns.

    A sequence of :class:`Approximation`; ``str`` is a table.

    Attributes
    ----------
    shape
        ``(m, n)`` of the matrix.
    curves
        For every family the errors that were read off spectra, ``(parameters, relative errors)``, before verification;
        empty with a weight.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> found = sm.approximate(np.eye(8), budget=0.5)
    >>> found.best is found[0], found.best.error < 1e-12
    (True, True)
    """

    def __init__(
        self,
        entries: Iterable[Approximation],
        shape: tuple[int, int],
        curves: dict[str, tuple[np.ndarray, np.ndarray]],
        title: str = "",
    ) -> None:
        self._entries = tuple(entries)
        self.shape = shape
        self.curves = curves
        self.title = title

    @overload
    def __getitem__(self, index: int) -> Approximation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Approximation, ...]: ...
    def __getitem__(self, index: int | slice) -> Approximation | tuple[Approximation, ...]:
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def best(self) -> Approximation:
        """The first entry."""
        return self._entries[0]

    def plot(self, ax: Any = None) -> Any:
        """Draw error against parameters: a line for every family, a mark for every entry; returns the ``Axes``.

        Raises ``ImportError`` if matplotlib is missing.
        """
        return rules.FALLBACKS["plot"](self, ax)

    def __str__(self) -> str:
        head = ("", "architecture", "parameters", "rel. error", "best possible", "flops", "speed", "")
        rows = [head, *(self._row(i, entry) for i, entry in enumerate(self._entries))]
        widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
        lines = []
        for row in rows:
            cells = [cell.ljust(w) if c in (1, 7) else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths))]  # noqa: B905
            lines.append("  ".join(cells).rstrip())
        return "\n".join([self.title, *lines] if self.title else lines)

    def _row(self, i: int, a: Approximation) -> tuple[str, ...]:
        bound = a.relative_error * a.lower_bound / a.error if a.error else 0.0
        share = a.params / math.prod(self.shape)
        note = "slower than dense" if a.slower else ""
        return (
            str(i + 1),
            a.label,
            f"{share:.2%}",
            f"{a.relative_error:.3g}",
            f">= {bound:.3g}",
            f"{a.flops:.3g}x",
            f"{a.speed:.3g}x",
            note,
        )

    def __repr__(self) -> str:
        return f"<Approximations of {self.shape[0]}x{self.shape[1]}: {len(self)}, best {self.best}>"
