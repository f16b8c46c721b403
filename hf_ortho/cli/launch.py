"""``--accelerate_config``: rerun a training command in several processes with the launcher of Accelerate."""

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

logger = logging.getLogger("hf_ortho")

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
NAMES = ("single", "multi_gpu", "fsdp2", "zero3", "tp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``launch``."""
    parser.add_argument("--accelerate-config", help=f"Launch with Accelerate: {', '.join(NAMES)}, or a YAML file.")
    parser.add_argument("--num-processes", help="Number of processes. Default: one per GPU, or one without a GPU.")


def launch(command: str, argv: list[str]) -> int | None:
    """Run ``hf-ortho command`` with the rest of ``argv`` under ``--accelerate_config``, and return its exit code.

    Without this flag, returns None: the command continues in this process, which torchrun or Slurm may have started.

    Raises:
        ConfigError: a flag is invalid, or the machine does not meet the requirements of the engine.
        HfOrthoError: the first error of a process.
    """
    if {"-h", "--help", "--help-all"} & set(argv):
        return None
    flags = Parser(prog=f"hf-ortho {command}", add_help=False)
    add_arguments(flags)
    parsed, rest = flags.parse_known_args(argv)
    if parsed.accelerate_config is None:
        if parsed.num_processes is not None:
            raise ConfigError(
                f"num_processes {parsed.num_processes}: requires --accelerate_config, one of {_choices()}"
            )
        if "LOCAL_RANK" in os.environ:
            import torch

            if not torch.accelerator.is_available():  # otherwise Accelerate runs the processes independently
                os.environ.setdefault("ACCELERATE_USE_CPU", str("ACCELERATE_TORCH_DEVICE" not in os.environ))
        return None
    if "LOCAL_RANK" in os.environ:
        raise ConfigError("accelerate_config: this process was already launched as one of several; omit the flag")
    logger.info(f"Launching with {parsed.accelerate_config}")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ..hub import command_line

    file = (
        CONFIGS / f"{parsed.accelerate_config}.yaml"
        if parsed.accelerate_config in NAMES
        else Path(parsed.accelerate_config)
    )
    processes = _processes(parsed.accelerate_config, file, parsed.num_processes)
    options = ["--config_file", str(file), "--num_processes", str(processes)]
    if parsed.accelerate_config == "tp":
        options += ["--parallelism_config_tp_size", str(processes)]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = command_line(command, argv)  # as typed
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each process would print the warnings of DDP
    try:
        launch_command(launch_command_parser().parse_args([*options, "--module", "hf_ortho", command, *rest]))
    except subprocess.CalledProcessError as error:  # of ``single``
        return error.returncode
    except ChildFailedError as error:
        return _failed(error)
    except (SignalException, KeyboardInterrupt) as error:
        raise KeyboardInterrupt("interrupted") from error
    finally:
        del os.environ[LAUNCHED]
    return 0


def _choices() -> str:
    return f"{', '.join(NAMES)}, or a YAML file of `accelerate config`"


def _processes(name: str, file: Path, requested: str | None) -> int:
    """The number of processes for the config in ``file``, after checking that it can run here."""
    import torch
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    if not file.is_file():
        raise ConfigError(f"accelerate_config {name!r}: must be one of {_choices()}")
    try:
        config = load_config_from_file(str(file))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"accelerate_config {name} is not an Accelerate config: {reason}") from error
    devices = torch.accelerator.device_count()
    kind = config.distributed_type
    if kind == DistributedType.FSDP and int(config.fsdp_config.get("fsdp_version", 1)) == 1:
        from ..training.distributed import FSDP1

        raise ConfigError(f"accelerate_config {name}: {FSDP1}")
    if not devices and (config.parallelism_config or kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)):
        raise ConfigError(
            f"accelerate_config {name} requires GPUs, but this machine has none; multi_gpu also runs on the CPU"
        )
    if kind == DistributedType.DEEPSPEED:
        from ..training.distributed import check_deepspeed

        check_deepspeed()
    if not devices:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    configured = 0 if name in NAMES[1:] else config.num_processes
    processes = str(configured if configured > 0 else max(devices, 1)) if requested is None else requested
    if not processes.isdecimal() or int(processes) < 1:
        raise ConfigError(f"num_processes {processes!r}: must be an integer and at least 1")
    if kind == DistributedType.NO and int(processes) > 1:
        raise ConfigError(f"num_processes {processes}: accelerate_config {name} runs one process; use multi_gpu")
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
        return f"was killed by {failure.signal_name()}"
    return f"exited with code {failure.exitcode}; see the error above"
