"""Which kernel applies an operator: ``A.plan``, ``structmat.tune``, the kept rates of the machine, no Numba at all."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from chains import DTYPES
from market import entries, names, small_market

import structmat as sm
from structmat.planning import Decision

pytest.importorskip("numba")

from structmat.backends.numba import machine, network_plan, plan

SMALL = [pair for pair in small_market() if pair.operator.dtype.kind == "f"]


@pytest.fixture(autouse=True)
def _numba():
    with sm.use_backend("numba"):
        yield


@pytest.fixture
def rates(tmp_path, monkeypatch):
    """The file of rates, in a directory of the test's own; what was known is read again before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine._known.cache_clear()
    yield tmp_path / "structmat" / "machine.json"
    machine._known.cache_clear()


def leaves(decision):
    """The decisions that have no parts."""
    return [leaf for part in decision.parts for leaf in leaves(part)] if decision.parts else [decision]


# ---- plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", SMALL, ids=names(SMALL))
def test_every_operator_has_a_plan(pair):
    for batch in (1, 64):
        for rows in (False, True):
            decision = pair.operator.plan(batch=batch, rows=rows)
            assert isinstance(decision, Decision)
            assert str(decision).startswith(f"{decision.operator}: {decision.kernel}")
            for leaf in leaves(decision):
                considered = [candidate.kernel for candidate in leaf.candidates]
                assert leaf.kernel in considered or (leaf.kernel == "library" and not considered)
                assert all(candidate.seconds > 0 for candidate in leaf.candidates)
                assert considered == [c.kernel for c in sorted(leaf.candidates, key=lambda c: c.seconds)]


def test_a_plan_says_what_it_chose_from():
    a = sm.Monarch.random((1024, 1024), dtype=np.float32, rng=0)
    for batch in (1, 256):
        for rows in (False, True):
            decision = a.plan(batch=batch, rows=rows)
            considered = {candidate.kernel for candidate in decision.candidates}
            assert {"dense", "numpy"} < considered
            assert ("vector" in considered) == (rows or batch == 1)
            text = str(decision)
            assert f"-> {decision.kernel}" in text
            assert all(name in text for name in considered)
            assert text.count("->") == 1
    assert repr(a.plan(batch=3)).startswith("Decision(")


def test_the_plan_is_what_is_done():
    """The chosen kernel is the one that runs: each in turn is predicted to be the fastest."""
    x = entries((64, 20), np.float64, 1)
    for rows in (False, True):
        chosen = [c.kernel for c in sm.Monarch.random((64, 64), rng=0).plan(batch=20, rows=rows).candidates]
        for name in chosen:
            a = sm.Monarch.random((64, 64), rng=0)
            _prefer(a._plan(), name)
            assert a.plan(batch=20, rows=rows).kernel == name
            kernel = a._plan()._kernel(20, rows)
            assert (kernel is None) == (name == "numpy")
            expected = a.to_dense() @ x
            np.testing.assert_allclose((x.T @ a.T).T if rows else a @ x, expected, atol=1e-12)


def _prefer(chosen, name):
    """Let a plan predict that a kernel takes no time."""
    original = chosen.candidates

    def candidates(*args):
        return [kernel._replace(seconds=1e-12) if kernel.name == name else kernel for kernel in original(*args)]

    chosen.candidates = candidates


def test_a_kernel_that_cannot_be_made_is_passed_over():
    factors = sm.Chain.random((120, 112), [(2, 6, 4, 10), (4, 5, 7, 4)], rng=0).factors
    order = sm.patterns.AxisOrder((2, 4, 7, 2), (0, 2, 1, 3))
    a = sm.Chain(factors, (120, 107), None, order)
    considered = [candidate.kernel for candidate in a.plan(batch=64).candidates if candidate.kernel.startswith("tile")]
    assert considered
    a = sm.Chain(factors, (120, 107), None, order)
    _prefer(a._plan(), considered[0])
    assert not a.plan(batch=64).kernel.startswith("tile")
    np.testing.assert_allclose(a @ np.eye(107, 64), a.to_dense()[:, :64], atol=1e-12)


def test_composites_have_parts():
    monarch, rank = sm.Monarch.random((64, 64), rng=0), sm.LowRank.random((64, 64), rank=3, rng=1)
    for composite in (monarch + rank, sm.Kronecker.random((64, 64), rng=2) @ monarch + rank):
        decision = composite.plan(batch=16)
        inside = [leaf.operator.split("(")[0] for leaf in leaves(decision)]
        assert {"Monarch", "LowRank"} <= set(inside)
        assert f"{len(decision.parts)} parts" in decision.kernel
        assert all(f"  {part.operator}: {part.kernel}" in str(decision) for part in decision.parts)


def test_what_has_no_kernel_says_library():
    kernels = [
        sm.Diagonal(np.ones(4)).plan(),
        sm.fourier(8).plan(),
        sm.Monarch.random((16, 16), dtype=complex, rng=0).plan(batch=5),
    ]
    assert [decision.kernel for decision in kernels] == ["library"] * 3
    with sm.use_backend("numpy"):
        assert sm.Monarch.random((16, 16), rng=0).plan(batch=5).kernel == "library"


