"""Modules of ``tests`` are imported here too, also where only this folder is run."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
NEEDS_BFLOAT16 = ["fake*.py", "emulated.py", "test_cupy_standin.py", "test_gpu_products.py"]
collect_ignore_glob = (
    [] if find_spec("ml_dtypes") else NEEDS_BFLOAT16
)  # a requirement of the tests where there are GPUs
