"""What autograd keeps for the backward pass, and the peak of the memory in use."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
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


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """The most memory that ``call`` needs at any moment, beyond what is in use before it.

    On the CPU it is the resident set's high-water mark as the kernel keeps it, which sees the allocations of every
    thread and library (torch's profiler sees only those of the calling thread); on CUDA that of torch's allocator.
    None where the mark cannot be reset, which takes Linux.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # freed memory that is still resident would hide what is taken again
    try:
        CLEAR.write_text("5")
    except OSError:  # some sandboxes forbid it
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
