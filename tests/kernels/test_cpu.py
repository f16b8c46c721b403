"""The CPU kernels against float64 autograd of the formula: values, every gradient, shapes, dtypes, threads."""

import os
import threading
import weakref

import pytest
import torch

from hf_ortho.activations import FAMILIES, LearnableActivation, build
from hf_ortho.activations.base import SHARED
from hf_ortho.activations.tropical.cpu import upper_envelope
from hf_ortho.kernels import cpu

TAILS = (-1.5, 1.8)
PRECISION = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (2e-6, 5e-6),
    torch.bfloat16: (2**-8, 5e-6),  # the sums are taken in float32
    torch.float16: (2**-11, 5e-6),
}

# Both classes of Hermite and of Fourier series, and those of the other families.
SERIES = [f"{family}_{degree}" for family, cls in FAMILIES.items() if cls.cpu_series for degree in (1, 9)]
# For what the chunks, the threads and the tails do, which know no family: one scratch row, and four.
ONE_OF_EACH = ["hermite_3", "fourier_3"]


def data(*shape, dtype=torch.float32):
    """Pre-activations on both sides of the domain, and gradients whose sums do not cancel."""
    generator = torch.Generator().manual_seed(1)
    x = 1.5 * torch.randn(shape, generator=generator)
    return x.to(dtype), (1 + 0.5 * torch.randn(shape, generator=generator)).to(dtype)


def make(randomized, name, domain=TAILS, dtype=torch.float32):
    module = randomized(name, domain)
    return module if dtype == torch.float64 else module.float()


@pytest.fixture
def check(randomized, measured, reference, assert_near, small_chunks):
    """Values and gradients for several chunks, and for one, without scratch rows."""

    def compare(name, domain, dtype):
        module = make(randomized, name, domain, dtype)
        for shape in ((7, 11, 3), (129,), (50,)):
            x, g = data(*shape, dtype=dtype)
            found = measured(module, x, g)
            assert found[0].dtype == found[1]["x"].dtype == dtype
            assert_near(found, reference(module, x, g), *PRECISION[dtype])

    return compare


