"""Progress: a bar for calls that take long, where the caller wants one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int, int], Any]  # (steps done, steps that are added to the total)
QUIET = 1.0  # seconds before a bar appears


def quiet(done: int, more: int) -> None:
    """Move no bar."""


@contextmanager
def bar(progress: bool | None, what: str) -> Iterator[Advance]:
    """A function ``advance(done, more)`` that moves a tqdm bar and lengthens it; one that does nothing without progress.

    The bar appears after a second, and is closed however the block ends. Raises ``ImportError`` if tqdm is missing.
    """
    if not progress:
        yield quiet
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f"{what}: progress=True needs tqdm: pip install 'structmat[progress]'") from error
    with tqdm(total=0, desc=what, delay=QUIET, leave=False) as shown:

        def advance(done: int, more: int) -> None:
            shown.total += more
            shown.update(done)

        yield advance
