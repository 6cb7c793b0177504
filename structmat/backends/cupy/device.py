"""The rates of the device at hand for the cost model."""

from __future__ import annotations

from functools import cache

from structmat.backends.cuda.roofline import H200, Rates
from structmat.backends.cupy import library

REACHED = 0.88  # of the memory's data sheet, by a copy (measured on an H200: 4.3 of 4.9 TB/s)
DENSE = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}  # 16-bit operations of a multiprocessor and clock on tensor cores
CLOCK, MEMORY_CLOCK = 1_500_000, 2_000_000  # in kHz, where a driver does not tell
SUSTAINED = 0.75  # of those, by a large product


@cache
def rates(device: int) -> Rates:
    """Rates of a device from its properties: clocks, processors, memory; those of an H200 were measured.

    Parameters
    ----------
    device
        Its number.
    """
    cupy = library.cupy()
    properties = cupy.cuda.runtime.getDeviceProperties(device)
    name = properties["name"]
    name = name.decode() if isinstance(name, bytes) else str(name)
    if "H200" in name:
        return H200._replace(name=name)
    attributes = cupy.cuda.Device(device).attributes
    clock = 1e3 * attributes.get("ClockRate", CLOCK)
    transfers = 2e3 * attributes.get("MemoryClockRate", MEMORY_CLOCK)
    copy = REACHED * transfers * attributes["GlobalMemoryBusWidth"] / 8
    processors = attributes["MultiProcessorCount"]
    capability = (int(properties["major"]), int(properties["minor"]))
    double = 2 if capability in DENSE else 64  # single-precision operations for one in double precision
    half = SUSTAINED * clock * processors * DENSE.get(capability, 1024)
    single = SUSTAINED * clock * processors * (128 if capability == (8, 0) else 256)
    return Rates(
        name=name,
        copy=copy,
        flops={"bfloat16": half, "float16": half, "tf32": half / 2, "float32": single, "float64": single / double},
        cache=1.3 * copy,
        cache_bytes=attributes["L2CacheSize"],
        shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
        processors=processors,
        call=H200.call,
        capability=capability,
    )
