"""Activations read from a saved checkpoint, against those of the loaded model."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

import hf_ortho
from hf_ortho.activations import FAMILIES, build
from hf_ortho.checkpoints import weights
from hf_ortho.checkpoints.activations import load_activations
from hf_ortho.checkpoints.provenance import Provenance
from hf_ortho.errors import CheckpointError


@pytest.fixture
def saved(tmp_path, gpt2):
    """``saved("hermite_8")``: the converted model and its folder."""

    def saved(activation, **options):
        model = gpt2(n_layer=3)
        hf_ortho.convert(model, activation)
        model.save_pretrained(tmp_path / "model", **options)
        return model, tmp_path / "model"

    return saved


@pytest.fixture
def scratch_tensors():
    """The tensors of a model that has one activation and nothing else."""
    return {f"h.0.act.{key}": value for key, value in build("hermite_2").state_dict().items()}


def rewrite(folder, change):
    """Change the dictionary of tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def equal(found, model):
    expected = {n: m for n, m in model.named_modules() if isinstance(m, hf_ortho.activations.LearnableActivation)}
    assert list(found) == list(expected)
    for path, module in found.items():
        assert type(module) is type(expected[path])
        assert module.degree == expected[path].degree
        for key, value in expected[path].state_dict().items():
            assert torch.equal(module.state_dict()[key], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_s_own(saved, family):
    model, folder = saved(f"{family}_5")
    found = load_activations(str(folder))
    equal(found.modules, model)
    assert found.provenance.to_dict() == model.config.hf_ortho
    assert found.commit is None


@pytest.mark.parametrize("family", FAMILIES)
def test_from_scratch(tmp_path, gpt2, family):
    model = gpt2(activation_function=family)
    model.save_pretrained(tmp_path)
    found = load_activations(str(tmp_path))
    equal(found.modules, model)
    assert found.provenance == Provenance()


def test_only_shards_with_activations_are_opened(saved, monkeypatch):
    model, folder = saved("hermite_3", max_shard_size="10KB")
    opened = []
    real = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", lambda file, *rest: opened.append(file) or real(file, *rest))
    equal(load_activations(str(folder)).modules, model)
    assert 0 < len(set(opened)) < len(list(folder.glob("model-*.safetensors")))


def test_layers_are_in_natural_order(tmp_path, gpt2):
    model = gpt2(n_layer=11, activation_function="tropical_2")
    model.save_pretrained(tmp_path)
    assert [path.split(".")[2] for path in load_activations(str(tmp_path)).modules] == [str(i) for i in range(11)]


def test_any_path_of_a_module(saved):
    _, folder = saved("hermite_2")
    configure(folder, hf_ortho={})
    before = load_file(folder / "model.safetensors")
    for part in ("²", "9" * 5000, "٣", "", "\x1b[31m", "x." * 3000):
        save_file(
            {key.replace(".1.", f".{part}."): value for key, value in before.items()}, folder / "model.safetensors"
        )
        paths = list(load_activations(str(folder)).modules)
        assert sorted(paths) == sorted(f"transformer.h.{i}.mlp.act" for i in (0, part, 2))
        assert paths.index("transformer.h.0.mlp.act") < paths.index("transformer.h.2.mlp.act")


def test_some_of_the_activations(saved, monkeypatch):
    model, folder = saved("hermite_2")
    read, real = [], weights.tensors
    monkeypatch.setattr(weights, "tensors", lambda file, keys: read.extend(keys) or real(file, keys))
    found = load_activations(str(folder), most=2)
    assert list(found.modules) == ["transformer.h.0.mlp.act", "transformer.h.2.mlp.act"]
    assert (found.left_out, len(read)) == (1, 6)
    assert torch.equal(found.modules["transformer.h.2.mlp.act"].domain, model.transformer.h[2].mlp.act.domain)


def test_two_families_with_equal_shapes_are_told_apart_by_their_field(saved):
    _, folder = saved("hermite_4")
    fields = {f"transformer.h.{i}.mlp.act": "other.act" if i == 1 else "activation_function" for i in range(3)}
    layers = [{"module": module, "field": field} for module, field in fields.items()]
    configure(folder, other={"act": "gated-tropical_4"}, hf_ortho={"layers": layers})
    assert [m.name for m in load_activations(str(folder)).modules.values()] == ["hermite_4", "tropical_4", "hermite_4"]
    configure(folder, hf_ortho={})
    with pytest.raises(CheckpointError, match=r"h\.0\.mlp\.act of .* match hermite_4 or tropical_4: the config"):
        load_activations(str(folder))


def test_without_a_name_in_the_config_the_shapes_decide(saved):
    model, folder = saved("fourier_5")
    configure(folder, activation_function="gelu")
    equal(load_activations(str(folder)).modules, model)


def test_tensors_of_no_family(saved):
    _, folder = saved("hermite_4")
    rewrite(folder, lambda tensors: tensors.update({"transformer.h.1.mlp.act.more": torch.zeros(2)}))
    with pytest.raises(
        CheckpointError, match=r"h\.1\.mlp\.act of .*more \[2\].* none of the families hermite, fourier"
    ):
        load_activations(str(folder))


def test_a_foreign_module_with_a_domain_is_none(saved):
    model, folder = saved("hermite_4")
    rewrite(folder, lambda tensors: tensors.update({"transformer.box.domain": torch.zeros(2)}))
    equal(load_activations(str(folder)).modules, model)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "has neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 50), CheckpointError, "is damaged or truncated"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "config.json cannot be read"),
        (lambda f: (f / "config.json").unlink(), CheckpointError, "is not a checkpoint"),
        (
            lambda f: rewrite(f, lambda t: [t.pop(k) for k in list(t) if ".act." in k]),
            CheckpointError,
            "is incomplete: its weights lack transformer.h.0.mlp.act.domain",
        ),
    ],
    ids=["weights", "bytes", "json", "config", "activations"],
)
def test_refuses(saved, spoil, error, message):
    _, folder = saved("hermite_2")
    spoil(folder)
    with pytest.raises(error, match=message):
        load_activations(str(folder))


