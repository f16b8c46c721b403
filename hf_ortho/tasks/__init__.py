"""The tasks that models are trained for, one object per file, with its data, metrics and names.

To add a task, write a file that defines its object and add the object to ``TASKS``. This package is cheap to import:
the task files import heavy libraries lazily.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..text import suggestion
from .causal_lm import CAUSAL_LM
from .image_classification import IMAGE_CLASSIFICATION
from .masked_lm import MASKED_LM
from .task import LOSS, Head, Metric, Task
from .text_classification import TEXT_CLASSIFICATION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LOSS", "METRICS", "NAMES", "SUPPORTED", "TASKS", "Head", "Metric", "Task", "head_of", "named", "of"]

# The first task that has a class for a config creates a new model. Encoders such as BERT also have a causal class.
TASKS: tuple[Task, ...] = (MASKED_LM, CAUSAL_LM, IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION)
SUPPORTED = ", ".join(task.title for task in TASKS)
NAMES = {str(task.pipeline_tag): task for task in TASKS}
METRICS = {metric.key: metric for task in TASKS for metric in (*task.metrics, *task.sample_metrics)}
# Heads of models that can be converted and described, but not trained.
UNTRAINED = (
    Head(("ForTokenClassification",), "AutoModelForTokenClassification", "token-classification", "TOKEN_CLS"),
    Head(("ForQuestionAnswering",), "AutoModelForQuestionAnswering", "question-answering", "QUESTION_ANS"),
    Head((), "AutoModelForSeq2SeqLM", None, "SEQ_2_SEQ_LM"),
    Head((), "AutoModel", "feature-extraction", "FEATURE_EXTRACTION"),
)
UNKNOWN = Head((), "AutoModel", None)


def named(name: str) -> Task:
    """The task with a name, which is its pipeline tag on the Hub.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in NAMES:
        raise ConfigError(f"task {name!r}: must be one of {', '.join(NAMES)}{suggestion(name, NAMES)}")
    return NAMES[name]


def head_of(model: PreTrainedModel | str) -> Head:
    """The head of a model, of a model class given by name, or of a peft ``task_type``."""
    base: PreTrainedModel | str = getattr(model, "get_base_model", lambda: model)()  # the model inside a peft adapter
    name = base if isinstance(base, str) else type(base).__name__
    heads = (*TASKS, *UNTRAINED)
    return next((head for head in heads if name.endswith(head.endings) or name == head.peft_type), UNKNOWN)


def of(model: PreTrainedModel) -> Task:
    """The task that a model is trained for.

    Raises:
        ConfigError: the head of the model is not in ``TASKS``.
    """
    head = head_of(model)
    if not isinstance(head, Task):
        raise ConfigError(
            f"{type(model).__name__} cannot be trained or evaluated; supported tasks: {SUPPORTED} (hf-ortho finetune "
            f"--task NAME gives a model a new head: {', '.join(NAMES)})"
        )
    return head
