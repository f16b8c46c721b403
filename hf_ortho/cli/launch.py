"""``--accelerate_config``: run a training command again in several processes, through Accelerate's launcher."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, HfOrthoError
from .console import Parser
from .main import LAUNCHED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
NAMES = ("single", "multi_gpu", "fsdp2", "zero3", "tp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that ``launch`` takes."""
    parser.add_argument("--accelerate-config", help=f"Start several processes: {', '.join(NAMES)}, or a YAML file.")
    parser.add_argument("--num-processes", help="How many. Default: one for each GPU, one without a GPU.")


def launch(command: str, argv: list[str]) -> int | None:
    """Run ``hf-ortho command`` with the rest of ``argv`` as ``--accelerate_config`` says, and return its exit code.

    None without this flag: the command goes on in this process, which torchrun or Slurm may have started.

    Raises:
        ConfigError: a flag does not fit, or the machine lacks what the engine needs.
        HfOrthoError: the first that a process has met.
    """
    if {"-h", "--help", "--help-all"} & set(argv):
        return None
    flags = Parser(prog=f"hf-ortho {command}", add_help=False)
    add_arguments(flags)
    own, rest = flags.parse_known_args(argv)
    if own.accelerate_config is None:
        if own.num_processes is not None:
            raise ConfigError(f"num_processes {own.num_processes}: give --accelerate_config too, one of {_choices()}")
        if "LOCAL_RANK" in os.environ:
            import torch

            if not torch.accelerator.is_available():  # Accelerate would run each of several processes for itself
                os.environ.setdefault("ACCELERATE_USE_CPU", str("ACCELERATE_TORCH_DEVICE" not in os.environ))
        return None
    if "LOCAL_RANK" in os.environ:
        raise ConfigError("accelerate_config: this process is one of several already; leave the flag out")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    file = CONFIGS / f"{own.accelerate_config}.yaml" if own.accelerate_config in NAMES else Path(own.accelerate_config)
    processes = _processes(own.accelerate_config, file, own.num_processes)
    options = ["--config_file", str(file), "--num_processes", str(processes)]
    if own.accelerate_config == "tp":
        options += ["--parallelism_config_tp_size", str(processes)]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args([*options, "--module", "hf_ortho", command, *rest]))
    except subprocess.CalledProcessError as error:  # of ``single``
        return error.returncode
    except ChildFailedError as error:
        return _failed(error)
    except SignalException as error:
        raise KeyboardInterrupt from error
    finally:
        del os.environ[LAUNCHED]
    return 0


def _choices() -> str:
    return f"{', '.join(NAMES)}, or a YAML file of `accelerate config`"


def _processes(name: str, file: Path, wanted: str | None) -> int:
    """How many processes to start with the config in ``file``, if it can run here."""
    import torch
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType, is_deepspeed_available

    if not file.is_file():
        raise ConfigError(f"accelerate_config {name!r}: must be one of {_choices()}")
    try:
        config = load_config_from_file(str(file))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"accelerate_config {name} is no config of Accelerate: {reason}") from error
    devices = torch.accelerator.device_count()
    kind = config.distributed_type
    if not devices and (config.parallelism_config or kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)):
        raise ConfigError(f"accelerate_config {name} needs GPUs, this machine has none; multi_gpu runs on the CPU too")
    if kind == DistributedType.DEEPSPEED and not is_deepspeed_available():
        raise ConfigError(f"accelerate_config {name}: the package deepspeed is missing: pip install deepspeed")
    if not devices:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    configured = 0 if name in NAMES[1:] else config.num_processes
    processes = str(configured if configured > 0 else max(devices, 1)) if wanted is None else wanted
    if not processes.isdecimal() or int(processes) < 1:
        raise ConfigError(f"num_processes {processes!r}: must be an integer, at least 1")
    if kind == DistributedType.NO and int(processes) > 1:
        raise ConfigError(f"num_processes {processes}: accelerate_config {name} is for one; take multi_gpu")
    if devices and config.num_machines == 1 and int(processes) > devices:
        raise ConfigError(f"num_processes {processes}: this machine has {devices} GPU{'s' * (devices > 1)}")
    return int(processes)


def _failed(error: ChildFailedError) -> int:
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    for _, failure in failures:
        if failure.exitcode == 2 and isinstance(failure.message, dict):
            raise HfOrthoError(failure.message["message"])
    rank, failure = failures[0]
    print(f"hf-ortho: error: process {rank} {_end(failure)}", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _end(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was ended by {failure.signal_name()}"
    return f"ended with exit code {failure.exitcode}, for the reason above"
