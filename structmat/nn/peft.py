"""LoRA by PEFT on top of structured layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import dense_class, mark
from structmat.structures.low_rank import LowRank

_STARTS = (True, False, "gaussian", "orthogonal")  # PEFT's others need data or the dense weight


def lora(config: Any) -> Any:
    """Teach a PEFT ``LoraConfig`` to adapt structured layers; the same config is returned.

    PEFT adapts the classes of layers that it knows and refuses others. With this config ``get_peft_model`` puts a LoRA layer
    around every structured layer that ``target_modules`` names: adapters are trained, saved and loaded as on dense layers, the
    factors stay frozen. Merging (``merge_and_unload``) keeps the structure: a low-rank layer becomes one of a larger rank, any
    other a sum of itself and the low-rank adapter. PEFT's initialisations from data or the dense weight (PiSSA, OLoRA, ...),
    DoRA and KaSA raise ``ValueError``, also for an adapter that is added later; other variants (aLoRA, ...) are trained, and
    merging them raises ``NotImplementedError``.

    Parameters
    ----------
    config
        A ``peft.LoraConfig``.

    Raises
    ------
    ImportError
        If peft is missing.
    TypeError
        If ``config`` is no ``LoraConfig``.

    Examples
    --------
    >>> import peft, torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(snn.StructuredLinear(16, 16), torch.nn.ReLU())
    >>> model = peft.get_peft_model(model, snn.lora(peft.LoraConfig(target_modules=["0"], r=2)))
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    64
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("lora: needs peft: pip install peft") from error
    if not isinstance(config, LoraConfig):
        raise TypeError(f"lora: expected a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({StructuredLinear: _lora_layer()})
    return config


@cache
def _lora_layer() -> type:
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class LoraStructuredLinear(Linear):
        """PEFT's LoRA around a structured layer, merged into its operator."""

        def __init__(self, base_layer: Any, adapter_name: str, *, config: Any, **options: Any) -> None:
            options.pop("is_target_conv_1d_layer", None)
            super().__init__(base_layer, adapter_name, config=config, **options)
            self.fan_in_fan_out = False
            self._unmerged: list[StructuredLinear] = []

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        def update_layer(self, adapter_name: str, *args: Any, config: Any, **options: Any) -> None:
            """Add an adapter; ``ValueError`` for one that only dense layers can have."""
            for name in ("use_dora", "kasa_config"):
                if getattr(config, name, None):
                    raise ValueError(f"lora: {name} needs a dense weight; a structured layer has none")
            if config.init_lora_weights not in _STARTS:
                raise ValueError(
                    f"lora: expected init_lora_weights of {', '.join(map(repr, _STARTS))} for a structured layer, got "
                    f"{config.init_lora_weights!r}"
                )
            super().update_layer(adapter_name, *args, config=config, **options)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Add adapters to the operator, all or, on any error, none; ``unmerge`` puts the layer before it back."""
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
            for name in names:
                if name in self.lora_variant:
                    kind = type(self.lora_variant[name]).__name__
                    raise NotImplementedError(f"lora: {name} ({kind}) is no plain LoRA and cannot be merged")
            layers: list[Any] = [self.get_base_layer()]
            for name in names:
                with torch.no_grad():
                    merged = _merged(layers[-1], self.lora_A[name], self.lora_B[name], self.scaling[name])
                if safe_merge and not all(bool(torch.isfinite(p).all()) for p in merged.parameters()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                layers.append(merged)
            self._unmerged += layers[:-1]
            self.base_layer = layers[-1]
            self.merged_adapters += names

        def unmerge(self) -> None:
            """The layer as it was before the adapters were merged, where the merged one is now: device, dtype and mode."""
            if self._unmerged:
                now: Any = self.get_base_layer()
                like = now.factors[0]
                self.base_layer = self._unmerged[0].to(like.device, like.dtype).train(now.training)
            self._unmerged.clear()
            self.merged_adapters.clear()

    return LoraStructuredLinear


def _merged(layer: StructuredLinear, first: Any, last: Any, scale: float) -> StructuredLinear:
    """The layer of the sum of an operator and an adapter ``scale * last first``."""
    adapter = LowRank(
        (scale * last.weight.detach()).to(layer.factors[0].dtype), first.weight.detach().to(layer.factors[0].dtype)
    )
    bias = layer.bias
    if last.bias is not None:
        if bias is None:
            raise ValueError("lora: lora_bias=True cannot be merged into a layer without a bias")
        bias = bias + (scale * last.bias).to(bias.dtype)
    merged = StructuredLinear.from_operator(layer.operator + adapter, None if bias is None else bias.detach())
    merged.requires_grad_(any(p.requires_grad for p in layer.parameters()))
    mark(merged, dense_class(layer), getattr(layer, "record", None))
    return merged.train(layer.training)
