"""``hf-ortho convert``: a checkpoint in, a converted checkpoint out, verified by reloading it."""

from __future__ import annotations

import math

from ..activations import FAMILIES, named
from ..errors import ConfigError
from ..folders import OutputFolder
from .console import DTYPES, Parser, console, show_report
from .network import check_hub


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho convert",
        description="Convert a checkpoint to learnable activations, and verify the result by reloading it.",
    )
    p.add_argument("model", help="A folder, or a model on the Hub such as openai-community/gpt2.")
    p.add_argument("-o", "--output", required=True, help="Folder to write.")
    p.add_argument("--family", default="hermite", help=f"One of {', '.join(FAMILIES)}.")
    p.add_argument("--degree", help="1 to 32, or auto. Default: the family's own.")
    p.add_argument("--tolerance", type=float, default=1e-3, help="Largest rms error per layer for --degree auto.")
    p.add_argument("--calibration-data", metavar="FILE_OR_DATASET", help="Default: a fit without data.")
    p.add_argument("--calibration-samples", type=int, default=8, help="Blocks of text, or images times 8.")
    p.add_argument("--calibration-split", help="Default: train.")
    p.add_argument("--block-size", type=int, help="Tokens per block. Default: the model's context, at most 1024.")
    p.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="Of the weights.")
    p.add_argument(
        "--field",
        action="append",
        help="Config field whose activations to convert; repeatable. Default: every field that drives one.",
    )
    p.add_argument(
        "--derivative-weight", type=float, default=0.0, help="Weight of the derivative's error in the least squares."
    )
    p.add_argument(
        "--no-tails", action="store_true", help="Pure polynomials or series, fitted on the range of the data."
    )
    p.add_argument(
        "--domain", nargs=2, type=float, metavar=("LO", "HI"), help="One domain for all layers. Default: searched for."
    )
    p.add_argument(
        "--distill", type=int, default=0, metavar="N", help="Number of distillation steps (activation parameters only)."
    )
    p.add_argument(
        "--overwrite", action="store_true", help="Replace what hf_ortho wrote into the output folder before."
    )
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.domain and not -math.inf < args.domain[0] < args.domain[1] < math.inf:
        ends = " ".join(f"{end:g}" for end in args.domain)
        raise ConfigError(f"--domain {ends}: must be finite, LO < HI; without the flag they are searched for")
    if args.distill < 0:
        raise ConfigError(f"--distill {args.distill}: must be at least 0")
    if args.distill and not args.calibration_data:
        raise ConfigError(f"--distill {args.distill} needs --calibration-data")
    output = OutputFolder(args.output, overwrite=args.overwrite, keep=[args.model, args.calibration_data])
    check_hub([(args.model, args.revision)], [args.calibration_data])
    named(args.family, None if args.degree == "auto" else args.degree)

    from ..checkpoints.load import load_checkpoint, save_checkpoint
    from ..checkpoints.verify import example_inputs, fingerprint, outputs, verify_reload
    from ..conversion import convert
    from ..hub import Results, command_line, hardware, write_card
    from ..training.calibration import calibration_batches

    console.print(f"Loading {args.model}")
    checkpoint = load_checkpoint(args.model, revision=args.revision, dtype=args.dtype)
    calibration, source = None, None
    if args.calibration_data:
        calibration, source = calibration_batches(
            checkpoint,
            args.calibration_data,
            samples=args.calibration_samples,
            split=args.calibration_split,
            block_size=args.block_size,
        )
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
    show_report(report)
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
