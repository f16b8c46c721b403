"""The tasks that models are trained for: one object per file, with its data, metrics and names.

A further task is a file with its object, and an entry in ``TASKS``. Light to import: the files of the tasks import the
libraries when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError
from .causal_lm import CAUSAL_LM
from .image_classification import IMAGE_CLASSIFICATION
from .task import LOSS, Head, Metric, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LOSS", "METRICS", "SUPPORTED", "TASKS", "Head", "Metric", "Task", "head_of", "of"]

TASKS: tuple[Task, ...] = (CAUSAL_LM, IMAGE_CLASSIFICATION)
SUPPORTED = ", ".join(task.title for task in TASKS)
METRICS = {metric.key: metric for task in TASKS for metric in task.metrics}
# Heads of models that are converted and described, but not trained.
OTHERS = (
    Head(("ForMaskedLM",), "AutoModelForMaskedLM", "fill-mask"),
    Head(("ForSequenceClassification",), "AutoModelForSequenceClassification", "text-classification", "SEQ_CLS"),
    Head(("ForTokenClassification",), "AutoModelForTokenClassification", "token-classification", "TOKEN_CLS"),
    Head(("ForQuestionAnswering",), "AutoModelForQuestionAnswering", "question-answering", "QUESTION_ANS"),
    Head((), "AutoModelForSeq2SeqLM", None, "SEQ_2_SEQ_LM"),
    Head((), "AutoModel", "feature-extraction", "FEATURE_EXTRACTION"),
)
UNKNOWN = Head((), "AutoModel", None)


def head_of(model: PreTrainedModel | str) -> Head:
    """What is known of a model, or of a model class or a ``task_type`` of peft by its name."""
    base: PreTrainedModel | str = getattr(model, "get_base_model", lambda: model)()  # behind an adapter of peft
    name = base if isinstance(base, str) else type(base).__name__
    heads = (*TASKS, *OTHERS)
    return next((head for head in heads if name.endswith(head.endings) or name == head.peft_type), UNKNOWN)


def of(model: PreTrainedModel) -> Task:
    """The task that a model is trained for.

    Raises:
        ConfigError: it is none of ``TASKS``.
    """
    head = head_of(model)
    if not isinstance(head, Task):
        raise ConfigError(f"{type(model).__name__} can be neither trained nor evaluated; the tasks are: {SUPPORTED}")
    return head
