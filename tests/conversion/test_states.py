"""Models in the states that people load and wrap them in: converted, or refused in one sentence."""

import copy
import sys
import types

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, TextGenerationPipeline

import hf_ortho
from hf_ortho.conversion.replace import replace_modules
from hf_ortho.conversion.sites import find_sites
from hf_ortho.errors import SiteError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft
FIRST = "transformer.h.0.mlp.act"


@pytest.fixture
def model(make_gpt2):
    return make_gpt2()[0]


@pytest.fixture
def batches():
    ids = torch.arange(16)[None]
    return [{"input_ids": ids, "labels": ids}]


class Holder(nn.Module):
    """A value head, for example."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model


class Pipeline:
    def __init__(self, model):
        self.name, self.text_encoder = "no module", model


def pipeline(model):
    made = TextGenerationPipeline.__new__(TextGenerationPipeline)
    made.model = model
    return made


def sentence_transformer(model):
    first = nn.Module()
    first.auto_model = model
    return nn.Sequential(first)


def engine(model):
    wrapper = Holder(model)
    wrapper.__class__ = type("DeepSpeedEngine", (Holder,), {"__module__": "deepspeed.runtime.engine"})
    return wrapper


@pytest.mark.parametrize(
    ("wrap", "sentence"),
    [
        (Holder, "Holder .* convert its .pretrained_model$"),
        (nn.DataParallel, "DataParallel .* convert its .module$"),
        (sentence_transformer, r"convert its \[0\].auto_model$"),
        (pipeline, "TextGenerationPipeline .* convert its .model$"),
        (Pipeline, "convert its .text_encoder$"),
        (engine, "DeepSpeedEngine has already wrapped .*: convert the model before that$"),
        (lambda model: "me/model", "^'me/model' is a name, not a model: load it first"),
        (type, "^GPT2LMHeadModel is a class, not a model: pass GPT2LMHeadModel.from_pretrained"),
        (lambda model: None, "NoneType is not a transformers PreTrainedModel"),
        (lambda model: nn.Linear(1, 1), "Linear is not a transformers PreTrainedModel"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_pass(model, wrap, sentence):
    for function in (hf_ortho.convert, find_sites) if wrap is not engine else (hf_ortho.convert,):
        with pytest.raises(SiteError, match=sentence):
            function(wrap(model))


@pytest.mark.parametrize("attach", ["peft", "transformers"])
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True),
        hf_ortho.peft.OrthoConfig(activation="hermite_2"),
    ],
)
def test_attached_adapters_are_refused_with_both_ways_out(model, attach, config):
    config = copy.deepcopy(config)
    if attach == "peft":
        adapted = peft.get_peft_model(model, config)
    else:
        adapted = model
        adapted.add_adapter(config)
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    with pytest.raises(SiteError, match=r"merge_and_unload.*add_adapter\(hf_ortho.peft.OrthoConfig"):
        hf_ortho.convert(adapted, "hermite_3")
    after = adapted.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_merged_adapters_are_converted(model):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    assert len(hf_ortho.convert(adapted.merge_and_unload(), "hermite_3").layers) == 2


@pytest.mark.parametrize("key", ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight", "lm_head.weight"])
def test_missing_weights_are_refused(model, key):
    path, _, name = key.rpartition(".")
    setattr(model.get_submodule(path), name, nn.Parameter(torch.empty(1, device="meta")))
    with pytest.raises(SiteError, match=f"no data for {key}: .* load the model without device_map"):
        hf_ortho.convert(model)
    assert model.config.activation_function == "gelu_new"
    assert type(model.get_submodule(FIRST)).__name__ == "NewGELUActivation"


def test_offloaded_layers_are_refused_and_one_device_is_fine(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    rest = ("transformer.wte", "transformer.wpe", "transformer.h.1", "transformer.ln_f", "lm_head")
    places = {"transformer.h.0": "disk"} | dict.fromkeys(rest, "cpu")
    offloaded = GPT2LMHeadModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    with pytest.raises(SiteError, match=r"no data for transformer\.h\.0.*OrthoConfig"):
        hf_ortho.convert(offloaded)
    adapters = [peft.get_peft_model(m, hf_ortho.peft.OrthoConfig(activation="hermite_3")) for m in (offloaded, model)]
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(*(adapted.eval()(ids).logits for adapted in adapters))
    whole = GPT2LMHeadModel.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    assert len(hf_ortho.convert(whole).layers) == 2


class Quantized(nn.Module):
    """A linear layer with other tensors than the one in the config, which cannot be cast."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.abs().max() / 127
        self.register_buffer("qweight", (layer.weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale.detach().to(torch.bfloat16))
        self.register_buffer("offset", layer.bias.detach().clone())

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype)) + self.offset.to(x.dtype)


