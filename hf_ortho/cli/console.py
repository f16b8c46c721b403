"""Shared by the commands: argument parser, quiet libraries, and tables."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from wrapt import register_post_import_hook

from ..activations import FAMILIES
from ..errors import ConfigError
from ..tasks.arguments import DataArguments
from ..text import one_line, suggestion, visible

if TYPE_CHECKING:
    from ..conversion import ConversionReport


class PlainConsole(Console):
    """A console that prints text literally: no markup, emoji codes or control sequences."""

    def __init__(self, **options):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text, **options):
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self):
        raise BrokenPipeError  # rich would exit the process

    def status(self, status, **options):
        return super().status(self.render_str(status), **options)  # rich would parse markup


console = PlainConsole(soft_wrap=True)
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$", re.IGNORECASE)
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Help(argparse.HelpFormatter):
    """Help texts, followed by the default unless the text already states it."""

    def _get_help_string(self, action):
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS, "") or not action.option_strings or "efault" in text:
            return text
        return f"{text} Default: %(default)s."

    def _get_default_metavar_for_optional(self, action):
        return "BOOL" if action.const is True else action.dest.rpartition("_")[2].upper()


class Parser(argparse.ArgumentParser):
    """An argparse parser, for compatibility with HfArgumentParser, which provides all TrainingArguments fields.

    Flags are displayed with dashes and also accepted with underscores. A usage error is one sentence instead of a list
    of all flags.
    """

    def __init__(self, *args, **kwargs):
        options: dict[str, Any] = {"allow_abbrev": False, "formatter_class": Help} | kwargs
        super().__init__(*args, **options)
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse would parse -1e-5 as a flag

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([dashed(arg) for arg in args or ()], namespace)

    def parse_args(self, args=None, namespace=None):
        parsed, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return parsed

    def refuse(self, rest: list[str]) -> None:
        """Raise ConfigError for the first unknown argument, with the closest flag."""
        flag = next((arg.split("=")[0] for arg in rest if arg.startswith("-")), None)
        if flag is not None:
            known = [dashed(name) for name in self._option_string_actions if name not in ("-h", "--help")]
            self.error(f"unknown flag {flag}{suggestion(flag, known)}")
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def dashed(arg: str) -> str:
    """Replace underscores with dashes in a flag, but not in its value."""
    flag, *value = arg.split("=", 1)
    return "=".join([flag.replace("_", "-"), *value]) if arg.startswith("--") else arg


def add_activation_flags(parser: Parser, degrees: str) -> None:
    """``--family``, ``--degree`` and ``--groups``."""
    parser.add_argument(
        "--family",
        default="hermite",
        help=f"Activation family: {', '.join(FAMILIES)}; or a whole name, such as hermite_3_g16.",
    )
    parser.add_argument("--degree", help=f"Degree: {degrees}. Default: 8 for hermite, 6 for the others.")
    parser.add_argument(
        "--groups",
        type=int,
        metavar="N",
        help="Split the channels into N groups of consecutive channels with one function each; N must divide the width "
        "of the inputs of all activations. Default: one function for all channels.",
    )


def add_calibration_flags(parser: Parser, purpose: str) -> None:
    """The flags that select calibration data; ``purpose`` is the help of ``--calibration-data``."""
    parser.add_argument("--calibration-data", metavar="FILE_OR_DATASET", help=purpose)
    parser.add_argument(
        "--calibration-samples",
        type=int,
        default=8,
        help="Number of text blocks, of conversations, or of batches of 8 images or labeled texts.",
    )
    parser.add_argument("--calibration-split", help="Split of the calibration data. Default: train.")
    parser.add_argument(
        "--block-size", type=int, help="Tokens per block. Default: the context length of the model, at most 1024."
    )
    add_column_flags(parser)


def calibration_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``calibration_batches`` from the flags of ``add_calibration_flags``.

    Raises:
        ConfigError: a number is out of range.
    """
    if args.calibration_samples < 1:
        raise ConfigError(f"--calibration-samples {args.calibration_samples}: must be at least 1")
    fields = {"block_size": args.block_size, **columns(args)}
    DataArguments(**fields)
    return {"samples": args.calibration_samples, "split": args.calibration_split, **fields}


def add_column_flags(parser: Parser) -> None:
    """The flags that select columns of a dataset, named as the fields of ``DataArguments``."""
    for field in dataclasses.fields(DataArguments):
        if field.name.endswith("_column"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", help=field.metadata["help"])


def columns(args: argparse.Namespace) -> dict[str, Any]:
    """The values of ``add_column_flags``."""
    return {key: value for key, value in vars(args).items() if key.endswith("_column")}


def add_model_flags(parser: Parser) -> None:
    """The flags for what the repository of a model lacks, or may not do without permission."""
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        help="Tokenizer: a folder, a Hub model, or bytes. Default: the one of the model.",
    )
    add_trust_flag(parser)


def add_trust_flag(parser: Parser) -> None:
    """The flag that permits to run a model's own code."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Run the code in the repository of a model that needs it; read it first. Default: refuse such a model.",
    )


def quiet() -> None:
    """Silence progress bars and warnings of libraries once they are imported. Errors are still shown."""

    def transformers_logging(logging_module):
        logging_module.set_verbosity_error()
        logging_module.disable_progress_bar()

    def datasets_logging(datasets):
        datasets.logging.set_verbosity(logging.CRITICAL)  # each error that it logs is also raised
        datasets.disable_progress_bars()

    register_post_import_hook(transformers_logging, "transformers.utils.logging")
    register_post_import_hook(datasets_logging, "datasets")
    register_post_import_hook(lambda module: module.set_verbosity_error(), "huggingface_hub.utils.logging")
    register_post_import_hook(lambda module: module.logger.setLevel(logging.ERROR), "deepspeed.utils.logging")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table with a first column of text and further columns of numbers, wider than the console if necessary:
    numbers are never truncated."""
    out = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        out.add_row(*map(one_line, row))
    console.print(title, style="italic")
    needed = Measurement.get(console, console.options.update(max_width=100_000), out).maximum
    PlainConsole(width=max(console.width, needed)).print(out)


def show_report(report: ConversionReport, *, verbose: bool = False) -> None:
    """Print the text of a report."""
    console.print(report.text(verbose=verbose))
