"""The importance of pre-activations against second derivatives of the divergence, and what a conversion makes of it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from no_backward import NoBackward
from torch import nn
from torch.func import jacrev, vmap
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2ForSequenceClassification

import hf_ortho
from hf_ortho.conversion import calibrate, collect, fisher
from hf_ortho.conversion.inputs import Prediction, predict
from hf_ortho.conversion.sites import find_sites
from hf_ortho.errors import CalibrationError

BINS = np.linspace(-np.arcsinh(2.0**16), np.arcsinh(2.0**16), 1025)
BERT = {
    "vocab_size": 11,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
    "initializer_range": 0.3,
}
ACTS = ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]


def kl(before, after):
    return F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)


def binary_kl(before, after):
    p, q = torch.sigmoid(before), torch.sigmoid(after)
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()


def half_square(before, after):
    return 0.5 * (after - before).square().sum()


DIVERGENCES = {"categorical": kl, "binary": binary_kl, "real": half_square}


def hessians(kind, rows):
    """The second derivative of each row's divergence by the second argument, where both are equal."""
    return vmap(jacrev(jacrev(DIVERGENCES[kind], 1), 1))(rows, rows)


def tokens(*shape):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(3))


def bert(cls, **options):
    torch.manual_seed(0)
    return cls(BertConfig(**BERT, **options)).eval()


@pytest.fixture(params=["gpt2", "masked", "convnext", "encoder", "multi-label", "regression"])
def case(request, gpt2, convnext):
    """(model, batch, kind, (batch, length) mask of the predictions or None)."""
    batch = {"input_ids": tokens(2, 7)}
    tiny = {"vocab_size": 11, "n_embd": 12, "n_positions": 8, "n_inner": 16}
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    if request.param == "gpt2":
        return gpt2(scale=20, **tiny), batch, "categorical", None
    if request.param == "masked":
        return gpt2(scale=20, **tiny), batch | {"attention_mask": mask}, "categorical", mask.bool()
    if request.param == "convnext":
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
        return convnext(scale=20, hidden_sizes=[4, 8], image_size=16), {"pixel_values": pixels}, "categorical", None
    if request.param == "encoder":
        return bert(BertModel), batch | {"attention_mask": mask}, "real", mask.bool()
    if request.param == "regression":
        return bert(BertForSequenceClassification, num_labels=1), batch, "real", None
    options = {"problem_type": "multi_label_classification", "num_labels": 3}
    return bert(BertForSequenceClassification, **options), batch, "binary", None


def activation_paths(model):
    return [name for name, module in model.named_modules() if name.endswith((".act", "intermediate_act_fn"))]


def second_derivatives(model, batch, kind, mask):
    """By path, (inputs, diagonal of the second derivative of the divergence by the outputs) of each activation, where
    the mask is not 0. All in float64, with one gradient per output value and the Hessian of the divergence there."""
    model = copy.deepcopy(model).double()
    seen = {path: [] for path in activation_paths(model)}
    for path in seen:
        model.get_submodule(path).register_forward_hook(lambda _, args, out, path=path: seen[path].extend([*args, out]))
    out = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    out = out.logits if "logits" in out else out.last_hidden_state
    rows = (out if mask is None else out[mask]).flatten(0, -2)
    h = hessians(kind, rows.detach())
    h = h / (half_square(0.0, rows.detach()) if kind == "real" else len(rows))
    found = {}
    for path, (x, y) in seen.items():
        units = torch.eye(rows.numel(), dtype=torch.double).view(-1, *rows.shape)
        (j,) = torch.autograd.grad(rows, y, units, is_grads_batched=True, retain_graph=True)
        j = j.view(*rows.shape, *y.shape)
        diagonal = torch.einsum("rcd,rc...,rd...->...", h, j, j)
        found[path] = [(v if mask is None else v[mask]).detach().flatten().numpy() for v in (x, diagonal)]
    return found


def in_bins(x, values):
    return np.histogram(np.arcsinh(x), BINS, weights=values)[0]