@pytest.mark.parametrize(
    "spoiled",
    [
        {"layers": 3},
        {"layers": [{}]},
        {"layers": ["x"]},
        {"layers": [{"module": ["x"]}]},
        {"layers": [{"module": "x", "source": ["x"]}]},
        {"layers": [{"module": "x", "field": 1}]},
        {"layers": [{"module": "x", "domain": 3}]},
        {"layers": [{"module": "x", "domain": [1, "y"]}]},
        {"layers": [{"module": "x", "domain": [1, 2, 3]}]},
        {"layers": [{"module": "x", "domain": [1, math.nan]}]},
        {"layers": [{"module": "x", "tail_slopes": [0, None]}]},
        {"layers": [{"module": "x", "sup_error": math.inf}]},
        {"layers": [{"module": "x", "mass_outside": True}]},
        {"activation": 3},
        {"calibrated": "yes"},
        {"tails": 1},
        {"versions": {"torch": 2.13}},
        {"source_model": ["x"]},
        {"source_activations": ["a"]},
        {"source_activations": {"a": ["b"]}},
    ],
    ids=str,
)
def test_a_spoiled_provenance(spoiled, tmp_path, scratch_tensors):
    (tmp_path / "config.json").write_text(json.dumps({"activation_function": "hermite_2", "hf_ortho": spoiled}))
    save_file(scratch_tensors, tmp_path / "model.safetensors")
    (key,) = spoiled
    with pytest.raises(CheckpointError, match=rf"hf_ortho in the config of .*: {key}(\[0\])?( is|: \w+ is) ") as caught:
        load_activations(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        ["a"],
        {},
        {"act.domain": 3},
        {"act.domain": "weights.bin"},
        {"act.domain": "../x.safetensors"},
        {"act.domain": f"{'9' * 300}.safetensors"},
    ],
    ids=ascii,
)
def test_an_index_of_other_files(tmp_path, weight_map):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"index.json.*weight_map .*; expected "):
        load_activations(str(tmp_path))


def test_a_provenance_that_is_not_a_dictionary(tmp_path, scratch_tensors):
    (tmp_path / "config.json").write_text(json.dumps({"activation_function": "hermite_2", "hf_ortho": "yes"}))
    save_file(scratch_tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is 'yes'; expected a dictionary"):
        load_activations(str(tmp_path))


def test_a_conversion_refuses_a_spoiled_provenance_and_leaves_the_model_as_it_is(gpt2):
    model = gpt2()
    model.config.hf_ortho = {"layers": [{"module": 3}]}
    before = model.config.to_dict()
    with pytest.raises(CheckpointError, match=r"in the config of \w+: layers\[0\]: module is 3; expected text"):
        hf_ortho.convert(model, "hermite_3")
    assert model.config.to_dict() == before
    assert not any(isinstance(module, hf_ortho.activations.LearnableActivation) for module in model.modules())


@pytest.mark.parametrize("nothing", [{}, {"layers": None, "source_activations": None}], ids=str)
def test_a_provenance_that_says_nothing(nothing, tmp_path, scratch_tensors):
    (tmp_path / "config.json").write_text(json.dumps({"activation_function": "hermite_2", "hf_ortho": nothing}))
    save_file(scratch_tensors, tmp_path / "model.safetensors")
    stored = load_activations(str(tmp_path))
    assert stored.provenance.source_names(stored.modules) == {"h.0.act": None}


def test_source_names():
    fields = {"act": "gelu", "vision.act": "gated-silu"}
    layers = [{"module": "a", "field": "act", "source": "gelu_new"}, {"module": "b", "field": "vision.act"}]
    found = Provenance.from_dict({"source_activations": fields, "layers": layers}, "here")
    assert found.source_names(["a", "b", "c"]) == {"a": "gelu_new", "b": "silu", "c": None}
    assert Provenance(source_activations={"act": "gelu"}).source_names(["a"]) == {"a": "gelu"}
    assert Provenance().source_names(["a"]) == {"a": None}


@pytest.mark.parametrize(
    ("plain", "tails"),
    [({}, True), ({"init": "gelu"}, True), ({"init": "paper"}, False), ({"init": "unit", "tails": True}, True)],
    ids=str,
)
def test_a_series_that_was_not_fitted_has_no_tails_unless_it_is_said(plain, tails):
    assert Provenance.from_dict(plain, "here").has_tails is tails


def test_the_domain_of_a_fit_without_tails():
    layers = [{"module": "a", "domain": [-2.0, 3.0]}, {"module": "b", "domain": [None, None]}]
    pure = Provenance.from_dict({"tails": False, "layers": layers}, "here")
    assert [pure.pure_domain(module) for module in "abc"] == [(-2.0, 3.0), None, None]
    assert Provenance.from_dict({"layers": layers}, "here").pure_domain("a") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_measure_gives_what_a_fit_without_data_reports(family):
    module = build(f"{family}_4")
    report = module.fit("silu")
    found = module.measure("silu")
    assert (found.sup_error, found.rms_error) == (report.sup_error, report.rms_error)
    x = np.linspace(-12, 12, 4801)
    with torch.no_grad():
        t = torch.from_numpy(x)
        sup = (module(t) - ACT2FN["silu"](t)).abs().max().item()
    assert found.sup_error == pytest.approx(sup, rel=0.02)
