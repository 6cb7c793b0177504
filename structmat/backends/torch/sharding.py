"""Rules for DTensor: over which axes the operands of the custom operators may be split among processes.

=========  ================  =========================  ==========================  ==========
split      operand           right ``(K, Q, P)``        left ``(Q, S, K R)``        result
=========  ================  =========================  ==========================  ==========
batch      by samples        whole                      whole                       by samples
column     whole             by axis 1 (rank 1 alone)   by axis 0                   by features
row        by features       by axis 0                  by axis 2                   a sum
=========  ================  =========================  ==========================  ==========

Any chain and any Kronecker product can be split by samples; by features, chains of two factors with neighbouring features in a
block, where the number of processes divides the blocks. Nothing but the sum is exchanged.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from structmat.backends.torch.layout import decoded, splits_inputs, splits_outputs


def prepare(x: Any, *_: Any) -> None:
    """Register the rules when the first DTensor comes along: whoever has one has loaded ``torch.distributed``."""
    if type(x) is not torch.Tensor and type(x).__name__ == "DTensor":
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    operators = torch.ops.structmat
    register = DTensor._op_dispatcher.sharding_propagator.register_op_strategy
    for operator, rule in (
        (operators.chain, _chain),
        (operators.chain_backward, _chain_backward),
        (operators.kron, _kron),
        (operators.kron_backward, _kron_backward),
    ):
        info = RuntimeSchemaInfo(static_argnum=3, needs_pytree=True)  # layout, columns and needs decide too
        register(operator.default, functools.partial(_strategy, rule), info)


def _strategy(rule: Any, schema: Any) -> Any:
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    mesh = schema.get_mesh_from_args()
    found = rule(schema.args_schema, mesh.size())
    outputs = len(found[0][0])
    strategy = expand_to_full_mesh_op_strategy(mesh, schema, [[*o, *given] for o, given in found], input_index=outputs)
    if schema.return_type_list_tensor_like() and outputs == 1:
        for spec in strategy.strategies:
            spec.output_specs = (spec.output_spec,)  # a list of one
    return strategy


def _chain(arguments: Any, processes: int) -> list[tuple[list[Any], list[Any]]]:
    _, bias, factors, code, *rest = arguments
    columns = bool(rest and rest[0])
    found = []
    for out, given, bias_at, factors_at in _splits(len(factors.children), code, columns, processes):
        found.append(([out], [given, *([] if bias is None else [bias_at]), *factors_at]))
    return found


def _chain_backward(arguments: Any, processes: int) -> list[tuple[list[Any], list[Any]]]:
    _, _, factors, code, columns, needs = arguments
    found = []
    for out, given, bias_at, factors_at in _splits(len(factors.children), code, columns, processes):
        gradients = [_of_gradient(p, out, given) for p in (given, bias_at, *factors_at)]
        made = [g for g, need in zip(gradients, needs, strict=True) if need]
        found.append((made, [_whole_if_sum(out), given, *factors_at]))
    return found


def _kron(arguments: Any, processes: int) -> list[tuple[list[Any], list[Any]]]:
    x, bias, factors, *rest = arguments
    return _chain((x, bias, factors, None, *rest), processes)


def _kron_backward(arguments: Any, processes: int) -> list[tuple[list[Any], list[Any]]]:
    dy, x, factors, columns, needs = arguments
    return _chain_backward((dy, x, factors, None, columns, needs), processes)


def _splits(count: int, code: Any, columns: bool, processes: int) -> list[tuple[Any, Any, Any, list[Any]]]:
    """Placements of result, operand, bias and factors in every split."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, samples, features = Replicate(), Shard(1 if columns else 0), Shard(0 if columns else 1)
    found: list[tuple[Any, Any, Any, list[Any]]] = [
        (whole, whole, whole, [whole] * count),
        (samples, samples, whole, [whole] * count),
    ]
    layout = None if code is None or count != 2 else decoded(tuple(code))
    if layout and splits_outputs(layout) and layout.patterns[0].d % processes == 0:
        found.append((features, whole, Shard(0), [Shard(0), Shard(1)]))
    if layout and splits_inputs(layout) and layout.patterns[1].a % processes == 0:
        found.append((Partial(), features, Partial(), [Shard(2), Shard(0)]))
    return found


def _of_gradient(placement: Any, out: Any, given: Any) -> Any:
    """The gradient of what is whole is a sum over processes where the result or the operand is split."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if isinstance(placement, Partial):  # a bias of a result that is a sum
        return Replicate()
    split = isinstance(out, Shard) or isinstance(given, Shard)
    return Partial() if isinstance(placement, Replicate) and split else placement


def _whole_if_sum(placement: Any) -> Any:
    from torch.distributed.tensor import Partial, Replicate

    return Replicate() if isinstance(placement, Partial) else placement