@pytest.fixture
def every_direction(monkeypatch):
    """Instead of a random direction, batch k gets the k-th of fixed ones u_k, with sum_k u_k u_k^T = H."""
    taken = []

    def direction(prediction, generator):
        y = prediction.output.detach()
        rows = prediction.rows().detach()
        row, column = divmod(len(taken), rows.shape[-1])
        z, unit = rows[row], F.one_hot(torch.tensor(column), rows.shape[-1]).float()
        if prediction.kind == "categorical":
            p = z.softmax(-1)
            u = p[column].sqrt() * (p - unit)
        else:
            u = unit * (torch.sigmoid(z[column]) * torch.sigmoid(-z[column])).sqrt() ** (prediction.kind == "binary")
        taken.append(u)
        full = torch.zeros_like(rows)
        full[row] = u
        if prediction.mask is None:
            return full.view_as(y)
        return torch.zeros_like(y).masked_scatter(prediction.mask.unsqueeze(-1).expand_as(y), full)

    monkeypatch.setattr(calibrate, "direction", direction)
    return taken


@pytest.mark.slow
def test_importance_is_the_second_derivative_of_the_divergence(case, every_direction):
    model, batch, kind, mask = case
    expected = second_derivatives(model, batch, kind, mask)
    prediction = predict(model, batch)
    assert prediction.kind == kind
    count = prediction.rows().numel()
    found = collect(model, expected, [batch] * count)
    assert len(every_direction) == count
    for path, (x, diagonal) in expected.items():
        binned = in_bins(x, diagonal)
        # the divergences of ``count`` batches are averaged, those of the directions add up; float32 gradients
        np.testing.assert_allclose(found[path].importance * count, binned, rtol=1e-3, atol=1e-5 * binned.max())
        assert found[path].counts.sum() == count * len(x)


@pytest.mark.slow
def test_random_directions_have_that_importance_on_average(case):
    model, batch, kind, mask = case
    expected = second_derivatives(model, batch, kind, mask)
    found = collect(model, expected, [batch] * 100)
    for path, (_, diagonal) in expected.items():
        # A squared Gaussian has the relative deviation sqrt(2), and even if only one direction matters, 400 of them
        # leave 7 % of it.
        assert found[path].importance.sum() == pytest.approx(diagonal.sum(), rel=0.2)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_covariance_of_the_directions_is_the_hessian(kind):
    z = torch.tensor([[1.0, -0.5, 0.3, 2.0], [0.0, 3.0, -1.0, -2.0]])
    n = 200_000
    mask = torch.ones(n, 3, dtype=torch.bool)
    mask[:, 2] = False
    output = torch.cat([z, torch.randn(1, 4)]).expand(n, 3, 4)
    u = fisher.direction(Prediction(output, kind, mask), torch.Generator().manual_seed(0)).double()
    assert not u[:, 2].any()
    expected = torch.block_diag(*hessians(kind, z.double()))
    flat = u[:, :2].flatten(1)
    deviation = (flat.unsqueeze(1) * flat.unsqueeze(2)).std(0) / n**0.5
    assert ((flat.T @ flat / n - expected).abs() <= 5 * deviation + 1e-6).all()
    assert (flat.mean(0).abs() <= 5 * flat.std(0) / n**0.5 + 1e-6).all()


def test_directions_are_the_same_in_every_run(gpt2, ids):
    first, second = (collect(gpt2(), ACTS, [ids]) for _ in range(2))
    for path in ACTS:
        np.testing.assert_array_equal(first[path].importance, second[path].importance)


@pytest.mark.parametrize(("activation", "scale"), [("hermite_8", 20), ("hermite_12", 20), ("fourier_4", 60)])
def test_the_predicted_divergence_is_close_to_the_measured_one(gpt2, ids, activation, scale):
    report = hf_ortho.convert(gpt2(scale=scale), activation, calibration=[{"input_ids": ids}])
    predicted = sum(layer.fit.divergence for layer in report.layers)
    assert predicted == pytest.approx(report.fidelity.kl, rel=0.5)


