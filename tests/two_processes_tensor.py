"""Tensor-parallel layers and models of two processes against one: figures as a dictionary."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from two_processes_common import SIZE, difference, full, largest, raised, trained

import structmat.nn as snn
from structmat.nn import schemes

LAYERS = {
    "btt": ("btt", {"blocks": (4, 2), "rank": 4}, (24, 16)),
    "btt of rank 1": ("btt", {"blocks": 4}, (24, 16)),
    "btt, odd rank": ("btt", {"blocks": (2, 4), "rank": 3}, (24, 16)),
    "one row block": ("btt", {"blocks": (1, 4), "rank": 2}, (24, 16)),
    "padded": ("btt", {"blocks": 4}, (23, 15)),
    "monarch": ("monarch", {"blocks": (4, 2), "rank": 2}, (24, 16)),
    "low_rank": ("low_rank", {"rank": 4}, (24, 16)),
    "low_rank of rank 1": ("low_rank", {"rank": 1}, (24, 16)),
    "block_diagonal": ("block_diagonal", {"blocks": 4}, (24, 16)),
    "kronecker": ("kronecker", {"shapes": [(4, 2), (6, 8)]}, (24, 16)),
    "butterfly": ("butterfly", {}, (16, 16)),
}


def layer(name: str, **options: Any) -> snn.StructuredLinear:
    structure, own, (m, n) = LAYERS[name]
    torch.manual_seed(0)
    return snn.StructuredLinear(n, m, structure=structure, **own, **options)


def compared(reference: nn.Module, parallel: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Largest relative differences of the outputs and of all gradients, and how the output is placed."""
    dtype = next(reference.parameters()).dtype
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    again = x.clone().requires_grad_()
    x.requires_grad_()
    expected = reference(x)
    weights = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    y = parallel(again)
    whole = y.full_tensor() if isinstance(y, DTensor) else y
    (whole * weights).sum().backward()
    pairs = [(whole, expected), (again.grad, x.grad)]
    for a, b in zip(parallel.parameters(), reference.parameters(), strict=True):
        pairs.append((full(a.grad).reshape(b.shape), b.grad))
    return {
        "difference": max(difference(a, b) / max(1.0, float(full(b).abs().max())) for a, b in pairs),
        "placements": str(getattr(y, "placements", "full")),
    }


