"""The rule table: ``(operation, left type, right type) -> small functions``, and its lookup.

A rule is one exact identity. It checks its own condition and declines with ``NotImplemented``. Rules are searched in
one fixed order: cancellations first, in the order in which they were entered, then the rest along the method resolution
order of the left type (outside) and of the right type (inside); the first answer that is not ``NotImplemented`` wins.
Where no rule answers, the operation's fallback builds the lazy result. The order is cached per pair of types.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

MATMUL, ADD, KRON, SCALE, INVERSE = "matmul", "add", "kron", "scale", "inverse"

Rule = Callable[..., Any]

TABLE: dict[tuple[str, type, type], list[Rule]] = defaultdict(list)
CANCELLATIONS: dict[tuple[str, type, type], list[Rule]] = defaultdict(list)
FALLBACKS: dict[str, Rule] = {}

_candidates: dict[tuple[str, type, type], tuple[Rule, ...]] = {}


def rule(operation: str, left: type, right: type = object, *, cancels: bool = False) -> Callable[[Rule], Rule]:
    """Enter a function into the table under ``(operation, left, right)``.

    Parameters
    ----------
    operation
        One of ``"matmul"``, ``"add"``, ``"kron"`` (two operators), ``"scale"`` (operator, scalar), ``"inverse"``
        (operator alone; ``right`` is then left out), or the name of a function of ``structmat.linalg``.
    left, right
        The types the rule is for; subclasses inherit it.
    cancels
        True for identities that make an operand vanish: they are tried before all other rules.
    """
    table = CANCELLATIONS if cancels else TABLE

    def enter(function: Rule) -> Rule:
        table[operation, left, right].append(function)
        _candidates.clear()
        return function

    return enter


def fallback(operation: str) -> Callable[[Rule], Rule]:
    """Make a function the lazy result of an operation that no rule answers."""

    def enter(function: Rule) -> Rule:
        FALLBACKS[operation] = function
        return function

    return enter


def candidates(operation: str, left: type, right: type = object) -> tuple[Rule, ...]:
    """All rules that may answer for this pair of types, in the order in which they are asked."""
    key = (operation, left, right)
    found = _candidates.get(key)
    if found is None:
        fitting = [k for k in CANCELLATIONS if k[0] == operation and issubclass(left, k[1]) and issubclass(right, k[2])]
        pairs = [(operation, a, b) for a in left.__mro__ for b in right.__mro__]
        cancelling = [f for k in fitting for f in CANCELLATIONS[k]]
        found = _candidates[key] = (*cancelling, *(f for pair in pairs for f in TABLE.get(pair, ())))
    return found


def find(operation: str, left: Any, right: Any = None) -> Any:
    """The answer of the first rule that does not decline, or ``NotImplemented``."""
    for function in candidates(operation, type(left), object if right is None else type(right)):
        result = function(left) if right is None else function(left, right)
        if result is not NotImplemented:
            return result
    return NotImplemented


def apply(operation: str, left: Any, right: Any = None) -> Any:
    """The answer of the table, or the lazy result where no rule answers."""
    result = find(operation, left, right)
    if result is NotImplemented:
        function = FALLBACKS[operation]
        return function(left) if right is None else function(left, right)
    return result
