"""Activations with groups of channels: the CPU kernels and the compiled gradients against float64 autograd of the
formula, and against the kernels without groups on the channels of each group."""

import pytest
import torch

from hf_ortho.activations import FAMILIES, LearnableActivation, build
from hf_ortho.activations.base import SHARED
from hf_ortho.errors import WidthError
from hf_ortho.kernels import cpu, dispatch

INF = float("inf")
# Both classes of Hermite series, and those of the other families.
NAMES = [f"{family}_{degree}" for family, cls in FAMILIES.items() if cls.cpu_rows for degree in (1, 3, 9)]
ONE_OF_EACH = ["hermite_3", "tropical_rational_3"]
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch itself
DOMAINS = {"pure": None, "tails": (-1.5, 1.8), "one-tail": (-1.5, INF)}
PRECISION = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (2e-6, 5e-6),
    torch.bfloat16: (2**-8, 5e-6),  # the sums are taken in float32
    torch.float16: (2**-11, 5e-6),
}


@pytest.fixture
def make(randomized):
    """``make(name, groups, domain, dtype)``, with a domain of its own for each group."""

    def build_random(name, groups, domain=DOMAINS["tails"], dtype=torch.float32):
        module = randomized(f"{name}_g{groups}", domain)
        with torch.no_grad():
            module.domain += torch.linspace(-0.2, 0.2, groups, dtype=torch.float64)[:, None]
        return module if dtype == torch.float64 else module.float()

    return build_random


def data(*shape, dtype=torch.float32):
    """Pre-activations on both sides of the domain, and gradients whose sums do not cancel."""
    generator = torch.Generator().manual_seed(1)
    x = 1.5 * torch.randn(shape, generator=generator)
    return x.to(dtype), (1 + 0.5 * torch.randn(shape, generator=generator)).to(dtype)


