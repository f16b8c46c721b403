"""What a training in several processes needs beside its engine: one decision for all, one whole state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import Trainer, TrainingArguments

from ..errors import HfOrthoError

T = TypeVar("T")


def main_decides(arguments: TrainingArguments, question: Callable[[], T]) -> T:
    """The answer of the main process, in all processes.

    For questions about files that the main process itself is about to write.

    Raises:
        HfOrthoError: that of the main process, in all processes.
    """
    answer: list = [None, None]
    if arguments.process_index == 0:
        try:
            answer[0] = question()
        except HfOrthoError as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def full_state_dict(trainer: Trainer) -> dict[str, Tensor] | None:
    """The trained tensors, gathered from all processes, under FSDP or DeepSpeed; None where each process has them.

    Every process must call it; the main process gets all tensors, on the CPU.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    tied = trainer.accelerator.unwrap_model(trainer.model).all_tied_weights_keys
    return {name: tensor for name, tensor in gathered.items() if name not in tied}
