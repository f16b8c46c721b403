"""CPU kernels: an activation and its gradients chunk by chunk, with nothing kept between the two but the input.

A chunk and its scratch rows stay in the cache, so an activation costs little more than the memory traffic of one pass.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

if TYPE_CHECKING:
    from .family import Family

GRAIN = 32768  # elements; from here on ATen opens an OpenMP region for every operation
CHUNK = 1 << 16  # large enough that the interpreter's share is small, small enough for a second-level cache of 2 MB
LARGE = 1 << 18  # elements; from here on tables pay off that are made anew after each update of the parameters
DEVICE_CHUNK = 1 << 24  # on an accelerator without kernels of its own launches are what costs
MAX_THREADS = 16  # beyond, Python's lock is the limit

within = torch.ops.aten.hardtanh_backward.grad_input  # (g, x, lo, hi): g where lo < x < hi, else 0
above = torch.ops.aten.threshold_backward.grad_input  # (g, x, start): g where x > start, else 0

Vectors = tuple[tuple[float, ...], ...]
Scratch = Sequence[Tensor | None]


class Series(Protocol):
    """S of one family with fixed parameters, on chunks of a floating dtype of at least 32 bits.

    ``scratch`` are ``scratch_rows`` buffers of the chunk's length, one after the other in memory; where one is None the
    operation allocates. ``out`` may be None for the same reason. ``x`` and ``g`` are not written to.
    """

    scratch_rows: int

    def value(self, x: Tensor, out: Tensor | None, scratch: Scratch) -> Tensor:
        """S(x)."""

    def backward_chunk(self, x: Tensor, g: Tensor, out: Tensor | None, scratch: Scratch, reduce: bool) -> list[float]:
        """g S'(x) into ``out`` unless that is None; returns sums over the chunk if ``reduce``."""

    def parameter_gradients(self, sums: list[float]) -> list[list[float]]:
        """The gradient of each parameter vector, from the sums over all chunks."""


class Activation:
    """f(x) = S(clamp(x, lo, hi)) + s_lo min(x - lo, 0) + s_hi max(x - hi, 0), with fixed parameters."""

    def __init__(
        self,
        make_series: Callable[[Vectors, tuple[float, float], torch.dtype, torch.device, bool], Series],
        parameters: Vectors,
        domain: tuple[float, float],
        slopes: tuple[float, float],
        dtype: torch.dtype,
        device: torch.device,
        large: bool,
    ):
        parameters = tuple(tuple(rounded(vector, dtype)) for vector in parameters)
        self.make_series = make_series
        self.series = make_series(parameters, domain, dtype, device, large)
        self.domain = domain
        self.slopes = slopes
        ends = np.array(domain, dtype=np.float64 if dtype == torch.float64 else np.float32)
        self.bounds = tuple(np.nextafter(ends, np.array([-np.inf, np.inf], dtype=ends.dtype)).tolist())
        self.pure = domain == (-torch.inf, torch.inf) and slopes == (0.0, 0.0)
        rows = self.series.scratch_rows
        self.scratch_rows = rows if self.pure else max(rows, 1) + 1  # the tails take one while the series takes none
        self.no_scratch = (None,) * self.scratch_rows
        self.dtype = dtype
        self.parameters = parameters

    def value(self, x: Tensor, out: Tensor | None, scratch: Scratch) -> Tensor:
        if self.pure:
            return self.series.value(x, out, scratch)
        (lo, hi), (s_lo, s_hi) = self.domain, self.slopes
        inside = torch.clamp(x, lo, hi, out=scratch[0])
        y = self.series.value(inside, out, scratch[1:])
        if s_lo or s_hi:
            beyond = torch.sub(x, inside, out=inside)
            if s_lo:
                y.add_(torch.clamp_max(beyond, 0.0, out=scratch[1]), alpha=s_lo)
            if s_hi:
                y.add_(beyond.clamp_(min=0.0), alpha=s_hi)
        return y

    def backward_chunk(
        self, x: Tensor, g: Tensor, out: Tensor | None, scratch: Scratch, parameters: bool, domain: bool
    ) -> list[float]:
        """g f'(x) into ``out`` unless that is None; returns the sums that ``parameters`` and ``domain`` ask for."""
        if self.pure:
            return self.series.backward_chunk(x, g, out, scratch, parameters) + [0.0, 0.0] * domain
        s_lo, s_hi = self.slopes
        inside = torch.clamp(x, *self.domain, out=scratch[0])
        sums = self.series.backward_chunk(inside, g, out, scratch[1:], parameters)
        if out is not None:
            within(out, x, *self.bounds, grad_input=out)
        for slope, outside in ((s_lo, self._below), (s_hi, self._above)):
            if domain or (slope and out is not None):
                part = outside(x, g, scratch[1])
                if domain:
                    sums.append(part.sum().item())
                if slope and out is not None:
                    out.add_(part, alpha=slope)
        return sums

    def _above(self, x: Tensor, g: Tensor, row: Tensor | None) -> Tensor:
        return above(g, x, self.domain[1], grad_input=row)

    def _below(self, x: Tensor, g: Tensor, row: Tensor | None) -> Tensor:
        return torch.sub(g, above(g, x, self.bounds[0], grad_input=row), out=row)

    def domain_gradient(self, sums: list[float]) -> list[float]:
        """df/dlo = S'(lo) - s_lo where x < lo, and likewise hi; an infinite end gets 0."""
        # In float64: at a good fit S' and the slope of the tail nearly cancel.
        ends = torch.tensor(self.domain, dtype=torch.float64, device="cpu").nan_to_num(posinf=0.0, neginf=0.0)
        slopes = torch.empty_like(ends)
        series = self.make_series(self.parameters, self.domain, ends.dtype, ends.device, False)
        series.backward_chunk(ends, torch.ones_like(ends), slopes, list(ends.new_empty(series.scratch_rows, 2)), False)
        pairs = zip(sums, slopes.tolist(), self.slopes, self.domain, strict=True)
        return [0.0 if abs(end) == torch.inf else total * (s - tail) for total, s, tail, end in pairs]