def test_the_predicted_divergence_of_an_encoder(gpt2):
    model = bert(BertModel)
    report = hf_ortho.convert(model, "hermite_6", calibration=[tokens(16, 8)])
    predicted = sum(layer.fit.divergence for layer in report.layers)
    assert predicted == pytest.approx(report.fidelity.output_error**2, rel=0.5)


def test_fisher_weights_serve_the_predictions(gpt2, ids):
    """Of eight neurons seven have no effect on the output: their pre-activations do not count."""

    def converted(weights):
        model = gpt2(scale=20)
        with torch.no_grad():
            idle = torch.arange(128) % 8 > 0
            for block in model.transformer.h:
                block.mlp.c_fc.bias[idle] += 3.0
                block.mlp.c_proj.weight[idle] = 0.0
        return hf_ortho.convert(model, "hermite_6", calibration=[ids], weights=weights)

    fisher, density = converted("fisher"), converted("density")
    assert (fisher.weights, density.weights) == ("fisher", "density")
    assert fisher.fidelity.kl < 0.9 * density.fidelity.kl
    assert all(layer.fit.divergence is None for layer in density.layers)
    for ours, theirs in zip(fisher.layers, density.layers, strict=True):
        assert ours.fit.rms_error > theirs.fit.rms_error  # over all neurons


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


def assert_same(found, expected):
    for path, histogram in expected.items():
        np.testing.assert_array_equal(found[path].counts, histogram.counts)
        np.testing.assert_allclose(found[path].importance, histogram.importance, rtol=1e-4)


def forwards(model):
    return {name: vars(module).get("forward") for name, module in model.named_modules()}


def own_checkpointing(model, monkeypatch):
    model.activation_checkpointing_enable()


def large(model, monkeypatch):
    monkeypatch.setattr(fisher, "LARGE", 0)


def replaced_forward(model, monkeypatch):
    """As Accelerate does it: the module has a forward of its own, which calls the earlier one."""
    monkeypatch.setattr(fisher, "LARGE", 0)
    block = model.transformer.h[0]
    plain = block.forward
    block.calls = []

    def forward(*args, **kwargs):
        block.calls.append(1)
        return plain(*args, **kwargs)

    block.forward = forward


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("change", [own_checkpointing, large, replaced_forward], ids=lambda change: change.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_activations_that_are_computed_again_count_once(gpt2, ids, change, training, monkeypatch):
    expected = collect(gpt2(scale=20), ACTS, [ids[:3], ids[3:]])
    model = gpt2(scale=20).train(training)
    change(model, monkeypatch)
    runs = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda module, args: runs.append(1))
    before = forwards(model)
    assert_same(collect(model, ACTS, [ids[:3], ids[3:]]), expected)
    assert len(runs) == 4  # of two batches: the backward pass computed them again
    assert forwards(model) == before
    if change is replaced_forward:
        assert len(model.transformer.h[0].calls) == 4


def test_forwards_are_restored_after_a_failure(gpt2, ids, monkeypatch, state_of):
    model = gpt2()
    replaced_forward(model, monkeypatch)
    before = forwards(model), state_of(model)
    with pytest.raises(CalibrationError):
        collect(model, ACTS, [ids, ids + 97])
    assert (forwards(model), state_of(model)) == before


# ---- what stays as it was --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", ["fisher", "density"])
def test_parameters_and_random_numbers_are_left_alone(gpt2, ids, state_of, dtype, weights):
    model = gpt2(scale=20).to(dtype).train()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
        p.grad = torch.full_like(p, 0.5) if i % 2 else None
    others = {name: p for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in others.items()}
    flags = {name: p.requires_grad for name, p in others.items()}
    random = torch.get_rng_state()
    report = hf_ortho.convert(model, "hermite_8", calibration=[ids[:2], ids[2:]], weights=weights)
    assert torch.equal(torch.get_rng_state(), random)
    assert report.weights == weights
    for name, p in model.named_parameters():
        if ".act." not in name:
            assert p is others[name]
            assert p.requires_grad == flags[name]
            assert p.grad is grads[name]
            assert p.grad is None or (p.grad == 0.5).all()
        else:
            assert p.grad is None
    for module in model.modules():
        assert [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks] == []
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_bfloat16_gives_nearly_the_same_importance(gpt2, ids):
    exact = collect(gpt2(scale=20), ACTS, [ids] * 8)
    rounded = collect(gpt2(scale=20).bfloat16(), ACTS, [ids] * 8)
    for path in ACTS:  # other classes are drawn where a probability is rounded across the random number
        assert rounded[path].importance.sum() == pytest.approx(exact[path].importance.sum(), rel=0.1)


