"""Resuming with other settings than those of the checkpoint, and from a damaged checkpoint."""

import json
import os
import shutil

import pytest
import torch
from datasets import Dataset, Features, Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_ortho.errors import ConfigError
from hf_ortho.training import ActivationTrainer
from hf_ortho.training.manifest import damaged_file, is_whole
from hf_ortho.training.record import _digest, check_resumed


@pytest.fixture(scope="module")
def flags(gpt2_folder, text_file):
    """``flags(folder, seed=1)``: of a run of 4 steps, saved after 2 and 4."""
    options = {"model": gpt2_folder, "dataset": text_file, "activation": "hermite_3", "calibration_samples": 0}
    options |= {"max_steps": 4, "save_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 2}
    options |= {"max_train_samples": 30, "max_eval_samples": 2, "use_cpu": True}

    def make(folder, **changed):
        chosen = {key: value for key, value in (options | changed).items() if value is not None}
        return ["finetune", *(f"--{key}={value}" for key, value in (chosen | {"output_dir": folder}).items())]

    return make


@pytest.fixture(scope="module")
def straight(tmp_path_factory, flags, hf_ortho_command):
    folder = tmp_path_factory.mktemp("straight") / "out"
    ran = hf_ortho_command(*flags(folder))
    assert ran.code == 0, ran.err
    return folder


@pytest.fixture
def stopped(straight, tmp_path):
    """``stopped(2, 4)``: the output folder of a run that was stopped, with these checkpoints."""

    def make(*steps):
        for step in steps:
            shutil.copytree(straight / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
        return tmp_path / "out"

    return make


def same_model(found, expected):
    found, expected = (load_file(folder / "model.safetensors") for folder in (found, expected))
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def notes(caplog):
    found = (r for r in caplog.records if r.name == "hf_ortho" and r.levelname == "WARNING")
    return [r.getMessage() for r in found if "checkpoint-" in r.getMessage()]


# ---- other settings ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "tropical_3"}, "activation_function 'hermite_3', not 'tropical_3'; use 'hermite_3' to resume"),
        ({"activation": "hermite_4"}, "activation_function 'hermite_3', not 'hermite_4'"),
        ({"activation": None}, "activation_function 'hermite_3', not 'gelu_new'"),
        ({"train": "activations"}, "train 'all', not 'activations'"),
        ({"optim": "sgd"}, "optim 'adamw_torch', not 'sgd'"),
        ({"activation_natural_steps": True}, "activation_natural_steps False, not True"),
    ],
)
def test_states_of_another_training_are_refused(stopped, flags, hf_ortho_command, changed, message):
    folder = stopped(2)
    place = folder / "checkpoint-2"
    error = hf_ortho_command(*flags(folder, resume_from_checkpoint="true", **changed)).error
    assert error.startswith(f"resume_from_checkpoint {place}: saved with {message}")
    assert {p.name for p in folder.iterdir()} == {"checkpoint-2"}


def test_another_activation_than_in_a_checkpoint_without_a_record(stopped, flags, hf_ortho_command):
    folder = stopped(2)
    (folder / "checkpoint-2" / "training_recipe.json").unlink()
    (folder / "checkpoint-2" / "manifest.json").unlink()
    place = folder / "checkpoint-2"
    ran = hf_ortho_command(*flags(folder, resume_from_checkpoint=place, activation="tropical_3"))
    assert "saved with activation_function 'hermite_3', not 'tropical_3'" in ran.error


def test_an_adapter_of_another_activation(flags, hf_ortho_command, tmp_path):
    options = {"adapter": True, "train": "activations", "max_steps": 2}
    assert hf_ortho_command(*flags(tmp_path / "out", **options)).code == 0
    options |= {"activation": "tropical_3", "resume_from_checkpoint": tmp_path / "out" / "checkpoint-2"}
    error = hf_ortho_command(*flags(tmp_path / "other", **options)).error
    assert "saved with activation 'hermite_3', not 'tropical_3'" in error
    for name in ("training_recipe.json", "manifest.json"):  # as of a plain Trainer
        (tmp_path / "out" / "checkpoint-2" / name).unlink()
    assert hf_ortho_command(*flags(tmp_path / "other", **options)).error == error


def test_another_seed_is_said(stopped, straight, flags, hf_ortho_command, caplog):
    folder = stopped(2)
    changed = {"seed": 1, "max_train_samples": None, "learning_rate": 0.02}
    ran = hf_ortho_command(*flags(folder, resume_from_checkpoint="true", **changed))
    assert ran.code == 0, ran.err
    samples = json.loads((straight / "checkpoint-2" / "training_recipe.json").read_text())["samples"]
    now = json.loads((folder / "checkpoint-4" / "training_recipe.json").read_text())["samples"]
    assert notes(caplog) == [
        "note: checkpoint-2 was saved with max_train_samples 30, now None; seed 42, now 1; "
        "learning_rate 0.01, now 0.02, which the optimizer does not adopt; "
        f"samples {samples}, now {now}: the result differs from that of a training that was not interrupted"
    ]
    assert set(torch.load(folder / "checkpoint-4" / "scheduler.pt")["base_lrs"]) == {0.01}
    assert not same_model(folder, straight)


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({}, ""),
        ({"model": "elsewhere"}, "model 'MODEL', now 'elsewhere'"),
        ({"dataset": "elsewhere"}, ""),  # the same samples
        ({"dataset": "other", "digest": "0"}, "dataset 'DATASET', now 'other'"),
        ({"digest": "0"}, "other training samples"),
        ({"block_size": 16, "samples": 60, "digest": "0"}, "block_size None, now 16; samples 30, now 60"),
        ({"max_steps": 6}, "max_steps 4, now 6"),
        (
            {"per_device_train_batch_size": 4, "world_size": 2},
            "per_device_train_batch_size 2, now 4; world_size 1, now 2",
        ),
        ({"learning_rate": 0.02}, "learning_rate 0.01, now 0.02, which the optimizer does not adopt"),
        ({"mixup": 0.2}, "mixup 0.0, now 0.2"),
        ({"a_later_version": 1}, ""),
    ],
)
def test_what_differs_is_said(straight, caplog, changed, note):
    model = AutoModelForCausalLM.from_pretrained(straight)
    record = json.loads((straight / "checkpoint-2" / "training_recipe.json").read_text())
    assert record["samples"] == 30
    assert str(straight.parent.parent) not in json.dumps(record)
    check_resumed(straight / "checkpoint-2", model, record | changed, None)
    note = note.replace("MODEL", record["model"]).replace("DATASET", record["dataset"])
    head, tail = (
        "note: checkpoint-2 was saved with ",
        "the result differs from that of a training that was not interrupted",
    )
    assert notes(caplog) == ([f"{head}{note}: {tail}"] if note else [])


