"""Save a compressed transformer and load it in another process: through transformers, and as one safetensors file.

All-MiniLM-L6-v2 with its 36 encoder layers as low-rank layers of half of their parameters, query, key and value with one right
factor. Exits with an error unless a new process loads the same numbers with no key missing or too many, one that does not know
structmat refuses, the dense model comes back, and the model is one graph for ``torch.compile`` and plain operators in ONNX.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import minilm
import torch

import structmat.nn as snn

TEXTS = [
    "Structured matrices make networks cheaper.",
    "A new process loads the same numbers.",
    "Nothing is downloaded.",
]
PLAIN = {"MatMul", "Gemm", "Add", "Reshape", "Transpose", "Gelu", "Concat", "Shape", "Gather", "Constant"}
LOAD = """
import sys
{imports}
import torch
from transformers import AutoModel
model, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
batch = torch.load(sys.argv[2])
with torch.no_grad():
    hidden = model.eval()(**batch).last_hidden_state
torch.save(([len(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")], hidden), sys.argv[3])
"""


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="calibrated on three sentences: what is saved need not be good; without ONNX",
    )
    options = parser.parse_args()
    tokenizer, dense = minilm.load_model()
    _, model = minilm.load_model()
    plan = snn.plan(model, {r"re:encoder\.layer\.\d+\..*": {"structure": "low_rank"}}, budget=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few samples
        texts = TEXTS if options.quick else minilm.calibration_texts(128)
        snn.convert(model, plan, snn.calibrate(model, minilm.batches(tokenizer, texts), plan), joint=True)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    expected = hidden(model, batch)
    checks: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(batch, folder / "batch.pt")
        model.save_pretrained(folder / "model")
        done = in_new_process(folder, "import structmat.nn")
        if done.returncode:
            raise SystemExit(done.stderr)
        keys, found = torch.load(folder / "out.pt")
        for what, count in zip(("missing", "unexpected", "mismatched"), keys, strict=True):
            checks.append((f"from_pretrained in a new process: {what} keys", count, 0))
        checks.append(("from_pretrained in a new process: largest difference", difference(found, expected), 0.0))
        refused = in_new_process(folder, "").returncode != 0
        checks.append(("a process without structmat.nn loads it (1) or refuses (0)", float(not refused), 0))
        snn.save(model, folder / "model.safetensors")
        again: Any = snn.load(minilm.load_model()[1], folder / "model.safetensors")
        checks.append(("snn.save and load: largest difference", difference(hidden(again, batch), expected), 0.0))
        dense.save_pretrained(folder / "dense")
        sizes = [(folder / kind / "model.safetensors").stat().st_size for kind in ("model", "dense")]
        checks.append((f"bytes of the file over the original's {sizes[1]}", sizes[0] / sizes[1], 0.78))
    checks.append(
        ("torch.compile, one graph: largest difference", difference(hidden(one_graph(again), batch), expected), 1e-5)
    )
    if not options.quick:
        checks += exported(again.encoder.layer[0])
    back = again.dequantize()
    structured = sum(isinstance(m, snn.StructuredLinear) for m in back.modules())
    checks.append(("structured layers left after dequantize()", structured, 0))
    checks.append(("dequantize(): largest difference", difference(hidden(back, batch), expected), 1e-5))
    failures = []
    for what, measured, most in checks:
        good = measured <= most
        print(f"{'ok    ' if good else 'MISSED'} {what:60} {measured:10.3g}   at most {most:g}")
        if not good:
            failures.append(f"{what}: {measured:g} exceeds {most:g}")
    if failures:
        raise SystemExit("; ".join(failures))


def one_graph(model: Any) -> Any:
    """The model captured by torch.compile, which raises at a graph break."""
    return torch.compile(model, fullgraph=True, dynamic=True, backend="eager")


def exported(block: Any) -> list[tuple[str, float, float]]:
    """The feed-forward layers of a block in ONNX, evaluated by ONNX's own reference on other sizes than were exported."""
    from onnx.reference import ReferenceEvaluator

    part = torch.nn.Sequential(block.intermediate.dense, torch.nn.GELU(), block.output.dense)
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    width = block.intermediate.dense.in_features
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter
        program: Any = torch.onnx.export(
            part, (torch.randn(2, 7, width),), dynamo=True, dynamic_shapes=(sizes,), verbose=False
        )
        model = program.model_proto
        x = torch.randn(3, 5, width)
        y = part(x)
    found: Any = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    foreign = {node.op_type for node in model.graph.node} - PLAIN
    return [
        ("ONNX, feed-forward layers: operators that are not plain", len(foreign), 0),
        (
            "ONNX, feed-forward layers: relative difference",
            difference(torch.from_numpy(found[0]), y) / float(y.abs().max()),
            1e-5,
        ),
    ]


def hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden state."""
    with torch.no_grad():
        return model.eval()(**batch).last_hidden_state


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors."""
    return float((a - b).abs().max())


def in_new_process(folder: Path, imports: str) -> subprocess.CompletedProcess[str]:
    """Load the folder's model in a process of its own."""
    files = [str(folder / name) for name in ("model", "batch.pt", "out.pt")]
    code = LOAD.format(imports=imports)
    return subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=False)


if __name__ == "__main__":
    main()
