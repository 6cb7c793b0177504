"""The house: what importing costs, who imports whom, what is public and how it is described."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import structmat as sm

ROOT = Path(sm.__file__).parent
HEAVY = ("torch", "scipy", "numba", "llvmlite", "cupy", "matplotlib", "jax", "array_api_compat", "tqdm", "safetensors")


def run(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_brings_numpy_and_nothing_heavier():
    out = run(f"import structmat, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert out.strip() == "[]"


def test_numba_is_imported_when_its_backend_is_asked_for():
    pytest.importorskip("numba")
    loaded = "'numba' in sys.modules, any(m.startswith('structmat.backends.numba') for m in sys.modules)"
    use = "import sys, structmat as sm; A = sm.Monarch.random((4, 4)); sm.backends.available()"
    apply = "with sm.use_backend('numpy'): A @ ([1] * 4)"
    assert run(f"{use}\n{apply}\nprint({loaded})").strip() == "False False"
    assert run(f"{use}\nA @ ([1] * 4)\nprint({loaded})").strip() == "True True"


@pytest.mark.parametrize("name", ["torch", "scipy", "numba", "array_api_compat", "matplotlib", "cupy"])
def test_a_broken_optional_package_does_not_break_the_import(name, tmp_path):
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('broken on purpose')\n")
    use = "import structmat as sm; print((sm.Monarch.random((4, 4)) @ ([1] * 4)).shape)"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {use}"
    assert run(code).strip() == "(4,)"


FLOORS = {  # who may import whom; a module on a line may import those named on it and itself
    "rules": set(),
    "arrays": set(),
    "patterns": set(),
    "operator": {"rules", "arrays"},
    "backends": {"arrays", "patterns"},
    "algebra": {"operator", "rules", "arrays"},
    "blocks": {"algebra", "operator", "rules", "arrays"},
    "indexing": {"algebra", "operator", "rules", "arrays"},
    "structures": {"operator", "backends", "arrays", "patterns"},
    "identities": {"algebra", "blocks", "indexing", "structures", "operator", "rules", "arrays", "patterns"},
    "linalg": {"identities", "algebra", "blocks", "structures", "operator", "rules", "arrays", "patterns"},
    "projection": {"linalg", "structures", "algebra", "blocks", "operator", "rules", "arrays", "patterns"},
    "planning": {"operator", "backends", "rules"},
    "specs": {"operator", "arrays", "patterns"},
    "files": {"arrays"},
    "storage": {"specs", "files", "operator", "arrays"},
    "testing": {"operator", "arrays"},
    "plotting": {"projection", "structures", "operator", "rules", "arrays"},
    "nn": {
        *("projection", "structures", "backends", "operator", "arrays", "patterns", "algebra"),
        *("specs", "files"),
    },
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("structmat"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("structmat.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_an_import_never_runs_upward(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in FLOORS, f"{room} has no place in the house"
    assert imports_of(path) - {room} <= FLOORS[room]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text())
    at_home = {"numba", "llvmlite"} if path.is_relative_to(ROOT / "backends" / "numba") else set()
    at_home |= {"torch"} if path.is_relative_to(ROOT / "nn") or path.parent == ROOT / "backends" / "torch" else set()
    for node in tree.body:
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {m.split(".")[0] for m in modules} & (set(HEAVY) - at_home)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Assert)], "errors are raised, never asserted"


def public() -> dict[str, object]:
    named = {k: getattr(sm, k) for k in dir(sm) if not k.startswith("_")}
    names = {f"structmat.{k}": v for k, v in named.items() if callable(v) and v is not Any}
    for module in (sm.linalg, sm.testing, sm.backends):
        short = module.__name__
        names |= {
            f"{short}.{k}": v
            for k, v in vars(module).items()
            if callable(v) and not k.startswith("_") and getattr(v, "__module__", "").startswith("structmat")
        }
    return names


@pytest.mark.parametrize("name", sorted(public()))
def test_everything_public_is_described(name):
    thing = public()[name]
    text = inspect.getdoc(thing) or ""
    assert text.split("\n")[0].endswith((".", "``", ":")), "a summary of one line"
    if getattr(thing, "__module__", "").startswith("structmat") and not name.endswith((".Backend", ".Any")):
        result_tuple = isinstance(thing, type) and issubclass(thing, tuple)  # shown in the example of its function
        assert result_tuple or ">>> " in text, "an example that runs"


@pytest.mark.parametrize(
    "use",
    [
        "sm.LowRank.random((6, 6), rank=2).compress(rank=1).operator.rank",
        "sm.linalg.det(sm.Identity(1))",
        "sm.testing.check_operator(sm.Identity(3)) or 1",
        "len([sm.approximate(np.arange(16.0).reshape(4, 4) + np.eye(4), budget=0.9).plot()])",
        "len([sm.plotting.plot_errors({})])",
        "sm.project(np.eye(4)[:1], sm.LowRank, rank=1).operator.rank",
    ],
)
def test_what_is_loaded_later_works_in_a_fresh_process(use):
    code = f"import matplotlib; matplotlib.use('Agg'); import numpy as np, structmat as sm; print(int({use}))"
    assert run(code).strip() == "1"


def test_names_that_others_rely_on():
    expected = (
        "Operator Dense Identity Zero Diagonal Permutation BlockDiagonal LowRank Kronecker Monarch BlockTensorTrain "
        "Butterfly Chain BlockSparse flat_block_butterfly kron block_diag hstack vstack as_operator project linalg "
        "backends use_backend testing"
    )
    assert [n for n in expected.split() if not hasattr(sm, n)] == []


def test_every_structure_has_random_and_transposes_to_a_structure():
    for cls in (
        sm.Dense,
        sm.Diagonal,
        sm.Permutation,
        sm.BlockDiagonal,
        sm.LowRank,
        sm.Kronecker,
        sm.Monarch,
        sm.BlockTensorTrain,
        sm.Butterfly,
        sm.Chain,
        sm.BlockSparse,
    ):
        a = cls.random((6, 6), rng=0)
        assert type(a.T) is cls


def test_a_structure_without_the_contract_is_refused_when_it_is_defined():
    with pytest.raises(TypeError, match="_transpose"):

        class Half(sm.Operator):
            def _matmat(self, x):
                return x
