"""CPU kernels: an activation and its gradients, chunk by chunk. Only the input is saved for the backward pass.

A chunk and its scratch rows stay in the cache, so an activation costs little more than the memory traffic of one pass.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from .groups import is_grouped

if TYPE_CHECKING:
    from .family import Family

GRAIN = 32768  # elements; above, ATen opens an OpenMP region for every operation
CHUNK = 1 << 16  # elements; large against the interpreter's overhead, small enough for an L2 cache of 2 MB
LARGE = 1 << 18  # elements; from here on, tables pay off although every parameter update rebuilds them
DEVICE_CHUNK = 1 << 24  # elements; on an accelerator without its own kernels, launches are the main cost
MAX_THREADS = 16  # with more, Python's global lock is the limit

within = torch.ops.aten.hardtanh_backward.grad_input  # (g, x, lo, hi): g where lo < x < hi, else 0
above = torch.ops.aten.threshold_backward.grad_input  # (g, x, start): g where x > start, else 0

Scratch = Sequence[Tensor | None]


class Series(Protocol):
    """S of one family with fixed parameters, on chunks of a floating dtype of at least 32 bits.

    ``scratch`` holds ``scratch_rows`` buffers of the chunk's length, contiguous in memory. If a buffer or ``out`` is
    None, the operation allocates its result. ``x`` and ``g`` are not modified.

    A series for groups of channels (``cpu_rows`` of the family) is made with arrays of shape (k, C) in place of vectors
    of length k. Its chunks and scratch buffers have the shape (rows, C), and its sums are vectors of length C. The
    helpers ``tensors``, ``factors``, ``add_scaled`` and ``total`` serve both.
    """

    scratch_rows: int

    def value(self, x: Tensor, out: Tensor | None, scratch: Scratch) -> Tensor:
        """S(x)."""

    def backward_chunk(self, x: Tensor, g: Tensor, out: Tensor | None, scratch: Scratch, reduce: bool) -> list:
        """Write g S'(x) to ``out`` unless it is None; returns sums over the chunk if ``reduce``."""

    def parameter_gradients(self, sums: list) -> list[list]:
        """The gradient of each parameter vector, from the sums over all chunks."""


def rounded(values, dtype: torch.dtype) -> np.ndarray:
    """Numbers rounded to ``dtype``. Those too large become infinite: torch rejects a factor out of range."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64 if dtype == torch.float64 else np.float32)


def tensors(values, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Each number, or each row of numbers per channel, as a tensor that broadcasts against a chunk."""
    return torch.tensor(np.asarray(values), dtype=dtype, device=device).unbind()


def factors(values, dtype: torch.dtype, device: torch.device) -> list:
    """The same for factors: a number remains one, since ATen multiplies by it in the same pass."""
    array = rounded(values, dtype)
    return array.tolist() if array.ndim == 1 else list(tensors(array, dtype, device))


def add_scaled(term: Tensor, x: Tensor, factor: float | Tensor, out: Tensor | None) -> Tensor:
    """term + factor x."""
    if isinstance(factor, Tensor):
        return torch.addcmul(term, x, factor, out=out)
    return torch.add(term, x, alpha=factor, out=out)


def total(summand: Tensor) -> float | Tensor:
    """The sum over a chunk, or for rows of channels over the rows."""
    return summand.sum().item() if summand.ndim == 1 else summand.sum(0)


