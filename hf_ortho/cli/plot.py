"""``hf-ortho plot``: a PNG of the activations of a converted checkpoint against the ones they replaced."""

from __future__ import annotations

from transformers.activations import ACT2FN

from ..activations import LearnableActivation
from ..conversion import collect
from ..conversion.checkpoint import load_checkpoint
from ..errors import ConfigError, OutputError
from ..plotting import Panel, plot_activations
from .console import Parser, console
from .convert import calibration_batches

HELP = __doc__


def parser() -> Parser:
    p = Parser(prog="hf-ortho plot", description=HELP)
    p.add_argument("model", help="a folder, or a model on the Hub")
    p.add_argument("-o", "--output", default="activations.png", help="PNG file to write")
    p.add_argument("--revision", help="of the model on the Hub")
    p.add_argument("--calibration-data", metavar="FILE_OR_DATASET", help="draw the pre-activations over this data")
    p.add_argument("--calibration-samples", type=int, default=8, help="blocks of text, or images times 8")
    p.add_argument("--calibration-split", help="default: train")
    p.add_argument("--block-size", type=int, help="tokens per block; default: the model's context, at most 1024")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if not args.output.endswith(".png"):
        raise ConfigError(f"--output {args.output}: must end in .png")
    checkpoint = load_checkpoint(args.model, revision=args.revision)
    model = checkpoint.model
    learned = {n: m for n, m in model.named_modules() if isinstance(m, LearnableActivation)}
    if not learned:
        raise ConfigError(f"{args.model} has no learnable activations; convert it first with hf-ortho convert")
    sources = (getattr(model.config, "hf_ortho", None) or {}).get("source_activations", {})
    names = {value.rpartition("-")[2] for value in sources.values()}
    source = ACT2FN[next(iter(names))] if len(names) == 1 else None
    batches = calibration_batches(checkpoint, args)
    histograms = collect(model, learned, batches)[0] if batches else {}
    panels = [Panel(name, module, source, histograms.get(name)) for name, module in learned.items()]
    try:
        plot_activations(panels, args.output, args.model)
    except OSError as error:
        raise OutputError(f"{args.output} cannot be written: {error.strerror}") from error
    console.print(f"Wrote {args.output}")
