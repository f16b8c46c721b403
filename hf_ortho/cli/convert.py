"""``hf-ortho convert``: convert a checkpoint, and verify the result by reloading it."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..activations import named
from ..errors import ConfigError
from ..fitting.options import WEIGHTS
from ..folders import OutputFolder
from .console import (
    DTYPES,
    Parser,
    add_activation_flags,
    add_calibration_flags,
    add_model_flags,
    calibration_options,
    console,
    show_report,
)
from .device import add_device_flag, chosen_device
from .network import check_hub, hub_tokenizer
from .progress import counted

if TYPE_CHECKING:
    from ..checkpoints.load import Checkpoint


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho convert",
        description="Convert a checkpoint to learnable activations, and verify the result by reloading it. "
        "Example: hf-ortho convert gpt2 -o gpt2-h8 --calibration-data notes.txt",
    )
    p.add_argument("model", help="Folder or Hub model, such as openai-community/gpt2.")
    p.add_argument("-o", "--output", required=True, help="Output folder.")
    add_activation_flags(p, "1 to 32, or auto")
    p.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="For --degree auto: the largest KL divergence from the source model per prediction, as predicted by the "
        "Fisher weights; without them, the largest rms error of a layer.",
    )
    add_calibration_flags(p, "File, folder or dataset to calibrate with, like the data of later use. Default: none.")
    p.add_argument(
        "--weights",
        default="fisher",
        choices=WEIGHTS,
        help="Weight each pre-activation in the calibration data by its effect on the predictions (fisher), or equally "
        "(density).",
    )
    p.add_argument("--revision", help="Branch, tag or commit of the Hub model.")
    add_model_flags(p)
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="Data type of the weights.")
    add_device_flag(p, "Device for the calibration, the distillation and the comparison with the source model")
    p.add_argument(
        "--field",
        action="append",
        help="Config field to convert (repeatable). Default: every field that drives an activation.",
    )
    p.add_argument(
        "--derivative-weight",
        type=float,
        help="Weight of the derivative error in the least-squares fit. Default: 0.03; 0 for piecewise-linear families.",
    )
    p.add_argument(
        "--no-tails",
        action="store_true",
        help="Fit pure polynomials or series on the range of the data, without straight tails.",
    )
    p.add_argument(
        "--domain", nargs=2, type=float, metavar=("LO", "HI"), help="Domain for all layers. Default: search per layer."
    )
    p.add_argument(
        "--distill", type=int, default=0, metavar="N", help="Number of distillation steps (activation parameters only)."
    )
    p.add_argument(
        "--verbose", action="store_true", help="Print all layers instead of the five with the largest errors."
    )
    p.add_argument("--overwrite", action="store_true", help="Replace earlier output of hf_ortho in the output folder.")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.domain and not -math.inf < args.domain[0] < args.domain[1] < math.inf:
        ends = " ".join(f"{end:g}" for end in args.domain)
        raise ConfigError(
            f"--domain {ends}: must be finite with LO < HI; without the flag, a domain is searched for each layer"
        )
    if args.distill < 0:
        raise ConfigError(f"--distill {args.distill}: must be at least 0")
    if args.distill and not args.calibration_data:
        raise ConfigError(f"--distill {args.distill} requires --calibration-data")
    options = calibration_options(args)
    output = OutputFolder(
        args.output, overwrite=args.overwrite, keep=[args.model, args.tokenizer, args.calibration_data]
    )
    check_hub([(args.model, args.revision), hub_tokenizer(args.tokenizer)], [args.calibration_data])
    named(args.family, None if args.degree == "auto" else args.degree, args.groups)
    console.print(f"Loading {args.model}")
    device = chosen_device(args.device)

    import torch

    from ..checkpoints.load import load_checkpoint, save_checkpoint
    from ..checkpoints.verify import check_weights, example_inputs, fingerprint, outputs, verify_reload
    from ..conversion import convert
    from ..hub import Results, command_line, hardware, write_card
    from ..tasks.tokenizer import use_tokenizer
    from ..training.calibration import calibration_batches

    trust = args.trust_remote_code
    checkpoint = load_checkpoint(args.model, revision=args.revision, dtype=args.dtype, trust_remote_code=trust)
    use_tokenizer(checkpoint, args.tokenizer, trust_remote_code=trust)
    check_weights(checkpoint.model, args.model)
    calibration, source = None, None
    try:
        moved: Any = checkpoint.model
        moved.to(device)
        if args.calibration_data:
            console.print(f"Reading {args.calibration_data}")
            calibration, source = calibration_batches(checkpoint, args.calibration_data, **options)
        with counted(calibration) as batches:
            report = convert(
                checkpoint.model,
                args.family,
                degree=args.degree,
                groups=args.groups,
                tolerance=args.tolerance,
                calibration=batches,
                weights=args.weights,
                fields=args.field,
                derivative_weight=args.derivative_weight,
                domain=args.domain,
                tails=not args.no_tails,
                distill=args.distill,
            )
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"--device {device}: {args.model} does not fit in its memory; use --device cpu") from error
    for module in (checkpoint.model, *(original for _, original, _ in report.modules.values())):
        module.cpu()  # as the reloaded model, so that their outputs can be equal
    show_report(report, verbose=args.verbose)
    command = command_line("convert", argv)
    results = []
    if source is not None and (fidelity := report.fidelity) and None not in (fidelity.loss_before, fidelity.loss_after):
        values = {"source": {"loss": fidelity.loss_before}, "converted": {"loss": fidelity.loss_after}}
        note = "the held-out part of the calibration data" if fidelity.held_out else "the calibration data"
        results = [Results(values, source, command, hardware(device.type != "cpu"), note=note)]
    console.print(f"Writing {args.output}, and reloading it")
    inputs = example_inputs(checkpoint.model)
    expected, tensors = outputs(checkpoint.model, inputs), fingerprint(checkpoint.model)
    with output.writing() as draft:
        save_checkpoint(checkpoint, draft)
        report.plot(draft / "activations.png", f"{Path(args.model).name}: {report.activation}")
        report.modules.clear()  # free the source modules before reloading
        write_card(
            draft,
            place=args.output,
            report=report,
            results=results,
            data=[source] if source else [],
            command=command,
        )
        cls, advice = type(checkpoint.model), next_steps(checkpoint, args.model, args.output)
        del checkpoint  # free its memory for the reloaded model
        equal = verify_reload(cls, draft, tensors, inputs, expected)
    checked = "tensors and outputs bit-equal" if inputs and equal else "tensors bit-equal"
    console.print(f"Wrote {args.output} (reloaded with from_pretrained: {checked})")
    for line in advice:
        console.print(line)


def next_steps(checkpoint: Checkpoint, source: str, folder: str) -> list[str]:
    """What to do with a converted model; without a tokenizer or image processor, it can only be loaded."""
    from ..tasks import Task, head_of

    head, quoted = head_of(checkpoint.model), shlex.quote(folder)
    code = ", trust_remote_code=True" if type(checkpoint.model).is_remote_code() else ""
    lines = [f"Load:    import hf_ortho; {head.auto_class}.from_pretrained({json.dumps(folder)}{code})"]
    if checkpoint.processor is None:
        return lines
    if isinstance(head, Task):
        data = "" if head.default_dataset else " --dataset DATA"
        lines.append(f"Compare: hf-ortho evaluate {quoted} --against {shlex.quote(source)}{data}")
    task = "" if isinstance(head, Task) else " --task TASK"
    return [*lines, f"Train:   hf-ortho finetune --model {quoted} --dataset DATA{task} --output-dir OUTPUT"]
