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
    "convert": "replace the activations of a model with learnable ones",
    "finetune": "train a model on your data",
    "push": "upload a model and its card to the Hub",
    "demo": "run the full workflow on a tiny model",
    "evaluate": "print the loss and other metrics of one or more models",
    "inspect": "print the activations of a converted model",
    "plot": "plot the activations of a model, or over a training",
    "pretrain": "train a model from scratch",
    "compare": "train with several activations and seeds, and compare them",
    "export": "write a model as an ONNX graph, which needs no hf_ortho",
    "app": "explore fits and activations on a web page",
    "bench": "measure time and memory of the activations on this machine",
    "env": "print the machine and the library versions",
}
EXAMPLES = {
    "convert": "hf-ortho convert gpt2 -o gpt2-h8 --calibration-data notes.txt",
    "finetune": "hf-ortho finetune --model gpt2-h8 --dataset notes.txt --output-dir tuned",
    "push": "hf-ortho push tuned YOU/gpt2-tuned",
}

LAUNCHED = "HF_ORTHO_LAUNCHED"  # environment variable of processes launched by ``--accelerate_config``


def usage() -> str:
    start = [f"  {name:10}{COMMANDS[name]}\n      {example}" for name, example in EXAMPLES.items()]
    others = [f"  {name:10}{text}" for name, text in COMMANDS.items() if name not in EXAMPLES]
    lines = ["usage: hf-ortho COMMAND [options]", ""]
    lines += ["Learnable activation functions for pretrained models, in three steps:", "", *start, ""]
    lines += ["Other commands:", "", *others, "", "hf-ortho COMMAND --help lists the options of a command."]
    return "\n".join(lines)


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