@pytest.mark.parametrize("domain", [None, TAILS], ids=["pure", "tails"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(check, name, dtype, domain):
    check(name, domain, dtype)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("domain", [None, TAILS, (-1.5, float("inf"))], ids=["pure", "tails", "one-tail"])
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_every_dtype_and_domain(check, name, dtype, domain):
    check(name, domain, dtype)


class Proportional(LearnableActivation):
    """S(x) = a x."""

    family = "proportional"
    default_degree = 1

    class cpu_series:
        """The sum is that of g x."""

        scratch_rows = 0

        def __init__(self, parameters, domain, dtype, device, large):
            ((self.a,),) = parameters

        def value(self, x, out, scratch):
            return torch.mul(x, self.a, out=out)

        def backward_chunk(self, x, g, out, scratch, reduce):
            if out is not None:
                torch.mul(g, self.a, out=out)
            return [(g * x).sum().item()] if reduce else []

        def parameter_gradients(self, sums):
            return [sums]

    @classmethod
    def initial_parameters(cls, degree, init):
        return {"a": [0.7]}

    @staticmethod
    def series(x, a):
        return a * x

    @staticmethod
    def series_derivative(x, a):
        return a.expand_as(x)


@pytest.mark.parametrize("domain", [None, TAILS], ids=["pure", "tails"])
def test_a_series_without_scratch_rows(domain, measured, reference, assert_near, small_chunks):
    module = Proportional()
    if domain is not None:
        with torch.no_grad():
            module.domain.copy_(torch.tensor(domain))
            module.tail_slopes.copy_(torch.tensor((0.3, 1.2)))
    for shape in ((300,), (50,)):
        x, g = data(*shape)
        assert_near(measured(module, x, g), reference(module, x, g), *PRECISION[torch.float32])


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (49,), (50,), (51,), (64,), (65,), (128,)], ids=str)
def test_sizes(name, shape, randomized, measured, reference, assert_near, small_chunks):
    module = make(randomized, name)
    x, g = data(*shape)
    assert_near(measured(module, x, g), reference(module, x, g), 2e-6, 5e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 0, 2, 1),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x[..., 1:2].transpose(0, 3),
    ],
    ids=["channels_last", "permuted", "strided", "expanded", "ones"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(name, arrange, dtype, randomized, measured, small_chunks):
    module = make(randomized, name)
    x, g = (arrange(t) for t in data(4, 6, 5, 3, dtype=dtype))
    y, gradients = measured(module, x, g)
    y_flat, flat = measured(module, x.contiguous(), g.contiguous())
    assert torch.equal(y, y_flat)
    assert torch.equal(gradients["x"], flat["x"])
    for key in flat:
        torch.testing.assert_close(gradients[key], flat[key], rtol=1e-4, atol=1e-4)
    assert y.stride() == torch.empty_like(x).stride() == gradients["x"].stride()
    other, _ = measured(module, x, g.contiguous())  # a gradient in another layout than x
    assert torch.equal(other, y)
    assert torch.equal(measured(module, x, g.contiguous())[1]["x"], gradients["x"])


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("domain", [None, TAILS], ids=["pure", "tails"])
def test_nan_stays_where_it_is(name, domain, randomized, small_chunks):
    module = make(randomized, name, domain)
    x, g = data(200)
    clean, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.no_grad():
        clean[[3, 130]] = float("nan")
    y = module(clean)
    assert y.isnan().nonzero().flatten().tolist() == [3, 130]
    y.backward(g)
    module(expected).backward(g)
    finite = ~y.isnan()
    assert torch.equal(clean.grad[finite], expected.grad[finite])


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("slopes", [(0.3, 1.2), (0.0, 1.2), (0.3, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_inputs_run_along_the_tails(name, dtype, slopes, randomized, small_chunks):
    module = randomized(name, TAILS)
    with torch.no_grad():
        module.tail_slopes.copy_(torch.tensor(slopes))
        at_ends = module(module.domain)
    expected = [-torch.inf if slopes[0] else at_ends[0].item(), torch.inf if slopes[1] else at_ends[1].item()]
    x = torch.full((130,), 0.5, dtype=dtype)
    x[0], x[129] = -torch.inf, torch.inf
    module = module.float()
    for y in (module(x), type(module).formula(x, *module._tensors())):
        eps = torch.finfo(dtype).eps  # of maxima of order 1, whose difference may be small
        assert y[[0, 129]].tolist() == pytest.approx(expected, rel=4 * eps, abs=4 * eps)
        assert y[1:129].isfinite().all()


@pytest.mark.parametrize("name", SERIES)
def test_only_what_is_asked_for(name, randomized, measured, small_chunks):
    module = make(randomized, name)
    x, g = data(300)
    _, expected = measured(module, x, g)
    groups = {
        "x": [],
        "domain": [module.domain],
        "series": [p for k, p in module.named_parameters() if k not in SHARED],
    }
    for group, parameters in groups.items():
        module.zero_grad()
        for p in module.parameters():
            p.requires_grad_(any(p is q for q in parameters))
        data_x = x.clone().requires_grad_(group == "x")
        module(data_x).backward(g)
        assert (data_x.grad is None) == (group != "x")
        if group == "x":
            assert torch.equal(data_x.grad, expected["x"])
        for key, p in module.named_parameters():
            assert (p.grad is None) == (not p.requires_grad)
            if p.requires_grad:
                assert torch.equal(p.grad, expected[key])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(name, dtype, randomized, measured, small_chunks, threads):
    module = make(randomized, name)
    x, g = data(1000, dtype=dtype)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(measured(module, x, g))
        assert torch.get_num_threads() == count
        seen = []
        other = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [count]  # the kernel's own threads leave the setting alone
    for y, gradients in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(torch.equal(gradients[key], value) for key, value in results[0][1].items())


def test_threads_work_alone(randomized, measured, threads, monkeypatch):
    """Above ATen's grain size, where its own threads would split the sums, and slow each other down."""
    monkeypatch.setattr(cpu, "CHUNK", 40_000)
    x, g = data(100_003)
    for name in ("hermite_3", "fourier_1"):
        module = make(randomized, name)
        threads(1)
        y, gradients = measured(module, x, g)
        for count in (2, 3):
            threads(count)
            y_again, again = measured(module, x, g)
            assert torch.equal(y, y_again)
            assert all(torch.equal(again[key], value) for key, value in gradients.items())
            pool = cpu._pool(count, os.getpid())
            assert {pool.submit(torch.get_num_threads).result() for _ in range(8)} == {1}


@pytest.mark.slow
def test_threads_after_a_fork_and_after_the_main_one(tmp_path, forked):
    """A forked process has threads of its own; threads that outlive the main one compute by themselves."""
    (tmp_path / "script.py").write_text("""
import os, threading, torch
from hf_ortho.activations import build
from hf_ortho.kernels import cpu
cpu.GRAIN, cpu.CHUNK = 50, 64
torch.set_num_threads(2)
module, x = build("hermite_3"), torch.linspace(-2, 2, 1000)
expected = module(x)
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(module(x), expected) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
def late():
    threading.main_thread().join()
    assert torch.equal(module(x), expected)
    print("served")
threading.Thread(target=late).start()
""")
    assert forked(1, tmp_path / "script.py") == "served\n"


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_inference_mode_in_threads(name, randomized, small_chunks, threads):
    module = make(randomized, name)
    x, _ = data(1000)
    expected = module(x).detach()
    threads(2)
    with torch.inference_mode():
        y = module(x)
        assert y.is_inference()
        assert torch.equal(y, expected)
        made_inside = x + 0
    with torch.no_grad():
        assert torch.equal(module(made_inside), expected)


@pytest.mark.parametrize("name", SERIES)
def test_a_default_device_and_dtype_change_nothing(name, randomized, measured, small_chunks):
    module = make(randomized, name)
    x, g = data(300)
    y, gradients = measured(module, x, g)
    cpu._activation.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y_again, again = measured(module, x, g)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, y_again)
    assert all(torch.equal(again[key], value) for key, value in gradients.items())


@pytest.mark.parametrize("name", SERIES)
def test_trains_after_a_first_call_in_inference_mode(name, randomized, measured, small_chunks):
    module = make(randomized, name)
    x, g = data(300)
    expected = measured(module, x, g)[1]
    cpu._activation.cache_clear()
    with torch.inference_mode():
        module(x)
        module(x[:10])
    assert all(torch.equal(value, expected[key]) for key, value in measured(module, x, g)[1].items())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_repeated_runs_give_the_same_bits(name, randomized, measured, small_chunks):
    module = make(randomized, name)
    x, g = data(500)
    first = measured(module, x, g)
    torch.use_deterministic_algorithms(True)
    try:
        again = measured(module, x, g)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(again[1][key], value) for key, value in first[1].items())


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_x_is_kept_for_the_backward_pass(name, dtype, randomized):
    module = make(randomized, name)
    x = data(400, dtype=dtype)[0].requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    small = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    assert {k: v for k, v in kept.items() if k not in small} == {x.data_ptr(): x.nbytes}
    alive = weakref.ref(y.grad_fn)
    del y
    assert alive() is None


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_update_between_the_passes_is_an_error(name, randomized):
    module = make(randomized, name)
    for tensor in (x := data(9)[0], next(iter(module.parameters()))):
        x = x.clone().requires_grad_()
        y = module(x)
        with torch.no_grad():
            (x if tensor.shape == (9,) else tensor).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_way_to_write_a_parameter_is_seen(name, randomized):
    module = make(randomized, name)
    x, _ = data(30)
    for write in (
        lambda p: p.data.add_(0.1),
        lambda p: p.detach().mul_(1.1),
        lambda p: p.data.copy_(torch.full_like(p, 0.3)),
        lambda p: setattr(p, "data", torch.full_like(p, 0.2)),
    ):
        for key, p in module.named_parameters():
            if key not in SHARED:
                write(p)
        exact = type(module).formula(x, *module._tensors())
        torch.testing.assert_close(module(x), exact)


def test_memory_does_not_grow_with_the_degree(small_chunks):
    domain, device = (-1.0, 1.0), torch.device("cpu")
    made = (build(f"hermite_{n}").cpu_series(((0.5,) * (n + 1),), domain, torch.float32, device, True) for n in (9, 32))
    assert len({series.scratch_rows for series in made}) == 1


@pytest.mark.parametrize("seed", range(20))
def test_the_upper_envelope_is_the_maximum(seed):
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randint(-3, 4, (6,), generator=generator).double()  # with parallel lines
    intercepts = torch.randint(-4, 5, (6,), generator=generator).double()  # with ties of three lines
    hull = upper_envelope(slopes.tolist(), intercepts.tolist())
    starts = [start for _, start in hull]
    assert starts == sorted(set(starts))
    assert starts[0] == -torch.inf
    x = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    lines = slopes[:, None] * x + intercepts[:, None]
    on_hull = torch.tensor([k for k, _ in hull])[torch.bucketize(x, torch.tensor(starts[1:], dtype=x.dtype))]
    torch.testing.assert_close(lines[on_hull, torch.arange(len(x))], lines.max(0).values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SERIES)
def test_coefficients_that_are_not_finite_give_nan(name):
    module = build(name)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if key not in SHARED:
                p[-1] = float("nan")
    assert module(torch.linspace(-2, 2, 100)).isnan().all()


@pytest.mark.parametrize("family", ["tropical", "tropical_rational"])
def test_a_line_that_is_switched_off(family, randomized, measured, reference, small_chunks):
    module = make(randomized, f"{family}_4")
    x, g = data(200)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if key in ("coefficients", "numerator_intercepts"):
                p[2] = -torch.inf
    (y, gradients), (exact, expected) = measured(module, x, g), reference(module, x, g)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients["x"].double(), expected["x"], rtol=1e-5, atol=1e-6)
    off = next(key for key in gradients if key in ("coefficients", "numerator_intercepts"))
    assert gradients[off][2] == 0.0
    torch.testing.assert_close(gradients[off].double(), expected[off], rtol=1e-5, atol=1e-5)


def test_numbers_that_float32_cannot_hold_become_infinite():
    x = torch.linspace(-2, 2, 100, requires_grad=True)
    for name in ("fourier_2", "hermite_3", "hermite_12"):
        module = build(name)
        with torch.no_grad():
            for key, p in module.named_parameters():
                if key not in SHARED:
                    p.fill_(3e38)
        y = module(x)
        (gx,) = torch.autograd.grad(y, x, torch.full_like(y, torch.inf))
        assert not gx.isfinite().any()


def test_chunks_cover_large_tensors(randomized, measured, reference, assert_near):
    module = make(randomized, "hermite_3")
    x, g = data(2 * cpu.CHUNK + 5)
    assert_near(measured(module, x, g), reference(module, x, g), 2e-6, 5e-6)
