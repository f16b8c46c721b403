"""The comparison of a converted model with its source, against both models run apart, in float64."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_ortho
from hf_ortho.conversion import fidelity, fisher
from hf_ortho.conversion.fidelity import Fidelity, divergence, measure
from hf_ortho.conversion.inputs import Prediction, predict

BERT = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


def bert(cls, **options):
    torch.manual_seed(0)
    return cls(BertConfig(**BERT, **options)).eval()


def segformer():
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2]}
    others = {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    config = SegformerConfig(**sizes, **others, decoder_hidden_size=8, num_labels=3, initializer_range=0.5)
    return SegformerForSemanticSegmentation(config).eval()


@pytest.fixture(params=["language model", "masked", "images", "multi-label", "segmentation", "encoder"])
def case(request, gpt2, convnext, ids, pixels):
    """(model, batch with labels, kind)."""
    mask = torch.ones_like(ids)
    mask[1:, 20:] = 0
    masked = {"input_ids": ids, "attention_mask": mask}
    return {
        "language model": lambda: (gpt2(scale=20), {"input_ids": ids, "labels": ids}, "categorical"),
        "masked": lambda: (
            bert(BertForMaskedLM),
            masked | {"labels": ids.masked_fill(mask == 0, -100)},
            "categorical",
        ),
        "images": lambda: (
            convnext(scale=40),
            {"pixel_values": pixels, "labels": torch.arange(6) % 5},
            "categorical",
        ),
        "multi-label": lambda: (
            bert(BertForSequenceClassification, problem_type="multi_label_classification", num_labels=3),
            masked | {"labels": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])},
            "binary",
        ),
        "segmentation": lambda: (
            segformer(),
            {"pixel_values": pixels, "labels": torch.arange(6 * 32 * 32).view(6, 32, 32) % 3},
            "categorical",
        ),
        "encoder": lambda: (bert(BertModel), masked, "real"),
    }[request.param]()


def outputs(model, batch):
    """(predictions, classes) or (predictions, features) that are not masked, and the loss, in float64."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        out = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    y = out.logits if "logits" in out else out.last_hidden_state
    y = y.permute(0, 2, 3, 1) if y.ndim == 4 else y
    mask = batch.get("attention_mask")
    return (y[mask.bool()] if mask is not None and y.ndim == 3 else y).flatten(0, -2), out.get("loss")


def by_class(z, kind):
    """Log probabilities: of the classes, or for independent classes of yes and no, side by side."""
    return torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], -1).flatten(1) if kind == "binary" else z.log_softmax(-1)


@pytest.mark.slow
def test_against_both_models_in_float64(case):
    model, batch, kind = case
    (z, before), source = outputs(model, batch), copy.deepcopy(model)
    report = hf_ortho.convert(model, "hermite_3", calibration=[batch])
    (y, after), found = outputs(model, batch), report.fidelity
    assert (found.predictions, found.held_out, found.rounding) == (len(z), False, None)
    assert found.output_error == pytest.approx(float((y - z).norm() / z.norm()), rel=1e-3)
    if kind == "real":
        assert (found.kl, found.top1, found.loss_before, found.loss_after) == (None, None, None, None)
        assert found.divergence == found.output_error**2
    else:
        p, q = by_class(z, kind), by_class(y, kind)
        assert found.divergence == found.kl == pytest.approx(float((p.exp() * (p - q)).sum() / len(z)), rel=1e-3)
        assert found.top1 == pytest.approx(float((z.argmax(-1) == y.argmax(-1)).double().mean()), abs=1e-9)
        assert (found.loss_before, found.loss_after) == (pytest.approx(float(before)), pytest.approx(float(after)))
        assert abs(float(after - before)) > 1e-6
    assert found.perplexity == source.can_generate()