def rounded(values, dtype: torch.dtype) -> list[float]:
    """Numbers of ``dtype``; too large ones become infinite, where torch refuses a number as a factor."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64 if dtype == torch.float64 else np.float32).tolist()


# Keyed by values, so that no update of a parameter, however it is made, can leave a stale entry.
_activation = functools.lru_cache(maxsize=512)(Activation)


def _prepare(make_series, x: Tensor, parameters: Sequence[Tensor], domain: Tensor, tail_slopes: Tensor) -> Activation:
    vectors = tuple([tuple(p.tolist()) for p in parameters])
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    large = x.numel() >= LARGE
    straight = tuple(domain.tolist()), tuple(tail_slopes.tolist())
    return _activation(make_series, vectors, *straight, dtype, x.device, large)


def forward(family: Family, x: Tensor, parameters: Sequence[Tensor], domain: Tensor, tail_slopes: Tensor) -> Tensor:
    """f(x), in the shape, strides and dtype of ``x``."""
    activation = _prepare(family.cpu_series, x, parameters, domain, tail_slopes)
    if x.numel() <= GRAIN:
        converts = x.dtype != activation.dtype
        y = activation.value(x.to(activation.dtype) if converts else x, None, activation.no_scratch)
        return y.to(x.dtype) if converts else y
    y = torch.empty_like(x)
    source, out = _flat(x, y.stride()), _flat(y, y.stride())

    def body(scratch: list[Tensor], span: slice) -> None:
        if x.dtype == activation.dtype:
            activation.value(source[span], out[span], scratch)
        else:
            out[span] = activation.value(scratch[0].copy_(source[span]), scratch[1], scratch[2:])

    _run(body, x, activation, 2)
    return y


def backward(
    family: Family,
    g: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    domain: Tensor,
    tail_slopes: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, list[Tensor] | None, Tensor | None]:
    """The gradients of x, of each parameter and of the domain, each where ``needs`` asks for it."""
    needs_x, needs_parameters, needs_domain = needs
    activation = _prepare(family.cpu_series, x, parameters, domain, tail_slopes)
    gx = torch.empty_like(x) if needs_x else None
    stride = dense_stride(x)
    source, upstream, out = _flat(x, stride), _flat(g, stride), None if gx is None else _flat(gx, stride)

    def body(scratch: list[Tensor], span: slice) -> list[float]:
        if x.dtype == activation.dtype:
            target = None if out is None else out[span]
            return activation.backward_chunk(
                source[span], upstream[span], target, scratch, needs_parameters, needs_domain
            )
        inputs, target = (scratch[0].copy_(source[span]), scratch[1].copy_(upstream[span])), scratch[2]
        sums = activation.backward_chunk(*inputs, target, scratch[3:], needs_parameters, needs_domain)
        if out is not None:
            out[span] = target
        return sums

    by_chunk = _run(body, x, activation, 3)
    sums = [sum(column, np.float64(0.0)) for column in zip(*by_chunk, strict=True)]  # and in a fixed order
    at_domain = _gradient(activation.domain_gradient(sums[-2:]), domain) if needs_domain else None
    at_parameters = None
    if needs_parameters:
        vectors = activation.series.parameter_gradients(sums[:-2] if needs_domain else sums)
        at_parameters = [_gradient(v, p) for v, p in zip(vectors, parameters, strict=True)]
    return gx, at_parameters, at_domain


def _gradient(values: list[float], parameter: Tensor) -> Tensor:
    return torch.tensor(values, dtype=parameter.dtype, device=parameter.device)


# ---- chunks and threads ----------------------------------------------------------------------------------------------


def _chunk_size(x: Tensor) -> int:
    return CHUNK if x.device.type == "cpu" else DEVICE_CHUNK


def dense_stride(x: Tensor) -> tuple[int, ...]:
    """The strides of ``torch.empty_like(x)``: those of ``x`` where it has no gaps and overlaps in memory."""
    return torch.empty_like(x, device="meta").stride()


def arranged(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``x``, or a copy of it with these strides."""
    if x.stride() == stride:
        return x
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def _flat(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The elements in the order that dense memory with these strides has them; a view if ``x`` has them."""
    return arranged(x, stride).as_strided((x.numel(),), (1,))


def _run(body: Callable, x: Tensor, activation: Activation, conversions: int) -> list:
    """``body(scratch, span)`` for every chunk; its results in the order of the chunks, whatever thread ran it.

    The first ``conversions`` scratch rows are there only where the dtype of ``x`` is not that of the arithmetic.
    """
    # The chunks are cut by the size of x alone. Every thread takes one contiguous range of them, with scratch rows of
    # its own that it uses again for each chunk, and so keeps in its cache. Results come back per chunk rather than per
    # thread, and are added up in the order of the chunks: the bits do not depend on the number of threads. Threads of
    # Python's do, since ATen releases the interpreter's lock inside each operation.
    n, size = x.numel(), _chunk_size(x)
    chunks = max(-(-n // size), 1)
    inference = torch.is_inference_mode_enabled()
    shape = activation.scratch_rows + (conversions if x.dtype != activation.dtype else 0), min(size, n + n % 2)

    def work(first: int, last: int) -> list:
        # Modes belong to threads. Inside inference mode tensors are made that only it may write to.
        with torch.inference_mode() if inference else contextlib.nullcontext(), torch.no_grad():
            scratch = list(torch.empty(shape, dtype=activation.dtype, device=x.device))
            spans = [slice(i * size, min((i + 1) * size, n)) for i in range(first, last)]
            results = [body(scratch, span) for span in spans[:-1]]
            rest = spans[-1].stop - spans[-1].start
            return [*results, body([row[:rest] for row in scratch], spans[-1])]

    threads = min(torch.get_num_threads(), MAX_THREADS)
    if threads == 1 or n <= GRAIN or x.device.type != "cpu":
        return work(0, chunks)
    ends = [chunks * t // threads for t in range(threads + 1)]
    jobs = [_submit(threads, work, *span) for span in itertools.pairwise(ends) if span[0] < span[1]]
    return [result for job in jobs for result in job()]


def _submit(threads: int, work: Callable, *span: int) -> Callable[[], list]:
    try:
        return _pool(threads, os.getpid()).submit(work, *span).result
    except RuntimeError:  # threads that outlive the main one, at the exit of the interpreter
        return functools.partial(work, *span)


@functools.lru_cache(maxsize=4)
def _pool(threads: int, pid: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads in which ATen works alone: many short OpenMP regions crawl as soon as a core is taken by somebody else.

    Threads do not survive a fork, hence one pool per process.
    """
    return concurrent.futures.ThreadPoolExecutor(threads, "hf_ortho", _work_alone)


def _work_alone() -> None:
    torch.get_num_threads()  # takes over the process's setting, once per thread
    threadpool_limits(limits=1, user_api="openmp")  # OpenMP's own setting belongs to the thread