@pytest.mark.parametrize("batch", [0, -3])
def test_a_batch_of_nothing_has_no_plan(batch):
    a = sm.Monarch.random((16, 16), rng=0)
    with pytest.raises(ValueError, match=f"at least 1, got {batch}"):
        a.plan(batch=batch)
    with pytest.raises(ValueError, match=f"at least 1, got {batch}"):
        sm.tune(a, batch=batch)
    with pytest.raises(ValueError, match=f"at least 1, got {batch}"):
        (a + sm.LowRank.random((16, 16), rank=1, rng=0)).plan(batch=batch)


def test_the_dense_matrix_is_made_when_it_is_chosen():
    a = sm.Monarch.random((12, 12), rng=0)
    small = a.plan(batch=300, rows=True)
    assert "dense" in [candidate.kernel for candidate in small.candidates]
    large = sm.Monarch.random((4096, 4096), dtype=np.float32, rng=0)
    assert large.plan(batch=256).kernel != "dense"
    assert large.plan(batch=1).kernel != "dense"
    held = [v for v in large._plan()._made.values() if v is not None]
    assert held, "kernels are kept"
    assert not any(key[0] == "dense" for key in large._plan()._made if isinstance(key, tuple))


@pytest.mark.parametrize("shape", [(10, 3000), (3000, 10)])
def test_the_dense_matrix_is_made_once_and_from_the_shorter_side(shape, monkeypatch):
    sizes, eye = [], np.eye
    monkeypatch.setattr(np, "eye", lambda n, *args, **options: sizes.append(n) or eye(n, *args, **options))
    for a in (
        sm.LowRank.random(shape, rank=10, rng=0),
        sm.Kronecker.random(shape, shapes=[(2, 3000), (5, 1)] if shape[0] == 10 else [(3000, 2), (1, 5)], rng=0),
    ):
        x = entries((shape[1], 20), np.float64, 1)
        _prefer(a._plan(), "dense")
        assert a.plan(batch=20).kernel == a.plan(batch=20, rows=True).kernel == "dense"
        assert sizes == [10]
        expected = a._plan().reference.columns(x)
        np.testing.assert_allclose(a @ x, expected, atol=1e-10)
        np.testing.assert_allclose(x.T @ a.T, expected.T, atol=1e-10)
        sizes.clear()


def test_the_first_batch_does_not_decide_about_threads(monkeypatch):
    """A kernel that is kept for all batches predicts its time per sample without what one call costs."""
    predicted = []
    for module in (plan, network_plan):
        monkeypatch.setattr(module, "split", lambda *args: predicted.append(args[3]))
    for a in (sm.Monarch.random((64, 64), rng=0), sm.hadamard(64)):
        for rows in (False, True):
            chosen = a._plan()
            for kernel in chosen.candidates(2, rows, machine.Machine()):  # two samples come first
                if kernel.name == "levels" or kernel.name.startswith("tile"):
                    apply = kernel.make()
                    later = {c.name: c.seconds for c in chosen.candidates(4096, rows, machine.Machine())}[kernel.name]
                    apply(np.zeros(64 * 4096), np.zeros(64 * 4096), 0)
                    assert 0.2 * later < predicted.pop() < 2 * later


# ---- tune -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_tuning_takes_the_measured_fastest(rows, dtype, monkeypatch):
    x = entries((64, 40), dtype, 1)
    for operator in (
        lambda: sm.Monarch.random((64, 64), dtype=dtype, rng=0),
        lambda: sm.Kronecker.random((64, 64), dtype=dtype, rng=0),
        lambda: sm.Butterfly.random((64, 64), radix=2, dtype=dtype, rng=0),
    ):
        count = len(operator().plan(batch=40, rows=rows).candidates)
        for fastest in range(count):
            a, timed = operator(), []

            def clock(function, timed=timed, fastest=fastest):
                function()
                timed.append(1e-6 if len(timed) == fastest else 1e-3)
                return timed[-1]

            monkeypatch.setattr(plan, "_time", clock)
            decision = sm.tune(a, batch=40, rows=rows)
            if not decision.candidates or fastest >= len(timed):
                break
            assert decision.candidates[0] == (decision.kernel, 1e-6)
            assert {c.seconds for c in decision.candidates[1:]} <= {1e-3}
            assert a.plan(batch=40, rows=rows) == decision
            assert a.plan(batch=33, rows=rows) == decision, "batches of about the same size share it"
            expected = a.to_dense().astype(float) @ x
            got = (x.T @ a.T).T if rows else a @ x
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e3 * np.finfo(dtype).eps)


def test_tuning_with_a_real_clock():
    a = sm.Monarch.random((64, 64), rng=0)
    before, after = a.plan(batch=4), sm.tune(a, batch=4)
    assert after.kernel == min(after.candidates, key=lambda candidate: candidate.seconds).kernel
    assert {c.kernel for c in after.candidates} <= {c.kernel for c in before.candidates}
    vector = sm.tune(a, batch=1)
    assert a.plan() == vector
    np.testing.assert_allclose(a @ np.arange(64.0), a.to_dense() @ np.arange(64.0), atol=1e-12)