class Activation:
    """f(x) = S(clamp(x, lo, hi)) + s_lo min(x - lo, 0) + s_hi max(x - hi, 0), with fixed parameters.

    With groups, the numbers in ``parameters`` and ``domain`` are tuples of one number per group, and ``channels`` is
    (C,); without, it is empty.
    """

    def __init__(
        self,
        make_series: Callable[[Any, Any, torch.dtype, torch.device, bool], Series],
        parameters: tuple,
        domain: tuple,
        slopes: tuple[float, float],
        dtype: torch.dtype,
        device: torch.device,
        large: bool,
        channels: tuple[int, ...] = (),
    ):
        vectors: Any = [rounded(vector, dtype).astype(np.float64) for vector in parameters]
        ends = rounded(domain, dtype)
        if channels:
            repeats = channels[0] // len(domain[0])
            per_channel = [v.repeat(repeats, 1) for v in vectors]
            self.limits: Any = tensors(ends.repeat(repeats, 1), dtype, device)
            # of x - clamp(x, lo, hi); the least normal number also if the processor flushes smaller ones to 0
            self.bounds, self.end = (-torch.finfo(dtype).tiny, torch.finfo(dtype).tiny), 0.0
        else:
            vectors = per_channel = [v.tolist() for v in vectors]
            self.limits, self.end = domain, domain[1]
            self.bounds = tuple(np.nextafter(ends, np.array([-np.inf, np.inf], dtype=ends.dtype)).tolist())
        self.series = make_series(per_channel, domain, dtype, device, large)
        self.make_series, self.parameters, self.domain, self.slopes = make_series, vectors, domain, slopes
        self.channels, self.dtype = channels, dtype
        infinite = np.isinf(ends)
        self.open = bool(infinite.any())
        self.pure = bool(infinite.all()) and slopes == (0.0, 0.0)
        rows = self.series.scratch_rows
        self.scratch_rows = rows if self.pure else max(rows, 1) + 1  # one for the clamped x, one for the tails
        self.no_scratch = (None,) * self.scratch_rows

    @functools.cached_property
    def exact(self) -> Series:
        """The series in float64, with one channel per group."""
        return self.make_series(self.parameters, self.domain, torch.float64, torch.device("cpu"), False)

    def value(self, x: Tensor, out: Tensor | None, scratch: Scratch) -> Tensor:
        if self.pure:
            return self.series.value(x, out, scratch)
        s_lo, s_hi = self.slopes
        inside = torch.clamp(x, *self.limits, out=scratch[0])
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
    ) -> list:
        """Write g f'(x) to ``out`` unless it is None; returns the sums for ``parameters`` and ``domain`` if needed."""
        if self.pure:
            sums = self.series.backward_chunk(x, g, out, scratch, parameters)
            return self._by_group(sums + [total(g[:0])] * 2 if domain else sums)
        s_lo, s_hi = self.slopes
        inside = torch.clamp(x, *self.limits, out=scratch[0])
        sums = self.series.backward_chunk(inside, g, out, scratch[1:], parameters)
        if self.channels:  # ATen's masks compare with one number
            x = torch.sub(x, inside, out=inside)
            if self.open:
                x.nan_to_num_(0.0)  # an infinite x at an infinite end
        if out is not None:
            within(out, x, *self.bounds, grad_input=out)
        for slope, outside in ((s_lo, self._below), (s_hi, self._above)):
            if domain or (slope and out is not None):
                part = outside(x, g, scratch[1])
                if domain:
                    sums.append(total(part))
                if slope and out is not None:
                    out.add_(part, alpha=slope)
        return self._by_group(sums)

    def _above(self, x: Tensor, g: Tensor, row: Tensor | None) -> Tensor:
        return above(g, x, self.end, grad_input=row)

    def _below(self, x: Tensor, g: Tensor, row: Tensor | None) -> Tensor:
        return torch.sub(g, above(g, x, self.bounds[0], grad_input=row), out=row)

    def _by_group(self, sums: list) -> list:
        """Sums over a chunk, added up over the channels of each group."""
        if not self.channels or not sums:
            return sums
        return list(torch.stack(sums).view(len(sums), len(self.domain[0]), -1).sum(2).cpu().double().numpy())

    def parameter_gradients(self, sums: list) -> list[list]:
        return (self.exact if self.channels else self.series).parameter_gradients(sums)

    def domain_gradient(self, sums: list) -> np.ndarray:
        """df/dlo = S'(lo) - s_lo where x < lo, and likewise hi; an infinite end gets 0."""
        # In float64, since S' and the slope of the tail nearly cancel after a good fit.
        ends = torch.tensor(self.domain, dtype=torch.float64, device="cpu").nan_to_num(posinf=0.0, neginf=0.0)
        slopes = torch.empty_like(ends)
        scratch = list(ends.new_empty(self.exact.scratch_rows, *ends.shape))
        self.exact.backward_chunk(ends, torch.ones_like(ends), slopes, scratch, False)
        with np.errstate(invalid="ignore", over="ignore"):
            rise = (slopes.numpy().T - self.slopes).T
            return np.where(np.isinf(self.domain), 0.0, np.asarray(sums) * rise)