def quantized(model):
    for block in model.transformer.h:
        block.mlp.c_fc = Quantized(block.mlp.c_fc)
    model = model.bfloat16()
    model.is_quantized, model.hf_quantizer = True, object()
    model.float = None  # as bitsandbytes, which refuses casts
    return model


def new_head(model):
    model.lm_head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7))
    return model


def more_tokens(model):
    model.resize_token_embeddings(300, mean_resizing=False)
    return model


def more_modules(model):
    model.transformer.h[0].gate = nn.Linear(16, 16)
    return model


def other_forward(model):
    plain = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: plain(*args, **kwargs), model)
    return model


def checkpointing(model):
    model.activation_checkpointing_enable()
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [quantized, new_head, more_tokens, more_modules, other_forward, checkpointing, nn.Module.half],
    ids=lambda change: change.__name__,
)
def test_what_the_conversion_does_not_touch_may_differ_from_the_config(model, change, batches):
    labeled = change is not new_head  # labels of other classes
    model = change(model)
    training = model.training
    others = {key: value.clone() for key, value in model.state_dict().items()}
    report = hf_ortho.convert(
        model, "hermite_8", calibration=batches if labeled else [{"input_ids": batches[0]["input_ids"]}]
    )
    assert report.weights == "fisher"
    assert report.fidelity.output_error < 0.02
    assert (report.fidelity.rounding is None) == (change not in (nn.Module.half, quantized))
    assert model.training is training
    state = model.state_dict()
    assert {key for key in state if ".act." in key} == state.keys() - others.keys()
    assert all(torch.equal(state[key], value) for key, value in others.items())


def test_other_activations_than_the_config_builds_are_refused(model):
    sites, _ = find_sites(model)
    new = {path: hf_ortho.activations.build("hermite_3") for path in sites[0].modules}
    with pytest.raises(SiteError, match=r"builds other tensors \(transformer.h.0.mlp.act.coefficients"):
        replace_modules(model, sites, new, {"activation_function": "hermite_4"})
    assert model.config.activation_function == "gelu_new"


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False])
@torch.no_grad()
def test_a_compiled_model_computes_with_its_new_activations(make_gpt2, wrapped, batches):
    torch._dynamo.reset()
    model = make_gpt2(n_layer=1)[0].eval()
    inputs = {"input_ids": batches[0]["input_ids"], "use_cache": False}
    if wrapped:
        run = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        run = model
    before = run(**inputs).logits
    report = hf_ortho.convert(run, "tropical_1", calibration=[inputs])  # a fit that is far off
    assert report.weights == "fisher"  # its hooks saw the inputs, although the code was compiled without them
    expected = model.forward(**inputs).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(run(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_conversion_in_inference_mode_gives_trainable_activations(model, batches):
    with torch.inference_mode():
        hf_ortho.convert(model, "hermite_3", calibration=batches)
    model(**batches[0]).loss.backward()
    assert model.get_submodule(FIRST).coefficients.grad is not None


def test_nothing_is_imported_to_look_for_wrappers(model, monkeypatch):
    from hf_ortho.conversion import states

    for name in ("peft.tuners.tuners_utils", "torch.distributed.fsdp"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert states.plain_model(model) is model
    assert not {"peft.tuners.tuners_utils", "torch.distributed.fsdp"} & sys.modules.keys()
