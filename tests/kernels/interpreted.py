"""Runs the Triton kernels in Triton's interpreter: in a process of its own, which has TRITON_INTERPRET=1."""

import numpy as np
import torch


def evaluate(family, x, g, parameters, domain, tail_slopes, wanted=("x", "parameters", "domain"), programs=1024):
    """f(x), and the gradients of sum(g f(x)) by name."""
    from hf_ortho.activations import FAMILIES
    from hf_ortho.kernels import dispatch
    from hf_ortho.kernels import triton as kernels

    kernels.PROGRAMS = programs
    leaves = {"x": x} | {f"parameters.{i}": v for i, v in enumerate(parameters)} | {"domain": domain}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted or name.partition(".")[0] in wanted)
    y = dispatch.Recomputed.apply(kernels, FAMILIES[family], x, domain, tail_slopes, *parameters)
    if y.requires_grad:
        y.backward(g)
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def evaluate_with_exact_fma(*args, **options):
    """``evaluate`` with the fused multiply-add of the GPU, where the interpreter rounds twice."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def exact(self, a, b, c):
        product = a.data.astype(np.longdouble) * b.data
        return TensorHandle((product + c.data).astype(np.float32), c.dtype.scalar)

    original = InterpreterBuilder.create_fma
    InterpreterBuilder.create_fma = exact
    try:
        return evaluate(*args, **options)
    finally:
        InterpreterBuilder.create_fma = original


def evaluate_compiled(family, x, g, parameters, domain, tail_slopes):
    """``evaluate``, compiled with the operator for the backward pass; and how often its kernel was launched."""
    from hf_ortho.activations import FAMILIES
    from hf_ortho.kernels import dispatch
    from hf_ortho.kernels import triton as kernels

    class Counted:
        launches = 0

        def __getitem__(self, grid, kernel=kernels.backward_kernel):
            self.launches += 1
            return kernel[grid]

    kernels.backward_kernel = counted = Counted()
    dispatch._has_triton = lambda family, x: True
    leaves = {"x": x} | {f"parameters.{i}": v for i, v in enumerate(parameters)} | {"domain": domain}
    for leaf in leaves.values():
        leaf.requires_grad_()
    compiled = torch.compile(dispatch.activation, backend="aot_eager", fullgraph=True)
    y = compiled(FAMILIES[family], x, domain, tail_slopes, *parameters)
    y.backward(g)
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}, counted.launches


def check_registration(family, x, parameters, domain, tail_slopes, gradients):
    """torch's own checks of the operator: schema, fake tensors, AOT dispatch.

    ``gradients``: triples of whether x, the parameters and the domain need theirs.
    """
    from hf_ortho.activations import FAMILIES
    from hf_ortho.kernels import triton as kernels

    tensors = torch.ones_like(x), x, parameters, domain, tail_slopes, FAMILIES[family].triton
    found = [torch.library.opcheck(kernels.activation_backward, (*tensors, *needs)) for needs in gradients]
    return [result for results in found for result in results.values()]


def copied(value):
    """What the kernel copies that shows whether Triton works."""
    from hf_ortho.kernels import triton as kernels

    source, target = torch.tensor([value]), torch.zeros(1)
    kernels.copy_kernel[(1,)](source, target)
    return target.item()
