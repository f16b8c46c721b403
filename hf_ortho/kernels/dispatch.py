"""Choose the kernel that evaluates an activation, and wrap it in an autograd function."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes
from transformers.utils import logging

from . import cpu, formula
from .family import Family
from .groups import broadcasting, by_group, check_width, is_grouped, joined
from .sums import split, totals

logger = logging.get_logger("hf_ortho")

PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))

# LearnableActivation.forward(x)
#   dispatch.activation                    chooses family.formula, _Compiled, or Recomputed with a backend
#     Recomputed.forward, .backward        autograd.Function that saves x and recomputes the rest
#       cpu.forward, .backward             or triton.forward, .backward: one launch each, and one for the sums
#         cpu._run                         chunks, in threads
#           Activation.value, .backward_chunk    domain and tails
#             Series.value, .backward_chunk      arithmetic of the family


def activation(family: Family, x: Tensor, domain: Tensor, tail_slopes: Tensor, *parameters: Tensor) -> Tensor:
    """f(x) of ``LearnableActivation``, in the shape and dtype of ``x``.

    ``family.formula`` is the reference, written in differentiable PyTorch operations. If only values and first
    gradients are needed, a kernel replaces it that saves only ``x`` for the backward pass: Triton on CUDA, ``cpu``
    elsewhere. The formula is used for compilers, tracers and exporters, functorch transforms, forward-mode
    differentiation, tensor subclasses, dispatch modes and double backward.

    Args:
        family: a subclass of ``LearnableActivation``, which gives the formula and the kernels.
        x: any shape and strides, a floating dtype.
        domain: [lo, hi].
        tail_slopes: [s_lo, s_hi].
        parameters: the parameters of the series, in the order of ``family.initial_parameters``.
    """
    tensors = (x, domain, tail_slopes, *parameters)
    grouped = is_grouped(domain)
    if grouped:
        check_width(x, len(domain))
    if torch.compiler.is_compiling():
        if not _compiles(family) or tail_slopes.requires_grad:
            return family.formula(*tensors)
        return _Compiled.apply(family, _plain(tensors) and _has_triton(family, x), *tensors)
    backend = None if _transformed(tensors) else _backend(family, x, grouped)
    if backend is None:
        return family.formula(*tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return Recomputed.apply(backend, family, *tensors)
    return backend.forward(family, x, parameters, domain, tail_slopes)


def _plain(tensors) -> bool:
    return all(type(t) in (Tensor, nn.Parameter) for t in tensors)  # Dynamo of torch 2.8 knows no frozenset


def _transformed(tensors) -> bool:
    """Whether the inputs need the plain formula (tracing, functorch, subclasses, mixed devices)."""
    x, domain = tensors[:2]
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or not PLAIN_TENSORS.issuperset(map(type, tensors))
        or not x.is_floating_point()  # the formula raises the error
        or x.layout is not torch.strided
        or x.is_meta
        or x.device != domain.device
    )


def _backend(family: Family, x: Tensor, grouped: bool = False) -> ModuleType | None:
    if _has_triton(family, x):
        from . import triton

        return triton
    return cpu if family.cpu_series and (family.cpu_rows or not grouped) else None


def _has_triton(family: Family, x: Tensor) -> bool:
    return bool(family.triton) and x.is_cuda and x.dtype != torch.float64 and _triton_works(x.device, x.dtype)


@torch.compiler.assume_constant_result
def _triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is installed and works: it needs a compiler on the host, and a GPU that has the dtype."""
    try:
        return _probe(device, dtype)
    except torch.cuda.OutOfMemoryError:
        return False  # for this call, or for what is being compiled


@functools.cache  # not of errors
def _probe(device: torch.device, dtype: torch.dtype) -> bool:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    try:
        from . import triton

        with _disable_current_modes():  # of a compiler
            triton.probe(device, dtype)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of the C compiler, of the driver
        logger.warning_once(f"Triton does not work for {dtype} on {device}, falling back to slower kernels: {error}")
        return False
    return True


def _compiles(family: Family) -> bool:
    # Before torch 2.13, Dynamo replaces a call of torch.compiler.is_exporting() by True.
    transformed = torch.compiler._is_exporting_flag or torch._C._are_functorch_transforms_active()
    return family.compiled is not None and not transformed


