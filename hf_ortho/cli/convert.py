"""``hf-ortho convert``: a checkpoint in, a converted checkpoint out, verified by reloading it."""

from __future__ import annotations

import argparse

from ..activations import FAMILIES, named
from ..conversion import convert
from ..conversion.adapter import base_of
from ..conversion.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..conversion.verify import example_inputs, fingerprint, outputs, verify_reload
from ..errors import ConfigError, DataError
from ..files import OutputFolder
from ..hub import DataSource, Results, command_line, hardware, write_card
from ..training import data
from ..training.arguments import DataArguments
from ..training.samples import batches, class_names, prepare
from .console import Parser, console, show

HELP = __doc__


def parser() -> Parser:
    p = Parser(prog="hf-ortho convert", description=HELP)
    p.add_argument("model", help="a folder, or a model on the Hub such as openai-community/gpt2")
    p.add_argument("-o", "--output", required=True, help="folder to write")
    p.add_argument("--family", default="hermite", help=f"one of {', '.join(FAMILIES)}")
    p.add_argument("--degree", default=None, help="1 to 32, or auto; default: the family's")
    p.add_argument("--tolerance", type=float, default=1e-3, help="largest rms error per layer, for --degree auto")
    p.add_argument("--calibration-data", metavar="FILE_OR_DATASET", help="default: the data-free fit")
    p.add_argument("--calibration-samples", type=int, default=8, help="blocks of text, or images times 8")
    p.add_argument("--calibration-split", help="default: train")
    p.add_argument("--block-size", type=int, help="tokens per block; default: the model's context, at most 1024")
    p.add_argument("--revision", help="branch, tag or commit of a Hub model")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    p.add_argument("--field", action="append", help="config field to convert, repeatable; default: all that drive one")
    p.add_argument("--derivative-weight", type=float, default=0.0, help="lambda of the Sobolev least squares")
    p.add_argument("--no-tails", action="store_true", help="pure polynomials or series, on the range of the data")
    p.add_argument("--domain", nargs=2, type=float, metavar=("LO", "HI"), help="for all layers; default: searched")
    p.add_argument("--distill", type=int, default=0, metavar="N", help="steps on the activations towards the source")
    p.add_argument("--overwrite", action="store_true", help="replace what hf_ortho wrote to the output folder before")
    return p


def calibration_batches(
    checkpoint: Checkpoint, args: argparse.Namespace
) -> tuple[list[dict] | None, DataSource | None]:
    """The batches, and where they come from; both None without calibration data."""
    if not args.calibration_data:
        return None, None
    if args.calibration_samples < 1:
        raise DataError(f"--calibration-samples {args.calibration_samples}: must be at least 1")
    revision = data.commit_of(args.calibration_data)
    splits = data.load(args.calibration_data, revision=revision)
    split = data.pick(splits, args.calibration_split, data.TRAIN, args.calibration_data)
    source = DataSource.of(None, args.calibration_data, split=split, revision=revision)
    return _batches(checkpoint, splits[split], args), source


def _batches(checkpoint: Checkpoint, dataset, args: argparse.Namespace) -> list[dict]:
    if not checkpoint.task:
        return _of_another_task(checkpoint, dataset, args)
    samples = prepare(checkpoint, dataset, DataArguments(block_size=args.block_size), args.calibration_data)
    if checkpoint.task == "image-classification":
        found = batches(samples, args.calibration_samples * 8, size=8)
        if data.class_names(samples) != class_names(checkpoint.model):
            found = [{"pixel_values": batch["pixel_values"]} for batch in found]  # the labels are not the model's
        return found
    return _label_some(batches(samples, args.calibration_samples))


def _of_another_task(checkpoint: Checkpoint, dataset, args: argparse.Namespace) -> list[dict]:
    """Text for an encoder or an encoder-decoder, images for an image model; without labels."""
    model, name = checkpoint.model, args.calibration_data
    if model.main_input_name == "pixel_values" and checkpoint.image_processor is not None:
        samples = data.images(dataset, checkpoint.image_processor, name=name)
        found = batches(samples, args.calibration_samples * 8, size=8)
        return [{"pixel_values": batch["pixel_values"]} for batch in found]
    if model.main_input_name != "input_ids" or checkpoint.tokenizer is None:
        raise DataError(
            f"{type(model).__name__} takes {model.main_input_name}, which --calibration-data cannot give it; "
            "calibrate it in Python with hf_ortho.convert(model, calibration=batches), or leave the flag out"
        )
    size = args.block_size or min(512, checkpoint.tokenizer.model_max_length)
    found = batches(data.text_chunks(dataset, checkpoint.tokenizer, size, name), args.calibration_samples)
    if model.config.is_encoder_decoder:
        found = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in found]
    return found


def _label_some(blocks: list[dict]) -> list[dict]:
    """Labels on a quarter of the blocks, cut into pieces: the logits of a long block outweigh a model's weights."""
    labelled = max(1, len(blocks) // 4)
    pieces = [
        {"input_ids": piece, "labels": piece}
        for block in blocks[:labelled]
        for piece in block["input_ids"].split(256, 1)
    ]
    return pieces + [{"input_ids": block["input_ids"]} for block in blocks[labelled:]]


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    named(args.family, None if args.degree == "auto" else args.degree)
    if args.distill < 0:
        raise ConfigError(f"--distill {args.distill}: must be at least 0")
    if args.distill and not args.calibration_data:
        raise ConfigError(f"--distill {args.distill} needs --calibration-data")
    keep = [args.model, base_of(args.model), args.calibration_data]
    output = OutputFolder(args.output, overwrite=args.overwrite, keep=keep)
    console.print(f"Loading {args.model}")
    checkpoint = load_checkpoint(args.model, revision=args.revision, dtype=args.dtype)
    calibration, source = calibration_batches(checkpoint, args)
    report = convert(
        checkpoint.model,
        args.family,
        degree=args.degree,
        tolerance=args.tolerance,
        calibration=calibration,
        fields=args.field,
        derivative_weight=args.derivative_weight,
        domain=args.domain,
        tails=not args.no_tails,
        distill=args.distill,
    )
    for part in report.tables():
        show(part)
    for line in report.summary():
        console.print(line)
    command = command_line("convert", argv)
    results = []
    if source is not None and report.loss_before is not None and report.loss_after is not None:
        values = {"source": {"loss": report.loss_before}, "converted": {"loss": report.loss_after}}
        note = "the labelled part of the calibration data"
        results = [Results(values, source, command, hardware(), note=note)]
    inputs = example_inputs(checkpoint.model)
    expected, tensors = outputs(checkpoint.model, inputs), fingerprint(checkpoint.model)
    with output.writing() as draft:
        save_checkpoint(checkpoint, draft)
        report.plot(draft / "activations.png")
        report.modules.clear()  # the sources need no memory while the copy is checked
        write_card(
            draft,
            place=args.output,
            report=report,
            results=results,
            data=[source] if source else [],
            command=command,
        )
        cls = type(checkpoint.model)
        del checkpoint  # the reloaded model takes its place in memory
        equal = verify_reload(cls, draft, tensors, inputs, expected)
    checked = "tensors and outputs bit-equal" if inputs and equal else "tensors bit-equal"
    console.print(f"Wrote {args.output} (reloaded with from_pretrained: {checked})")
