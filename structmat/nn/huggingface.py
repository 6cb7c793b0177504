"""Hugging Face: structured layers in ``save_pretrained`` and ``from_pretrained``, as a registered quantization method.

Where transformers is installed, ``import structmat.nn`` is all that a process needs: the method is registered as soon as
transformers' own table of methods is loaded, without loading it. A process without that import meets, for the first structured
layer of a checkpoint, a tensor under the name of the dense weight whose shape cannot fit, so that ``from_pretrained`` raises
instead of filling the layers with random numbers.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

METHOD = "structmat"
_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Register the quantization method with transformers, now or when its table of methods is loaded; once a process."""
    if _TABLE in sys.modules:
        _enter(sys.modules[_TABLE])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def attach(model: Any) -> None:
    """Tell every ``PreTrainedModel`` in a module about its structured layers: ``save_pretrained`` and ``dequantize`` need it.

    Called by :func:`structmat.nn.convert` and :func:`structmat.nn.load`.
    """
    for part in reversed([m for m in model.modules() if _is_pretrained(m)]):  # a body may share its head's config
        _attach(part)


def _attach(model: Any) -> None:
    from structmat.nn.storage import describe

    layers = describe(model)
    if not layers:
        return
    register()
    classes = _classes()
    config = classes["config"](layers=layers)
    model.config.quantization_config = config
    model.hf_quantizer = classes["quantizer"](config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    _know_shared(model)


def _know_shared(model: Any) -> None:
    """Tell transformers which factors of structured layers are one parameter, as of now: it ties them after loading."""
    from structmat.nn.joint import shared_factors

    ties = {
        f"{name}.factors.{slot}": f"{home}.factors.{other}"
        for name, slots in shared_factors(model).items()
        for slot, (home, other) in slots.items()
    }
    known = getattr(model, "all_tied_weights_keys", None) or {}
    mine = getattr(model, "_structmat_ties", ())
    model.all_tied_weights_keys = {k: v for k, v in known.items() if k not in mine} | ties
    model._structmat_ties = tuple(ties)


def detach(model: Any) -> None:
    """Make every ``PreTrainedModel`` in a module that has lost its structured layers an ordinary one again."""
    for part in model.modules():
        quantizer: Any = getattr(part, "hf_quantizer", None)
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "")
        if _is_pretrained(part) and method == METHOD:
            quantizer.remove_quantization_config(part)
            _know_shared(part)


def _is_pretrained(model: Any) -> bool:
    home = sys.modules.get("transformers.modeling_utils")
    return home is not None and isinstance(model, home.PreTrainedModel)


def _classes() -> dict[str, type]:
    table = sys.modules[_TABLE] if _TABLE in sys.modules else importlib.import_module(_TABLE)
    _enter(table)
    return {"config": table.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], "quantizer": table.AUTO_QUANTIZER_MAPPING[METHOD]}


class _Watch(importlib.abc.MetaPathFinder):
    """Enters the method into transformers' table when that is loaded, by whoever wants it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, with a loader that registers afterwards."""
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the loader that is wrapped."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Load the table, then enter the method."""
        self._loader.exec_module(module)
        _enter(module)


def _enter(table: Any) -> None:
    """Put the two classes into transformers' table, unless they are there."""
    if METHOD in table.AUTO_QUANTIZER_MAPPING:
        return
    config = _config_class(table)
    table.register_quantization_config(METHOD)(config)
    table.register_quantizer(METHOD)(_quantizer_class(table))


def _config_class(table: Any) -> type:
    class StructuredConfig(table.QuantizationConfigMixin):
        """The structure of the layers by name, as it stands in ``config.json``.

        Parameters
        ----------
        layers
            For every name ``{"config": ..., "class": "Linear" | "Conv1D"}``.
        version
            Of this description.
        """

        def __init__(self, layers: Mapping[str, Any] | None = None, version: int = 1, **unknown: Any) -> None:
            from structmat.nn.storage import VERSION

            unknown.pop("quant_method", None)
            if unknown or version > VERSION:
                raise ValueError(
                    f"quantization_config of structmat: version {version} with {sorted(unknown)}; this structmat reads up to "
                    f"version {VERSION}"
                )
            self.quant_method = METHOD
            self.layers = dict(layers or {})
            self.version = version

    return StructuredConfig


def _quantizer_class(table: Any) -> type:
    class StructuredQuantizer(table.HfQuantizer):
        """Puts empty structured layers where the checkpoint has them, and multiplies them out again."""

        requires_calibration = True  # a dense model is converted by structmat.nn.convert, not while it is loaded

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            from structmat.nn.joint import tie_as
            from structmat.nn.modules import is_dense_linear, put, shape_of
            from structmat.nn.storage import build, read_shared

            layers, made = self.quantization_config.layers, {}
            for stored, entry in layers.items():
                name = _place(model, stored)
                old = model.get_submodule(name)
                like = next(old.parameters())
                layer = build(entry, like.device, like.dtype)
                if not is_dense_linear(old) or shape_of(old) != shape_of(layer):
                    raise ValueError(f"{name}: expected a linear layer {shape_of(layer)}, got {old}")
                made[stored] = layer
                put(model, name, layer.train(old.training))
            tie_as(made, read_shared(layers, made))
            _know_shared(model)
            ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), *_guard(model, layers)}
            model._keys_to_ignore_on_load_unexpected = ignored
            return model

        def _dequantize(self, model: Any, dtype: Any = None) -> Any:
            from structmat.nn.densify import dense_layers
            from structmat.nn.modules import put

            dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved model's config has its name
            for name, dense in dense_layers(model).items():
                put(model, name, dense if dtype is None else dense.to(dtype))
            _know_shared(model)
            return model

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
            """All tensors once, and one that stops a process without structmat.nn from loading the file."""
            from structmat.nn.joint import shared_factors
            from structmat.nn.storage import describe

            self.quantization_config.layers = layers = describe(model)
            model.config.quantization_config = self.quantization_config  # not that of a head around it
            again = [f"{name}.factors.{slot}" for name, slots in shared_factors(model).items() for slot in slots]
            state = {k: x for k, x in model.state_dict().items() if k not in again}
            if layers:
                state[_sentinel(layers)] = torch.zeros(1)
            return state, {
                METHOD: "the layers of config.json's quantization_config are structured: import structmat.nn"
            }

        def is_serializable(self) -> bool:
            """True: the layers are plain tensors."""
            return True

        @property
        def is_trainable(self) -> bool:
            """True: the factors are parameters."""
            return True

        @property
        def is_compileable(self) -> bool:
            """True."""
            return True

    return StructuredQuantizer


def _sentinel(layers: Mapping[str, Any]) -> str:
    """The dense weight's name of the first structured layer: a process that does not know the method expects it there."""
    return f"{min(layers)}.weight"


def _guard(model: Any, layers: Mapping[str, Any]) -> list[str]:
    """Patterns of keys that are no loss."""
    prefix = f"{model.base_model_prefix}."
    return [rf"(^|\.){re.escape(_sentinel(layers).removeprefix(prefix))}$"] if layers else []


def _place(model: Any, stored: str) -> str:
    """The name of a layer in a model that may be the body of the one that was saved, or have it as its body."""
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_modules()}
    for name in (stored, prefix + stored, stored.removeprefix(prefix)):
        if name in names:
            return name
    raise ValueError(f"{type(model).__name__} has no layer {stored!r}, which the checkpoint has")
