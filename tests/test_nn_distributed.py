"""Two processes (gloo) against one: data parallel, sharded, tensor parallel, checkpoints, calibration, conversion.

The two processes run once, all checks of ``two_processes.py`` one after the other; every test here reads its figures.
"""

from __future__ import annotations

import copy
import json
import socket
import time

import pytest

torch = pytest.importorskip("torch")

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch was built without torch.distributed or gloo", allow_module_level=True)

import two_processes  # noqa: E402
from torch import nn  # noqa: E402

import structmat as sm  # noqa: E402
import structmat.nn as snn  # noqa: E402

LIMIT = 400  # seconds, on a machine with much else to do


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """The figures of both processes, which must agree on those that are compared."""
    folder = tmp_path_factory.mktemp("processes")
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no port on the local machine: {error}")
    context = torch.multiprocessing.spawn(two_processes.work, (port, str(folder)), two_processes.SIZE, join=False)
    deadline = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                pytest.fail(f"the two processes were not done after {LIMIT} s")
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        pytest.fail(f"a check failed in one of the two processes: {error}")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(two_processes.SIZE)]


@pytest.fixture(params=range(two_processes.SIZE), ids=lambda rank: f"process {rank}")
def found(figures, request):
    return figures[request.param]


# ---- data parallel and sharded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_training_equals_that_of_one_process(found, way):
    assert found["data_parallel"]["moved"] > 0.01  # by three steps
    assert found["data_parallel"][way] <= 1e-5
    assert found["data_parallel"]["planted: no exchange of gradients"] > 1e-3


def test_wrapped_models_are_evaluated(found):
    assert found["data_parallel"]["evaluated"] <= 1e-4
    assert found["data_parallel"]["evaluated by ddp"] <= 1e-4
    assert found["data_parallel"]["mixed precision"] == ["torch.bfloat16", ["torch.float32"]]


def test_shards_are_blocks(figures):
    """FSDP2 cuts axis 0 of every factor; where that has 5 or 7 blocks, one process has more of them."""
    shapes = [f["data_parallel"]["local shapes"] for f in figures]
    for rank, rows in enumerate(((3, 4), (2, 3))):
        local = shapes[rank]
        assert local["0.factors.0"] == (4, 16, 16)
        assert local["0.factors.1"] == (4, 16, 8)
        assert local["2.factors.0"] == (32, 16)
        assert local["2.factors.1"] == (8, 128)
        assert local["4.factors.0"] == local["4.factors.1"] == (4, 8)
        assert (local["5.factors.0"][0], local["5.factors.1"][0]) == rows
        assert local["0.bias"] == (64,)
    assert figures[0]["sharding"]["uneven"] == [(3, 5, 7), (4, 5, 9)]
    assert figures[1]["sharding"]["uneven"] == [(2, 5, 7), (3, 5, 9)]


def test_placement_of_an_axis_of_length_one(figures):
    assert [f["sharding"]["axis of length 1"] for f in figures] == [(1, 8, 8), (0, 8, 8)]  # one process has nothing
    for f in figures:
        assert f["sharding"]["axis of length 1, placed"] == f["sharding"]["its gradient"] == (1, 4, 8)


def test_full_state_dict(found):
    state = found["data_parallel"]
    assert state["full state"] == state["full state loaded"] == 0.0
    assert state["full state shapes"]
    assert state["full state of ddp"]


def test_layers_are_drawn_after_sharding(found):
    """meta -> fully_shard -> to_empty -> reset_parameters: the draw of one process, cut, whatever seed the others have."""
    drawn = found["sharding"]
    assert drawn["drawn as by one process"] == drawn["drawn from other seeds"] == 0.0
    assert drawn["halves differ by"] > 1e-3
    assert drawn["standard deviation"] < 0.1
    assert found["parallel_models"]["drawn"] == found["parallel_models"]["bias is the same in all"] == 0.0


