"""Converted models in sentence-transformers: what they compute, the recipe that trains them, push and reload."""

import importlib.util
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import ModelCard
from stand_in import Repositories, hub
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)

import hf_ortho
from hf_ortho.activations import FAMILIES, LearnableActivation
from hf_ortho.errors import ConfigError
from hf_ortho.hub import enable_remote_code
from hf_ortho.hub.card.sentence import name_requirement
from hf_ortho.hub.card.write import card_of
from hf_ortho.peft import OrthoConfig

# Imported in the tests: it takes seconds, which `make test` would spend although it leaves them out.
INSTALLED = importlib.util.find_spec("sentence_transformers") is not None
pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="needs sentence-transformers"),
    pytest.mark.slow,  # converts, trains, and starts a process
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # huggingface_hub's own
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
]
SCRIPT = Path(__file__).parents[2] / "recipes" / "sentence_transformers_train.py"
TEXTS = ["one two three", "four five six seven seven", "two"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] one two three four five six seven"


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its device for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def bert(tmp_path_factory, save_parts):
    """``bert(BertModel)``: the folder of a tiny model of transformers."""

    def make(cls, **options):
        folder = tmp_path_factory.mktemp("bert")
        (folder / "words").write_text(WORDS.replace(" ", "\n"))
        tokenizer = BertTokenizerFast(vocab=str(folder / "words"))
        torch.manual_seed(0)
        sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "initializer_range": 0.3}
        return str(save_parts(folder, cls(BertConfig(**sizes, **options)), tokenizer))

    return make


