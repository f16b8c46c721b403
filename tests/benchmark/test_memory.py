"""Saved and peak memory of functions whose needs are known."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from hf_ortho.profiling import memory
from hf_ortho.profiling.memory import kept_bytes, measure_each, peak_bytes, saved_bytes

N = 4096
LARGE = 8 * 2**20  # elements: 32 MiB in float32


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (F.gelu, 1),  # x
        (F.silu, 1),
        (torch.exp, 1),  # its result
        (lambda x: x * x, 1),  # x twice, in one storage
        (lambda x: x * x.exp(), 2),  # x, and exp(x) as result and as factor
        (lambda x: x + 1, 0),
        (ACT2FN["gelu_new"], 4),  # x, x/2, tanh, 1 + tanh
        (lambda x: F.gelu(x[: N // 2]), 1),  # the whole storage stays
    ],
)
def test_saved(function, tensors):
    x = torch.randn(N, requires_grad=True)
    assert saved_bytes(lambda: function(x)) == tensors * 4 * N


def test_saved_beside_the_parameters():
    layer, x = nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) == 4 * (4 * 8 + 8 * 16)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 4 * 4 * 8


def test_saved_by_a_python_function():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.half())
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad

    x = torch.randn(N, requires_grad=True)
    assert saved_bytes(lambda: Scale.apply(x)) == 2 * N


def test_without_gradient_nothing_is_saved():
    with torch.no_grad():
        assert saved_bytes(lambda: F.gelu(torch.randn(N, requires_grad=True))) == 0


def allocate():
    """At most three tensors at a time."""
    a = torch.ones(LARGE)
    b = a + 1
    c = b * 2
    del a, b
    return c + 1


def allocate_in_a_thread():
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()


def backward():
    """Its input, its output and the gradients of both."""
    x = torch.ones(LARGE, requires_grad=True)
    y = x * 3
    torch.autograd.grad(y, x, torch.ones(LARGE))


@pytest.mark.parametrize(("call", "tensors"), [(allocate, 3), (allocate_in_a_thread, 3), (backward, 4)])
def test_peak(call, tensors):
    peak_bytes(call)  # libraries that are loaded on first use
    found = peak_bytes(call)
    assert found == pytest.approx(tensors * 4 * LARGE, rel=0.05)
    assert peak_bytes(lambda: None) < 0.05 * 4 * LARGE


def test_kept():
    x = torch.randn(LARGE, requires_grad=True)
    assert kept_bytes(lambda: x.exp().sum()) == pytest.approx(4 * LARGE, rel=0.05)  # exp(x)
    assert kept_bytes(lambda: x.exp().exp().sum()) == pytest.approx(8 * LARGE, rel=0.05)
    assert kept_bytes(allocate) == pytest.approx(4 * LARGE, rel=0.05)  # its result


def test_of_each_leaves_out_what_cannot_be_had():
    assert measure_each(lambda call, device: call(), {"a": lambda: 3, "b": lambda: None}, "cpu") == {"a": 3.0}


def test_no_peak_where_the_mark_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing")
    assert peak_bytes(allocate) is None
    assert kept_bytes(allocate) is None
    monkeypatch.setattr(memory, "CLEAR", tmp_path)  # a folder: writing fails
    assert peak_bytes(allocate) is None
