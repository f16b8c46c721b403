"""``hf-ortho env``: the machine and the versions of relevant libraries."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..text import one_line
from .console import Parser, console

PACKAGES = (
    "hf_ortho",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "evaluate",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "scipy",
    "matplotlib",
    "torchortho",
    "rational-activations",
)


def environment() -> dict[str, Any]:
    """The machine and library versions as plain JSON values. Missing values are None."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    """The CPU model, which Python's ``platform`` does not report on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    """The version of the NVIDIA driver, which torch does not report."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show_environment(found: dict[str, Any]) -> None:
    """Print the result of ``environment``, one value per line."""
    packages = found["packages"]
    lines = {
        "platform": found["platform"],
        "CPU": f"{found['cpu']} ({found['cpu_capability']})",
        "cores": f"{found['physical_cores']} physical, {found['logical_cores']} logical; torch uses {found['threads']}",
        "RAM": f"{found['ram_gib']} GiB",
        "GPU": ", ".join(found["gpus"]) or "none",
        "driver": found["driver"] or ("unknown" if found["gpus"] else "none"),
        "CUDA": found["cuda"] or "not in this torch",
        "Python": found["python"],
        **{name: version for name, version in packages.items() if version},
        "not installed": ", ".join(name for name, version in packages.items() if not version) or "-",
    }
    for name, value in lines.items():
        console.print(one_line(f"{name:17s}{value}"))


def parser() -> Parser:
    p = Parser(prog="hf-ortho env", description="Print the machine and library versions for a bug report.")
    p.add_argument("--json", action="store_true", help="Print one JSON object.")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    machine = environment()
    if args.json:
        print(json.dumps(machine))
    else:
        show_environment(machine)