@pytest.mark.parametrize(
    "wrapper",
    [
        "ddp",
        "fsdp2",
        "compile",
        "checkpoint",
        "checkpoint inside",
        "fsdp2 of checkpoint",
        "compile of ddp",
        "ddp of compile",
        "fsdp2 of compile",
    ],
)
def test_parameter_groups_are_the_same_by_name(found, wrapper):
    assert found["groups"][wrapper]
    assert found["groups"]["distinct rates"] > 4


@pytest.mark.parametrize("call", ["convert", "parallelize"])
@pytest.mark.parametrize(
    ("wrapper", "name"), [("ddp", "DistributedDataParallel"), ("fsdp2", "fully_shard"), ("compile", "torch.compile")]
)
def test_wrapped_models_are_refused(found, call, wrapper, name):
    message = found["groups"][f"{call} of {wrapper}"]
    assert message.startswith(f"ValueError: {call}: the model is wrapped already ({name})")
    assert "fully_shard" in found["groups"]["densify of fsdp2"]


# ---- checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["sharded to sharded", "sharded to single", "ddp to sharded", "meta to load", "state of the optimizer"]
)
def test_checkpoints_of_sharded_models(found, way):
    assert found["data_parallel"][way] == 0.0


@pytest.mark.parametrize("way", ["block to column", "column to single", "column to block"])
def test_checkpoints_of_tensor_parallel_models(found, way):
    assert found["parallel_models"][way] == 0.0
    assert found["parallel_models"]["held as a view"] == [(4, 32, 12), (4, 3, 4, 16)]


def test_checkpoints_that_do_not_fit_are_refused(found):
    state = found["data_parallel"]
    assert "structured otherwise than the model: 2;" in state["other structure"]
    assert "1 unexpected: model.3.bias" in state["other keys"]
    assert state["unchanged"] == 0.0
    assert "use save_sharded" in state["save of a sharded model"]
    assert "wrapped already (fully_shard)" in state["load into a sharded model"]


# ---- tensor parallel ------------------------------------------------------------------------------------------------------

TWO_WAY = {"block": {"alltoall_base_": 1}, "column": {}, "row": {"all_reduce": 1}, "rank": {"all_reduce": 1}}
EXCHANGES = {  # of a forward pass; None: refused
    "btt": TWO_WAY,
    "btt of rank 1": TWO_WAY | {"rank": None},
    "btt, odd rank": TWO_WAY | {"rank": None},
    "one row block": {"block": None, "column": None, "row": {"all_reduce": 1}, "rank": {"all_reduce": 1}},
    "padded": dict.fromkeys(TWO_WAY),
    "monarch": {"block": None, "column": None, "row": {"all_reduce": 1}, "rank": {"all_reduce": 1}},
    "low_rank": {"block": {"all_reduce": 1}, "column": {"all_gather_into_tensor": 1}, "row": {"all_reduce": 1}}
    | {"rank": {"all_reduce": 1}},
    "low_rank of rank 1": {"block": {"all_reduce": 1}, "column": None, "row": None, "rank": None},
    "block_diagonal": {"block": {}, "column": {}, "row": None, "rank": None},
    "kronecker": {"block": {"alltoall_base_": 2}, "column": {"alltoall_base_": 1}, "row": {"all_reduce": 1}}
    | {"rank": None},
    "butterfly": dict.fromkeys(TWO_WAY),
}
CASES = [(name, style) for name, styles in EXCHANGES.items() for style in styles]


@pytest.mark.parametrize(("name", "style"), [case for case in CASES if EXCHANGES[case[0]][case[1]] is not None])
def test_parallel_layers_equal_one_process(found, name, style):
    """Outputs and all gradients; plain placements; 1/P of the factors in every process; as many exchanges as promised."""
    got = found["tensor_parallel"][name, style]
    assert got["difference"] <= 1e-12
    assert got["placements"] == ("(Shard(dim=2),)" if style in ("block", "column") else "full")
    assert got["exchanges"] == EXCHANGES[name][style]
    assert got["held"] == 0.5 or name == "kronecker"
    assert got["dense"] == got["operator"] == got["linear"] == 0.0


