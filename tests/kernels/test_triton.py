"""The Triton kernels, in Triton's interpreter against float64 autograd of the plain formula."""

import concurrent.futures
import itertools
import multiprocessing
import os

import interpreted
import numpy as np
import pytest
import torch
from packaging.version import Version

from hf_ortho.activations import FAMILIES, build
from hf_ortho.activations.base import SHARED
from hf_ortho.errors import WidthError

triton = pytest.importorskip("triton")  # on Linux only

WITH_TRITON = [family for family, cls in FAMILIES.items() if cls.triton]
DOMAIN, TAIL_SLOPES = (-1.5, 1.75), (0.25, 1.25)


@pytest.fixture(scope="module")
def interpreter():
    """``interpreter(function, ...)`` calls a function of ``interpreted`` in the interpreter's process."""
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("Triton's interpreter before 3.7 cannot run loops with numpy 2.4")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as process, pytest.MonkeyPatch.context() as environment:
        environment.setitem(os.environ, "TRITON_INTERPRET", "1")
        process.submit(int).result()  # starts it
        environment.undo()
        yield lambda function, *args, **options: process.submit(function, *args, **options).result()


def random_module(name, domain=DOMAIN, tail_slopes=TAIL_SLOPES):
    """A float64 module whose values float32 holds exactly, without ties."""
    module = build(name).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in family_parameters(module):
            value += 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.copy_(value.float())
        module.domain.copy_(torch.tensor(domain))
        if module.groups > 1:
            module.domain *= 1 + torch.arange(module.groups)[:, None] / 8
        module.tail_slopes.copy_(torch.tensor(tail_slopes))
    module.domain.requires_grad_()
    return module


def family_parameters(module):
    return [value for key, value in module.named_parameters() if key not in SHARED]


def arguments(module, dtype=torch.float32):
    parameters = [v.detach().to(dtype) for v in family_parameters(module)]
    return parameters, module.domain.detach().to(dtype), module.tail_slopes.to(dtype)


def normal(*shape, seed=1, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def autograd(module, x, g):
    """The plain formula's value and gradients, in float64, named as ``interpreted.evaluate`` names them."""
    x = x.detach().double().requires_grad_()
    y = module(x)
    parameters = family_parameters(module)
    leaves = {"x": x} | {f"parameters.{i}": v for i, v in enumerate(parameters)} | {"domain": module.domain}
    gradients = torch.autograd.grad(y, list(leaves.values()), g.double())
    return y.detach(), dict(zip(leaves, gradients, strict=True))


def assert_close(ours, theirs, tolerance):
    """Elements differ by ``tolerance`` of the largest."""
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("degree", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8, 12))])
@pytest.mark.parametrize("family", WITH_TRITON)
def test_value_and_gradients_follow_the_formula(interpreter, family, degree):
    module = random_module(f"{family}_{degree}")
    x, g = normal(1101, scale=2.0), normal(1101, seed=2)
    y, gradients = interpreter(interpreted.evaluate, family, x, g, *arguments(module), programs=1)
    expected, theirs = autograd(module, x, g)
    assert_close(y, expected, 1e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, theirs[name], 4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_TRITON)
def test_the_highest_degree_takes_several_passes(interpreter, family):
    module = random_module(f"{family}_32")
    x, g = normal(57, scale=2.0), normal(57, seed=2)
    y, gradients = interpreter(interpreted.evaluate, family, x, g, *arguments(module))
    expected, theirs = autograd(module, x, g)
    assert_close(y, expected, 4e-6)
    for name, gradient in gradients.items():
        assert_close(gradient, theirs[name], 4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", WITH_TRITON)
def test_half_precision_is_the_float32_result_rounded(interpreter, family, dtype):
    module = random_module(f"{family}_4")
    x, g = normal(301, scale=2.0).to(dtype), normal(301, seed=2).to(dtype)
    y, gradients = interpreter(interpreted.evaluate, family, x, g, *arguments(module))
    expected, theirs = autograd(module, x, g)
    rounding = torch.finfo(dtype).eps
    if dtype == torch.float16:  # the interpreter truncates to bfloat16, a GPU rounds
        rounding /= 2
    for ours, exact in ((y, expected), (gradients.pop("x"), theirs["x"])):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=1.01 * rounding, atol=2e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, theirs[name], 4e-6)


