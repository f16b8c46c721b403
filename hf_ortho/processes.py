"""Reductions over all processes of ``torch.distributed``; a single process gets its tensor back."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import logging
import time
from collections.abc import Iterator

import torch
from torch import Tensor, distributed

from .errors import ProcessError

logger = logging.getLogger("hf_ortho")

NOTE_AFTER = 5.0  # seconds of waiting for other processes
_scope = contextvars.ContextVar("scope", default="")  # of ``together``: all, alone, or none
_meeting = 0  # number of the next one; the same in all processes that came to the last


def several_processes() -> bool:
    """Whether ``torch.distributed`` is running, outside of ``together`` of one process."""
    return distributed.is_available() and distributed.is_initialized() and _scope.get() != "alone"


@contextlib.contextmanager
def together(all_processes: bool, what: str) -> Iterator[None]:
    """Within the block, reductions are over all processes, which wait for each other at its start, or over this one.

    A process that waits logs a note after some seconds, and gives up after the timeout of the process group, as
    collectives do. ``what`` is what they all call. Within a block, further ones change nothing.

    Raises:
        ProcessError: another process did not come.
    """
    if _scope.get():
        yield
        return
    if all_processes and several_processes():
        _meet(what)
    token = _scope.set("all" if all_processes else "alone")
    try:
        yield
    finally:
        _scope.reset(token)


def _meet(what: str) -> None:
    """Return as soon as every process is here, whatever backend they use for collectives."""
    # Each comes to the meeting of the lowest number that was not called off, and the first that sees all others or
    # gives up decides, atomically, whether it takes place. One that comes late thus waits for the next attempt.
    global _meeting
    if distributed.get_backend() == "mpi":  # without a store
        return
    store = distributed.distributed_c10d._get_default_store()
    ranks = range(distributed.get_world_size())
    timeout = store.timeout.total_seconds()  # type: ignore[attr-defined]  # missing in its stub
    start, noted = time.monotonic(), False

    def decided(word: str) -> str:
        return store.compare_set(f"hf_ortho/{_meeting}/decision", "", word).decode()

    for pause in itertools.chain((0.001, 0.002, 0.005, 0.01, 0.02), itertools.repeat(0.05)):
        key = f"hf_ortho/{_meeting}"
        while store.check([f"{key}/decision"]) and decided("") == "off":
            _meeting += 1
            key = f"hf_ortho/{_meeting}"
        store.set(f"{key}/{distributed.get_rank()}", "here")
        complete = store.check([f"{key}/{rank}" for rank in ranks])  # one request
        waited = time.monotonic() - start
        if complete and decided("on") == "on":
            _meeting += 1
            return
        late = not complete and waited > (timeout if noted else NOTE_AFTER)
        if late and (missing := [str(rank) for rank in ranks if not store.check([f"{key}/{rank}"])]):
            message = (
                f"{what} waits for rank {', '.join(missing)} of {len(ranks)} processes, at most {timeout:g} seconds "
                "(ddp_timeout): others may still be preparing data. In your own script, call it in all processes, each "
                "with its own batches, or pass distributed=False to use only the batches of this one"
            )
            if not noted:
                logger.warning(f"note: {message}")
                noted = True
            elif decided("off") == "off":
                raise ProcessError(message)
        time.sleep(pause)


def collective_device(other: torch.device) -> torch.device:
    """The device for the tensors of a collective: the GPU for NCCL, which requires it, otherwise ``other``."""
    nccl = several_processes() and distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else other


def sum_over_processes(x: Tensor) -> Tensor:
    return _reduced(x, "SUM")


def mean_over_processes(x: Tensor) -> Tensor:
    return _reduced(x, "SUM") / distributed.get_world_size() if several_processes() else x


def min_over_processes(x: Tensor) -> Tensor:
    return _reduced(x, "MIN")


def max_over_processes(x: Tensor) -> Tensor:
    return _reduced(x, "MAX")


def any_process(flags: Tensor) -> Tensor:
    """For each flag, whether any process sets it."""
    return _reduced(flags.int(), "MAX").bool()


def _reduced(x: Tensor, operation: str) -> Tensor:
    if not several_processes():
        return x
    x = x.clone()
    distributed.all_reduce(x, getattr(distributed.ReduceOp, operation))
    return x
