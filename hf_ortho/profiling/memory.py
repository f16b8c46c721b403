"""Measure the memory that autograd saves for the backward pass, and peak memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def saved_bytes(forward: Callable[[], object], beside: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that ``forward`` saves for the backward pass, except those of ``beside``."""
    saved: dict[int, torch.UntypedStorage] = {}  # kept alive: no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    excluded = {tensor.untyped_storage().data_ptr() for tensor in beside}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in excluded)


def kept_bytes(forward: Callable[[], object], device: str = "cpu") -> int | None:
    """The increase of the memory in use after ``forward`` has returned, while its result is alive.

    Unlike ``saved_bytes``, this includes memory that autograd does not know of. Memory is measured as in
    ``peak_bytes``.
    """
    before = _in_use(device)
    result = forward()
    after = _in_use(device)
    del result
    return None if before is None or after is None else after - before


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Peak memory of ``call``, relative to the memory in use before it.

    On the CPU this is the kernel's high-water mark of the resident set, which includes the allocations of every thread
    and library (torch's profiler sees only the calling thread). On CUDA it is the peak of torch's allocator. None if
    the mark cannot be reset, which works only on Linux.
    """
    before = _in_use(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - (before or 0)
    if before is None:
        return None
    try:
        CLEAR.write_text("5")
    except OSError:  # some sandboxes forbid it
        return None
    call()
    return _status("VmHWM") - before


def measure_each(
    measure: Callable[[Callable[[], object], str], int | None], calls: Mapping[str, Callable[[], object]], device: str
) -> dict[str, float]:
    """``peak_bytes`` or ``kept_bytes`` of each call; empty if they cannot be measured."""
    gc.collect()
    sizes = {name: measure(call, device) for name, call in calls.items()}
    return {name: float(size) for name, size in sizes.items() if size is not None}


def _in_use(device: str) -> int | None:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    if not CLEAR.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # freed but resident memory would hide new allocations
    return _status("VmRSS")


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
