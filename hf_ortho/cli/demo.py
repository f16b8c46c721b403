"""``hf-ortho demo``: the full workflow on a small model, offline."""

from __future__ import annotations

from ..activations import named
from ..errors import ConfigError
from ..folders import OutputFolder
from .console import Parser, add_activation_flags


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho demo",
        description="Pretrain a small model with GELU, convert it, fine-tune both, save, reload and plot, offline.",
    )
    p.add_argument(
        "--task",
        default="text",
        choices=["text", "vision"],
        help="text (a byte-level GPT-2 on English) or vision (a ConvNeXt on handwritten digits).",
    )
    add_activation_flags(p, "1 to 32")
    p.add_argument("-o", "--output", help="Output folder. Default: demo-TASK.")
    p.add_argument("--overwrite", action="store_true", help="Replace earlier output of hf_ortho in the output folder.")
    p.add_argument("--steps", type=int, help="Number of pretraining steps. Default: depends on the task.")
    p.add_argument("--tune-steps", type=int, help="Number of fine-tuning steps. Default: depends on the task.")
    p.add_argument("--seed", type=int, default=0, help="Seed of the weights and data order.")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    for flag, value in (("--steps", args.steps), ("--tune-steps", args.tune_steps)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    name = named(args.family, args.degree, args.groups)
    folder = f"demo-{args.task}" if args.output is None else args.output
    output = OutputFolder(folder, overwrite=args.overwrite)

    from ..hub import command_line
    from .demo_story import tell_story
    from .demo_tasks import DEMOS

    task = DEMOS[args.task]
    steps = task.steps if args.steps is None else args.steps
    tune_steps = task.tune_steps if args.tune_steps is None else args.tune_steps
    tell_story(task, name, output, steps, tune_steps, args.seed, command_line("demo", argv))
