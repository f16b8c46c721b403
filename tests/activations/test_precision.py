"""Dtypes, copies, and the transforms of torch: autocast, vmap, jvp; tests/kernels/test_dispatch.py compiles."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_ortho.activations import FAMILIES, build

LOW = {"bf16": lambda m: m.to(torch.bfloat16), "half": lambda m: m.half(), "to-f16": lambda m: m.to("cpu", torch.half)}


@pytest.fixture(params=[f"{family}_{n}" for family in FAMILIES for n in (3, 9)])
def module(request, randomized):
    return randomized(request.param, (-1.5, 1.8)).float()


@pytest.fixture
def x():
    return 2 * torch.randn(64, generator=torch.Generator().manual_seed(2))


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("cast", LOW.values(), ids=LOW)
def test_parameters_stay_float32_in_low_precision_models(cast, module, x):
    before = copy.deepcopy(module)
    module(x).sum().backward()
    model = cast(nn.Sequential(nn.Linear(2, 2), module))
    assert model[0].weight.dtype in (torch.bfloat16, torch.float16)
    assert states_equal(model[1], before)
    assert {p.grad.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert not module.domain.requires_grad


def test_double_makes_the_parameters_float64_and_float_returns_them(module):
    before = copy.deepcopy(module)
    assert {v.dtype for v in module.double().state_dict().values()} == {torch.float64}
    assert states_equal(module.float(), before)


@pytest.mark.parametrize("double", [False, True])
def test_the_output_has_the_dtype_of_the_input(double, module, x):
    module = module.double() if double else module
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        data = x.to(dtype, copy=True).requires_grad_()
        y = module(data)
        y.sum().backward()
        assert y.dtype == module.derivative(data).dtype == data.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_output_is_the_float32_result_rounded(dtype, module, x):
    x = x.to(dtype)
    assert torch.equal(module(x), module(x.float()).to(dtype))
    assert torch.equal(module.derivative(x), module.derivative(x.float()).to(dtype))


def test_autocast_changes_nothing(module, x):
    for data in (x, x.bfloat16()):
        expected = module(data), module.derivative(data)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(data), expected[0])
            assert torch.equal(module.derivative(data), expected[1])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(clone, module, x):
    twin = clone(module)
    assert states_equal(twin, module)
    assert torch.equal(twin(x), module(x))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in module.parameters()]
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert not torch.equal(twin(x), module(x))


def test_state_dict_round_trip(module, x):
    fresh = build(module.name)
    assert not states_equal(fresh, module)
    fresh.load_state_dict(module.state_dict())
    assert states_equal(fresh, module)
    assert torch.equal(fresh(x), module(x))


def test_state_dict_holds_float32_vectors_only(module):
    state = module.state_dict()
    assert state.keys() == {name for name, _ in module.named_parameters()}  # some loaders accept no buffers
    assert all(v.dtype == torch.float32 and v.ndim == 1 for v in state.values())  # FSDP refuses 0-d parameters


def test_reset_parameters_restores_the_initial_values(module):
    assert not states_equal(module, build(module.name))
    module.reset_parameters()
    assert states_equal(module, build(module.name))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own import
def test_vmap_and_jvp(module, x):
    rows = x.reshape(4, 16)
    torch.testing.assert_close(torch.func.vmap(module)(rows), module(rows))
    value, tangent = torch.func.jvp(module, (x,), (torch.full_like(x, 2.0),))
    torch.testing.assert_close(value, module(x))
    torch.testing.assert_close(tangent, 2.0 * module.derivative(x))


def test_per_sample_gradients(module, x):
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    rows = x.reshape(4, 16)
    batched = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, rows)
    for i, row in enumerate(rows):
        single = torch.func.grad(loss)(parameters, row)
        for key in parameters:
            torch.testing.assert_close(batched[key][i], single[key])
