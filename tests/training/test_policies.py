import copy
import re

import pytest
import torch
from transformers import GPT2Model, TrainingArguments

from hf_ortho import convert
from hf_ortho.activations import LearnableActivation, build
from hf_ortho.errors import ConfigError
from hf_ortho.training import (
    POLICIES,
    ActivationTrainer,
    activation_parameters,
    reduce_activation_gradients,
    set_trainable,
    tensor_parallel,
)
from hf_ortho.training.adapters import add_lora, merge_lora
from hf_ortho.training.arguments import LoraArguments
from hf_ortho.training.policies import LEARNABLE


@pytest.fixture(params=["hermite_3", "hermite_3_g4", "fourier_2", "tropical_2", "tropical_rational_2"])
def activation(request):
    return request.param


def converted(model, name="hermite_3"):
    convert(model, name)
    return model


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def series(model):
    """The names under the activations' paths, as both architectures spell them, without domains and tail slopes."""
    return {n for n, _ in model.named_parameters() if ".act." in n} - shared(model)


def shared(model):
    return {n for n, _ in model.named_parameters() if n.endswith((".domain", ".tail_slopes"))}


def check(model, policy, expected):
    found = set_trainable(model, policy)
    assert trainable(model) == expected
    assert found == sum(p.numel() for n, p in model.named_parameters() if n in expected)


def test_policies_of_a_language_model(make_gpt2, activation):
    model = converted(make_gpt2()[0], activation)
    everything = {n for n, _ in model.named_parameters()}
    assert len(shared(model)) == 4
    assert len(series(model)) >= 2
    check(model, "all", everything - shared(model))
    # Whatever was trainable before, in any order. The head is tied to the embeddings, and named after them.
    tied = {"transformer.wte.weight"}
    for policy, head in (("activations", set()), ("activations+head", tied), ("activations", set())):
        for parameter in model.parameters():
            parameter.requires_grad_(policy == "activations")
        check(model, policy, series(model) | head)


def test_policy_with_a_head_of_its_own(make_gpt2):
    model = converted(make_gpt2(tie_word_embeddings=False)[0])
    check(model, "activations+head", series(model) | {"lm_head.weight"})


def test_policies_of_an_image_classifier(make_convnext, activation):
    model = converted(make_convnext()[0], activation)
    everything = {n for n, _ in model.named_parameters()}
    check(model, "all", everything - shared(model))
    check(model, "activations", series(model))
    check(model, "activations+head", series(model) | {"classifier.weight", "classifier.bias"})
    check(model, "head", {"classifier.weight", "classifier.bias"})
    found = set_trainable(model, "norms", new_modules=("classifier",))
    norms = {n for n in everything if "norm" in n or ".stages.1.downsampling_layer.0." in n}
    assert trainable(model) == norms | {"classifier.weight", "classifier.bias"}
    assert found == sum(model.get_parameter(n).numel() for n in trainable(model))


def test_the_head_of_an_original_model(make_convnext):
    check(make_convnext()[0], "head", {"classifier.weight", "classifier.bias"})


def test_activation_parameters_are_named_with_what_stays_frozen(make_gpt2):
    model = converted(make_gpt2()[0])
    assert activation_parameters(model) == series(model) | shared(model)
    assert activation_parameters(make_gpt2()[0]) == set()


def refused(model, policy, message):
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    before = trainable(model)
    with pytest.raises(ConfigError, match=message):
        set_trainable(model, policy)
    assert trainable(model) == before


def test_head_policy_of_a_model_without_a_head(make_gpt2):
    model = converted(GPT2Model(make_gpt2()[0].config))
    refused(model, "activations+head", "GPT2Model has no head; use 'activations'")
    check(model, "activations", series(model))


@pytest.mark.parametrize("policy", [p for p in POLICIES if "activations" in p])
def test_activation_policy_of_an_unconverted_model(make_gpt2, policy):
    refused(make_gpt2()[0], policy, "no learnable activations")


def test_policy_all_of_an_unconverted_model(make_gpt2):
    model = make_gpt2()[0]
    check(model, "all", {n for n, _ in model.named_parameters()})


def test_unknown_policy(make_gpt2):
    refused(converted(make_gpt2()[0]), "heads", f"'heads': must be one of {re.escape(', '.join(POLICIES))}")


def test_norms_of_both_kinds_of_models(make_gpt2, make_convnext):
    model = converted(make_gpt2()[0])
    check(model, "activations+norms", series(model) | {n for n, _ in model.named_parameters() if ".ln_" in n})
    model = converted(make_convnext()[0])
    # A norm before the second stage has no name of its own.
    norms = {n for n, _ in model.named_parameters() if "norm" in n or ".stages.1.downsampling_layer.0." in n}
    assert len(norms) == 2 * 5
    check(model, "activations+norms", series(model) | norms)


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def test_lora_trains_adapters_and_activations(make_gpt2, activation):
    model = add_lora(converted(make_gpt2()[0], activation), LoraArguments(lora_r=2), seed=0)
    count = set_trainable(model, "lora+activations")
    names = trainable(model)
    assert count == sum(model.get_parameter(n).numel() for n in names)
    adapters = {n for n in names if ".lora_" in n}
    assert len(adapters) == 2 * 4 * 2  # A and B of c_attn, c_fc and both c_proj, in two layers
    assert {tuple(model.get_parameter(n).shape) for n in adapters if "c_fc.lora_A" in n} == {(2, 16)}
    rest = {n.rpartition(".")[0] for n in names - adapters}
    assert rest == {f"base_model.model.transformer.h.{i}.mlp.act.modules_to_save.default" for i in (0, 1)}
    assert not any(n.endswith(".domain") for n in names)


