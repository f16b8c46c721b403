import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

import hf_ortho
import hf_ortho.cli.plot
import hf_ortho.plotting
from hf_ortho.activations import LearnableActivation
from hf_ortho.errors import CheckpointError, ConfigError
from hf_ortho.training import LoraArguments, add_lora, history, logger

LAYERS = [f"transformer.h.{i}.mlp.act" for i in range(2)]


@pytest.fixture(scope="module")
def converted(make_gpt2):
    model = make_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)[0]
    hf_ortho.convert(model, "hermite_3")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LearnableActivation):
                module.domain.copy_(torch.tensor([-0.1, 0.05]))
    return model


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def stand_in(monkeypatch):
    """An integration as ``report_to`` makes it; it keeps what it is sent."""

    class StandIn(TrainerCallback):
        sent: list = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.sent.append((state.global_step, logs))

    StandIn.sent = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", StandIn)
    return StandIn


def train(model, rows, folder, callback, resume=None, **options):
    defaults = {"max_steps": 6, "save_steps": 2, "logging_steps": 3, "report_to": "none", "use_cpu": True}
    defaults |= {"disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 0.01}
    defaults |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    trainer = Trainer(
        model=copy.deepcopy(model),
        args=TrainingArguments(output_dir=folder, **(defaults | options)),
        train_dataset=rows,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def contents(run):
    """All that was recorded, by step."""
    found = {step: history.read_step(file) for step, file in history.recorded_steps(run)}
    return {
        step: (statistics, {p: {k: v.tolist() for k, v in m.state_dict().items()} for p, m in modules.items()})
        for step, (modules, statistics) in found.items()
    }


def test_what_is_recorded(converted, rows, tmp_path, stand_in, monkeypatch, capsys):
    seen = {}

    class Watch(hf_ortho.ActivationLogger):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for path in LAYERS:
                keep = seen.setdefault(path, [])
                model.get_submodule(path).register_forward_pre_hook(lambda m, x, keep=keep: keep.append(x[0].detach()))
            super().on_train_begin(args, state, control, model=model, **kwargs)

    trainer = train(converted, rows, tmp_path, Watch(2), report_to="mlflow", gradient_accumulation_steps=2)
    steps = history.recorded_steps(tmp_path)
    assert [step for step, _ in steps] == [0, 2, 4, 6]
    end = history.read_step(steps[-1][1])
    sent = {step: logs for step, logs in stand_in.sent if any(key.startswith("activations/") for key in logs)}
    assert list(sent) == [0, 2, 4, 6]
    for path in LAYERS:
        module = trainer.model.get_submodule(path)
        assert end[0][path].name == "hermite_3"
        assert all(torch.equal(end[0][path].state_dict()[k], v) for k, v in module.state_dict().items())
        x = torch.cat([v.flatten() for v in seen[path][-2:]]).double()  # the two micro-batches of the sixth step
        t = np.linspace(-9, 9, 200001)
        w = np.exp(-(t**2) / 2)
        gains = [np.sum(w * module.evaluate(fn, t) ** 2) / w.sum() for fn in (module.forward, module.derivative)]
        expected = {
            "gain": gains[0],
            "gain_derivative": gains[1],
            "minimum": x.min().item(),
            "maximum": x.max().item(),
            "mean": x.mean().item(),
            "std": x.std(correction=0).item(),
            "outside": ((x < -0.1) | (x > 0.05)).double().mean().item(),
        }
        assert 0.1 < expected["outside"] < 0.9
        assert end[1][path] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        found = {key.removeprefix(f"activations/{path}."): v for key, v in sent[6].items() if path in key}
        vectors = {n: p.tolist() for n, p in module.named_parameters() if n != "tail_slopes"}
        parameters = {f"{n}.{i}": v for n, vector in vectors.items() for i, v in enumerate(vector)}
        assert found == end[1][path] | parameters
    # neither the console nor the history of Trainer is flooded, and the model is left without hooks
    assert not any("activations" in key for entry in trainer.state.log_history for key in entry)
    assert "activations" not in capsys.readouterr().out
    assert [len(m._forward_pre_hooks) for m in trainer.model.modules() if isinstance(m, LearnableActivation)] == [1, 1]


def test_groups_are_recorded_by_their_extremes_and_median(make_gpt2, rows, tmp_path, stand_in):
    model = make_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)[0]
    hf_ortho.convert(model, "hermite_3_g4")
    seen = []
    with torch.no_grad():
        for path in LAYERS:
            domain = model.get_submodule(path).domain
            domain.copy_(torch.tensor([[-0.1, 0.1], [-0.1, 0.05], [-0.05, 0.1], [-0.2, 0.0]]))

    class Watch(hf_ortho.ActivationLogger):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.get_submodule(LAYERS[0]).register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
            super().on_train_begin(args, state, control, model=model, **kwargs)

    trainer = train(model, rows, tmp_path, Watch(2), report_to="mlflow", max_steps=2)
    modules, statistics = history.read_step(history.recorded_steps(tmp_path)[-1][1])
    module = trainer.model.get_submodule(LAYERS[0])
    assert modules[LAYERS[0]].name == "hermite_3_g4"
    assert torch.equal(modules[LAYERS[0]].coefficients, module.coefficients)
    ends = zip(seen[-1].chunk(4, -1), module.domain.tolist(), strict=True)
    outside = np.mean([((part < lo) | (part > hi)).double().mean().item() for part, (lo, hi) in ends])
    assert 0.1 < outside < 0.9
    assert statistics[LAYERS[0]]["outside"] == pytest.approx(outside, abs=1e-6)
    gains = np.mean([member.gain() for member in module.members()], axis=0)
    assert [statistics[LAYERS[0]][key] for key in ("gain", "gain_derivative")] == pytest.approx(gains.tolist())
    logs = next(logs for step, logs in stand_in.sent if step == 2 and any("coefficients" in key for key in logs))
    found = {key: value for key, value in logs.items() if f"{LAYERS[0]}.coefficients" in key}
    values = np.sort(module.coefficients.detach().numpy(), axis=0)
    assert found == {
        f"activations/{LAYERS[0]}.coefficients.{i}.{key}": pytest.approx(float(values[row, i]))
        for i in range(4)
        for key, row in (("minimum", 0), ("median", 1), ("maximum", 3))
    }


def test_training_is_the_same_and_the_interval_that_of_the_logs(converted, rows, tmp_path):
    logged = train(converted, rows, tmp_path / "a", hf_ortho.ActivationLogger())
    plain = train(converted, rows, tmp_path / "b", TrainerCallback())
    assert [step for step, _ in history.recorded_steps(tmp_path / "a")] == [0, 3, 6]
    for (name, p), q in zip(logged.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_resumed_training_continues_the_history(converted, rows, tmp_path):
    train(converted, rows, tmp_path, hf_ortho.ActivationLogger(1))
    whole = contents(tmp_path)
    assert list(whole) == list(range(7))
    checkpoint = str(tmp_path / "checkpoint-4")
    train(converted, rows, tmp_path, hf_ortho.ActivationLogger(1), checkpoint)
    assert contents(tmp_path) == whole
    train(converted, rows, tmp_path, hf_ortho.ActivationLogger(1), checkpoint, max_steps=5)
    assert [step for step, _ in history.recorded_steps(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_under_lora_the_trained_copies_are_recorded_by_their_plain_paths(converted, rows, tmp_path):
    model = add_lora(copy.deepcopy(converted), LoraArguments(), seed=0)
    trainer = train(model, rows, tmp_path, hf_ortho.ActivationLogger(1), max_steps=2)
    modules, statistics = history.read_step(history.recorded_steps(tmp_path)[-1][1])
    assert list(modules) == list(statistics) == LAYERS
    for path, module in modules.items():
        trained = trainer.model.get_submodule(f"base_model.model.{path}.modules_to_save.default")
        assert torch.equal(module.coefficients, trained.coefficients)
        assert not torch.equal(module.coefficients, converted.get_submodule(path).coefficients)
        assert statistics[path]["minimum"] < statistics[path]["maximum"]


def test_pictures_go_to_tensorboard(converted, rows, tmp_path, monkeypatch):
    images = {}

    class Writer:
        def add_image(self, tag, pixels, step, dataformats):
            images[step] = (tag, pixels.shape, dataformats)

    class Board(integration_utils.TensorBoardCallback):
        tb_writer = Writer()

        def __init__(self):
            pass

        on_train_begin = on_log = on_train_end = TrainerCallback.on_train_begin

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    train(converted, rows, tmp_path, hf_ortho.ActivationLogger(1, 2), report_to="tensorboard", max_steps=3)
    assert list(images) == [2]
    tag, (height, width, channels), order = images[2]
    assert (tag, channels, order) == ("activations/shapes", 4, "HWC")
    assert min(height, width) > 100


def test_refuses(rows, tmp_path, make_gpt2):
    for options, message in (
        ({"every": 0}, "ActivationLogger: every 0 must"),
        ({"every": 1.5}, "every 1.5"),
        ({"picture_every": -1}, "picture_every -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            hf_ortho.ActivationLogger(**options)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no learnable activations"):
        train(make_gpt2()[0], rows, tmp_path / "out", hf_ortho.ActivationLogger())
    assert not (tmp_path / "out" / "activations").exists()
    (tmp_path / "step-1.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"step-1\.safetensors cannot be read as recorded activations"):
        history.read_step(tmp_path / "step-1.safetensors")


def test_compiled_models_are_recorded_uncompiled(tmp_path):
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 4), hf_ortho.activations.Hermite(3))
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(5, 3)
    compiled(x)
    callback = logger.ActivationLogger(1)
    callback._modules, callback._every = {"1": net[1]}, 1
    state = type("State", (), {"global_step": 0})
    callback.on_step_begin(None, state, None)
    compiled(x)
    callback._set_stance("default")
    (moments,) = [watched.close() for watched in callback._watched]
    assert moments["mean"] == pytest.approx(net[0](x).mean().item(), abs=1e-6)


def test_recipe_records_and_plot_draws_it(hf_ortho_command, gpt2_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_ortho.cli.plot, "MAX_MOMENTS", 3)
    run = tmp_path / "run"
    flags = ["--model", gpt2_folder, "--dataset", text_file, "--activation", "hermite_3", "--max_steps", 4]
    flags += ["--log_activations", 1, "--domain_penalty", 0.1, "--domain_penalty_interval", -0.1, 0.1]
    flags += ["--activation_learning_rate", 0.01, "--save_strategy", "no", "--use_cpu", True, "--output_dir", run]
    flags += ["--max_eval_samples", 1, "--per_device_train_batch_size", 1]
    assert hf_ortho_command("finetune", *flags).code == 0
    drawn = []
    monkeypatch.setattr(hf_ortho.plotting, "plot_history", lambda snapshots, *rest: drawn.extend(snapshots))
    ran = hf_ortho_command("plot", run, "--history", run, "-o", tmp_path / "moving.png")
    assert ran.out.splitlines()[0] == "note: 3 of 5 recorded steps are drawn, evenly spaced"
    assert [snapshot.step for snapshot in drawn] == [0, 2, 4, None]
    x = torch.linspace(-3, 3, 11)
    for path in LAYERS:
        last, end = (s.modules[path](x) for s in drawn[-2:])
        assert torch.equal(last, end)
        assert not torch.equal(drawn[0].modules[path](x), end)