REASONS = {
    "btt of rank 1": "2 processes do not divide the rank (1)",
    "btt, odd rank": "2 processes do not divide the rank (3)",
    "one row block": "2 processes do not divide the output blocks (1)",
    "padded": "are padded: ",
    "monarch": "interleaved",
    "low_rank of rank 1": "2 processes do not divide the rank (1)",
    "block_diagonal": "nothing to add up",
    "kronecker": "no ranks",
    "butterfly": "no scheme for this structure",
}


@pytest.mark.parametrize(("name", "style"), [case for case in CASES if EXCHANGES[case[0]][case[1]] is None])
def test_parallel_layers_are_refused_with_the_numbers(found, name, style):
    got = found["tensor_parallel"][name, style]
    assert REASONS[name] in got["refused"] or (name, style) == ("padded", "rank")
    assert got["refused"].startswith("ValueError: parallelize: the model (")
    assert got["unchanged"]


def test_against_operations_of_torch(found):
    """The block scheme written with DTensor, and low rank as ColwiseParallel and RowwiseParallel."""
    assert found["by_hand"]["btt"] <= 1e-6
    assert found["by_hand"]["low_rank"] <= 1e-6


@pytest.mark.parametrize(
    ("styles", "exchanges", "placements"),
    [
        ("column then row", {"all_reduce": 1}, "full"),
        ("block then block", {"alltoall_base_": 2}, "(Shard(dim=1),)"),
        ("block then row", {"alltoall_base_": 1, "all_reduce": 1}, "full"),
    ],
)
def test_layers_take_what_the_layer_before_makes(found, styles, exchanges, placements):
    got = found["parallel_models"][styles]
    assert got["difference"] <= 1e-12
    assert got["exchanges"] == exchanges  # none between the layers
    assert got["placements"] == placements


def test_parallel_models_are_trained_and_gathered(found):
    got = found["parallel_models"]
    assert got["trained"] <= 1e-5
    assert got["fsdp2 of parallel"] <= 1e-5
    assert got["compiled"] <= 1e-6
    assert got["state"] <= 1e-5
    assert got["gathered"]["difference"] <= 1e-12
    assert got["gathered"]["placements"] == "full"


@pytest.mark.parametrize("exchange", ["summed", "copied", "exchanged", "joined"])
def test_a_missing_exchange_is_noticed(found, exchange):
    assert found["parallel_models"][f"planted: {exchange}"] > 1e-3


def test_inputs_and_arguments(found):
    got = found["parallel_models"]
    assert got["one row of features"] <= 1e-6
    assert got["no rows"] == (0, 24)
    assert got["autocast"] == "torch.bfloat16"
    assert got["shared factor"]
    assert "expected an input of shape (..., 16), got (2, 8)" in got["wrong width"]
    assert "torch.float32, got torch.float64" in got["wrong dtype"]
    assert "wrapped already (parallelize)" in got["again"]
    assert "no structured layer" in got["no layers"]
    assert "one dimension, got 2" in got["two dimensions"]
    assert got["no mesh"] == "TypeError: parallelize: expected a DeviceMesh, got int"
    assert "expected one of block, column, row, rank, got 'rows'" in got["style"]
    assert "1 (butterfly, block)" in got["some refused"]
    assert "2 (btt, block)" in got["some refused"]
    assert got["none changed"]


# ---- calibration and conversion -------------------------------------------------------------------------------------------


def test_moments_are_summed_over_processes(found):
    got = found["conversion"]
    assert got["moments"] <= 1e-12
    assert got["samples"]
    assert got["planted: not reduced"] > 0.1
    assert "2 layers of 2 inputs, 1 layers of 1 inputs" in got["other layers"]


