"""LoRA by PEFT on top of structured layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from structmat.nn.layer import StructuredLinear
from structmat.nn.modules import dense_class, mark
from structmat.structures.low_rank import LowRank


def lora(config: Any) -> Any:
    """Teach a PEFT ``LoraConfig`` to adapt structured layers; the same config is returned.

    PEFT adapts the classes of layers that it knows and refuses others. With this config ``get_peft_model`` puts a LoRA layer
    around every structured layer that ``target_modules`` names: adapters are trained, saved and loaded as on dense layers, the
    factors stay frozen. Merging (``merge_and_unload``) keeps the structure: a low-rank layer becomes one of a larger rank, any
    other a sum of itself and the low-rank adapter. PEFT's initialisations that decompose the dense weight (PiSSA, OLoRA, ...)
    and DoRA need one and raise.

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
            if config.init_lora_weights not in (True, False, "gaussian") or getattr(config, "use_dora", False):
                what = (
                    "use_dora"
                    if getattr(config, "use_dora", False)
                    else f"init_lora_weights={config.init_lora_weights!r}"
                )
                raise ValueError(f"lora: {what} needs a dense weight; a structured layer has none")
            options.pop("is_target_conv_1d_layer", None)
            super().__init__(base_layer, adapter_name, config=config, **options)
            self.fan_in_fan_out = False
            self._unmerged: list[StructuredLinear] = []

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Add adapters to the operator; ``unmerge`` puts the layer before it back."""
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
            for name in names:
                layer: Any = self.get_base_layer()
                with torch.no_grad():
                    merged = _merged(layer, self.lora_A[name], self.lora_B[name], self.scaling[name])
                if safe_merge and not all(bool(torch.isfinite(p).all()) for p in merged.parameters()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                self._unmerged.append(layer)
                self.base_layer = merged
                self.merged_adapters.append(name)

        def unmerge(self) -> None:
            """The layer as it was before the adapters were merged."""
            if self._unmerged:
                self.base_layer = self._unmerged[0]
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
