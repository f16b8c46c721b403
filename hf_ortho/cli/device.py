"""``--device``: where a command runs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    import torch

    from .console import Parser


def add_device_flag(parser: Parser, purpose: str) -> None:
    """The flag ``--device``; ``purpose`` begins its help."""
    parser.add_argument("--device", help=f"{purpose}: cpu, cuda or cuda:1. Default: the CUDA GPU if there is one.")


def chosen_device(name: str | None) -> torch.device:
    """The device of ``--device``; for None, the CUDA GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    gpu = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return gpu if gpu is not None and gpu.type == "cuda" else torch.device("cpu")
    number = torch.accelerator.device_count() if gpu else 0
    known = ["cpu", *([gpu.type, *(f"{gpu.type}:{i}" for i in range(number))] if gpu else [])]
    if name not in known:
        raise ConfigError(f"--device {name}: torch finds no such device here; use {' or '.join(known)}")
    return torch.device(name)
