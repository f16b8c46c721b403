import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_ortho
from hf_ortho.activations import FAMILIES, LearnableActivation, build
from hf_ortho.errors import ConfigError
from hf_ortho.training import ActivationTrainer, LoraArguments, add_lora

INTERVAL = (-0.05, 0.03)


@pytest.fixture(scope="module", params=["hermite_3", "hermite_3_g4"])
def converted(make_gpt2, request):
    model = make_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)[0]
    hf_ortho.convert(model, request.param)
    return model


@pytest.fixture
def model(converted):
    return copy.deepcopy(converted)


@pytest.fixture
def ids():
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))


def formula(model, inputs, interval=None):
    """The mean over activations of E[d^2] with autograd's own operations, from the pre-activations of a forward."""
    seen, handles = [], []
    for module in model.modules():
        if isinstance(module, LearnableActivation):
            handles.append(module.register_forward_pre_hook(lambda m, args: seen.append((m, args[0]))))
    outputs = model(**inputs)
    for handle in handles:
        handle.remove()
    terms = []
    for module, x in seen:
        domains = module.domain.reshape(-1, 2).tolist() if interval is None else [interval] * module.groups
        parts = zip(x.chunk(module.groups, -1), domains, strict=True)
        distances = [(torch.relu(lo - part) ** 2 + torch.relu(part - hi) ** 2).mean() for part, (lo, hi) in parts]
        terms.append(torch.stack(distances).mean())
    return torch.stack(terms).mean(), outputs


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **tolerance)


def expected_of(model, ids, weight, interval=INTERVAL):
    """Loss and gradients by the formula, of a model without the penalty."""
    penalty, outputs = formula(model, {"input_ids": ids, "labels": ids}, interval)
    loss = outputs.loss + weight * penalty
    loss.backward()
    return loss.detach(), penalty.detach(), gradients(model)


def test_under_lora_each_activation_counts_once(model, ids):
    loss, penalty, _ = expected_of(copy.deepcopy(model).train(), ids, 3.0)
    assert penalty > 1e-4
    wrapped = add_lora(model, LoraArguments(lora_dropout=0.0), seed=0).train()  # no change before the first step
    hf_ortho.DomainPenalty(wrapped, 3.0, INTERVAL)
    torch.testing.assert_close(wrapped(input_ids=ids, labels=ids).loss.detach(), loss)


@pytest.mark.parametrize("interval", [INTERVAL, None])
def test_loss_and_gradients_are_those_of_the_formula(model, ids, interval):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LearnableActivation):
                module.domain.copy_(torch.tensor([-0.02, 0.01]))
                module.domain.reshape(-1, 2)[0] *= 2  # of the first group
    loss, penalty, expected = expected_of(copy.deepcopy(model).train(), ids, 3.0, interval)
    assert penalty > 1e-4
    hooked = hf_ortho.DomainPenalty(model.train(), 3.0, interval)
    found = model(input_ids=ids, labels=ids).loss
    found.backward()
    torch.testing.assert_close(found, loss)
    close(gradients(model), expected)
    assert not hooked.pending


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_with_its_own_loss(family):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), build(f"{family}_3"), nn.Linear(5, 4), build(f"{family}_2"))
    x = torch.randn(7, 3)
    first = net[0](x)
    second = net[2](net[1](first))
    expected = torch.stack([(v - v.clamp(*INTERVAL)).square().mean() for v in (first, second)]).mean()
    wanted = torch.autograd.grad(net(x).square().mean() + 0.5 * expected, net[0].weight)[0]
    penalty = hf_ortho.DomainPenalty(net, 0.5, INTERVAL)
    loss = net(x).square().mean() + penalty.loss()
    torch.testing.assert_close(torch.autograd.grad(loss, net[0].weight)[0], wanted)
    with pytest.raises(ConfigError, match="no forward in training mode ran"):
        penalty.loss()
    net(x)
    with pytest.raises(ConfigError, match="missing from the loss of the last step"):
        net(x)
    net.eval()(x)
    assert not penalty.pending
    penalty.remove()
    net.train()(x)
    assert not penalty.pending


def test_evaluation_and_the_state_dict_are_as_before(model, ids):
    keys = model.state_dict().keys()
    before = model.eval()(input_ids=ids, labels=ids).loss
    hf_ortho.DomainPenalty(model, 3.0, INTERVAL)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, before)
    assert model.state_dict().keys() == keys


def test_gradient_checkpointing_changes_nothing(model, ids):
    loss, _, expected = expected_of(copy.deepcopy(model).train(), ids, 3.0)
    hf_ortho.DomainPenalty(model.train(), 3.0, INTERVAL)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        found = model(input_ids=ids, labels=ids).loss
        found.backward()
        torch.testing.assert_close(found, loss)
        close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_compilation_changes_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 5), build("hermite_3", init="unit"), nn.Linear(5, 1))

        def forward(self, x):
            return {"loss": self.body(x).square().mean()}

    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x = Net(), torch.randn(7, 3)
    hf_ortho.DomainPenalty(net, 3.0, INTERVAL)
    compiled = torch.compile(net, backend="eager")
    for _ in range(2):
        net(x)["loss"].backward()
        expected = gradients(net)
        compiled(x)["loss"].backward()
        close(gradients(net), expected)


def test_reentrant_checkpointing_is_refused(model, ids):
    hf_ortho.DomainPenalty(model.train(), 3.0, INTERVAL)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ConfigError, match="set use_reentrant=False"):
        model(input_ids=ids, labels=ids)


@pytest.mark.parametrize(("trainer", "smoothing"), [(Trainer, 0.0), (ActivationTrainer, 0.1)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(model, ids, tmp_path, trainer, smoothing):
    """One SGD step on four micro-batches of one row is the step on the four rows."""

    def step(penalized, size):
        copied = copy.deepcopy(model)
        options = {}
        if penalized:
            penalty = hf_ortho.DomainPenalty(copied, 3.0, INTERVAL)
            options = {} if trainer is Trainer else {"penalty": penalty}
        trainer(
            model=copied,
            args=TrainingArguments(
                output_dir=tmp_path,
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
                learning_rate=0.1,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                optim="sgd",
                label_smoothing_factor=smoothing,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            **options,
        ).train()
        return {name: p.detach() for name, p in copied.named_parameters()}

    accumulated, whole, plain = step(True, 1), step(True, 4), step(False, 4)
    close(accumulated, whole, rtol=1e-4, atol=1e-6)
    penalty, _ = formula(model.train(), {"input_ids": ids}, INTERVAL)
    penalty.backward()
    slope = gradients(model)
    moved = {name: (plain[name] - whole[name]) / (0.1 * 3.0) for name in slope}
    close(moved, slope, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "interval", "message"),
    [
        (-1.0, INTERVAL, "DomainPenalty: weight -1.0"),
        (1.0, (1.0, 0.0), "must be two finite numbers lo < hi"),
        (1.0, None, "the domain of 0 is .*-inf.*; give an interval"),
    ],
)
def test_bad_values_are_refused(weight, interval, message):
    with pytest.raises(ConfigError, match=message):
        hf_ortho.DomainPenalty(nn.Sequential(build("hermite_3")), weight, interval)
