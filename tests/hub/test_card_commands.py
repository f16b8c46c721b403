"""The cards that the commands write: figures of each stage, and what made them."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from hf_ortho.tasks import data


@pytest.fixture(scope="module")
def folders(tmp_path_factory, hf_ortho_command, gpt2_folder, text_file):
    """A model that is converted by one command and fine-tuned by another."""
    place = tmp_path_factory.mktemp("stages")
    converted, tuned = place / "converted", place / "tuned"
    flags = ["--calibration-data", text_file, "--degree", 3]
    assert hf_ortho_command("convert", gpt2_folder, "-o", converted, *flags).code == 0
    options = {
        "model": converted,
        "dataset": text_file,
        "output_dir": tuned,
        "max_steps": 1,
        "use_cpu": True,
        "seed": 7,
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    ran = hf_ortho_command("finetune", *flags, "--save_strategy", "no")
    assert ran.code == 0, ran.err
    return converted, tuned


def losses(text):
    return [tuple(float(v) for v in row) for row in re.findall(r"^\| loss \| (\S+) \| (\S+) \|", text, re.MULTILINE)]


def test_the_figures_of_the_conversion_survive_the_training(folders, text_file):
    first, second = ((folder / "README.md").read_text() for folder in folders)
    record = json.loads((folders[1] / "conversion.json").read_text())
    (before,) = losses(first)
    fidelity = record["fidelity"]
    assert before == pytest.approx((fidelity["loss_before"], fidelity["loss_after"]), abs=1e-5)
    rows = [f"| KL(source \\|\\| converted) | {fidelity['kl']:.1e} nats per prediction |", "| perplexity |"]
    for text, when in ((first, ""), (second, " before the fine-tuning")):
        predictions = f"{fidelity['predictions']:,} predictions (held-out calibration data)"
        assert f"The converted model{when}, compared with its source model on {predictions}:" in text
        assert all(text.index("## Quality") < text.index(row) < text.index("| loss |") for row in rows)
    assert losses(second)[0] == before
    stages = [list(results["values"]) for results in record["results"]]
    assert stages == [["source", "converted"], ["converted", "fine-tuned"]]
    assert ModelCard(second).data.eval_results[0].metric_value == losses(second)[1][1]
    assert "held out from training" in second
    assert "the held-out part of the calibration data" in second
    made = second.split("```bash\n")[1].split("```")[0].splitlines()
    assert [line.split()[:2] for line in made] == [["hf-ortho", "convert"], ["hf-ortho", "finetune"]]
    assert "--degree 3" in made[0]
    assert "--seed 7" in made[1]
    assert f"- Data: `{text_file.name}`\n" in second
    assert ModelCard(second).data.datasets is None
    assert "](activations.png)" in first
    assert "](activations.png)" in second
    pictures = [(folder / "activations.png").read_bytes() for folder in folders]
    assert pictures[1].startswith(b"\x89PNG")
    assert pictures[0] != pictures[1]


def test_the_commit_of_a_dataset(tmp_path, monkeypatch):
    class Builder:
        hash = "0123456789abcdef0123456789abcdef01234567"

    asked = []
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *a, **k: asked.append((a, k)) or Builder)
    assert data.commit_of("me/text", config_name="small", revision="v1") == Builder.hash
    assert asked == [(("me/text", "small"), {"revision": "v1"})]
    Builder.hash = "default-0123"
    assert data.commit_of("me/text") is None
    for local in ("digits", str(tmp_path), "absent.txt", "./absent"):
        assert data.commit_of(local) is None
    assert len(asked) == 2
