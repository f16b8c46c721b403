"""A training that is killed and started again ends with the weights of one that was not, bit for bit."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_ortho.training.checkpoints import is_whole, make_way, remove_leftovers, write_manifest

# Six steps, saved after 2, 4 and 6. Where it dies, and the step of the checkpoint that it goes on from.
WEIGHTS, STEP = "transformers.modeling_utils:safe_save_file", "torch.optim:AdamW.step"
STATE, DELETE = "transformers:TrainerState.save_to_json", "shutil:rmtree"
KILLS = {
    "in step 4": ((STEP, 4, "before"), 2),
    "in the first weights": ((WEIGHTS, 1, "half"), 0),
    "in the weights": ((WEIGHTS, 2, "half"), 2),
    "after the weights": (("torch:save", 5, "before"), 2),
    "in the optimizer": (("torch:save", 6, "half"), 2),
    "before the manifest": (("hf_ortho.training.checkpoints:write_manifest", 2, "before"), 2),
    "in the state": ((STATE, 2, "half"), 2),
    "in the deletion of step 2": ((DELETE, 1, "optimizer.pt"), 4),
    "in the final weights": ((WEIGHTS, 4, "half"), 6),
    "before the final config": (("os:replace", 2, "before"), 6),
}
# With the model of step 2 as the best, the checkpoint of step 6 is deleted at the end.
BEST = ["--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "true"]
BEST += ["--metric_for_best_model", "loss", "--greater_is_better", "true"]


@pytest.fixture(scope="module")
def flags(gpt2_folder, text_file):
    """``flags(folder)`` of a run with dropout, shuffling, a schedule, decay and accumulation."""
    options = {
        "model": gpt2_folder,
        "dataset": text_file,
        "activation": "hermite_3",
        "calibration_samples": 0,
        "max_eval_samples": 2,
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": 1,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "use_cpu": "true",
    }

    def make(folder):
        return [f"--{key}={value}" for key, value in (options | {"output_dir": folder}).items()]

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory, flags):
    """A folder of killed runs, each by its name, and of the uninterrupted ``straight`` and ``pair`` (two processes)."""
    root = tmp_path_factory.mktemp("killed")
    resume = ["--resume_from_checkpoint", "auto"]
    todo = [{"flags": flags(root / "straight")}, {"flags": flags(root / "pair"), "ranks": 2}]
    todo += [{"flags": flags(root / name), "kill": kill} for name, (kill, _) in KILLS.items()]
    todo += [{"flags": flags(root / "best") + BEST, "kill": (DELETE, 2, "manifest.json")}]
    half_pair = {"flags": flags(root / "half pair") + resume, "ranks": 2}
    todo += [half_pair | {"kill": ("transformers:Trainer._save_rng_state", 2, "before"), "killed_rank": 1}, half_pair]
    todo += [{"flags": flags(root / "nan"), "kill": ("transformers:Trainer.compute_loss", 6, "nan"), "killed_rank": 1}]
    todo[-1] |= {"ranks": 2}
    todo += [{"flags": flags(root / "interrupted"), "kill": ("torch:save", 6, "term")}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    (root / "runs.json").write_text(json.dumps(todo))
    environment = os.environ | address | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("killable.py")), str(root / "runs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    killed = [[0], [0, 0], *[[-9]] * (len(KILLS) + 1), [-9, -9], [0, 0], [2, 2], [130]]
    assert json.loads(done.stdout.splitlines()[-1]) == killed, done.stderr
    (root / "messages.txt").write_text(done.stderr)
    return root


@pytest.fixture
def steps(monkeypatch):
    """The optimizer's steps from now on."""
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: taken.append(step(*args, **kwargs)))
    return taken