# Keyed by values: no update of a parameter, however it is made, can leave a stale entry.
_activation = functools.lru_cache(maxsize=512)(Activation)
_activation_of_groups = functools.lru_cache(maxsize=64)(Activation)  # may take megabytes for thousands of channels


def _prepare(
    family: Family, x: Tensor, parameters: Sequence[Tensor], domain: Tensor, tail_slopes: Tensor
) -> Activation:
    slopes = tuple(tail_slopes.tolist())
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    kind = dtype, x.device, x.numel() >= LARGE
    if is_grouped(domain):
        ends, *vectors = (tuple(zip(*p.tolist(), strict=True)) for p in (domain, *parameters))
        return _activation_of_groups(family.cpu_rows, tuple(vectors), ends, slopes, *kind, tuple(x.shape[-1:]))
    vectors = [tuple(p.tolist()) for p in parameters]
    return _activation(family.cpu_series, tuple(vectors), tuple(domain.tolist()), slopes, *kind)


def forward(family: Family, x: Tensor, parameters: Sequence[Tensor], domain: Tensor, tail_slopes: Tensor) -> Tensor:
    """f(x), in the shape and dtype of ``x``; also in its strides if rows of channels are contiguous."""
    activation = _prepare(family, x, parameters, domain, tail_slopes)
    if x.numel() <= GRAIN:
        converts = x.dtype != activation.dtype
        y = activation.value(x.to(activation.dtype) if converts else x, None, activation.no_scratch)
        return y.to(x.dtype) if converts else y
    stride = dense_stride(x, domain)
    y = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device)
    source, out = _flat(x, stride, activation.channels), _flat(y, stride, activation.channels)

    def body(scratch: Sequence[Tensor], span: slice) -> None:
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
    """The gradients of x, of each parameter and of the domain; None where ``needs`` is False."""
    needs_x, needs_parameters, needs_domain = needs
    activation = _prepare(family, x, parameters, domain, tail_slopes)
    channels, stride = activation.channels, dense_stride(x, domain)
    gx = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device) if needs_x else None
    source, upstream = _flat(x, stride, channels), _flat(g, stride, channels)
    out = None if gx is None else _flat(gx, stride, channels)

    def body(scratch: Sequence[Tensor], span: slice) -> list:
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
    sums = [sum(column, np.float64(0.0)) for column in zip(*by_chunk, strict=True)]  # in float64, in a fixed order
    at_domain = _gradient(activation.domain_gradient(sums[-2:]), domain) if needs_domain else None
    at_parameters = None
    if needs_parameters:
        vectors = activation.parameter_gradients(sums[:-2] if needs_domain else sums)
        at_parameters = [_gradient(v, p) for v, p in zip(vectors, parameters, strict=True)]
    return gx, at_parameters, at_domain


def _gradient(values, parameter: Tensor) -> Tensor:
    return torch.tensor(
        values if parameter.ndim == 1 else np.transpose(values), dtype=parameter.dtype, device=parameter.device
    )


# ---- chunks and threads ----------------------------------------------------------------------------------------------


