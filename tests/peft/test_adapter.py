"""An adapter of activations on stock peft: what is trained, saved, loaded, switched and merged."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hf_ortho
from hf_ortho.activations import FAMILIES, build
from hf_ortho.checkpoints.activations import load_activations
from hf_ortho.errors import (
    ActivationNameError,
    AdapterError,
    CalibrationError,
    CheckpointError,
    SiteError,
    WidthError,
)
from hf_ortho.peft import OrthoConfig, OrthoLayer, calibrate
from hf_ortho.training.optimizer import activations_by_path

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # read by peft
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # transformers' second adapter
]
PATHS = ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
NORMS = ["transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.h.1.ln_1", "transformer.h.1.ln_2"]
NORMS.append("transformer.ln_f")
KINDS = [*FAMILIES, *(f"{family}, 4 groups" for family in FAMILIES), "hermite, norms"]


@pytest.fixture
def base(gpt2_folder):
    return AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()


@pytest.fixture(scope="module")
def saved(gpt2_folder, tmp_path_factory, logits, nudge):
    """For each of ``KINDS`` a saved adapter with moved parameters, and its logits."""
    found = {}
    for kind in KINDS:
        family, _, what = kind.partition(", ")
        base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
        name = f"{family}_3" + ("_g4" if "groups" in what else "")
        config = OrthoConfig(activation=name, norms=what == "norms", task_type=TaskType.CAUSAL_LM)
        model = nudge(get_peft_model(base, config))
        if "groups" in what:  # other domains, as of fits to the data of each group
            with torch.no_grad():
                for path in PATHS:
                    base.get_submodule(path).hf_ortho_act["default"].domain *= torch.linspace(0.2, 1, 4)[:, None]
        found[kind] = tmp_path_factory.mktemp("saved"), logits(model)
        model.save_pretrained(found[kind][0])
    return found


def test_a_new_adapter_is_a_fit_and_trains_only_its_series(base, logits, capsys):
    before = logits(base)
    model = get_peft_model(base, OrthoConfig(activation="hermite"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{path}.hf_ortho_act.default.coefficients" for path in PATHS}
    model.print_trainable_parameters()
    assert "trainable params: 18 ||" in capsys.readouterr().out
    alone = build("hermite_8")
    fit = alone.fit("gelu_new")
    for path in PATHS:
        layer = model.get_base_model().get_submodule(path)
        assert torch.equal(layer.hf_ortho_act["default"].coefficients, alone.coefficients)
        assert torch.equal(layer.hf_ortho_act["default"].domain, alone.domain)
    config = model.peft_config["default"]
    assert config.activation == "hermite_8"
    assert [layer.fit for layer in config.report.layers] == [fit, fit]
    assert (logits(model) - before).abs().max() < 5e-3
    assert model.get_layer_status()[0].available_adapters == ["default"]
    assert repr(model.get_base_model().transformer.h[0].mlp.act).startswith("hf_ortho.OrthoLayer(")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["peft", "trainable", "low_cpu_mem_usage", "transformers", "auto", "folder"])
def test_a_saved_adapter_reloads_bit_equal(way, kind, saved, base, logits):
    folder, expected = saved[kind]
    if way == "transformers":
        model = base
        model.load_adapter(folder)
    elif way == "auto":
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
    elif way == "folder":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        options = {way: True} if way == "low_cpu_mem_usage" else {"is_trainable": way == "trainable"}
        model = PeftModel.from_pretrained(base, folder, **options)
    assert torch.equal(logits(model), expected)
    learned = {n: p for n, p in model.named_parameters() if ".hf_ortho_act." in n}
    assert {p.requires_grad for p in learned.values()} == {way == "trainable"}
    assert not any(name.endswith("domain") for name in learned)


def test_the_file_holds_one_tensor_per_parameter_and_the_config_the_rest(saved, gpt2_folder):
    folder, _ = saved["hermite"]
    weights = load_file(folder / "adapter_model.safetensors")
    assert set(weights) == {f"base_model.model.{path}.hf_ortho_act.coefficients" for path in PATHS}
    config = json.loads((folder / "adapter_config.json").read_text())
    alone = build("hermite_3")
    fit = alone.fit("gelu_new")
    assert config["peft_type"] == "HF_ORTHO"
    assert config["base_model_name_or_path"] == str(gpt2_folder)
    assert config["hf_ortho_version"] == hf_ortho.__version__
    assert config["base_commit"] is None
    assert config["source_activations"] == {"activation_function": "gelu_new"}
    assert [layer["module"] for layer in config["layers"]] == PATHS
    assert config["layers"][0]["domain"] == alone.domain.tolist()
    assert config["layers"][0]["tail_slopes"] == [0.0, 1.0]
    assert config["layers"][0]["sup_error"] == fit.sup_error


@pytest.mark.parametrize("family", FAMILIES)
def test_the_domains_of_groups_are_among_the_weights(family, saved):
    folder, _ = saved[f"{family}, 4 groups"]
    weights = load_file(folder / "adapter_model.safetensors")
    series = build(f"{family}_3_g4").initial_parameters(3, "paper")
    expected = {key: (4, len(values)) for key, values in series.items()} | {"domain": (4, 2)}
    assert {key: tuple(value.shape) for key, value in weights.items()} == {
        f"base_model.model.{path}.hf_ortho_act.{key}": shape for path in PATHS for key, shape in expected.items()
    }
    modules = load_activations(str(folder)).modules
    for path in PATHS:
        assert torch.equal(modules[path].domain, weights[f"base_model.model.{path}.hf_ortho_act.domain"])
        assert modules[path].tail_slopes.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ([[-1.0, 1.0], [2.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]], r"domain.* is \[2.0, 1.0\]; expected an interval"),
        ([[-1.0, 1.0], [float("nan"), 1.0], [-1.0, 1.0], [-1.0, 1.0]], r"domain.* is \[nan, 1.0\]"),
        ([[-1.0, 1.0]] * 3, "match none of the families"),
        (None, "match none of the families"),
    ],
)
def test_invalid_domains_of_groups_are_refused(domain, message, saved, tmp_path):
    folder = shutil.copytree(saved["hermite, 4 groups"][0], tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{PATHS[1]}.hf_ortho_act.domain"
    weights |= {key: torch.tensor(domain)} if domain else {}
    save_file({k: v for k, v in weights.items() if domain or k != key}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_activations(str(folder))


def test_norms_are_trained_saved_and_switched_with_the_activations(saved, base, logits, tmp_path):
    folder, expected = saved["hermite, norms"]
    before, plain = logits(base), {name: p.clone() for name, p in base.named_parameters()}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["norms"], config["modules_to_save"]) == (True, NORMS)
    weights = load_file(folder / "adapter_model.safetensors")
    assert {k for k in weights if ".ln_" in k} == {
        f"base_model.model.{path}.{key}" for path in NORMS for key in ("weight", "bias")
    }
    model = PeftModel.from_pretrained(base, folder, adapter_name="one")
    model.add_adapter("two", OrthoConfig(activation="hermite_4", norms=True, task_type=TaskType.CAUSAL_LM))
    assert model.peft_config["two"].modules_to_save == NORMS
    model.set_adapter("two")
    width = base.config.n_embd
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 5 + 5 * 2 * width
    assert (logits(model) - before).abs().max() < 5e-2  # the fits; the norms start as they are
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    merged = model.merge_and_unload(adapter_names=["one"])  # although the other is active
    assert torch.equal(logits(merged), expected)
    moved = [name for name, p in merged.named_parameters() if name in plain and not torch.equal(p, plain[name])]
    assert moved == [f"{path}.{key}" for path in NORMS for key in ("weight", "bias")]


def test_unloading_restores_the_norms(saved, base, logits):
    before = logits(base)
    model = PeftModel.from_pretrained(base, saved["hermite, norms"][0])
    assert torch.equal(logits(model.unload()), before)


def test_a_model_without_norms_is_refused(make_gpt2):
    model = make_gpt2()[0]
    for path in NORMS:
        model.set_submodule(path, torch.nn.Identity())
    with pytest.raises(AdapterError, match="GPT2LMHeadModel has no normalization layers"):
        get_peft_model(model, OrthoConfig(activation="hermite_3", norms=True))
    with pytest.raises(AdapterError, match="norms 'all' of the OrthoConfig: must be True or False"):
        OrthoConfig(norms="all")


def test_the_commit_of_a_base_model_from_the_hub_is_kept(base):
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = Path(HF_HUB_CACHE, "models--tiny--kept")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    base.name_or_path = base.config._name_or_path = "tiny/kept"
    model = get_peft_model(base, OrthoConfig(activation="hermite_3"))
    assert model.peft_config["default"].base_commit == commit
    merged = model.merge_and_unload()
    assert merged.config.hf_ortho["source_model"] == "tiny/kept"
    assert merged.config.hf_ortho["source_revision"] == commit


def test_the_trainers_of_this_package_know_the_activations_of_an_adapter(base):
    hf_ortho.convert(base, "hermite_3")  # so that there are activations beside those of the adapter
    model = get_peft_model(base, OrthoConfig(activation="hermite_4"))
    learned = [base.get_submodule(path).hf_ortho_act["default"] for path in PATHS]
    assert activations_by_path(model) == dict(zip(PATHS, learned, strict=True))
    groups = hf_ortho.param_groups(model, lr=1e-3, weight_decay=0.1, activation_lr=1e-2)
    assert [group["weight_decay"] for group in groups if group["params"]] == [0.0]
    assert [id(p) for group in groups for p in group["params"]] == [id(module.coefficients) for module in learned]


def test_an_adapter_of_twelve_layers_of_degree_8_takes_less_than_2_kb(make_gpt2, tmp_path):
    model = get_peft_model(make_gpt2(n_layer=12)[0], OrthoConfig(activation="hermite_8"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2000


def test_a_loaded_adapter_is_not_fitted(saved, base, monkeypatch):
    monkeypatch.setattr(hf_ortho.activations.LearnableActivation, "fit", None)
    model = PeftModel.from_pretrained(base, saved["fourier"][0])
    assert model.peft_config["default"].report is None


def test_several_adapters_are_switched_disabled_and_deleted(saved, base, logits):
    before = logits(base)
    model = PeftModel.from_pretrained(base, saved["hermite"][0], adapter_name="one")
    model.load_adapter(saved["tropical_rational"][0], "two")
    model.add_adapter("new", OrthoConfig(activation="hermite_6", task_type=TaskType.CAUSAL_LM))
    for name, expected in (("two", saved["tropical_rational"][1]), ("one", saved["hermite"][1])):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.set_adapter("new")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all(".hf_ortho_act.new." in name for name in trained)
    assert (logits(model) - before).abs().max() < 5e-3
    model.set_adapter("two")
    with pytest.warns(UserWarning, match="Setting active adapter to new"):
        model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(logits(model), saved["hermite"][1])
    assert torch.equal(logits(model.unload()), before)


def test_adapters_on_the_transformers_model_itself(base, logits, nudge, tmp_path):
    before = logits(base)
    base.add_adapter(OrthoConfig(activation="hermite_3"), "a")
    first = logits(nudge(base))
    base.add_adapter(OrthoConfig(activation="hermite_4"), "b")
    assert not torch.equal(logits(base), first)
    base.set_adapter("a")
    assert torch.equal(logits(base), first)
    base.disable_adapters()
    assert torch.equal(logits(base), before)
    base.enable_adapters()
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), first)
    report = calibrate(base, [torch.arange(16)[None]])
    assert base.peft_config["a"].report is report
    base.set_adapter("b")
    base.delete_adapter("a")
    assert list(base.peft_config) == ["b"]


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_a_converted_model(kind, saved, base, logits, tmp_path):
    folder, expected = saved[kind]
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged), expected)
    assert merged.config.activation_function == f"{kind.partition(',')[0]}_3" + ("_g4" if "groups" in kind else "")
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert again.state_dict().keys() == merged.state_dict().keys()
    assert hf_ortho.revert(again) == PATHS


def test_a_merged_model_says_where_it_comes_from_as_a_converted_one(saved, gpt2_folder):
    converted, base = (AutoModelForCausalLM.from_pretrained(gpt2_folder) for _ in range(2))
    hf_ortho.convert(converted, "hermite_3")
    merged = PeftModel.from_pretrained(base, saved["hermite"][0]).merge_and_unload()
    assert merged.config.hf_ortho == converted.config.hf_ortho
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in converted.state_dict().items()
    }


def test_merging_in_place_is_undone(saved, base, logits):
    before = logits(base)
    model = PeftModel.from_pretrained(base, saved["hermite"][0], adapter_name="one")
    model.load_adapter(saved["fourier"][0], "two")
    model.merge_adapter()
    assert torch.equal(logits(model), saved["hermite"][1])
    with model.disable_adapter():  # unmerges, as in peft
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), saved["hermite"][1])
    model.merge_adapter()
    with pytest.warns(UserWarning, match="additionally merging"), pytest.raises(AdapterError, match="one, two cannot"):
        model.merge_adapter(["two"])
    with pytest.raises(AdapterError, match="one, two cannot"):
        model.merge_and_unload(adapter_names=["two"])
    model.unmerge_adapter()
    model.set_adapter("two")
    assert torch.equal(logits(model), saved["fourier"][1])


def test_only_one_adapter_can_be_merged(saved, base, logits):
    model = PeftModel.from_pretrained(base, saved["hermite"][0], adapter_name="one")
    model.load_adapter(saved["fourier"][0], "two")
    with pytest.raises(AdapterError, match="adapters one, two cannot be merged: merge exactly one"):
        model.merge_and_unload(adapter_names=["one", "two"])
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(AdapterError, match="one, two are active at once"):
        logits(model)
    assert torch.equal(logits(model.merge_and_unload(adapter_names=["two"])), saved["fourier"][1])


def test_merging_does_not_leave_layers_behind(base):
    model = get_peft_model(base, OrthoConfig(activation="hermite_3", target_modules=["h.1.mlp.act"]))
    with pytest.raises(AdapterError, match=r"does not replace transformer\.h\.0\.mlp\.act"):
        model.merge_and_unload()
    assert isinstance(model.unload().transformer.h[1].mlp.act, type(base.transformer.h[0].mlp.act))


def test_safe_merging_refuses_what_is_not_finite(base):
    model = get_peft_model(base, OrthoConfig(activation="hermite_3"))
    with torch.no_grad():
        base.transformer.h[1].mlp.act.hf_ortho_act["default"].coefficients[0] = torch.nan
    with pytest.raises(AdapterError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    assert all(isinstance(base.get_submodule(path), OrthoLayer) for path in PATHS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["h.1.mlp.act"]}, PATHS[1:]),
        ({"target_modules": r"transformer\.h\.[01]\.mlp\.act"}, PATHS),
        ({"fields": ["activation_function"]}, PATHS),
    ],
)
def test_targets_are_named_as_in_peft(options, expected, base):
    config = OrthoConfig(activation="hermite_3", **options)
    model = get_peft_model(base, config)
    assert [path for path, m in base.named_modules() if isinstance(m, OrthoLayer)] == expected
    assert model.targeted_module_names == expected
    assert config.layers is None  # the caller's config can serve another model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["c_fc"]}, r"selects transformer\.h\.0\.mlp\.c_fc, which is not an activation"),
        ({"target_modules": ["gate"]}, r"\['gate'\].* selects nothing; .* drives transformer\.h\.0\.mlp\.act and 1"),
        ({"target_modules": ".*"}, "which is not an activation"),
        ({"fields": ["hidden_act"]}, "hidden_act: no such activation field"),
    ],
)
def test_other_targets_are_refused_and_the_model_is_untouched(options, message, base, logits):
    before = logits(base)
    with pytest.raises(SiteError, match=message):
        get_peft_model(base, OrthoConfig(activation="hermite_3", **options))
    assert not any(isinstance(module, OrthoLayer) for module in base.modules())
    assert torch.equal(logits(base), before)


def test_groups_that_do_not_divide_the_width_are_refused(base, logits):
    before = logits(base)
    with pytest.raises(WidthError, match=r"^transformer\.h\.0\.mlp\.act has 64 channels.* 24 groups"):
        get_peft_model(base, OrthoConfig(activation="hermite_3_g24"))
    assert not any(isinstance(module, OrthoLayer) for module in base.modules())
    assert torch.equal(logits(base), before)


def test_unknown_activations_are_refused():
    with pytest.raises(ActivationNameError, match="did you mean hermite"):
        OrthoConfig(activation="hermit_8")
    with pytest.raises(ActivationNameError, match="degree '99'"):
        OrthoConfig(activation="hermite_99")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_options_of_a_fit_hold_for_adapters(family, base, tmp_path):
    options = {"derivative_weight": 0.5, "domain": (-3.0, 3.0)}
    model = get_peft_model(base, OrthoConfig(activation=f"{family}_3", **options))
    alone = build(f"{family}_3")
    alone.fit("gelu_new", **options)
    for path in PATHS:
        found = model.get_base_model().get_submodule(path).hf_ortho_act["default"]
        assert all(torch.equal(getattr(found, name), value) for name, value in alone.state_dict().items())
    model.save_pretrained(tmp_path)
    again = OrthoConfig.from_pretrained(tmp_path)
    assert again.options == model.peft_config["default"].options


@pytest.mark.parametrize(
    ("key", "value"), [("derivative_weight", -1.0), ("derivative_weight", "a"), ("domain", [3, -3]), ("domain", 3)]
)
def test_options_out_of_range_are_refused(key, value, saved, tmp_path):
    with pytest.raises(AdapterError, match=key):
        OrthoConfig(**{key: value})
    config = json.loads((saved["hermite"][0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(AdapterError, match=re.escape(f"adapter_config.json it was read from: {key} {value!r}")):
        OrthoConfig.from_pretrained(tmp_path)


def test_a_model_whose_config_drives_no_activation_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(SiteError, match="drives no activation"):
        get_peft_model(model, OrthoConfig())
    assert not any(isinstance(module, OrthoLayer) for module in model.modules())


def test_an_adapter_is_refused_on_other_activations(saved, base, make_gpt2):
    folder, _ = saved["hermite"]
    with pytest.raises(AdapterError, match=r"differ at transformer\.h\.2\.mlp\.act"):
        PeftModel.from_pretrained(make_gpt2(n_layer=3)[0], folder)
    hf_ortho.convert(base, "hermite_3")
    with pytest.raises(AdapterError, match=r"'hermite_3'}, but the adapter was made for .* with .*'gelu_new'"):
        PeftModel.from_pretrained(base, folder)


def test_a_converted_model_takes_a_new_adapter(base, logits, tmp_path, nudge):
    hf_ortho.convert(base, "hermite_3")
    model = nudge(get_peft_model(base, OrthoConfig(activation="hermite_4")))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert merged.config.hf_ortho["source_activations"] == {"activation_function": "gelu_new"}
    assert [layer["source"] for layer in merged.config.hf_ortho["layers"]] == ["gelu_new", "gelu_new"]
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("name", ["hermite_3", "hermite_3_g4"])
def test_calibration_fits_to_the_data_as_a_conversion_does(name, gpt2_folder, ids, logits, tmp_path):
    one, two = (AutoModelForCausalLM.from_pretrained(gpt2_folder) for _ in range(2))
    model = get_peft_model(one, OrthoConfig(activation=name, norms=True))
    parameters = list(model.parameters())
    report = calibrate(model, [ids])
    expected = hf_ortho.convert(two, name, calibration=[ids])
    assert [layer.fit for layer in report.layers] == [layer.fit for layer in expected.layers]
    assert torch.equal(logits(model), logits(two))
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert report.modules[PATHS[0]][0] is one.transformer.h[0].mlp.act.hf_ortho_act["default"]
    assert "3-" not in str(report)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2_folder), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.peft_config["default"].calibrated
    assert model.merge_and_unload().config.hf_ortho == two.config.hf_ortho


def fisher(model, path, ids, draws):
    """The squared derivatives of log p(y | x) by the outputs of an activation, summed over the outputs and averaged
    over the predictions and over draws of y from p: the importance of all inputs of the activation together."""
    outputs = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, y: outputs.append(y))
    scores = model(ids).logits.log_softmax(-1).flatten(0, 1)
    handle.remove()
    drawn = torch.multinomial(scores.exp(), draws, True, generator=torch.Generator().manual_seed(3))
    total = 0.0
    for y in drawn.T:
        (gradient,) = torch.autograd.grad(scores.gather(1, y[:, None]).sum(), outputs[0], retain_graph=True)
        total += gradient.double().square().sum().item()
    return total / draws / len(scores)


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "add_adapter"])
def test_calibration_weights_by_the_effect_on_the_predictions(wrapped, base, gpt2_folder, ids):
    """As the library does for a conversion, and nothing but the activations of the adapter changes."""
    model = get_peft_model(base, OrthoConfig(activation="hermite_3")) if wrapped else base
    if not wrapped:
        base.add_adapter(OrthoConfig(activation="hermite_3"))
    model(ids, labels=ids).loss.backward()
    odd = next(p for p in model.parameters() if not p.requires_grad)
    odd.requires_grad_(True)  # as a trained bias beside the adapter
    odd.grad = torch.ones_like(odd)
    before = {k: (p, p.requires_grad, p.grad, p.detach().clone()) for k, p in model.named_parameters()}
    gradients = {k: g.clone() for k, (_, _, g, _) in before.items() if g is not None}
    assert {".act." in k for k in gradients} == {True, False}
    batches = [ids.roll(i, 1) for i in range(8)]
    with torch.inference_mode():
        report = calibrate(model, [batch.clone() for batch in batches])
    assert report.weights == "fisher"
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for key, (parameter, flag, gradient, value) in before.items():
        assert after[key] is parameter
        assert (parameter.requires_grad, parameter.grad is gradient) == (flag, True)
        assert gradient is None or torch.equal(gradient, gradients[key])
        assert torch.equal(parameter, value) == (".act." not in key)
    source = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    for path in PATHS:
        found = report.modules[path][2].importance.sum()
        # One draw per prediction in the calibration: 256 predictions, whose sums of squares vary by about their size.
        assert found == pytest.approx(np.mean([fisher(source, path, b, 50) for b in batches]), rel=0.25)


def test_calibration_needs_an_adapter_and_batches(base, logits):
    with pytest.raises(AdapterError, match="GPT2LMHeadModel has no active OrthoConfig adapter; it has: none"):
        calibrate(base, [torch.arange(4)[None]])
    model = get_peft_model(base, OrthoConfig(activation="hermite_3"))
    before = logits(model)
    with pytest.raises(AdapterError, match=r"'other' is not an OrthoConfig adapter .* has: default"):
        calibrate(model, [torch.arange(4)[None]], "other")
    with pytest.raises(CalibrationError, match="empty"):
        calibrate(model, [])
    assert torch.equal(logits(model), before)


def test_a_new_adapter_is_not_made_on_the_meta_device(base):
    with pytest.raises(AdapterError, match="low_cpu_mem_usage works only for a saved"):
        get_peft_model(base, OrthoConfig(), low_cpu_mem_usage=True)


def test_a_head_is_trained_and_saved_beside(gpt2_folder, tmp_path, ids, nudge, logits):
    def classifier():
        torch.manual_seed(0)
        return GPT2ForSequenceClassification.from_pretrained(gpt2_folder, num_labels=3, pad_token_id=0)

    config = OrthoConfig(activation="hermite_3", task_type=TaskType.SEQ_CLS, modules_to_save=["score"])
    model = nudge(get_peft_model(classifier(), config))
    assert any(p.requires_grad for p in model.get_base_model().score.parameters())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(classifier(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole = GPT2ForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(whole), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_stay_float32_in_a_model_of_low_precision(dtype, gpt2_folder, saved, logits):
    folder, _ = saved["hermite"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=dtype), folder)
    learned = model.get_base_model().transformer.h[0].mlp.act.hf_ortho_act["default"]
    weights = load_file(folder / "adapter_model.safetensors")
    assert torch.equal(learned.coefficients, weights[f"base_model.model.{PATHS[0]}.hf_ortho_act.coefficients"])
    expected = logits(model)
    assert expected.dtype == dtype
    model.to(dtype)
    assert {learned.coefficients.dtype, learned.domain.dtype, learned.tail_slopes.dtype} == {torch.float32}
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_checkpointed_and_plain_gradients_agree_with_finite_differences(base, ids):
    model = get_peft_model(base, OrthoConfig(activation="hermite_3"))
    learned = base.transformer.h[0].mlp.act.hf_ortho_act["default"].coefficients

    def gradient():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return learned.grad.clone()

    plain = gradient()
    base.train()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    base.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.allclose(gradient(), plain, rtol=1e-5, atol=1e-9)
    base.activation_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()
    assert torch.allclose(gradient(), plain, rtol=1e-5, atol=1e-9)
    base.activation_checkpointing_disable()
    model.double().eval()

    @torch.no_grad()
    def loss(k, change):
        learned[k] += change
        found = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        learned[k] -= change
        return found.item()

    slopes = [(loss(k, 1e-5) - loss(k, -1e-5)) / 2e-5 for k in range(4)]
    np.testing.assert_allclose(plain.numpy(), slopes, rtol=1e-3, atol=1e-6)


def make_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=32, **sizes)).eval()


@pytest.mark.parametrize("kind", ["convnext", "llama"])
def test_other_architectures(kind, make_convnext, tmp_path, nudge, ids):
    def make():
        return make_convnext()[0].eval() if kind == "convnext" else make_llama()

    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) if kind == "convnext" else ids
    model = nudge(get_peft_model(make(), OrthoConfig(activation="hermite_6"))).eval()
    with torch.no_grad():
        expected = model(x).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(make(), tmp_path / "adapter")
        assert torch.equal(again(x).logits, expected)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = type(make()).from_pretrained(tmp_path / "merged")
        assert torch.equal(merged(x).logits, expected)


def test_mixed_models_of_peft_name_what_they_take(base):
    with pytest.raises(ValueError, match="'HF_ORTHO' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base, OrthoConfig(), mixed=True)


def test_lora_and_activations_as_two_adapters_of_one_model(base, logits, nudge, tmp_path):
    before = logits(base)
    base.add_adapter(LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), "low_rank")
    base.add_adapter(OrthoConfig(activation="hermite_3"), "shape")
    base.set_adapter(["low_rank", "shape"])
    trained = {name.split(".")[-3] for name, p in nudge(base).named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "hf_ortho_act"}
    both = logits(base)
    base.set_adapter("shape")
    shape = logits(base)
    assert not torch.equal(both, shape)
    base.disable_adapters()
    assert torch.equal(logits(base), before)


def test_a_quantized_model_takes_an_adapter(logits, ids, nudge, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")

    def make():
        model = make_llama()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    base = make()
    before = logits(base)
    model = get_peft_model(base, OrthoConfig(activation="hermite_8"))
    assert (logits(model) - before).abs().max() < 1e-2 * before.abs().max()
    model(ids, labels=ids).loss.backward()
    learned = base.model.layers[0].mlp.act_fn.hf_ortho_act["default"].coefficients
    assert learned.grad.abs().sum() > 0
    expected = logits(nudge(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), expected)
    assert torch.equal(logits(model.unload()), before)
