"""``hf-ortho inspect``: the numbers it prints, against those of the loaded model."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

import hf_ortho
from hf_ortho.activations import FAMILIES


@pytest.fixture(scope="module")
def converted(tmp_path_factory, make_gpt2):
    """``converted("hermite_8")``: the folder of a converted GPT-2 of twelve layers."""
    folders = {}

    def converted(activation):
        if activation not in folders:
            model, _ = make_gpt2(n_layer=12)
            hf_ortho.convert(model, activation)
            folders[activation] = tmp_path_factory.mktemp("inspect") / activation
            model.save_pretrained(folders[activation])
        return folders[activation]

    return converted


def moments(module):
    """E f^2 and E f'^2 under N(0, 1) by the trapezoidal rule, f' by autograd."""
    x = torch.linspace(-9, 9, 180_001, dtype=torch.float64, requires_grad=True)
    value = module(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    weight = torch.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return [torch.trapezoid(f**2 * weight, x).item() for f in (value, slope)]


@pytest.mark.parametrize("family", FAMILIES)
def test_json(hf_ortho_command, converted, family):
    folder = converted(f"{family}_4")
    ran = hf_ortho_command("inspect", folder, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["model"] == str(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found["provenance"] == model.config.hf_ortho
    assert [layer["module"] for layer in found["layers"]] == [f"transformer.h.{i}.mlp.act" for i in range(12)]
    layer = found["layers"][7]
    module = model.get_submodule("transformer.h.7.mlp.act")
    assert (layer["activation"], layer["family"], layer["degree"]) == (f"{family}_4", family, 4)
    stored = layer["parameters"] | {key: layer[key] for key in ("domain", "tail_slopes")}
    unbounded = {key: [v if np.isfinite(v) else None for v in t.tolist()] for key, t in module.state_dict().items()}
    assert stored == unbounded
    assert layer["source"] == "gelu_new"
    expected = moments(module)
    assert [layer["gain"]["value"], layer["gain"]["derivative"]] == pytest.approx(expected, rel=2e-4)
    x = torch.linspace(-12, 12, 9601, dtype=torch.float64)
    with torch.no_grad():
        e = module(x) - ACT2FN["gelu_new"](x)
    weight = torch.exp(-(((x + 0.5) / 1.5) ** 2) / 2)
    rms = ((weight * e**2).sum() / weight.sum()).sqrt().item()
    assert layer["distance"]["sup_error"] == pytest.approx(e.abs().max().item(), rel=0.02)
    assert layer["distance"]["rms_error"] == pytest.approx(rms, rel=0.05)


def test_text(hf_ortho_command, converted, tmp_path):
    """Equal layers next to each other are shown once."""
    folder = tmp_path / "converted"
    shutil.copytree(converted("tropical_rational_8"), folder)
    tensors = load_file(folder / "model.safetensors")
    first = next(iter(hf_ortho.activations.TropicalRational(8).state_dict()))
    tensors[f"transformer.h.7.mlp.act.{first}"] += 0.01
    save_file(tensors, folder / "model.safetensors")
    ran = hf_ortho_command("inspect", folder)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    for start in (
        "source activations  activation_function gelu_new",
        "calibrated          no",
        "versions            hf_",
    ):
        assert any(line.startswith(start) for line in lines)
    found = json.loads(hf_ortho_command("inspect", folder, "--json").out)["layers"]
    assert "tropical_rational_8: 12 activations at transformer.h.*.mlp.act" in ran.out
    for row, layer in [("0..6", found[0]), ("0..6", found[6]), ("7", found[7]), ("8..11", found[8])]:
        cells = ran.figures[row]
        gain = [f"{layer['gain'][key]:.4g}" for key in ("value", "derivative")]
        measured = [f"{layer['distance'][key]:.1e}" for key in ("sup_error", "rms_error")]
        assert cells[-4:] == gain + measured
    heads = [line for line in lines if line.startswith("transformer.h.")]
    assert heads == [f"transformer.h.{row}.mlp.act tropical_rational_8" for row in ("0..6", "7", "8..11")]
    for name, values in found[11]["parameters"].items():
        at = max(i for i, line in enumerate(lines) if line.strip().startswith(f"{name} "))
        words = " ".join(lines[at : at + 2]).split()
        assert words[: 1 + len(values)] == [name, *(f"{value:.4g}" for value in values)]


def test_from_scratch(hf_ortho_command, make_gpt2, tmp_path):
    """The paper's initialization at degree 3: no provenance, no bounds, no source."""
    make_gpt2(activation_function="hermite_3")[0].save_pretrained(tmp_path)
    found = json.loads(hf_ortho_command("inspect", tmp_path, "--json").out)
    assert found["provenance"] == {}
    for layer in found["layers"]:
        assert layer["domain"] == [None, None]
        assert (layer["source"], layer["distance"]) == (None, None)
        expected = np.float32([np.sqrt(1 - 1 / 6), 1, 1, 1]) / np.float32(np.sqrt(np.e))
        np.testing.assert_allclose(layer["parameters"]["coefficients"], expected, rtol=1e-6)
        assert layer["gain"]["value"] == pytest.approx(0.920, abs=1e-3)
    text = hf_ortho_command("inspect", tmp_path)
    assert text.code == 0
    assert "none: the config has no hf_ortho entry" in text.out
    assert text.figures["0..1"][-2:] == ["-", "-"]