@pytest.mark.parametrize("family", WITH_TRITON)
def test_without_domain_and_float64_parameters(interpreter, family):
    module = random_module(f"{family}_5", (-torch.inf, torch.inf), (0.0, 0.0))
    x, g = normal(100), normal(100, seed=2)
    y, gradients = interpreter(interpreted.evaluate, family, x, g, *arguments(module, torch.float64))
    expected, theirs = autograd(module, x, g)
    assert_close(y, expected, 1e-6)
    assert gradients["domain"].tolist() == [0.0, 0.0]
    for name in theirs.keys() - {"domain"}:
        assert gradients[name].dtype == (torch.float32 if name == "x" else torch.float64)
        assert_close(gradients[name], theirs[name], 4e-6)


LAYOUTS = {
    "empty": torch.empty(0, 3),
    "one": torch.tensor(0.5),
    "channels_last": normal(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": normal(3, 4, 5).transpose(0, 2),
    "strided": normal(3, 8)[:, ::2],
    "expanded": normal(1, 4).expand(3, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("family", WITH_TRITON)
def test_layouts(interpreter, family, x):
    module = random_module(f"{family}_2")
    g = torch.tensor(0.75).expand_as(x)
    y, gradients = interpreter(interpreted.evaluate, family, x, g, *arguments(module))
    expected, theirs = autograd(module, x, g)
    assert y.stride() == gradients["x"].stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), theirs[name], rtol=4e-6, atol=4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["x", "parameters", "parameters.0", "domain"])
@pytest.mark.parametrize("family", WITH_TRITON)
def test_gradients_only_where_asked_for(interpreter, family, wanted):
    module = random_module(f"{family}_2")
    x, g = normal(33, scale=2.0), normal(33, seed=2)
    complete = interpreter(interpreted.evaluate, family, x, g, *arguments(module))[1]
    gradients = interpreter(interpreted.evaluate, family, x, g, *arguments(module), wanted=(wanted,))[1]
    for name, gradient in gradients.items():
        if wanted in (name, name.partition(".")[0]):
            assert torch.equal(gradient, complete[name])
        else:
            assert gradient is None


@pytest.mark.parametrize("family", WITH_TRITON)
def test_nan_and_infinity(interpreter, family):
    module = random_module(f"{family}_3", tail_slopes=(0.0, 1.0))
    lo, hi = DOMAIN
    x = torch.tensor([torch.nan, -torch.inf, torch.inf, 3e38, -3e38])
    y, gradients = interpreter(interpreted.evaluate, family, x, torch.ones(5), *arguments(module), wanted=("x",))
    with torch.no_grad():
        at_lo, at_hi = module(torch.tensor([lo, hi], dtype=torch.float64))
    assert y[0].isnan()
    assert_close(y[[1, 4]], at_lo.expand(2), 1e-6)
    assert y[2] == torch.inf
    assert y[3].item() == pytest.approx(at_hi.item() + 3e38 - hi, rel=1e-6)
    assert gradients["x"][1:].tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("family", WITH_TRITON)
def test_nan_without_domain(interpreter, family):
    module = random_module(f"{family}_9", (-torch.inf, torch.inf), (0.0, 0.0))
    x = torch.tensor([torch.nan, 0.5])
    y, _ = interpreter(interpreted.evaluate, family, x, torch.ones(2), *arguments(module), wanted=())
    assert y.isnan().tolist() == [True, False]


def test_parameters_of_any_stride(interpreter):
    module = random_module("hermite_3")
    x, g = normal(33, scale=2.0), normal(33, seed=2)
    expected = interpreter(interpreted.evaluate, "hermite", x, g, *arguments(module))
    spread = [
        [torch.stack([p, p + 1], 1)[:, 0] for p in group] for group in ([*arguments(module)[0]], arguments(module)[1:])
    ]
    y, gradients = interpreter(interpreted.evaluate, "hermite", x, g, spread[0], *spread[1])
    assert torch.equal(y, expected[0])
    assert all(torch.equal(gradients[key], value) for key, value in expected[1].items())


def test_ties_go_to_the_first_line(interpreter):
    module = build("tropical_3").double()  # all four lines meet at 0
    x, g = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 10.0, 100.0])
    _, gradients = interpreter(interpreted.evaluate, "tropical", x, g, *arguments(module))
    scale = 2**0.5 / 3
    assert gradients["parameters.0"].tolist() == pytest.approx([11 * scale, 0.0, 0.0, 100 * scale])
    assert gradients["x"].tolist() == pytest.approx([0.0, 0.0, 100 * 3 * scale])


