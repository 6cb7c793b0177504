"""Calibration: the moments of the inputs of layers, gathered while the model runs over some batches."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from structmat.nn.running import Mask, call, evaluating, first_input, layer_names, read_mask, real_rows, submodule
from structmat.projection.moments import Moments
from structmat.projection.progress import bar

_CHUNK = 8192  # rows of one product in the inputs' precision: the sums over many are in double precision


class Calibration(Mapping[str, Moments]):
    """The moments of the inputs of layers by name, and which layers read the same input; made by :func:`calibrate`.

    Sums of parts of the data add up by ``+``, those of several processes by :meth:`reduce`.

    Parameters
    ----------
    moments
        For the first layer of every group its :class:`structmat.Moments`.
    leaders
        For the name of every layer the first layer that reads the same input: itself where no other does.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    >>> moments = snn.calibrate(model, [torch.randn(10, 3), torch.randn(20, 3)], ["0", "2"])
    >>> moments["2"]
    <Moments of 30 samples of 5 inputs>
    >>> (moments + moments).tokens
    60
    """

    def __init__(self, moments: Mapping[str, Moments], leaders: Mapping[str, str]) -> None:
        self._moments, self._leaders = dict(moments), dict(leaders)
        missing = set(self._leaders.values()) - set(self._moments)
        if missing:
            raise ValueError(
                f"Calibration: expected moments of {sorted(missing)}, got those of {sorted(self._moments)}"
            )

    def __getitem__(self, name: str) -> Moments:
        return self._moments[self._leaders[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaders)

    def __len__(self) -> int:
        return len(self._leaders)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers that read the same input, in the order in which the inputs were first seen."""
        found: dict[str, list[str]] = {leader: [] for leader in self._moments}
        for name, leader in self._leaders.items():
            found[leader].append(name)
        return tuple(tuple(names) for names in found.values())

    @property
    def tokens(self) -> int:
        """Samples that the best fed layer has seen."""
        return max((m.count for m in self._moments.values()), default=0)

    def __add__(self, other: Calibration) -> Calibration:
        if not isinstance(other, Calibration):
            return NotImplemented
        if self._leaders != other._leaders:
            raise ValueError(
                "Calibration: cannot add moments of other layers, or of layers that share inputs otherwise"
            )
        return Calibration({k: m + other._moments[k] for k, m in self._moments.items()}, self._leaders)

    def reduce(self, group: Any = None) -> Calibration:
        """The sums over all processes of a ``torch.distributed`` group, the same in each of them.

        One all-reduce of ``n**2 + n + 1`` float64 numbers for each distinct input. Raises ``RuntimeError`` if
        ``torch.distributed`` is not initialised, and ``ValueError``, in all processes, unless they have calibrated the same
        layers.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("Calibration.reduce: torch.distributed is not initialised in this process")
        mine = sorted(self._leaders.items()), {name: len(m.total) for name, m in self._moments.items()}
        everyones: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyones, mine, group=group)
        if any(theirs != everyones[0] for theirs in everyones):
            counts = ", ".join(f"{len(leaders)} layers of {len(widths)} inputs" for leaders, widths in everyones)
            raise ValueError(
                "Calibration.reduce: the processes have moments of other layers, or of layers that share inputs otherwise: "
                f"{counts}"
            )
        where = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
        found = {}
        for name, m in sorted(self._moments.items()):  # in every process in the same order
            flat = torch.cat([torch.from_numpy(m.gram).reshape(-1), torch.from_numpy(m.total), torch.tensor([m.count])])
            flat = flat.to(where)
            dist.all_reduce(flat, group=group)
            host, n = flat.cpu().numpy(), len(m.total)
            found[name] = Moments(host[: n * n].reshape(n, n), host[n * n : -1], round(float(host[-1])))
        return Calibration({name: found[name] for name in self._moments}, self._leaders)

    def __repr__(self) -> str:
        return f"<Calibration: {len(self)} layers, {len(self._moments)} distinct inputs, {self.tokens} tokens>"


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    plan: Iterable[Any],
    *,
    mask: Mask = "attention_mask",
    dtype: torch.dtype = torch.float32,
    share: bool = True,
    progress: bool | None = None,
) -> Calibration:
    """Run the model over batches and gather the second moments and means of the inputs of layers.

    The model runs in evaluation mode without gradients; its mode is restored and the hooks are removed whatever happens.
    Layers that read the same tensor (query, key and value; gate and up) share one moment. Memory: ``8 n**2`` bytes for each
    distinct input of width ``n``; cost ``n**2`` multiply-adds a token besides the forward pass.

    Parameters
    ----------
    model
        Any module.
    batches
        What the model is called with: mappings as keywords, tuples and lists as positions, tensors alone. On the model's
        device already.
    plan
        A :class:`structmat.nn.Plan` (its layers to be converted), or names of layers.
    mask
        Which rows are real: a key of the batches whose value ``(batch, tokens)`` is nonzero there (batches without the key
        have no padding), a function of the batch that returns such a tensor or None, or None. Rows of inputs that have one
        row a text all count.
    dtype
        Precision of the products ``x x^T`` within 8192 rows of a batch, float32 or float64; their sums are in float64.
    share
        False keeps moments for every layer on its own, also where inputs coincide.
    progress
        True shows a bar on runs of more than a second (needs tqdm).

    Returns
    -------
    Calibration
        Moments by layer name; sums, so that ``+`` and ``reduce`` merge them.

    Raises
    ------
    ValueError
        If there are no layers or batches, a layer never ran, inputs hold NaN, a mask does not fit, or which layers share
        inputs changes between batches.
    KeyError
        If the model has no layer of a name.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> moments = snn.calibrate(torch.nn.Linear(4, 2), [torch.ones(3, 4)], [""])
    >>> moments[""].mean.tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    names = layer_names(plan)
    if not names:
        raise ValueError("calibrate: expected at least one layer, got a plan that converts none")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"calibrate: dtype: expected torch.float32 or torch.float64, got {dtype}")
    listener = _Listener(dtype, share)
    seen = 0
    with evaluating(model), bar(progress, "calibrate") as advance:
        hooks = [
            submodule(model, name).register_forward_pre_hook(listener.hook(name), with_kwargs=True) for name in names
        ]
        try:
            for batch in batches:
                listener.begin(read_mask(mask, batch))
                call(model, batch)
                seen += 1
                advance(1, 1)
        finally:
            for hook in hooks:
                hook.remove()
    if not seen:
        raise ValueError("calibrate: expected at least one batch, got none")
    silent = [name for name in names if name not in listener.leaders]
    if silent:
        raise ValueError(
            f"calibrate: {', '.join(silent)}: never ran on the {seen} batches; leave such layers out of the plan"
        )
    return Calibration(
        {name: s.moments(name) for name, s in listener.sums.items()}, {n: listener.leaders[n] for n in names}
    )


