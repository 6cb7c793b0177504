"""Which backend applies an operator: by the library of its arrays, or as the user said with ``use_backend``."""

from __future__ import annotations

import warnings
from contextvars import ContextVar, Token
from types import TracebackType

from structmat import arrays
from structmat.backends.base import Backend
from structmat.backends.numpy import NumpyBackend
from structmat.backends.torch import TorchBackend, TorchOperatorBackend

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
    """Names of the backends whose library is installed (whether there is a GPU for ``"cupy"`` shows when it is used).

    Examples
    --------
    >>> import structmat as sm
    >>> "numpy" in sm.backends.available()
    True
    """
    libraries = {name: library for name, (_, library) in _backends.items()}
    known = {"numpy": "numpy", "numba": "numba", "cupy": "cupy"} | libraries
    needs = known | {"numba": "numba"}
    return tuple(name for name in known if _installed(needs[name]))


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
    ImportError, RuntimeError
        For ``"cupy"`` where CuPy cannot be imported, or finds no driver or device.

    Examples
    --------
    >>> import structmat as sm
    >>> with sm.use_backend("numpy"):
    ...     y = sm.Identity(3) @ [1.0, 2.0, 3.0]
    """

    def __init__(self, name: str) -> None:
        if name not in available():
            raise ValueError(f"use_backend: expected one of {', '.join(available())}; got {name!r}")
        backend = _load(name)
        library = _backends[name][1]
        if library == "cupy":
            arrays.cupy_with_device("use_backend")
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
    backend = _default.get(library)
    if backend is None:
        backend = _load("cupy") if library == "cupy" else _fastest_for_numpy()
    return backend


def _fastest_for_numpy() -> Backend:
    """Numba's backend where Numba is installed, else NumPy's; decided at the first application."""
    try:
        backend = _load("numba") if _installed("numba") else _load("numpy")
    except (
        ImportError,
        RuntimeError,
        AttributeError,
        OSError,
    ) as error:  # not for this Python or this NumPy, or broken
        warnings.warn(
            f"Numba cannot be imported ({error}): operators use the NumPy backend", RuntimeWarning, stacklevel=2
        )
        backend = _load("numpy")
    _default["numpy"] = backend
    return backend


def _installed(library: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(library) is not None


def _load(name: str) -> Backend:
    """The backend of this name; Numba's and CuPy's are imported when they are first asked for."""
    if name == "numba" and name not in _backends:
        from structmat.backends.numba import NumbaBackend

        register(NumbaBackend(), "numpy")
    if name == "cupy" and name not in _backends:
        from structmat.backends.cupy import CupyBackend

        register(CupyBackend(), "cupy")
    return _backends[name][0]


register(NumpyBackend(), "numpy")
register(TorchBackend(), "torch")
register(TorchOperatorBackend(), "torch")
_default: dict[str, Backend] = {"torch": _backends["torch"][0]}
