"""Factories of tiny models, with outliers if wanted, and what the tests compare of a model."""

import numpy as np
import pytest
import torch
from transformers import ConvNextConfig, ConvNextForImageClassification, GPT2Config, GPT2LMHeadModel


def build_gpt2(cls=GPT2LMHeadModel, *, scale=1.0, seed=0, **config):
    """``scale`` multiplies the weights in front of the activations; 60 makes them reach +-25."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 97, "n_positions": 32}
    model = cls(GPT2Config(**(sizes | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | config))).eval()
    with torch.no_grad():
        for block in getattr(model, "transformer", model).h:
            block.mlp.c_fc.weight.mul_(scale)
    return model


def build_convnext(*, scale=1.0, seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32, "num_labels": 5}
    # transformers' default of 1e-6 would hide the activations
    model = ConvNextForImageClassification(ConvNextConfig(**(sizes | {"layer_scale_init_value": 1.0} | config))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pwconv1.weight"):
                parameter.mul_(scale)
    return model


@pytest.fixture
def gpt2():
    return build_gpt2


@pytest.fixture
def convnext():
    return build_convnext


@pytest.fixture
def ids():
    return torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pixels():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def state_of():
    def state_of(model):
        """Tensors (by value), modules (by class and mode) and config, for ``==``."""
        return (
            {k: (v.dtype, v.detach().float().numpy().tobytes()) for k, v in model.state_dict().items()},
            {name: (type(module), module.training) for name, module in model.named_modules()},
            {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
            model.config.to_dict(),
        )

    return state_of


@pytest.fixture
def inputs_of():
    @torch.no_grad()
    def inputs_of(model, names, *batches):
        """Every value that reached the modules ``names``, as float64 vectors."""
        seen = {name: [] for name in names}
        handles = [
            model.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0].flatten()))
            for n in names
        ]
        for batch in batches:
            model(**batch)
        for handle in handles:
            handle.remove()
        return {name: np.concatenate([v.double().numpy() for v in values]) for name, values in seen.items()}

    return inputs_of


@pytest.fixture
def relative_error():
    def relative_error(found, expected):
        return float((found.double() - expected.double()).norm() / expected.double().norm())

    return relative_error


@pytest.fixture
def aligned():
    """Copy the tensors of a loaded model into memory of their own.

    Weights mapped from a file are aligned differently, and a matrix-vector product adds in another order then.
    """

    def aligned(model):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return model

    return aligned
