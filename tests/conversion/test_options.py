"""The choices of a conversion: the degree, tails, reverting, fitting anew, dtypes."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_ortho
from hf_ortho.activations import FAMILIES, LearnableActivation
from hf_ortho.conversion.fit_sites import fit_smallest
from hf_ortho.conversion.sites import Site
from hf_ortho.errors import CalibrationError, FitError, HfOrthoError, SiteError

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip():
    torch.manual_seed(0)
    text = TINY | {"vocab_size": 49, "max_position_embeddings": 16, "projection_dim": 16}
    vision = TINY | {"image_size": 16, "patch_size": 8, "projection_dim": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def learned(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LearnableActivation)}


# ---- degree="auto" ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "tolerance"), [("density", 5e-3), ("fisher", 1e-7)])
@pytest.mark.parametrize("family", ["hermite", "fourier", "tropical_rational"])
def test_auto_is_the_smallest_degree_that_keeps_to_the_tolerance(family, weights, tolerance, gpt2, ids):
    def error(report):
        """The predicted divergence, or the largest error of a layer."""
        fits = [layer.fit for layer in report.layers]
        return sum(f.divergence for f in fits) if weights == "fisher" else max(f.rms_error for f in fits)

    model, options = gpt2(scale=20), {"calibration": [ids], "weights": weights}
    report = hf_ortho.convert(model, family, degree="auto", tolerance=tolerance, **options)
    chosen = next(iter(learned(model).values()))
    assert report.activation == chosen.name == model.config.activation_function
    assert error(report) <= tolerance
    if chosen.degree > 1:
        below = hf_ortho.convert(gpt2(scale=20), f"{family}_{chosen.degree - 1}", **options)
        assert error(below) > tolerance


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [3e-4, 1e-5])
def test_auto_with_fisher_weights_adds_up_all_fields(tolerance):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": torch.arange(16).view(2, 8), "pixel_values": pixels}

    def parts(degree, **options):
        """The predicted divergence and the degree of each field."""
        found = {}
        options |= {"calibration": [batch], "tails": False}  # without tails, no fit without data takes their place
        for layer in hf_ortho.convert(clip(), "hermite", degree=degree, **options).layers:
            before, _ = found.get(layer.field, (0.0, 0))
            found[layer.field] = before + layer.fit.divergence, int(layer.fit.activation.split("_")[1])
        return found

    found = parts("auto", tolerance=tolerance)
    assert sum(part for part, _ in found.values()) <= tolerance
    at = {n: parts(n) for n in range(1, 1 + max(n for _, n in found.values()))}
    alone = {field: next(n for n in at if at[n][field][0] <= tolerance) for field in found}
    together = sum(at[n][field][0] for field, n in alone.items())
    assert ({field: n for field, (_, n) in found.items()} == alone) == (together <= tolerance)
    assert all(found[field] == pytest.approx(at[found[field][1]][field]) for field in found)


def test_auto_chooses_for_each_field():
    model = clip()
    model.config.text_config.hidden_act = "relu"
    model.text_model.encoder.layers[0].mlp.activation_fn = torch.nn.ReLU()
    report = hf_ortho.convert(model, "tropical_rational", degree="auto", tolerance=5e-3)
    fields = {layer.field: layer.fit.activation for layer in report.layers}
    assert fields["text_config.hidden_act"] == "tropical_rational_1"  # exact
    assert fields["vision_config.hidden_act"] == model.config.vision_config.hidden_act != "tropical_rational_1"
    assert set(report.activation.split(", ")) == set(fields.values())


def test_auto_raises_another_field_if_one_is_at_its_limit(monkeypatch):
    def fits(model, family, histograms, options, site, paths, degree):
        error = {"a": 0.6, "b": 0.5 / degree}[site.field]
        yield site.field, (None, SimpleNamespace(fit=SimpleNamespace(divergence=error, rms_error=error, error=error)))

    monkeypatch.setattr("hf_ortho.conversion.fit_sites._fits", fits)
    sites = [Site(name, "", "gelu", (name,)) for name in ("a", "b")]
    degrees, _ = fit_smallest(None, sites, FAMILIES["hermite"], {}, None, 1.0)
    assert degrees == {"a": 32, "b": 2}
    with pytest.raises(FitError, match=r"tolerance 0\.61: hermite of degree 32 in a, b has a divergence of 6\.2e-01"):
        fit_smallest(None, sites, FAMILIES["hermite"], {}, None, 0.61)


@pytest.mark.slow
def test_auto_without_a_degree_that_passes(gpt2, state_of):
    model = gpt2()
    before = state_of(model)
    with pytest.raises(FitError, match=r"tolerance 1e-09: hermite up to degree 32 .* transformer\.h\.0\.mlp\.act"):
        hf_ortho.convert(model, "hermite", degree="auto", tolerance=1e-9)
    with pytest.raises(FitError, match="tolerance 0"):
        hf_ortho.convert(model, "hermite", degree="auto", tolerance=0)
    with pytest.raises(HfOrthoError, match="degree 'most'"):
        hf_ortho.convert(model, "hermite", degree="most")
    assert state_of(model) == before


# ---- tails -----------------------------------------------------------------------------------------------------------


def test_without_tails_a_hermite_conversion_is_a_polynomial(gpt2, ids, inputs_of):
    model = gpt2(scale=10)
    source = copy.deepcopy(model)
    report = hf_ortho.convert(model, "hermite_6", calibration=[ids], tails=False)
    seen = inputs_of(source, [layer.module for layer in report.layers], {"input_ids": ids})
    for layer in report.layers:
        module = model.get_submodule(layer.module)
        assert module.domain.tolist() == [-torch.inf, torch.inf]
        assert layer.fit.domain == (seen[layer.module].min(), seen[layer.module].max())
        assert layer.fit.mass_outside == 0
        x = torch.linspace(*layer.fit.domain, 101, dtype=torch.float64)
        with torch.no_grad():
            y, g = module(x), source.get_submodule(layer.module)(x)
        assert torch.allclose(torch.from_numpy(hf_ortho.polynomials(model)[layer.module].chebyshev(x.numpy())), y)
        assert (y - g).abs().max() == pytest.approx(layer.fit.sup_error, rel=0.02)
        beyond = 2 * x[-1:]
        assert module(beyond).item() == pytest.approx(
            hf_ortho.polynomials(model)[layer.module].monomial(beyond.item()), rel=1e-6
        )
    assert model.config.hf_ortho["tails"] is False


def test_without_tails_the_data_must_lie_in_the_domain(gpt2, ids, state_of):
    model = gpt2(scale=10)
    before = state_of(model)
    with pytest.raises(FitError, match=r"transformer\.h\.0\.mlp\.act.*needs calibration data or a domain"):
        hf_ortho.convert(model, "hermite_6", tails=False)
    with pytest.raises(FitError, match="the data range from"):
        hf_ortho.convert(model, "hermite_6", tails=False, calibration=[ids], domain=(-0.1, 0.1))
    assert state_of(model) == before
    report = hf_ortho.convert(model, "hermite_6", tails=False, domain=(-6.0, 6.0))
    assert {layer.fit.domain for layer in report.layers} == {(-6.0, 6.0)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("domain", [(20.0, 26.0), (0.01, 0.02), (-3.0, -2.5)])
def test_without_tails_any_interval_can_be_fitted(family, domain):
    module = FAMILIES[family](4)
    report = module.fit("gelu", tails=False, domain=domain)
    x = torch.linspace(*domain, 101, dtype=torch.float64)
    with torch.no_grad():
        error = (module(x) - torch.nn.functional.gelu(x)).abs().max().item()
    assert error <= 1.05 * report.sup_error + 1e-9
    assert error <= 0.05 * (domain[1] - domain[0]) + (5.0 if family == "tropical" else 0.0)  # its slopes are fixed
    assert report.rms_error <= report.sup_error


def test_without_tails_constant_data_need_a_domain(gpt2, ids, state_of):
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.zero_()
        model.transformer.h[0].mlp.c_fc.bias.fill_(0.5)
    before = state_of(model)
    with pytest.raises(FitError, match=r"all data equal 0\.5; give a domain"):
        hf_ortho.convert(model, "hermite_3", calibration=[ids], tails=False)
    assert state_of(model) == before


# ---- revert, and fitting anew ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_revert_restores_the_source(family, gpt2, ids, tmp_path):
    model, original = gpt2(), gpt2()
    hf_ortho.convert(model, f"{family}_4")
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hf_ortho.revert(reloaded) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    assert reloaded.config.activation_function == "gelu_new"
    assert not hasattr(reloaded.config, "hf_ortho")
    assert reloaded.state_dict().keys() == original.state_dict().keys()
    with torch.no_grad():
        assert torch.allclose(reloaded(ids).logits, original(ids).logits, atol=1e-6)


def test_revert_keeps_a_prefix():
    config = T5Config(vocab_size=49, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config.feed_forward_proj, config.dense_act_fn, config.is_gated_act = "gated-gelu", "gelu_new", True
    model = T5ForConditionalGeneration(config)
    before = model.config.to_dict()
    hf_ortho.convert(model, "hermite_4")
    hf_ortho.revert(model)
    assert model.config.to_dict() == before
    assert not learned(model)


def test_revert_of_a_model_that_was_not_converted(gpt2, state_of):
    model = gpt2()
    before = state_of(model)
    with pytest.raises(SiteError, match="names no source activations"):
        hf_ortho.revert(model)
    scratch = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=9, activation_function="fourier_3"))
    with pytest.raises(SiteError, match="names no source activations"):
        hf_ortho.revert(scratch)
    assert state_of(model) == before


def test_a_second_conversion_follows_the_present_activations(gpt2):
    model = gpt2()
    hf_ortho.convert(model, "hermite_8")
    act = model.transformer.h[1].mlp.act
    with torch.no_grad():
        act.coefficients[1] += 0.25  # as training might
    shape = copy.deepcopy(act)
    hf_ortho.convert(model, "fourier_8")
    x = torch.linspace(-6, 6, 301)
    with torch.no_grad():
        assert (model.transformer.h[1].mlp.act(x) - shape(x)).abs().max() < 0.1
        assert (model.transformer.h[1].mlp.act(x) - torch.nn.functional.gelu(x)).abs().max() > 0.4
    assert model.config.hf_ortho["source_activations"] == {"activation_function": "gelu_new"}
    hf_ortho.revert(model)
    assert model.config.activation_function == "gelu_new"


def test_a_partial_conversion_keeps_what_is_known_of_the_other_field():
    model = clip()
    hf_ortho.convert(model, "hermite_4")
    hf_ortho.convert(model, "fourier_4", fields=["text_config.hidden_act"])
    known = {layer["module"]: layer for layer in model.config.hf_ortho["layers"]}
    assert known.keys() == learned(model).keys()
    assert {layer["source"] for layer in known.values()} == {"quick_gelu"}
    hf_ortho.revert(model)
    assert not learned(model)


# ---- low precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_reported_next_to_the_rounding_of_the_dtype(dtype, gpt2, ids, relative_error):
    model = gpt2(scale=20).to(dtype)
    with torch.no_grad():
        expected = model(ids).logits
    report = hf_ortho.convert(model, "hermite_16", calibration=[{"input_ids": ids}])
    with torch.no_grad():
        found = model(ids).logits
    assert report.fidelity.output_error == pytest.approx(relative_error(found, expected), rel=1e-3)
    # an accurate fit differs from the source by rounding only, and by as much as another rounding makes
    assert 0.2 * report.fidelity.rounding < report.fidelity.kl < 4 * report.fidelity.rounding
    assert f"KL {report.fidelity.rounding:.1e}" in str(report)
    assert {p.dtype for module in learned(model).values() for p in module.parameters()} == {torch.float32}


def test_float32_has_no_rounding_to_speak_of(gpt2, ids, relative_error):
    model, original = gpt2(scale=20), gpt2(scale=20)
    report = hf_ortho.convert(model, "hermite_3", calibration=[ids])
    with torch.no_grad():
        expected = relative_error(model(ids).logits, original(ids).logits)
    assert (report.fidelity.rounding, report.fidelity.output_error) == (None, pytest.approx(expected, rel=1e-3))
    assert "rounding" not in str(report)


# ---- distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_brings_the_outputs_closer(family, gpt2, ids, relative_error):
    def converted(steps):
        model = gpt2(scale=20)
        options = {
            "calibration": [ids[:1], ids[1:2], ids[2:]],
            "domain": (-1.5, 1.0),
        }  # where the fits leave something to gain
        return model, hf_ortho.convert(model, f"{family}_3", distill=steps, **options)

    held_out, original = ids[2:], gpt2(scale=20)
    (plain, before), (tuned, after) = converted(0), converted(30)
    with torch.no_grad():
        errors = [relative_error(m(held_out).logits, original(held_out).logits) for m in (plain, tuned)]
    assert errors[1] < 0.95 * errors[0]
    assert before.distillation is None
    assert after.distillation.steps == 30
    assert after.distillation.error_after == pytest.approx(errors[1] ** 2, rel=1e-2)
    if any("without the calibration data" in note for note in before.notes):  # distillation starts from the other fit
        assert after.distillation.error_before > errors[0] ** 2
    else:
        assert after.distillation.error_before == pytest.approx(errors[0] ** 2, rel=1e-2)
    assert "30 steps of distillation" in str(after)
    for name, module in learned(tuned).items():
        layer = next(v for v in after.layers if v.module == name)
        assert layer.fit.domain == tuple(module.domain.tolist())  # measured anew
    for (key, a), b in zip(plain.named_parameters(), tuned.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b) or ".act." in key


def test_distillation_that_buys_nothing_changes_nothing(gpt2, ids):
    def converted(steps):
        model = gpt2()
        model.transformer.h[0].mlp.act = model.transformer.h[1].mlp.act = torch.nn.ReLU()
        model.config.activation_function = "relu"
        report = hf_ortho.convert(model, "tropical_rational_2", calibration=[ids], distill=steps)
        return report, {k: v.clone() for k, v in model.state_dict().items()}

    (_, before), (report, after) = converted(0), converted(3)
    assert report.distillation.error_before == report.distillation.error_after == 0
    assert "0 steps of distillation" in str(report)
    assert "on the only batch" in " ".join(str(report).split())
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_distillation_needs_batches_to_read_again(gpt2, ids, state_of):
    model = gpt2()
    before = state_of(model)
    with pytest.raises(CalibrationError, match="distill needs calibration"):
        hf_ortho.convert(model, "hermite_3", distill=2)
    with pytest.raises(CalibrationError, match="pass a list"):
        hf_ortho.convert(model, "hermite_3", distill=2, calibration=iter([ids]))
    with pytest.raises(CalibrationError, match="distill -1"):
        hf_ortho.convert(model, "hermite_3", distill=-1, calibration=[ids])
    assert state_of(model) == before


# ---- batches and arguments of all kinds ------------------------------------------------------------------------------


def test_padding_does_not_count(gpt2, ids):
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    short = hf_ortho.convert(gpt2(scale=20), "hermite_5", calibration=[{"input_ids": ids[:, :20]}], weights="density")
    padded_inputs = {"return_dict": True, "input_ids": ids, "attention_mask": mask}
    padded = hf_ortho.convert(gpt2(scale=20), "hermite_5", calibration=[padded_inputs], weights="density")
    for a, b in zip(short.layers, padded.layers, strict=True):
        assert b.fit.minimum == pytest.approx(a.fit.minimum, rel=1e-4)
        assert b.fit.rms_error == pytest.approx(a.fit.rms_error, rel=1e-3)


def test_outputs_of_zero_have_no_relative_error(ids):
    model = BertForSequenceClassification(BertConfig(vocab_size=97, **TINY)).eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    report = hf_ortho.convert(model, "hermite_4", calibration=[{"input_ids": ids}], distill=2)
    assert report.fidelity.output_error is None
    assert report.fidelity.kl == 0
    assert "nan" not in report.to_json().lower()
    assert "nan" not in str(report)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": "hermite_8", "degree": 6}, "'hermite_8' already names its degree"),
        ({"activation": "hermite_8", "degree": "auto"}, "'hermite_8' already names its degree"),
        ({"degree": 0}, "degree '0'"),
        ({"fields": "activation_function"}, "must be a list"),
        ({"domain": 5}, "domain 5"),
        ({"domain": (1, 2, 3)}, "domain"),
        ({"domain": (2.0, 1.0)}, "domain"),
        ({"tolerance": float("nan"), "degree": "auto"}, "tolerance nan"),
    ],
)
def test_arguments_that_cannot_be(options, reason, gpt2, state_of):
    model = gpt2()
    before = state_of(model)
    with pytest.raises(HfOrthoError, match=reason):
        hf_ortho.convert(model, **options)
    assert state_of(model) == before


def test_the_default_family_takes_a_degree(gpt2):
    assert hf_ortho.convert(gpt2(), degree=5).activation == "hermite_5"
    assert hf_ortho.convert(gpt2()).activation == "hermite_8"


def test_an_interrupt_while_checking_undoes_the_conversion(gpt2, state_of, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    model = gpt2()
    before = state_of(model)
    monkeypatch.setattr(sys.modules["hf_ortho.conversion.replace"], "rebuild", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hf_ortho.convert(model, "hermite_3")
    assert state_of(model) == before