def test_lora_starts_and_merges_without_a_change(make_gpt2):
    """Before any step B is 0, so that the outputs and all weights are those of the model."""
    model = converted(make_gpt2()[0]).eval()
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    expected, before = model(ids).logits, {n: v.clone() for n, v in model.state_dict().items()}
    wrapped = add_lora(model, LoraArguments(), seed=0)
    torch.testing.assert_close(wrapped(ids).logits, expected)
    merged = merge_lora(wrapped)
    assert type(merged).__name__ == "GPT2LMHeadModel"
    assert merged.state_dict().keys() == before.keys()
    assert [n for n, v in merged.state_dict().items() if not torch.equal(v, before[n])] == []


def test_the_seed_sets_the_adapters(make_gpt2):
    first, again, other = (
        add_lora(converted(make_gpt2()[0]), LoraArguments(), seed).get_parameter(
            "base_model.model.transformer.h.0.mlp.c_fc.lora_A.default.weight"
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 0}, "lora_r 0, .*should be a positive integer"),
        ({"lora_target_modules": ["q_proj"]}, r"lora_target_modules \['q_proj'\]: No modules were targeted"),
    ],
)
def test_lora_values_that_do_not_fit(make_gpt2, options, message):
    with pytest.raises(ConfigError, match=rf"train 'lora\+activations', .*{message}"):
        add_lora(converted(make_gpt2()[0]), LoraArguments(**options), seed=0)


def test_lora_without_adapters(make_gpt2):
    refused(converted(make_gpt2()[0]), "lora+activations", "GPT2LMHeadModel has no LoRA adapters")


# ---- weight decay --------------------------------------------------------------------------------------------------


def arguments(folder, **options):
    defaults = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=folder, weight_decay=0.5, learning_rate=0.01, **(defaults | options))


def test_groups_are_refused_between_layers_that_are_sharded_by_channels(monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), build("hermite_3_g4"))
    assert reduce_activation_gradients(net) == 0
    monkeypatch.setattr(tensor_parallel, "DTensor", torch.Tensor)
    net[0].weight.device_mesh = None
    with pytest.raises(ConfigError, match="1: hermite_3_g4 cannot be combined with tensor parallelism"):
        reduce_activation_gradients(net)


@pytest.mark.parametrize("policy", [p for p in POLICIES if not p.startswith("lora")])
def test_weight_decay_spares_activations(make_gpt2, tmp_path, policy):
    model = converted(make_gpt2()[0])
    set_trainable(model, policy)
    optimizer = ActivationTrainer(model=model, args=arguments(tmp_path)).create_optimizer()
    names = {id(p): n for n, p in model.named_parameters()}
    decays = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in decays
            decays[name] = group["weight_decay"]
    assert decays.keys() == trainable(model)
    learn = policy in (*LEARNABLE, "all")
    assert {decays[name] for name in series(model) & trainable(model)} == ({0.0} if learn else set())
    # What plain Trainer decays in a GPT-2: the matrices of the linear layers and the embeddings.
    linear = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".wte.weight", ".wpe.weight")
    matrices = {name for name in trainable(model) if name.endswith(linear)}
    assert {n for n, decay in decays.items() if decay == 0.5} == matrices
    assert bool(matrices) == (policy in ("all", "activations+head", "head"))


def test_a_step_without_gradient_leaves_activations_as_they_are(make_gpt2, tmp_path, activation):
    model = converted(make_gpt2()[0], activation)
    set_trainable(model, "all")
    before = copy.deepcopy(model.state_dict())
    optimizer = ActivationTrainer(model=model, args=arguments(tmp_path)).create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = model.state_dict()
    for name in series(model) | shared(model):
        assert torch.equal(after[name], before[name])
    matrix = "transformer.h.1.mlp.c_fc.weight"
    torch.testing.assert_close(after[matrix], before[matrix] * (1 - 0.01 * 0.5))


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["activations", "activations+head", "all"])
def test_training_moves_what_is_trainable_and_nothing_else(make_gpt2, tmp_path, activation, policy):
    model = converted(make_gpt2()[0], activation)
    set_trainable(model, policy)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    ActivationTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, per_device_train_batch_size=4, save_strategy="no"),
        train_dataset=rows,
    ).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trainable(model)
    activations = [m for m in model.modules() if isinstance(m, LearnableActivation)]
    assert len(activations) == 2
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)
