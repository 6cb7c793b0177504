"""Which backend applies an operator: by the library of its arrays, or as the user said with ``use_backend``."""

from __future__ import annotations

from contextvars import ContextVar, Token
from types import TracebackType

from structmat.backends.base import Backend
from structmat.backends.numpy import NumpyBackend
from structmat.backends.torch import TorchBackend

_backends: dict[str, tuple[Backend, str]] = {}  # name -> (backend, library of the arrays it takes)
_chosen: ContextVar[dict[str, Backend]] = ContextVar("structmat_backends", default={})  # noqa: B039 (never mutated)


def register(backend: Backend, library: str) -> None:
    """Make a backend known by its name, for arrays of ``library`` (``"numpy"``, ``"torch"``, ``"cupy"``).

    Examples
    --------
    >>> import structmat as sm
    >>> from structmat.backends.base import Backend
    >>> class Plain(Backend):
    ...     name = "plain"
    >>> sm.backends.register(Plain(), "numpy")
    >>> "plain" in sm.backends.available()
    True
    """
    _backends[backend.name] = (backend, library)


def available() -> tuple[str, ...]:
    """Names of the backends that can be used now.

    Examples
    --------
    >>> import structmat as sm
    >>> "numpy" in sm.backends.available()
    True
    """
    import importlib.util

    libraries = {library for _, library in _backends.values()}
    present = {name for name in libraries if importlib.util.find_spec(name) is not None}
    return tuple(name for name, (_, library) in _backends.items() if library in present)


class use_backend:  # noqa: N801 (reads as a verb: with use_backend("numpy"): ...)
    """Choose the backend for the arrays of its library, from here on in this thread or for a ``with`` block.

    Parameters
    ----------
    name
        One of :func:`available`.

    Raises
    ------
    ValueError
        If no such backend is registered; the message lists those that are.

    Examples
    --------
    >>> import structmat as sm
    >>> with sm.use_backend("numpy"):
    ...     y = sm.Identity(3) @ [1.0, 2.0, 3.0]
    """

    def __init__(self, name: str) -> None:
        if name not in _backends:
            raise ValueError(f"use_backend: expected one of {', '.join(available())}; got {name!r}")
        backend, library = _backends[name]
        self._token: Token[dict[str, Backend]] = _chosen.set({**_chosen.get(), library: backend})

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _chosen.reset(self._token)


def backend_for(library: str | None) -> Backend:
    """The backend for arrays of a library; operators without arrays count as NumPy's."""
    chosen = _chosen.get()
    library = library or "numpy"
    if chosen and library in chosen:
        return chosen[library]
    return _default[library]


register(NumpyBackend(), "numpy")
register(TorchBackend(), "torch")
_default: dict[str, Backend] = {"numpy": _backends["numpy"][0], "torch": _backends["torch"][0], "cupy": Backend()}