@pytest.fixture(scope="module")
def source(tmp_path_factory, bert):
    """The folder of a sentence embedding model: BERT, the mean of the tokens, normalized."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(bert(BertModel))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    folder = tmp_path_factory.mktemp("source")
    SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, source, text_file, hf_ortho_command):
    folder = tmp_path_factory.mktemp("converted") / "tiny-hermite"
    ran = hf_ortho_command("convert", source, "-o", folder, "--degree", 8, "--calibration-data", text_file)
    assert ran.code == 0, ran.err
    return folder


def load(folder, kind="SentenceTransformer", **options):
    return getattr(importlib.import_module("sentence_transformers"), kind)(str(folder), device="cpu", **options)


@pytest.fixture
def train(converted, tmp_path, monkeypatch):
    """Run the recipe on the converted model, into ``tmp_path / "out"``; the names that it defines."""

    def run(**options):
        rows = [
            {"question": f"{a} {b}", "answer": f"{b} {a} {a}"} for a, b in itertools.permutations(WORDS.split()[5:], 2)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"output_dir": tmp_path / "out", "max_steps": 2, "report_to": "none", "use_cpu": True} | options
        flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(converted), str(tmp_path / "rows.jsonl"), *flags])
        return runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_the_normalized_means_of_the_converted_model(family, source, hf_ortho_command, tmp_path):
    ran = hf_ortho_command("convert", source, "-o", tmp_path / "out", "--family", family, "--degree", 4)
    assert ran.code == 0, ran.err
    model, tokenizer = AutoModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, embedding in zip(TEXTS, load(tmp_path / "out").encode(TEXTS), strict=True):
        with torch.no_grad():
            tokens = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()
        mean = tokens.mean(0)
        # float32, and padded beside the others
        np.testing.assert_allclose(embedding, mean / np.linalg.norm(mean), atol=2e-6)


def test_the_weights_in_half_precision(converted):
    exact, model = load(converted).encode(TEXTS), load(converted, model_kwargs={"dtype": "bfloat16"})
    dtypes = {type(m) is torch.nn.Linear: {p.dtype for p in m.parameters()} for m in model.modules() if is_leaf(m)}
    assert dtypes == {True: {torch.bfloat16}, False: {torch.float32}}
    rounded = model.encode(TEXTS, convert_to_tensor=True).double().numpy()
    cosines = (rounded * exact).sum(-1) / np.linalg.norm(rounded, axis=-1)
    assert (1 - cosines).max() < (8 * 2**-8) ** 2 / 2  # an angle of 8 roundings to 8 bits, about 3 per layer


def is_leaf(module):
    return isinstance(module, torch.nn.Linear | LearnableActivation)


KINDS = {
    "CrossEncoder": (BertForSequenceClassification, {"num_labels": 1}, "text-ranking"),
    "SparseEncoder": (BertForMaskedLM, {}, "feature-extraction"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_kinds_of_model(kind, bert, hf_ortho_command, tmp_path):
    architecture, options, task = KINDS[kind]
    load(bert(architecture, **options), kind).save_pretrained(str(tmp_path / "source"))
    ran = hf_ortho_command("convert", tmp_path / "source", "-o", tmp_path / "out", "--degree", 16)
    assert ran.code == 0, ran.err

    def answer(name):
        model = load(tmp_path / name, kind)
        assert len(activations(model)) == (3 if kind == "SparseEncoder" else 2) * (name != "source")
        return model.predict([tuple(TEXTS[:2])]) if kind == "CrossEncoder" else model.encode(TEXTS).to_dense().numpy()

    # the sup error of hermite_16 is 1.1e-4, in two layers
    np.testing.assert_allclose(answer("out"), answer("source"), atol=1e-3)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", task)
    assert f'from sentence_transformers import {kind}\n\nmodel = {kind}("{tmp_path / "out"}")' in card.text


def activations(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LearnableActivation)}


@pytest.mark.parametrize("policy", ["all", "activations"])
def test_the_recipe(policy, train, converted, hf_ortho_command, tmp_path):
    names = train(train=policy, learning_rate=1e-3, weight_decay=0.1)
    before, after = (dict(load(folder).named_parameters()) for folder in (converted, tmp_path / "out"))
    coefficients = {name for name in before if name.endswith("coefficients")}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert len(coefficients) == 2
    if policy == "activations":
        assert changed == coefficients
    else:  # biases of keys and the pooler of BERT have no gradient, domains and tail slopes are fixed
        assert changed > coefficients
        assert not [name for name in changed if name.endswith(("domain", "tail_slopes"))]

    trained = names["model"].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in load(tmp_path / "out").state_dict().items())
    named = {id(p): name for name, p in names["model"].named_parameters()}
    for group in names["trainer"].optimizer.param_groups:
        if {named[id(p)] for p in group["params"]} & coefficients:
            assert group["weight_decay"] == 0
    inspected = hf_ortho_command("inspect", tmp_path / "out")
    assert (inspected.code, "hermite_8" in inspected.out) == (0, True)


def test_the_recipe_prints_the_loss_on_held_out_pairs(train, converted, capfd, tmp_path):
    pairs = train(learning_rate=0.01)["pairs"]["test"]
    expected = []
    for folder in (converted, tmp_path / "out"):
        questions, answers = (load(folder).encode(pairs[name], convert_to_tensor=True) for name in pairs.features)
        scores = 20 * questions.double() @ answers.double().T  # cosines
        expected.append(torch.nn.functional.cross_entropy(scores, torch.arange(len(scores))).item())
    assert abs(expected[0] - expected[1]) > 0.05
    found = [float(loss) for loss in re.findall(r"'eval_loss': '([^']+)'", capfd.readouterr().out)]
    assert found == pytest.approx(expected, rel=1e-3)  # printed with 4 digits


def test_the_activations_with_their_own_learning_rate(train):
    names = train(learning_rate_mapping=json.dumps({"intermediate_act_fn": 0.01}))
    learned = {id(p) for module in activations(names["model"]).values() for p in module.parameters()}
    groups = [({id(p) for p in g["params"]}, g["initial_lr"]) for g in names["trainer"].optimizer.param_groups]
    assert [(ids, rate) for ids, rate in groups if ids & learned] == [(learned, 0.01)]


def test_an_adapter(source, tmp_path):
    model = load(source)
    plain = model.encode(TEXTS)
    model.add_adapter(OrthoConfig(activation="hermite_8", task_type="FEATURE_EXTRACTION"))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in trainable] == [(9,)] * 2
    with torch.no_grad():  # as if trained: far from what it was fitted to
        for parameter in trainable:
            parameter.mul_(-2)
    expected = model.encode(TEXTS)
    assert np.abs(expected - plain).max() > 0.1
    model.save_pretrained(str(tmp_path))
    assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["adapter_model.safetensors"]
    np.testing.assert_array_equal(load(tmp_path).encode(TEXTS), expected)


def test_its_card_says_what_to_import(train, tmp_path):
    train()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {"hf_ortho", "learnable-activations", "hermite", "generated_from_trainer"} <= set(card.data.tags)
    assert (
        "```python\nimport hf_ortho  # pip install hf-ortho: registers hermite_8 in transformers\nfrom sent"
        in card.text
    )
    assert 'SentenceTransformer("sentence_transformers_model_id")' in card.text
    assert 'SentenceTransformer("me/tuned")' in card_of(tmp_path / "out", repo_id="me/tuned", remote_code=False)


def test_the_card_of_another_model_is_theirs(source):
    text = (source / "README.md").read_text()
    assert "from sentence_transformers import" in text
    assert "hf_ortho" not in text


def test_a_version_without_this_function_is_left_alone():
    module = types.ModuleType("sentence_transformers.base.model")
    name_requirement(module)
    assert not hasattr(module, "generate_model_card")


@pytest.mark.parametrize("way", ["hf-ortho push", "push_to_hub"])
def test_push_and_reload(way, train, connect, hf_ortho_command, tmp_path):
    expected = train()["model"].encode(TEXTS)
    repositories = Repositories()
    with hub(repositories) as endpoint:
        connect(endpoint)
        if way == "push_to_hub":
            load(tmp_path / "out").push_to_hub("me/tuned")
        else:
            pushed = hf_ortho_command("push", tmp_path / "out", "me/tuned")
            assert pushed.code == 0, pushed.err
        scope = {}
        code = ModelCard.load("me/tuned").text.partition("```python\n")[2].partition("```")[0]
        exec(code.partition("# Run inference")[0], scope)
        np.testing.assert_array_equal(scope["model"].encode(TEXTS), expected)
        again = hf_ortho_command("convert", "me/tuned", "-o", tmp_path / "again", "--degree", 12)
        assert again.code == 0, again.err
    assert "training_args.bin" not in repositories.get("models", "me/tuned").files("main")
    assert np.abs(load(tmp_path / "again").encode(TEXTS) - expected).max() < 0.01


WITHOUT_HF_ORTHO = """
import sys
sys.modules["hf_ortho"] = None  # importing it fails
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
np.save(sys.argv[2], model.encode(sys.argv[3:]))
"""


def test_remote_code_loads_it_without_hf_ortho(converted, tmp_path):
    model = load(converted)
    enable_remote_code(model[0].model)
    model.save_pretrained(str(tmp_path / "remote"))
    argv = [sys.executable, "-c", WITHOUT_HF_ORTHO, tmp_path / "remote", tmp_path / "out.npy", *TEXTS]
    # not from the working directory, which has the package
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), load(converted).encode(TEXTS))


def test_what_holds_the_model_is_refused_with_where_it_is(source):
    model = load(source)
    with pytest.raises(ConfigError, match=r"SentenceTransformer is not .* holds one: give its \[0\]\.model"):
        enable_remote_code(model)
    hf_ortho.convert(model[0].model, "hermite_8")
    assert list(activations(model)) == [f"0.model.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in (0, 1)]
