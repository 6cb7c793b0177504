"""Data parallel, sharded and converted models of two processes against one: figures as a dictionary."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes_common import SIZE, difference, full, largest, network, raised, sharded, trained

import structmat.nn as snn
from structmat.nn.scaling import sigma


def data_parallel(mesh: DeviceMesh, rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    start = network()
    reference = trained(copy.deepcopy(start))
    mine = slice(6 * rank, 6 * rank + 6)
    found: dict[str, Any] = {"moved": largest(reference, start)}
    ddp = trained(DistributedDataParallel(copy.deepcopy(start)), mine)
    found["ddp"] = largest(ddp, reference)
    fsdp = trained(sharded(copy.deepcopy(start), mesh), mine)
    found["fsdp2"] = largest(fsdp, reference)
    found["local shapes"] = {n: tuple(p.to_local().shape) for n, p in fsdp.named_parameters()}
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # compiled kernels, on memory that is freed between calls
        found["evaluated"] = max(difference(fsdp(x), reference(x)) for _ in range(2))
        found["evaluated by ddp"] = difference(ddp(x), reference(x))
    state = snn.full_state_dict(fsdp)
    found["full state"] = max(difference(state[n], p) for n, p in fsdp.named_parameters())
    found["full state shapes"] = {n: tuple(x.shape) for n, x in state.items()} == {
        n: tuple(x.shape) for n, x in start.state_dict().items()
    }
    found["full state of ddp"] = list(snn.full_state_dict(ddp)) == list(start.state_dict())
    single = copy.deepcopy(start)
    single.load_state_dict(state)
    found["full state loaded"] = largest(single, fsdp)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mixed = fully_shard(copy.deepcopy(start), mesh=mesh, mp_policy=policy)
    y = mixed(x)
    y.float().sum().backward()
    found["mixed precision"] = [str(y.dtype), sorted({str(p.grad.dtype) for p in mixed.parameters()})]
    alone = trained(copy.deepcopy(start), mine)  # as if gradients were never summed
    found["planted: no exchange of gradients"] = largest(alone, reference)

    found |= _checkpoints(fsdp, ddp, start, mesh, folder)
    return found


def _checkpoints(fsdp: Any, ddp: Any, start: nn.Module, mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    snn.save_sharded(fsdp, folder / "sharded", fsdp.optimizer)
    again = trained(sharded(copy.deepcopy(start), mesh), steps=1)
    snn.load_sharded(again, folder / "sharded", again.optimizer)
    found["sharded to sharded"] = largest(again, fsdp)
    found["state of the optimizer"] = max(
        difference(again.optimizer.state[a]["exp_avg"], fsdp.optimizer.state[b]["exp_avg"])
        for a, b in zip(again.parameters(), fsdp.parameters(), strict=True)
    )
    single = copy.deepcopy(start)
    snn.load_sharded(single, folder / "sharded")
    found["sharded to single"] = largest(single, fsdp)
    snn.save_sharded(ddp, folder / "ddp")
    snn.load_sharded(again, folder / "ddp")
    found["ddp to sharded"] = largest(again, ddp)

    with torch.device("meta"):  # the dense model learns its structure from the checkpoint
        dense: nn.Module = nn.Sequential(
            nn.Linear(64, 128),
            nn.GELU(),
            nn.Linear(128, 64),
            nn.LayerNorm(64),
            nn.Linear(64, 64),
            nn.Linear(64, 35),
            nn.Linear(35, 5),
        )
    snn.apply_structure(dense, folder / "sharded")
    meta = sharded(dense, mesh).to_empty(device="cpu")
    snn.load_sharded(meta, folder / "sharded")
    found["meta to load"] = largest(meta, fsdp)

    other = copy.deepcopy(start)
    other[2] = snn.StructuredLinear(128, 64, structure="low_rank", rank=8)
    before = copy.deepcopy(other.state_dict())
    found["other structure"] = raised(lambda: snn.load_sharded(other, folder / "sharded"))
    bias = copy.deepcopy(start)
    bias[3] = nn.LayerNorm(64, bias=False)
    found["other keys"] = raised(lambda: snn.load_sharded(bias, folder / "sharded"))
    found["unchanged"] = max(difference(before[k], x) for k, x in other.state_dict().items())
    found["load into a sharded model"] = raised(lambda: snn.load(fsdp, folder / "no.safetensors"))
    found["save of a sharded model"] = raised(lambda: snn.save(fsdp, folder / "no.safetensors"))
    return found


def sharding(mesh: DeviceMesh, rank: int, folder: Path) -> dict[str, Any]:
    """Shapes of shards, and layers that are drawn after they have been sharded."""

    class Thin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.randn(1, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.factor[0]

    torch.manual_seed(0)
    thin, placed = Thin(), Thin()
    fully_shard(thin, mesh=mesh)
    fully_shard(placed, mesh=mesh, shard_placement_fn=snn.shard_placement)
    placed(torch.ones(2, 8)).sum().backward()
    found: dict[str, Any] = {
        "axis of length 1": tuple(thin.factor.to_local().shape),
        "axis of length 1, placed": tuple(placed.factor.to_local().shape),
        "its gradient": tuple(placed.factor.grad.to_local().shape),
    }
    uneven = snn.StructuredLinear(63, 25, structure="btt", blocks=(5, 7))
    fully_shard(uneven, mesh=mesh)
    uneven(torch.ones(3, 63)).sum().backward()
    found["uneven"] = [tuple(f.to_local().shape) for f in uneven.factors]

    def drawn_after(seed: int) -> nn.Module:
        model = sharded(network("meta"), mesh).to_empty(device="cpu")
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, snn.StructuredLinear):
                module.reset_parameters()
        return model

    same, different = drawn_after(3), drawn_after(3 + rank)
    layers = [i for i, module in enumerate(same) if isinstance(module, snn.StructuredLinear)]
    torch.manual_seed(3)
    reference = network("meta").to_empty(device="cpu")
    for module in reference:
        if isinstance(module, snn.StructuredLinear):
            module.reset_parameters()
    found["drawn as by one process"] = max(largest(same[i], reference[i]) for i in layers)
    found["drawn from other seeds"] = max(largest(different[i], reference[i]) for i in layers)
    halves = [full(f).chunk(SIZE) for i in layers for f in different[i].factors if f.shape[0] % SIZE == 0]
    found["halves differ by"] = min(float((a - b).abs().max()) for a, b in halves)
    found["standard deviation"] = max(
        abs(math.log(float(full(same[i].factors[f.slot]).std()) / sigma(f, "spectral")))
        for i in layers[:3]
        for f in same[i].program.factors
        if full(same[i].factors[f.slot]).numel() > 500
    )
    return found


def groups(mesh: DeviceMesh, rank: int, folder: Path) -> dict[str, Any]:
    """Learning rates and weight decays by name, through every wrapper."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def rates(model: nn.Module) -> dict[str, tuple[float, float]]:
        made = snn.param_groups(model, 0.1, weight_decay=0.5, base_width=32)
        return {name: (g["lr"], g["weight_decay"]) for g in made for name in g["names"]}

    inner = network()
    for i in (0, 2):
        inner[i] = checkpoint_wrapper(inner[i])
    torch.manual_seed(0)
    wrapped = {
        "ddp": DistributedDataParallel(network()),
        "fsdp2": sharded(network(), mesh),
        "checkpoint": checkpoint_wrapper(network()),
        "checkpoint inside": inner,
        "fsdp2 of checkpoint": sharded(checkpoint_wrapper(network()), mesh),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.compile's own imports
        wrapped |= {
            "compile": torch.compile(network()),
            "compile of ddp": torch.compile(wrapped["ddp"]),
            "ddp of compile": DistributedDataParallel(torch.compile(network())),
            "fsdp2 of compile": torch.compile(wrapped["fsdp2"]),
        }
    plain = rates(network())
    found: dict[str, Any] = {name: rates(model) == plain for name, model in wrapped.items()}
    found["distinct rates"] = len(set(plain.values()))
    plan = snn.plan(nn.Sequential(nn.Linear(35, 5)), {"0": {"structure": "low_rank", "rank": 1}})
    for name, model in (("ddp", wrapped["ddp"]), ("fsdp2", wrapped["fsdp2"]), ("compile", wrapped["compile"])):
        found[f"convert of {name}"] = raised(lambda m=model: snn.convert(m, plan))
        found[f"parallelize of {name}"] = raised(lambda m=model: snn.parallelize(m, mesh))
    found["densify of fsdp2"] = raised(lambda: snn.densify(wrapped["fsdp2"]))
    return found


# ---- calibration and conversion -------------------------------------------------------------------------------------------


def conversion(mesh: DeviceMesh, rank: int, folder: Path) -> dict[str, Any]:
    def dense() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 16), nn.Linear(16, 8)
        )

    batches = [torch.randn(200, 32, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    plan = snn.plan(
        dense(),
        {"0": "btt", "2": {"structure": "low_rank", "interpolative": True}, "4": "low_rank", "5": "monarch"},
        budget=0.5,
    )
    alone = snn.calibrate(dense(), batches, plan)
    reduced = snn.calibrate(dense(), batches[rank::SIZE], plan).reduce()
    found: dict[str, Any] = {
        "moments": max(
            float(abs(getattr(reduced[n], part) - getattr(alone[n], part)).max() / abs(getattr(alone[n], part)).max())
            for n in alone
            for part in ("gram", "total")
        ),
        "samples": [reduced[n].count for n in alone] == [alone[n].count for n in alone],
        "planted: not reduced": float(
            abs(snn.calibrate(dense(), batches[rank::SIZE], plan)["0"].gram - alone["0"].gram).max()
            / abs(alone["0"].gram).max()
        ),
    }
    fewer = snn.calibrate(dense(), batches, ["0"] if rank else ["0", "2"])
    found["other layers"] = raised(fewer.reduce)
    single = snn.convert(dense(), plan, alone, threads=2)
    model = snn.convert(dense(), plan, alone, threads=2, group=dist.group.WORLD)
    state = model.state_dict()
    found["same keys"] = list(state) == list(single.state_dict())
    found["bits"] = all(torch.equal(state[k], x) for k, x in single.state_dict().items())
    everyones: list[Any] = [None] * SIZE
    dist.all_gather_object(everyones, {k: x.tolist() for k, x in state.items()})
    found["same in all"] = everyones[0] == everyones[1]
    found["report"] = str(snn.report(model)) == str(snn.report(single))
    share = snn.plan(dense(), {"2": "low_rank"} if rank else {"0": "low_rank"}, budget=0.5)
    found["other plans"] = raised(lambda: snn.convert(dense(), share, alone, group=dist.group.WORLD))
    broken, before = dense(), dense()
    if rank:  # the second largest layer is the second process's
        with torch.no_grad():
            for candidate in (broken, before):
                candidate[0].weight[0, 0] = math.nan
    found["failure elsewhere"] = raised(lambda: snn.convert(broken, plan, alone, group=dist.group.WORLD))
    found["left dense"] = all(type(a) is type(b) for a, b in zip(broken, before, strict=True))
    return found
