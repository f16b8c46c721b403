"""``channels_last``: the same results from another order in memory."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

import hf_ortho
from hf_ortho.activations import FAMILIES, build
from hf_ortho.errors import ConfigError
from hf_ortho.training import ActivationTrainer
from hf_ortho.training.assemble import _use_channels_last

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def is_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_activation_keeps_the_order(family):
    module, x = build(f"{family}_4", init="unit"), IMAGES.clone().requires_grad_()
    last = IMAGES.to(memory_format=torch.channels_last).requires_grad_()
    expected, found = module(x), module(last)
    (gradient,), (other,) = (torch.autograd.grad(y.square().sum(), [v]) for y, v in ((expected, x), (found, last)))
    assert is_last(found)
    assert is_last(other)
    assert torch.equal(found, expected)
    assert torch.equal(other, gradient)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``trained(channels_last)``: a converted ResNet after three steps, the pixels and activations seen, the folder."""

    def train(channels_last):
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        torch.manual_seed(0)
        model = ResNetForImageClassification(config)
        hf_ortho.convert(model, "hermite_3")
        if channels_last:
            torch.nn.Module.to(model, memory_format=torch.channels_last)
        seen = []
        model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
        act = next(m for m in model.modules() if isinstance(m, hf_ortho.activations.LearnableActivation))
        act.register_forward_hook(lambda module, args, output: seen.extend([*args, output]))
        folder = tmp_path_factory.mktemp("trained")
        # Adam would make steps of full length from gradients that are 0 but for rounding.
        options = {
            "optim": "sgd",
            "max_steps": 3,
            "learning_rate": 0.01,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        arguments = TrainingArguments(folder, per_device_train_batch_size=4, dataloader_pin_memory=False, **options)
        data = Dataset.from_dict({"pixel_values": IMAGES, "labels": [0, 1, 2, 0, 1, 2, 0, 1]}).with_format("torch")
        trainer = ActivationTrainer(model=model, args=arguments, train_dataset=data)
        trainer.channels_last = channels_last
        trainer.train()
        return model, seen, folder

    return train


def test_a_trained_model_is_the_same(trained):
    model, seen, folder = trained(True)
    other, plain, _ = trained(False)
    assert len(seen) == len(plain) == 9
    assert all(map(is_last, seen))
    assert not any(map(is_last, plain))
    parameters = dict(model.named_parameters())
    for name, expected in other.named_parameters():
        found = parameters[name]
        assert is_last(found) == (found.ndim == 4 and min(found.shape[1], found.shape[2]) > 1), name
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # rounding of sums in another order
    saved = load_file(folder / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in parameters.items())


def test_the_command(hf_ortho_command, convnext_folder, tmp_path):
    pytest.importorskip("PIL")
    figures = []
    for name in ("plain", "last"):
        flags = ["--model", convnext_folder, "--dataset", "digits", "--activation", "hermite_3", "--max-steps", 2]
        flags += ["--use-cpu", "--calibration-samples", 0, "--max-train-samples", 32, "--max-eval-samples", 32]
        flags += ["--output-dir", tmp_path / name, *(["--channels-last"] if name == "last" else [])]
        figures.append(hf_ortho_command("finetune", *flags).figures["loss"])
    plain, last = ([float(value) for value in figure[:2]] for figure in figures)
    assert plain == pytest.approx(last, abs=2e-5)


FSDP2 = """
import os, sys
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from hf_ortho.cli import main

torch.set_num_threads(1)
os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
               "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
               "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
assert main([*sys.argv[1:], "--channels-last", "true"]) == 2
assert main([*sys.argv[1:], "--channels-last", "false"]) == 0
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow  # ranks are forked
@pytest.mark.parametrize("activation", ["gelu", "hermite_3"])
def test_without_it_fsdp2_trains_as_one_process(activation, hf_ortho_command, convnext_folder, tmp_path, forked):
    pytest.importorskip("PIL")
    (tmp_path / "worker.py").write_text(FSDP2)
    flags = ["--model", convnext_folder, "--dataset", "digits", "--activation", activation, "--max-steps", 2]
    flags += ["--calibration-samples", 0, "--max-train-samples", 32, "--max-eval-samples", 32, "--learning-rate", 0.01]
    several = ["--per-device-train-batch-size", 4, "--output-dir", tmp_path / "several"]
    printed = forked(2, tmp_path / "worker.py", "finetune", *flags, *several)
    assert printed.count("error: channels_last: not supported by FSDP2 and DeepSpeed; set it to false") == 1
    one = ["--per-device-train-batch-size", 8, "--output-dir", tmp_path / "one", "--use-cpu"]
    assert hf_ortho_command("finetune", *flags, *one).code == 0
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "several"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_language_model_has_no_channels(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    flags = ["--model", gpt2_folder, "--dataset", text_file, "--channels-last", "--use-cpu", "--max-steps", 1]
    ran = hf_ortho_command("finetune", *flags, "--output-dir", tmp_path / "out")
    assert ran.error == "channels_last: needs a model of images, which GPT2LMHeadModel is not"


@pytest.mark.parametrize("engine", ["environment", "arguments", "deepspeed"])
def test_engines_that_flatten_refuse(make_convnext, tmp_path, monkeypatch, engine):
    if engine == "environment":  # as Accelerate launches fsdp2
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    options = {"fsdp": "full_shard", "fsdp_config": {"version": 2}} if engine == "arguments" else {}
    training = TrainingArguments(str(tmp_path), use_cpu=True, **options)
    if engine == "deepspeed":
        training.deepspeed_plugin = object()
    with pytest.raises(ConfigError, match="channels_last: not supported by FSDP2 and DeepSpeed; set it to false"):
        _use_channels_last(make_convnext()[0], training)
