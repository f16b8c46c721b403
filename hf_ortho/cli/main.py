"""Dispatch to the sub-commands and turn errors into one sentence and an exit code."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

from ..errors import ConfigError, HfOrthoError
from ..text import suggestion, visible

COMMANDS = {
    "demo": "the whole story on a small GPT-2 or ConvNeXt: pretrain, convert, fine-tune, save, reload",
    "convert": "convert a checkpoint to learnable activations",
    "finetune": "fine-tune a checkpoint, from a YAML file and flags",
    "pretrain": "train a model from scratch, from a YAML file and flags",
    "compare": "one recipe with several activations and seeds: table, picture, time per step and memory",
    "evaluate": "loss and perplexity, or accuracy, of one checkpoint or two",
    "plot": "draw the activations of a converted checkpoint, of two, or over a training",
    "inspect": "print the activations of a converted checkpoint: origin, domains, gains, coefficients",
    "push": "upload a model or an adapter to the Hub, with its card",
    "app": "a web page: fits of activations, and the activations of a converted checkpoint",
    "bench": "time and memory of the activations, and of models with them, against the fixed ones",
    "env": "the machine and the versions of the libraries",
}

LAUNCHED = "HF_ORTHO_LAUNCHED"  # in the environment of the processes that ``--accelerate_config`` starts


def usage() -> str:
    lines = [f"  {name:10s}{text}" for name, text in COMMANDS.items()]
    return (
        "usage: hf-ortho COMMAND [options]\n\n" + "\n".join(lines) + "\n\n`hf-ortho COMMAND --help` lists its options."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 for a check that fails, 2 for a user's mistake, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except HfOrthoError as error:
        _report(f"error: {error}", error)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough, as ``head`` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _report("interrupted; no output was left half-written")
        return 130


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(version("hf_ortho"))
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    if argv[0] not in COMMANDS:
        hint = suggestion(argv[0], COMMANDS)
        raise ConfigError(f"unknown command {argv[0]!r}: must be one of {', '.join(COMMANDS)}{hint}")
    from .console import quiet

    quiet()
    try:
        return importlib.import_module(f".{argv[0]}", __package__).run(argv[1:]) or 0
    except SystemExit as done:  # of --help
        return int(done.code or 0)


def _report(message: str, error: Exception | None = None) -> None:
    """Print what ended a command, once for all its processes; torch's launcher gets ``error`` from each."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and error is not None:
        details = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": str(error), "extraInfo": details}}))
    if os.environ.get("RANK", "0") == "0" and not (file and LAUNCHED in os.environ):
        print(f"hf-ortho: {visible(message)}", file=sys.stderr)


def _interrupt(signum, frame):
    raise KeyboardInterrupt