def tensor_parallel(mesh: DeviceMesh, rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in LAYERS:
        for style in ("block", "column", "row", "rank"):
            reference = layer(name, dtype=torch.float64)
            model = copy.deepcopy(reference)
            refused = raised(lambda m=model, s=style: snn.parallelize(m, mesh, s))
            if refused != "nothing":
                same = type(model) is snn.StructuredLinear and largest(model, reference) == 0.0
                found[name, style] = {"refused": refused, "unchanged": same}
                continue
            assert isinstance(model, snn.StructuredLinear)
            found[name, style] = compared(reference, model, (3, 5, reference.in_features))
            held = sum(f.to_local().numel() for f in model.factors)
            found[name, style]["held"] = held / sum(f.numel() for f in reference.factors)
            found[name, style]["dense"] = difference(model.to_dense(), reference.to_dense())
            found[name, style]["operator"] = difference(model.operator.to_dense(), reference.operator.to_dense())
            found[name, style]["linear"] = difference(model.to_linear().weight, reference.to_linear().weight)
            with CommDebugMode() as counted, torch.no_grad():
                model(torch.zeros(7, reference.in_features, dtype=torch.float64))
            found[name, style]["exchanges"] = {
                str(k).split(".")[-1]: v for k, v in counted.get_comm_counts().items() if v
            }
    return found


def parallel_models(mesh: DeviceMesh, rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def pair(structure: str = "btt", **options: Any) -> nn.Sequential:
        torch.manual_seed(0)
        up = snn.StructuredLinear(64, 128, structure=structure, blocks=4, rank=3, **options)
        return nn.Sequential(
            up, nn.GELU(), snn.StructuredLinear(128, 64, structure=structure, blocks=4, rank=3, **options)
        )

    for styles in (("column", "row"), ("block", "block"), ("block", "row")):
        model = snn.parallelize(pair(dtype=torch.float64), mesh, {"0": styles[0], "2": styles[1]})
        key = " then ".join(styles)
        found[key] = compared(pair(dtype=torch.float64), model, (6, 64))
        with CommDebugMode() as counted, torch.no_grad():
            model(torch.zeros(6, 64, dtype=torch.float64))
        found[key]["exchanges"] = {str(k).split(".")[-1]: v for k, v in counted.get_comm_counts().items() if v}

    def whole() -> nn.Sequential:
        return nn.Sequential(*pair(), nn.LayerNorm(64), nn.Linear(64, 5))

    styles = {"0": "block", "2": "row"}
    reference = trained(whole())
    model = trained(snn.parallelize(whole(), mesh, styles))
    found["trained"] = largest(model, reference)
    found["state"] = max(difference(snn.full_state_dict(model)[k], x) for k, x in reference.state_dict().items())
    snn.save_sharded(model, folder / "parallel", model.optimizer)
    views = snn.parallelize(whole(), mesh, {"0": "column", "2": "row"})  # holds a view of a factor
    snn.load_sharded(views, folder / "parallel")
    found["block to column"] = largest(views, model)
    found["held as a view"] = [tuple(f.shape) for f in views[0].factors]
    snn.save_sharded(views, folder / "views")
    single = trained(whole(), steps=1)
    snn.load_sharded(single, folder / "views")
    found["column to single"] = largest(single, model)
    snn.load_sharded(model, folder / "views")
    found["column to block"] = largest(model, single)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own
        model = torch.compile(snn.parallelize(layer("btt"), mesh), fullgraph=True, backend="aot_eager")
        found["compiled"] = compared(layer("btt"), model, (6, 16))["difference"]

    joined = snn.parallelize(pair(dtype=torch.float64), mesh, gather=True)
    found["gathered"] = compared(pair(dtype=torch.float64), joined, (6, 64))

    grid = init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("dp", "tp"))
    both = snn.parallelize(whole(), grid["tp"], styles)
    for part in (both[0], both[2], both):
        fully_shard(part, mesh=grid["dp"])
    found["fsdp2 of parallel"] = largest(trained(both), reference)

    torch.manual_seed(0)
    empty = snn.parallelize(pair(device="meta"), mesh, {"0": "column", "2": "row"}).to_empty(device="cpu")
    torch.manual_seed(5 + rank)
    for i in (0, 2):
        empty[i].reset_parameters()
    drawn = pair(device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    for i in (0, 2):
        drawn[i].reset_parameters()
    found["drawn"] = max(largest(empty[0], drawn[0]), largest(empty[2], drawn[2]))
    biases = [torch.empty(64) for _ in range(SIZE)]
    dist.all_gather(biases, empty[2].bias.to_local().detach().contiguous())
    found["bias is the same in all"] = difference(biases[0], biases[1])

    one = snn.parallelize(layer("btt"), mesh, "row")
    found["one row of features"] = difference(one(torch.ones(16)), layer("btt")(torch.ones(16)))
    found["no rows"] = tuple(one(torch.ones(0, 16)).shape)
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = str(one(torch.ones(2, 16)).dtype)
    found["wrong width"] = raised(lambda: one(torch.ones(2, 8)))
    found["wrong dtype"] = raised(lambda: one(torch.ones(2, 16, dtype=torch.float64)))
    found["again"] = raised(lambda: snn.parallelize(one, mesh))
    found["no layers"] = raised(lambda: snn.parallelize(nn.Linear(4, 4), mesh))
    found["two dimensions"] = raised(lambda: snn.parallelize(layer("btt"), grid))
    found["no mesh"] = raised(lambda: snn.parallelize(layer("btt"), 2))
    found["style"] = raised(lambda: snn.parallelize(layer("btt"), mesh, "rows"))
    mixed = nn.Sequential(layer("btt"), layer("butterfly"), layer("padded"))
    found["some refused"] = raised(lambda: snn.parallelize(mixed, mesh))
    found["none changed"] = all(type(m) is snn.StructuredLinear for m in mixed)
    tied = [layer("low_rank"), layer("low_rank")]
    tied[1].factors[1] = tied[0].factors[1]
    spread = snn.parallelize(nn.ModuleList(tied), mesh, "rank")
    found["shared factor"] = spread[0].factors[1] is spread[1].factors[1]
    found |= _planted(mesh)
    return found


def _planted(mesh: DeviceMesh) -> dict[str, Any]:
    """Differences that the comparison finds where an exchange is left out."""
    found = {}
    cases = {
        "summed": ("btt", "row", lambda x, mesh: x),
        "copied": ("btt", "column", lambda x, mesh: x),
        "exchanged": (
            "btt",
            "block",
            lambda x, mesh, split, join: x.repeat_interleave(SIZE, join).chunk(SIZE, split)[0],
        ),
        "joined": ("low_rank", "column", lambda x, mesh, axis: torch.cat([x] * SIZE, axis)),
    }
    for name, (kind, style, wrong) in cases.items():
        with mock.patch.object(schemes, name, wrong):
            model = snn.parallelize(layer(kind, dtype=torch.float64), mesh, style)
            found[f"planted: {name}"] = compared(layer(kind, dtype=torch.float64), model, (6, 16))["difference"]
    return found


def by_hand(mesh: DeviceMesh, rank: int, folder: Path) -> dict[str, Any]:
    """The block scheme in operations of DTensor, and the low-rank layer as torch's own two linear layers."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    one = layer("btt of rank 1")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    outer, inner = one.factors  # (f, e, g), (g, f, a)
    blocks = distribute_tensor(x.reshape(5, 4, 4).permute(1, 0, 2).contiguous(), mesh, [Shard(0)])
    z = torch.bmm(blocks, distribute_tensor(inner.detach(), mesh, [Shard(0)]).transpose(1, 2))  # (g, b, f)
    z = z.permute(2, 1, 0).redistribute(placements=[Shard(0)])  # (f, b, g)
    y = torch.bmm(z, distribute_tensor(outer.detach(), mesh, [Shard(0)]).transpose(1, 2))  # (f, b, e)
    y = y.permute(1, 0, 2).reshape(5, 24).full_tensor() + one.bias
    parallel = snn.parallelize(layer("btt of rank 1"), mesh)
    found = {"btt": difference(parallel(x), y)}

    low = layer("low_rank")
    two = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 24))
    with torch.no_grad():
        two[0].weight.copy_(low.factors[1])
        two[1].weight.copy_(low.factors[0])
        two[1].bias.copy_(low.bias)
    two = parallelize_module(two, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    found["low_rank"] = difference(snn.parallelize(low, mesh, "row")(x), two(x))
    return found
