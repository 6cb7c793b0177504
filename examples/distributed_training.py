"""Two processes train as one: DDP, FSDP2, tensor parallel; sharded checkpoints; calibration and conversion shared out.

A network of Block Tensor-Train and low-rank layers learns scikit-learn's digits, in one process and in two. Exits with an error
unless two processes come to the same numbers. Run it plainly, or by ``torchrun --nproc-per-node 2``. Nothing is downloaded; on
gloo and a CPU, so it says nothing about speed.
"""

from __future__ import annotations

import argparse
import copy
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import structmat.nn as snn

RATE, BATCH = 0.001, 128
STYLES = {"0": "column", "2": "row", "4": "rank"}  # of tensor parallelism; nothing is exchanged between 0 and 2


def network(device: str | None = None) -> nn.Sequential:
    """64 pixels, three structured layers, ten classes."""
    return nn.Sequential(
        snn.StructuredLinear(64, 512, structure="btt", blocks=8, rank=2, device=device),
        nn.GELU(),
        snn.StructuredLinear(512, 64, structure="btt", blocks=8, rank=2, device=device),
        nn.LayerNorm(64, device=device),
        snn.StructuredLinear(64, 64, structure="low_rank", rank=16, device=device),
        nn.GELU(),
        nn.Linear(64, 10, device=device),
    )


def main() -> None:
    """Start two processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="40 steps instead of 200")
    parser.add_argument("--plot", type=Path, help="where the picture of losses and differences goes")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit(launched())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        run(options)
    finally:
        dist.destroy_process_group()


def launched() -> int:
    """Run this file by torchrun, in two processes; returns the exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--master-addr=127.0.0.1", f"--master-port={free.getsockname()[1]}"]
    command = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node=2", *sys.argv]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    return subprocess.run(command, check=False, env=environment).returncode


def run(options: argparse.Namespace) -> None:
    """All comparisons, in every process; the first prints."""
    rank, size, started = dist.get_rank(), dist.get_world_size(), time.process_time()
    mesh = init_device_mesh("cpu", (size,))
    data, steps = digits(), 40 if options.quick else 200
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)  # of every batch
    torch.manual_seed(0)
    start = network()
    ways: dict[str, tuple[nn.Module, slice]] = {
        "one process": (copy.deepcopy(start), slice(None)),
        "DDP": (DistributedDataParallel(copy.deepcopy(start)), mine),
        "FSDP2": (sharded(copy.deepcopy(start), mesh), mine),
        "tensor parallel": (snn.parallelize(copy.deepcopy(start), mesh, STYLES), slice(None)),
    }
    trained = {name: train(model, data, rows, steps) for name, (model, rows) in ways.items()}
    alone = trained["one process"]
    accuracies = {name: accuracy(model, data) for name, (model, _) in ways.items()}
    checks: list[tuple[str, float, float]] = [
        ("one process: errors on the test set", 1 - accuracies["one process"], 0.2 if options.quick else 0.06)
    ]
    for name in ("DDP", "FSDP2", "tensor parallel"):
        checks.append((f"{name}: parameters after 3 steps, difference", distance(trained[name][3], alone[3]), 1e-5))
        checks.append(
            (
                f"{name}: accuracy after {steps} steps, difference",
                abs(accuracies[name] - accuracies["one process"]),
                0.02,
            )
        )
    for name in ("FSDP2", "tensor parallel"):
        checks.append((f"{name}: share of the parameters in a process", share(ways[name][0]), 0.5 + 0.06))
    checks.append(
        (
            "1e-3 over the same difference with gradients not summed",
            1e-3 / distance(train(copy.deepcopy(start), data, mine, 3)[3], alone[3]),
            1.0,
        )
    )
    with tempfile.TemporaryDirectory() as name:
        folder: list[Any] = [name]
        dist.broadcast_object_list(folder)
        checks += checkpoints(ways["FSDP2"][0], ways["tensor parallel"][0], start, mesh, Path(folder[0]))
        dist.barrier()
    checks += conversion(data, rank, size)
    seconds = torch.tensor(time.process_time() - started)
    dist.all_reduce(seconds)
    worst = report(checks)
    if rank == 0:
        print(f"\nCPU time of all {size} processes: {float(seconds):.0f} s")
        if options.plot:
            draw(trained, options.plot)
    if worst:
        raise SystemExit(f"bounds missed: {', '.join(worst)}")


