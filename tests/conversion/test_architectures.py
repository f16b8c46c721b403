"""Models that differ in kind convert, reload bit-equal and run as before; for all: python -m tests.architectures."""

import pytest
import torch
from architectures.build import tiny_models
from architectures.check import OK, REFUSED, WrongState, check, compare_states, convert_and_compare, drivable, run
from transformers import CLIPModel, LlavaForConditionalGeneration

import hf_ortho

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of the sizes and token ids of tiny configs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "sites"),
    [
        ("gpt2", 2),
        ("convnext", 4),
        ("convnextv2", 4),
        ("bert", 3),  # two layers and the prediction head
        ("t5", 4),
        ("llama", 2),
        ("qwen3", 2),
        ("mixtral", 2),  # one for all experts of a layer
        ("vit", 2),
        ("whisper", 4),
        ("clip", 4),
        ("swin", 4),
        ("dinov2", 2),
        ("albert", 2),  # shared layers and the prediction head
        ("wav2vec2", 10),
        ("distilbert", 3),
        ("electra", 2),
        ("zamba", 2),  # in blocks that are tied
        ("zamba2", 2),
    ],
)
def test_converts(model_type, sites):
    result = check(model_type)
    assert (result.outcome, result.sites) == (OK, sites), result.detail
    assert "not called" not in result.detail


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("mamba", "MambaMixer reads the name"),
        ("qwen3_next", "GatedDeltaNet reads the name"),
        ("ibert", "ValueError with another name: I-BERT only supports 'gelu'"),
        ("ctrl", "no field names an activation"),
        ("arcee", "relu2 has no asymptotic slope"),
    ],
)
def test_refused(model_type, why):
    result = check(model_type)
    assert (result.outcome, result.sites) == (REFUSED, 0)
    assert why in result.detail


@pytest.mark.parametrize(
    ("model_type", "cls", "field", "inside", "other"),
    [
        ("clip", CLIPModel, "text_config.hidden_act", "text_model.", "get_image_features"),
        (
            "llava",
            LlavaForConditionalGeneration,
            "text_config.hidden_act",
            "model.language_model.",
            "get_image_features",
        ),
    ],
)
@torch.no_grad()
def test_the_other_tower_stays_bit_equal(model_type, cls, field, inside, other):
    model = next(tiny_models(model_type))
    assert type(model) is cls
    size = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(5, 21)[None]
    texts = model.get_text_features if model_type == "clip" else model

    def features():
        torch.manual_seed(0)
        return [
            v.last_hidden_state if "last_hidden_state" in v else v.logits
            for v in (getattr(model, other)(pixels), texts(ids))
        ]

    image_before, text_before = features()
    report = hf_ortho.convert(model, "hermite_3", fields=[field])
    assert all(layer.module.startswith(inside) for layer in report.layers)
    image, text = features()
    assert torch.equal(image, image_before)
    assert not torch.equal(text, text_before)


def test_tied_blocks_share_one_activation_fitted_to_all_their_inputs(tmp_path):
    model = next(tiny_models("zamba2"))
    ids = torch.arange(5, 21)[None]
    report = hf_ortho.convert(model, "hermite_3", calibration=[{"input_ids": ids}], distill=1)
    paths = [layer.module for layer in report.layers]
    first, second = map(model.get_submodule, paths)
    assert first is not second
    assert [*map(id, first.parameters())] == [*map(id, second.parameters())]
    seen = []
    for module in (first, second):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids)
    for layer in report.layers:
        _, _, histogram = report.modules[layer.module]
        assert int(histogram.counts.sum()) == sum(x.numel() for x in seen)
        assert layer.fit.minimum == min(float(x.min()) for x in seen)

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.all_tied_weights_keys == model.all_tied_weights_keys
    assert len({id(again.get_submodule(path).coefficients) for path in paths}) == 1
    assert torch.equal(again.get_submodule(paths[0]).coefficients, first.coefficients)

    ties = set(model.all_tied_weights_keys)
    assert hf_ortho.revert(model) == paths
    assert ties - set(model.all_tied_weights_keys) == {f"{paths[1]}.{name}" for name, _ in first.named_parameters()}


def test_a_wrong_activation_is_noticed(monkeypatch):
    model, inputs, _ = drivable("gpt2")
    convert = hf_ortho.convert

    def wrong(model, activation):
        report = convert(model, activation)
        for layer in report.layers:
            model.get_submodule(layer.module).fit("relu")
        return report

    monkeypatch.setattr(hf_ortho, "convert", wrong)
    with pytest.raises(WrongState, match="far from the original"):
        convert_and_compare(model, inputs)


def test_a_wrong_reload_is_noticed():
    model, inputs, _ = drivable("gpt2")
    hf_ortho.convert(model, "hermite_3")
    other = type(model)(model.config).eval()
    paths = {name for name, module in model.named_modules() if isinstance(module, hf_ortho.activations.Hermite)}
    compare_states(model, model, {"activation_function"}, paths)
    with pytest.raises(WrongState, match="is not bit-equal after the reload"):
        compare_states(model, other, {"activation_function"}, paths)
    assert not torch.equal(run(model, inputs)[0], run(other, inputs)[0])
