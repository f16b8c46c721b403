"""What autograd keeps for the backward pass, and the peak of the memory in use."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def saved_bytes(forward: Callable[[], object], beside: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that ``forward`` saves for the backward pass, without those of ``beside``."""
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in beside}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def kept_bytes(forward: Callable[[], object], device: str = "cpu") -> int | None:
    """The memory in use once ``forward`` has returned, as long as its result lives, beyond what was in use before.

    Unlike ``saved_bytes`` it also sees what is kept without autograd's knowledge. The memory is that of
    ``peak_bytes``.
    """
    before = _in_use(device)
    result = forward()
    after = _in_use(device)
    del result
    return None if before is None or after is None else after - before


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """The most memory that ``call`` needs at any moment, beyond what is in use before it.

    On the CPU it is the resident set's high-water mark as the kernel keeps it, which sees the allocations of every
    thread and library (torch's profiler sees only those of the calling thread); on CUDA that of torch's allocator.
    None where the mark cannot be reset, which takes Linux.
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
    """``peak_bytes`` or ``kept_bytes`` of each call, empty where it cannot be had."""
    gc.collect()
    found = {name: measure(call, device) for name, call in calls.items()}
    return {name: float(size) for name, size in found.items() if size is not None}


def _in_use(device: str) -> int | None:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    if not CLEAR.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # freed memory that is still resident would hide what is taken again
    return _status("VmRSS")


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