class _Compiled(torch.autograd.Function):
    """Like ``Recomputed``, saves x and recomputes the rest, in operations that the compiler can fuse.

    Automatic differentiation would turn a maximum or a sum of cosines into several passes over memory. With
    ``triton``, the backward pass is one operator, the Triton kernel. Otherwise,
    ``family.compiled.gradients(x, g, *parameters)`` returns g S'(x) and, for each parameter, the sum of g
    dS/dparameter. ``family.compiled.value`` is optional, for families whose ``series`` is not the fastest form. All
    tensors and results have one dtype.
    """

    @staticmethod
    def forward(ctx, family, triton, x, domain, tail_slopes, *parameters):
        ctx.family, ctx.triton = family, triton
        ctx.save_for_backward(x, domain, tail_slopes, *parameters)
        dtype = family.compute_dtype(x)
        series = getattr(family.compiled, "value", family.series)
        tensors = broadcasting(*(t.to(dtype) for t in (x, domain, tail_slopes, *parameters)))
        y = joined(formula.value(series, *tensors), domain)
        # Dynamo of torch 2.11 loses the gradients if the last operation returns its input.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        family = ctx.family
        _, _, needs_x, needs_domain, _, *needs_parameters = ctx.needs_input_grad
        if ctx.triton:
            x, domain, tail_slopes, *parameters = ctx.saved_tensors
            needs = needs_x, any(needs_parameters), needs_domain
            operator = torch.ops.hf_ortho.activation_backward
            found = operator(g, x, parameters, domain, tail_slopes, family.triton, *needs)
            gx, at_parameters, at_domain = split(found[0], found[1], parameters, domain, needs)
            return None, None, gx, at_domain, None, *(at_parameters or (None for _ in parameters))
        dtype = family.compute_dtype(g)
        grouped = is_grouped(ctx.saved_tensors[1])
        x, domain, tail_slopes, *parameters = broadcasting(*(t.to(dtype) for t in ctx.saved_tensors))
        upstream = g.to(dtype).view(x.shape)
        gx, *gradients = family.compiled.gradients(torch.clamp(x, domain[0], domain[1]), upstream, *parameters)
        gx = formula.splice(x, gx, domain, tail_slopes, upstream)
        at_domain = None
        if needs_domain:
            below, above = torch.where(x < domain[0], upstream, 0), torch.where(x > domain[1], upstream, 0)
            outside = totals([below, above], domain[0])
            # S' and the tail's slope nearly cancel; MPS has no float64
            wide = torch.float32 if x.device.type == "mps" else torch.float64
            ends, *exact = (t.to(wide) for t in (domain, *parameters))
            rise = family.series_derivative(ends, *exact) - tail_slopes.view(2, *[1] * (ends.ndim - 1))
            at_domain = torch.where(domain.isfinite(), outside * rise, 0)
        if grouped:
            gx, at_domain = gx.flatten(-2), None if at_domain is None else by_group(at_domain)
            gradients = [by_group(v) for v in gradients]
        results: list[Tensor | None] = [gx, at_domain, None, *gradients]
        return None, None, *(v if v is None else v.to(t.dtype) for v, t in zip(results, ctx.saved_tensors, strict=True))


class Recomputed(torch.autograd.Function):
    """f with the kernels of a backend (the module ``cpu`` or ``triton``): saves x and recomputes the rest."""

    @staticmethod
    def forward(ctx, backend, family, x, domain, tail_slopes, *parameters):
        ctx.backend, ctx.family = backend, family
        ctx.save_for_backward(x, domain, tail_slopes, *parameters)
        return backend.forward(family, x, parameters, domain, tail_slopes)

    @staticmethod
    def backward(ctx, g):
        x, domain, tail_slopes, *parameters = ctx.saved_tensors
        _, _, needs_x, needs_domain, needs_slopes, *needs_parameters = ctx.needs_input_grad
        batched = torch._C._functorch.is_legacy_batchedtensor(g)  # from is_grads_batched
        if torch.is_grad_enabled() or needs_slopes or batched or _transformed((g, domain)):
            return None, None, *_formula_gradients(ctx.family.formula, ctx.saved_tensors, ctx.needs_input_grad[2:], g)
        needs = needs_x, any(needs_parameters), needs_domain
        gx, at_parameters, at_domain = ctx.backend.backward(ctx.family, g, x, parameters, domain, tail_slopes, needs)
        return None, None, gx, at_domain, None, *(at_parameters or (None for _ in parameters))


def _formula_gradients(plain: Callable[..., Tensor], tensors, needs, g):
    """Gradients that can be differentiated again."""
    with torch.enable_grad():
        y = plain(*tensors)
    inputs = [t for t, need in zip(tensors, needs, strict=True) if need]
    gradients = iter(torch.autograd.grad(y, inputs, g, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(gradients) if need else None for need in needs]
