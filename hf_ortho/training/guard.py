"""Stop training at the first non-finite loss or parameter, and report its origin."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..activations import LearnableActivation
from ..errors import NonFiniteError
from ..partitioned import local_part
from ..processes import any_process


class FiniteGuard(TrainerCallback):
    """Trainer callback that raises ``NonFiniteError`` before a model with non-finite parameters is logged or saved.

    Works with any ``Trainer``. The trainable parameters are checked whenever Trainer logs, evaluates or saves, and at
    the end of training, on all processes together. Gradients are not checked, so steps skipped by the ``GradScaler`` of
    fp16 are allowed.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> trainer = Trainer(model, TrainingArguments("out", report_to=[]), callbacks=[hf_ortho.FiniteGuard()])
        >>> "FiniteGuard" in trainer.callback_handler.callback_list
        True
    """

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_log or control.should_evaluate or control.should_save:
            check_parameters(model, args, state.global_step)

    on_epoch_end = on_step_end

    def on_train_end(self, args, state, control, model=None, **kwargs):
        check_parameters(model, args, state.global_step)


class FiniteLoss(Trainer):
    """``Trainer`` with ``FiniteGuard`` that also stops at a non-finite loss, before the optimizer step.

    The losses of all micro-batches of a step stay on the device, and one flag is read per optimizer step, shared by all
    processes. If it is set, the first failed micro-batch runs forward again to find the first layer with non-finite
    outputs. The filter of Trainer, which reads the loss of every micro-batch, is not needed: set
    ``logging_nan_inf_filter=False``. Under fp16 the loss may overflow while the scale of the ``GradScaler`` exceeds 1.
    DeepSpeed steps within the backward pass, and stops right after this step.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # (inputs, loss) of each micro-batch since the last step. Trainer holds these inputs until the step anyway.
        self._micro_batches: list[tuple[dict[str, Any], Tensor]] = []
        self.add_callback(FiniteGuard())
        self.add_callback(_BeforeStep(self._micro_batches, self._check_losses))

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append((inputs, loss.clone()))  # a CUDA graph overwrites its outputs in the next run
        return loss

    def _check_losses(self) -> None:
        micro_batches = list(self._micro_batches)
        self._micro_batches.clear()
        finite = torch.stack([loss for _, loss in micro_batches]).isfinite()
        if not any_process(~finite.all()).item():
            return
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            return
        first = min(gather_object([i for i, value in enumerate(finite.tolist()) if not value]))
        number = f" in micro-batch {first + 1} of {len(micro_batches)}" if len(micro_batches) > 1 else ""
        origin = self._origin(micro_batches[min(first, len(micro_batches) - 1)][0])
        raise _error(self.args, self.state.global_step + 1, f"the loss is not finite{number}{origin}")

    def _origin(self, inputs) -> str:
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        with first_non_finite(model) as origins, torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, self._prepare_inputs(inputs))
        origins = gather_object(origins)
        return (
            f"; the first non-finite values are {origins[0]}" if origins else ", although the outputs of all layers are"
        )


class _BeforeStep(TrainerCallback):
    """Calls ``check`` before each step of the optimizer, with the micro-batches of this step in ``seen``."""

    def __init__(self, seen: list, check: Callable[[], None]):
        self.seen, self.check = seen, check

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.clear()  # of a training that ended within a step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.check()


@contextlib.contextmanager
def first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, find the first non-finite layer of ``model`` in the order of the forward pass.

    Yields a list that will contain at most one phrase: the pre-activations or outputs of a learnable activation, or the
    parameters or outputs of another leaf module.
    """
    origins: list[str] = []

    def hook(name: str):
        def look(module, args, output):
            if origins:
                return
            outputs = output if isinstance(output, tuple) else (output,)
            if isinstance(module, LearnableActivation) and not all(map(_is_finite, args)):
                origins.append(f"the pre-activations of {name}")
            elif not all(map(_is_finite, outputs)):
                damaged = not all(map(_is_finite, _trained(module).values()))
                origins.append(f"the {'parameters' if damaged else 'outputs'} of {name}")

        return look

    layers = [(n, m) for n, m in model.named_modules() if next(m.children(), None) is None]
    handles = [module.register_forward_hook(hook(name)) for name, module in layers]
    try:
        yield origins
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(value) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


@torch.no_grad()
def check_parameters(model: nn.Module, args: TrainingArguments, step: int) -> None:
    """Raise ``NonFiniteError`` if a trainable parameter is not finite on any process. Infinite domains are allowed."""
    values = _trained(model)
    if not values:
        return
    flags = any_process(torch.stack([(~torch.isfinite(v)).any().to(args.device) for v in values.values()]))
    bad = [name for name, flag in zip(values, flags.tolist(), strict=True) if flag]
    if bad:
        learnable = {n for n, m in model.named_modules() if isinstance(m, LearnableActivation)}
        first = next((name for name in bad if name.rpartition(".")[0] in learnable), bad[0])
        kind = "first activation" if first.rpartition(".")[0] in learnable else "first"
        raise _error(args, step, f"{len(bad)} of {len(values)} trained parameters are not finite; {kind}: {first}")


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The local part of the trainable parameters, in the order of the modules, with infinite domains as 0."""
    values = {}
    domains = {id(m.domain) for m in model.modules() if isinstance(m, LearnableActivation)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = local_part(parameter).detach()
            values[name] = value.nan_to_num(math.nan, 0.0, 0.0) if id(parameter) in domains else value
    return values


def _error(args: TrainingArguments, step: int, reason: str) -> NonFiniteError:
    folder = Path(str(args.output_dir))
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    place = f"the last good checkpoint is {last}" if last else "no checkpoint was saved"
    return NonFiniteError(f"step {step}: {reason}; {place}; a lower learning_rate or max_grad_norm may help")