def _chunk_size(x: Tensor) -> int:
    return CHUNK if x.device.type == "cpu" else DEVICE_CHUNK


def dense_stride(x: Tensor, domain: Tensor) -> tuple[int, ...]:
    """The strides of ``torch.empty_like(x)``: equal to ``x.stride()`` if ``x`` is dense without overlaps. With groups,
    those of a contiguous tensor if the channels of a row are not next to each other."""
    if x.is_contiguous():
        return x.stride()
    like = torch.empty_like(x, device="meta")
    return (like.contiguous() if is_grouped(domain) and like.stride(-1) != 1 else like).stride()


def arranged(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``x`` if it has these strides, otherwise a copy with them."""
    if x.stride() == stride:
        return x
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def _flat(x: Tensor, stride: tuple[int, ...], channels: tuple[int, ...]) -> Tensor:
    """The elements in memory order of a dense tensor with these strides, or its rows of channels; a view if ``x`` has
    the strides."""
    return arranged(x, stride).as_strided((x.numel() // math.prod(channels), *channels), (*channels, 1))


def _run(body: Callable, x: Tensor, activation: Activation, conversions: int) -> list:
    """Call ``body(scratch, span)`` for every chunk, in threads; returns the results in the order of the chunks.

    ``conversions`` extra scratch rows come first if the dtype of ``x`` is not the dtype of the arithmetic.
    """
    # The chunks depend on the size of x alone. Every thread takes one contiguous range of them. It has its own scratch
    # rows and reuses them for each chunk, so they stay in its cache. Results are returned per chunk, not per thread,
    # and are added up in the order of the chunks: the bits do not depend on the number of threads. Python threads are
    # enough, since ATen releases the interpreter's lock inside each operation.
    width = math.prod(activation.channels)
    n, size = x.numel() // width, max(_chunk_size(x) // width, 1)
    chunks = max(-(-n // size), 1)
    inference = torch.is_inference_mode_enabled()
    rows = activation.scratch_rows + (conversions if x.dtype != activation.dtype else 0)
    shape = rows, min(size, n + n % 2), *activation.channels

    def work(first: int, last: int) -> list:
        # Grad and inference modes are per thread. Tensors created in inference mode can only be written to inside it.
        with torch.inference_mode() if inference else contextlib.nullcontext(), torch.no_grad():
            scratch = torch.empty(shape, dtype=activation.dtype, device=x.device).unbind()
            spans = [slice(i * size, min((i + 1) * size, n)) for i in range(first, last)]
            results = [body(scratch, span) for span in spans[:-1]]
            rest = spans[-1].stop - spans[-1].start
            return [*results, body([row[:rest] for row in scratch] if rest < shape[1] else scratch, spans[-1])]

    threads = min(torch.get_num_threads(), MAX_THREADS)
    if threads == 1 or x.numel() <= GRAIN or x.device.type != "cpu":
        return work(0, chunks)
    ends = [chunks * t // threads for t in range(threads + 1)]
    jobs = [_submit(threads, work, *span) for span in itertools.pairwise(ends) if span[0] < span[1]]
    return [result for job in jobs for result in job()]


def _submit(threads: int, work: Callable, *span: int) -> Callable[[], list]:
    try:
        return _pool(threads, os.getpid()).submit(work, *span).result
    except RuntimeError:  # the interpreter is exiting, and this thread outlives the main one
        return functools.partial(work, *span)


@functools.lru_cache(maxsize=4)
def _pool(threads: int, pid: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads in which ATen runs single-threaded: many short OpenMP regions crawl once another process takes a core.

    Threads do not survive a fork, hence one pool per process.
    """
    return concurrent.futures.ThreadPoolExecutor(threads, "hf_ortho", _work_alone)


def _work_alone() -> None:
    torch.get_num_threads()  # applies the process's setting, once per thread; the limit below must come after it
    threadpool_limits(limits=1, user_api="openmp")  # OpenMP's setting is per thread
