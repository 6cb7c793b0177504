"""These tests run with the stand-in at ``sys.modules["cupy"]``: in a process of their own (``test_cupy_standin.py``)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ACTIVE = os.environ.get("STRUCTMAT_STANDIN") == "1"
collect_ignore_glob = [] if ACTIVE else ["*.py"]

if ACTIVE:
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]
    import fakecupy

    fakecupy.install()


@pytest.fixture
def products_only():
    """The backend without a choice of kernels: every operator is applied by products."""
    import structmat as sm
    from structmat.backends.cupy import CupyBackend

    sm.backends.register(CupyBackend(kernels=("products",)), "cupy")
    with sm.use_backend("cupy"):
        yield
