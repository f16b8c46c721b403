"""``recipes/figures.py`` on made-up measurements and a tiny GPT-2: its tables, its pictures, its errors."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "recipes" / "figures.py"
WAYS = ("data-free", "density", "fisher")


@pytest.fixture(scope="module")
def figures():
    return runpy.run_path(str(SCRIPT))


def result(name, way, value, encoder):
    """As ``python -m tests.pretrained --json`` writes it."""
    kl, moved = (None, {"mean": value, "worst": 2 * value}) if encoder else (value, None)
    losses = {"loss_before": None, "loss_after": None} if encoder else {"loss_before": 3.0, "loss_after": 3.0 + value}
    test = {"kl": kl, "top1": None if encoder else 1 - value, "gradient_error": 3 * value, "perplexity": True, **losses}
    others = {"code": 4 * value, "random": 6 * value}
    found = {"activation": name, "way": way, "seconds": 1.25, "sup_error": 5 * value, "test": test, "moved": moved}
    found["others"] = {domain: {"kl": None if encoder else other} for domain, other in others.items()}
    return found | {"others_moved": {domain: {"mean": other} for domain, other in others.items()} if encoder else {}}


def measured(path, names, ways=WAYS, codes=4):
    """Two models, whose distance from their source is 0.1 ** degree in the fit with Fisher weights."""
    models = [{}]  # one that has not begun
    for folder, encoder in (("x/a language model", False), ("x/an encoder", True)):
        values = {name: 0.1 ** int(name.rpartition("_")[2]) for name in names}
        rows = [result(n, way, v * (1 if way == "fisher" else 7), encoder) for n, v in values.items() for way in ways]
        about = {"folder": folder, "class": "A", "inputs": "text", "tokens": {"test": 8, "code": codes, "random": 2}}
        models.append(about | {"results": rows})
    plain = {"command": "python -m tests.pretrained", "hardware": "1 CPU core", "seed": 0, "environment": {}}
    path.write_text(json.dumps(plain | {"models": models}))
    return str(path)


def test_a_baseline_has_a_column(figures, tmp_path, capsys):
    first = measured(tmp_path / "first.json", ["hermite_3", "hermite_4"])
    second = measured(tmp_path / "second.json", ["hermite_3"], ways=["data-free", "torchortho"], codes=1)
    code, out, _ = run(figures, capsys, "--folder", tmp_path, "--fidelity", first, second)
    assert code == 0
    assert "| an encoder | 1 - cos: data-free | density | Fisher | torchortho | worst: Fisher |" in out
    assert "| `hermite_3` | 7.0e-03 | 7.0e-03 | 1.0e-03 | 7.0e-03 | 2.0e-03 |" in out
    assert "| `hermite_4` | 7.0e-04 | 7.0e-04 | 1.0e-04 | - | 2.0e-04 |" in out
    other = "| `hermite_3` | 2.8e-02 | 2.8e-02 | 4.0e-03 | - | 4.2e-02 | 4.2e-02 | 6.0e-03 | 4.2e-02 |"
    assert other in out  # "code" has another number of tokens


def run(figures, capsys, *argv):
    code = figures["main"]([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_fidelity(figures, tmp_path, capsys):
    first = measured(tmp_path / "first.json", ["hermite_3", "fourier_2"])
    names = ["hermite_2", "tropical_rational_3", "tropical_1", "fourier_1"]
    second = measured(tmp_path / "second.json", names, ways=["fisher"])
    folder, document = tmp_path / "figures", tmp_path / "fidelity.md"
    folder.mkdir()
    document.write_text("before\n<!-- tables of figures.py -->\nold\n<!-- end -->\nafter\n")
    code, out, _ = run(figures, capsys, "--folder", folder, "--fidelity", first, second)
    assert code == 0
    rows = [line for line in out.splitlines() if line.startswith("| `hermite_3`")]
    away = "| `hermite_3` | 7.0e-03 | 7.0e-03 | 1.0e-03 |"
    rest = "| 2.1e-02 | 3.0e-03 | 3.5e-02 | 5.0e-03 | 1.2 | 1.2 |"
    elsewhere = "| `hermite_3` | 2.8e-02 | 2.8e-02 | 4.0e-03 | 4.2e-02 | 4.2e-02 | 6.0e-03 |"
    assert rows == [f"{away} +0.100% | 99.90% {rest}", elsewhere, f"{away} 2.0e-03 {rest}", elsewhere]
    assert "| a language model | KL: data-free | density | Fisher | perplexity: Fisher | top-1: Fisher |" in out
    assert (
        "| an encoder, 1 - cosine | code: data-free | density | Fisher | random: data-free | density | Fisher |" in out
    )
    assert "hermite_2" not in out
    text = document.read_text()
    assert text.startswith("before\n<!-- tables of figures.py -->\n\n| a language model |")
    assert text.endswith("|\n\n<!-- end -->\nafter\n")
    assert all(row in text for row in rows)
    assert "old" not in text

    assert (folder / "fidelity.png").read_bytes()[:4] == b"\x89PNG"
    panels = figures["draw_fidelity"](json.loads((folder / "fidelity.json").read_text())).axes
    assert [axes.get_ylabel() for axes in panels] == ["KL divergence (nats)", "1 - cosine"]
    degrees = {"Hermite": [2, 3], "Fourier": [1, 2], "Tropical": [1], "Tropical rational": [3]}
    for axes in panels:
        drawn = {line.get_label(): line.get_xydata().T for line in axes.lines}
        assert {label: x.tolist() for label, (x, _) in drawn.items()} == degrees
        for x, y in drawn.values():
            np.testing.assert_allclose(y, 0.1**x)
        assert len({line.get_marker() for line in axes.lines}) == 4


@pytest.mark.slow
def test_conversion(figures, tmp_path, capsys, make_gpt2, save_parts, text_file):
    model = save_parts(tmp_path / "a model", *make_gpt2(n_positions=256, n_layer=1))
    assert run(figures, capsys, "--folder", tmp_path, "--model", model, "--text", text_file)[0] == 0
    top, below = figures["draw_conversion"](json.loads((tmp_path / "conversion.json").read_text())).axes
    drawn = {line.get_label(): line.get_xydata().T for line in top.lines}
    assert list(drawn) == ["gelu_new (source)", "hermite_3", "hermite_8"]
    x, source = drawn["gelu_new (source)"]
    expected = torch.nn.functional.gelu(torch.tensor(x), approximate="tanh").numpy()
    np.testing.assert_allclose(source, expected, atol=2e-5)
    for name, line in zip(("hermite_3", "hermite_8"), below.lines[1:], strict=True):
        np.testing.assert_allclose(line.get_ydata(), drawn[name][1] - source, atol=1e-12)
        assert 0 < np.abs(line.get_ydata()[np.abs(x) < 1]).max() < {"hermite_3": 0.2, "hermite_8": 0.01}[name]
    assert top.collections[0].get_label() == "inputs of the layer"


def test_training(figures, tmp_path, capsys):
    runs = [{"activation": name, "seed": seed, "loss": 1.0} for name in ("gelu", "hermite_3") for seed in (0, 1)]
    for each in runs:
        place = tmp_path / each["activation"] / f"seed-{each['seed']}"
        place.mkdir(parents=True)
        level = each["seed"] - (0.25 if each["activation"] == "hermite_3" else 0)
        (place / "run.json").write_text(json.dumps({"history": [[10 * i, 1 / i + level] for i in range(1, 9)]}))
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs, "caption": "a run", "versions": {}}))
    assert run(figures, capsys, "--folder", tmp_path, "--comparison", tmp_path)[0] == 0
    (axes,) = figures["draw_training"](json.loads((tmp_path / "training.json").read_text())).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), -0.25)
    assert axes.get_title() == "training loss minus gelu's, same seed"


def test_the_pictures_are_made_again_from_the_measurements(figures, tmp_path, capsys):
    assert run(figures, capsys, "--folder", tmp_path) == (0, "", "")
    plain = {"title": "a layer", "activation": "silu", "x": [-1, 0, 1], "source": [0, 0, 1], "density": [1, 2, 1]}
    fits = {name: [0, 0, 1] for name in ("hermite_3", "hermite_8")}
    (tmp_path / "conversion.json").write_text(json.dumps(plain | fits))
    assert run(figures, capsys, "--folder", tmp_path) == (0, f"Wrote {tmp_path / 'conversion.png'}\n", "")


def test_errors(figures, tmp_path, capsys, text_file):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"models": [1]}')
    for argv, reason in (
        (["--fidelity", tmp_path / "absent.json"], "absent.json cannot be read: "),
        (["--fidelity", text_file], "words.txt cannot be read: "),
        (["--fidelity", wrong], f"{wrong}: not the results of a measurement"),
        (["--comparison", tmp_path], "results.json cannot be read: "),
        (["--text", text_file], "--model and --text go together"),
        (["--model", tmp_path / "none", "--text", text_file], "none"),
    ):
        code, out, err = run(figures, capsys, "--folder", tmp_path, *argv)
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert reason in line
        assert [path.name for path in tmp_path.iterdir()] == ["wrong.json"]


def test_the_guide_has_the_tables_of_the_committed_measurement(figures):
    plain = json.loads((SCRIPT.parent / "figures" / "fidelity.json").read_text())
    text = (SCRIPT.parent / "fidelity.md").read_text()
    for table in figures["tables"](plain):
        assert table in text


@pytest.mark.parametrize("name", ["conversion", "fidelity", "training"])
def test_a_committed_picture_is_small(name):
    """GitHub shows it in a README at once."""
    picture = SCRIPT.parent / "figures" / f"{name}.png"
    assert not picture.exists() or picture.stat().st_size < 150_000
