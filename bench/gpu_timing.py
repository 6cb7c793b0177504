"""Timing on a device: medians of event timings with the cache flushed between them, ceilings, kernels counted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FLUSH = 256 << 20  # bytes written between two timings: several times the second-level cache
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


class Device:
    """Where a run takes place: a CUDA device, or the CPU for a dry run that shows that everything works."""

    def __init__(self, cpu: bool, seconds: float) -> None:
        self.cpu, self.seconds = cpu, seconds
        self.name = "cpu" if cpu else "cuda"
        self._flush = torch.empty(1 if cpu else FLUSH, dtype=torch.int8, device=self.name)

    def median(self, call: Callable[[], object]) -> tuple[float, float]:
        """Median seconds of one call, and half the distance of the quartiles in parts of it."""
        first = self._once(call)  # compiles, fills pools
        first = min(first, self._once(call))
        count = max(3, min(100, int(self.seconds / max(first, 1e-6))))
        taken = sorted(self._once(call) for _ in range(count))
        middle = statistics.median(taken)
        low, _, high = statistics.quantiles(taken, n=4)
        return middle, (high - low) / (2 * middle)

    def _once(self, call: Callable[[], object]) -> float:
        if self.cpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def kernels(self, call: Callable[[], object]) -> int:
        """Kernels that one call launches; on the CPU: products and copies."""
        activities = [torch.profiler.ProfilerActivity.CPU if self.cpu else torch.profiler.ProfilerActivity.CUDA]
        call()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            self.synchronize()
        if self.cpu:
            counted = ("aten::bmm", "aten::mm", "aten::addmm", "aten::copy_")
            return sum(e.count for e in profile.key_averages() if e.key in counted)
        device = torch.autograd.DeviceType.CUDA
        return sum(e.count for e in profile.key_averages() if e.device_type == device)

    def synchronize(self) -> None:
        if not self.cpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory back between cells."""
        if not self.cpu:
            torch.cuda.empty_cache()

    def free(self) -> float:
        """Bytes that a cell may take."""
        return 8e9 if self.cpu else 0.9 * torch.cuda.mem_get_info()[0]


class Ceilings(NamedTuple):
    """What the device reaches in this run."""

    copy: float  # bytes read and written per second
    flops: dict[str, float]  # of a large product, by dtype
    launch: float  # seconds of the smallest operation


def ceilings(device: Device) -> Ceilings:
    """Copy of a large array, a large product of each dtype on random values, and an operation on one number."""
    size, n = (1 << 22, 256) if device.cpu else (1 << 31, 8192)
    a = torch.zeros(size, dtype=torch.uint8, device=device.name)
    b = torch.empty_like(a)
    copy = 2 * size / device.median(lambda: b.copy_(a))[0]
    flops = {}
    for name, dtype in DTYPES.items():
        x = torch.randn(n, n, device=device.name).to(dtype)
        with tf32(name == "tf32"):
            flops[name] = 2 * n**3 / device.median(lambda x=x: x @ x)[0]
    one = torch.zeros(1, device=device.name)
    return Ceilings(copy, flops, device.median(lambda: one.add_(1))[0])


class tf32:  # noqa: N801 (reads as a verb)
    """Products of float32 on the tensor cores for a ``with`` block, in torch and in CuPy."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __enter__(self) -> None:
        from structmat.backends import use_precision

        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.on
        self.chosen = use_precision("tf32" if self.on else "exact")

    def __exit__(self, *failure: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.before
        self.chosen.__exit__(None, None, None)