# ---- no backward pass ------------------------------------------------------------------------------------------------


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Kernel(nn.Module):
    def forward(self, x):
        return NoBackward.apply(x)


class Refusing(nn.Module):
    """Like a kernel for inference only."""

    def forward(self, x):
        if torch.is_grad_enabled():
            raise NotImplementedError("no gradients here")
        return x


@pytest.mark.parametrize("blocked", [Detached, Kernel, Refusing])
def test_without_a_backward_pass_the_weights_are_densities(gpt2, ids, blocked):
    def converted(weights):
        model = gpt2(scale=20)
        model.transformer.ln_f = nn.Sequential(model.transformer.ln_f, blocked())
        return hf_ortho.convert(model, "hermite_5", calibration=[ids[:1], ids[1:2], ids[2:]], weights=weights)

    report, density = converted("fisher"), converted("density")
    assert (report.weights, density.weights) == ("density", "density")
    assert [layer.fit for layer in report.layers] == [layer.fit for layer in density.layers]
    (note,) = report.notes
    assert "the backward pass of GPT2LMHeadModel fails" in note
    assert "\n" not in note
    assert density.notes == []
    assert note in " ".join(str(report).split()).replace("  ", " ")
    assert report.fidelity.kl == density.fidelity.kl
    assert report.fidelity.gradient_error is None or blocked is Detached


def test_a_backward_pass_that_fails_later_leaves_no_importance(gpt2, ids):
    model = gpt2()
    plain, calls = model.transformer.ln_f.forward, []

    def forward(x):
        calls.append(1)
        return plain(x) if len(calls) == 1 else NoBackward.apply(plain(x))

    model.transformer.ln_f.forward = forward
    found = collect(model, ACTS, [ids[:1], ids[1:2], ids[2:]])
    assert [found[path].importance for path in ACTS] == [None, None]
    assert [found[path].counts.sum() for path in ACTS] == [ids.numel() * 128] * 2


def test_unknown_weights(gpt2, ids, state_of):
    model = gpt2()
    before = state_of(model)
    for call in (
        lambda: hf_ortho.convert(model, calibration=[ids], weights="hessian"),
        lambda: collect(model, ACTS, [ids], weights="hessian"),
    ):
        with pytest.raises(CalibrationError, match="weights 'hessian': must be 'fisher' or 'density'"):
            call()
    assert state_of(model) == before


# ---- padding ---------------------------------------------------------------------------------------------------------


def test_what_stands_at_masked_positions_has_no_influence(gpt2, ids):
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    other = ids.clone()
    other[:, 20:] = (ids[:, 20:] + 31) % 97
    batches = [{"input_ids": x, "attention_mask": mask} for x in (ids, other)]
    first, second = (collect(gpt2(scale=20), ACTS, [batch]) for batch in batches)
    cut = collect(gpt2(scale=20), ACTS, [ids[:, :20]])
    for path in ACTS:
        np.testing.assert_array_equal(second[path].counts, first[path].counts)
        np.testing.assert_array_equal(cut[path].counts, first[path].counts)
        # the same draws, but products of other shapes
        np.testing.assert_allclose(second[path].importance, first[path].importance, rtol=1e-4, atol=1e-12)
        # other draws: 80 predictions each, with 97 directions
        assert cut[path].importance.sum() == pytest.approx(first[path].importance.sum(), rel=0.3)