def test_cosines_of_large_arguments(interpreter):
    """w x up to 1e4 rad: x and w are exact, so the error must stay that of float32 arithmetic near 0."""
    module = random_module("fourier_6", (-torch.inf, torch.inf), (0.0, 0.0))
    x = torch.linspace(-1800.0, 1800.0, 999)
    g = normal(999, seed=2)
    y, gradients = interpreter(interpreted.evaluate_with_exact_fma, "fourier", x, g, *arguments(module))
    assert 1e4 < (module.frequencies.max() * x.max()).item() < 1.3e4
    expected, theirs = autograd(module, x, g)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients["x"].double(), theirs["x"], rtol=0, atol=4e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "shape"), [("", (7, 43)), ("_g3", (2, 7, 15))], ids=["without groups", "3 groups"])
@pytest.mark.parametrize("family", WITH_TRITON)
def test_a_compiler_calls_the_kernels(interpreter, family, groups, shape):
    module = random_module(f"{family}_3{groups}")
    x, g = normal(*shape, scale=2.0), normal(*shape, seed=2)
    y, gradients, launches = interpreter(interpreted.evaluate_compiled, family, x, g, *arguments(module))
    assert launches == 1
    expected, theirs = autograd(module, x, g)
    assert_close(y, expected, 1e-6)
    for name, gradient in gradients.items():
        assert_close(gradient, theirs[name], 4e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "gradients"),  # tropical_rational has four parameters
    [("hermite", list(itertools.product((True, False), repeat=3))), ("tropical_rational", [(True, True, True)])],
    ids=["hermite", "tropical_rational"],
)
def test_the_operator_is_registered_completely(interpreter, family, gradients):
    tensors = arguments(random_module(f"{family}_2"))
    results = interpreter(interpreted.check_registration, family, normal(5), *tensors, gradients)
    assert set(results) == {"SUCCESS"}


def test_the_probe_runs(interpreter):
    assert interpreter(interpreted.copied, 0.75) == 0.75


# ---- Groups of channels ------------------------------------------------------------------------------------------


def assert_groups_follow_the_formula(interpreter, name, x, g, tolerance, programs):
    module = random_module(name)
    y, gradients = interpreter(interpreted.evaluate, module.family, x, g, *arguments(module), programs=programs)
    expected, theirs = autograd(module, x, g)
    assert_close(y, expected, tolerance)
    for key, gradient in gradients.items():
        assert gradient.shape == theirs[key].shape
        assert_close(gradient, theirs[key], 4e-6)


# One channel, loads of 1, 4 and 8 elements; one, several and fewer programs than groups.
@pytest.mark.parametrize(
    ("rows", "groups", "width", "programs"),
    [
        (513, 2, 5, 4),
        (33, 2, 24, 1024),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1101, 2, 1, 4), (33, 4, 16, 1), (3, 9, 2, 4))),
    ],
)
def test_groups_follow_the_formula(interpreter, rows, groups, width, programs):
    x, g = normal(rows, groups * width, scale=2.0), normal(rows, groups * width, seed=2)
    assert_groups_follow_the_formula(interpreter, f"hermite_3_g{groups}", x, g, 1e-6, programs)


