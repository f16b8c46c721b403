"""``hf-ortho evaluate``: print the metrics of a checkpoint, or compare several."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..tasks import LOSS, METRICS, TASKS, Task, head_of
from ..tasks.arguments import DataArguments
from ..tasks.causal_lm import CAUSAL_LM
from ..tasks.masked_lm import MASKED_LM
from ..text import change, number
from .console import DTYPES, Parser, add_column_flags, add_model_flags, columns, console, table
from .network import check_hub, hub_tokenizer
from .progress import evaluation_progress, progress

if TYPE_CHECKING:
    from datasets import Dataset

    from ..checkpoints.load import Checkpoint

Model = tuple[str, str | None]  # its name and revision
# The flags that one task takes alone.
ONLY_FOR: dict[str, Task] = {"stride": CAUSAL_LM, "mask_probability": MASKED_LM, "whole_word_mask": MASKED_LM}


@dataclasses.dataclass(frozen=True)
class Measured:
    """The metrics of a model by key, its task, a description of the data, and the content of its tokenizer."""

    name: str
    task: Task
    data: str
    tokenizer: Any
    metrics: dict[str, float]


def parser() -> Parser:
    metrics = "; ".join(
        f"{', '.join(metric.name for metric in (*task.metrics, *task.sample_metrics))} for {task.title}"
        for task in TASKS
    )
    p = Parser(
        prog="hf-ortho evaluate",
        description=f"Print the metrics of a checkpoint, or compare several: {metrics}.",
    )
    p.add_argument("model", nargs="+", help="Folder or Hub model. Several are evaluated in turn, on the same samples.")
    p.add_argument("--against", metavar="OTHER", help="A second model; adds the differences of the first from it.")
    p.add_argument(
        "--dataset",
        help="File, folder or Hub dataset; for a language model text, or messages or prompts and completions, of which "
        "only the completions count. Default for text: pydoc_topics.",
    )
    p.add_argument("--split", help="Split to evaluate on. Default: validation or test, else the first split.")
    p.add_argument(
        "--revision",
        action="append",
        default=[],
        help="Branch, tag or commit of a Hub model. With several models, give it once for each, in their order. "
        "Default: the main branch.",
    )
    p.add_argument("--against-revision", help="Branch, tag or commit of the model of --against.")
    add_model_flags(p)
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="Data type of the weights.")
    p.add_argument(
        "--block-size",
        type=int,
        help="Tokens per sample; the last one may have less. Default: the context length of the model, at most 1024.",
    )
    p.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="Causal language models: predict each token once, in windows of --block-size tokens that advance by N, so "
        "that at least block size - N tokens precede it. Default: disjoint blocks.",
    )
    add_column_flags(p)
    p.add_argument("--max-samples", type=int, help="Evaluate on the first N samples only. Default: all samples.")
    p.add_argument("--batch-size", type=int, default=8, help="Samples per forward pass.")
    texts = {field.name: field.metadata.get("help") for field in dataclasses.fields(DataArguments)}
    p.add_argument("--mask-probability", type=float, help=texts["mask_probability"])
    p.add_argument("--whole-word-mask", action="store_true", default=None, help=texts["whole_word_mask"])
    p.add_argument(
        "--pseudo-perplexity",
        action="store_true",
        help="Masked LM only: also print the pseudo-perplexity, which masks each token alone, so a sample of N tokens "
        "takes N forward passes; see --max-samples.",
    )
    return p


def measure(model: Model, args, place_in_order: str = "") -> Measured:
    """Evaluate a model as ``args`` say; ``place_in_order`` is printed after its name."""
    name, revision = model
    console.print(f"Loading {name}{place_in_order}")

    from ..checkpoints.load import load_checkpoint
    from ..tasks import data, of
    from ..tasks.samples import head
    from ..tasks.tokenizer import use_tokenizer
    from ..tasks.tokens import content_of
    from ..training.evaluation import evaluate_model

    trust, auto_classes = args.trust_remote_code, [task.auto_class for task in TASKS]
    options = {"dtype": args.dtype, "trust_remote_code": trust, "auto_classes": auto_classes}
    checkpoint = load_checkpoint(name, revision=revision, **options)
    use_tokenizer(checkpoint, args.tokenizer, trust_remote_code=trust)
    task = of(checkpoint.model)
    for key, wanted in ONLY_FOR.items():
        if getattr(args, key) is not None and task is not wanted:
            flag = f"--{key.replace('_', '-')}"
            raise ConfigError(f"{flag} is only for {wanted.title}, and {name} is for {task.title}")
    if args.pseudo_perplexity:
        from ..training.pseudo_likelihood import check_masked

        check_masked(checkpoint)
    place = args.dataset or task.default_dataset
    if place is None:
        raise ConfigError(f"--dataset is required for {type(checkpoint.model).__name__}")
    splits = data.load(place)
    split = data.pick(splits, args.split, data.HELD_BACK, place)
    samples = task.prepare_evaluation(checkpoint, splits[split], args.data, place)
    samples = head(samples, args.max_samples)
    data_used = f"{place if Path(place).is_file() else f'{place}, {split}'}, {len(samples)} samples"
    console.print(f"Evaluating {name}{f' at {checkpoint.commit}' if checkpoint.commit else ''} on {data_used}")
    metrics = evaluate_model(checkpoint, samples, args.batch_size, evaluation_progress())
    metrics |= task.metrics_of_samples(metrics, samples)
    if args.pseudo_perplexity:
        metrics["pseudo_perplexity"] = _pseudo_perplexity(checkpoint, samples, args.batch_size)
    tokenizer: Any = checkpoint.tokenizer
    content = None
    if tokenizer is not None:  # the objects of slow tokenizers do not compare
        content = content_of(tokenizer) if getattr(tokenizer, "is_fast", False) else tokenizer.get_vocab()
    metrics = {key: metrics[key] for key in sorted(metrics, key=LOSS.key.__eq__)}  # last: others say more
    return Measured(name, task, data_used, content, metrics)


def _pseudo_perplexity(checkpoint: Checkpoint, samples: Dataset, batch_size: int) -> float:
    from ..training.pseudo_likelihood import pseudo_perplexity

    with progress("Masking each token alone") as (bar, task):
        return pseudo_perplexity(
            checkpoint, samples, batch_size, lambda done, total: bar.update(task, completed=done, total=total)
        )


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    for key in ("max_samples", "batch_size", "stride"):
        value = getattr(args, key)
        if value is not None and value < 1:
            raise ConfigError(f"--{key.replace('_', '-')} {value}: must be at least 1")
    keys = ("block_size", "mask_probability", "whole_word_mask")
    fields = {key: value for key in keys if (value := getattr(args, key)) is not None}
    args.data = DataArguments(max_eval_samples=args.max_samples, **fields, **columns(args))
    args.data.stride = args.stride
    models = _models(args)
    check_hub([*models, hub_tokenizer(args.tokenizer)], [args.dataset])
    _check_tasks(models)
    measured: list[Measured] = []
    try:
        for i, model in enumerate(models, 1):
            latest = measure(model, args, f", model {i} of {len(models)}" if len(models) > 1 else "")
            _check_task([*measured, latest])
            measured.append(latest)
    finally:  # the figures of the models before one that fails, or before an interruption, may have taken hours
        if measured:
            _show_all(measured, bool(args.against))


def _models(args) -> list[Model]:
    """All models with their revisions, in the order of the command line."""
    if args.against and len(args.model) > 1:
        raise ConfigError(f"--against {args.against}: for one model; for more, list them all without --against")
    if args.against_revision and not args.against:
        raise ConfigError(f"--against-revision {args.against_revision} requires --against")
    missing = len(args.model) - len(args.revision)
    if missing < 0:
        raise ConfigError(f"--revision {args.revision[-1]}: there are more than models ({len(args.model)})")
    models = list(zip(args.model, [*args.revision, *[None] * missing], strict=True))
    return [*models, (args.against, args.against_revision)] if args.against else models


def _check_tasks(models: Sequence[Model]) -> None:
    """Raise ConfigError if the configs already tell that the models have different tasks."""
    if len(models) == 1:
        return
    from ..checkpoints.model_class import class_names
    from ..checkpoints.place import check_place
    from ..checkpoints.stored import stored_file
    from ..files import json_object

    found: dict[str, str] = {}
    for name, revision in models:
        check_place(name)
        config = stored_file(name, "config.json", revision)
        for architecture in class_names(json_object(config).get("architectures"), name)[:1] if config else ():
            if isinstance(task := head_of(architecture), Task):
                found.setdefault(task.title, name)
    if len(found) > 1:
        raise _different_tasks(*list(found.items())[:2])


def _check_task(measured: Sequence[Measured]) -> None:
    first, last = measured[0], measured[-1]
    if first.task is not last.task:
        raise _different_tasks((first.task.title, first.name), (last.task.title, last.name))


def _different_tasks(one: tuple[str, str], other: tuple[str, str]) -> ConfigError:
    return ConfigError(
        f"{one[1]} is for {one[0]} and {other[1]} for {other[0]}, whose metrics do not compare; evaluate them apart"
    )


def _differences(measured: Sequence[Measured]) -> str:
    """A note on samples and tokenizers that differ between the models; empty if there are none."""
    used = list(dict.fromkeys(each.data for each in measured))
    if any(each.tokenizer != measured[0].tokenizer for each in measured):
        which = "the samples of the models differ, as their tokenizers do; only figures per byte and per word compare"
        return f"note: {which} ({'; '.join(used)})"
    return f"note: the samples of the models differ ({'; '.join(used)})" if len(used) > 1 else ""


def _names(measured: Sequence[Measured]) -> list[str]:
    """The models by name; folders by their last part, unless two have the same."""
    full = [each.name for each in measured]
    short = [Path(name).resolve().name if Path(name).is_dir() else name for name in full]
    return short if len(set(short)) == len(set(full)) else full


def _show_all(measured: Sequence[Measured], pair: bool) -> None:
    first = measured[0]
    if notes := _differences(measured):
        console.print(notes)
    if len(measured) == 1:
        table(first.data, ["", *_names(measured)], [[key, f"{value:.5f}"] for key, value in first.metrics.items()])
    elif pair:
        _show_pair(first, measured[1])
    else:
        _show(measured)


def _show_pair(first: Measured, second: Measured) -> None:
    rows = [
        [key, f"{value:.5f}", f"{other:.5f}", number(value - other, "+.5f"), change(other, value)]
        for key, value in first.metrics.items()
        if (other := second.metrics.get(key)) is not None
    ]
    table(first.data, ["", *_names([first, second]), "difference", "relative"], rows)


def _show(measured: Sequence[Measured]) -> None:
    """A row per model, with the change from the first of what compares best."""
    first = measured[0]
    same = all(each.tokenizer == first.tokenizer for each in measured)
    keys = [key for key in first.metrics if all(key in each.metrics for each in measured)]
    best = "perplexity" if "perplexity" in keys else first.task.compared.key
    compared = best if same else next((k for k in keys if k == "bits_per_byte"), None)
    rows = [
        [name, *(f"{each.metrics[key]:.5f}" for key in keys)]
        for name, each in zip(_names(measured), measured, strict=True)
    ]
    headers = ["\n".join(textwrap.wrap(METRICS[key].name if key in METRICS else key, 10)) for key in keys]
    if compared is not None:
        headers.append(f"{METRICS[compared].name}\nvs. first")
        for row, each in zip(rows, measured, strict=True):
            value = each.metrics[compared]
            row.append("-" if each is first else change(first.metrics[compared], value))
    table(first.data, ["", *headers], rows)
