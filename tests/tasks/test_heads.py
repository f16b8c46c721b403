"""New heads: of another task, or for other classes."""

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import hf_ortho
from hf_ortho.checkpoints.load import Checkpoint, load_checkpoint
from hf_ortho.errors import CheckpointError, ConfigError
from hf_ortho.tasks import named
from hf_ortho.tasks.classification import replace_head

CLASSIFIER = "AutoModelForSequenceClassification"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = SIZES | {"vocab_size": 40}
HEADS = [  # class, config, path of the layer with the outputs, whether it has a bias
    ("GPT2ForSequenceClassification", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}, "score", False),
    ("BertForSequenceClassification", TEXT, "classifier", True),
    ("RobertaForSequenceClassification", TEXT, "classifier.out_proj", True),
    ("BartForSequenceClassification", {"d_model": 16, "vocab_size": 40}, "classification_head.out_proj", True),
    (
        "XLNetForSequenceClassification",
        {"d_model": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40},
        "logits_proj",
        True,
    ),
    ("ConvNextForImageClassification", {"hidden_sizes": [8] * 4, "depths": [1] * 4}, "classifier", True),
    ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}, "classifier.1", True),
    ("ViTForImageClassification", SIZES, "classifier", True),
]


def make(name, sizes):
    cls = getattr(transformers, name)
    if name.startswith("Bart"):
        sizes = sizes | {
            f"{part}_{what}": n
            for part in ("encoder", "decoder")
            for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
        }
    torch.manual_seed(0)
    return cls(cls.config_class(**sizes))


@pytest.mark.parametrize(("name", "sizes", "path", "bias"), HEADS, ids=[head[0] for head in HEADS])
def test_the_layer_with_the_outputs_is_replaced_and_no_other(name, sizes, path, bias):
    model = make(name, sizes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    checkpoint = Checkpoint(model, None, None, None)
    replace_head(checkpoint, 300, seed=1)
    assert checkpoint.new_modules == (path,)
    layer = model.get_submodule(path)
    assert layer.weight.shape[0] == model.config.num_labels == getattr(model, "num_labels", 300) == 300
    assert (layer.bias is not None) == bias
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{path}.weight"} | ({f"{path}.bias"} if bias else set())
    if not name.startswith("ResNet"):  # which keeps torch's initialization: uniform
        # The standard deviation over at least 2,400 normal numbers is within 1.5 % (one sigma) of that of the config.
        expected = getattr(model.config, "initializer_range", getattr(model.config, "init_std", None))
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)
    first = layer.weight.clone()
    for seed in (1, 2):
        replace_head(checkpoint, 300, seed)
        assert torch.equal(model.get_submodule(path).weight, first) == (seed == 1)
    assert checkpoint.new_modules == (path,)


def test_a_model_without_outputs_has_no_head_to_replace():
    with pytest.raises(ConfigError, match=r"^BertModel has no head to replace with one of 3 outputs$"):
        replace_head(Checkpoint(make("BertModel", TEXT), None, None, None), 3, seed=0)


def test_a_language_model_gets_the_head_of_another_task(tmp_path, make_gpt2, caplog):
    source, _ = make_gpt2()
    source.save_pretrained(tmp_path)
    torch.manual_seed(3)
    found = load_checkpoint(str(tmp_path), auto_class=CLASSIFIER)
    assert type(found.model) is GPT2ForSequenceClassification
    assert found.new_modules == ("score",)
    for key, value in source.transformer.state_dict().items():
        assert torch.equal(found.model.transformer.state_dict()[key], value)
    torch.manual_seed(3)
    again = load_checkpoint(str(tmp_path), auto_class=CLASSIFIER).model
    assert torch.equal(again.score.weight, found.model.score.weight)
    assert f"the weights of {tmp_path} lack score.weight of GPT2ForSequenceClassification, which start" in caplog.text


def test_the_class_of_the_config_keeps_its_head(tmp_path, make_gpt2):
    source = GPT2ForSequenceClassification(make_gpt2()[0].config)
    source.save_pretrained(tmp_path)
    found = load_checkpoint(str(tmp_path), auto_class=CLASSIFIER)
    assert found.new_modules == ()
    assert torch.equal(found.model.score.weight, source.score.weight)


def test_an_encoder_without_a_pooler_gets_one_with_the_head(tmp_path):
    BertModel(BertConfig(**TEXT), add_pooling_layer=False).save_pretrained(tmp_path)
    found = load_checkpoint(str(tmp_path), auto_class=CLASSIFIER)
    assert found.new_modules == ("bert.pooler", "classifier")
    assert load_checkpoint(str(tmp_path), auto_class="AutoModelForMaskedLM").new_modules == ("cls",)


@pytest.mark.parametrize(("name", "dtype"), [("hermite_8", "float32"), ("hermite_8_g4", "bfloat16")])
def test_the_activation_of_a_new_head_is_fitted_like_the_others(tmp_path, caplog, name, dtype):
    """To the GELU that the conversion replaced: 3.2e-3 from it at most for degree 8, with the tails."""
    model = make("BertModel", SIZES)
    hf_ortho.convert(model, name)
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(str(tmp_path), auto_class="AutoModelForMaskedLM", dtype=dtype).model
    act, x = loaded.cls.predictions.transform.transform_act_fn, torch.linspace(-20, 20, 2001)
    assert (act(x[:, None].expand(-1, 16)) - torch.nn.functional.gelu(x)[:, None]).abs().max() < 5e-3
    assert "act_fn" not in caplog.text  # of the tensors that start at random


def test_the_activation_of_a_new_head_waits_for_the_values_of_the_first_process(tmp_path, monkeypatch):
    """With fsdp_cpu_ram_efficient_loading, the other processes have no values of missing tensors yet."""
    model = make("BertModel", SIZES)
    hf_ortho.convert(model, "hermite_3")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.is_fsdp_enabled", lambda: True)
    monkeypatch.setattr("transformers.modeling_utils.is_local_dist_rank_0", lambda: False)
    loaded = load_checkpoint(str(tmp_path), auto_class="AutoModelForMaskedLM").model
    assert loaded.cls.predictions.transform.transform_act_fn.domain.is_meta


def test_the_activation_of_a_new_head_is_not_fitted_to_an_unknown_one(tmp_path, caplog):
    model = make("BertModel", SIZES)
    hf_ortho.convert(model, "hermite_3")
    model.config.hf_ortho["source_activations"] = {"hidden_act": "of_other_code"}
    model.save_pretrained(tmp_path)
    load_checkpoint(str(tmp_path), auto_class="AutoModelForMaskedLM")
    assert "and 6 more tensors of BertForMaskedLM, which start at random" in caplog.text  # with 3 of the activation


def test_a_missing_weight_of_the_base_model_is_no_new_head(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    config.n_layer = 2
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"is incomplete: its weights lack transformer\.h\.1\."):
        load_checkpoint(str(tmp_path), auto_class=CLASSIFIER)


def test_a_model_type_that_has_no_such_head(tmp_path, make_convnext):
    make_convnext()[0].save_pretrained(tmp_path)
    said = f"^{tmp_path} cannot be loaded with {CLASSIFIER}, which has no class for its config$"
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(str(tmp_path), auto_class=CLASSIFIER)


def test_tasks_by_name():
    assert named("text-generation").auto_class == "AutoModelForCausalLM"
    with pytest.raises(ConfigError, match=r"^task 'image-classificaton': must be one of .*did you mean image-classif"):
        named("image-classificaton")
