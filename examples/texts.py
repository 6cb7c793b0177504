"""Text from installed packages: docstrings, those of numpy, scipy and torch for calibration, of scikit-learn for tests."""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PACKAGES = (("numpy", 1), ("scipy", 2), ("torch", 3))  # of the calibration, and which fraction of their modules


def calibration_texts(count: int | None = None, packages: Sequence[tuple[str, int]] = PACKAGES) -> list[str]:
    """Paragraphs of 41 to 599 characters of the docstrings of packages, shuffled.

    With ``count`` that many, from modules in a shuffled order, which takes a fraction of the time that all of them take.
    """
    files = [(home(name), path) for name, every in packages for path in modules(home(name), every)]
    found: dict[str, None] = {}
    for folder, path in files if count is None else shuffled(files):
        for text in docstrings(folder, path):
            found.update(dict.fromkeys(p for p in paragraphs(text) if 40 < len(p) < 600))
        if count is not None and len(found) >= 2 * count:
            break
    return shuffled(list(found))[:count]


def test_pairs(count: int) -> list[str]:
    """Queries, then their documents: first and second paragraphs of docstrings of scikit-learn and the standard library."""
    pairs: dict[tuple[str, str], None] = {}
    for folder in (home("sklearn"), Path(sysconfig.get_paths()["stdlib"])):
        for path in modules(folder, 2):
            for text in docstrings(folder, path):
                parts = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
                fits = len(parts) > 1 and 25 < len(parts[0]) < 160 and 80 < len(parts[1]) < 600
                if fits and all(map(usable, parts[:2])):
                    pairs[parts[0], parts[1]] = None
    chosen = shuffled(list(pairs))[:count]
    return [query for query, _ in chosen] + [document for _, document in chosen]


def home(package: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the text is taken from the package {package}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def modules(folder: Path, every: int) -> list[Path]:
    """Every n-th module of a folder."""
    return sorted(folder.rglob("*.py"))[::every]


def docstrings(folder: Path, path: Path) -> Iterator[str]:
    """Docstrings of more than 40 characters of a module of a folder; none of tests."""
    skipped = {"tests", "testing", "test", "__pycache__", "site-packages"} & set(path.relative_to(folder).parts)
    if path.name.startswith("test") or skipped:
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
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
