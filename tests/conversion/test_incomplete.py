"""Checkpoints that lack weights, or whose activations have impossible values, are refused wherever they are read."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PegasusConfig,
    PegasusForConditionalGeneration,
)

import hf_ortho
from hf_ortho.activations import FAMILIES, build
from hf_ortho.checkpoints.activations import load_activations
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.errors import CheckpointError
from hf_ortho.hub.contents import contents_of
from hf_ortho.peft import OrthoConfig

ACT = "transformer.h.1.mlp.act"


@pytest.fixture(scope="module")
def tiny_bert():
    return BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


@pytest.fixture
def converted(gpt2, tmp_path):
    """``converted(change)``: a converted GPT-2 whose tensors were changed after saving."""

    def save(change):
        model = gpt2()
        hf_ortho.convert(model, "hermite_3")
        model.save_pretrained(tmp_path)
        rewrite(tmp_path / "model.safetensors", change)
        return tmp_path

    return save


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def configure(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refused(load, folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# ---- missing and superfluous weights -------------------------------------------------------------------------------


def test_missing_weights_are_named_and_counted(gpt2, tmp_path):
    gpt2().save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda t: [t.pop(key) for key in sorted(t)[:5]])
    refused(load_checkpoint, tmp_path, r"is incomplete: .* lack transformer\.h\.0\.attn.* and 2 more tensors of GPT2LM")


def test_weights_of_another_shape(gpt2, tmp_path):
    gpt2(n_embd=32).save_pretrained(tmp_path)
    configure(tmp_path, n_embd=48, n_head=2)
    refused(load_checkpoint, tmp_path, r"does not fit its config: .* has the shape \[\d+\], not \[\d+\] \(\d+ more\)")


def test_tied_weights_and_old_buffers_are_not_needed(gpt2, tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 4, 4)

    def as_in_old_versions(tensors):
        assert "lm_head.weight" not in tensors
        tensors |= {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.zeros(())}

    rewrite(tmp_path / "model.safetensors", as_in_old_versions)
    found = load_checkpoint(str(tmp_path)).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_what_many_checkpoints_lack(tiny_bert, tmp_path, caplog):
    """Sines are computed, and a pooler starts from the same random numbers each time."""
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    pegasus = PegasusForConditionalGeneration(
        PegasusConfig(vocab_size=16, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    )
    for name, model in {"pegasus": pegasus, "bert": BertModel(tiny_bert)}.items():
        model.save_pretrained(tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        rewrite(weights, lambda t: [t.pop(key) for key in list(t) if "embed_positions" in key or "pooler" in key])
    found = load_checkpoint(str(tmp_path / "pegasus")).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in pegasus.state_dict().items())
    assert not caplog.messages
    first, second = (load_checkpoint(str(tmp_path / "bert")).model.pooler.dense.weight for _ in range(2))
    assert torch.equal(first, second)
    assert caplog.messages[0].endswith(
        "bert lack pooler.dense.bias, pooler.dense.weight of BertModel, which start at random"
    )


def test_weights_of_other_heads_are_named(tiny_bert, tmp_path, caplog):
    model = BertForPreTraining(tiny_bert)
    model.config.architectures = ["BertForMaskedLM"]
    model.save_pretrained(tmp_path)
    configure(tmp_path, architectures=["BertForMaskedLM"])
    found = load_checkpoint(str(tmp_path)).model
    assert type(found) is BertForMaskedLM
    assert torch.equal(found.cls.predictions.bias, model.cls.predictions.bias)
    (note,) = [record.getMessage() for record in caplog.records if record.name == "hf_ortho"]
    assert note.startswith(
        "note: BertForMaskedLM does not use bert.pooler.dense.bias, bert.pooler.dense.weight, cls.seq"
    )
    assert note.endswith(f"and 1 more tensors of {tmp_path}")


def test_a_head_may_only_be_missing_where_a_new_one_is_requested(gpt2, tmp_path):
    gpt2(GPT2ForSequenceClassification).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    new = load_checkpoint(str(tmp_path), num_labels=7, ignore_mismatched_sizes=True).model
    assert new.score.weight.shape[0] == 7
    refused(lambda place: load_checkpoint(place, num_labels=7), tmp_path, r"score\.weight has the shape \[2, ")
    rewrite(weights, lambda t: t.pop("score.weight"))
    refused(load_checkpoint, tmp_path, r"lack score\.weight of GPT2ForSequenceClassification")
    assert load_checkpoint(str(tmp_path), num_labels=7, ignore_mismatched_sizes=True).model.score.weight.shape[0] == 7
    rewrite(weights, lambda t: t.pop("transformer.ln_f.bias"))
    refused(
        lambda place: load_checkpoint(place, num_labels=7, ignore_mismatched_sizes=True),
        tmp_path,
        r"lack transformer\.ln_f\.bias of GPT2ForSequenceClassification",
    )


def test_a_sentence_transformers_model_without_the_head_it_names(tiny_bert, tmp_path, caplog):
    model = BertModel(tiny_bert)
    model.save_pretrained(tmp_path)
    configure(tmp_path, architectures=["BertForMaskedLM"])
    refused(load_checkpoint, tmp_path, r"is incomplete: its weights lack cls\.predictions\.bias")
    (tmp_path / "modules.json").write_text("[]")
    found = load_checkpoint(str(tmp_path)).model
    assert type(found) is BertModel
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())
    assert f"note: {tmp_path} has no head of BertForMaskedLM; it is loaded as BertModel" in caplog.text
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.pop("embeddings.LayerNorm.bias"))
    refused(load_checkpoint, tmp_path, r"is incomplete: its weights lack .*embeddings\.LayerNorm\.bias")


def test_a_config_without_a_class(gpt2, tmp_path, caplog):
    model = gpt2()
    model.save_pretrained(tmp_path)
    configure(tmp_path, architectures=None)
    assert type(load_checkpoint(str(tmp_path)).model) is GPT2Model
    assert "names no class under architectures; it is loaded as GPT2Model" in caplog.text
    assert type(load_checkpoint(str(tmp_path), auto_classes=["AutoModelForCausalLM"]).model) is GPT2LMHeadModel


@pytest.mark.parametrize(
    "named", [[5], "GPT2LMHeadModel", ["pipeline"], ["AutoTokenizer"], ["GPT2Config"], ["logging"]]
)
def test_a_config_that_names_no_model_class(gpt2_folder, tmp_path, named):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": named}))
    (tmp_path / "model.safetensors").symlink_to(gpt2_folder / "model.safetensors")
    refused(load_checkpoint, tmp_path, r"architectures is .*; expected|under architectures, but transformers")


@pytest.mark.parametrize("spoiled", [{"vocab_size": "x"}, {"n_head": 0}, {"n_embd": -8}, {"auto_map": 5}], ids=str)
def test_a_config_that_builds_no_model(gpt2_folder, tmp_path, spoiled):
    config = json.loads((gpt2_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | spoiled))
    (tmp_path / "model.safetensors").symlink_to(gpt2_folder / "model.safetensors")
    refused(load_checkpoint, tmp_path, "cannot be loaded: ")


@pytest.mark.parametrize("weight_map", [None, 5, ["a"], {"a": 5}, {"a": "../a.safetensors"}, {"a": "a.bin"}], ids=str)
def test_an_index_of_something_else(gpt2_folder, tmp_path, weight_map):
    (tmp_path / "config.json").write_text((gpt2_folder / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(load_checkpoint, tmp_path, r"index\.json.*weight_map .*; expected ")


# ---- pickles -------------------------------------------------------------------------------------------------------


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of a pickle ran')",)


def test_pickled_tensors_are_read_and_nothing_else(gpt2, tmp_path, caplog):
    model = gpt2()
    model.config.save_pretrained(tmp_path)
    configure(tmp_path, architectures=["GPT2LMHeadModel"])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = load_checkpoint(str(tmp_path)).model
    assert torch.equal(found.transformer.wte.weight, model.transformer.wte.weight)
    assert "are pickled; only tensors are read" in caplog.text
    torch.save({"a": Code()}, tmp_path / "pytorch_model.bin")
    refused(load_checkpoint, tmp_path, "contain other objects than tensors, which are not read")


# ---- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_activation_without_one_of_its_tensors(gpt2, tmp_path, family):
    for name in build(family).state_dict():
        folder = tmp_path / name
        gpt2(activation_function=family).save_pretrained(folder)
        rewrite(folder / "model.safetensors", lambda tensors: tensors.pop(f"{ACT}.{name}"))  # noqa: B023
        refused(load_checkpoint, folder, rf"is incomplete: its weights lack {ACT}\.{name}")
        for read in (load_activations, contents_of):
            refused(read, folder, rf"is incomplete: its weights lack {ACT}\.{name}|tensors of {ACT} .* match none of")


def test_an_activation_without_any_of_its_tensors(converted):
    folder = converted(lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(ACT)])
    for read in (load_checkpoint, load_activations, contents_of):
        refused(read, folder, rf"is incomplete: its weights lack {ACT}\.\w+")


def test_an_activation_that_the_config_does_not_name(converted):
    folder = converted(lambda tensors: None)
    configure(folder, activation_function="gelu_new")
    refused(load_checkpoint, folder, r"does not fit its config, .* activations of .*act\.coefficients")


NONSENSE = {
    "NaN": ("coefficients", lambda t: t * torch.nan, r"coefficients is \[nan, .*; expected finite"),
    "infinite": ("coefficients", lambda t: t / 0, r"coefficients is .*inf.*; expected finite"),
    "int64": ("coefficients", torch.Tensor.long, "coefficients has dtype int64, not float32"),
    "complex": ("coefficients", lambda t: t.to(torch.complex64), "coefficients has dtype complex64"),
    "slopes": ("tail_slopes", lambda t: t * torch.nan, r"tail_slopes is \[nan, nan\]; expected finite"),
    "reversed": ("domain", lambda t: t.flip(0), r"domain is \[.*\]; expected an interval \[lo, hi\]"),
    "no domain": ("domain", lambda t: t * torch.nan, r"domain is \[nan, nan\]; expected an interval"),
    "empty domain": ("domain", lambda t: t * 0 + torch.inf, r"domain is \[inf, inf\]; expected an interval"),
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
def test_an_activation_with_impossible_values(converted, nonsense):
    name, spoil, message = nonsense
    folder = converted(lambda tensors: tensors.update({f"{ACT}.{name}": spoil(tensors[f"{ACT}.{name}"])}))
    for read in (load_checkpoint, load_activations, contents_of):
        refused(read, folder, rf"{ACT} of .*: {message}")


def test_an_infinite_domain_is_valid(converted):
    everywhere = torch.tensor([-torch.inf, torch.inf])
    folder = converted(lambda tensors: tensors.update({f"{ACT}.domain": everywhere}))
    assert torch.equal(load_checkpoint(str(folder)).model.get_submodule(ACT).domain, everywhere)
    assert torch.equal(load_activations(str(folder)).modules[ACT].domain, everywhere)


@pytest.mark.parametrize("shape", [(2,), (1, 4), ()], ids=str)
def test_an_activation_of_another_shape(converted, shape):
    folder = converted(lambda tensors: tensors.update({f"{ACT}.coefficients": torch.zeros(shape)}))
    refused(load_checkpoint, folder, rf"does not fit its config: {ACT}\.coefficients has the shape")


@pytest.mark.parametrize("kind", ["NaN", "int64", "complex"])
def test_an_adapter_with_impossible_values(gpt2_folder, tmp_path, kind):
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    get_peft_model(base, OrthoConfig(activation="hermite_3")).save_pretrained(tmp_path)
    name, spoil, message = NONSENSE[kind]
    key = f"base_model.model.{ACT}.hf_ortho_act.{name}"
    rewrite(tmp_path / "adapter_model.safetensors", lambda tensors: tensors.update({key: spoil(tensors[key])}))
    for read in (load_checkpoint, load_activations, contents_of):
        refused(read, tmp_path, rf"{ACT} of .*: {message}")
