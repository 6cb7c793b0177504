"""Densify: structured layers multiplied out, and an optimizer that goes on with the result (reverse sparsification)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from structmat.nn import huggingface
from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import put, to_dense
from structmat.nn.sharding import check_unwrapped


class _Home(NamedTuple):
    """Where the factors of a layer are in an optimizer.

    ``groups`` are those of the trained factors. The rate of the first, that of factor ``slot`` of ``owner``, tells the layer's:
    the owner is the layer itself, unless it shares all its factors with layers before it.
    """

    groups: list[dict[str, Any]]
    owner: StructuredLinear
    slot: int


def densify(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Replace every structured layer by the dense layer that it is equal to; in place, and returned.

    The sparse-to-dense half of Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
    ICML 2022, section 4: train structured for most of the steps, multiply out, go on dense.

    Parameters
    ----------
    model
        Any module; a layer that is used twice stays one layer, and one that stood for a ``Conv1D`` becomes one. A model that is
        itself a structured layer comes back as another object.
    optimizer
        One that holds parameters of ``model``. The factors leave it with their state, moments of a factor being no moments of
        the product. The dense weights enter without state, so that Adam starts its averages anew for them: warm up for some
        steps. A weight's learning rate is what :func:`structmat.nn.param_groups` gives a dense layer, found from the factors'
        current one, and their group's other options; the weight decay is that of the product. Biases and all other
        parameters stay with their state.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ValueError
        If there is no structured layer, the optimizer holds some of a layer's trained factors only, or the model is spread over
        processes (DDP, ``fully_shard``, :func:`structmat.nn.parallelize`).

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(snn.StructuredLinear(8, 8), torch.nn.ReLU())
    >>> optimizer = torch.optim.AdamW(snn.param_groups(model, lr=0.01))
    >>> snn.densify(model, optimizer)[0], len(optimizer.param_groups)
    (Linear(in_features=8, out_features=8, bias=True), 2)
    """
    layers = {id(m): m for m in model.modules() if isinstance(m, StructuredLinear)}
    if not layers:
        raise ValueError("densify: the model has no structured layer")
    homes = {} if optimizer is None else _homes(optimizer, list(layers.values()))
    dense = dense_layers(model)
    if optimizer is not None:
        made = {id(model.get_submodule(name)): layer for name, layer in dense.items()}
        for key, layer in layers.items():
            _exchange(optimizer, layer, made[key].weight, homes.get(key))
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
    return _replaced(model, dense)


def dequantize(model: nn.Module) -> nn.Module:
    """Multiply all structured layers out again, in place: :func:`densify` without an optimizer, also for models without any.

    The name under which transformers' models have it. Returns the model, or the dense layer if the model is one structured
    layer.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(snn.StructuredLinear(8, 8, structure="low_rank", rank=2))
    >>> snn.dequantize(model)
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    return _replaced(model, dense_layers(model))


def dense_layers(model: nn.Module) -> dict[str, Any]:
    """For every name of a structured layer the dense layer that it is equal to, with its own bias; one for each layer."""
    check_unwrapped(model, "densify", compiled=True)
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, StructuredLinear)}
    dense: dict[int, Any] = {id(m): to_dense(m) for m in layers.values()}
    for layer in layers.values():
        if layer.bias is not None:
            dense[id(layer)].bias = layer.bias
    return {name: dense[id(layer)] for name, layer in layers.items()}


def _replaced(model: nn.Module, dense: Mapping[str, nn.Module]) -> nn.Module:
    for name, layer in dense.items():
        model = put(model, name, layer)
    huggingface.detach(model)
    return model


def _homes(optimizer: torch.optim.Optimizer, layers: list[StructuredLinear]) -> dict[int, _Home]:
    """Where the factors of every layer are; layers that the optimizer does not know are left out."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    holders: dict[int, list[tuple[StructuredLinear, int]]] = {}
    for layer in layers:
        for slot, factor in enumerate(layer.factors):
            holders.setdefault(id(factor), []).append((layer, slot))
    homes = {}
    for layer in layers:
        held = [f for f in layer.factors if id(f) in group_of]
        trained = [f for f in layer.factors if f.requires_grad]
        missing = [f for f in trained if id(f) not in group_of]
        if held and missing:
            raise ValueError(
                f"densify: the optimizer holds {len(trained) - len(missing)} of the {len(trained)} factors of "
                f"{layer.structure} {layer.out_features}x{layer.in_features}; was it made before the conversion?"
            )
        if held:
            told = sorted(trained or held, key=lambda f: len(holders[id(f)]) > 1)  # shared: another layer's rate
            homes[id(layer)] = _Home([group_of[id(f)] for f in told], *holders[id(told[0])][0])
    return homes


def _dropped(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """A parameter leaves the optimizer with its state, if it is there."""
    for group in optimizer.param_groups:
        place = next((i for i, p in enumerate(group["params"]) if p is parameter), None)
        if place is not None:
            for key in ("params", "names", "param_names"):
                if len(group.get(key, ())) > place:
                    del group[key][place]
            optimizer.state.pop(parameter, None)


def _exchange(
    optimizer: torch.optim.Optimizer, layer: StructuredLinear, weight: torch.Tensor, home: _Home | None
) -> None:
    """The factors leave the optimizer, the dense weight enters in a group of its own."""
    if home is None:
        return
    from structmat.nn.scaling import multipliers

    groups, first = home.groups, home.groups[0]
    options = {k: v for k, v in first.items() if k not in ("params", "names", "multiplier", "param_names")}
    if (
        "multiplier" in first
    ):  # of param_groups: the rate of a dense layer is the factor's without what its structure brings
        rules = [multipliers(home.owner, rule)[home.slot] for rule in ("adam", "sgd")]
        rule = rules[isinstance(optimizer, torch.optim.SGD)]
        options["lr"] = first["lr"] / rule
        if "initial_lr" in first:
            options["initial_lr"] = first["initial_lr"] / rule
        decayed = sum(g["lr"] * g.get("weight_decay", 0.0) for g in groups)
        options["weight_decay"] = (
            decayed / options["lr"] if options["lr"] else first.get("weight_decay", 0.0) * len(groups)
        )
        options |= {"multiplier": first["multiplier"] / rule, "names": ["weight"]}
    gains = [p for name, p in layer.named_parameters(recurse=False) if name == "gains"]
    for parameter in (*layer.factors, *gains):  # one may have left with a layer that shared it
        _dropped(optimizer, parameter)
    named = "param_names" in first
    optimizer.add_param_group(options | {"params": [("weight", weight)] if named else [weight]})
