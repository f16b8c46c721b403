"""``hf-ortho evaluate``: print the metrics of a checkpoint, or compare two checkpoints."""

from __future__ import annotations

from ..errors import ConfigError
from ..tasks import TASKS
from ..tasks.arguments import DataArguments
from ..text import change, number
from .console import DTYPES, Parser, add_column_flags, add_model_flags, columns, console, table
from .network import check_hub, hub_tokenizer


def parser() -> Parser:
    metrics = "; ".join(f"{', '.join(metric.name for metric in task.metrics)} for {task.title}" for task in TASKS)
    p = Parser(
        prog="hf-ortho evaluate",
        description=f"Print the metrics of a checkpoint, or compare two checkpoints: {metrics}.",
    )
    p.add_argument("model", help="Folder or Hub model.")
    p.add_argument("--against", metavar="OTHER", help="Second model, evaluated on the same samples.")
    p.add_argument("--dataset", help="File, folder or Hub dataset. Default for text: pydoc_topics.")
    p.add_argument("--split", help="Split to evaluate on. Default: validation or test, else the first split.")
    p.add_argument("--revision", help="Branch, tag or commit of the Hub model.")
    p.add_argument("--against-revision", help="Branch, tag or commit of the second model.")
    add_model_flags(p)
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="Data type of the weights.")
    p.add_argument(
        "--block-size", type=int, help="Tokens per sample. Default: the context length of the model, at most 1024."
    )
    add_column_flags(p)
    p.add_argument("--max-samples", type=int, help="Evaluate on the first N samples only. Default: all samples.")
    p.add_argument("--batch-size", type=int, default=8, help="Samples per forward pass.")
    return p


def measure(name: str, revision: str | None, args) -> tuple[str, dict[str, float]]:
    from ..checkpoints.load import load_checkpoint
    from ..tasks import data, of
    from ..tasks.samples import head
    from ..tasks.tokenizer import use_tokenizer
    from ..training.evaluation import evaluate_model

    trust, auto_classes = args.trust_remote_code, [task.auto_class for task in TASKS]
    options = {"dtype": args.dtype, "trust_remote_code": trust, "auto_classes": auto_classes}
    checkpoint = load_checkpoint(name, revision=revision, **options)
    use_tokenizer(checkpoint, args.tokenizer, trust_remote_code=trust)
    task = of(checkpoint.model)
    place = args.dataset or task.default_dataset
    if place is None:
        raise ConfigError(f"--dataset is required for {type(checkpoint.model).__name__}")
    splits = data.load(place)
    split = data.pick(splits, args.split, data.HELD_BACK, place)
    samples = task.prepare_evaluation(checkpoint, splits[split], args.data, place)
    samples = head(samples, args.max_samples)
    data_used = f"{place}, {split}, {len(samples)} samples"
    console.print(f"Evaluating {name}{f' at {checkpoint.commit}' if checkpoint.commit else ''} on {data_used}")
    return data_used, evaluate_model(checkpoint, samples, args.batch_size)


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    for flag, value in (("--max-samples", args.max_samples), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    args.data = DataArguments(block_size=args.block_size, **columns(args))
    models = [(args.model, args.revision), (args.against, args.against_revision), hub_tokenizer(args.tokenizer)]
    check_hub(models, [args.dataset])
    data_used, first = measure(args.model, args.revision, args)
    if not args.against:
        table(data_used, ["", args.model], [[key, f"{value:.5f}"] for key, value in first.items()])
        return
    other_data_used, second = measure(args.against, args.against_revision, args)
    if data_used != other_data_used:
        console.print(f"note: the samples of the two models differ ({data_used}; {other_data_used})")
    rows = [
        [key, f"{value:.5f}", f"{second[key]:.5f}", number(value - second[key], "+.5f"), change(second[key], value)]
        for key, value in first.items()
        if key in second
    ]
    table(data_used, ["", args.model, args.against, "difference", "relative"], rows)
