"""Models with groups of channels: stored, read back, refitted from one group, and reverted."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

import hf_ortho
from hf_ortho.activations import FAMILIES, LearnableActivation, build
from hf_ortho.checkpoints.activations import load_activations
from hf_ortho.checkpoints.values import check_values
from hf_ortho.errors import CheckpointError

PATHS = ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]


def vary(model):
    """Give each group parameters and a domain of its own."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LearnableActivation):
                for parameter in module.parameters():
                    if parameter.ndim == 2:
                        parameter += torch.linspace(-0.02, 0.02, module.groups)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_with_groups_starts_exact_and_can_be_reverted(gpt2, ids, family):
    model = gpt2(scale=20)
    with torch.no_grad():
        original = model(ids).logits
        hf_ortho.convert(model, f"{family}_3", calibration=[ids])
        one = [module.state_dict() for module in map(model.get_submodule, PATHS)]
        report = hf_ortho.convert(model, f"{family}_3_g8", calibration=[ids])
    assert report.activation == model.config.activation_function == f"{family}_3_g8"
    for path, expected in zip(PATHS, one, strict=True):
        for key, value in model.get_submodule(path).state_dict().items():
            assert torch.equal(value, expected[key].expand(value.shape)), key
    assert max(layer.fit.sup_error for layer in report.layers) < 1e-12  # float64 of equal parameters
    assert hf_ortho.revert(model) == PATHS
    assert model.config.activation_function == "gelu_new"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original)


@pytest.mark.parametrize("name", [*(f"{family}_4_g8" for family in FAMILIES), "hermite_3_g12"])
def test_the_groups_are_read_back(gpt2, ids, tmp_path, name):
    """``hermite_3_g12`` is not a listed name: ``ACT2FN`` makes it on demand."""
    model = gpt2(n_embd=24)
    hf_ortho.convert(model, name)
    vary(model)
    model.save_pretrained(tmp_path)
    stored = load_activations(str(tmp_path)).modules
    reloaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    for path in PATHS:
        expected = model.get_submodule(path).state_dict()
        assert stored[path].name == name
        for found in (stored[path], reloaded.get_submodule(path)):
            assert found.state_dict().keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)


BAD = {
    "another number of groups": ("coefficients", lambda t: t[:3], r"coefficients \[3, 5\].*match none of the families"),
    "no group": ("domain", lambda t: t[:0], r"domain \[0, 2\].*match none of the families"),
    "one group": ("domain", lambda t: t[:1], r"domain \[1, 2\].*match none of the families"),
    "more dimensions": ("domain", lambda t: t[None], r"domain \[1, 4, 2\].*match none of the families"),
    "reversed": (
        "domain",
        lambda t: torch.cat([t[:2], t[2:].flip(1)]),
        r"domain is \[.*expected an interval",
    ),
    "not finite": ("coefficients", lambda t: t / 0, r"coefficients is \[.*expected finite numbers"),
}


@pytest.mark.parametrize(("key", "change", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(gpt2, tmp_path, key, change, message):
    model = gpt2()
    hf_ortho.convert(model, "hermite_4_g4")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"{PATHS[1]}.{key}"
    save_file(tensors | {name: change(tensors[name]).contiguous()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_activations(str(tmp_path))


@pytest.mark.parametrize("shape", [(0,), (3,), (4, 3), (2, 2, 2)])
def test_shapes_that_are_no_domain(shape):
    tensors = build("hermite_2").state_dict() | {"domain": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r"here: domain is .*; expected an interval"):
        check_values(tensors, "here")
