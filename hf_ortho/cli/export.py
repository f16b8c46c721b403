"""``hf-ortho export``: write a model as an ONNX graph, and compare it with the model in onnxruntime."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

from ..errors import ConfigError
from ..folders import OutputFolder
from .console import Parser, add_trust_flag, console
from .network import check_hub
from .progress import announce_libraries

REQUIRED = ("onnx", "onnxscript", "onnxruntime")


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho export",
        description="Write a model as an ONNX graph that runs without hf_ortho and PyTorch, and compare it with the "
        "model in onnxruntime. The weights become float32. Example: hf-ortho export gpt2-h8 -o gpt2-onnx",
    )
    p.add_argument("model", help="Folder or Hub model, converted or not, or an adapter, which is merged.")
    p.add_argument("-o", "--output", required=True, help="Output folder.")
    p.add_argument("--format", default="onnx", choices=["onnx"], help="Format.")
    p.add_argument(
        "--no-cache",
        action="store_true",
        help="Text generation: export without the keys and values of past tokens. Each token then takes a pass over "
        "the whole text.",
    )
    p.add_argument("--revision", help="Branch, tag or commit of the Hub model.")
    add_trust_flag(p)
    p.add_argument("--overwrite", action="store_true", help="Replace earlier output of hf_ortho in the output folder.")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if any(importlib.util.find_spec(name) is None for name in REQUIRED):
        raise ConfigError(f"hf-ortho export requires {', '.join(REQUIRED)}: pip install 'hf-ortho[onnx]'")
    output = OutputFolder(args.output, overwrite=args.overwrite, keep=[args.model])
    check_hub([(args.model, args.revision)])

    announce_libraries()
    from ..checkpoints.load import load_checkpoint
    from ..checkpoints.place import GRAPH
    from ..checkpoints.provenance import Provenance
    from ..export.onnx_folder import write_onnx
    from ..hub import TrainingDetails, command_line, write_card
    from ..hub.card.write import PICTURE
    from ..hub.record import REPORT_FILE, carry_over

    console.print(f"Loading {args.model}")
    checkpoint = load_checkpoint(
        args.model, revision=args.revision, dtype="float32", trust_remote_code=args.trust_remote_code
    )
    converted = Provenance.of(checkpoint.model.config).activation
    training = TrainingDetails(
        others={"merged adapter": args.model} if checkpoint.merged else {},
        base_model=None if converted else args.model,
        base_revision=None if converted else checkpoint.commit,
    )
    with output.writing() as draft:
        with console.status("Exporting"):
            graph = write_onnx(checkpoint, args.model, draft, cache=not args.no_cache)
        carry_over(args.model, checkpoint.commit or args.revision, draft, (REPORT_FILE, PICTURE))
        write_card(
            draft,
            place=args.output,
            command=command_line("export", argv),
            training=training,
            graph=graph,
        )
        size = sum(file.stat().st_size for file in (draft / GRAPH).parent.iterdir())
    console.print(
        f"Wrote {args.output} ({GRAPH}, {size / 1e6:.1f} MB); outputs differ from the model by at most "
        f"{graph.difference:.1e} of the largest output, in {graph.engine}"
    )
    console.print(
        f"Next: hf-ortho push {shlex.quote(args.output)} YOU/{shlex.quote(Path(args.output).absolute().name)}"
    )