@pytest.mark.parametrize("degree", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 13, 32))])
@pytest.mark.parametrize("family", WITH_TRITON)
def test_groups_of_every_family(interpreter, family, degree):
    x, g = normal(2, 7, 3 * 4, scale=2.0), normal(2, 7, 3 * 4, seed=2)
    assert_groups_follow_the_formula(interpreter, f"{family}_{degree}_g3", x, g, 4e-6, 1024)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))],
    ids=str,
)
@pytest.mark.parametrize("family", WITH_TRITON)
def test_a_group_is_like_its_own_activation(interpreter, family, dtype):
    module = random_module(f"{family}_2_g2")
    x, g = normal(41, 2 * 8, scale=2.0).to(dtype), normal(41, 2 * 8, seed=2).to(dtype)
    y, gradients = interpreter(interpreted.evaluate, family, x, g, *arguments(module))
    for i, member in enumerate(module.members()):
        of_group = slice(8 * i, 8 * i + 8)
        tensors = x[:, of_group].contiguous(), g[:, of_group].contiguous(), *arguments(member)
        alone, gradients_alone = interpreter(interpreted.evaluate, family, *tensors)
        assert torch.equal(y[:, of_group], alone)
        assert torch.equal(gradients["x"][:, of_group], gradients_alone["x"])
        for key in gradients.keys() - {"x"}:
            torch.testing.assert_close(gradients[key][i], gradients_alone[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "contiguous"),
    [
        (torch.empty(0, 3, 4), True),
        (normal(4), True),
        (normal(3, 5, 4).transpose(0, 1), False),
        (normal(4, 5, 3).transpose(0, 2), True),
        (normal(3, 8)[:, ::2], True),
        (normal(1, 4).expand(3, 4), True),
    ],
    ids=["empty", "one_row", "rows_transposed", "channels_transposed", "strided", "expanded"],
)
def test_layouts_with_groups(interpreter, x, contiguous):
    module = random_module("tropical_2_g2")
    g = torch.tensor(0.75).expand_as(x)
    y, gradients = interpreter(interpreted.evaluate, "tropical", x, g, *arguments(module))
    expected, theirs = autograd(module, x, g)
    assert y.stride() == (x.contiguous().stride() if contiguous else x.stride())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), theirs[name], rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize(
    "wanted", ["parameters", *(pytest.param(name, marks=pytest.mark.slow) for name in ("x", "parameters.1", "domain"))]
)
def test_gradients_of_groups_only_where_asked_for(interpreter, wanted):
    module = random_module("fourier_2_g3")
    x, g = normal(11, 6, scale=2.0), normal(11, 6, seed=2)
    complete = interpreter(interpreted.evaluate, "fourier", x, g, *arguments(module))[1]
    gradients = interpreter(interpreted.evaluate, "fourier", x, g, *arguments(module), wanted=(wanted,))[1]
    for name, gradient in gradients.items():
        if wanted in (name, name.partition(".")[0]):
            assert torch.equal(gradient, complete[name])
        else:
            assert gradient is None


def test_the_width_must_be_a_multiple_of_the_groups():
    from hf_ortho.kernels import triton as kernels

    module = random_module("hermite_3_g4")
    with pytest.raises(WidthError, match=r"\[5, 6\] cannot be split into 4 groups"):
        kernels.forward(type(module), normal(5, 6), *arguments(module))


@pytest.mark.slow
@pytest.mark.parametrize("x", [normal(5, 6), normal(6, 5).T], ids=["contiguous", "transposed"])
def test_the_operator_is_registered_for_groups(interpreter, x):
    tensors = arguments(random_module("hermite_2_g3"))
    gradients = list(itertools.product((True, False), repeat=3))
    results = interpreter(interpreted.check_registration, "hermite", x, *tensors, gradients)
    assert set(results) == {"SUCCESS"}
