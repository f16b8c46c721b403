"""``hf-ortho evaluate``: loss and perplexity, or top-1 and top-5, of one checkpoint, or of two with the difference."""

from __future__ import annotations

from ..errors import ConfigError
from ..text import change
from .console import DTYPES, Parser, console, table
from .network import check_hub


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho evaluate",
        description="Print loss and perplexity, or top-1 and top-5 accuracy, of one checkpoint, or of two with the "
        "difference.",
    )
    p.add_argument("model", help="A folder, or a model on the Hub.")
    p.add_argument("--against", metavar="OTHER", help="A second model, evaluated on the same samples.")
    p.add_argument("--dataset", help="A file, a folder, or a dataset on the Hub. Default for text: pydoc_topics.")
    p.add_argument("--split", help="Default: validation or test, else the first.")
    p.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
    p.add_argument("--against-revision", help="Branch, tag or commit of the other model.")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="Of the weights.")
    p.add_argument("--block-size", type=int, help="Tokens per sample. Default: the model's context, at most 1024.")
    p.add_argument("--text-column", help="Default: text, or the only column of text.")
    p.add_argument("--image-column", help="Default: image, or the only column of images.")
    p.add_argument("--label-column", help="Default: label, or the only column of labels.")
    p.add_argument("--max-samples", type=int, help="Evaluate on the first N samples. Default: all.")
    p.add_argument("--batch-size", type=int, default=8, help="Samples per forward pass.")
    return p


def measure(name: str, revision: str | None, args) -> tuple[str, dict[str, float]]:
    from ..checkpoints.load import load_checkpoint
    from ..tasks import data
    from ..tasks.samples import prepare
    from ..training.arguments import DataArguments
    from ..training.evaluation import evaluate_model

    checkpoint = load_checkpoint(name, revision=revision, dtype=args.dtype)
    place = args.dataset or ("pydoc_topics" if checkpoint.task == "causal-lm" else None)
    if place is None:
        raise ConfigError(f"--dataset is needed for {type(checkpoint.model).__name__}")
    splits = data.load(place)
    split = data.pick(splits, args.split, data.HELD_BACK, place)
    columns = {"text_column": args.text_column, "image_column": args.image_column, "label_column": args.label_column}
    samples = prepare(checkpoint, splits[split], DataArguments(block_size=args.block_size, **columns), place)
    if args.max_samples is not None:
        samples = samples.select(range(min(args.max_samples, len(samples))))
    what = f"{place}, {split}, {len(samples)} samples"
    console.print(f"Evaluating {name}{f' at {checkpoint.commit}' if checkpoint.commit else ''} on {what}")
    return what, evaluate_model(checkpoint, samples, args.batch_size)


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    for flag, value in (("--max-samples", args.max_samples), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    check_hub([(args.model, args.revision), (args.against, args.against_revision)], [args.dataset])
    what, first = measure(args.model, args.revision, args)
    if not args.against:
        table(what, ["", args.model], [[key, f"{value:.5f}"] for key, value in first.items()])
        return
    other_what, second = measure(args.against, args.against_revision, args)
    if what != other_what:
        console.print(f"note: the two models read the data differently ({what}; {other_what})")
    rows = [
        [key, f"{value:.5f}", f"{second[key]:.5f}", f"{value - second[key]:+.5f}", change(second[key], value)]
        for key, value in first.items()
        if key in second
    ]
    table(what, ["", args.model, args.against, "difference", "relative"], rows)