# ---- training -----------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised images and classes of scikit-learn's digits: 1297 to train, 500 to test."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor((images[order] - 5) / 6, dtype=torch.float32)
    y = torch.tensor(classes[order])
    return x[:1297], y[:1297], x[1297:], y[1297:]


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model with the blocks of every layer spread by FSDP2."""
    for layer in model.modules():
        if isinstance(layer, snn.StructuredLinear):
            fully_shard(layer, mesh=mesh, shard_placement_fn=snn.shard_placement)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, data: tuple[Tensor, ...], rows: slice, steps: int) -> list[tuple[float, dict[str, Tensor]]]:
    """AdamW with the learning rates of the structure; the loss of every step, and the parameters before it and at the end."""
    optimizer = torch.optim.AdamW(snn.param_groups(model, RATE, weight_decay=0.01, base_width=64))
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(steps):
        batch = torch.randint(len(data[0]), (BATCH,), generator=generator)[rows]
        state = snapshot(model)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0][batch]), data[1][batch])
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        history.append((float(mean) / dist.get_world_size(), state))
    return [*history, (history[-1][0], snapshot(model))]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """The full parameters by their names in the unwrapped model, in double precision."""
    return {name: x.detach().double().clone() for name, x in snn.full_state_dict(model).items()}


def distance(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]]) -> float:
    """The largest difference of all parameters."""
    return max(float((a[1][name] - x).abs().max()) for name, x in b[1].items())


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, ...]) -> float:
    """Share of the test images that are recognised."""
    return float((model(data[2]).argmax(1) == data[3]).float().mean())


def share(model: nn.Module) -> float:
    """Share of all parameters that the fuller process holds."""
    held = torch.tensor(
        float(sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters()))
    )
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return float(held) / sum(p.numel() for p in model.parameters())


# ---- checkpoints, calibration, conversion ---------------------------------------------------------------------------------


def checkpoints(
    fsdp: nn.Module, parallel: nn.Module, start: nn.Module, mesh: DeviceMesh, folder: Path
) -> list[tuple[str, float, float]]:
    """Sharded checkpoints, read into models that are spread otherwise."""
    expected = (0.0, snapshot(fsdp))
    snn.save_sharded(fsdp, folder / "fsdp")
    again, single = sharded(copy.deepcopy(start), mesh), copy.deepcopy(start)
    spread = snn.parallelize(copy.deepcopy(start), mesh, STYLES)
    with torch.device("meta"):  # structure from the checkpoint, memory only after sharding
        dense: nn.Module = nn.Sequential(
            nn.Linear(64, 512),
            nn.GELU(),
            nn.Linear(512, 64),
            nn.LayerNorm(64),
            nn.Linear(64, 64),
            nn.GELU(),
            nn.Linear(64, 10),
        )
    meta = sharded(snn.apply_structure(dense, folder / "fsdp"), mesh).to_empty(device="cpu")
    checks = []
    for name, model in {
        "sharded to sharded": again,
        "sharded to one process": single,
        "sharded to tensor parallel": spread,
        "dense on the meta device, sharded, then loaded": meta,
    }.items():
        snn.load_sharded(model, folder / "fsdp")
        checks.append((f"checkpoint: {name}", distance((0.0, snapshot(model)), expected), 0.0))
    snn.save_sharded(parallel, folder / "parallel")
    snn.load_sharded(again, folder / "parallel")
    checks.append(
        ("checkpoint: tensor parallel to sharded", distance((0.0, snapshot(again)), (0.0, snapshot(parallel))), 0.0)
    )
    return checks


def conversion(data: tuple[Tensor, ...], rank: int, size: int) -> list[tuple[str, float, float]]:
    """Moments of half of the data in every process, summed; layers projected in turns."""
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10))
    plan = snn.plan(dense, {"0": "btt", "2": {"structure": "low_rank", "interpolative": True}, "4": None}, budget=0.5)
    batches = data[0].split(100)
    whole = snn.calibrate(dense, batches, plan)
    reduced = snn.calibrate(dense, batches[rank::size], plan).reduce()
    moments = max(float(np.linalg.norm(reduced[n].gram - whole[n].gram) / np.linalg.norm(whole[n].gram)) for n in whole)
    alone = snn.convert(copy.deepcopy(dense), plan, whole)
    together = snn.convert(copy.deepcopy(dense), plan, whole, group=dist.group.WORLD)
    difference = max(float((x - together.state_dict()[k]).abs().max()) for k, x in alone.state_dict().items())
    return [
        ("calibration: moments summed over processes, relative", moments, 1e-12),
        ("conversion: layers projected in turns, difference", difference, 0.0),
    ]


# ---- what is shown --------------------------------------------------------------------------------------------------------


def report(checks: list[tuple[str, float, float]]) -> list[str]:
    """Print the worst figure of all processes next to its bound; returns the names of those missed."""
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, [measured for _, measured, _ in checks])
    missed = []
    if dist.get_rank() == 0:
        print(f"{'':6} {'':62} {'measured':>9} {'required':>9}")
    for i, (what, _, most) in enumerate(checks):
        measured = max(figures[i] for figures in everyones)
        good = measured <= most
        if dist.get_rank() == 0:
            print(f"{'ok    ' if good else 'MISSED'} {what:62} {measured:9.2g} {most:9.2g}")
        if not good:
            missed.append(what)
    return missed


def draw(trained: dict[str, list[tuple[float, dict[str, Tensor]]]], path: Path) -> None:
    """The losses, and how far the parameters are from those of one process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, history), style in zip(trained.items(), ("-", "--", ":", "-."), strict=True):
        left.plot([loss for loss, _ in history[:-1]], style, label=name)
        if name != "one process":
            right.plot(
                [distance(a, b) for a, b in zip(history, trained["one process"], strict=True)], style, label=name
            )
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel="step", ylabel="largest difference to one process", yscale="log")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