def test_tuning_makes_no_dense_matrix_in_vain(monkeypatch):
    monkeypatch.setattr(plan, "_time", lambda function: 5e-6)
    a = sm.Butterfly.random((4096, 4096), radix=2, dtype=np.float32, rng=0)
    assert a.plan(batch=2).candidates[-1].kernel in ("dense", "numpy")
    assert "dense" not in [candidate.kernel for candidate in sm.tune(a, batch=2).candidates]
    assert a._plan()._matrix is None
    times = iter([1.0] + [1e-3] * 10)
    monkeypatch.setattr(plan, "_time", lambda function: next(times))
    small = sm.Monarch.random((64, 64), rng=0)
    assert small._plan().candidates(40, False, machine.Machine())[0].name == "dense"
    decision = sm.tune(small, batch=40)
    assert "dense" in [candidate.kernel for candidate in decision.candidates[1:]]
    assert small._plan()._matrix() is None, "what lost is not kept"


def test_tuning_takes_operators_and_whole_batches():
    with pytest.raises(TypeError, match="expected an operator, got ndarray"):
        sm.tune(np.eye(3))
    for call in (sm.tune, sm.Operator.plan):
        with pytest.raises(TypeError, match="float"):
            call(sm.hadamard(4), batch=2.5)


def test_tuning_a_composite_tunes_its_parts(monkeypatch):
    monkeypatch.setattr(plan, "_time", lambda function: 5e-6)
    total = sm.Monarch.random((64, 64), rng=0) + sm.LowRank.random((64, 64), rank=3, rng=1) + sm.Identity(64)
    decision = sm.tune(total, batch=16)
    measured = [leaf for leaf in leaves(decision) if leaf.candidates]
    assert len(measured) >= 2
    assert all(candidate.seconds == 5e-6 for leaf in measured for candidate in leaf.candidates)


def test_tuning_what_has_no_choice_changes_nothing():
    for operator in (sm.Diagonal(np.ones(4)), sm.Monarch.random((16, 16), dtype=complex, rng=0)):
        assert sm.tune(operator, batch=3) == operator.plan(batch=3)


# ---- the machine ----------------------------------------------------------------------------------------------------


def test_measured_rates_are_kept(rates):
    assert machine.machine() == machine.Machine()
    found = sm.tune()
    assert isinstance(found, dict)
    assert all(value > 0 for value in found.values())
    assert list(json.loads(rates.read_text()).values()) == [found]
    assert [path.name for path in rates.parent.iterdir()] == ["machine.json"], "no temporary file is left"
    assert machine.machine()._asdict() == found
    machine._known.cache_clear()  # as in a new process
    assert machine.machine()._asdict() == found


def test_rates_of_other_machines_are_left_alone(rates):
    machine.remember(machine.Machine(flops=1e9))
    stored = json.loads(rates.read_text())
    rates.write_text(json.dumps({"another": {"flops": 1.0}, **stored}))
    machine.remember(machine.Machine(flops=2e9))
    assert json.loads(rates.read_text())["another"] == {"flops": 1.0}
    assert machine.machine().flops == 2e9


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"KEY: 3}",
        b"[1]}",
        b"{}",
        b'{"flops": "fast"}',
        b'{"flops": 0}',
        b'{"flops": -1}',
        b'{"flops": NaN}',
        b'{"far": Infinity}',
        b'{"flops": null}',
        b'{"no such rate": 1}',
        b"[1, 2]",
        b'"text"',
    ],
    ids=repr,
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_corrupted_file_is_ignored_and_replaced(content, inside, rates):
    rates.parent.mkdir()
    rates.write_bytes(b'{"%s": %s}' % (machine._key().encode(), content) if inside else content)
    a = sm.Monarch.random((64, 64), rng=0)
    np.testing.assert_allclose(a @ np.ones((64, 40)), a.to_dense() @ np.ones((64, 40)), atol=1e-12)
    assert machine.machine() == machine.Machine()
    machine.remember(machine.Machine(flops=3e9))
    assert machine.machine().flops == 3e9


def test_a_directory_in_the_place_of_the_file(rates):
    rates.mkdir(parents=True)
    assert machine.machine() == machine.Machine()


# ---- without Numba --------------------------------------------------------------------------------------------------


def test_tuning_the_machine_needs_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "structmat.backends.numba", None)
    with pytest.raises(RuntimeError, match="Numba is not installed"):
        sm.tune()


def test_everything_works_without_numba():
    code = """
        import sys, importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
        sys.modules["numba"] = None
        import numpy as np, structmat as sm
        assert "numba" not in sm.backends.available()
        a = sm.Monarch.random((64, 64), rng=0)
        assert np.allclose(a @ np.ones(64), a.to_dense().sum(axis=1))
        print(a.plan(batch=4).kernel, sm.tune(a, batch=4).kernel)
        for call in (sm.tune, lambda: sm.use_backend("numba")):
            try:
                call()
            except (RuntimeError, ValueError) as error:
                print(type(error).__name__)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["library", "library", "RuntimeError", "ValueError"]
