import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from hf_ortho.activations import FAMILIES, build
from hf_ortho.training import ExponentialMovingAverage


def network(name):
    """A regression with a learnable activation from scratch, whose frozen domain is infinite, and a buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), build(f"{name}_3"), nn.Linear(8, 1))
    model[1].domain.requires_grad_(False)
    return model


def steps(model, average, optimizer, count, seed=0):
    """The weights after each of ``count`` steps."""
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(count):
        loss = model(torch.randn(16, 3, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        average.on_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()
        history.append(flat(model))
    return history


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).double()


@pytest.mark.parametrize("name", [*FAMILIES])
def test_average_against_its_sum(name):
    model, average, decay = network(name), ExponentialMovingAverage(0.7), 0.7
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    history = steps(model, average, optimizer, 6)
    # decay^5 of the first, then (1 - decay) decay^k of those from the last backwards.
    shares = [decay**5, *((1 - decay) * decay ** (5 - i) for i in range(1, 6))]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weights for share, weights in zip(shares, history, strict=True))

    with average.applied(optimizer):
        assert (flat(model) - expected).abs().max() < 1e-6
        assert model(torch.zeros(1, 3)).isfinite().all()
        for key in ("1.domain", "1.tail_slopes"):
            if key in state:
                assert torch.equal(model.state_dict()[key], state[key])
    assert torch.equal(flat(model), history[-1])
    average.on_train_end(None, None, None, optimizer=optimizer)
    assert (flat(model) - expected).abs().max() < 1e-6


def test_weights_come_back_after_an_error():
    model, average = network("hermite"), ExponentialMovingAverage(0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (*_, last) = steps(model, average, optimizer, 3)

    def fail():
        with average.applied(optimizer):
            assert not torch.equal(flat(model), last)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(flat(model), last)


def test_without_a_step_nothing_changes():
    model, average = network("hermite"), ExponentialMovingAverage(0.9)
    optimizer, before = torch.optim.AdamW(model.parameters()), flat(model)
    for either in (None, optimizer):
        with average.applied(either):
            assert torch.equal(flat(model), before)


def test_steps_that_the_scaler_skips_are_not_averaged():
    model, average, decay = network("hermite"), ExponentialMovingAverage(0.7), 0.7
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), scaler=scaler)
    history = []
    for factor in (torch.inf, 1.0, 1.0, torch.inf, 1.0):
        scaler.scale(factor * model(torch.ones(4, 3)).square().mean()).backward()
        optimizer.step()
        average.on_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()
        history.append(flat(model))
    assert torch.equal(history[2], history[3])
    expected = decay**2 * history[1] + decay * (1 - decay) * history[2] + (1 - decay) * history[4]
    with average.applied(optimizer):
        assert (flat(model) - expected).abs().max() < 1e-6


def test_the_state_of_the_optimizer_carries_the_average():
    model, average = network("fourier"), ExponentialMovingAverage(0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    steps(model, average, optimizer, 3)
    resumed = network("fourier")
    resumed.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(resumed.parameters(), lr=0.05)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (resumed, other)):
        steps(pair[0], ExponentialMovingAverage(0.9), pair[1], 3, seed=1)
    assert torch.equal(flat(resumed), flat(model))
    with average.applied(optimizer), average.applied(other):
        assert torch.equal(flat(resumed), flat(model))
        averaged = flat(model)
    assert not np.allclose(averaged, flat(model))
