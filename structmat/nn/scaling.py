"""Initialisation and learning rates that follow from the structure of a layer.

Every factor has a fan-in, the size of the contraction that it does, and a fan-out. Rules: Qiu et al., "Compute Better Spent:
Replacing Dense Layers with Structured Matrices", ICML 2024 (arXiv 2406.06248), table 2; SGD: Potapczynski et al., "Searching
for Efficient Linear Layers over a Continuous Space of Structured Matrices", NeurIPS 2024 (arXiv 2410.02117). What they follow
from lives on the module, so that wrappers which replace parameters do not lose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from structmat.nn.sharding import drawn, unwrapped_name

if TYPE_CHECKING:
    from structmat.nn.layer import StructuredLinear
    from structmat.nn.program import Factor

RULES = ("spectral", "variance", "zero")
OPTIMIZERS = ("adam", "sgd")


def check_rule(rule: str) -> str:
    """``ValueError`` that lists the rules unless it is one."""
    if rule not in RULES:
        raise ValueError(f"init: expected one of {', '.join(RULES)}, got {rule!r}")
    return rule


@torch.no_grad()
def initialize(layer: StructuredLinear, rule: str = "spectral", generator: torch.Generator | None = None) -> None:
    """Draw new factors and a new bias.

    Parameters
    ----------
    layer
        A :class:`StructuredLinear`; its parameters are overwritten.
    rule
        ``"spectral"``: standard deviation ``sqrt(1/fan_in) * min(1, sqrt(fan_out/fan_in))``, the spectral norm of every factor
        about ``sqrt(fan_out/fan_in)``; outputs of unit inputs have variance ``prod min(1, fan_out/fan_in)``.
        ``"variance"``: ``sqrt(1/fan_in)``, which keeps the variance of the inputs for every structure.
        ``"zero"``: spectral, and zero for the factor applied last, for the last layer of a residual branch.
        The terms of a sum share the variance. The bias is drawn as that of ``nn.Linear``.
    generator
        torch's own by default.

    Raises
    ------
    ValueError
        For another rule.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> layer = snn.StructuredLinear(64, 64, bias=False, structure="btt")
    >>> snn.initialize(layer, "zero", torch.Generator().manual_seed(0))
    >>> float(layer(torch.ones(1, 64)).detach().abs().max())
    0.0
    """
    check_rule(rule)
    for factor in layer.program.factors:
        deviation = sigma(factor, rule)
        drawn(layer.factors[factor.slot], lambda x, s=deviation: nn.init.normal_(x, 0.0, s, generator=generator))
        if rule == "zero" and factor.last:
            nn.init.zeros_(layer.factors[factor.slot])
    gains = getattr(layer, "gains", None)  # of weight_norm
    if gains is not None:
        nn.init.ones_(gains)
    if layer.bias is not None:
        bound = layer.in_features**-0.5
        drawn(layer.bias, lambda x: nn.init.uniform_(x, -bound, bound, generator=generator))


def sigma(factor: Factor, rule: str) -> float:
    """Standard deviation of a factor's entries; that of the last one is divided by the root of the number of terms."""
    deviation = max(factor.fan_in, 1) ** -0.5
    if rule != "variance":
        deviation *= min(1.0, math.sqrt(factor.fan_out / max(factor.fan_in, 1)))
    return deviation / math.sqrt(factor.terms) if factor.last else deviation


def expected_gain(layer: StructuredLinear, rule: str = "spectral") -> float:
    """RMS of the outputs that ``initialize`` leads to, for inputs of independent unit entries and without the bias.

    The product over the factors of ``sqrt(fan_in) sigma``; for one chain or Kronecker product, up to padding.
    """
    return math.prod(math.sqrt(f.fan_in) * sigma(f, rule) for f in layer.program.factors)


# ---- learning rates -------------------------------------------------------------------------------------------------


class _Rate(NamedTuple):
    multiplier: float  # of the base learning rate
    decay: float  # of the weight decay, 0 for none


