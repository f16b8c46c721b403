"""How closely a converted model follows its source model, measured on batches of inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.verify import evaluating
from ..errors import CalibrationError
from ..processes import collective_device, sum_over_processes
from .fisher import direction, inputs_only, recomputing
from .inputs import CAUSAL_LMS, Prediction, has_gradients, predict
from .replace import swapped

SAMPLED = 2**16  # entries of each weight whose gradients are compared
PIECE = 2**20  # logits that are compared at a time, for less memory
LEAST = -1e4  # of a logarithm: logits may be -inf
TOKENS = 256  # of the first sample of a batch, for the gradient error

Modules = Mapping[str, nn.Module]


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """The difference between the predictions of a converted model and of its source model.

    Attributes:
        predictions: number of predictions compared: tokens, images or texts.
        held_out: whether the fits have not seen them.
        kl: mean KL(source || converted) per prediction, in nats; None if the model does not predict classes.
        top1: share of predictions with the same most likely class, or None.
        output_error: |y - z| / |z| (Euclidean norms over all outputs), y of the converted and z of the source model;
            None if not finite.
        loss_before, loss_after: mean loss over the labels, None without labels.
        perplexity: whether the loss is the logarithm of a perplexity.
        gradient_error, gradient_cosine: |h - g| / |g| and the cosine of h and g, the gradients of all weights of the
            converted and the source model, estimated from 65,536 entries of each; None if there is no gradient.
        rounding: ``divergence`` of the source model from itself if its activations are rounded once more; None for
            float32.
    """

    predictions: int
    held_out: bool
    kl: float | None = None
    top1: float | None = None
    output_error: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    perplexity: bool = False
    gradient_error: float | None = None
    gradient_cosine: float | None = None
    rounding: float | None = None

    @property
    def divergence(self) -> float | None:
        """``kl`` if the model predicts classes, else ``output_error`` squared; None if not finite."""
        if self.top1 is None and self.output_error is not None:
            return self.output_error**2
        return self.kl

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Fidelity:
        """The inverse of ``dataclasses.asdict``."""
        values: dict[str, Any] = {
            field.name: None if plain[field.name] is None else float(plain[field.name])
            for field in dataclasses.fields(cls)
        }
        if values["rounding"] is not None and not values["rounding"] >= 0:
            raise ValueError(f"rounding {values['rounding']}: must be at least 0")
        flags = {key: bool(plain[key]) for key in ("held_out", "perplexity")}
        return cls(**values | flags | {"predictions": int(plain["predictions"])})


def measure(
    model: PreTrainedModel,
    sources: Modules,
    batches: Mapping[str, Any],
    others: Sequence[Modules] = (),
    *,
    held_out: bool,
) -> list[Fidelity]:
    """Compare ``model``, and ``model`` with each of the modules in ``others``, to the model with the modules
    ``sources``, all by path, on ``batches`` by name. Only the first gets a gradient error.

    Under ``torch.distributed`` each process passes its own batches, and all get the same values.
    """
    variants: list[Modules] = [{}, *others]
    rounded = torch.finfo(model.dtype).bits < 32
    sums = [_Sums() for _ in range(len(variants) + rounded)]
    with evaluating(model):
        for where, batch in batches.items():
            with torch.no_grad():
                with swapped(model, sources):
                    source = predict(model, batch, where, loss=True)
                    if rounded:
                        with _rounded_again(model, sources):
                            sums[-1].add(source, predict(model, batch, where, loss=True))
                for variant, total in zip(variants, sums, strict=False):
                    with swapped(model, variant):
                        total.add(source, predict(model, batch, where, loss=True))
        first, *rest = [total.result(held_out) for total in sums]
        rounding = rest.pop().divergence if rounded else None
        error, cosine = _gradient_error(model, sources, next(iter(batches.values()), None))
    first = dataclasses.replace(first, gradient_error=error, gradient_cosine=cosine)
    return [dataclasses.replace(f, perplexity=model.can_generate(), rounding=rounding) for f in (first, *rest)]


class _Sums:
    """Sums over predictions, float64 on the CPU."""

    def __init__(self):
        self.values = torch.zeros(9, dtype=torch.float64)

    def add(self, source: Prediction, converted: Prediction) -> None:
        z, y = source.rows(), converted.rows()
        rows = max(1, PIECE // z.shape[-1])
        pieces = []
        for pair in zip(z.split(rows), y.split(rows), strict=True):
            before, after = (t.float() for t in pair)
            sums = [(after - before).square().sum(), before.square().sum(), *z.new_zeros(2).unbind()]
            if source.kind != "real":
                sums[2] = divergence(before, after, source.kind)
                sums[3] = (before.argmax(-1) == after.argmax(-1)).sum().float()
            pieces.append(torch.stack(sums))
        square, norm, kl, agree = torch.stack(pieces).cpu().double().sum(0).tolist() if pieces else [0.0] * 4
        classes = len(z) if source.kind != "real" else 0
        losses = [float(p.loss) * p.labels if p.loss is not None else 0.0 for p in (source, converted)]
        row = [len(z), classes, kl, agree, square, norm, source.labels, *losses]
        self.values += torch.tensor(row, dtype=torch.float64)

    def result(self, held_out: bool) -> Fidelity:
        values = self.values.to(collective_device(torch.device("cpu")))
        n, classes, kl, agree, square, norm, labels, before, after = sum_over_processes(values).tolist()

        def ratio(a: float, b: float) -> float | None:
            return a / b if b and math.isfinite(a) else None

        error = ratio(square, norm)
        return Fidelity(
            int(n),
            held_out,
            ratio(kl, classes),
            ratio(agree, classes),
            None if error is None else math.sqrt(error),
            ratio(before, labels),
            ratio(after, labels),
        )


def divergence(before: Tensor, after: Tensor, kind: str) -> Tensor:
    """The sum over rows of KL(before || after) for logits of shape (predictions, classes), ``kind`` as in
    ``Prediction``."""
    # With d = log p - log q, sum p d = sum p (exp(-d) - 1 + d), since p and q both have the sum 1. Every term on the
    # right is at least 0, so nothing cancels: float32 is enough for KL divergences far below its precision. If d is far
    # below 0, exp(-d) overflows, and p exp(-d) = q is used.
    if kind == "binary":
        pairs = [(nn.functional.logsigmoid(s * before), nn.functional.logsigmoid(s * after)) for s in (1, -1)]
    else:
        pairs = [(before.log_softmax(-1), after.log_softmax(-1))]
    total = before.new_zeros(())
    for log_p, log_q in pairs:
        log_p, log_q = log_p.clamp(min=LEAST), log_q.clamp(min=LEAST)
        p, d = log_p.exp(), log_p - log_q
        near = d.clamp(min=-1)
        total = total + torch.where(d > -1, p * (torch.expm1(-near) + near), log_q.exp() - p + p * d).sum()
    return total


@contextlib.contextmanager
def _rounded_again(model: PreTrainedModel, modules: Modules) -> Iterator[None]:
    """Round the outputs of ``modules`` to the model's dtype once more: by up to one unit in the last place."""

    def change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).to(output.device) - 0.5
        return (output.float() * (1 + torch.finfo(output.dtype).eps * noise)).to(output.dtype)

    handles = [module.register_forward_hook(change) for module in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradient_error(model: PreTrainedModel, sources: Modules, batch) -> tuple[float | None, float | None]:
    """Relative error and cosine of the gradients of the weights, without those of the activations themselves."""
    sums = torch.zeros(4, dtype=torch.float64)
    if batch is not None and has_gradients(model):
        batch = _shortened(model, batch)
        with contextlib.suppress(RuntimeError, CalibrationError):  # quantized weights may have no backward pass
            with swapped(model, sources):
                before, u = _gradients(model, batch, sources, None)
            after, _ = _gradients(model, batch, sources, u)
            for key, (h, share) in after.items():
                g = before[key][0] if key in before else torch.zeros_like(h)
                terms = [(h - g) @ (h - g), g @ g, h @ h, g @ h]
                sums += share * torch.stack(terms).cpu().double()
    error, g2, h2, gh = sum_over_processes(sums.to(collective_device(torch.device("cpu")))).tolist()
    if not (g2 > 0 and h2 > 0 and math.isfinite(g2 + h2)):
        return None, None
    return math.sqrt(error / g2), gh / math.sqrt(g2 * h2)


def _shortened(model: PreTrainedModel, batch):
    """The first tokens of the first text of a language model, if all tensors are tokens without padding."""
    tensors = batch if isinstance(batch, Mapping) else {model.main_input_name: batch}
    shape = tensors["input_ids"].shape if "input_ids" in tensors else ()
    mask = tensors.get("attention_mask")
    plain = len(shape) == 2 and all(isinstance(v, Tensor) and v.shape == shape for v in tensors.values())
    if type(model).__name__ not in CAUSAL_LMS or not plain or (mask is not None and not mask.all()):
        return batch
    return {key: value[:1, :TOKENS] for key, value in tensors.items()}


def _gradients(
    model: PreTrainedModel, batch, sources: Modules, u: Tensor | None
) -> tuple[dict[str, tuple[Tensor, float]], Tensor | None]:
    """Random entries of the gradient of each weight, with the number of entries that each stands for.

    The gradient is that of the loss, or without labels of the product of the output with ``u``, by default a random
    ``direction``, which is also returned.
    """
    found: dict[str, tuple[Tensor, float]] = {}
    replaced = tuple(f"{path}." for path in sources)
    parameters = {k: p for k, p in model.named_parameters() if p.is_floating_point() and not k.startswith(replaced)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(inputs_only(model))
        for key, p in parameters.items():
            stack.callback(setattr, p, "grad", p.grad)
            p.grad = None
            p.requires_grad_()
            stack.callback(p.register_post_accumulate_grad_hook(_keep(found, key)).remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(recomputing(model))
        prediction = predict(model, batch, loss=True)
        if prediction.loss is not None:
            prediction.loss.backward()
        else:
            if u is None:
                u = direction(prediction, torch.Generator().manual_seed(0))
            prediction.output.backward(u.to(prediction.output.dtype))
    return found, u


def _keep(found: dict[str, tuple[Tensor, float]], key: str) -> Callable[[Tensor], None]:
    """A hook that copies random entries of a gradient to ``found``, and frees the gradient."""

    def hook(p: Tensor) -> None:
        assert p.grad is not None
        g, size = p.grad.reshape(-1), p.numel()
        if size > SAMPLED:
            chosen = torch.randint(size, (SAMPLED,), generator=torch.Generator().manual_seed(0))
            g = g[chosen.to(g.device)]
        found[key] = g.float().clone(), size / len(g)
        p.grad = None

    return hook
