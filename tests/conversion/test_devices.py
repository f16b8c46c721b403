"""What the device of a model must be able to do: MPS has no float64, and CUDA has nondeterministic operations."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import hf_ortho
from hf_ortho.activations import FAMILIES, build
from hf_ortho.conversion import Histogram
from hf_ortho.training.logger import _Moments


class Device(TorchDispatchMode):
    """Follows what is computed from ``tensors``, as if it stayed on their device until ``cpu`` is called."""

    def __init__(self, tensors):
        super().__init__()
        self.there = WeakTensorKeyDictionary()
        for tensor in tensors:
            self.there[tensor] = True
        self.dtypes, self.operations = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(v, torch.Tensor) and v in self.there for v in tree_leaves((args, kwargs))):
            self.operations.add(func.overloadpacket.__name__)
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.there[tensor] = True
                    self.dtypes.add(tensor.dtype)
        return out


@pytest.fixture
def follow(monkeypatch):
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: plain(torch.from_numpy(tensor.detach().numpy().copy())))
    return Device


def test_the_guard_sees_float64_and_what_leaves_the_device(follow):
    x = torch.ones(3)
    with follow([x]) as device:
        (x + 1).cpu().double().sum()
        assert torch.float64 not in device.dtypes
        (x + 1).double().cpu().sum()
    assert torch.float64 in device.dtypes


def test_a_calibrated_conversion_needs_no_float64_on_the_device(follow, gpt2, ids):
    model = gpt2()
    batch = {"input_ids": ids, "labels": ids}
    with follow([*model.parameters(), ids]) as device:
        report = hf_ortho.convert(model, "hermite_3", calibration=[batch])
    assert None not in (report.fidelity.loss_before, report.fidelity.kl, report.fidelity.gradient_error)
    assert "index_add_" in device.operations
    assert torch.float64 not in device.dtypes


def test_recorded_moments_need_no_float64_on_the_device(follow):
    module, x = build("hermite_3"), 3 * torch.randn(2000, generator=torch.Generator().manual_seed(0)) - 1
    module.domain.data.copy_(torch.tensor([-2.0, 2.0]))
    with follow([x, *module.parameters()]) as device:
        moments = _Moments(module)
        for part in x.split(700):
            module(part)
        found = moments.close()
    assert torch.float64 not in device.dtypes
    exact = x.double()
    expected = {
        "minimum": float(x.min()),
        "maximum": float(x.max()),
        "mean": float(exact.mean()),
        "std": float(exact.std(correction=0)),
        "outside": float((x.abs() > 2).double().mean()),
    }
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_elsewhere_is_evaluated_on_the_cpu(family):
    module = build(f"{family}_3")
    expected, moved = module.gain(), []

    class Elsewhere:
        type = "mps"

    class There(type(module)):
        @property
        def domain(self):
            domain = self._parameters["domain"]
            return domain if moved else type("Domain", (), {"device": Elsewhere(), "tolist": domain.tolist})()

        def cpu(self):
            moved.append(True)
            return super().cpu()

    module.__class__ = There
    assert module.gain() == expected
    assert moved


def test_a_histogram_uses_no_nondeterministic_operation(follow):
    """From the list of torch.use_deterministic_algorithms."""
    x = torch.randn(1000)
    with follow([x]) as device:
        histogram, other = Histogram(), Histogram()
        histogram.update(x)
        other.update(x.reshape(10, 100))
        histogram.add(other)
    assert histogram.counts.sum() == 2000
    assert device.operations & {"bincount"}  # without weights
    forbidden = ("histc", "put", "scatter", "index_add", "cumsum", "kthvalue", "median", "_weighted", "histogram")
    assert not [name for name in device.operations if any(word in name for word in forbidden)]
