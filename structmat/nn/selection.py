"""Selection: patterns of layer names, what they ask for, and which of them counts for a layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from structmat.nn.choice import Choice, read_choice

Pattern = str | re.Pattern[str] | Callable[[nn.Module, str], bool]
T = TypeVar("T")


def read_selection(selection: Any, budget: float | None) -> list[tuple[Pattern, Choice | None]]:
    """Patterns and what they ask for; ``TypeError`` and ``ValueError`` that name what was found."""
    is_config = not isinstance(selection, Mapping) or "structure" in selection
    pairs = [(re.compile(".*"), selection)] if is_config else list(selection.items())
    if not pairs:
        raise ValueError("plan: expected at least one pattern, got an empty mapping")
    read = []
    for pattern, config in pairs:
        if not (isinstance(pattern, (str, re.Pattern)) or callable(pattern)):
            raise TypeError(f"plan: expected names, expressions or functions as patterns, got {type(pattern).__name__}")
        read.append((pattern, None if config is None else read_choice(config, budget)))
    return read


def match(
    linears: Mapping[str, nn.Module], patterns: list[tuple[Pattern, T | None]], who: str = "plan"
) -> dict[str, T | None]:
    """For every layer that a pattern names its config, by the rule of precedence; warns of patterns that name none."""
    used: set[int] = set()
    matched: dict[str, T | None] = {}
    for name, module in linears.items():
        hits = [i for i, (pattern, _) in enumerate(patterns) if _hit(pattern, module, name)]
        used.update(hits)
        if hits:
            first = min(hits, key=lambda i: (patterns[i][1] is not None, patterns[i][0] != name, i))
            matched[name] = patterns[first][1]
    for i, (pattern, _) in enumerate(patterns):
        if matched and i not in used:
            shown = pattern.pattern if isinstance(pattern, re.Pattern) else getattr(pattern, "__name__", pattern)
            warnings.warn(f"{who}: no linear layer matches {shown!r}", UserWarning, stacklevel=3)
    return matched


def _hit(pattern: Pattern, module: nn.Module, name: str) -> bool:
    if isinstance(pattern, str):
        if pattern.startswith("re:"):
            return re.fullmatch(pattern[3:], name) is not None
        return name == pattern or name.endswith(f".{pattern}")
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    return bool(pattern(module, name))
