import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_ortho
from hf_ortho.activations import FAMILIES, build
from hf_ortho.errors import ConfigError
from hf_ortho.training import ActivationTrainer, LoraArguments, OptimizerArguments, activation_parameters, add_lora
from hf_ortho.training.optimizer import activations_by_path


@pytest.fixture(scope="module")
def converted(make_gpt2):
    model = make_gpt2()[0]
    hf_ortho.convert(model, "hermite_3")
    return model


@pytest.fixture
def model(converted):
    return copy.deepcopy(converted)


def arguments(folder, **options):
    defaults = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=folder, **(defaults | options))


def settings(model, groups):
    """(learning rate, weight decay) by the name of each parameter, each of which comes once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_groups_follow_trainer_but_for_activations(model, tmp_path):
    found = settings(model, hf_ortho.param_groups(model, lr=0.1, weight_decay=0.2, activation_lr=0.3))
    plain = Trainer(model=model, args=arguments(tmp_path, learning_rate=0.1, weight_decay=0.2)).create_optimizer()
    learned = {name for name in activation_parameters(model) if not name.endswith((".domain", ".tail_slopes"))}
    expected = settings(model, plain.param_groups) | dict.fromkeys(learned, (0.3, 0.0))
    assert found == expected
    assert {decay for _, decay in found.values()} == {0.0, 0.2}
    assert found["transformer.wte.weight"] == (0.1, 0.2)  # tied to the head, once


def test_vectors_do_not_decay(make_convnext):
    """Trainer would decay the layer scales of ConvNeXt."""
    model = make_convnext()[0]
    hf_ortho.convert(model, "hermite_3")
    found = settings(model, hf_ortho.param_groups(model, lr=0.1, weight_decay=0.2))
    scales = [name for name in found if name.endswith("layer_scale_parameter")]
    assert len(scales) == 2
    assert set(scales) <= set(Trainer.get_decay_parameter_names(None, model))
    parameters = dict(model.named_parameters())
    assert all((decay > 0) == (parameters[name].ndim > 1) for name, (_, decay) in found.items())
    # What DeepSpeed ZeRO-3 leaves in a process until it gathers the whole.
    for parameter in parameters.values():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert settings(model, hf_ortho.param_groups(model, lr=0.1, weight_decay=0.2)) == found


def test_groups_of_a_wrapped_model_and_frozen_parameters(model):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model.transformer.wte.requires_grad_(False)
    wrapped = Wrapper(model)
    options = {"lr": 0.1, "weight_decay": 0.2, "activation_lr": 0.3}
    found = settings(wrapped, hf_ortho.param_groups(wrapped, **options))
    inner = settings(model, hf_ortho.param_groups(model, **options))
    assert found == {f"module.{name}": value for name, value in inner.items()}
    assert "transformer.wte.weight" not in inner
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        hf_ortho.param_groups(model, lr=0.1)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
def test_every_name_of_trainer_keeps_its_optimizer(model, tmp_path, optim):
    options = {"optim": optim, "learning_rate": 0.1, "weight_decay": 0.2}
    trainer = ActivationTrainer(
        model=model,
        args=arguments(tmp_path, **options),
        optimizer_arguments=OptimizerArguments(activation_learning_rate=0.3),
    )
    optimizer = trainer.create_optimizer()
    plain = Trainer(model=model, args=arguments(tmp_path, **options)).create_optimizer()
    assert type(optimizer) is type(plain)
    assert optimizer.defaults == plain.defaults
    expected = settings(model, hf_ortho.param_groups(model, lr=0.1, weight_decay=0.2, activation_lr=0.3))
    assert settings(model, optimizer.param_groups) == expected


def test_an_optimizer_with_groups_of_its_own_refuses(model, tmp_path, monkeypatch):
    def galore(args, model):
        return torch.optim.SGD, {"lr": 0.1, "params": list(model.parameters())}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(galore))
    trainer = ActivationTrainer(model=model, args=arguments(tmp_path), optimizer_arguments=OptimizerArguments())
    assert len(trainer.create_optimizer().param_groups) == 1
    chosen = OptimizerArguments(activation_learning_rate=0.3)
    trainer = ActivationTrainer(model=model, args=arguments(tmp_path), optimizer_arguments=chosen)
    with pytest.raises(
        ConfigError, match="creates its own parameter groups, so activation_learning_rate cannot be set"
    ):
        trainer.create_optimizer()


def test_factory_in_a_plain_trainer(model, tmp_path):
    """Trainer builds it, and the schedule multiplies the learning rate of each group."""
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append(sorted({group["lr"] for group in optimizer.param_groups}))

    factory = hf_ortho.optimizer_cls_and_kwargs("adamw", lr=0.01, activation_lr=0.1, weight_decay=0.1, betas=(0.8, 0.9))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, lr_scheduler_type="linear", save_strategy="no"),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizer_cls_and_kwargs=factory,
        callbacks=[Rates()],
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.defaults["betas"] == (0.8, 0.9)
    torch.testing.assert_close(
        torch.tensor(rates), torch.tensor([1, 0.75, 0.5, 0.25])[:, None] * torch.tensor([0.01, 0.1])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr -1.0: must be a finite number and at least 0"),
        ({"lr": math.nan}, "lr nan"),
        ({"lr": 0.1, "weight_decay": -0.1}, "weight_decay -0.1"),
        ({"lr": 0.1, "activation_lr": math.inf}, "activation_lr inf"),
        ({"lr": 0.1, "gradient_scale": -2.0}, "gradient_scale -2.0"),
        ({"lr": 0.1, "beta": 0.9}, "optimizer AdamW: .*beta"),
        ({"lr": 0.1, "name_or_cls": "adamv"}, "optimizer 'adamv' .*did you mean adam"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        hf_ortho.optimizer(**options)


# ---- scales of the step --------------------------------------------------------------------------------------------


def stepped(net, cls, **options):
    """The parameters of a copy after two steps with gradients that do not depend on it."""
    net = copy.deepcopy(net)
    optimizer = hf_ortho.scale_steps(cls(net.parameters(), lr=0.01), net, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
@pytest.mark.parametrize("groups", ["", "_g3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_natural_steps_are_those_of_a_model_in_natural_units(family, groups, cls):
    net = build(f"{family}_6{groups}", init="unit")
    units = {"hermite": [math.sqrt(math.factorial(k)) for k in range(7)], "fourier": [1, 2, 6, 24, 120, 720]}
    units = {name: torch.ones(p.shape[-1]) for name, p in net.named_parameters()} | (
        {"coefficients": torch.tensor(units[family])} if family in units else {}
    )
    scaled = {n: nn.Parameter(p.detach() / units[n]) for n, p in net.named_parameters() if p.requires_grad}
    optimizer, reference = cls(net.parameters(), lr=0.01), cls(scaled.values(), lr=0.01)
    hf_ortho.scale_steps(optimizer, net, natural_steps=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, parameter in scaled.items():
            gradient = 1e-3 * torch.randn(parameter.shape, generator=generator)
            net.get_parameter(name).grad, parameter.grad = gradient.clone(), units[name] * gradient
        optimizer.step()
        reference.step()
    for name, parameter in scaled.items():
        torch.testing.assert_close(net.get_parameter(name), units[name] * parameter, rtol=1e-5, atol=1e-6)


def test_the_units_are_placed_once(monkeypatch):
    """A copy to a GPU for each parameter and step would be slow."""
    placed = []
    place = "hf_ortho.training.optimizer._placed"
    monkeypatch.setattr(place, lambda unit, parameter: placed.append(parameter) or unit)
    net = nn.Sequential(*(build(f"{family}_6") for family in FAMILIES))
    scaled = hf_ortho.scale_steps(torch.optim.AdamW(net.parameters()), net, natural_steps=True)
    for _ in range(3):
        net(torch.ones(2)).sum().backward()
        scaled.step()
    with_units = [net[i].get_parameter(name) for i in range(len(net)) for name in net[i].natural_units()]
    assert {id(p) for p in placed} == {id(p) for p in with_units}
    assert len(placed) == len(with_units)


def test_steps_below_the_resolution_of_the_coefficients_are_not_lost():
    """3e4 + 1e-3 is 3e4 in float32, but a step of 1e-3 natural units of c_16 is one of 4574."""
    net = build("hermite_16")
    with torch.no_grad():
        net.coefficients[16] = 3e4
    optimizer = hf_ortho.scale_steps(
        torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0), net, natural_steps=True
    )
    net.coefficients.grad = torch.full((17,), 1e-8)
    optimizer.step()
    assert float(net.coefficients.detach()[16]) == pytest.approx(3e4 - 1e-3 * math.sqrt(math.factorial(16)), rel=1e-4)


def test_hermite_units_are_one_over_the_norms_of_the_basis():
    """E[(He_k(x)/k!)^2] = 1/k!, by Gauss-Hermite quadrature of the module's own series."""
    module = build("hermite_12").double()
    x, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(40))
    for k, unit in enumerate(module.natural_units()["coefficients"]):
        one = torch.zeros(13, dtype=torch.float64)
        one[k] = unit
        assert float((w * module.series(x, one).square()).sum() / w.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("wrapper", ["plain", "compiled", "blocks compiled", "lora", "lora compiled"])
def test_paths_of_activations_are_those_in_the_plain_model(model, wrapper):
    if wrapper.startswith("lora"):
        model = add_lora(model, LoraArguments(), seed=0)
    if wrapper == "blocks compiled":
        model.transformer.h[0] = torch.compile(model.transformer.h[0], backend="eager")
        model.transformer.h[1].mlp.act = torch.compile(model.transformer.h[1].mlp.act, backend="eager")
    elif wrapper.endswith("compiled"):
        model = torch.compile(model, backend="eager")
    found = activations_by_path(model)
    assert list(found) == [f"transformer.h.{i}.mlp.act" for i in range(2)]
    assert all(module.coefficients.requires_grad for module in found.values())


@pytest.mark.parametrize(("scale", "natural"), [(0.5, False), (1.0, True)])
def test_deepspeed_takes_no_other_units(model, tmp_path, scale, natural):
    chosen = OptimizerArguments(activation_gradient_scale=scale, activation_natural_steps=natural)
    trainer = ActivationTrainer(model=model, args=arguments(tmp_path), optimizer_arguments=chosen)
    trainer.is_deepspeed_enabled = True
    key = "activation_natural_steps" if natural else "activation_gradient_scale 0.5"
    with pytest.raises(ConfigError, match=f"{key}: not supported by DeepSpeed"):
        trainer.create_optimizer()


def test_gradient_scale_moves_sgd_and_spares_the_rest():
    net = nn.Sequential(nn.Linear(2, 2), build("fourier_3"))
    plain, scaled = stepped(net, torch.optim.SGD), stepped(net, torch.optim.SGD, gradient_scale=3.0)
    learned = activation_parameters(net)
    for name, value in plain.items():
        start, factor = net.get_parameter(name), 3.0 if name in learned else 1.0
        torch.testing.assert_close(scaled[name] - start, factor * (value - start), rtol=1e-4, atol=1e-6)


def test_natural_steps_resume_bit_equal(converted, tmp_path):
    ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))
    chosen = OptimizerArguments(0.001, activation_gradient_scale=0.5, activation_natural_steps=True)

    def train(folder, optimizer_arguments, resume=None):
        trainer = ActivationTrainer(
            model=copy.deepcopy(converted),
            args=arguments(folder, max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=0.01),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            optimizer_arguments=optimizer_arguments,
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach() for name, p in trainer.model.named_parameters()}

    whole = train(tmp_path / "whole", chosen)
    resumed = train(tmp_path / "resumed", chosen, str(tmp_path / "whole" / "checkpoint-2"))
    plain = train(tmp_path / "plain", OptimizerArguments(0.001, activation_gradient_scale=0.5))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    coefficients = "transformer.h.0.mlp.act.coefficients"
    start = converted.get_parameter(coefficients).detach()
    # Adam's first steps are the learning rate each, so that the cubic one goes sqrt(6) as far.
    assert float((whole[coefficients] - start)[3] / (plain[coefficients] - start)[3]) == pytest.approx(6**0.5, rel=0.1)


def test_recipe_refuses_bad_values(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    base = ["finetune", "--model", gpt2_folder, "--dataset", text_file, "--output_dir", tmp_path / "out"]
    for flags, message in (
        (["--activation_learning_rate", -1], "activation_learning_rate -1.0: must be a finite number and at least 0"),
        (["--activation_gradient_scale", "inf"], "activation_gradient_scale inf"),
        (["--domain_penalty", -1], "domain_penalty -1.0"),
        (["--domain_penalty_interval", 2, 1], "domain_penalty_interval [2.0, 1.0]: must be two finite numbers lo < hi"),
        (["--log_activations", 0], "log_activations 0: must be at least 1"),
        (["--domain_penalty", 1], "domain_penalty 1.0: GPT2LMHeadModel has no learnable activations"),
    ):
        assert message in hf_ortho_command(*base, *flags).error
    assert not (tmp_path / "out").exists()
