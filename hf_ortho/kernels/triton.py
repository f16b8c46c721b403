"""Triton kernels: an activation in one pass over memory, its gradient in another.

    f(x) = S(clamp(x, lo, hi)) + s_lo min(x - lo, 0) + s_hi max(x - hi, 0)

Forward reads x and writes f(x). Backward reads x and g and writes the gradient of x. At the same time a fixed number of
persistent programs add up the gradients of the parameters in registers; a second kernel adds the partial sums in
float64. There are no atomics, and the split depends only on the number and the size of the elements, so results are
bit-equal from run to run. One compilation serves all multiples of 16 elements, another nearly all other numbers.

With groups of channels, a program serves one group: its elements are numbered row by row, and only their addresses,
those of the parameters and the place of the sums depend on the group. Neighboring programs serve neighboring groups of
the same rows, so that what they share of a sector or page of memory is read once.
"""

# Tuples of device values grow by concatenation, which mypy sees as a change of type.
# In a kernel, a conditional expression is not a branch.
# ruff: noqa: RUF005, SIM108
# mypy: disable-error-code="assignment, var-annotated"

import contextlib
import functools
import math
import pkgutil
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu import arranged, dense_stride
from .family import Family
from .groups import check_width, is_grouped
from .sums import split
from .triton_common import ALL_NAN, DeviceFunctions, columns, side_by_side

PROGRAMS = 1056  # at most; eight for each multiprocessor of an H100
WARPS = 4
LANES = 32 * WARPS
TILE = 2048  # elements of a program of the forward kernel
LOAD_BYTES = 16  # per thread
PER_THREAD = 8  # elements of x and of g in flight
SUMS_PER_PASS = 56  # in registers
HIGH_DEGREE = 12  # above, the scalars do not fit into registers and are loaded for every tile


