"""The GPU benchmark's dry run: every structure, dtype and pass goes through the code that a device would run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark as a module; those of the same folder are found while it is imported."""
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu

    yield gpu
    for name in (
        "gpu",
        "gpu_contenders",
        "gpu_timing",
        "report",
        "ceilings",
        "cells",
        "latency",
        "peers",
        "targets",
        "timing",
    ):
        sys.modules.pop(name, None)


ARGUMENTS = ["--cpu", "--n", "64", "--batch", "3", "--seconds", "1e-5"]


def test_the_dry_run_covers_every_row_and_says_that_it_is_one(gpu, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.main([*ARGUMENTS, "--save"]) == 0
    (saved,) = tmp_path.glob("*-gpu-dry-run.md")
    text = saved.read_text()
    assert "every time below is without meaning" in text
    for structure in gpu.STRUCTURES:
        for dtype in ("bf16", "fp16", "tf32", "fp32"):
            for mode in ("forward", "both"):
                assert f"| {structure} 64 3 {dtype} {mode} " in text
    assert "not in this run" in text
    assert "DRY RUN" in capsys.readouterr().out


def test_a_wrong_result_fails_the_run(gpu, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "ALLOWED", dict.fromkeys(gpu.ALLOWED, 1e-12))
    assert gpu.main([*ARGUMENTS, "--structures", "monarch", "--dtypes", "fp32"]) == 1
    assert "monarch 64 3 fp32 forward: structmat" in capsys.readouterr().out


def test_targets_have_verdicts(gpu):
    seconds = {"dense": 9.0, "eager": 4.0, "structmat": 2.0, "cupy": 3.0}
    fields = {
        "spread": 0.0,
        "copy": 0.8,
        "flops": 0.1,
        "memcpy": 1.5,
        "kernels": 2,
        "predicted": 1.0,
        "predicted_dense": 5.0,
    }
    rows = [
        gpu.Row(name, 4096, 65536, "bf16", "forward", seconds, **fields, plans={"cupy": "fused"}, errors={}, notes={})
        for name in ("monarch", "kronecker", "hadamard")
    ]
    verdicts = {what: (value, met) for what, _, value, met in gpu.targets(rows)[1:]}
    assert verdicts["Monarch bf16, B = 65536, n = 4096: times dense"] == ("4.5", "met")
    assert verdicts["Monarch bf16, B = 65536, n = 8192: times dense"] == ("not in this run", "")
    assert verdicts["Hadamard, B = 65536: times a copy"] == ("1.5", "NOT MET")
    assert verdicts["Monarch bf16, B = 65536, n >= 4096: share of copy bandwidth"] == ("0.8", "met")


def test_the_predictions_are_those_of_the_reference(gpu):
    import structmat as sm
    from structmat.backends.cuda import roofline

    A = sm.Monarch.random((4096, 4096), blocks=64, dtype="float32", rng=0)
    work, dense = gpu.predictions(A, 4096, 65536, "bf16", False, "2 products")
    assert roofline.seconds(dense, roofline.H200, "bfloat16") == pytest.approx(2.78e-3, rel=0.01)
    assert roofline.seconds(work, roofline.H200, "bfloat16") == pytest.approx(0.50e-3, rel=0.02)
    step, thrice = gpu.predictions(A, 4096, 65536, "bf16", True, "2 products")
    assert roofline.seconds(thrice, roofline.H200, "bfloat16") == pytest.approx(8.35e-3, rel=0.01)
    assert roofline.seconds(step, roofline.H200, "bfloat16") == pytest.approx(1.75e-3, rel=0.02)


def test_without_a_device_it_says_so(gpu, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert gpu.main([]) == 2
    assert "--cpu" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--n", "63"], ["--batch", "0"], ["--dtypes", "int8"]])
def test_options_are_checked(gpu, arguments, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--cpu", *arguments])
