"""``torch.export``: the graphs of converted models give the same logits at another batch size."""

import pytest
import torch

import hf_ortho
from hf_ortho.activations import FAMILIES

CASES = [*(("convnext", family) for family in FAMILIES), ("gpt2", "hermite")]


@pytest.fixture
def case(architecture, gpt2, convnext, ids, pixels):
    """(model with outliers, name of its input, inputs)."""
    if architecture == "gpt2":
        return gpt2(scale=60, n_layer=1, use_cache=False), "input_ids", ids
    sizes = {"num_stages": 1, "hidden_sizes": [8], "depths": [1], "initializer_range": 0.2}
    return convnext(scale=4, **sizes), "pixel_values", pixels


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_channels_with_a_free_batch_size(family):
    module = hf_ortho.activations.build(f"{family}_3_g4")
    module.fit("gelu")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter += torch.linspace(-0.1, 0.1, 4)[:, None]
    x = 3 * torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(module, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    parts = [member(part) for member, part in zip(module.members(), x.split(2, dim=-1), strict=True)]
    torch.testing.assert_close(program.module()(x), torch.cat(parts, dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "family"), CASES)
def test_same_logits_as_the_module(family, case):
    model, name, inputs = case
    with torch.no_grad():
        original = model(**{name: inputs}).logits
        hf_ortho.convert(model, f"{family}_2")
        expected = model(**{name: inputs}).logits
    assert (expected - original).abs().max() > 1e-4  # the graphs are of the new activations

    dynamic = {name: {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (), {name: inputs[:2]}, dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(**{name: inputs}).logits, expected, rtol=0, atol=1e-5)
