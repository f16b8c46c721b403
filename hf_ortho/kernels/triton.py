"""Triton kernels: an activation in one pass over memory, its gradient in another.

    f(x) = S(clamp(x, lo, hi)) + s_lo min(x - lo, 0) + s_hi max(x - hi, 0)

Forward reads x and writes f(x). Backward reads x and g and writes the gradient of x. At the same time a fixed number of
persistent programs add up the gradients of the parameters in registers; a second kernel adds the partial sums in
float64. There are no atomics, and the split depends only on the number of elements, so results are bit-equal from run
to run.
"""

# Tuples of device values grow by concatenation, which mypy sees as a change of type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import contextlib
import functools
import pkgutil
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu import arranged, dense_stride
from .family import Family
from .triton_common import ALL_NAN, DeviceFunctions

PROGRAMS = 1024
WARPS = 4
ROWS = 2  # loads in flight per thread
SUMS_PER_THREAD = 56  # in registers
HIGH_DEGREE = 12  # above, the scalars do not fit into registers and are loaded for every tile


@triton.jit
def forward_kernel(
    x_pointer, y_pointer, parameters, domain, tail_slopes, n,
    scalars: tl.constexpr, value: tl.constexpr, DEGREE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    exists = lane < tl.minimum(n - start, TILE).to(tl.int32)
    x = tl.load(x_pointer + start + lane, mask=exists, other=0.0).to(tl.float32)
    lo = tl.load(domain).to(tl.float32)
    hi = tl.load(domain + 1).to(tl.float32)
    s_lo = tl.load(tail_slopes).to(tl.float32)
    s_hi = tl.load(tail_slopes + 1).to(tl.float32)
    inside = tl.minimum(tl.maximum(x, lo, propagate_nan=ALL_NAN), hi, propagate_nan=ALL_NAN)
    y = value(inside, scalars(parameters, DEGREE), DEGREE)
    # Move the start of a tail of slope 0 to infinity: 0 * (x - lo) would be NaN for an infinite x.
    lo = tl.where(s_lo == 0.0, float("-inf"), lo)
    hi = tl.where(s_hi == 0.0, float("inf"), hi)
    y += s_lo * tl.where(x < lo, x - lo, 0.0)
    y += s_hi * tl.where(x > hi, x - hi, 0.0)
    tl.store(y_pointer + start + lane, y.to(y_pointer.dtype.element_ty), mask=exists)


@triton.jit
def backward_kernel(
    x_pointer, g_pointer, gx_pointer, partial, parameters, domain, tail_slopes, n, tiles,
    scalars: tl.constexpr, gradient: tl.constexpr, scales: tl.constexpr, DEGREE: tl.constexpr, HOIST: tl.constexpr,
    WRITE_GX: tl.constexpr, TOTAL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sums FIRST to LAST - 1 of the TOTAL parameter sums followed by lo and hi; the gradient of x if WRITE_GX."""
    # PROGRAMS programs stride over the tiles of ROWS x LANES elements. Each keeps one vector of LANES partial sums per
    # gradient in registers from its first tile to its last and reduces it over the lanes once, at the end. A launch
    # thus writes (LAST - FIRST) x PROGRAMS numbers, whatever the size of x. If the sums do not fit into registers, the
    # host splits them into several launches, and the first one writes the gradient of x. The loads of all ROWS come
    # before any arithmetic, to have several in flight at a time.
    program = tl.program_id(0)
    lo = tl.load(domain).to(tl.float32)
    hi = tl.load(domain + 1).to(tl.float32)
    s_lo = tl.load(tail_slopes).to(tl.float32)
    s_hi = tl.load(tail_slopes + 1).to(tl.float32)
    if HOIST:
        shared = scalars(parameters, DEGREE)
    sums = ()
    for _ in tl.static_range(FIRST, LAST):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    lane = tl.arange(0, LANES)
    start = program.to(tl.int64) * (ROWS * LANES)
    for _ in range(program, tiles, PROGRAMS):
        count = tl.minimum(n - start, ROWS * LANES).to(tl.int32)
        xs = ()
        gs = ()
        for row in tl.static_range(ROWS):
            at = row * LANES + lane
            xs = xs + (tl.load(x_pointer + start + at, mask=at < count, other=0.0),)
            gs = gs + (tl.load(g_pointer + start + at, mask=at < count, other=0.0),)
        if not HOIST:
            shared = scalars(parameters, DEGREE)
        for row in tl.static_range(ROWS):
            x = xs[row].to(tl.float32)
            g = gs[row].to(tl.float32)
            inside = tl.minimum(tl.maximum(x, lo, propagate_nan=ALL_NAN), hi, propagate_nan=ALL_NAN)
            slope, terms = gradient(inside, g, shared, DEGREE)
            if LAST > TOTAL:
                terms = terms + (tl.where(x < lo, g * (slope - s_lo), 0.0), tl.where(x > hi, g * (slope - s_hi), 0.0))
            added = ()
            for i in tl.static_range(LAST - FIRST):
                added = added + (sums[i] + terms[FIRST + i],)
            sums = added
            if WRITE_GX:
                slope = tl.where(x < lo, s_lo, tl.where(x > hi, s_hi, slope))
                at = row * LANES + lane
                tl.store(gx_pointer + start + at, (g * slope).to(gx_pointer.dtype.element_ty), mask=at < count)
        start += PROGRAMS * ROWS * LANES
    if LAST > FIRST:
        factors = scales(scalars(parameters, DEGREE), DEGREE) + (1.0, 1.0)
        for i in tl.static_range(LAST - FIRST):
            tl.store(partial + (FIRST + i) * PROGRAMS + program, tl.sum(sums[i], 0) * factors[FIRST + i])


@triton.jit
def sum_kernel(
    partial, sums, FIRST: tl.constexpr, TOTAL: tl.constexpr, LENGTH: tl.constexpr,
    PROGRAMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up rows of partial sums, from FIRST on, in float64. If they are cumulative (LENGTH > 0), the parameter's
    next row is subtracted."""
    row = FIRST + tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    exists = lane < PROGRAMS
    values = tl.load(partial + row * PROGRAMS + lane, mask=exists, other=0.0).to(tl.float64)
    if LENGTH > 0:
        has_next = (row < TOTAL) & (row % LENGTH != LENGTH - 1)
        values -= tl.load(partial + (row + 1) * PROGRAMS + lane, mask=exists & has_next, other=0.0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(values, 0).to(sums.dtype.element_ty))


@triton.jit
def copy_kernel(source, target):
    tl.store(target, tl.load(source))


def probe(device: torch.device) -> None:
    """Compile and launch a minimal kernel; errors of Triton, the C compiler and the driver propagate."""
    source = torch.zeros(1, device=device)
    with on_device_of(source):
        copy_kernel[(1,)](source, torch.empty_like(source))


_resolve = functools.cache(pkgutil.resolve_name)


def functions_for(place: str, x: Tensor) -> DeviceFunctions:
    functions = _resolve(place)
    return functions if x.dtype == torch.float32 else functions.half_precision or functions


def degree_of(functions: DeviceFunctions, parameters: Sequence[Tensor]) -> int:
    return parameters[-1].numel() - functions.beyond_degree


def on_device_of(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("hf_ortho::activation", mutates_args=())
def activation(x: Tensor, parameters: Sequence[Tensor], domain: Tensor, tail_slopes: Tensor, place: str) -> Tensor:
    """f(x) on the GPU. ``dispatch`` makes it differentiable.

    Args:
        x: float32, bfloat16 or float16 on a CUDA device (or a CPU tensor if TRITON_INTERPRET=1), any shape,
            non-overlapping and dense. The arithmetic is in float32.
        parameters: the family's parameter vectors in the order of ``LearnableActivation.initial_parameters``, float32
            or float64 (read as float32), on the device of ``x``. Gradients have the same dtype.
        domain, tail_slopes: [lo, hi] and [s_lo, s_hi], with the dtypes and device of the parameters.
        place: ``module:NAME`` of the family's ``DeviceFunctions``. The degree follows from the parameters' shapes.

    Returns:
        Tensor with the shape, dtype and strides of ``x``.
    """
    functions = functions_for(place, x)
    degree = degree_of(functions, parameters)
    tile = 2048 if degree <= HIGH_DEGREE else 1024
    y = torch.empty_like(x)
    n = x.numel()
    if n:
        with on_device_of(x):
            forward_kernel[(triton.cdiv(n, tile),)](
                x, y, tuple(parameters), domain, tail_slopes, n,
                scalars=functions.scalars, value=functions.value, DEGREE=degree, TILE=tile,
                num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return y


@torch.library.custom_op("hf_ortho::activation_backward", mutates_args=())
def activation_backward(
    g: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    domain: Tensor,
    tail_slopes: Tensor,
    place: str,
    of_x: bool,
    of_parameters: bool,
    of_domain: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and one vector with the gradients of the parameters and of [lo, hi]; empty if not needed."""
    functions = functions_for(place, x)
    degree = degree_of(functions, parameters)
    total = sum(p.numel() for p in parameters)
    first = 0 if of_parameters else total
    last = total + 2 if of_domain else total
    gx = torch.empty_like(x) if of_x else x.new_empty(0)
    sums = parameters[0].new_zeros(last - first)
    n = x.numel()
    if n == 0:
        return gx, sums
    if g.stride() != x.stride():
        g = torch.empty_like(x).copy_(g)
    per_pass = triton.cdiv(last - first, triton.cdiv(last - first, SUMS_PER_THREAD) or 1)
    lanes = WARPS * 32 * next(k for k in (4, 2, 1) if k == 1 or k * per_pass <= SUMS_PER_THREAD)
    tiles = triton.cdiv(n, ROWS * lanes)
    programs = min(PROGRAMS, tiles)
    partial = torch.empty(last, programs, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        for start in range(first, last, per_pass) if last > first else (first,):
            backward_kernel[(programs,)](
                x, g, gx, partial, tuple(parameters), domain, tail_slopes, n, tiles,
                scalars=functions.scalars, gradient=functions.gradient, scales=functions.scales, DEGREE=degree,
                HOIST=degree <= HIGH_DEGREE, WRITE_GX=of_x and start == first, TOTAL=total,
                FIRST=start, LAST=min(start + per_pass, last), ROWS=ROWS, LANES=lanes, PROGRAMS=programs,
                num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        if last > first:
            sum_kernel[(last - first,)](
                partial, sums, FIRST=first, TOTAL=total, LENGTH=parameters[0].numel() if functions.cumulative else 0,
                PROGRAMS=programs, WIDTH=triton.next_power_of_2(programs), num_warps=WARPS,
            )  # fmt: skip
    return gx, sums


@activation.register_fake
def _(x, parameters, domain, tail_slopes, place):
    return torch.empty_like(x)


@activation_backward.register_fake
def _(g, x, parameters, domain, tail_slopes, place, of_x, of_parameters, of_domain):
    count = sum(p.numel() for p in parameters if of_parameters) + (2 if of_domain else 0)
    return torch.empty_like(x) if of_x else x.new_empty(0), parameters[0].new_empty(count)


def forward(family: Family, x: Tensor, parameters: Sequence[Tensor], domain: Tensor, tail_slopes: Tensor) -> Tensor:
    """f(x), like ``cpu.forward``."""
    vectors = [p.contiguous() for p in parameters], domain.contiguous(), tail_slopes.contiguous()
    return activation(arranged(x, dense_stride(x)), *vectors, family.triton)


def backward(
    family: Family,
    g: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    domain: Tensor,
    tail_slopes: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, list[Tensor] | None, Tensor | None]:
    """The gradients of x, of each parameter and of the domain, like ``cpu.backward``."""
    of_x, of_parameters, of_domain = needs
    vectors = [p.contiguous() for p in parameters], domain.contiguous(), tail_slopes.contiguous()
    gx, sums = activation_backward(g, arranged(x, dense_stride(x)), *vectors, family.triton, *needs)
    *of_each, at_domain = sums.split([p.numel() * of_parameters for p in parameters] + [2 * of_domain])
    return gx if of_x else None, of_each if of_parameters else None, at_domain.to(domain.dtype) if of_domain else None
