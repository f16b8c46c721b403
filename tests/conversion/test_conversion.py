"""``convert``: what the converted model computes, saves and reports, and what a failure leaves behind."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_ortho
from hf_ortho.activations import FAMILIES, LearnableActivation
from hf_ortho.conversion.fidelity import measure
from hf_ortho.errors import ActivationNameError, CalibrationError, FitError, HfOrthoError

SOURCES = {"gpt2": lambda x: F.gelu(x, approximate="tanh"), "convnext": F.gelu}
OUTLIERS = 60
BERT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


@pytest.fixture(params=["gpt2", "convnext"])
def case(request, gpt2, convnext, ids, pixels):
    """(name, model with outliers, calibration batch)."""
    if request.param == "gpt2":
        return request.param, gpt2(scale=OUTLIERS), {"input_ids": ids, "labels": ids}
    return request.param, convnext(scale=40), {"pixel_values": pixels, "labels": torch.arange(6) % 5}


@torch.no_grad()
def hidden(model, batch):
    batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return model(**batch, output_hidden_states=True).hidden_states[-1].float()


def activations_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LearnableActivation)}


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibrated", "dtype"),
    [
        (False, torch.float32),
        (True, torch.float32),
        pytest.param(True, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_computes_nearly_the_same(case, family, calibrated, dtype, relative_error):
    name, model, batch = case
    model.to(dtype)
    labels = batch.pop("labels")
    before = hidden(model, batch)
    if dtype == torch.bfloat16 and name == "convnext":
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    report = hf_ortho.convert(model, family, calibration=[batch | {"labels": labels}] if calibrated else None)
    assert {type(m) for m in activations_of(model).values()} == {FAMILIES[family]}
    assert len(activations_of(model)) == 2
    assert {p.dtype for m in activations_of(model).values() for p in m.parameters()} == {torch.float32}
    rms = max(layer.fit.rms_error for layer in report.layers)
    noise = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative_error(hidden(model, batch), before) < 3 * rms + noise


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_report_against_torch_on_the_real_pre_activations(case, family, inputs_of):
    name, model, batch = case
    modules = [n for n, _ in model.named_modules() if n.endswith(".act")]
    seen = inputs_of(model, modules, batch)
    report = hf_ortho.convert(model, family, calibration=[batch])
    assert [layer.module for layer in report.layers] == modules
    for layer in report.layers:
        x, fit = torch.from_numpy(seen[layer.module]), layer.fit
        assert (fit.minimum, fit.maximum) == (x.min().item(), x.max().item())
        module, source = model.get_submodule(layer.module), SOURCES[name]
        with torch.no_grad():
            error = module(x) - source(x)
            slope_error = module.derivative(x) - vmap(grad(source))(x)
        assert error.pow(2).mean().sqrt().item() == pytest.approx(fit.rms_error, rel=0.2)
        assert slope_error.pow(2).mean().sqrt().item() == pytest.approx(fit.rms_derivative_error, rel=0.2)
        assert error.abs().max() <= 1.01 * fit.sup_error
        assert slope_error.abs().max() <= 1.05 * fit.sup_derivative_error
        lo, hi = fit.domain
        assert fit.mass_outside == pytest.approx(((x < lo) | (x > hi)).double().mean().item(), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_fits_the_data_better(convnext, pixels, family, inputs_of):
    """Narrow pre-activations, which the data-free weight does not expect."""
    modules = [name for name, _ in convnext().named_modules() if name.endswith(".act")]
    seen = inputs_of(convnext(), modules, {"pixel_values": pixels})
    errors = []
    for calibration in (None, [pixels]):
        model = convnext()
        hf_ortho.convert(model, family, calibration=calibration)
        with torch.no_grad():
            found = [(torch.from_numpy(seen[name]), model.get_submodule(name)) for name in modules]
            errors.append([(module(x) - F.gelu(x)).pow(2).mean().item() for x, module in found])
    assert np.all(np.array(errors[1]) < 0.9 * np.array(errors[0]))


@pytest.mark.parametrize("calibrated", [False, True])
def test_tails_carry_the_outliers(gpt2, ids, calibrated, relative_error, inputs_of):
    model = gpt2(scale=OUTLIERS)
    batch = {"input_ids": ids}
    seen = inputs_of(model, ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"], batch)
    assert all(np.abs(values).max() > 20 for values in seen.values())
    before = hidden(model, batch)
    hf_ortho.convert(model, "hermite_8", calibration=[batch] if calibrated else None)
    error = relative_error(hidden(model, batch), before)
    assert error < 2e-2
    for module in activations_of(model).values():
        module.domain.data = torch.tensor([-math.inf, math.inf])
    assert not relative_error(hidden(model, batch), before) < 50 * error


def test_data_free_fits_are_equal_for_all_layers(gpt2, convnext):
    for model in (gpt2(n_layer=3), convnext()):
        hf_ortho.convert(model, "fourier_4")
        first, *others = (m.state_dict() for m in activations_of(model).values())
        assert others
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first)


def test_calibrated_fits_differ(gpt2, ids):
    model = gpt2(scale=OUTLIERS)
    hf_ortho.convert(model, "hermite_8", calibration=[ids])
    first, second = (m.coefficients for m in activations_of(model).values())
    assert not torch.equal(first, second)


def test_asked_domain_and_derivative_weight(gpt2):
    reports = {w: hf_ortho.convert(gpt2(), "hermite_6", domain=(-3, 2.5), derivative_weight=w) for w in (0.0, 1.0)}
    for report in reports.values():
        assert {layer.fit.domain for layer in report.layers} == {(-3.0, 2.5)}
    plain, sobolev = (reports[w].layers[0].fit for w in (0.0, 1.0))
    assert sobolev.rms_derivative_error < plain.rms_derivative_error
    assert sobolev.rms_error > plain.rms_error


def test_converting_again_fits_the_current_shape(gpt2, ids, relative_error):
    model, batch = gpt2(scale=OUTLIERS), {"input_ids": ids}
    hf_ortho.convert(model, "hermite_8")
    module = model.transformer.h[1].mlp.act
    with torch.no_grad():
        module.coefficients[1] += 0.2  # as a fine-tuning would
    learned, before = module(x := torch.linspace(-4, 4, 401)).detach(), hidden(model, batch)
    report = hf_ortho.convert(model, "fourier_6")
    assert model.config.activation_function == "fourier_6"
    assert [layer.fit.source for layer in report.layers] == ["hermite_8"] * 2
    assert relative_error(model.transformer.h[1].mlp.act(x).detach(), learned) < 1e-2
    assert relative_error(F.gelu(x), learned) > 5e-2
    assert relative_error(hidden(model, batch), before) < 2e-2


# ---- config, saving, reloading -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        *((family, dtype, {}) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)),
        ("hermite", torch.float32, {"max_shard_size": "20KB"}),
    ],
)
def test_save_and_reload_are_bit_equal(case, family, dtype, options, tmp_path, aligned):
    name, model, batch = case
    model.to(dtype)
    auto = AutoModelForCausalLM if name == "gpt2" else AutoModelForImageClassification
    hf_ortho.convert(model, f"{family}_3")
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(options)
    reloaded = auto.from_pretrained(tmp_path, dtype="auto")
    assert type(reloaded) is type(model)
    expected, found = model.state_dict(), reloaded.state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        before, after = model(**batch), aligned(reloaded)(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_config(case, family, tmp_path):
    name, model, batch = case
    field, source = {"gpt2": ("activation_function", "gelu_new"), "convnext": ("hidden_act", "gelu")}[name]
    model.config._name_or_path = "someone/something"
    report = hf_ortho.convert(model, family, calibration=[batch])
    activation = f"{family}_{FAMILIES[family].default_degree}"
    assert (getattr(model.config, field), report.activation) == (activation, activation)
    record = model.config.hf_ortho
    assert json.loads(json.dumps(record)) == record
    assert (record["activation"], record["source_model"]) == (activation, "someone/something")
    assert (record["source_activations"], record["calibrated"]) == ({field: source}, True)
    assert [(v["module"], v["rms_error"]) for v in record["layers"]] == [
        (layer.module, layer.fit.rms_error) for layer in report.layers
    ]
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hf_ortho"] == record
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert (reloaded.config.hf_ortho, getattr(reloaded.config, field)) == (record, activation)


def test_heads_are_kept(gpt2, ids, tmp_path, aligned):
    model = gpt2(GPT2ForSequenceClassification, num_labels=3)
    head = model.score.weight.clone()
    hf_ortho.convert(model, "hermite_8")
    model.save_pretrained(tmp_path)
    reloaded = GPT2ForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(reloaded.score.weight, head)
    with torch.no_grad():
        assert torch.equal(aligned(reloaded)(ids).logits, model(ids).logits)


def test_auto_model_drops_only_the_head(gpt2, ids, tmp_path, aligned):
    model = gpt2()
    hf_ortho.convert(model, "hermite_8")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is GPT2Model
    with torch.no_grad():
        assert torch.equal(aligned(base)(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


# ---- the report ----------------------------------------------------------------------------------------------------


def test_losses_are_the_models_own(case):
    _, model, batch = case
    with torch.no_grad():
        before = model(**batch).loss.item()
    report = hf_ortho.convert(model, "tropical_3", calibration=[batch])
    with torch.no_grad():
        after = model(**batch).loss.item()
    assert report.fidelity.loss_before == pytest.approx(before, rel=1e-6)
    assert report.fidelity.loss_after == pytest.approx(after, rel=1e-6)
    assert after != before


def test_loss_over_unequal_batches_is_the_mean_over_samples(convnext, pixels):
    model, labels = convnext(scale=40), torch.arange(6) % 5
    with torch.no_grad():
        expected = F.cross_entropy(model(pixels).logits, labels).item()
    halves = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (slice(5), slice(5, 6))]
    (found,) = measure(model, {}, dict(enumerate(halves)), held_out=False)
    assert found.loss_before == pytest.approx(expected, rel=1e-6)


def test_labels_of_minus_100_do_not_count(ids):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**BERT, initializer_range=0.5)).eval()
    batches = []
    for count, rows in ((7, ids[:2]), (1, ids[2:3]), (0, ids[3:])):  # the loss of the last is 0/0
        labels = torch.full_like(rows, -100)
        labels[0, :count] = rows[0, :count]
        batches.append({"input_ids": rows, "labels": labels})
    with torch.no_grad():
        logits = torch.cat([model(b["input_ids"]).logits for b in batches]).flatten(0, 1)
    expected = F.cross_entropy(logits, torch.cat([b["labels"] for b in batches]).flatten()).item()
    (found,) = measure(model, {}, dict(enumerate(batches)), held_out=False)
    assert found.loss_before == pytest.approx(expected, rel=1e-6)


def test_a_generator_is_read_once(gpt2, ids):
    batch = {"input_ids": ids, "labels": ids}
    report = hf_ortho.convert(gpt2(), "hermite_4", calibration=(b for b in [batch]))
    again = hf_ortho.convert(gpt2(), "hermite_4", calibration=[batch])
    assert report.fidelity == again.fidelity
    assert report.fidelity.loss_after is not None
    assert [layer.fit for layer in report.layers] == [layer.fit for layer in again.layers]


def test_only_some_batches_carry_labels(convnext, pixels):
    model, labels = convnext(scale=40), torch.arange(2)
    with torch.no_grad():
        expected = model(pixels[:2], labels=labels).loss.item()
    batches = {"labeled": {"pixel_values": pixels[:2], "labels": labels}, "others": pixels[2:]}
    (found,) = measure(model, {}, batches, held_out=False)
    assert (found.loss_before, found.predictions) == (pytest.approx(expected), 6)


def test_the_labels_of_a_language_model_are_its_inputs(gpt2, ids):
    model, mask = gpt2(scale=OUTLIERS), torch.ones_like(ids)
    mask[1:, 20:] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[:, :-1]
    expected = F.cross_entropy(logits[mask[:, 1:] == 1], ids[:, 1:][mask[:, 1:] == 1]).item()
    report = hf_ortho.convert(model, "hermite_4", calibration=[{"input_ids": ids, "attention_mask": mask}])
    assert report.fidelity.loss_before == pytest.approx(expected, rel=1e-6)
    assert report.fidelity.perplexity


def test_losses_without_labels(convnext, pixels):
    report = hf_ortho.convert(convnext(), "hermite_4", calibration=[pixels])
    found = report.fidelity
    assert (report.weights, found.loss_before, found.loss_after, found.perplexity) == ("fisher", None, None, False)
    assert found.kl is not None


def test_a_loss_without_labels_of_that_name(ids):
    model = BertForQuestionAnswering(BertConfig(**BERT)).eval()
    batch = {"input_ids": ids, "start_positions": torch.tensor([1] * 4), "end_positions": torch.tensor([2] * 4)}
    report = hf_ortho.convert(model, "hermite_4", calibration=[batch])
    assert report.weights == "fisher"
    assert report.layers[0].fit.minimum is not None


@pytest.mark.parametrize("calibrated", [False, True])
def test_report_as_data_and_text(case, calibrated):
    name, model, batch = case
    report = hf_ortho.convert(model, "tropical_12", calibration=[batch] if calibrated else None)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=True))
    assert data["activation"] == report.activation
    assert data["weights"] == ("fisher" if calibrated else None)
    assert data["fidelity"] == (dataclasses.asdict(report.fidelity) if calibrated else None)
    assert [v["module"] for v in data["layers"]] == list(activations_of(model))
    assert [v["sup_error"] for v in data["layers"]] == [layer.fit.sup_error for layer in report.layers]
    lines = str(report).splitlines()
    assert report.activation in lines[0]
    places = {"gpt2": "transformer.h.*.mlp.act", "convnext": "convnext.encoder.stages.*.layers.0.act"}
    assert any(line.endswith(places[name]) for line in lines)
    for index, layer in enumerate(report.layers):
        (row,) = [line for line in lines if line.split()[:1] == [str(index) if calibrated else "0..1"]]
        assert f"{layer.fit.sup_error:.1e}" in row
        assert f"{layer.fit.rms_error:.1e}" in row
    assert lines[1].startswith("2 activations of ")
    assert ("not calibrated: for fits" in " ".join(str(report).split())) == (not calibrated)
    assert all(note in " ".join(str(report).split()) for note in report.notes)
    assert max(map(len, lines)) <= 80


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )


def bert():
    return BertForMaskedLM(BertConfig(**BERT))


def one_layer():
    return GPT2Model(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97))


@pytest.mark.parametrize("build", [t5, bert, one_layer])
def test_every_layer_can_be_read_from_the_text(build):
    report = hf_ortho.convert(build(), "hermite_4")
    shown, place = [], ""
    for line in str(report).replace(" at\n  ", " at ").splitlines():
        if " at " in line:
            place = line.split(" at ")[1].strip()
        elif f"{report.layers[0].fit.sup_error:.1e}" in line:
            shown += [place.replace("*", row) for row in line.split()[0].split("..")]
    assert shown == [layer.module for layer in report.layers]


def test_report_names_what_was_left_alone():
    report = hf_ortho.convert(t5(), "hermite_4")
    assert [field for field, _ in report.left_alone] == ["feed_forward_proj"]
    assert "left alone: feed_forward_proj" in str(report)


def test_tropical_says_that_it_is_convex(gpt2):
    report = hf_ortho.convert(gpt2(), "tropical_6")
    assert len(report.notes) == 1
    assert "convex" in report.notes[0]
    assert report.layers[0].fit.sup_error > 0.08
    assert hf_ortho.convert(gpt2(), "tropical_rational_6").notes == []


def test_default_and_bare_names(gpt2):
    assert hf_ortho.convert(gpt2()).activation == "hermite_8"
    model = gpt2()
    assert hf_ortho.convert(model, "tropical_rational").activation == "tropical_rational_6"
    assert model.config.activation_function == "tropical_rational_6"


# ---- failures ------------------------------------------------------------------------------------------------------


def _batch(**values):
    return [{"input_ids": torch.ones(2, 8, dtype=torch.long)} | values]


GPT2_FAILURES = {
    "text": ("some text", "str"),
    "bytes": (b"some text", "bytes"),
    "a mapping": (_batch()[0], "dict"),
    "a number": (3, "int"),
    "no batches": ([], "empty"),
    "an exhausted generator": (iter([]), "empty"),
    "batch of text": (["some text"], "batch 1 is str"),
    "batch of None": ([None], "batch 1 is NoneType"),
    "empty batch": ([{}], "batch 1"),
    "wrong keys": ([{"words": torch.ones(2, 8)}], "batch 1: GPT2LMHeadModel"),
    "no main input": ([{"attention_mask": torch.ones(2, 8)}], "batch 1: GPT2LMHeadModel"),
    "lists": ([{"input_ids": [[1, 2, 3]]}], "batch 1"),
    "labels as lists": (_batch(labels=[[1] * 8] * 2), "batch 1"),
    "out of range": ([*_batch(), *_batch(input_ids=torch.full((2, 8), 97))], "batch 2: GPT2LMHeadModel"),
    "negative": (_batch(input_ids=torch.full((2, 8), -1)), "batch 1: GPT2LMHeadModel"),
    "float tokens": (_batch(input_ids=torch.ones(2, 8)), "batch 1: GPT2LMHeadModel"),
    "too long": (_batch(input_ids=torch.ones(2, 33, dtype=torch.long)), "batch 1: GPT2LMHeadModel"),
    "labels of another shape": (_batch(labels=torch.ones(2, 5, dtype=torch.long)), "batch 1: GPT2LMHeadModel"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("failure", GPT2_FAILURES)
def test_bad_calibration_of_a_language_model(gpt2, state_of, failure, training):
    calibration, message = GPT2_FAILURES[failure]
    model = gpt2().train(training)
    before = state_of(model)
    with pytest.raises(CalibrationError, match=message) as error:
        hf_ortho.convert(model, "hermite_8", calibration=calibration)
    assert isinstance(error.value, HfOrthoError)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)
    assert state_of(model) == before


IMAGE_FAILURES = {
    "nan": (lambda x: x.index_fill(0, torch.tensor(1), math.nan), "pixel_values contains NaN"),
    "inf": (lambda x: x / 0, "pixel_values contains NaN or infinity"),
    "two channels": (lambda x: x[:, :2], "batch 2: ConvNextForImageClassification"),
    "integers": (lambda x: x.long(), "batch 2: ConvNextForImageClassification"),
    "lists": (lambda x: x.tolist(), "batch 2: ConvNextForImageClassification"),
}


@pytest.mark.parametrize(("change", "message"), IMAGE_FAILURES.values(), ids=IMAGE_FAILURES)
def test_bad_calibration_of_an_image_model(convnext, pixels, state_of, change, message):
    model = convnext().train()
    before = state_of(model)
    good = {"pixel_values": pixels, "labels": torch.arange(6) % 5}
    with pytest.raises(CalibrationError, match=message):
        hf_ortho.convert(model, "hermite_8", calibration=[good, {"pixel_values": change(pixels)}])
    assert state_of(model) == before


def test_weights_with_nan_are_named_by_layer(gpt2, ids, state_of):
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    before = state_of(model)
    with pytest.raises(CalibrationError, match=r"transformer\.h\.1\.mlp\.act"):
        hf_ortho.convert(model, "hermite_8", calibration=[ids])
    assert state_of(model) == before


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_source_without_tails(gpt2, ids, state_of, calibrated):
    model = gpt2(activation_function="relu2").train()
    before = state_of(model)
    with pytest.raises(FitError, match=r"relu2 has no asymptotic slope at \+inf"):
        hf_ortho.convert(model, "hermite_8", calibration=[ids] if calibrated else None)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"activation": "hermit_8"}, ActivationNameError),
        ({"activation": "hermite_33"}, ActivationNameError),
        ({"activation": "gelu"}, ActivationNameError),
        ({"derivative_weight": -1.0}, FitError),
        ({"derivative_weight": math.nan}, FitError),
        ({"domain": (1.0, -1.0)}, FitError),
        ({"domain": (0.0, math.inf)}, FitError),
    ],
)
def test_bad_arguments(gpt2, state_of, arguments, error):
    model = gpt2()
    before = state_of(model)
    with pytest.raises(error) as caught:
        hf_ortho.convert(model, **arguments)
    assert isinstance(caught.value, HfOrthoError)
    assert isinstance(caught.value, ValueError)
    assert state_of(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_modes_of_single_modules_survive(gpt2, ids, fails):
    model = gpt2().train()
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    if fails:
        with pytest.raises(CalibrationError):
            hf_ortho.convert(model, "hermite_4", calibration=[ids + 97])
    else:
        hf_ortho.convert(model, "hermite_4", calibration=[ids])
    assert {name: module.training for name, module in model.named_modules()} == before
