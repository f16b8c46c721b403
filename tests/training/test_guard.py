import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import hf_ortho
from hf_ortho import convert
from hf_ortho.activations import FAMILIES
from hf_ortho.errors import NonFiniteError
from hf_ortho.training import ActivationTrainer
from hf_ortho.training.guard import check_parameters

DATA = torch.randint(0, 256, (16, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_trainer(make_gpt2, tmp_path):
    """``make_trainer(ActivationTrainer, "hermite_3", max_steps=4)``: a Trainer of a converted GPT-2."""

    def make(cls, activation="hermite_3", callbacks=None, **options):
        model = make_gpt2()[0]
        convert(model, activation)
        defaults = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.01, "use_cpu": True}
        defaults |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
        arguments = TrainingArguments(output_dir=tmp_path / "out", **(defaults | options))
        data = Dataset.from_dict({"input_ids": DATA, "labels": DATA}).with_format("torch")
        return cls(model=model, args=arguments, train_dataset=data, callbacks=callbacks)

    return make


def saved(folder):
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


def poison(trainer, path, where, step):
    """From ``step`` on, what goes into or comes out of a module is infinite, or its parameters are."""
    module = trainer.model.get_submodule(path)

    def bad():
        return trainer.state.global_step >= step - 1

    if where == "pre-activations":
        module.register_forward_pre_hook(lambda module, args: (args[0] * math.inf,) if bad() else None)
    elif where == "outputs":
        module.register_forward_hook(lambda module, args, output: output * math.inf if bad() else None)
    else:

        def damage(module, args):
            for parameter in module.parameters():
                if bad() and parameter.requires_grad:
                    parameter.data[-1] = math.nan

        module.register_forward_pre_hook(damage)


@pytest.mark.parametrize(
    ("path", "where", "family"),
    [
        ("transformer.h.1.mlp.act", "pre-activations", "hermite"),
        ("transformer.h.1.mlp.act", "outputs", "hermite"),
        ("transformer.h.0.mlp.c_fc", "outputs", "hermite"),
        ("transformer.h.1.mlp.c_proj", "parameters", "hermite"),
        *(("transformer.h.1.mlp.act", "parameters", family) for family in FAMILIES),
    ],
)
def test_a_loss_that_is_not_finite_names_the_first_layer(make_trainer, tmp_path, path, where, family):
    trainer = make_trainer(ActivationTrainer, f"{family}_2")
    poison(trainer, path, where, step=4)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("step 4: the loss is not finite")
    assert f"the first non-finite values are the {where} of {path};" in message
    assert f"the last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'};" in message
    assert saved(tmp_path / "out") == {"checkpoint-2"}


def test_it_stops_before_the_step_of_the_optimizer(make_trainer, tmp_path):
    trainer = make_trainer(ActivationTrainer)
    poison(trainer, "transformer.h.0.mlp.act", "outputs", step=3)
    with pytest.raises(NonFiniteError, match="step 3: "):
        trainer.train()
    expected, found = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors"), trainer.model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
@pytest.mark.parametrize("nan_filter", [True, False])
def test_the_callback_in_a_plain_trainer(make_trainer, tmp_path, strategy, nan_filter):
    """Trainer itself goes on and saves nan. Two steps are one epoch."""
    options = {"save_strategy": strategy, "logging_nan_inf_filter": nan_filter}
    trainer = make_trainer(Trainer, callbacks=[hf_ortho.FiniteGuard()], **options)
    poison(trainer, "transformer.h.0.mlp.act", "outputs", step=3)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("step 4: ")
    assert "first activation: transformer.h.0.mlp.act.coefficients" in message
    kept = set() if strategy == "no" else {"checkpoint-2"}
    assert ("no checkpoint was saved" in message) == (not kept)
    assert saved(tmp_path / "out") == kept


def test_a_frozen_activation_is_no_part_of_the_message(make_trainer):
    trainer = make_trainer(Trainer)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(name.endswith("ln_f.bias"))
    check_parameters(trainer.model, trainer.args, 7)
    trainer.model.transformer.ln_f.bias.data[3] = math.inf
    with pytest.raises(NonFiniteError, match=r"step 7: 1 of 1 trained .* first: transformer.ln_f"):
        check_parameters(trainer.model, trainer.args, 7)


def test_a_trained_domain_may_be_infinite_but_not_nan(make_trainer):
    trainer = make_trainer(Trainer)
    domain = trainer.model.transformer.h[1].mlp.act.domain.requires_grad_(True)
    domain.data.copy_(torch.tensor([-math.inf, math.inf]))
    check_parameters(trainer.model, trainer.args, 1)
    domain.data[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"first activation: transformer.h.1.mlp.act.domain"):
        check_parameters(trainer.model, trainer.args, 1)


def test_steps_that_a_gradient_scaler_skips_do_not_stop(make_trainer):
    trainer = make_trainer(ActivationTrainer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = trainer.model.transformer.h[0].mlp.c_fc.weight
    weight.register_hook(lambda grad: grad * math.inf if trainer.state.global_step == 1 else grad)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.accelerator.scaler.get_scale() == 4.0
    assert torch.isfinite(weight).all()


def test_a_loss_that_no_scale_makes_finite_stops(make_trainer):
    """8, 4 and 2 are tried and halved at steps 1, 2 and 3."""
    trainer = make_trainer(ActivationTrainer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    poison(trainer, "transformer.h.0.mlp.act", "outputs", step=1)
    with pytest.raises(NonFiniteError, match="step 4: the loss is not finite"):
        trainer.train()


def test_a_run_that_diverges_ends_with_a_sentence(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    options = {"model": gpt2_folder, "dataset": text_file, "output_dir": tmp_path / "out", "activation": "hermite_3"}
    options |= {"learning_rate": 1e38, "max_steps": 9, "save_steps": 1, "max_grad_norm": 0, "use_cpu": "true"}
    ran = hf_ortho_command("finetune", *(f"--{key}={value}" for key, value in options.items()))
    assert "is not finite" in ran.error or "are not finite" in ran.error
    for weights in (tmp_path / "out").rglob("*.safetensors"):
        assert all(v.isfinite().all() for key, v in load_file(weights).items() if not key.endswith("domain"))
    assert not (tmp_path / "out" / "config.json").exists()