@pytest.fixture(params=DOMAINS)
def domain(request):
    return DOMAINS[request.param]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(name, domain, dtype, make, measured, reference, assert_near, small_chunks):
    """One channel per group, several, more channels than a chunk has elements, and one small chunk."""
    for groups, shape in ((6, (7, 11, 6)), (3, (41, 12)), (2, (3, 140)), (2, (5, 8)), (2, (4,))):
        module = make(name, groups, domain, dtype)
        x, g = data(*shape, dtype=dtype)
        found = measured(module, x, g)
        assert found[0].dtype == found[1]["x"].dtype == dtype
        assert_near(found, reference(module, x, g), *PRECISION[dtype])


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(name, domain, dtype, make, measured, reference, assert_near, small_chunks):
    module = make(name, 3, domain)
    x, g = data(41, 12, dtype=dtype)
    assert_near(measured(module, x, g), reference(module, x, g), *PRECISION[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_each_group_is_the_activation_of_its_channels(name, domain, make, measured, small_chunks):
    module = make(name, 3, domain)
    x, g = data(41, 12)
    y, gradients = measured(module, x, g)
    for i, member in enumerate(module.members()):
        channels = slice(4 * i, 4 * i + 4)
        alone, expected = measured(member, x[:, channels], g[:, channels])
        torch.testing.assert_close(y[:, channels], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients["x"][:, channels], expected.pop("x"), rtol=1e-5, atol=1e-5)
        for key, value in expected.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(gradients[key][i], value, rtol=1e-5, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_strides(name, make, measured, reference, assert_near, small_chunks):
    module = make(name, 3)
    x, g = data(6, 5, 12)
    images = torch.randn(2, 12, 3, 5).to(memory_format=torch.channels_last)
    for view in (x[::2], x.transpose(0, 1), x[..., :6], x[:, :1].expand(6, 5, 12), images.permute(0, 2, 3, 1), x[:0]):
        upstream = g.flatten()[: view.numel()].view(view.shape)
        assert_near(measured(module, view, upstream), reference(module, view, upstream), *PRECISION[torch.float32])


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_where_it_is(name, domain, make, small_chunks):
    module = make(name, 3, domain)
    x, g = data(30, 12)
    clean = x.clone()
    clean[[2, 20], [3, 7]] = float("nan")
    found, expected = clean.requires_grad_(), x.requires_grad_()
    y = module(found)
    assert y.isnan().nonzero().tolist() == [[2, 3], [20, 7]]
    y.backward(g)
    module(expected).backward(g)
    finite = ~y.isnan()
    assert torch.equal(found.grad[finite], expected.grad[finite])


@pytest.mark.parametrize("name", NAMES)
def test_infinite_inputs_run_along_the_tails(name, make, measured, small_chunks):
    module = make(name, 2)
    x, g = data(30, 8)
    x[3], x[4] = INF, -INF
    y, gradients = measured(module, x, g)
    for i, member in enumerate(module.members()):
        alone, expected = measured(member, x[:, 4 * i : 4 * i + 4], g[:, 4 * i : 4 * i + 4])
        torch.testing.assert_close(y[:, 4 * i : 4 * i + 4], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients["x"][:, 4 * i : 4 * i + 4], expected["x"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients["domain"][i], expected["domain"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_is_not_finite_leaves_the_others_alone(name, make):
    module = make(name, 3)
    x, _ = data(10, 12)
    expected = module(x)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if key not in SHARED:
                p[1, -1] = float("nan")
    y = module(x)
    assert y[:, 4:8].isnan().all()
    assert torch.equal(y[:, :4], expected[:, :4])
    assert torch.equal(y[:, 8:], expected[:, 8:])


@pytest.mark.parametrize("family", ["tropical", "tropical_rational"])
def test_lines_below_the_envelope_of_some_groups(family, make, measured, reference, small_chunks):
    """Lines that are switched off or equal to others in one group and not in the next."""
    module = make(f"{family}_4", 3)
    x, g = data(30, 12)
    key, p = next((k, p) for k, p in module.named_parameters() if k in ("coefficients", "numerator_intercepts"))
    with torch.no_grad():
        p[0, 2] = p[1, 0] = p[1, 4] = -INF
        p[2, 1] = -9.0
    (y, gradients), (exact, expected) = measured(module, x, g), reference(module, x, g)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    assert gradients[key][0, 2] == gradients[key][1, 0] == gradients[key][1, 4] == gradients[key][2, 1] == 0.0
    for name, value in gradients.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_any_number_of_threads_gives_the_same_bits(name, make, measured, small_chunks):
    module = make(name, 3)
    x, g = data(100, 12, dtype=torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(measured(module, x, g))
    finally:
        torch.set_num_threads(before)
    for y, gradients in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(torch.equal(gradients[key], value) for key, value in results[0][1].items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_x_is_kept_for_the_backward_pass(name, dtype, make):
    module = make(name, 3)
    x = data(40, 12, dtype=dtype)[0].requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    small = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert {k: v for k, v in kept.items() if k not in small} == {x.data_ptr(): x.nbytes}


@pytest.mark.parametrize("compiles", [False, True])
def test_a_width_that_the_groups_do_not_divide(compiles, make):
    module = make("hermite_3", 3)
    run = torch.compile(module, backend="eager") if compiles else module
    for shape in ((4, 10), (4, 0), ()):
        with pytest.raises(WidthError, match="3 groups"):
            run(torch.zeros(shape, requires_grad=True))


class Squared(LearnableActivation):
    """S(x) = a x^2, without kernels."""

    family = "squared"
    default_degree = 1

    @classmethod
    def initial_parameters(cls, degree, init):
        return {"a": [0.7]}

    @staticmethod
    def series(x, a):
        return a[0] * x * x

    @staticmethod
    def series_derivative(x, a):
        return 2 * a[0] * x


def test_a_family_without_kernels(measured, reference, assert_near):
    module = Squared(groups=2)
    x, g = data(10, 6)
    assert dispatch._backend(Squared, x, True) is None
    assert_near(measured(module, x, g), reference(module, x, g), *PRECISION[torch.float32])


@pytest.mark.parametrize("name", NAMES)
def test_compiled_gradients_in_float64(name, domain, make, reference, assert_near):
    """What the compiler differentiates, run uncompiled."""
    module = make(name, 3, domain, torch.float64)
    x, g = data(5, 7, 12, dtype=torch.float64)
    module.domain.requires_grad_()
    wanted = {"x": x.requires_grad_(), "domain": module.domain}
    wanted |= {key: p for key, p in module.named_parameters() if key not in SHARED}
    y = dispatch._Compiled.apply(type(module), False, x, *module._tensors())
    gradients = dict(zip(wanted, torch.autograd.grad(y, wanted.values(), g), strict=True))
    assert_near((y.detach(), gradients), reference(module, x, g), 1e-12, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"{family}_3" for family in FAMILIES), "hermite_9"])
def test_compiled_with_any_size(name, make, measured, assert_near):
    """Inductor compiles C++."""
    torch._dynamo.reset()
    module = make(name, 4)
    module.domain.requires_grad_()
    fn = torch.compile(module, fullgraph=True, dynamic=True)
    for rows in (40, 33):
        x, g = data(rows, 16)
        y, expected = measured(module, x, g)
        wanted = {"x": x.requires_grad_(), "domain": module.domain}
        wanted |= {key: p for key, p in module.named_parameters() if key not in SHARED}
        found = fn(x)
        torch.testing.assert_close(found.detach(), y, rtol=1e-4, atol=2e-5)
        for (key, value), ours in zip(expected.items(), torch.autograd.grad(found, wanted.values(), g), strict=True):
            scale = value.abs().max().item()
            torch.testing.assert_close(ours, value, rtol=1e-4, atol=2e-5 * max(scale, 1.0), msg=key)


def test_chunks_cover_large_tensors(make, measured, reference, assert_near):
    module = make("hermite_3", 16)
    x, g = data(2 * cpu.CHUNK // 48 + 3, 48)
    assert_near(measured(module, x, g), reference(module, x, g), 2e-6, 5e-6)


def test_groups_that_are_equal_are_the_activation_without_groups():
    module, whole = build("hermite_8_g4"), build("hermite_8")
    x, _ = data(30, 8)
    assert torch.equal(module(x), whole(x))