def same_model(found, expected):
    found, expected = (load_file(folder / "model.safetensors") for folder in (found, expected))
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def names(folder):
    return {p.name for p in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_goes_on_from_the_last_whole_checkpoint(runs, flags, hf_ortho_command, steps, name):
    folder, (_, resumed) = runs / name, KILLS[name]
    whole = {p.name for p in folder.glob("checkpoint-*") if is_whole(p)}
    assert whole == ({f"checkpoint-{resumed}"} if resumed else set())
    assert not (folder / "config.json").exists()
    ran = hf_ortho_command("finetune", *flags(folder), "--resume_from_checkpoint", "auto" if not resumed else "true")
    assert ran.code == 0, ran.err
    assert len(steps) == 6 - resumed
    assert same_model(folder, runs / "straight")
    assert names(folder) == names(runs / "straight")
    assert is_whole(folder / "checkpoint-6")


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_when_the_last_is_half_deleted(runs, flags, hf_ortho_command, steps):
    folder = runs / "best"
    assert names(folder) == {"checkpoint-2", "checkpoint-6"}
    ran = hf_ortho_command("finetune", *flags(folder), *BEST, "--resume_from_checkpoint", "true")
    assert ran.code == 0, ran.err
    assert len(steps) == 4
    assert same_model(folder, folder / "checkpoint-2")
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-2"}


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_in_a_save(runs):
    """The other had written its part of the checkpoint of step 4; both go on from step 2."""
    assert same_model(runs / "half pair", runs / "pair")
    assert names(runs / "half pair") == names(runs / "pair")
    listed = json.loads((runs / "half pair" / "checkpoint-6" / "manifest.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt"} <= listed.keys()


@pytest.mark.slow
def test_two_processes_stop_together_for_the_loss_of_one(runs):
    """The second has a loss of nan at step 3; both ended with code 2."""
    lines = [x for x in (runs / "messages.txt").read_text().splitlines() if x.startswith("hf-ortho: error: step 3: ")]
    assert len(lines) == 1  # of both processes the first speaks
    assert all(str(runs / "nan" / "checkpoint-2") in line for line in lines)
    assert names(runs / "nan") == {"checkpoint-2"}


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_a_save(runs):
    assert f"interrupted; {runs / 'interrupted'} keeps checkpoint-2" in (runs / "messages.txt").read_text()
    assert names(runs / "interrupted") == {"checkpoint-2"}
    assert is_whole(runs / "interrupted" / "checkpoint-2")


@pytest.mark.slow
def test_a_run_that_had_ended_takes_no_more_steps(runs, flags, hf_ortho_command, steps, tmp_path):
    shutil.copytree(runs / "straight", tmp_path / "out")
    ran = hf_ortho_command("finetune", *flags(tmp_path / "out"), "--resume_from_checkpoint", "auto")
    assert ran.code == 0, ran.err
    assert len(steps) == 0
    assert same_model(tmp_path / "out", runs / "straight")
    assert names(tmp_path / "out") == names(runs / "straight")


# ---- what is whole -------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path):
    """``output("checkpoint-3")`` makes a whole checkpoint in the output folder."""

    def make(name):
        folder = tmp_path / "out" / name
        (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
        (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"shard")
        (folder / "optimizer.pt").write_bytes(b"moments")
        write_manifest(folder)
        (folder / "trainer_state.json").write_text("{}")
        return folder

    return make


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("optimizer.pt", None),
        ("optimizer.pt", b"momen"),
        ("pytorch_model_fsdp_0/__0_0.distcp", None),
        ("pytorch_model_fsdp_0/__0_0.distcp", b""),
        ("manifest.json", None),
        ("manifest.json", b"{}"),
        ("manifest.json", b'{"optimizer.pt": '),
        ("manifest.json", b"[1]"),
        ("manifest.json", b"\xff"),
        ("manifest.json", b'{"optimizer.pt": "7"}'),
        ("trainer_state.json", None),
        ("trainer_state.json", b'{"epoch": '),
    ],
)
def test_a_checkpoint_that_lacks_something_is_not_resumed_from(output, flags, hf_ortho_command, file, content):
    folder = output("checkpoint-3")
    assert is_whole(folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert not is_whole(folder)
    ran = hf_ortho_command("finetune", *flags(folder.parent), "--resume_from_checkpoint", "true")
    assert "checkpoint-3" in ran.error
    if (folder / "manifest.json").exists():  # a plain Trainer writes none
        ran = hf_ortho_command("finetune", *flags(folder.parent), "--resume_from_checkpoint", folder)
        assert f"{folder}: " in ran.error
    assert folder.is_dir()


def test_only_what_a_killed_save_left_is_removed(output, tmp_path):
    output("checkpoint-1")
    (output("checkpoint-2") / "optimizer.pt").unlink()  # to save space
    (output("checkpoint-3") / "manifest.json").unlink()
    (output("checkpoint-4") / "manifest.json").write_text("{}")
    (output("checkpoint-5") / "trainer_state.json").unlink()
    (output("checkpoint-6") / "trainer_state.json").write_text('{"epoch": ')
    for step, manifest in enumerate(("", '{\n "optimizer.pt": ', '{"mine": 1}', "[1]", "mine: 1", "\xff"), 7):
        folder = output(f"checkpoint-{step}")
        (folder / "trainer_state.json").unlink()
        (folder / "manifest.json").write_bytes(manifest.encode("latin-1"))
    (output("checkpoint-13") / "manifest.json").write_bytes(b"\xff")
    remove_leftovers(tmp_path / "out")
    kept = (1, 2, 3, 9, 10, 11, 12, 13)
    assert names(tmp_path / "out") == {f"checkpoint-{step}" for step in kept}


def test_an_earlier_checkpoint_of_the_step_makes_way(output, tmp_path):
    make_way(output("checkpoint-1"))
    (output("checkpoint-2") / "optimizer.pt").unlink()
    make_way(tmp_path / "out" / "checkpoint-2")
    assert names(tmp_path / "out") == set()
    (output("checkpoint-3") / "notes.txt").write_text("mine")
    (output("checkpoint-4") / "manifest.json").unlink()  # of a plain Trainer
    (output("checkpoint-5") / "optimizer.pt").write_text("longer than what was saved")
    output("checkpoint-6").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "checkpoint-6").symlink_to(tmp_path / "elsewhere")
    (output("checkpoint-7") / "link").symlink_to(tmp_path)
    for step in range(3, 9):
        make_way(tmp_path / "out" / f"checkpoint-{step}")
    assert names(tmp_path / "out") == {f".checkpoint-{step}.old" for step in range(3, 8)}
    assert is_whole(tmp_path / "elsewhere")
    assert (tmp_path / "out" / ".checkpoint-3.old" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--save_only_model", "true"]])
def test_no_checkpoint_with_a_file_of_others_is_one_too_many(runs, flags, hf_ortho_command, tmp_path, options):
    out = tmp_path / "out"
    shutil.copytree(runs / "interrupted", out)
    (out / "checkpoint-1").mkdir()
    for step in (1, 2):
        (out / f"checkpoint-{step}" / "notes.txt").write_text("mine")
    ran = hf_ortho_command("finetune", *flags(out), *options, "--resume_from_checkpoint", "true")
    assert ran.code == 0, ran.err
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-6"}
    assert [(out / f"checkpoint-{step}" / "notes.txt").read_text() for step in (1, 2)] == ["mine", "mine"]


@pytest.mark.slow
def test_checkpoints_can_be_read_by_those_whom_the_umask_lets(runs):
    mask = os.umask(0)
    os.umask(mask)
    for folder in (runs / "straight", runs / "straight" / "checkpoint-6"):
        assert {p.stat().st_mode & 0o777 for p in folder.iterdir() if p.is_file()} == {0o666 & ~mask}


def test_auto_does_not_start_anew_over_what_may_be_of_worth(output, flags, hf_ortho_command, tmp_path):
    (output("checkpoint-3") / "manifest.json").unlink()
    auto = ("finetune", *flags(tmp_path / "out"), "--resume_from_checkpoint", "auto")
    assert f"--resume_from_checkpoint {tmp_path / 'out' / 'checkpoint-3'}" in hf_ortho_command(*auto).error
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "use another output_dir" in hf_ortho_command(*auto).error
    assert names(tmp_path / "out") == {"config.json"}
