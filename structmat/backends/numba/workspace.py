"""Where programs keep intermediates: areas of the workspace, spread over the sets of the first-level cache."""

from __future__ import annotations

from structmat.backends.numba.simd import VECTOR_BYTES

PAGE_BYTES = 4096


class Workspace:
    """Hands out areas, in elements; rows of them at multiples of ``conflict`` bytes share few sets of the cache."""

    def __init__(self, itemsize: int, conflict: int) -> None:
        self.itemsize, self.conflict = itemsize, conflict
        self.lanes = VECTOR_BYTES // itemsize
        self.total = 0

    def take(self, elements: int) -> int:
        """The offset of a new area, one vector beyond a page."""
        start, page = self.total, PAGE_BYTES // self.itemsize
        self.total += -(-elements // page) * page + self.lanes
        return start

    def pitch(self, elements: int) -> int:
        """The distance of rows of so many elements at which they do not collide."""
        return elements + self.lanes if elements * self.itemsize % self.conflict == 0 else elements
