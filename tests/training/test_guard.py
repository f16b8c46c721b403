import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import hf_ortho
from hf_ortho import convert
from hf_ortho.activations import FAMILIES
from hf_ortho.errors import NonFiniteError
from hf_ortho.training import ActivationTrainer, ExponentialMovingAverage, OptimizerArguments
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


def poison(trainer, path, where, step, micro_batch=1):
    """From a micro-batch of ``step`` on, what goes into or comes out of a module is infinite, or its parameters are."""
    module = trainer.model.get_submodule(path)
    passes = []
    trainer.model.register_forward_pre_hook(lambda module, args: passes.append(trainer.state.global_step))

    def bad():
        return trainer.state.global_step >= step - 1 and passes.count(step - 1) >= micro_batch

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


class Reads(TorchDispatchMode):
    """The step of ``trainer`` at each reading of a value of a tensor, as by ``item``."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.steps = trainer, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.steps.append(self.trainer.state.global_step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulated", [1, 4])
def test_one_value_is_read_per_optimizer_step(make_trainer, monkeypatch, accumulated):
    """With a penalty, natural steps and averages. Fused Adam, the default on GPUs, reads nothing itself."""
    # GPT-2 of transformers reads whether the rows are packed, unless it is compiled.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda ids: None)
    options = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 1, "save_strategy": "no"}
    options |= {"logging_strategy": "no", "logging_nan_inf_filter": False, "optim": "adamw_torch_fused"}
    average = ExponentialMovingAverage(0.9)
    trainer = make_trainer(ActivationTrainer, callbacks=[average], **options)
    trainer.average, trainer.penalty = average, hf_ortho.DomainPenalty(trainer.model, 0.1)
    trainer.optimizer_arguments = OptimizerArguments(activation_natural_steps=True)
    plain = torch.Tensor.tolist
    with Reads(trainer) as reads:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.steps.append(trainer.state.global_step) or plain(x))
        trainer.train()
    assert trainer.state.global_step == 4
    # The first step also checks the gradients of the activations; at the end of the data, they are shuffled again.
    assert [reads.steps.count(step) for step in (1, 2)] == [1, 1]


@pytest.mark.parametrize("nan_filter", [True, False])
def test_the_micro_batch_is_named(make_trainer, tmp_path, nan_filter):
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "logging_nan_inf_filter": nan_filter}
    trainer = make_trainer(ActivationTrainer, **options)
    poison(trainer, "transformer.h.1.mlp.act", "outputs", step=3, micro_batch=3)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    message = "step 3: the loss is not finite in micro-batch 3 of 4; the first non-finite values are the outputs of "
    assert str(caught.value).startswith(message + "transformer.h.1.mlp.act;")
    expected, found = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors"), trainer.model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_only_the_batch_that_failed_runs_again(make_trainer):
    trainer = make_trainer(ActivationTrainer, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    seen = []

    def look(model, args, kwargs):
        seen.append(kwargs["input_ids"])
        if len(seen) == 3:
            kwargs = kwargs | {
                "inputs_embeds": model.transformer.wte(kwargs["input_ids"]) * math.inf,
                "input_ids": None,
            }
        return args, kwargs

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(NonFiniteError, match="micro-batch 3 of 4, although the outputs of all layers are"):
        trainer.train()
    assert len(seen) == 5
    assert torch.equal(seen[4], seen[2])
    assert not torch.equal(seen[4], seen[3])


PROCESSES = """
import sys
import torch, torch.distributed as dist
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
import hf_ortho
from hf_ortho.errors import NonFiniteError
from hf_ortho.training import ActivationTrainer

torch.set_num_threads(1)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2))
hf_ortho.convert(model, "hermite_3")
data = torch.randint(0, 256, (32, 8))
arguments = TrainingArguments(sys.argv[1], max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True,
                              per_device_train_batch_size=2, gradient_accumulation_steps=4, save_strategy="no",
                              dataloader_pin_memory=False, logging_nan_inf_filter=False)
data = Dataset.from_dict({"input_ids": data, "labels": data}).with_format("torch")
trainer = ActivationTrainer(model=model, args=arguments, train_dataset=data)
passes = []
count = lambda module, args: passes.append(trainer.state.global_step)
damage = lambda module, args, output: output * torch.inf if rank and passes.count(1) >= 3 else None
rank = dist.get_rank()
model.register_forward_pre_hook(count)
model.transformer.h[1].mlp.act.register_forward_hook(damage)
try:
    trainer.train()
except NonFiniteError as error:
    print(f"process {rank} after {len(passes)} batches: {error}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_all_processes_stop_at_the_loss_of_one(forked, tmp_path):
    """The second process fails in the third micro-batch of the second step; both run it again."""
    (tmp_path / "script.py").write_text(PROCESSES)
    printed = forked(2, tmp_path / "script.py", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    for rank in (0, 1):
        assert (
            f"process {rank} after 9 batches: step 2: the loss is not finite in micro-batch 3 of 4; the first "
            "non-finite values are the outputs of transformer.h.1.mlp.act;"
        ) in printed


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


@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_loss_that_no_scale_makes_finite_stops(make_trainer, accumulated):
    """8, 4 and 2 are tried and halved at steps 1, 2 and 3."""
    options = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 2}
    trainer = make_trainer(ActivationTrainer, logging_nan_inf_filter=False, **options)
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
