"""``hf-ortho demo``: the whole story on a small model, without a network."""

from __future__ import annotations

from ..activations import FAMILIES, named
from ..errors import ConfigError
from ..folders import OutputFolder
from .console import Parser


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho demo",
        description="Pretrain a small model with GELU, convert it, fine-tune both, save, reload and draw, offline.",
    )
    p.add_argument(
        "--task",
        default="text",
        choices=["text", "vision"],
        help="A byte-level GPT-2 on English, or a ConvNeXt on handwritten digits.",
    )
    p.add_argument("--family", default="hermite", help=f"One of {', '.join(FAMILIES)}.")
    p.add_argument("--degree", help="1 to 32. Default: the family's own.")
    p.add_argument("-o", "--output", help="Folder to write. Default: demo-TASK.")
    p.add_argument(
        "--overwrite", action="store_true", help="Replace what hf_ortho wrote into the output folder before."
    )
    p.add_argument("--steps", type=int, help="Steps of the first training. Default: the task's own.")
    p.add_argument("--tune-steps", type=int, help="Steps of the fine-tuning. Default: the task's own.")
    p.add_argument("--seed", type=int, default=0, help="Seed of weights and data order.")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    for flag, value in (("--steps", args.steps), ("--tune-steps", args.tune_steps)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    name = named(args.family, args.degree)
    folder = f"demo-{args.task}" if args.output is None else args.output
    output = OutputFolder(folder, overwrite=args.overwrite)

    from ..hub import command_line
    from .demo_story import tell_story
    from .demo_tasks import DEMOS

    task = DEMOS[args.task]
    steps = task.steps if args.steps is None else args.steps
    tune_steps = task.tune_steps if args.tune_steps is None else args.tune_steps
    tell_story(task, name, output, steps, tune_steps, args.seed, command_line("demo", argv))