def test_conversion_over_processes_is_bit_exact(found):
    got = found["conversion"]
    assert got["bits"]
    assert got["same keys"]
    assert got["same in all"]
    assert got["report"]
    assert "other plans" in got["other plans"]
    assert "process 1: 0: " in got["failure elsewhere"]
    assert got["left dense"]


# ---- without processes ----------------------------------------------------------------------------------------------------

STRUCTURES = [
    ("btt", {"blocks": 8}),
    ("btt", {"blocks": (1, 4)}),
    ("btt", {"cores": 3}),
    ("monarch", {"blocks": (4, 1)}),
    ("low_rank", {"rank": 1}),
    ("kronecker", {"shapes": [(1, 4), (24, 4)]}),
    ("butterfly", {}),
    ("block_diagonal", {"blocks": 1}),
    ("pixelfly", {"rank": 1}),
    ("dense", {}),
    (sm.Interpolative, {"rank": 1}),
    (sm.Interpolative, {"rank": 1, "side": "columns"}),
    (sm.InterpolativeBlocks, {"rank": 2, "blocks": 2}),
    (sm.Toeplitz, {}),
]


@pytest.mark.parametrize(("structure", "options"), STRUCTURES)
def test_axis_0_is_never_of_size_one(structure, options):
    layer = snn.StructuredLinear(16, 24, structure=structure, dtype=torch.float64, **options)
    assert all(factor.shape[0] > 1 for factor in layer.factors)
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.operator.to_dense(), layer.bias))
    again = snn.StructuredLinear.from_operator(layer.operator, layer.bias.detach())
    assert [f.shape for f in again.factors] == [f.shape for f in layer.factors]
    assert torch.equal(again(x), layer(x))


def test_a_layer_of_one_output_and_scalars():
    layer = snn.StructuredLinear(16, 1, structure="dense", dtype=torch.float64)
    assert layer.factors[0].shape == (16, 1)
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.operator.to_dense(), layer.bias))
    scaled = snn.StructuredLinear.from_operator(
        torch.tensor(2.0) * sm.LowRank.random((8, 6), rank=2, rng=0).to("torch")
    )
    assert all(factor.ndim for factor in scaled.factors)


def test_shard_placement():
    from torch.distributed.tensor import Shard

    assert snn.shard_placement(nn.Parameter(torch.zeros(4, 2, 2)), 4) is None
    assert snn.shard_placement(nn.Parameter(torch.zeros(2, 8, 12)), 4) == Shard(2)
    assert snn.shard_placement(nn.Parameter(torch.zeros(2, 5, 7)), 4) is None  # nothing is divisible
    assert snn.shard_placement(nn.Parameter(torch.zeros(2)), 4) is None
    with pytest.raises(RuntimeError, match="not initialised"):
        snn.shard_placement(nn.Parameter(torch.zeros(1, 8)))


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        snn.StructuredLinear(16, 16, structure="btt", blocks=4),
        snn.StructuredLinear(16, 8, structure="low_rank", rank=2),
    )


