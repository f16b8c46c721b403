"""The Triton kernels, compiled for GPUs without one: registers, instructions; and run on a GPU where there is one."""

import copy
import pathlib
import re
import subprocess

import pytest
import torch

from hf_ortho.activations import FAMILIES, build
from hf_ortho.activations.base import SHARED

triton = pytest.importorskip("triton")  # on Linux only

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_ortho.kernels import triton as kernels  # noqa: E402
from hf_ortho.kernels.dispatch import Recomputed  # noqa: E402

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WITH_TRITON = [family for family, cls in FAMILIES.items() if cls.triton]
USUAL = ["hermite_3", "hermite_8", "fourier_6", "tropical_6", "tropical_rational_6"]
TRITON_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
POINTERS = TRITON_TYPES.values()


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *values, **options: self.launches.append((values, options))


def signature_of(value):
    if isinstance(value, tuple):
        return tuple(map(signature_of, value))
    if isinstance(value, torch.Tensor):
        return TRITON_TYPES[value.dtype]
    return "constexpr" if value == 1 else "i32" if value < 2**31 else "i64"


def launches_of(kernel, name, dtype, elements=2**22, channels=None):
    """The arguments with which forward and backward launch a kernel."""
    module = build(name)
    parameters = [value for key, value in module.named_parameters() if key not in SHARED]
    shape = elements if channels is None else (elements // channels, channels)
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        recorders = {each: Recorder() for each in ("forward_kernel", "backward_kernel", "sum_kernel")}
        for each, recorder in recorders.items():
            patch.setattr(kernels, each, recorder)
        y = Recomputed.apply(kernels, type(module), x, module.domain, module.tail_slopes, *parameters)
        y.backward(x.detach())
    return recorders[kernel].launches


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """``compiled(kernel, name, dtype, capability)``: a kernel as a call of the activation would compile it."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))

    def compile_for(kernel, name, dtype, capability, n=None, **shape):
        values, options = launches_of(kernel, name, dtype, **shape)[0]
        kernel = getattr(kernels, kernel)
        if n is not None:
            values = [n if key == "n" else v for key, v in zip(kernel.arg_names, values, strict=False)]
            options["EVEN"] = n % 16 == 0
        of_compiler = {key: options.pop(key) for key in ("num_warps", "enable_fp_fusion") if key in options}
        signature = dict(zip(kernel.arg_names, map(signature_of, values), strict=False))
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, (key, kind) in enumerate(signature.items())
            if kind in POINTERS or (key == "n" and options.get("EVEN"))
        }
        constants = options | {key: 1 for key, kind in signature.items() if kind == "constexpr"}
        source = ASTSource(kernel, signature | dict.fromkeys(options, "constexpr"), constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=of_compiler)

    return compile_for


def resources(binary, tmp_path):
    """Registers per thread and bytes of local memory, which holds what the registers do not."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    found = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", found)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def assert_efficient(binary, tmp_path, access):
    """``access``: the width of the loads and stores of a thread."""
    ptx = binary.asm["ptx"]
    registers, spilled = resources(binary, tmp_path)
    assert spilled == 0
    assert registers <= 128  # four programs of 128 threads on a multiprocessor
    assert "fma.rn.f32" in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert f"ld.global.{access}" in ptx
    assert f"st.global.{access}" in ptx
    loop = ptx[ptx.index(access) :].partition("\tshfl.")[0]  # until the sums of the threads are added up
    assert not re.search(r"(ld|st)\.shared|bar\.sync", loop)  # threads exchange nothing


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TRITON_TYPES, ids=str)
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize(
    ("name", "channels", "access"),
    [
        *((f"{name}_g64", 64 * 48, {torch.bfloat16: "v4.b32", torch.float32: "v4.b32"}) for name in USUAL),
        ("hermite_3_g64", 64 * 172, {torch.bfloat16: "v2.b32", torch.float32: "v4.b32"}),  # no multiple of 8
        ("hermite_3_g16", 16 * 5, {torch.bfloat16: "b16", torch.float32: "b32"}),
    ],
)
def test_groups_are_read_in_pieces_as_wide_as_divide_their_channels(
    compiled, tmp_path, name, channels, access, kernel, dtype
):
    binary = compiled(kernel, name, dtype, 90, channels=channels, elements=1024 * channels)
    assert_efficient(binary, tmp_path, access[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TRITON_TYPES, ids=str)
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("name", USUAL)
def test_usual_degrees_on_hopper(compiled, tmp_path, name, kernel, dtype):
    binary = compiled(kernel, name, dtype, 90)
    ptx = binary.asm["ptx"]
    assert_efficient(binary, tmp_path, "v4.b32")
    if dtype == torch.bfloat16:
        assert "cvt.rn.bf16" in ptx
        assert ("cos.approx" in ptx) == (name == "fourier_6")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel", "sum_kernel"])
@pytest.mark.parametrize("family", WITH_TRITON)
def test_every_kernel_compiles_for_ampere(compiled, tmp_path, family, kernel):
    binary = compiled(kernel, f"{family}_3", torch.float32, 80)
    assert ".target sm_80" in binary.asm["ptx"]
    assert resources(binary, tmp_path)[1] == 0


@pytest.mark.parametrize("n", [1, 2**31 + 16, 2**31 + 1])
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_one_element_and_more_than_32_bits_count(compiled, tmp_path, kernel, n):
    binary = compiled(kernel, "hermite_3", torch.bfloat16, 80, n)
    assert "ld.global.v4.b32" in binary.asm["ptx"] or n == 1
    assert resources(binary, tmp_path)[1] == 0


@pytest.mark.parametrize("family", ["fourier", "tropical_rational"])
def test_the_highest_degree_is_summed_in_passes(family):
    launches = launches_of("backward_kernel", f"{family}_32", torch.float32)
    total = launches[0][1]["TOTAL"]
    ranges = [(options["FIRST"], options["LAST"]) for _, options in launches]
    assert [i for first, last in ranges for i in range(first, last)] == list(range(total))
    assert max(last - first for first, last in ranges) <= kernels.SUMS_PER_PASS
    assert [options["WRITE_GX"] for _, options in launches] == [True] + [False] * (len(launches) - 1)


@pytest.mark.parametrize("dtype", TRITON_TYPES, ids=str)
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel", "sum_kernel"])
def test_one_compilation_serves_all_multiples_of_16_elements_and_another_all_others(kernel, dtype):
    jitted = getattr(kernels, kernel)
    specialized = {each.name for each in jitted.params if not each.do_not_specialize}
    for sizes in ((16, 48, 3072, 2**20 + 16, 2**22), (3, 17, 1000, 2**20 + 8)):
        calls = [launches_of(kernel, "hermite_8", dtype, n)[0] for n in sizes]
        assert all(options == calls[0][1] for _, options in calls)
        for values, _ in calls:
            numbers = {key: v for key, v in zip(jitted.arg_names, values, strict=False) if type(v) is int}
            assert "programs" not in specialized
            assert "tiles" not in specialized
            # Triton compiles for a multiple of 16, for another number, and for 1.
            assert {v % 16 == 0 for key, v in numbers.items() if key in specialized} <= {sizes[0] == 16}


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on_the_gpu(name, x, g):
    module = random_module(name).cuda()
    parameters = [value for key, value in module.named_parameters() if key not in SHARED]
    x = x.clone().requires_grad_()
    y = module(x)
    return module, [y.detach(), *torch.autograd.grad(y, [x, module.domain, *parameters], g)]


def random_module(name):
    module = build(name, init="unit")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in module.named_parameters():
            if key not in SHARED:
                value += 0.1 * torch.randn(value.shape, generator=generator)
        module.domain.copy_(torch.tensor([-2.0, 2.5]))
        if module.groups > 1:
            module.domain *= 1 + torch.arange(module.groups)[:, None] / (4 * module.groups)
        module.tail_slopes.copy_(torch.tensor([0.0, 1.0]))
    module.domain.requires_grad_()
    return module


def exact(module, x, g):
    """In float64: f(x), g f'(x), and for the domain and each parameter the summands of its gradient, one at a time."""
    module = copy.deepcopy(module).double()
    x, g = x.double(), g.double()
    tensors = dict(zip(module._names, (t.detach() for t in module._tensors()), strict=True))
    yield type(module).formula(x, *tensors.values())
    yield g * module.derivative(x).detach()
    for key in ("domain", *(key for key in tensors if key not in SHARED)):
        for k in range(tensors[key].numel()):
            direction = torch.zeros_like(tensors[key])
            direction[k] = 1.0
            along = lambda value, key=key: type(module).formula(x, *(tensors | {key: value}).values())  # noqa: E731
            yield g * torch.func.jvp(along, (tensors[key],), (direction,))[1]


def away_from_kinks(module, x, g):
    """g, but 0 where f' jumps within rounding of x."""
    module = copy.deepcopy(module).double()
    x = x.double()
    width = 1e-5 * (1 + x.abs())
    smooth = (module.derivative(x + width) - module.derivative(x - width)).abs() < 1e-2
    assert smooth.double().mean().item() > 0.98
    return torch.where(smooth, g, 0.0)


def assert_follows_the_formula(module, x, g, y, gx, sums):
    value, slope, *summands = exact(module, x, g)
    rounding = 4 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(y.double(), value, rtol=rounding, atol=rounding)
    assert (gx.double() - slope).norm() <= max(rounding, 1e-5) * slope.norm()
    # Rounding errors of the summands, of either sign, add up like the summands' own norm. A gradient that is the
    # difference of neighboring sums has the rounding errors of these.
    norms = torch.stack([summand.norm() for summand in summands])
    exactly = torch.stack([summand.sum() for summand in summands])
    errors = (torch.cat(sums) - exactly).abs() / (3e-5 * norms + 1e-6 * norms.max())
    assert errors.max() <= 1


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", [*USUAL, *(f"{family}_32" for family in WITH_TRITON)])
    def test_follows_the_formula_bit_equal_on_repetition(self, name, dtype):
        generator = torch.Generator("cuda").manual_seed(0)
        x = 2 * torch.randn(1_000_003, generator=generator, device="cuda").to(dtype)
        g = torch.randn(1_000_003, generator=generator, device="cuda").to(dtype)
        module = random_module(name).cuda()
        g = away_from_kinks(module, x, g).to(dtype)
        (y, gx, *sums), again = (on_the_gpu(name, x, g)[1] for _ in range(2))
        assert all(map(torch.equal, (y, gx, *sums), again))
        assert_follows_the_formula(module, x, g, y, gx, sums)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        ("name", "width"),
        [
            *((f"{name}_g3", 48) for name in USUAL),
            *(("hermite_3_g3", width) for width in (1, 5, 12)),
            ("hermite_3_g2048", 2),
            ("tropical_rational_16_g2", 8),  # two passes
        ],
    )
    def test_groups_follow_the_formula_bit_equal_on_repetition(self, name, width, dtype):
        module = random_module(name).cuda()
        shape = 1 + 600_000 // (module.groups * width), module.groups * width
        generator = torch.Generator("cuda").manual_seed(0)
        x = 2 * torch.randn(shape, generator=generator, device="cuda").to(dtype)
        g = torch.randn(shape, generator=generator, device="cuda").to(dtype)
        g = away_from_kinks(module, x, g).to(dtype)
        (y, gx, *sums), again = (on_the_gpu(name, x, g)[1] for _ in range(2))
        assert all(map(torch.equal, (y, gx, *sums), again))
        members = module.members()
        for i in {0, module.groups - 1}:
            of_group = slice(i * width, (i + 1) * width)
            found = y[:, of_group], gx[:, of_group], [each[i] for each in sums]
            assert_follows_the_formula(members[i], x[:, of_group], g[:, of_group], *found)

    @pytest.mark.parametrize("name", ["hermite_8_g64", "tropical_rational_6_g16"])
    def test_groups_compiled_and_in_the_memory_of_one_tensor(self, name):
        x = torch.randn(4096, 3072, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        g = torch.randn_like(x)
        module = random_module(name).cuda()
        wanted = [x, *module._tensors()[:1], *module._tensors()[2:]]
        module(x).backward(g)  # compiles the kernels
        x.grad = None
        eager, peaks = [], []
        for step in (lambda: eager.append(module(x)), lambda: eager.extend(torch.autograd.grad(eager[0], wanted, g))):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        size = x.numel() * x.element_size()
        assert all(size <= peak < 1.1 * size for peak in peaks)
        y = torch.compile(module, fullgraph=True)(x)
        for ours, theirs in zip([y, *torch.autograd.grad(y, wanted, g)], eager, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1.6e-2, atol=1e-2)

    @pytest.mark.parametrize("n", [2**31 + 2**20, 2**31 + 12_345])
    def test_more_than_2_to_the_31_elements(self, n):
        if torch.cuda.mem_get_info()[0] < 5 * n * 2:
            pytest.skip("needs 22 GB of free GPU memory")
        x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
        x[-20_000:] = torch.linspace(-3.0, 3.0, 20_000)
        g = torch.zeros_like(x)
        g[-20_000:] = 1.0
        _, (y, gx, *sums) = on_the_gpu("hermite_8", x, g)
        _, (tail, tail_gx, *tail_sums) = on_the_gpu("hermite_8", x[-20_000:].clone(), g[-20_000:].clone())
        assert torch.equal(y[-20_000:], tail)
        assert torch.equal(gx[-20_000:], tail_gx)
        for one, other in zip(sums, tail_sums, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-2)
