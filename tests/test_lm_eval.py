"""lm-evaluation-harness on a converted model and a local task, against log-likelihoods of the model itself."""

import functools
import json
import math
import runpy
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_ortho
from hf_ortho.peft import OrthoConfig

pytest.importorskip("lm_eval")
# of lm_eval, rouge_score and sqlitedict
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["The quick brown fox jumps.", "Polynomials are smooth."]
TASK = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_gpt2, save_parts):
    model, tokenizer = make_gpt2(initializer_range=0.3)
    hf_ortho.convert(model, "hermite_8")
    return save_parts(tmp_path_factory.mktemp("lm_eval"), model, tokenizer)


@pytest.fixture(scope="module")
def log_likelihoods(folder, make_gpt2):
    return measured(AutoModelForCausalLM.from_pretrained(folder), make_gpt2()[1])


def measured(model, tokenizer):
    """log p(text) after the end-of-text token, by the chain rule."""

    def of(text):
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        return log_p.gather(1, ids[1:, None]).sum().item()

    return [of(text) for text in TEXTS]


def test_the_command_with_the_standard_model(folder, log_likelihoods, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "texts.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    flags = ["--tasks", "texts", "--include_path", tmp_path, "--device", "cpu", "--output_path", tmp_path / "out"]
    argv = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={folder}", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", argv)
    # its own tasks are 14,000 files
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.chdir(tmp_path)
    runpy.run_module("hf_ortho.lm_eval", run_name="__main__")
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["texts"]["bits_per_byte,none"]
    size = sum(len(text.encode()) for text in TEXTS)
    assert found == pytest.approx(-sum(log_likelihoods) / size / math.log(2), rel=1e-5)


def plugin():
    """The class of the entry point, as lm_eval finds it."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    _, _, section = project.partition('[project.entry-points."lm_eval.models"]\n')
    name, place = section.splitlines()[0].split(" = ")
    assert name == "hf_ortho"
    return EntryPoint(name, place.strip('"'), "lm_eval.models").load()


def rolling(lm):
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
    return lm.loglikelihood_rolling(requests)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_plugin(batch_size, folder, log_likelihoods):
    lm = plugin()(pretrained=str(folder), device="cpu", batch_size=batch_size)
    assert rolling(lm) == pytest.approx(log_likelihoods, rel=1e-5)


def test_an_adapter(gpt2_folder, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2_folder), AutoTokenizer.from_pretrained(gpt2_folder)
    plain = measured(model, tokenizer)
    adapted = get_peft_model(model, OrthoConfig(activation="hermite_3", task_type="CAUSAL_LM"))
    with torch.no_grad():  # as if trained: far from what it was fitted to
        for parameter in filter(lambda p: p.requires_grad, adapted.parameters()):
            parameter.mul_(-30)
    adapted.save_pretrained(tmp_path)
    expected = measured(adapted.eval(), tokenizer)
    assert expected != pytest.approx(plain, rel=1e-3)
    lm = plugin()(pretrained=str(gpt2_folder), peft=str(tmp_path), device="cpu")
    assert rolling(lm) == pytest.approx(expected, rel=1e-5)
