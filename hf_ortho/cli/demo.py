"""``hf-ortho demo``: the full workflow on a small model, offline, or on a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..activations import named
from ..errors import ConfigError
from ..folders import OutputFolder
from .console import Parser, add_activation_flags, console
from .network import check_hub


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho demo",
        description="Pretrain a small model with GELU, or load a checkpoint; convert it, fine-tune both, save, reload "
        "and plot.",
    )
    p.add_argument(
        "--task",
        choices=["text", "vision"],
        help="text (a byte-level GPT-2 on English) or vision (a ConvNeXt on handwritten digits). Default: text.",
    )
    p.add_argument(
        "--model",
        metavar="FOLDER_OR_NAME",
        help="Show the workflow on this folder or Hub model instead of a small one.",
    )
    p.add_argument(
        "--dataset",
        help="With --model: file, folder or Hub dataset. Default: the built-in pydoc_topics or digits.",
    )
    add_activation_flags(p, "1 to 32")
    p.add_argument("-o", "--output", help="Output folder. Default: demo-TASK, or demo- and the name of the model.")
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
    if args.model is None and args.dataset is not None:
        raise ConfigError(f"--dataset {args.dataset} requires --model")
    for flag, value in (("--task", args.task), ("--steps", args.steps)):
        if args.model is not None and value is not None:
            raise ConfigError(f"{flag} {value}: for the small models of the demo, not for --model, which is pretrained")
    name = named(args.family, args.degree, args.groups)
    kind = args.task or "text"
    folder = f"demo-{Path(args.model).resolve().name if args.model else kind}" if args.output is None else args.output
    output = OutputFolder(folder, overwrite=args.overwrite, keep=[args.model, args.dataset])
    check_hub([(args.model, None)], [args.dataset])
    if args.model:
        console.print(f"Loading {args.model}")

    from ..hub import command_line
    from .demo_story import tell_story
    from .demo_tasks import DEMOS, checkpoint_task

    task = checkpoint_task(args.model, args.dataset) if args.model else DEMOS[kind]
    steps = task.steps if args.steps is None else args.steps
    tune_steps = task.tune_steps if args.tune_steps is None else args.tune_steps
    model = args.model or {"text": "A small GPT-2", "vision": "A small ConvNeXt"}[kind]
    tell_story(task, name, output, steps, tune_steps, args.seed, command_line("demo", argv), model)
    if args.model:
        data = f" --calibration-data {args.dataset or 'DATA'}"
        console.print(f"Next: hf-ortho convert {shlex.quote(args.model)} -o OUTPUT{data}")
    else:
        console.print("Next, on a real model: hf-ortho demo --model openai-community/gpt2, or a folder of yours")
