"""Without CuPy, without a driver, or with a broken installation: what is said, and that nothing else is touched."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import structmat as sm


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = "print([m for m in ('cupy', 'torch', 'numba') if m in sys.modules])"
BACKEND = "from structmat.backends.cupy import CupyBackend; import structmat.backends.cuda.schedule"


@pytest.fixture
def no_device():
    """CuPy that finds no device."""
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("there is a device")


def test_the_backend_is_imported_without_cupy():
    assert run(f"import sys, structmat\n{BACKEND}\n{LOADED}") == "[]"
    assert (
        run(f"import sys, structmat as sm\nsm.backends.available()\nsm.backends.use_precision('exact')\n{LOADED}")
        == "[]"
    )


@pytest.mark.parametrize(
    "broken", ["raise RuntimeError('libcuda')", "import libcuda_of_another_age", "raise OSError('no driver')"]
)
def test_a_broken_cupy_breaks_neither_the_import_nor_other_backends(broken, tmp_path):
    (tmp_path / "cupy.py").write_text(broken + "\n")
    use = "import structmat as sm; A = sm.Monarch.random((4, 4)); sm.backends.available(); print((A @ ([1] * 4)).shape)"
    tried = "try:\n    A.to('cupy')\nexcept (ImportError, RuntimeError, OSError) as e:\n    print(type(e).__name__, e)"
    out = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {use}\n{tried}").split("\n")
    assert out[0] == "(4,)"
    assert ("ImportError cupy is installed but cannot be imported" in out[1]) == broken.startswith("import")


def test_without_cupy_the_error_says_what_to_install():
    hide = "import sys; sys.modules['cupy'] = None"
    use = "import structmat as sm; A = sm.Monarch.random((4, 4))"
    for call in ("A.to('cupy')",):
        out = run(f"{hide}\n{use}\ntry:\n    {call}\nexcept ImportError as e:\n    print(e)")
        assert out == "cupy is needed here: pip install 'structmat[cuda]'"


def test_without_a_device_the_error_says_so(no_device):
    a = sm.Monarch.random((4, 4), rng=0)
    before = a.to_dense()
    for call in (lambda: a.to("cupy"), lambda: sm.use_backend("cupy")):
        with pytest.raises(RuntimeError, match=r"CuPy .* is installed but finds no CUDA device .*driver"):
            call()
    assert "cupy" in sm.backends.available()
    assert np.array_equal(a @ np.ones(4), before @ np.ones(4)), "the operator and the choice of backends are as before"


def test_kernels_compile_by_the_way_that_cupy_takes(no_device):
    """CuPy's own options (its include folders found) and name expressions, for an architecture without a device."""
    core, compiler = (pytest.importorskip(m) for m in ("cupy._core.core", "cupy.cuda.compiler"))
    from structmat.backends.cuda.sources import hadamard_kernel
    from structmat.backends.cupy.launch import OPTIONS

    if not any("cuda" in option or "cu13" in option for option in core.assemble_cupy_compiler_options(OPTIONS)):
        pytest.skip("the headers of CUDA are not installed")
    kernel = hadamard_kernel("bfloat16", 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: ("-arch=sm_90", "cubin"))
        options = core.assemble_cupy_compiler_options(OPTIONS)
        image, names = compiler.compile_using_nvrtc(kernel.source, options, "90", name_expressions=(kernel.name,))
    assert image[:4] == b"\x7fELF"
    assert kernel.name in names