# ---- damage --------------------------------------------------------------------------------------------------------


def zero(file):
    """The second half becomes zeros, as after a power loss; the size stays."""
    size = os.path.getsize(file)
    with open(file, "r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(size - size // 2))


NO_EARLIER = "there is no earlier complete checkpoint"
STATES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize("file", STATES)
def test_the_last_checkpoint_that_is_not_damaged_is_resumed(stopped, straight, flags, hf_ortho_command, caplog, file):
    folder = stopped(2, 4)
    zero(folder / "checkpoint-4" / file)
    assert [damaged_file(folder / f"checkpoint-{step}") for step in (2, 4)] == ["", file]
    error = hf_ortho_command(*flags(folder, resume_from_checkpoint=folder / "checkpoint-4")).error
    assert error.startswith(f"resume_from_checkpoint {folder / 'checkpoint-4'}: {file} is damaged")
    assert error.endswith(f"use {folder / 'checkpoint-2'}")
    if file == "rng_state.pth":
        ran = hf_ortho_command(*flags(folder, resume_from_checkpoint="auto"))
        assert ran.code == 0, ran.err
        assert notes(caplog) == [
            f"note: {folder / 'checkpoint-4'} is damaged: {file} is not as it was saved; resuming from checkpoint-2"
        ]
        assert same_model(folder, straight)
        assert damaged_file(folder / "checkpoint-4") == ""


def test_a_checkpoint_of_links_is_not_damaged(straight, tmp_path):
    """As ``snapshot_download`` makes it in the cache of the Hub."""
    for file in (straight / "checkpoint-2").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert is_whole(tmp_path)
    assert damaged_file(tmp_path) == ""


def test_image_files_are_the_same_samples_in_another_folder(tmp_path):
    def rows(folder, name):
        images = [{"bytes": None, "path": str(tmp_path / folder / name)}]
        return Dataset.from_dict({"image": images}, features=Features(image=Image()))

    assert _digest(rows("a", "1.png")) == _digest(rows("b", "1.png")) != _digest(rows("a", "2.png"))


@pytest.mark.parametrize("resume", ["true", "auto", "path"])
def test_no_fresh_start_if_all_are_damaged(stopped, flags, hf_ortho_command, resume):
    folder = stopped(2)
    zero(folder / "checkpoint-2" / "model.safetensors")
    place = folder / "checkpoint-2" if resume == "path" else resume
    error = hf_ortho_command(*flags(folder, resume_from_checkpoint=place)).error
    assert "damaged" in error
    assert "checkpoint-2" in error
    assert {p.name for p in folder.iterdir()} == {"checkpoint-2"}


def test_a_manifest_of_an_earlier_version_has_sizes_alone(stopped, straight, flags, hf_ortho_command, caplog):
    folder = stopped(2, 4)
    for step in (2, 4):
        file = folder / f"checkpoint-{step}" / "manifest.json"
        (file.with_name("training_recipe.json")).unlink()
        sizes = {
            p.name: p.stat().st_size for p in file.parent.iterdir() if p.name not in (file.name, "trainer_state.json")
        }
        file.write_text(json.dumps(sizes, indent=1))
    zero(folder / "checkpoint-4" / "optimizer.pt")
    ran = hf_ortho_command(*flags(folder, resume_from_checkpoint="true"))
    assert ran.code == 0, ran.err
    assert [note.rpartition("; ")[2] for note in notes(caplog)] == ["resuming from checkpoint-2"]
    assert same_model(folder, straight)


@pytest.mark.parametrize("file", STATES)
def test_a_truncated_file_of_a_plain_trainer(stopped, straight, flags, hf_ortho_command, file):
    place = stopped(2) / "checkpoint-2"
    (place / "manifest.json").unlink()
    os.truncate(place / file, os.path.getsize(place / file) // 2)
    error = hf_ortho_command(*flags(place.parent, resume_from_checkpoint=place)).error
    assert error == f"resume_from_checkpoint {place}: {file} is damaged, not as it was saved; " + NO_EARLIER
    if file == "scheduler.pt":
        model = AutoModelForCausalLM.from_pretrained(straight)
        arguments = TrainingArguments(place.parent, report_to="none", use_cpu=True)
        with pytest.raises(ConfigError, match=r"scheduler\.pt is damaged"):
            ActivationTrainer(model, arguments).train(resume_from_checkpoint=str(place))
    (place / "trainer_state.json").write_text('{"epoch": ')
    assert (
        "trainer_state.json cannot be read"
        in hf_ortho_command(*flags(place.parent, resume_from_checkpoint=place)).error
    )
