"""The Triton kernels, compiled for GPUs without one: registers, instructions; and run on a GPU where there is one."""

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


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *values, **options: self.launches.append((values, options))


def signature_of(value):
    if isinstance(value, tuple):
        return tuple(map(signature_of, value))
    return TRITON_TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"


def launches_of(kernel, name, dtype):
    """The arguments with which a call of the operator and its backward launch a kernel."""
    module = build(name)
    parameters = [value for key, value in module.named_parameters() if key not in SHARED]
    x = torch.zeros(2**22, dtype=dtype, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        recorders = {each: Recorder() for each in ("forward_kernel", "backward_kernel", "sum_kernel")}
        for each, recorder in recorders.items():
            patch.setattr(kernels, each, recorder)
        y = Recomputed.apply(kernels, type(module), x, module.domain, module.tail_slopes, *parameters)
        y.backward(x.detach())
    return recorders[kernel].launches


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """``compiled(kernel, name, dtype, capability)``: a kernel as a call of the operator would compile it."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))

    def compile_for(kernel, name, dtype, capability):
        values, options = launches_of(kernel, name, dtype)[0]
        kernel = getattr(kernels, kernel)
        of_compiler = {key: options.pop(key) for key in ("num_warps", "enable_fp_fusion") if key in options}
        signature = dict(zip(kernel.arg_names, map(signature_of, values), strict=False))
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if isinstance(kind, str)
        }
        source = ASTSource(kernel, signature | dict.fromkeys(options, "constexpr"), options, aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=of_compiler)

    return compile_for


def resources(binary, tmp_path):
    """Registers per thread and bytes of local memory, which holds what the registers do not."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    found = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", found)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TRITON_TYPES, ids=str)
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("name", USUAL)
def test_usual_degrees_on_hopper(compiled, tmp_path, name, kernel, dtype):
    binary = compiled(kernel, name, dtype, 90)
    ptx = binary.asm["ptx"]
    registers, spilled = resources(binary, tmp_path)
    assert spilled == 0
    assert registers <= 128  # four programs of 128 threads on a multiprocessor
    assert "fma.rn.f32" in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)
    if kernel == "forward_kernel" or (dtype == torch.float32 and name not in ("fourier_6", "tropical_rational_6")):
        assert re.search(r"ld\.global\.v4\.b32", ptx)  # 16 bytes per thread
        assert re.search(r"st\.global\.v4\.b32", ptx)
    if dtype == torch.bfloat16:
        assert "cvt.rn.bf16" in ptx
        assert ("cos.approx" in ptx) == (name == "fourier_6")


@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel", "sum_kernel"])
@pytest.mark.parametrize("family", WITH_TRITON)
def test_every_kernel_compiles_for_ampere(compiled, tmp_path, family, kernel):
    binary = compiled(kernel, f"{family}_3", torch.float32, 80)
    assert ".target sm_80" in binary.asm["ptx"]
    assert resources(binary, tmp_path)[1] == 0


@pytest.mark.parametrize("family", ["fourier", "tropical_rational"])
def test_the_highest_degree_is_summed_in_passes(family):
    launches = launches_of("backward_kernel", f"{family}_32", torch.float32)
    total = launches[0][1]["TOTAL"]
    ranges = [(options["FIRST"], options["LAST"]) for _, options in launches]
    assert [i for first, last in ranges for i in range(first, last)] == list(range(total))
    assert max(last - first for first, last in ranges) <= kernels.SUMS_PER_THREAD
    assert [options["WRITE_GX"] for _, options in launches] == [True] + [False] * (len(launches) - 1)


def test_the_split_depends_on_the_number_of_elements_only():
    launches = {dtype: launches_of("backward_kernel", "hermite_8", dtype)[0][1] for dtype in TRITON_TYPES}
    assert {options["PROGRAMS"] for options in launches.values()} == {1024}
    assert len({options["LANES"] for options in launches.values()}) == 1


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on_the_gpu(name, x, g):
    module = build(name, init="unit").cuda()
    with torch.no_grad():
        module.domain.copy_(torch.tensor([-2.0, 2.5]))
        module.tail_slopes.copy_(torch.tensor([0.0, 1.0]))
    module.domain.requires_grad_()
    parameters = [value for key, value in module.named_parameters() if key not in SHARED]
    x = x.clone().requires_grad_()
    y = module(x)
    return module, [y.detach(), *torch.autograd.grad(y, [x, *parameters, module.domain], g)]


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", [*USUAL, *(f"{family}_32" for family in WITH_TRITON)])
    def test_follows_the_formula_bit_equal_on_repetition(self, name, dtype):
        generator = torch.Generator("cuda").manual_seed(0)
        x = 2 * torch.randn(1_000_003, generator=generator, device="cuda").to(dtype)
        g = torch.randn(1_000_003, generator=generator, device="cuda").to(dtype)
        module, ours = on_the_gpu(name, x, g)
        assert all(map(torch.equal, ours, on_the_gpu(name, x, g)[1]))
        module.double()
        x = x.double().requires_grad_()
        y = type(module).formula(x, *module._tensors())
        leaves = [x, *(value for key, value in module.named_parameters() if key not in SHARED), module.domain]
        theirs = [y, *torch.autograd.grad(y, leaves, g.double())]
        rounding = 4 * torch.finfo(dtype).eps
        # x within rounding of a kink may differ
        gradients = 1e-2 if name.startswith("tropical") else max(rounding, 1e-5)
        torch.testing.assert_close(ours[0].double(), y, rtol=rounding, atol=rounding)
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            assert (one.double() - other).norm().item() <= gradients * max(1000.0, other.norm().item())

    def test_more_than_2_to_the_31_elements(self):
        n = 2**31 + 12_345
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
