"""Attention: ``nn.MultiheadAttention`` with its projections as layers of their own, which can be converted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from structmat.nn.modules import put
from structmat.nn.weight import StructuredWeight

_NAMES = ("query", "key", "value")


class UnfusedAttention(nn.Module):
    """``nn.MultiheadAttention`` as four linear layers that are called: ``query``, ``key``, ``value`` and ``out_proj``.

    The same outputs for the same inputs and the same call; it loads state dicts of the fused module too. Made by
    :func:`unfuse_attention`. The fused paths of ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder``, which multiply by
    weights without calling any layer, are not taken with it.

    Parameters
    ----------
    fused
        The module that it replaces. Weights and biases are copied, ``out_proj``'s and those of separate projections
        (``kdim``, ``vdim``) kept.
    """

    _qkv_same_embed_dim = False  # what torch's fused paths ask first
    in_proj_bias = None
    query: nn.Module
    key: nn.Module
    value: nn.Module

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = fused.embed_dim, fused.kdim, fused.vdim
        self.num_heads, self.head_dim = fused.num_heads, fused.head_dim
        self.dropout, self.batch_first, self.add_zero_attn = fused.dropout, fused.batch_first, fused.add_zero_attn
        weights: Any = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        if fused.in_proj_weight is not None:
            weights = fused.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        for name, weight, bias in zip(_NAMES, weights, biases, strict=True):
            setattr(self, name, _linear(weight, bias, fused.in_proj_bias))
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.bias_k, self.bias_v = fused.bias_k, fused.bias_v
        self.train(fused.training)

    @property
    def in_proj_weight(self) -> StructuredWeight:
        """The place of the fused weight: shape, dtype and device, and no entries."""
        like: Any = self.query.weight
        return StructuredWeight((3 * self.embed_dim, self.embed_dim), like.dtype, like.device, like.requires_grad)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        single = query.dim() == 2
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                f"attention: expected query, key and value all of 2 or all of 3 dimensions, got {query.dim()}, {key.dim()} and "
                f"{value.dim()}"
            )
        q, k, v = self.query(query), self.key(key), self.value(value)
        if single:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        batch, length, _ = q.shape
        if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1] != v.shape[1]:
            raise ValueError(
                "attention: expected one batch size, and key and value of one length, got query, key and value of shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self.bias_k.expand(batch, 1, -1)), 1)
            v = torch.cat((v, self.bias_v.expand(batch, 1, -1)), 1)
        if self.add_zero_attn:
            k, v = (torch.cat((x, x.new_zeros(batch, 1, x.shape[-1])), 1) for x in (k, v))
        causal = is_causal and key_padding_mask is None and not need_weights and k.shape[1] == length
        mask = None if causal else self._mask(attn_mask, key_padding_mask, (batch, length, k.shape[1]), q.dtype, single)
        q, k, v = (x.reshape(batch, x.shape[1], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = self.out_proj(y.transpose(1, 2).reshape(batch, length, self.embed_dim))
        if single:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _mask(
        self,
        attention: Tensor | None,
        padding: Tensor | None,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
        single: bool,
    ) -> Tensor | None:
        """Both masks as numbers that are added to the scores ``(batch, heads, queries, keys)``; appended keys are seen."""
        batch, length, keys = sizes
        appended = (self.bias_k is not None) + self.add_zero_attn
        known, found = keys - appended, None
        if attention is not None:
            expected = ((length, known), (batch * self.num_heads, length, known))
            if tuple(attention.shape) not in expected:
                raise ValueError(
                    f"attention: expected attn_mask of shape {expected[0]} or {expected[1]}, got {tuple(attention.shape)}"
                )
            found = functional.pad(_added(attention, dtype), (0, appended))
            found = found.reshape(-1, self.num_heads, length, keys) if found.dim() == 3 else found[None, None]
        if padding is not None:
            padding = padding[None] if single else padding
            if tuple(padding.shape) != (batch, known):
                raise ValueError(
                    f"attention: expected key_padding_mask of shape {(batch, known)}, got {tuple(padding.shape)}"
                )
            hidden = functional.pad(_added(padding, dtype), (0, appended))[:, None, None]
            found = hidden if found is None else found + hidden
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        assigned = local_metadata.get("assign_to_params_buffers", False)
        for kind in ("weight", "bias"):
            fused = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            parts = (
                [state_dict.pop(f"{prefix}{n[0]}_proj_{kind}", None) for n in _NAMES]
                if fused is None
                else fused.chunk(3)
            )
            for name, part in zip(_NAMES, parts, strict=True):
                if part is not None:  # a view of the packed one would keep all of it
                    part = part.detach().clone() if assigned and fused is not None else part
                    state_dict[f"{prefix}{name}.{kind}"] = part
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def unfuse_attention(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Replace every ``nn.MultiheadAttention`` by one whose projections are layers that are called; in place, and returned.

    ``nn.MultiheadAttention`` multiplies by its packed input weight and by the weight of ``out_proj`` without calling a layer:
    :func:`structmat.nn.plan` must leave them, because a structured layer there would be bypassed. After this call they are
    linear layers ``query``, ``key``, ``value`` and ``out_proj`` like any other, in ``nn.TransformerEncoderLayer`` and
    ``nn.TransformerDecoderLayer`` too. Outputs are the same up to rounding.

    Parameters
    ----------
    model
        Any module; a module that is used twice stays one.
    optimizer
        The optimizer of the model, if there is one: refused if it holds a packed parameter, which is replaced.

    Returns
    -------
    torch.nn.Module
        The model, or the new module if the model is itself an ``nn.MultiheadAttention``.

    Raises
    ------
    ValueError
        If there is no such module, one has hooks, parametrisations or a forward of its own, two share a weight, another module
        holds a packed parameter, or the optimizer was built before. The model is then as it was.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> encoder = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    >>> x = torch.randn(3, 5, 16)
    >>> y = encoder(x)
    >>> encoder = snn.unfuse_attention(encoder)
    >>> bool(torch.allclose(encoder(x), y, atol=1e-5))
    True
    >>> [entry.name for entry in snn.plan(encoder, {"structure": "low_rank", "rank": 4})][:2]
    ['self_attn.query', 'self_attn.key']
    """
    found = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.MultiheadAttention)}
    if not found:
        raise ValueError(f"unfuse_attention: {type(model).__name__} has no nn.MultiheadAttention")
    held = {id(p) for group in ([] if optimizer is None else optimizer.param_groups) for p in group["params"]}
    owners: dict[int, str] = {}
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]:
        _check(name or "the model", module)
        for key, parameter in module.named_parameters():
            if id(parameter) in owners:
                raise ValueError(f"unfuse_attention: {name}.{key} is the same parameter as {owners[id(parameter)]}")
            owners[id(parameter)] = f"{name}.{key}"
            if id(parameter) in held and key.startswith("in_proj"):
                raise ValueError(
                    f"unfuse_attention: the optimizer was built before and holds {name}.{key}, which is replaced"
                )
    for name, module in model.named_modules():
        for key, parameter in {} if isinstance(module, nn.MultiheadAttention) else module._parameters.items():
            owner = owners.get(id(parameter), "")
            if owner.rpartition(".")[2].startswith("in_proj"):
                raise ValueError(f"unfuse_attention: {name}.{key} is the same parameter as {owner}, which is replaced")
    made = {id(m): UnfusedAttention(m) for m in found.values()}
    for name, module in found.items():
        model = put(model, name, made[id(module)])
    return model