def test_checkpoints_of_one_process(tmp_path):
    saved = model()
    snn.save_sharded(saved, tmp_path / "checkpoint")
    loaded = model()
    with torch.no_grad():
        for p in loaded.parameters():
            p.add_(1.0)
    snn.load_sharded(loaded, tmp_path / "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    dense = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    with pytest.raises(ValueError, match="apply_structure"):
        snn.load_sharded(dense, tmp_path / "checkpoint")
    assert snn.apply_structure(dense, tmp_path / "checkpoint") is dense
    snn.load_sharded(dense, tmp_path / "checkpoint")
    x = torch.randn(3, 16)
    assert torch.equal(dense(x), saved(x))
    assert all(torch.equal(x, saved.state_dict()[k]) for k, x in snn.full_state_dict(saved).items())
    with pytest.raises(ValueError, match="meta device"):
        snn.save_sharded(model().to("meta"), tmp_path / "meta")


class Pair(nn.Module):
    """Two low-rank layers on one input, with one right factor or two; below ``module``, a name that DDP has too."""

    def __init__(self, joint):
        super().__init__()
        torch.manual_seed(0)
        made = [snn.StructuredLinear(16, 16, structure="low_rank", rank=2) for _ in range(2)]
        if joint:
            made[1].factors[1] = made[0].factors[1]
        self.module, self.head = nn.ModuleList(made), nn.Linear(16, 2)


def test_a_checkpoint_of_layers_apart_is_refused_by_a_joint_model(tmp_path):
    snn.save_sharded(Pair(False), tmp_path / "apart")
    snn.save_sharded(Pair(True), tmp_path / "joint")
    joint = Pair(True)
    before = copy.deepcopy(joint.state_dict())
    with pytest.raises(ValueError, match=r"module\.1: share factors with another layer in the model"):
        snn.load_sharded(joint, tmp_path / "apart")
    assert all(torch.equal(x, before[k]) for k, x in joint.state_dict().items())
    snn.load_sharded(joint, tmp_path / "joint")
    for name in ("apart", "joint"):  # apart they can have the same factor
        apart = Pair(False)
        with torch.no_grad():
            for p in apart.parameters():
                p.zero_()
        snn.load_sharded(apart, tmp_path / name)
        expected = Pair(name == "joint")
        assert all(torch.equal(x, expected.state_dict()[k]) for k, x in apart.state_dict().items())


def test_a_model_with_an_attribute_module_keeps_its_names(tmp_path):
    saved = Pair(True)
    names = [name for name, _ in saved.named_parameters()]
    assert sorted(n for g in snn.param_groups(saved, 0.1) for n in g["names"]) == sorted(names)
    assert list(snn.full_state_dict(saved)) == list(saved.state_dict())
    snn.save_sharded(saved, tmp_path)
    loaded = Pair(True)
    loaded.module = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    snn.load_sharded(snn.apply_structure(loaded, tmp_path), tmp_path)
    assert all(torch.equal(x, saved.state_dict()[k]) for k, x in loaded.state_dict().items())
    assert loaded.module[0].factors[1] is loaded.module[1].factors[1]
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(snn.StructuredLinear(16, 16), nn.Linear(16, 2)))
    assert {"module.0.factors.0", "module.1.weight"} <= set(snn.full_state_dict(averaged))
    assert "module.0.factors.0" in [n for g in snn.param_groups(averaged, 0.1) for n in g["names"]]


def test_damaged_checkpoints_are_refused(tmp_path):
    snn.save_sharded(model(), tmp_path)
    dense = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    before = copy.deepcopy(dense.state_dict())
    file = tmp_path / "structmat.json"
    good = json.loads(file.read_text())
    other = copy.deepcopy(good)
    other["layers"]["2"] = other["layers"].pop("1")
    for content, message in [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps(good | {"version": 2}), "version 2"),
        (json.dumps(other), "no layer '2'"),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            snn.apply_structure(dense, tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        snn.load_sharded(dense, tmp_path)
    assert all(type(layer) is nn.Linear for layer in dense)
    assert all(torch.equal(x, before[k]) for k, x in dense.state_dict().items())


def test_conversion_over_processes_needs_processes():
    dense = nn.Sequential(nn.Linear(16, 16))
    plan = snn.plan(dense, {"0": {"structure": "low_rank", "rank": 8}})
    with pytest.raises(RuntimeError, match="not initialised"):
        snn.convert(dense, plan, snn.calibrate(dense, [torch.randn(100, 16)], plan), group="world")
    assert type(dense[0]) is nn.Linear


def test_a_mesh_is_asked_for():
    with pytest.raises(TypeError, match="expected a DeviceMesh, got str"):
        snn.parallelize(model(), "cpu")
