"""What two processes do to be compared with one: run by test_nn_distributed.py, every check once, figures as dictionaries.

Both processes hold a model of one process besides, which is what everything is compared with.
"""

from __future__ import annotations

import datetime
import os
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from two_processes_common import SIZE
from two_processes_data import conversion, data_parallel, groups, sharding
from two_processes_tensor import by_hand, parallel_models, tensor_parallel

CHECKS = (data_parallel, sharding, groups, tensor_parallel, parallel_models, by_hand, conversion)


def work(rank: int, port: int, folder: str) -> None:
    """One process: every check, its figures in a file; the first error ends it, and is written too."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", rank=rank, world_size=SIZE, timeout=timeout)
    found: dict[str, Any] = {}
    try:
        mesh = init_device_mesh("cpu", (SIZE,))
        warnings.simplefilter("error")
        for check in CHECKS:
            found[check.__name__] = check(mesh, rank, Path(folder))
    except Exception:
        found["error"] = traceback.format_exc()
        raise
    finally:
        torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
