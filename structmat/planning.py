"""Which kernel applies an operator, and why: ``A.plan(batch=...)`` shows it, ``tune`` measures it."""

from __future__ import annotations

from operator import index
from typing import Any, NamedTuple

from structmat import rules
from structmat.backends.base import Candidate
from structmat.operator import Operator


class Decision(NamedTuple):
    """How an operator is applied to one batch: the kernel, what it was chosen from, and the parts of a composite.

    ``str(decision)`` is a table: kernels with their predicted (or, after ``tune``, measured) times, fastest first. A kernel
    ``"library"`` is the only one there is (an FFT, a diagonal); ``"dense"`` means that the dense matrix is faster, made once
    and kept.
    """

    operator: str
    kernel: str
    candidates: tuple[Candidate, ...] = ()
    parts: tuple[Decision, ...] = ()

    def __str__(self) -> str:
        return "\n".join(_lines(self, 0))


@rules.fallback("plan")
def plan(operator: Operator, batch: int = 1, rows: bool = False) -> Decision:
    """The decision for ``A @ X`` with ``batch`` columns, or for ``X @ A.T`` with so many rows."""
    if index(batch) < 1:
        raise ValueError(f"plan: expected a batch of at least 1, got {batch}")
    found = operator._explain(batch, rows)
    if found is not None:
        return Decision(operator._expression(), found.kernel, found.candidates)
    parts = tuple(plan(part, batch, rows) for part in _parts(operator._values()))
    kernel = f"{len(parts)} parts" if parts else "library"
    return Decision(operator._expression(), kernel, (), parts)


def tune(operator: Operator | None = None, *, batch: int = 1, rows: bool = False) -> Decision | dict[str, float]:
    """Measure instead of predict: the machine once, or the kernels of one operator for one batch.

    Parameters
    ----------
    operator
        The operator whose kernels are timed, each a few times on random data; without one, the rates of the machine are
        measured (about half a second) and kept in the user's cache directory for later processes.
    batch, rows
        As for ``A.plan``.

    Returns
    -------
    Decision or dict
        The decision with measured times, used from now on for batches of that size; or the measured rates.

    Raises
    ------
    TypeError
        For anything but an operator, or a batch that is not an integer.
    RuntimeError
        Without an operator where Numba is not installed: there is nothing to choose from.
    OSError
        Without an operator where the cache directory cannot be written: the rates would be lost.

    Examples
    --------
    >>> import structmat as sm
    >>> A = sm.Monarch.random((64, 64), rng=0)
    >>> sm.tune(A, batch=8).operator == A.plan(batch=8).operator
    True
    """
    if operator is not None:
        if not isinstance(operator, Operator):
            raise TypeError(
                f"tune: expected an operator, got {type(operator).__name__}; wrap it: structmat.as_operator(x)"
            )
        if index(batch) < 1:
            raise ValueError(f"tune: expected a batch of at least 1, got {batch}")
        _tune(operator, batch, rows)
        return plan(operator, batch, rows)
    try:
        from structmat.backends.numba import machine
    except ImportError as error:
        raise RuntimeError("tune: the rates are those of the Numba backend, and Numba is not installed") from error
    rates = machine.measure()
    machine.remember(rates)
    return rates._asdict()


def _tune(operator: Operator, batch: int, rows: bool) -> None:
    if operator._explain(batch, rows) is None:
        for part in _parts(operator._values()):
            _tune(part, batch, rows)
    else:
        operator._plan().tune(batch, rows)  # pyright: ignore[reportAttributeAccessIssue]


def _parts(value: Any) -> list[Operator]:
    if isinstance(value, Operator):
        return [value]
    return [part for v in value for part in _parts(v)] if isinstance(value, tuple) else []


def _lines(decision: Decision, depth: int) -> list[str]:
    indent = "  " * depth
    lines = [f"{indent}{decision.operator}: {decision.kernel}"]
    for kernel, seconds in decision.candidates:
        mark = "->" if kernel == decision.kernel else "  "
        lines.append(f"{indent}  {mark} {kernel:<10} {seconds * 1e6:12.1f} us")
    for part in decision.parts:
        lines += _lines(part, depth + 1)
    return lines
