import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def colored_folder(tmp_path_factory):
    """A folder of 3 x 10 pictures; other classes than the model's, so that its head is replaced."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("colors")
    rng = np.random.default_rng(0)
    for name in ("red", "green", "blue"):
        (folder / name).mkdir()
        for i in range(10):
            image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["all", "activations"])
@pytest.mark.parametrize(("task", "by"), [("text", "true"), ("text", "path"), ("images", "true")])
def test_three_steps_and_three_more_are_six(request, hf_ortho_command, tmp_path, task, policy, by):
    """Dropout, shuffling, a schedule, evaluations on the way and Adam's moments all continue, so every bit agrees."""
    model, dataset = {"text": ("gpt2_folder", "text_file"), "images": ("convnext_folder", "colored_folder")}[task]
    entries = {
        "model": str(request.getfixturevalue(model)),
        "dataset": str(request.getfixturevalue(dataset)),
        "activation": "hermite_3",
        "train": policy,
        "max_steps": 6,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(entries))

    def finetune(place, *flags):
        flags = ("--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / place, *flags)
        ran = hf_ortho_command("finetune", *flags)
        assert ran.code == 0, ran.err
        return ran

    straight = finetune("straight")
    # What is left of a run that ended after its checkpoint.
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    place = "true" if by == "true" else tmp_path / "stopped" / "checkpoint-3"
    written = (tmp_path / "stopped" / "checkpoint-3" / "model.safetensors").stat().st_mtime_ns
    resumed = finetune("stopped", "--resume_from_checkpoint", place)
    # A run from the start would be as bit-equal, and would write this one again.
    assert (tmp_path / "stopped" / "checkpoint-3" / "model.safetensors").stat().st_mtime_ns == written

    middle, expected, found = (
        load_file(tmp_path / place / "model.safetensors") for place in ("stopped/checkpoint-3", "straight", "stopped")
    )
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    moved = {key for key in expected if not torch.equal(expected[key], middle[key])}
    learned = {key for key in expected if ".act." in key and not key.endswith((".domain", ".tail_slopes"))}
    learned |= {key for key in expected if key.startswith("classifier.")}  # made anew for the colors
    assert moved == learned if policy == "activations" else moved > learned
    assert resumed.figures["loss"][1] == straight.figures["loss"][1]
    state = json.loads((tmp_path / "stopped" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
