"""The recorded history of activations during training: one safetensors file per recorded step."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..activations import LearnableActivation, build
from ..checkpoints.values import check_values
from ..errors import CheckpointError
from ..files import explain, written

FOLDER = "activations"


def recorded_steps(run: str | Path) -> list[tuple[int, Path]]:
    """The recorded steps in the output folder of a training as (step, file) pairs, sorted by step."""
    files = (Path(run) / FOLDER).glob("step-*.safetensors")
    return sorted((int(match[1]), path) for path in files if (match := re.fullmatch(r"step-(\d+)", path.stem)))


def write_step(
    run: str | Path,
    step: int,
    modules: Mapping[str, LearnableActivation],
    statistics: Mapping[str, Mapping[str, float]],
) -> None:
    """Record activations and their statistics, both by path. The file is written atomically."""
    folder = Path(run) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{path}.{key}": value for path, m in modules.items() for key, value in m.state_dict().items()}
    names = {path: module.name for path, module in modules.items()}
    with written(folder / f"step-{step}.safetensors") as draft:
        save_file(tensors, draft, {"activations": json.dumps(names), "statistics": json.dumps(statistics)})


def read_step(file: Path) -> tuple[dict[str, LearnableActivation], dict[str, dict[str, float]]]:
    """The activations and statistics of one recorded step, both by path.

    Raises:
        CheckpointError: the file was not written by ``write_step``, or a value is not finite.
    """
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
            modules = {path: build(name) for path, name in json.loads(metadata["activations"]).items()}
            for path, module in modules.items():
                tensors = {key: stored.get_tensor(f"{path}.{key}") for key in module.state_dict()}
                check_values(tensors, f"{path} in {file}")
                module.load_state_dict(tensors)
            return modules, json.loads(metadata["statistics"])
    except CheckpointError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read as recorded activations: {explain(error)}") from error


def drop_after(run: str | Path, step: int) -> None:
    """Remove the steps recorded after ``step``, from which a training resumes."""
    for later, path in recorded_steps(run):
        if later > step:
            path.unlink()