class Sums:
    """Running sums of the rows ``x`` of one input: ``sum x x^T`` (or ``sum x y^T``), ``sum x`` and their number."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.gram: Any = 0.0
        self.total: Any = 0.0
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Add rows ``(tokens, n)``; with ``y`` the products are ``x^T y`` and the total is that of ``x``."""
        exact = torch.promote_types(self.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32)
        for start in range(0, x.shape[0], _CHUNK):
            part = x[start : start + _CHUNK].to(exact)
            other = part if y is None else y[start : start + _CHUNK].to(exact)
            self.gram = self.gram + _product(part, other).double()
            self.total = self.total + part.sum(0, dtype=torch.float64)
        self.count += x.shape[0]

    def moments(self, name: str) -> Moments:
        """What has been summed up."""
        if not self.count:
            raise ValueError(f"calibrate: {name}: every row of its inputs is masked")
        gram, total = self.gram.cpu().numpy(), self.total.cpu().numpy()
        if not math.isfinite(float(gram.sum())):
            raise ValueError(f"calibrate: {name}: its inputs hold NaN or infinite numbers")
        return Moments((gram + gram.T) / 2, total, self.count)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x^T y``; NumPy knows that ``x^T x`` is symmetric and computes half of it."""
    if x is not y or x.device.type != "cpu":
        return x.T @ y
    rows = x.detach().contiguous().numpy()
    return torch.from_numpy(rows.T @ rows)


class _Listener:
    """Hooks that add the inputs of layers up, once for all layers that read the same tensor."""

    def __init__(self, dtype: torch.dtype, share: bool) -> None:
        self.dtype, self.share = dtype, share
        self.sums: dict[str, Sums] = {}
        self.leaders: dict[str, str] = {}
        self.mask: torch.Tensor | None = None
        self._inputs: dict[int, tuple[Any, int, str]] = {}

    def begin(self, mask: torch.Tensor | None) -> None:
        self.mask = mask
        self._inputs.clear()

    def hook(self, name: str) -> Callable[..., None]:
        def listen(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            leader, new = self._leader(name, x)
            if self.leaders.setdefault(name, leader) != leader:
                raise ValueError(
                    f"calibrate: {name} shares its input with {self.leaders[name]} on some calls and with {leader} on others; "
                    "calibrate(..., share=False) keeps every layer's moments apart"
                )
            if new:
                self.sums.setdefault(leader, Sums(self.dtype)).add(real_rows(x, self.mask, name))

        return listen

    def _leader(self, name: str, x: torch.Tensor) -> tuple[str, bool]:
        """The first layer that read this very tensor, unchanged, in this pass; whether it is read for the first time."""
        if not self.share:
            return name, True
        known = self._inputs.get(id(x))
        if known is not None and known[0]() is x and known[1] == x._version and known[2] != name:
            return known[2], False
        self._inputs[id(x)] = weakref.ref(x), x._version, name
        return name, True