def gradients(model, batch, u):
    """The gradient of the loss, or of the product of the logits with u, by each weight, in float64."""
    model = copy.deepcopy(model).double().requires_grad_()
    out = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    target = out.loss if u is None else (out[0] * u).sum()
    names = [name for name, _ in model.named_parameters() if not name.endswith(TENSORS)]
    found = torch.autograd.grad(target, [model.get_parameter(name) for name in names], allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


TENSORS = (".domain", ".tail_slopes", ".coefficients", ".offset", ".frequencies", ".phases")


def error_and_cosine(before, after):
    assert before.keys() == after.keys()
    g, h = (torch.cat([v.flatten() for v in gradients.values()]) for gradients in (before, after))
    return float((h - g).norm() / g.norm()), float(F.cosine_similarity(g, h, 0))


@pytest.mark.slow
@pytest.mark.parametrize("labeled", [True, False])
def test_gradients_against_autograd(case, labeled):
    model, batch, _ = case
    if not labeled and not model.can_generate():
        batch.pop("labels", None)
    source = copy.deepcopy(model)
    report = hf_ortho.convert(model, "hermite_3", calibration=[batch])
    u = None
    if "labels" not in batch:
        prediction = predict(source, batch)
        u = fisher.direction(prediction, torch.Generator().manual_seed(0)).double()
        u = u.movedim(-1, 1) if u.ndim == 4 else u
    if model.can_generate():  # of the first text only
        batch = {key: value[:1] for key, value in batch.items()}
    error, cosine = error_and_cosine(gradients(source, batch, u), gradients(model, batch, u))
    assert report.fidelity.gradient_error == pytest.approx(error, rel=2e-3)
    assert 1 - report.fidelity.gradient_cosine == pytest.approx(1 - cosine, rel=5e-3, abs=1e-6)
    assert error > 1e-3


def test_gradients_of_large_weights_are_estimated(gpt2, ids, monkeypatch):
    model, batch = gpt2(scale=20), {"input_ids": ids}
    source = model.get_submodule("transformer.h.0.mlp.act")
    hf_ortho.convert(model, "hermite_3")
    sources = {f"transformer.h.{i}.mlp.act": source for i in range(2)}
    (exact,) = measure(model, sources, {"batch": batch}, held_out=False)
    monkeypatch.setattr(fidelity, "SAMPLED", 512)  # of up to 4096 entries
    (sampled,) = measure(model, sources, {"batch": batch}, held_out=False)
    assert sampled.gradient_error != exact.gradient_error
    assert sampled.gradient_error == pytest.approx(exact.gradient_error, rel=0.2)
    assert 1 - sampled.gradient_cosine == pytest.approx(1 - exact.gradient_cosine, rel=0.4)
    assert sampled == dataclasses.replace(
        exact, gradient_error=sampled.gradient_error, gradient_cosine=sampled.gradient_cosine
    )


@pytest.mark.parametrize("piece", [1, 97 * 5, 2**24])
def test_logits_are_compared_in_pieces(gpt2, ids, piece, monkeypatch):
    model = gpt2(scale=20)
    source = model.get_submodule("transformer.h.0.mlp.act")
    hf_ortho.convert(model, "tropical_3")
    sources = {f"transformer.h.{i}.mlp.act": source for i in range(2)}
    (expected,) = measure(model, sources, {"batch": ids}, held_out=False)
    monkeypatch.setattr(fidelity, "PIECE", piece)
    (found,) = measure(model, sources, {"batch": ids}, held_out=False)
    for name in ("kl", "top1", "output_error"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)


def test_several_batches_are_one(gpt2, ids):
    model = gpt2(scale=20)
    source = model.get_submodule("transformer.h.0.mlp.act")
    hf_ortho.convert(model, "tropical_3")
    sources = {f"transformer.h.{i}.mlp.act": source for i in range(2)}
    (whole,) = measure(model, sources, {"all": ids}, held_out=True)
    (parts,) = measure(model, sources, {"first": ids[:1], "others": ids[1:]}, held_out=True)
    for name in ("predictions", "held_out", "kl", "top1", "output_error", "loss_before", "loss_after"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_other_modules_are_compared_with_the_same_source(gpt2, ids):
    model = gpt2(scale=20)
    sources = {path: model.get_submodule(path) for path in ("transformer.h.0.mlp.act", "transformer.h.1.mlp.act")}
    hf_ortho.convert(model, "hermite_3")
    other = hf_ortho.activations.build("hermite_5")
    other.fit("gelu_new")
    first, second, same = measure(
        model, sources, {"batch": ids}, [dict.fromkeys(sources, other), sources], held_out=False
    )
    better = gpt2(scale=20)
    for path in sources:
        better.set_submodule(path, other)
    (expected,) = measure(better, sources, {"batch": ids}, held_out=False)
    assert second == dataclasses.replace(expected, gradient_error=None, gradient_cosine=None)
    assert second.kl < first.kl
    assert (same.kl, same.output_error, same.top1) == (0, 0, 1)
    assert first.gradient_error is not None


def test_what_stands_under_padding_does_not_count(gpt2, ids):
    model = gpt2(scale=20)
    source = model.get_submodule("transformer.h.0.mlp.act")
    hf_ortho.convert(model, "tropical_3")
    sources = {f"transformer.h.{i}.mlp.act": source for i in range(2)}
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    (short,) = measure(model, sources, {"short": ids[:1, :20]}, held_out=False)
    padded_inputs = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    (padded,) = measure(model, sources, {"padded": padded_inputs}, held_out=False)
    assert padded.predictions == 20
    for name, value in dataclasses.asdict(short).items():
        found = getattr(padded, name)
        assert found is None if value is None else found == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_the_divergence_of_the_source_from_itself(gpt2, ids, dtype):
    model = gpt2(scale=20).to(dtype)
    found = hf_ortho.convert(model, "hermite_3", calibration=[ids]).fidelity
    # the relative error of the outputs is about that of one rounding, up to 2^-9 or 2^-12; the divergence its square
    assert 0 < found.rounding < found.kl
    coarse = hf_ortho.convert(gpt2(scale=20).bfloat16(), "hermite_3", calibration=[ids]).fidelity.rounding
    assert found.rounding == coarse if dtype == torch.bfloat16 else 20 * found.rounding < coarse


@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", ["categorical", "binary"])
def test_small_divergences_in_float32(kind, size):
    """Their terms cancel to far below the precision of float32."""
    generator = torch.Generator().manual_seed(0)
    before = 3 * torch.randn(64, 50, generator=generator)
    after = before + size * torch.randn(64, 50, generator=generator)
    p, q = by_class(before.double(), kind), by_class(after.double(), kind)
    exact = float((p.exp() * (p - q)).sum())
    assert float(divergence(before, after, kind)) == pytest.approx(exact, rel=1e-2)
    assert exact < 64 * 50 * size**2


@pytest.mark.parametrize(
    ("before", "after"),
    [([200.0, -200.0, 0.0], [190.0, -210.0, 5.0]), ([0.0, -200.0, 1.0], [-300.0, 0.0, -300.0])],
)
def test_divergence_of_certain_predictions_is_finite(before, after):
    before, after = torch.tensor([before]), torch.tensor([after])
    for kind in ("categorical", "binary"):
        p, q = by_class(before.double(), kind), by_class(after.double(), kind)
        exact = float((p.exp() * (p - q)).sum())
        assert float(divergence(before, after, kind)) == pytest.approx(exact, rel=1e-4, abs=1e-6)


def test_a_head_of_other_classes_has_no_loss(gpt2, ids):
    model = gpt2()
    model.lm_head = torch.nn.Linear(32, 7)
    found = hf_ortho.convert(model, "hermite_4", calibration=[ids]).fidelity
    assert (found.loss_before, found.loss_after, found.kl) == (None, None, None)
    assert 0 < found.output_error < 0.1
    assert found.gradient_error > 0


def test_labels_do_not_count_where_they_are_hidden(gpt2, ids):
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    prediction = predict(gpt2(), {"input_ids": ids, "attention_mask": mask}, loss=True)
    # the label of the first token that is not hidden counts: the model predicts it from hidden ones
    assert prediction.labels == 4 * 27
    assert prediction.rows().shape == (4 * 27, 97)


def test_a_class_that_is_never_predicted_does_not_count():
    before, after = torch.tensor([[1.0, 0.0, -math.inf]]), torch.tensor([[0.0, 0.5, -math.inf]])
    p, q = before[:, :2].double().log_softmax(-1), after[:, :2].double().log_softmax(-1)
    found = float(divergence(before, after, "categorical"))
    assert found == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)


def test_as_many_classes_as_tokens():
    model = bert(BertForSequenceClassification, num_labels=8)
    mask = (torch.arange(8) < 5).long().expand(4, 8)
    prediction = predict(model, {"input_ids": torch.arange(32).view(4, 8), "attention_mask": mask})
    assert (prediction.mask, prediction.rows().shape) == (None, (4, 8))


def test_hidden_labels_of_an_encoder_decoder_do_not_count():
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))
    labels = torch.arange(12).view(2, 6)
    labels[1, 2:] = -100
    inputs = {"input_ids": torch.arange(8)[None].expand(2, 8), "labels": labels}
    assert predict(model.eval(), inputs).rows().shape == (8, 97)


def test_a_scalar_output_is_no_class():
    y = torch.randn(3, 1)
    assert Prediction(y, "real", None).rows().shape == (3, 1)
    model = bert(BertForSequenceClassification, num_labels=1)
    assert predict(model, torch.arange(8)[None]).kind == "real"


def test_held_out_batches_are_compared(gpt2, ids):
    model, source = gpt2(scale=20), gpt2(scale=20)
    found = hf_ortho.convert(model, "hermite_3", calibration=[ids[:1], ids[1:2], ids[2:]]).fidelity
    with torch.no_grad():
        p, q = (m(ids[1:2]).logits.double().log_softmax(-1) for m in (source, model))
    assert (found.predictions, found.held_out) == (32, True)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum() / 32), rel=1e-3)


def test_fidelity_as_data():
    some = Fidelity(12, True, 1e-5, 0.9, 0.01, 2.5, 2.6, True, 0.1, 0.99, 1e-9)
    for value in (some, Fidelity(3, False), Fidelity(3, False, output_error=0.5)):
        assert Fidelity.from_dict(dataclasses.asdict(value)) == value
    assert math.isclose(Fidelity(3, False, output_error=0.5).divergence, 0.25)
    assert Fidelity(3, False).divergence is None
