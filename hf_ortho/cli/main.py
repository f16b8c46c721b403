"""Dispatch to the subcommands, and report errors as one sentence and an exit code."""

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
from ..text import suggestion

COMMANDS = {
    "demo": "run the full workflow on a small GPT-2 or ConvNeXt: pretrain, convert, fine-tune, save, reload",
    "convert": "convert a checkpoint to learnable activations",
    "finetune": "fine-tune a checkpoint, configured by a YAML file and flags",
    "pretrain": "train a model from scratch, configured by a YAML file and flags",
    "compare": "run one recipe with several activations and seeds, and compare results, time per step and memory",
    "evaluate": "print the loss and other metrics of a checkpoint, or compare two checkpoints",
    "plot": "plot the activations of one or two converted checkpoints, or over a training",
    "inspect": "print the activations of a converted checkpoint: origin, domains, gains, coefficients",
    "export": "write a model as an ONNX graph that runs without hf_ortho",
    "push": "push a model or an adapter with its card to the Hub",
    "app": "open a web page for exploring fits and the activations of a converted checkpoint",
    "bench": "benchmark the activations against fixed activations, standalone and in models",
    "env": "print the machine and library versions",
}

LAUNCHED = "HF_ORTHO_LAUNCHED"  # environment variable of processes launched by ``--accelerate_config``


def usage() -> str:
    lines = [f"  {name:10s}{text}" for name, text in COMMANDS.items()]
    return (
        "usage: hf-ortho COMMAND [options]\n\n" + "\n".join(lines) + "\n\n`hf-ortho COMMAND --help` lists its options."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 success, 1 failed check, 2 user error, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except HfOrthoError as error:
        _report(f"error: {error}", error)
        return 2
    except BrokenPipeError:  # the reader closed the pipe, as ``head`` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stop:
        _report(str(stop) or "interrupted; no partial output was left", launched=bool(stop.args))
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
    from .progress import announced

    quiet()
    try:
        with announced():
            return importlib.import_module(f".{argv[0]}", __package__).run(argv[1:]) or 0
    except SystemExit as done:  # of --help
        return int(done.code or 0)


def _report(message: str, error: Exception | None = None, launched: bool = False) -> None:
    """Print the error of a command once for all processes. Each process passes ``error`` to the launcher of torch.

    Launched processes leave the message to their launcher, except with ``launched``: what it does not know.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and error is not None:
        details = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": str(error), "extraInfo": details}}))
    if os.environ.get("RANK", "0") == "0" and (launched or not (file and LAUNCHED in os.environ)):
        print(f"hf-ortho: {message}", file=sys.stderr)


def _interrupt(signum, frame):
    raise KeyboardInterrupt
