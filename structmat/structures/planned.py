"""What operators have in common that a backend applies: chains and Kronecker products."""

from __future__ import annotations

from structmat.arrays import Array
from structmat.backends.base import Backend, Explanation, Plan
from structmat.backends.selection import backend_for
from structmat.operator import Operator


class Planned(Operator, abstract=True):
    """An operator that is applied by a plan, made once for every backend that it meets, and kept."""

    __slots__ = ()

    def _plan_by(self, backend: Backend) -> Plan:
        """A new plan."""
        raise NotImplementedError

    def _plan(self) -> Plan:
        backend = backend_for(self.kind)
        plan = self._plans.get(backend)
        if plan is None:
            plan = self._plans[backend] = self._plan_by(backend)
        return plan

    def _matmat(self, x: Array) -> Array:
        return self._plan().columns(x)

    def _rows(self, x: Array) -> Array:
        return self._plan().rows(x)

    def _columns_into(self, x: Array, out: Array) -> Array:
        return self._plan().columns(x, out)

    def _vector(self, x: Array) -> Array:
        return self._plan().vector(x)

    def _add(self, x: Array, y: Array, rows: bool) -> bool:
        return self._plan().add(x, y, rows)

    def _once(self, x: Array) -> Array:
        return self._plan().once(x)

    def _explain(self, k: int, rows: bool) -> Explanation:
        return self._plan().explain(k, rows)