def _check(name: str, module: nn.MultiheadAttention) -> None:
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise ValueError(f"unfuse_attention: {name}: {type(module).__name__} has a forward of its own")
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            raise ValueError(f"unfuse_attention: {name}: has hooks, which would be lost")
        if nn.utils.parametrize.is_parametrized(part):
            raise ValueError(f"unfuse_attention: {name}: parametrised; remove the parametrisation first")
    if type(module.out_proj).forward is not nn.Linear.forward:
        raise ValueError(f"unfuse_attention: {name}: expected a linear out_proj, got {type(module.out_proj).__name__}")


def _linear(weight: Tensor, bias: Tensor | None, like: Tensor | None = None) -> nn.Linear:
    """A linear layer with this weight and bias: the parameters themselves, or copies of parts of a packed one."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = _own(weight, weight)
    if bias is not None:
        linear.bias = _own(bias, bias if like is None else like)
    return linear


def _own(part: Tensor, like: Tensor) -> nn.Parameter:
    return part if isinstance(part, nn.Parameter) else nn.Parameter(part.detach().clone(), like.requires_grad)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers: a boolean one is minus infinity where it is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise ValueError(f"attention: expected a mask of booleans or floating-point numbers, got {mask.dtype}")
    return mask.to(dtype)
