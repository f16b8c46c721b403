"""What changes nothing but rounding in the training of a converted model."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_ortho import convert
from hf_ortho.training import ActivationTrainer, set_trainable

DATA = torch.randint(0, 256, (24, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def train(make_gpt2, tmp_path):
    """``train(max_steps=3)``: (parameters before, parameters after) of three steps of SGD on eight samples each.

    SGD, since Adam divides gradients by their own size and so blows up the rounding of those that are zero.
    """

    def run(batch=8, accumulation=1, **options):
        model = make_gpt2(n_layer=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)[0]
        convert(model, "hermite_3")
        set_trainable(model, "all")
        defaults = {"max_steps": 3, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant"}
        defaults |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
        arguments = TrainingArguments(
            output_dir=tmp_path / "out",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            use_cpu=True,
            **(defaults | options),
        )
        data = Dataset.from_dict({"input_ids": DATA, "labels": DATA}).with_format("torch")
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        trainer = ActivationTrainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        return before, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    return run


def relative_change(before, expected, found):
    """Per parameter: the distance of two results of a training, in units of the way from the start."""
    return {n: ((found[n] - expected[n]).norm() / (expected[n] - before[n]).norm()).item() for n in before}


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation(train, batch, accumulation):
    """The same eight samples per step, their gradients summed in another order in float32."""
    before, expected = train()
    _, found = train(batch, accumulation)
    assert max(relative_change(before, expected, found).values()) < 1e-5


def test_clipping(train, make_gpt2):
    """One step of SGD is -lr g max_norm / |g|, with |g| over all parameters, from autograd on the same samples."""
    before, after = train(max_steps=1, batch=24, learning_rate=1.0, max_grad_norm=1e-2)
    model = make_gpt2(n_layer=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)[0]
    convert(model, "hermite_3")
    names = list(before)
    loss = model(input_ids=DATA, labels=DATA).loss
    gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 0.1
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(after[name] - before[name], -1e-2 * gradient / norm, rtol=1e-4, atol=1e-7)
    assert any(".act." in name for name in names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own imports
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_compiled(train):
    """Dynamo captures the whole step and AOT Autograd differentiates it; Inductor's code is that of test_dispatch."""
    before, expected = train()
    torch._dynamo.utils.counters.clear()
    _, found = train(torch_compile_backend="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    assert max(relative_change(before, expected, found).values()) < 1e-5


def test_autocast(train):
    """bfloat16 has 8 bits, an error of up to 2^-9 in each factor of a product; parameters stay float32."""
    before, expected = train()
    _, found = train(bf16=True)
    assert {p.dtype for p in found.values()} == {torch.float32}
    changes = relative_change(before, expected, found)
    assert 1e-4 < max(changes.values()) < 0.05, changes