def multipliers(layer: StructuredLinear, optimizer: str = "adam") -> tuple[float, ...]:
    """Learning rate of every factor relative to that of the dense layer in its place, by slot.

    Adam: ``in_features / (fan_in * factors)``: a step of one entry moves the output by the fan-in. SGD:
    ``(fan_out/fan_in) / (out_features/in_features) / factors``.

    Notes
    -----
    That an Adam step is aligned with a factor's inputs holds less for Kronecker factors, whose gradient is averaged over all
    places where they stand: over a 64-fold width the change of the outputs in the first steps shrinks by 0.46 (mean of 8
    seeds; by ``64**-0.25 = 0.35`` if nothing were aligned). Multiplying by the fourth root of the width instead made it grow
    by 1.4 and the training loss worse, so that the published rule stands.

    Examples
    --------
    >>> import structmat.nn as snn
    >>> snn.multipliers(snn.StructuredLinear(64, 64, structure="btt", blocks=8))
    (4.0, 4.0)
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    factors = layer.program.factors
    found = [1.0] * len(layer.factors)
    for f in factors:
        if optimizer == "adam":
            found[f.slot] = layer.in_features / (max(f.fan_in, 1) * len(factors))
        else:
            ratio = (f.fan_out / max(f.fan_in, 1)) / (layer.out_features / layer.in_features)
            found[f.slot] = ratio / len(factors)
    return tuple(found)


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    base_width: int | None = None,
    *,
    optimizer: str = "adam",
    overrides: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim`` with the learning rates that follow from the structure.

    A factor has the rate ``lr * (base_width / in_features) * in_features / (fan_in * factors)`` for Adam; see
    :func:`multipliers`. With ``base_width`` the weights of ``nn.Linear`` have ``lr * base_width / in_features``, so that a rate
    tuned at one width holds at others (muP); without, ``lr``. Biases, norms, embeddings and the rest have ``lr``.

    Parameters
    ----------
    model
        After wrapping (``fully_shard``, DDP, ``torch.compile``): what the rates follow from is found on the modules.
    lr
        Base learning rate.
    weight_decay
        Of the *product*: the decays of a layer's factors are such that together they shrink the matrix by as much in a step as
        that of the dense layer would. None for tensors of less than two axes.
    base_width
        The width at which ``lr`` was tuned; None for no scaling with width.
    optimizer
        ``"adam"`` (AdamW and others that normalise) or ``"sgd"``.
    overrides
        ``{pattern: multiplier}``: parameters whose name matches (as file names do) have ``lr * multiplier``, whatever the
        rules say; the last pattern that matches counts.

    Returns
    -------
    list of dict
        ``params``, ``lr`` and ``weight_decay``; ``multiplier`` and ``names`` for those who want to look.

    Raises
    ------
    ValueError
        For an unknown optimizer, a model without parameters, or a pattern that matches no name.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(snn.StructuredLinear(64, 64, structure="btt", blocks=8), torch.nn.Linear(64, 2))
    >>> groups = snn.param_groups(model, lr=0.1, base_width=64)
    >>> [(g["names"], g["lr"]) for g in groups]
    [(['0.bias', '1.weight', '1.bias'], 0.1), (['0.factors.0', '0.factors.1'], 0.4)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    overrides = dict(overrides or {})
    groups: dict[_Rate, dict[str, Any]] = {}
    unmatched = set(overrides)
    for name, parameter, rate in _rates(model, base_width, optimizer):
        matching = [p for p in overrides if fnmatchcase(name, p)]
        unmatched -= set(matching)
        if matching:
            multiplier = float(overrides[matching[-1]])
            rate = _Rate(multiplier, rate.decay * rate.multiplier / multiplier if multiplier else 0.0)
        decay = rate.decay if weight_decay else 0.0
        group = groups.setdefault(
            _Rate(rate.multiplier, decay),
            {"params": [], "names": [], "multiplier": rate.multiplier},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if unmatched:
        raise ValueError(f"overrides: no parameter is called {', '.join(map(repr, sorted(unmatched)))}")
    if not groups:
        raise ValueError("param_groups: the model has no parameters")
    return [g | {"lr": lr * r.multiplier, "weight_decay": weight_decay * r.decay} for r, g in groups.items()]


def _rates(model: nn.Module, base_width: int | None, optimizer: str) -> Iterator[tuple[str, nn.Parameter, _Rate]]:
    """Every parameter once, with its name as of the unwrapped model."""
    from structmat.nn.layer import StructuredLinear

    scaled: dict[str, _Rate] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        width = 1.0
        if isinstance(module, (StructuredLinear, nn.Linear)) and base_width is not None:
            width = base_width / int(module.in_features)  # pyright: ignore[reportArgumentType]
        start = f"{prefix}." if prefix else ""
        if isinstance(module, StructuredLinear):
            found = multipliers(module, optimizer)
            decayed = sum(f.ndim >= 2 for f in module.factors) or 1
            for i, m in enumerate(found):
                share = 1.0 / (decayed * m) if module.factors[i].ndim >= 2 else 0.0
                scaled[unwrapped_name(f"{start}factors.{i}", model)] = _Rate(width * m, share)
        elif isinstance(module, nn.Linear):
            scaled[unwrapped_name(f"{start}weight", model)] = _Rate(width, 1.0)
    for name, parameter in model.named_parameters():
        known = unwrapped_name(name, model)  # some wrappers leave their infix out here, and not in named_modules
        yield known, parameter, scaled.get(known, _Rate(1.0, float(parameter.ndim >= 2)))


# ---- coordinate check -----------------------------------------------------------------------------------------------


class CoordinateCheck(NamedTuple):
    """Changes of the activations in the first steps of training, by width; prints as a table."""

    widths: tuple[int, ...]
    changes: dict[str, tuple[float, ...]]  # by layer: RMS change of its output at every width

    @property
    def ratios(self) -> dict[str, float]:
        """Change at the largest width divided by that at the smallest, by layer: about 1 where the rates are right."""
        return {name: c[-1] / c[0] if c[0] else math.inf for name, c in self.changes.items()}

    def __str__(self) -> str:
        size = max(5, *(len(name) for name in self.changes))
        head = " ".join(f"{w:>10}" for w in self.widths)
        lines = [f"{'layer':{size}} {head} {'ratio':>7}"]
        for name, ratio in self.ratios.items():
            row = " ".join(f"{c:10.3g}" for c in self.changes[name])
            lines.append(f"{name:{size}} {row} {ratio:7.2f}")
        return "\n".join(lines)


def coordinate_check(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    lr: float,
    base_width: int | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    train: Callable[[str], bool] | None = None,
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
    seeds: Sequence[int] = (0,),
) -> CoordinateCheck:
    """How far the outputs of the structured layers move in a few steps, over the widths of a model.

    With rates that suit the structure the change does not depend on the width. Train factors only (the default): biases and
    input layers move by a part that is constant in width and masks the effect.

    Parameters
    ----------
    make_model
        The model of a width.
    widths
        At least two, ascending.
    batches
        ``(inputs, targets)``, one step each; the change is measured on the inputs of the first.
    lr, base_width
        As for :func:`param_groups`; ``base_width`` defaults to the first width.
    loss, optimizer
        ``loss(outputs, targets)`` and the class of the optimizer.
    train
        Whether the parameter of a name is trained; default those called ``factors``, and every ``weight`` of the last module
        with one.
    groups
        Instead of :func:`param_groups`: parameter groups of a model, to compare other rules.
    seeds
        Of torch's generator, set before each model is made; its state is put back afterwards. The changes are averaged over
        them: those of a narrow model vary.

    Raises
    ------
    ValueError
        For fewer than two widths, no batches, or a model without structured layers.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> def make(width):
    ...     return torch.nn.Sequential(snn.StructuredLinear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
    >>> x, y = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.long)
    >>> check = snn.coordinate_check(make, (16, 64), [(x, y)] * 2, lr=0.01)
    >>> check.widths, list(check.changes)
    ((16, 64), ['0'])
    """
    widths, batches = tuple(widths), list(batches)
    if len(widths) < 2 or not batches or not seeds:
        counts = f"{len(widths)}, {len(batches)} and {len(seeds)}"
        raise ValueError(f"coordinate_check: expected two widths, a batch and a seed, got {counts}")
    base_width = widths[0] if base_width is None else base_width
    rows: list[dict[str, float]] = []
    with torch.random.fork_rng(devices=[]):
        for width in widths:
            runs = []
            for seed in seeds:
                torch.manual_seed(seed)
                model = make_model(width)
                made = groups(model) if groups else param_groups(model, lr, base_width=base_width)
                runs.append(_changes(model, made, batches, loss, optimizer, train or _factors_and_head(model)))
            rows.append({name: sum(run[name] for run in runs) / len(runs) for name in runs[0]})
    return CoordinateCheck(widths, {name: tuple(row[name] for row in rows) for name in rows[0]})


def _factors_and_head(model: nn.Module) -> Callable[[str], bool]:
    weights = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    head = weights[-1] if weights else None
    return lambda name: ".factors." in f".{name}" or name == head


def _changes(
    model: nn.Module,
    groups: list[dict[str, Any]],
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    train: Callable[[str], bool],
) -> dict[str, float]:
    """RMS change of the output of every structured layer on the first batch's inputs."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        group["params"] = [p for p in group["params"] if train(names[id(p)])]
    stepper = optimizer([g for g in groups if g["params"]], lr=0.0)
    before = _outputs(model, batches[0][0])
    if not before:
        raise ValueError("coordinate_check: the model has no structured layers")
    for inputs, targets in batches:
        stepper.zero_grad()
        loss(model(inputs), targets).backward()
        stepper.step()
    after = _outputs(model, batches[0][0])
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    from structmat.nn.layer import StructuredLinear

    found: dict[str, Tensor] = {}

    def kept(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, y: found.update({name: y.detach().clone()})

    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, StructuredLinear)]
    hooks = [module.register_forward_hook(kept(name)) for name, module in modules]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
