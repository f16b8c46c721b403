"""What the tests of adapters share."""

import pytest
import torch


@pytest.fixture(scope="session")
def ids():
    """Token ids for the tiny GPT-2."""
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def logits(ids):
    """``logits(model)`` in evaluation mode."""

    def of(model):
        with torch.no_grad():
            return model.eval()(ids).logits

    return of


@pytest.fixture(scope="session")
def nudge():
    """``nudge(model)`` moves every trainable parameter a little, as a training would."""

    def move(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model

    return move