def test_padding_does_not_move_the_prediction_of_a_classifier(gpt2, ids):
    model = gpt2(GPT2ForSequenceClassification, num_labels=3, scale=20)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    padded = ids.masked_fill(mask == 0, 0)
    short = collect(model, ACTS, [ids[:, :20].masked_fill(ids[:, :20] == 0, 1)])
    long = collect(
        model, ACTS, [{"input_ids": padded.masked_fill((ids == 0) & (mask == 1), 1), "attention_mask": mask}]
    )
    for path in ACTS:
        np.testing.assert_array_equal(short[path].counts, long[path].counts)
        np.testing.assert_allclose(short[path].importance, long[path].importance, rtol=1e-3, atol=1e-9)


# ---- held-out batches ------------------------------------------------------------------------------------------------


def two_languages(gpt2):
    """The pre-activations of tokens below 50 are around -1.5, those of the others around 3.5."""
    model = gpt2(scale=5, n_layer=1)
    with torch.no_grad():
        model.transformer.wte.weight[:50, 0] = -0.05
        model.transformer.wte.weight[50:, 0] = 0.05
        model.transformer.h[0].mlp.c_fc.weight[0] = 1.5
        model.transformer.h[0].mlp.c_fc.bias.fill_(1.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["hermite_4", "fourier_3", "tropical_rational_3"])
@pytest.mark.parametrize("weights", ["fisher", "density"])
def test_a_fit_that_is_worse_on_held_out_data_is_replaced(gpt2, ids, activation, weights):
    model, free, source = (two_languages(gpt2) for _ in range(3))
    low, high = ids % 49 + 1, ids % 47 + 50
    report = hf_ortho.convert(model, activation, calibration=[high, low], weights=weights)
    plain = hf_ortho.convert(free, activation)
    (note,) = report.notes
    assert note.startswith("a fit without the calibration data is closer to the source model, and is used: divergence ")
    with torch.no_grad():
        before, after = (m(low).logits.double() for m in (source, free))
        assert torch.equal(model(low).logits.double(), after)
    assert report.fidelity.held_out
    assert report.fidelity.kl == pytest.approx(float(kl(before, after)) / low.numel(), rel=1e-3)
    assert f"divergence {report.fidelity.kl:.1e} instead of " in note
    (ours,), (theirs,) = report.layers, plain.layers
    assert (ours.fit.domain, ours.fit.tail_slopes) == (theirs.fit.domain, theirs.fit.tail_slopes)
    assert ours.fit.sup_error == pytest.approx(theirs.fit.sup_error, rel=1e-2)
    assert ours.fit.minimum is not None  # the errors are those on the data
    assert (ours.fit.divergence is not None) == (weights == "fisher")
    text = " ".join(str(report).split())
    assert f"note: {note}" in text
    assert max(map(len, str(report).splitlines())) <= 100


def test_a_fit_that_is_better_on_held_out_data_stays(convnext, pixels):
    model = convnext(scale=40)
    report = hf_ortho.convert(model, "hermite_4", calibration=[pixels[:3], pixels[3:]])
    assert report.notes == []
    free = convnext(scale=40)
    hf_ortho.convert(free, "hermite_4")
    source = convnext(scale=40)
    with torch.no_grad():
        logits = [m(pixels[3:]).logits.double() for m in (source, model, free)]
    assert kl(logits[0], logits[1]) < kl(logits[0], logits[2])


@pytest.mark.parametrize(("count", "held"), [(1, []), (2, [1]), (5, [1]), (6, [1, 5]), (20, [1, 5, 9, 13])])
def test_the_second_of_every_four_batches_is_held_out(gpt2, count, held):
    batches = [torch.full((1, 4), i) for i in range(count)]
    model = gpt2()
    sites, _ = find_sites(model)
    for given in (batches, iter(batches)):
        source = calibrate.Calibration.of(model, sites, given, "density")
        assert source.held_out == bool(held)
        assert list(source.batches) == [f"calibration batch {i + 1}" for i in held or [0]]
        assert [int(batch[0, 0]) for batch in source.batches.values()] == (held or [0])
        assert {h.counts.sum() for h in source.histograms.values()} == {4 * 128 * (count - len(held))}
