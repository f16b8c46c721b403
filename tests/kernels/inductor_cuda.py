"""The code that inductor generates for CUDA, without a GPU: run in a process of its own, which pretends to have one."""

import contextlib
import re
from unittest import mock

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

SHAPE = (12, 1024, 3072)


class H100:
    """What inductor asks about the GPU."""

    name = "NVIDIA H100"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 80 << 30
    max_threads_per_multi_processor = 2048
    regs_per_multiprocessor = 65536
    warp_size = 32
    shared_memory_per_block = 49152
    shared_memory_per_block_optin = 232448
    shared_memory_per_multiprocessor = 233472
    L2_cache_size = 50 << 20
    gcnArchName = ""


def item(tensor, index):
    """``tensor[index]`` along the first dimension, which torch without CUDA refuses."""
    if isinstance(index, slice):
        return torch.ops.aten.slice.Tensor(tensor, 0, index.start, index.stop, index.step or 1)
    return torch.ops.aten.select.int(tensor, 0, index)


@contextlib.contextmanager
def pretend_h100():
    from torch._inductor.runtime.hints import DeviceProperties

    hardware = dict(multi_processor_count=132, major=9, regs_per_multiprocessor=65536, warp_size=32)
    gpu = DeviceProperties(type="cuda", index=0, cc=90, max_threads_per_multi_processor=2048, **hardware)
    cpu = DeviceProperties(type="cpu", index=0, multi_processor_count=2, cc=0)
    answers = {
        "torch.cuda.is_available": True,
        "torch.cuda.current_device": 0,
        "torch.cuda.device_count": 1,
        "torch.cuda.get_device_properties": H100,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda._lazy_init": None,
        "torch.cuda.synchronize": None,
        "torch._subclasses.fake_tensor.init_gpu_context": None,
        "torch.utils._triton.has_triton": True,
        "torch.utils._triton.triton_hash_with_backend": "",
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, lambda *_, answer=answer, **__: answer))
        by_device = classmethod(lambda _, device: gpu if device.type == "cuda" else cpu)
        stack.enter_context(mock.patch.object(DeviceProperties, "create", by_device))
        stack.enter_context(mock.patch("torch.Tensor.__getitem__", item))
        stack.enter_context(mock.patch("torch.tensor", lambda data, **to: torch.empty(numpy.shape(data), **to)))
        meta = staticmethod(lambda: {"backend_hash": ""})
        stack.enter_context(mock.patch("torch._inductor.codegen.triton.TritonKernel.inductor_meta_common", meta))
        yield


def generated(function, arguments) -> str:
    """Inductor's program for ``function(*arguments)``, on fake tensors."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*arguments)
    graph.graph.eliminate_dead_code()
    with V.set_fake_mode(torch._guards.detect_fake_mode(arguments)):
        view_to_reshape(graph)
        _recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=list(arguments), is_inference=False)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*arguments)
            code = lowering.codegen()[0]
    return getattr(code, "value", code)


def program(name: str, triton: bool = False) -> str:
    """The program of the backward pass of an activation with a learnable domain, in bfloat16."""
    from hf_ortho.activations import build
    from hf_ortho.kernels.dispatch import _Compiled

    if triton:
        import hf_ortho.kernels.triton  # noqa: F401

    module = build(name)
    family = type(module)

    def backward(x, *tensors):
        needs = False, False, True, True, False, *[True] * (len(tensors) - 2)
        context = mock.Mock(family=family, triton=triton, saved_tensors=(x, *tensors), needs_input_grad=needs)
        return tuple(v for v in _Compiled.backward(context, x) if v is not None)

    with pretend_h100(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x = torch.empty(SHAPE, device="cuda", dtype=torch.bfloat16)
        tensors = [torch.empty(t.shape, device="cuda") for t in module._tensors()]
        return generated(backward, (x, *tensors))


def buffers(*args, **options) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tensors that the program allocates."""
    found = re.findall(r"empty_strided_cuda\(\(([^)]*)\), \([^)]*\), torch\.(\w+)\)", program(*args, **options))
    return [(tuple(map(int, shape.rstrip(", ").split(", "))) if shape else (), dtype) for shape, dtype in found]