@triton.jit
def address(pointer, start, at, group, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Pointers to the elements ``start + at`` of a group that has CHANNELS neighbors in each row."""
    # Before element i of the group lie i // CHANNELS rows of the other groups. The compiler knows that the quotient is
    # the same for all elements of a wide load, if the remainder of ``start`` is not written with %.
    others: tl.constexpr = (GROUPS - 1) * CHANNELS
    row = start // CHANNELS
    channel = (start - row * CHANNELS).to(tl.int32)
    pointer += start + group * CHANNELS + row * others
    return pointer + (at + (channel + at) // CHANNELS * others)


@triton.jit
def of_group(parameters, group, LENGTHS: tl.constexpr):
    """Pointers to the parameters of a group, from pointers to matrices with one row per group."""
    rows = ()
    for i in tl.static_range(len(LENGTHS)):
        rows = rows + (parameters[i] + group * LENGTHS[i],)
    return rows


@triton.jit
def load_tile(pointers, at, left, SIZE: tl.constexpr, EVEN: tl.constexpr):
    """The elements with the numbers ``at``, 0 from ``left`` on.

    A mask allows wide loads only if ``left`` is known to be a multiple of 16 (EVEN). Otherwise a tile all of whose
    SIZE elements exist is loaded without.
    """
    if EVEN:
        values = tl.load(pointers, mask=at < left, other=0.0)
    elif left >= SIZE:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=at < left, other=0.0)
    return values


@triton.jit
def store_tile(pointers, at, left, values, SIZE: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointers, values, mask=at < left)
    elif left >= SIZE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=at < left)


@triton.jit
def forward_kernel(
    x_pointer, y_pointer, parameters, domain, tail_slopes, n,
    scalars: tl.constexpr, value: tl.constexpr, DEGREE: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """``n`` elements of each group."""
    group = tl.program_id(0) % GROUPS
    parameters = of_group(parameters, group, LENGTHS)
    domain += 2 * group
    start = (tl.program_id(0) // GROUPS).to(tl.int64) * TILE
    at = tl.arange(0, TILE)
    x = load_tile(address(x_pointer, start, at, group, GROUPS, CHANNELS), at, n - start, TILE, EVEN).to(tl.float32)
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
    y = y.to(y_pointer.dtype.element_ty)
    store_tile(address(y_pointer, start, at, group, GROUPS, CHANNELS), at, n - start, y, TILE, EVEN)


@triton.jit
def load_rows(
    pointer, start, block, left, group,
    ROWS: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    rows = ()
    for row in tl.static_range(ROWS):
        at = row * SIZE + block
        rows = rows + (load_tile(address(pointer, start, at, group, GROUPS, CHANNELS), at, left, ROWS * SIZE, EVEN),)
    return rows


@triton.jit(do_not_specialize=["tiles"])
def backward_kernel(
    x_pointer, g_pointer, gx_pointer, partial, parameters, domain, tail_slopes, n, tiles,
    scalars: tl.constexpr, gradient: tl.constexpr, finish: tl.constexpr, DEGREE: tl.constexpr, HOIST: tl.constexpr,
    WRITE_GX: tl.constexpr, TOTAL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Sums FIRST to LAST - 1 of the TOTAL parameter sums followed by lo and hi; the gradient of x if WRITE_GX. ``n``
    elements and ``tiles`` of each group."""
    # The programs of a group stride over its tiles of ROWS x LANES x WIDTH elements. A thread loads WIDTH neighbors at
    # a time, and all loads of a tile come before any arithmetic. The columns of a load are vectors of LANES elements
    # that take turns: each is added to one vector of LANES partial sums per gradient, which stays in registers from the
    # first tile to the last and is reduced over the lanes once, at the end. A launch thus writes (LAST - FIRST) x
    # programs numbers, whatever the size of x. If the sums do not fit into registers, the host splits them into several
    # launches, and the first one writes the gradient of x.
    group = tl.program_id(0) % GROUPS
    program = tl.program_id(0) // GROUPS
    programs = tl.num_programs(0) // GROUPS
    parameters = of_group(parameters, group, LENGTHS)
    domain += 2 * group
    lo = tl.load(domain).to(tl.float32)
    hi = tl.load(domain + 1).to(tl.float32)
    s_lo = tl.load(tail_slopes).to(tl.float32)
    s_hi = tl.load(tail_slopes + 1).to(tl.float32)
    if HOIST:
        shared = scalars(parameters, DEGREE)
    sums = ()
    for _ in tl.static_range(FIRST, LAST):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    SIZE: tl.constexpr = ROWS * LANES * WIDTH
    block = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    start = program.to(tl.int64) * SIZE
    for _ in range(program, tiles, programs):
        left = n - start
        xs = load_rows(x_pointer, start, block, left, group, ROWS, LANES * WIDTH, EVEN, GROUPS, CHANNELS)
        gs = load_rows(g_pointer, start, block, left, group, ROWS, LANES * WIDTH, EVEN, GROUPS, CHANNELS)
        if not HOIST:
            shared = scalars(parameters, DEGREE)
        for row in tl.static_range(ROWS):
            x_columns = columns(xs[row], LANES, WIDTH)
            g_columns = columns(gs[row], LANES, WIDTH)
            gx_columns = ()
            for column in tl.static_range(WIDTH):
                x = x_columns[column].to(tl.float32)
                g = g_columns[column].to(tl.float32)
                inside = tl.minimum(tl.maximum(x, lo, propagate_nan=ALL_NAN), hi, propagate_nan=ALL_NAN)
                slope, terms = gradient(inside, g, shared, DEGREE)
                if LAST > TOTAL:
                    below = tl.where(x < lo, g * (slope - s_lo), 0.0)
                    terms = terms + (below, tl.where(x > hi, g * (slope - s_hi), 0.0))
                added = ()
                for i in tl.static_range(LAST - FIRST):
                    added = added + (sums[i] + terms[FIRST + i],)
                sums = added
                slope = tl.where(x < lo, s_lo, tl.where(x > hi, s_hi, slope))
                gx_columns = gx_columns + ((g * slope).to(gx_pointer.dtype.element_ty),)
            if WRITE_GX:
                at = row * (LANES * WIDTH) + block
                pointers = address(gx_pointer, start, at, group, GROUPS, CHANNELS)
                store_tile(pointers, at, left, side_by_side(gx_columns, LANES, WIDTH), SIZE, EVEN)
        start += programs.to(tl.int64) * SIZE
    if LAST > FIRST:
        totals = ()
        for i in tl.static_range(TOTAL):
            if i >= FIRST and i < LAST:
                totals = totals + (tl.sum(sums[i - FIRST], 0),)
            else:
                totals = totals + (0.0,)
        totals = finish(totals, scalars(parameters, DEGREE), DEGREE)
        for i in tl.static_range(TOTAL, LAST):
            totals = totals + (tl.sum(sums[i - FIRST], 0),)
        for i in tl.static_range(FIRST, LAST):
            tl.store(partial + i * tl.num_programs(0) + tl.program_id(0), totals[i])


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(
    partial, sums, programs, FIRST: tl.constexpr, TOTAL: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Add up rows of partial sums, from FIRST on, in float64. If they are cumulative (LENGTH > 0), the parameter's
    next row is subtracted. In a row, the sums of the groups take turns; the results have one row per group."""
    row = FIRST + tl.program_id(1)
    lane = tl.arange(0, WIDTH) * GROUPS + tl.program_id(0) % GROUPS
    exists = lane < programs
    values = tl.load(partial + row * programs + lane, mask=exists, other=0.0).to(tl.float64)
    if LENGTH > 0:
        has_next = (row < TOTAL) & (row % LENGTH != LENGTH - 1)
        values -= tl.load(partial + (row + 1) * programs + lane, mask=exists & has_next, other=0.0).to(tl.float64)
    target = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + target, tl.sum(values, 0).to(sums.dtype.element_ty))


@triton.jit
def copy_kernel(source, target):
    tl.store(target, tl.load(source).to(tl.float32).to(target.dtype.element_ty))


def probe(device: torch.device, dtype: torch.dtype) -> None:
    """Compile and launch a minimal kernel; errors of Triton, the C compiler and the driver propagate."""
    source = torch.zeros(1, device=device, dtype=dtype)
    with on_device_of(source):
        copy_kernel[(1,)](source, torch.empty_like(source))


_resolve = functools.cache(pkgutil.resolve_name)


def functions_for(place: str, x: Tensor) -> DeviceFunctions:
    functions = _resolve(place)
    return functions if x.dtype == torch.float32 else functions.half_precision or functions


def degree_of(functions: DeviceFunctions, parameters: Sequence[Tensor]) -> int:
    return parameters[-1].shape[-1] - functions.beyond_degree


def on_device_of(x: Tensor):
    other = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if other else contextlib.nullcontext()


def dense(x: Tensor, domain: Tensor) -> Tensor:
    """``x`` or a copy without gaps in memory, in which the channels of a row are neighbors if there are groups."""
    return arranged(x, dense_stride(x, domain))


def vectors(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def grouping(x: Tensor, parameters: Sequence[Tensor], domain: Tensor) -> tuple[int, dict[str, Any]]:
    """The number of groups, and the constants of the kernels that place their elements and parameters."""
    groups = channels = 1
    if is_grouped(domain):
        groups = len(domain)
        check_width(x, groups)
        channels = x.shape[-1] // groups
    return groups, {"GROUPS": groups, "CHANNELS": channels, "LENGTHS": tuple(p.shape[-1] for p in parameters)}


def forward(family: Family, x: Tensor, parameters: Sequence[Tensor], domain: Tensor, tail_slopes: Tensor) -> Tensor:
    """f(x) on the GPU, like ``cpu.forward``.

    Args:
        x: float32, bfloat16 or float16 on a CUDA device (or a CPU tensor if TRITON_INTERPRET=1), any shape and
            strides. The arithmetic is in float32.
        parameters, domain, tail_slopes: float32 or float64 (read as float32), on the device of ``x``. Gradients have
            the same dtype. The degree follows from the number of parameters, the groups from the rows of ``domain``.

    Returns:
        Tensor with the shape, dtype and strides of ``torch.empty_like(x)``; contiguous if there are groups and the
        channels of a row of ``x`` are not neighbors in memory.

    Raises:
        WidthError: the last dimension of ``x`` is not a multiple of the number of groups.
    """
    functions = functions_for(str(family.triton), x)
    degree = degree_of(functions, parameters)
    tile = TILE if degree <= HIGH_DEGREE else TILE // 2
    groups, of_groups = grouping(x, parameters, domain)
    x = dense(x, domain)
    y = torch.empty_like(x)
    n = x.numel() // groups
    if n:
        with on_device_of(x):
            forward_kernel[(groups * -(-n // tile),)](
                x, y, vectors(parameters), domain.contiguous(), tail_slopes.contiguous(), n,
                scalars=functions.scalars, value=functions.value, DEGREE=degree, TILE=tile, EVEN=n % 16 == 0,
                **of_groups, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
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
    """The gradients of x, of each parameter and of the domain, like ``cpu.backward``."""
    return split(
        *gradients(g, x, parameters, domain, tail_slopes, str(family.triton), *needs), parameters, domain, needs
    )


def gradients(
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
    """The gradient of x, and one vector with the gradients of the parameters and of [lo, hi]; empty if not needed.

    With groups, the vector becomes a matrix with a row per group. ``place`` is the ``module:NAME`` of the family's
    ``DeviceFunctions``.
    """
    functions = functions_for(place, x)
    degree = degree_of(functions, parameters)
    groups, of_groups = grouping(x, parameters, domain)
    total = sum(of_groups["LENGTHS"])
    first = 0 if of_parameters else total
    last = total + 2 if of_domain else total
    x = dense(x, domain)
    n = x.numel() // groups
    gx = torch.empty_like(x) if of_x else x.new_empty(0)
    sums = parameters[0].new_empty(*domain.shape[:-1], last - first)
    if n == 0:
        return gx, sums.zero_()
    if g.stride() != x.stride():
        g = torch.empty_like(x).copy_(g)
    passes = -(-(last - first) // SUMS_PER_PASS) or 1
    per_pass = -(-(last - first) // passes)
    width = LOAD_BYTES // x.element_size()
    if groups > 1:
        width = math.gcd(width, of_groups["CHANNELS"])
    rows = PER_THREAD // width
    tiles = -(-n // (rows * LANES * width))
    of_each = max(PROGRAMS // groups, 1)
    programs = groups * min(of_each, tiles)
    partial = torch.empty(last, programs, dtype=torch.float32, device=x.device)
    tensors = vectors(parameters), domain.contiguous(), tail_slopes.contiguous()
    with on_device_of(x):
        for start in range(first, last, per_pass) if last > first else (first,):
            backward_kernel[(programs,)](
                x, g, gx, partial, *tensors, n, tiles,
                scalars=functions.scalars, gradient=functions.gradient, finish=functions.finish, DEGREE=degree,
                HOIST=degree <= HIGH_DEGREE, WRITE_GX=of_x and start == first, TOTAL=total,
                FIRST=start, LAST=min(start + per_pass, last), ROWS=rows, LANES=LANES, WIDTH=width,
                EVEN=n % 16 == 0, **of_groups, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        if last > first:
            sum_kernel[(groups, last - first)](
                partial, sums, programs, FIRST=first, TOTAL=total,
                LENGTH=parameters[0].shape[-1] if functions.cumulative else 0,
                WIDTH=triton.next_power_of_2(of_each), GROUPS=groups, num_warps=WARPS,
            )  # fmt: skip
    return gx, sums


# For a compiler, which calls it as it is. The plain function saves the host the dispatch of an operator.
activation_backward = torch.library.custom_op("hf_ortho::activation_backward", gradients, mutates_args=())


@activation_backward.register_fake
def _(g, x, parameters, domain, tail_slopes, place, of_x, of_parameters, of_domain):
    count = sum(p.shape[-1] for p in parameters if of_parameters) + (2 if of_domain else 0)
    x = dense(x, domain) if is_grouped(domain) else x
    return torch.empty_like(x) if of_x else x.new_empty(0), parameters[0].new_empty(*domain.shape[:-1], count)
