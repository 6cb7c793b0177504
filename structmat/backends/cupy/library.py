"""CuPy, imported when it is first needed: what `import structmat` loads must not depend on a working CUDA installation."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def cupy() -> Any:
    """The module ``cupy``."""
    return sys.modules.get("cupy") or importlib.import_module("cupy")


def module(name: str) -> Any:
    """A module of CuPy that its front door does not import, such as ``cupy_backends.cuda.libs.cublas``."""
    return sys.modules.get(name) or importlib.import_module(name)
