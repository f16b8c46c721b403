"""Where a kernel would be wrong the formula takes its place, and both give the same."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hf_ortho.activations import FAMILIES, build
from hf_ortho.activations.fourier import compiled
from hf_ortho.kernels import cpu, dispatch


def names(has=lambda cls: True):
    return [f"{family}_{degree}" for family, cls in FAMILIES.items() if has(cls) for degree in (3, 9)]


def and_groups(found):
    return [*found, *(f"{name}_g2" for name in found)]


with_cpu_series = pytest.mark.parametrize("module", and_groups(names(lambda cls: cls.cpu_series)), indirect=True)
with_compiled = pytest.mark.parametrize("module", and_groups(names(lambda cls: cls.compiled)), indirect=True)
TAILS = (-1.5, 1.8)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own imports, and its tracer


@pytest.fixture(params=names())
def module(request, randomized):
    return randomized(request.param, TAILS)


@pytest.fixture
def x():
    return 1.5 * torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def kernels_used(monkeypatch):
    """Counts the calls of the CPU kernels."""
    calls = []
    for name in ("forward", "backward"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, kernel=kernel, name=name: (calls.append(name), kernel(*a))[1])
    return calls


def parameters_of(module):
    return {key: p for key, p in module.named_parameters() if p.requires_grad}


@with_cpu_series
def test_kernels_serve_plain_calls(module, x, kernels_used):
    module(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        module(x)
    assert kernels_used == ["forward", "backward", "forward"]


@with_cpu_series
def test_double_backward(module, x, kernels_used):
    module.domain.requires_grad_()
    tensors = x[:6].requires_grad_(), *module._tensors()
    tensors = [t.detach().requires_grad_(t is not module.tail_slopes) for t in tensors]
    run = lambda *t: dispatch.activation(type(module), *t)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, tensors)
    assert torch.autograd.gradcheck(run, tensors)
    assert "backward" in kernels_used


def test_a_gradient_penalty_reaches_the_parameters(module, x):
    x.requires_grad_()
    parameters = list(parameters_of(module).values())
    results = []
    for fn in (module, lambda x: type(module).formula(x, *module._tensors())):
        (slope,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((slope.square() * fn(x)).sum(), [x, *parameters]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_functorch(module, x, kernels_used):
    slope = module.derivative(x).detach()
    torch.testing.assert_close(vmap(grad(lambda t: module(t)))(x), slope)
    torch.testing.assert_close(jacrev(module)(x), torch.diag(slope))
    torch.testing.assert_close(jvp(module, (x,), (torch.ones_like(x),))[1], slope)
    curvature = vmap(hessian(lambda t: module(t)))(x)
    torch.testing.assert_close(curvature, vmap(grad(grad(lambda t: module(t))))(x))
    assert not kernels_used


def test_batched_gradients(module, x):
    slope = module.derivative(x).detach()
    y = module(x.requires_grad_())
    (rows,) = torch.autograd.grad(y, x, torch.eye(len(x), dtype=x.dtype), is_grads_batched=True)
    torch.testing.assert_close(rows, torch.diag(slope))
    jacobian = torch.autograd.functional.jacobian(module, x, vectorize=True)
    torch.testing.assert_close(jacobian, torch.diag(slope))


def test_forward_mode_gives_the_true_tangent(module, x, kernels_used):
    with forward_ad.dual_level():
        y = module(forward_ad.make_dual(x, torch.full_like(x, 2.0)))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, 2.0 * module.derivative(x))
    assert not kernels_used


@with_cpu_series
def test_functional_call_differentiates_the_parameters_given(module, x, kernels_used):
    given = {key: (p.detach() + 0.1).requires_grad_() for key, p in parameters_of(module).items()}
    functional_call(module, given, (x,)).square().sum().backward()
    assert kernels_used == ["forward", "backward"]
    exact = dict(module.named_parameters()) | given
    y = type(module).formula(x, *(exact[key] for key in module._names))
    for (key, p), theirs in zip(given.items(), torch.autograd.grad(y.square().sum(), given.values()), strict=True):
        torch.testing.assert_close(p.grad, theirs, msg=key)


@pytest.mark.parametrize("reentrant", [False, True])
@with_cpu_series
def test_checkpointing(module, x, reentrant, kernels_used):
    results = []
    for run in (module, lambda t: checkpoint(module, t, use_reentrant=reentrant)):
        module.zero_grad()
        data = x.clone().requires_grad_()
        run(data).square().sum().backward()
        results.append([data.grad, *(p.grad for p in parameters_of(module).values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kernels_used.count("forward") == 3


def test_autocast_and_its_gradients(module, x):
    module, x = module.float(), x.to(torch.bfloat16)
    results = []
    for enabled in (False, True):
        module.zero_grad()
        data = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            module(data).sum().backward()
        results.append([data.grad, *(p.grad for p in parameters_of(module).values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert {v.dtype for v in results[1][1:]} == {torch.float32}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the lengths of the parameters are fixed
def test_tracing(module, x, kernels_used):
    traced = torch.jit.trace(module, x)
    with torch.no_grad():  # constants would be stale
        for p in parameters_of(module).values():
            p.add_(0.1)
    torch.testing.assert_close(traced(2 * x), type(module).formula(2 * x, *module._tensors()))


def test_modes_fake_tensors_and_meta(module, x, kernels_used):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = module(mode.from_tensor(x))
    assert y.shape == x.shape
    assert module.to("meta")(x.to("meta")).is_meta
    assert not kernels_used
    with FlopCounterMode(display=False):
        build(module.name)(x)
    assert not kernels_used


class Tagged(torch.Tensor):
    """A subclass that survives every operation."""


def test_tensor_subclasses_stay_what_they_are(module, x, kernels_used):
    y = module(x.as_subclass(Tagged))
    assert type(y) is Tagged
    assert not kernels_used
    torch.testing.assert_close(y.as_subclass(torch.Tensor), module(x))


def test_a_tensor_that_is_not_strided_is_refused_as_ever(module):
    with pytest.raises((RuntimeError, NotImplementedError)):
        module(torch.eye(3, dtype=torch.float64).to_sparse())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", [*(f"{family}_3" for family in FAMILIES), "hermite_9"])
def test_compiled_with_any_size(name, backend, x, randomized):
    """Inductor compiles C++."""
    torch._dynamo.reset()
    module = randomized(name, TAILS).float()
    module.domain.requires_grad_()
    fn = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for n in (40, 33):
        results = []
        for run in (module, fn):
            module.zero_grad()
            data = x[:n].float().requires_grad_()
            y = run(data)
            y.sin().sum().backward()
            results.append([y.detach(), data.grad, *(p.grad for p in module.parameters())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@with_compiled
def test_the_compiler_sees_explicit_gradients(module, x):
    torch._dynamo.reset()
    graphs = []
    fn = torch.compile(module, backend=lambda graph, _: (graphs.append(graph), graph)[1], fullgraph=True)
    torch.testing.assert_close(fn(x.requires_grad_()), module(x))
    assert any("autograd_function_apply" in str(node.target) for node in graphs[0].graph.nodes)


@with_compiled
def test_compiled_gradients_in_float64(module, x):
    """What the compiler differentiates, run uncompiled."""
    data = x.requires_grad_(), *module._tensors()
    module.domain.requires_grad_()
    wanted = [t for t in data if t.requires_grad]
    ours = torch.autograd.grad(dispatch._Compiled.apply(type(module), False, *data).sin().sum(), wanted)
    theirs = torch.autograd.grad(type(module).formula(*data).sin().sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiled_functorch(module, x):
    torch._dynamo.reset()
    compiled_slope = torch.compile(lambda t: vmap(grad(module))(t), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled_slope(x), module.derivative(x).detach())


@pytest.mark.parametrize("reach", [1.0, 100.0, 1e4])
def test_cosine_and_sine_in_turns(reach):
    x = torch.linspace(-reach, reach, 10001)
    w, p = torch.tensor(1.7), torch.tensor(0.4)
    angle = w.double() * x.double() - p.double()
    cosine, sine = compiled.cosine_and_sine(x, w, p)
    # The angle in turns is rounded to float32; the polynomials add next to nothing.
    allowed = 2 * torch.finfo(torch.float32).eps * (1.7 * reach + 4)
    torch.testing.assert_close(cosine.double(), angle.cos(), rtol=0, atol=allowed)
    torch.testing.assert_close(sine.double(), angle.sin(), rtol=0, atol=allowed)


@pytest.mark.slow
def test_slopes_of_the_tails_can_be_learned_too(module, x):
    torch._dynamo.reset()
    results = []
    for fn in (module, torch.compile(module, backend="eager"), lambda x: type(module).formula(x, *module._tensors())):
        module.tail_slopes.requires_grad_().grad = None
        fn(x).sum().backward()
        results.append(module.tail_slopes.grad)
    for found in results[:2]:
        torch.testing.assert_close(found, results[2])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["hermite_3", "tropical_9"], indirect=True)
@pytest.mark.parametrize("missing", ["cpu_series", "compiled", "triton"])
def test_without_one_of_its_kernels_a_family_is_not_wrong(module, missing, x):
    torch._dynamo.reset()
    module.__class__ = type("Slow", (type(module),), {missing: None})
    module.domain.requires_grad_()
    results = []
    for run in (module, torch.compile(module, backend="eager"), lambda x: module.formula(x, *module._tensors())):
        y = run(x.requires_grad_())
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *parameters_of(module).values()])])
    for found in results[:2]:
        for ours, theirs in zip(found, results[2], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_backend_is_the_fastest_that_a_family_has(monkeypatch):
    triton = pytest.importorskip("hf_ortho.kernels.triton", exc_type=ImportError)
    monkeypatch.setattr(dispatch, "_triton_works", lambda device, dtype: True)
    without = (), ("cpu_series",), ("triton",), ("cpu_series", "triton")
    cases = {
        ("cuda", torch.bfloat16): (triton, triton, cpu, None),
        ("cuda", torch.float64): (cpu, None, cpu, None),
        ("cpu", torch.float32): (cpu, None, cpu, None),
    }
    for (device, dtype), expected in cases.items():
        x = SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, device=device)
        for missing, backend in zip(without, expected, strict=True):
            variant = type("Variant", (FAMILIES["hermite"],), dict.fromkeys(missing))
            assert dispatch._backend(variant, x) is backend, (device, dtype, missing)


def test_triton_is_probed_once_and_again_after_a_lack_of_memory(monkeypatch, caplog):
    triton = pytest.importorskip("hf_ortho.kernels.triton", exc_type=ImportError)
    outcomes = [torch.cuda.OutOfMemoryError(), None, RuntimeError("no C compiler")]
    probed = []

    def probe(device, dtype):
        probed.append(dtype)
        if outcome := outcomes[len(probed) - 1]:
            raise outcome

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(dispatch, "_probe", functools.cache(dispatch._probe.__wrapped__))
    monkeypatch.setattr(triton, "probe", probe)
    monkeypatch.setattr(dispatch.logger, "propagate", True)
    device = torch.device("cuda", 0)
    assert [dispatch._triton_works(device, torch.float32) for _ in range(3)] == [False, True, True]
    assert [dispatch._triton_works(device, torch.bfloat16) for _ in range(3)] == [False] * 3
    assert probed == [torch.float32, torch.float32, torch.bfloat16]
    assert [record.message.count("bfloat16 on cuda:0") for record in caplog.records] == [1]