def test_a_source_that_cannot_be_followed(hf_ortho_command, tmp_path, make_gpt2):
    model, _ = make_gpt2()
    hf_ortho.convert(model, "hermite_3")
    model.config.hf_ortho["source_activations"] = {"activation_function": "relu2"}
    model.config.hf_ortho["layers"] = []
    model.save_pretrained(tmp_path)
    ran = hf_ortho_command("inspect", tmp_path)
    assert ran.code == 0
    assert [line for line in ran.out.splitlines() if line.startswith("no distance: relu2 has no asymptotic slope")]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_refuses(hf_ortho_command, gpt2_folder, tmp_path, flags):
    ran = hf_ortho_command("inspect", gpt2_folder, *flags)
    assert ran.error == f"{gpt2_folder} has no learnable activations; convert it first with hf-ortho convert"
    assert ran.out == ""
    assert "does not exist" in hf_ortho_command("inspect", tmp_path / "missing", *flags).error


def test_without_tails_the_distance_is_taken_on_the_domain(hf_ortho_command, gpt2_folder, tmp_path):
    flags = ["--degree", 6, "--no-tails", "--domain", -5, 4]
    assert hf_ortho_command("convert", gpt2_folder, "-o", tmp_path / "pure", *flags).code == 0
    report = json.loads((tmp_path / "pure" / "conversion.json").read_text())
    ran = hf_ortho_command("inspect", tmp_path / "pure", "--json")
    for layer, converted in zip(json.loads(ran.out)["layers"], report["layers"], strict=True):
        assert layer["domain"] == [None, None]
        assert layer["distance"]["sup_error"] == pytest.approx(converted["sup_error"])
    assert "-5.00..4.00" in hf_ortho_command("inspect", tmp_path / "pure").out


def test_names_from_files_cannot_pass_for_output(converted, tmp_path, hf_ortho_command):
    folder = tmp_path / "forged"
    shutil.copytree(converted("hermite_2"), folder)
    name = "\x1b]0;x\x07\n[red]forged"
    tensors = {key.replace(".3.", f".{name}."): value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["hf_ortho"] = {"source_activations": {"activation_function": f"gelu{name}"}}
    (folder / "config.json").write_text(json.dumps(config))
    ran = hf_ortho_command("inspect", folder)
    assert ran.code == 0
    assert r"transformer.h.\x1b]0;x\x07\n[red]forged.mlp.act hermite_2" in ran.out
    assert r"source gelu\x1b]0;x\x07\n[red]forged" in " ".join(ran.out.split())
    assert "\x1b" not in ran.out
    assert "\n[red]" not in ran.out


@pytest.mark.parametrize("name", ["/no\n\x1b[31msuch/\tfolder", "a" * 5000, "/a\0b"], ids=["controls", "long", "null"])
def test_a_strange_name_is_refused_in_one_line(hf_ortho_command, name):
    assert hf_ortho_command("inspect", name).error.isprintable()


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_channels(hf_ortho_command, make_gpt2, tmp_path, family):
    """All numbers in JSON; in text one row per activation, and three per parameter."""
    model, _ = make_gpt2()
    hf_ortho.convert(model, f"{family}_3_g4")
    path = "transformer.h.0.mlp.act"
    module = model.get_submodule(path)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            if parameter.ndim == 2:
                parameter += torch.linspace(-0.02, 0.02, 4)[:, None] * (i + 1)
    model.save_pretrained(tmp_path)
    ran = hf_ortho_command("inspect", tmp_path, "--json")
    layer = json.loads(ran.out)["layers"][0]
    assert (layer["activation"], layer["degree"], layer["groups"]) == (f"{family}_3_g4", 3, 4)
    stored = layer["parameters"] | {key: layer[key] for key in ("domain", "tail_slopes")}
    state = module.state_dict()
    if module.domain.isinf().all():
        assert stored.pop("domain") == [[None, None]] * 4
    assert stored == {key: state[key].tolist() for key in stored}
    expected = np.mean([moments(member) for member in module.members()], axis=0)
    assert [layer["gain"]["value"], layer["gain"]["derivative"]] == pytest.approx(expected.tolist(), rel=2e-4)
    ran = hf_ortho_command("inspect", tmp_path)
    lines = ran.out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    lo, hi = module.domain[:, 0].min().item(), module.domain[:, 1].max().item()
    assert ran.figures["0"][0] == f"{lo:.2f}..{hi:.2f}"
    name = next(iter(layer["parameters"]))
    for kind, row in (("min", state[name].amin(0)), ("max", state[name].amax(0))):
        found = next(line for line in lines if line.split()[:2] == [name, kind]).split()[2:]
        assert [float(value) for value in found] == pytest.approx(row.tolist(), rel=1e-3, abs=1e-4)
    assert any(line.startswith("with groups of channels") for line in lines)
