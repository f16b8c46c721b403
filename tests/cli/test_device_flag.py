"""``hf-ortho convert --device``."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, PreTrainedModel

from hf_ortho.cli.device import chosen_device


@pytest.fixture
def accelerator(monkeypatch):
    """``accelerator("cuda", 2)``: this machine has two GPUs, or none for ``(None, 0)``."""

    def have(kind, count):
        device = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return have


@pytest.mark.parametrize(
    ("kind", "count", "name", "expected"),
    [
        (None, 0, None, "cpu"),
        (None, 0, "cpu", "cpu"),
        ("cuda", 2, None, "cuda"),
        ("cuda", 2, "cuda", "cuda"),
        ("cuda", 2, "cuda:1", "cuda:1"),
        ("cuda", 2, "cpu", "cpu"),
        ("mps", 1, None, "cpu"),
        ("mps", 1, "mps", "mps"),
    ],
)
def test_the_cuda_gpu_if_there_is_one(accelerator, kind, count, name, expected):
    accelerator(kind, count)
    assert chosen_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("kind", "count", "name", "known"),
    [
        (None, 0, "cuda", "cpu"),
        (None, 0, "foo", "cpu"),
        (None, 0, "", "cpu"),
        (None, 0, "meta", "cpu"),
        ("cuda", 1, "cuda:1", "cpu or cuda or cuda:0"),
        ("cuda", 1, "mps", "cpu or cuda or cuda:0"),
    ],
)
def test_a_device_that_is_not_here(hf_ortho_command, gpt2_folder, tmp_path, accelerator, kind, count, name, known):
    accelerator(kind, count)
    ran = hf_ortho_command("convert", gpt2_folder, "-o", tmp_path / "out", "--device", name)
    assert ran.error == f"--device {name}: torch finds no such device here; use {known}"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def moves(monkeypatch):
    """The devices that a model was moved to, or asked to; the model stays where it is."""
    asked = []

    def to(self, device):
        asked.append(str(device))
        return self

    monkeypatch.setattr(PreTrainedModel, "to", to)
    return asked


def test_the_model_is_moved_for_the_conversion(hf_ortho_command, gpt2_folder, tmp_path, accelerator, moves):
    accelerator("cuda", 1)
    for flags, device in (([], "cuda"), (["--device", "cuda:0"], "cuda:0"), (["--device", "cpu"], "cpu")):
        folder = tmp_path / device.replace(":", "-")
        assert hf_ortho_command("convert", gpt2_folder, "-o", folder, *flags).code == 0
        assert moves == [device]
        moves.clear()


@pytest.mark.parametrize("full", ["weights", "forward", "backward"])
def test_a_model_that_does_not_fit(
    hf_ortho_command, gpt2_folder, text_file, tmp_path, accelerator, moves, monkeypatch, full
):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    accelerator("cuda", 1)
    owner, name = {
        "weights": (PreTrainedModel, "to"),
        "forward": (GPT2LMHeadModel, "forward"),
        "backward": (torch.Tensor, "backward"),
    }[full]
    monkeypatch.setattr(owner, name, out_of_memory)
    ran = hf_ortho_command("convert", gpt2_folder, "-o", tmp_path / "out", "--calibration-data", text_file)
    assert not (tmp_path / "out").exists()
    assert ran.error == f"--device cuda: {gpt2_folder} does not fit in its memory; use --device cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_conversion_on_the_gpu_is_that_of_the_cpu(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    found = {}
    for device in ("cpu", "cuda"):
        flags = ["--calibration-data", text_file, "--calibration-samples", 4, "--distill", 2, "--device", device]
        ran = hf_ortho_command("convert", gpt2_folder, "-o", tmp_path / device, *flags)
        assert (ran.code, ran.err) == (0, "")
        assert "bit-equal" in ran.out
        found[device] = load_file(tmp_path / device / "model.safetensors")
    for name, expected in found["cpu"].items():  # rounding may change some of the classes that Fisher weights draw
        torch.testing.assert_close(found["cuda"][name], expected, rtol=1e-2, atol=1e-2)
