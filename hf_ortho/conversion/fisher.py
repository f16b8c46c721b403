"""How much an error of each activation changes the predictions of a model: the diagonal of its Fisher information."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .inputs import Prediction

# Models with more parameters compute each block again in the backward pass instead of keeping its activations.
LARGE = 10**9
PIECE = 2**20  # probabilities that are summed at a time, for less memory


def direction(prediction: Prediction, generator: torch.Generator) -> Tensor:
    """A random vector u, shaped like the output, with E[u u^T] the second derivative of the divergence by the output;
    0 where the output is masked. ``generator`` is on the CPU, so that u is the same for a model on a GPU."""
    # Let e be a small error of one activation and J the derivative of the output y by it. The divergence of the new
    # predictions from the old ones is e^T J^T H J e / 2. For class probabilities p it is the KL divergence, and H is
    # the Fisher information diag(p) - p p^T; for independent classes H is p (1 - p), for other outputs 1 (half the
    # squared error). If E[u u^T] = H, the gradient g = J^T u has E[g g^T] = J^T H J: a backward pass samples it. For
    # classes, u = p - onehot(y) with y drawn from p has this covariance. Only the diagonal is used, E[g_i^2] e_i^2:
    # off the diagonal, the terms of different positions nearly cancel.
    y = prediction.output.detach().float()
    if prediction.kind == "categorical":
        u = torch.softmax(y, -1)
        drawn = _draw(u.flatten(0, -2), generator).view(*u.shape[:-1], 1)
        u.scatter_add_(-1, drawn, u.new_full(drawn.shape, -1.0))
    else:
        u = torch.randn(y.shape, generator=generator).to(y.device)
        if prediction.kind == "binary":
            p = torch.sigmoid(y)
            u *= (p * (1 - p)).sqrt()
    return u if prediction.mask is None else u * prediction.mask.view(*prediction.mask.shape, *[1] * (u.ndim - 2))


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """One class per row of probabilities, shape (rows, 1)."""
    # By the inverse of the distribution function: an order faster than torch.multinomial on a CPU. In integers, since a
    # floating-point cumsum is not deterministic on a GPU.
    drawn = []
    for rows in p.split(max(1, PIECE // p.shape[-1])):
        ticks = (rows * 2.0**40).long().cumsum(-1)
        at = torch.rand((len(rows), 1), generator=generator).to(p.device) * ticks[:, -1:]
        drawn.append(torch.searchsorted(ticks, at.long(), right=True))
    return torch.cat(drawn).clamp_(max=p.shape[-1] - 1)


def predictions_and_norm(prediction: Prediction) -> tuple[int, float]:
    """What divergences are divided by: the number of predictions, or half the squared norm of a real output."""
    rows = prediction.rows().detach()
    return len(rows), 0.5 * float(rows.float().square().sum()) if prediction.kind == "real" else 0.0


@contextlib.contextmanager
def watched(modules: Iterable[tuple[nn.Module, Callable[[Tensor, Tensor], None]]]) -> Iterator[None]:
    """For each (module, note), call ``note(x, g)`` in each backward pass, for inputs x of the module and gradients g by
    its outputs.

    Parameters need not require gradients, and get none. With gradient checkpointing x is computed again.
    """
    handles = []
    for module, note in modules:

        def observe(module: nn.Module, args: tuple, output: Tensor, note=note) -> Tensor:
            anchor = torch.empty(0, device=output.device, requires_grad=True)
            return _Observe.apply(output, args[0].detach(), anchor, note)

        handles.append(module.register_forward_hook(observe))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Observe(torch.autograd.Function):
    """The identity, which passes x and its own gradient to ``note``. The anchor makes it part of the graph."""

    @staticmethod
    def forward(ctx, y, x, anchor, note):
        ctx.note = note
        ctx.save_for_backward(x)  # not an attribute: gradient checkpointing frees it, and computes it again
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.note(*ctx.saved_tensors, gradient)
        return gradient if ctx.needs_input_grad[0] else None, None, None, None


@contextlib.contextmanager
def inputs_only(model: PreTrainedModel) -> Iterator[None]:
    """No parameter gets a gradient."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@contextlib.contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Large models, and those with gradient checkpointing, compute activations again in the backward pass."""
    # Not by transformers' own checkpointing, which needs the training mode, and with it dropout.
    wanted = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    wanted = wanted or sum(p.numel() for p in model.parameters()) > LARGE
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if wanted else []
    forwards = [(layer, vars(layer).get("forward")) for layer in layers]  # Accelerate replaces some
    try:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, earlier in forwards:
            if earlier is not None:
                layer.forward = earlier
            else:
                vars(layer).pop("forward", None)
