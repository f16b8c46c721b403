"""``hf-ortho plot``: what it draws, and what it refuses."""

import errno
import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

import hf_ortho.plotting
from hf_ortho.plotting import shapes


@pytest.fixture(scope="module")
def converted(tmp_path_factory, gpt2_folder, hf_ortho_command):
    folder = tmp_path_factory.mktemp("plot") / "converted"
    assert hf_ortho_command("convert", gpt2_folder, "-o", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def moved(tmp_path_factory, converted):
    """``moved(0.5)``: the converted checkpoint with the constant coefficient of every activation raised."""

    def moved(by, folder=None):
        folder = folder or tmp_path_factory.mktemp("moved") / "model"
        shutil.copytree(converted, folder)
        tensors = load_file(folder / "model.safetensors")
        for key, value in tensors.items():
            if key.endswith(".act.coefficients"):
                value[0] += by
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return moved


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, moved):
    """What Trainer leaves: checkpoints 5 and 10 (the first by name is the last by step), and other folders."""
    folder = tmp_path_factory.mktemp("run")
    for step, by in ((10, 0.2), (5, 0.1)):
        moved(by, folder / f"checkpoint-{step}")
    (folder / "checkpoint-best").mkdir()
    (folder / "runs").mkdir()
    return folder


@pytest.fixture
def calls(monkeypatch):
    """The arguments with which the command draws, by function; nothing is drawn."""
    found = {}
    places = {"plot_activations": shapes, "plot_history": hf_ortho.plotting, "animate_history": hf_ortho.plotting}
    for name, place in places.items():
        monkeypatch.setattr(place, name, lambda *args, name=name, **kw: found.update({name: (args, kw)}))
    return found


@pytest.fixture
def panels(calls):
    """``panels()``: those of the last ``plot_activations``."""
    return lambda: calls["plot_activations"][0][0]


def drop_layer(folder, layer):
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if f"h.{layer}.mlp.act." not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["hf_ortho"]["layers"] = [x for x in config["hf_ortho"]["layers"] if f"h.{layer}.mlp.act" not in x["module"]]
    (folder / "config.json").write_text(json.dumps(config))


def test_png(hf_ortho_command, converted, text_file, tmp_path):
    path = tmp_path / "shapes.png"
    ran = hf_ortho_command("plot", converted, "-o", path, "--calibration-data", text_file, "--calibration-samples", 2)
    assert (ran.code, ran.err) == (0, "")
    assert imread(path).size
    assert ran.out == f"Loading {converted}\nRunning the model on {text_file}\nWrote {path}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["shapes.png"]


def test_source_and_data(hf_ortho_command, converted, text_file, panels):
    assert hf_ortho_command("plot", converted, "--calibration-data", text_file, "--calibration-samples", 3).code == 0
    assert [panel.title for panel in panels()] == [f"transformer.h.{i}.mlp.act" for i in range(2)]
    x = torch.linspace(-4, 4, 81)
    for panel in panels():
        assert torch.equal(panel.source(x), ACT2FN["gelu_new"](x))
        assert (panel.learned(x) - F.gelu(x)).abs().max() < 1e-2
        assert panel.histogram.counts.sum() == 3 * 32 * 64  # blocks, tokens, channels


def test_without_data(hf_ortho_command, converted, panels, calls):
    assert hf_ortho_command("plot", converted).code == 0
    assert [panel.title for panel in panels()] == [f"transformer.h.{i}.mlp.act" for i in range(2)]
    assert [panel.histogram for panel in panels()] == [None, None]
    assert calls["plot_activations"][0][1:] == ("activations.png", f"{converted}: hermite_8 for gelu_new")


def test_the_source_of_a_second_conversion(hf_ortho_command, converted, panels, tmp_path):
    """A learned shape has no name; its initial values are not what was replaced."""
    again = tmp_path / "again"
    assert hf_ortho_command("convert", converted, "-o", again, "--family", "fourier").code == 0
    assert json.loads((again / "config.json").read_text())["activation_function"] == "fourier_6"
    assert hf_ortho_command("plot", again).code == 0
    x = torch.linspace(-4, 4, 81)
    assert len(panels()) == 2
    for panel in panels():
        assert panel.source is None or (panel.source(x) - F.gelu(x)).abs().max() < 1e-2


def test_each_panel_has_its_own_source(hf_ortho_command, moved, panels):
    folder = moved(0.0)
    config = json.loads((folder / "config.json").read_text())
    for layer, source in zip(config["hf_ortho"]["layers"], ("relu", "silu"), strict=True):
        layer["source"] = source
    (folder / "config.json").write_text(json.dumps(config))
    assert hf_ortho_command("plot", folder).code == 0
    x = torch.linspace(-4, 4, 81)
    for panel, function in zip(panels(), (F.relu, F.silu), strict=True):
        assert torch.equal(panel.source(x), function(x))


def test_the_text_column_of_calibration_data(hf_ortho_command, converted, panels, tmp_path):
    (tmp_path / "two.jsonl").write_text(json.dumps({"title": "none", "body": "some words " * 9}) + "\n")
    flags = ["--calibration-data", tmp_path / "two.jsonl", "--block-size", 16]
    sentence = hf_ortho_command("plot", converted, *flags).error
    assert "no unambiguous text column (columns: title, body); name it with --text-column" in sentence
    assert hf_ortho_command("plot", converted, *flags, "--text-column", "body").code == 0
    assert all(panel.histogram is not None for panel in panels())


def test_against(hf_ortho_command, converted, moved, calls, panels):
    other = moved(0.5)
    ran = hf_ortho_command("plot", converted, "--against", other)
    assert (ran.code, ran.out) == (0, "Wrote activations.png\n")
    assert calls["plot_activations"][1] == {"other": f"against {other}"}
    for panel in panels():
        # He_0 = 1, so the constant coefficient moves the whole shape
        x = torch.linspace(-4, 4, 81)
        assert torch.allclose(panel.other(x), panel.learned(x) + 0.5, atol=1e-6)


def test_against_names_what_only_one_has(hf_ortho_command, converted, moved, panels):
    other = moved(0.5)
    drop_layer(other, 1)
    ran = hf_ortho_command("plot", converted, "--against", other)
    assert ran.out.splitlines()[0] == f"note: not drawn: transformer.h.1.mlp.act only in {converted}"
    assert [panel.title for panel in panels()] == ["transformer.h.0.mlp.act"]


def test_against_needs_common_activations(hf_ortho_command, converted, moved, gpt2_folder, calls):
    first, second = moved(0.0), moved(0.0)
    drop_layer(first, 0)
    drop_layer(second, 1)
    error = hf_ortho_command("plot", first, "--against", second).error
    assert "no activations in common" in error
    assert "transformer.h.1.mlp.act" in error
    assert "transformer.h.0.mlp.act" in error
    assert f"{gpt2_folder} has no learnable" in hf_ortho_command("plot", converted, "--against", gpt2_folder).error
    assert calls == {}


@pytest.mark.parametrize(("name", "draw"), [("x.png", "plot_history"), ("x.gif", "animate_history")])
def test_history(hf_ortho_command, run_dir, moved, calls, tmp_path, name, draw):
    end = moved(0.3)
    assert hf_ortho_command("plot", end, "--history", run_dir, "-o", tmp_path / name).code == 0
    ((snapshots, path, title), _) = calls[draw]
    assert [snapshot.label for snapshot in snapshots] == ["step 5", "step 10", f"end ({end})"]
    x = torch.linspace(-4, 4, 81)
    for layer in ("transformer.h.0.mlp.act", "transformer.h.1.mlp.act"):
        first, second, last = (snapshot.modules[layer](x) for snapshot in snapshots)
        assert torch.allclose(second, first + 0.1, atol=1e-6)
        assert torch.allclose(last, first + 0.2, atol=1e-6)
    assert path == str(tmp_path / name)
    assert title == f"{run_dir}: hermite_8"


def test_history_without_a_model_as_a_gif(hf_ortho_command, run_dir, tmp_path):
    ran = hf_ortho_command("plot", "--history", run_dir, "-o", tmp_path / "x.gif")
    assert (ran.code, ran.err) == (0, "")
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x.gif"]


def test_history_draws_what_all_have(hf_ortho_command, run_dir, moved, calls):
    end = moved(0.3)
    drop_layer(end, 0)
    ran = hf_ortho_command("plot", end, "--history", run_dir)
    layer = "transformer.h.0.mlp.act"
    assert ran.out.splitlines()[0] == f"note: not drawn: {layer} only in step 5; {layer} only in step 10"
    assert {tuple(s.modules) for s in calls["plot_history"][0][0]} == {("transformer.h.1.mlp.act",)}


def test_history_refuses(hf_ortho_command, run_dir, converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = tmp_path / "one"
    shutil.copytree(run_dir / "checkpoint-5", one / "checkpoint-5")
    for flags, message in (
        ([converted], "no checkpoint-STEP folders"),
        (["nowhere"], "nowhere: the folder does not exist"),
        ([one], "has only checkpoint-5, but two steps are needed"),
        ([run_dir, "--against", converted], "--history cannot be combined with --against"),
        ([run_dir, "--calibration-data", "x.txt"], "--history cannot be combined with --calibration-data"),
        ([run_dir, "-o", "x.mp4"], "--output x.mp4: must end in .png, or in .gif with --history"),
    ):
        assert message in hf_ortho_command("plot", "--history", *flags).error
    (one / "checkpoint-5" / "model.safetensors").unlink()
    assert "checkpoint-5 has neither model.safetensors" in hf_ortho_command("plot", "--history", one).error
    assert list(tmp_path.iterdir()) == [one]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "shapes.pdf"], "--output shapes.pdf: must end in .png"),
        (["-o", "shapes.gif"], "must end in .png, or in .gif with --history"),
        (["-o", "no/such/folder/shapes.png"], "no/such/folder/shapes.png cannot be written"),
        (["-o", "x" * 252 + ".png"], f".png cannot be written: {os.strerror(errno.ENAMETOOLONG)}"),
        (["--calibration-data", "/no/such/file.txt"], "/no/such/file.txt does not exist"),
        (["--calibration-data", "words.docx"], "words.docx"),
        (["--against", "/no/such/model"], "/no/such/model does not exist"),
        (["--size", "3"], "unknown flag --size"),
    ],
)
def test_refuses(hf_ortho_command, converted, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in hf_ortho_command("plot", converted, *flags).error
    assert list(tmp_path.iterdir()) == []


def test_needs_a_converted_model(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    output = tmp_path / "shapes.png"
    for flags, message in (
        ([gpt2_folder], "no learnable activations"),
        ([gpt2_folder, "--calibration-data", text_file], "no learnable activations"),
        ([tmp_path / "missing"], "does not exist"),
        ([], "MODEL is missing"),
    ):
        assert message in hf_ortho_command("plot", *flags, "-o", output).error
    assert list(tmp_path.iterdir()) == []
