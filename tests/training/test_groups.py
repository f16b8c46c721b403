import copy
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_ortho
from hf_ortho.activations import FAMILIES
from hf_ortho.errors import ConfigError
from hf_ortho.peft import OrthoConfig
from hf_ortho.training import ActivationTrainer, LoraArguments, OptimizerArguments, add_lora
from hf_ortho.training.groups import group_counts, parse_groups
from hf_ortho.training.paths import parameter_names

SLOW = {"pattern": "wte|wpe", "learning_rate": 0.001}
FIRST = {"pattern": r"h\.0\.", "learning_rate": 0.002, "weight_decay": 0.3}
REST = {"pattern": "mlp", "weight_decay": 0.5}


@pytest.fixture
def model(make_gpt2):
    model = make_gpt2()[0]
    hf_ortho.convert(model, "hermite_3")
    return model


def arguments(folder, **options):
    defaults = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=folder, **(defaults | options))


def by_hand(name):
    """(learning rate, weight decay) with ``SLOW``, ``FIRST`` and ``REST``, and 0.01 and 0.1, activations at 0.03."""
    learned = ".act." in name
    decay = 0.1 if name.endswith("weight") and "ln_" not in name else 0.0
    if "wte" in name or "wpe" in name:
        return 0.001, decay
    if "h.0." in name:
        return 0.002, 0.3
    return 0.03 if learned else 0.01, 0.5 if "mlp" in name else decay


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop", "adagrad"])
def test_steps_are_those_of_an_optimizer_made_by_hand(model, tmp_path, optim):
    """In float64, with a schedule that halves all learning rates after the first of two steps."""
    model.double()
    other = copy.deepcopy(model)
    options = {"optim": optim, "learning_rate": 0.01, "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    chosen = OptimizerArguments(activation_learning_rate=0.03, param_groups=[SLOW, FIRST, REST])
    trainer = ActivationTrainer(model=model, args=arguments(tmp_path, **options), optimizer_arguments=chosen)
    trainer.create_optimizer_and_scheduler(2)
    cls = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}.get(
        optim, torch.optim.Adagrad
    )
    trained = {name: p for name, p in other.named_parameters() if p.requires_grad}
    values = {name: by_hand(name) for name in trained}
    assert len(set(values.values())) == 6
    expected = cls(
        [{"params": [p], "lr": values[name][0], "weight_decay": values[name][1]} for name, p in trained.items()]
    )
    assert type(trainer.optimizer) is type(expected)
    generator = torch.Generator().manual_seed(0)
    for factor in (1.0, 0.5):
        for group, (rate, _) in zip(expected.param_groups, values.values(), strict=True):
            group["lr"] = factor * rate
        for name, parameter in trained.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            model.get_parameter(name).grad = parameter.grad.clone()
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        expected.step()
    found = dict(model.named_parameters())
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-14, atol=1e-15, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_of_each_family_may_decay(make_gpt2, family, caplog):
    """Asked for by name, which is why Accelerate then prints no note."""
    from accelerate import Accelerator

    model = make_gpt2()[0]
    hf_ortho.convert(model, f"{family}_3")
    decayed = {"pattern": r"\.act\.", "weight_decay": 0.2}
    groups = hf_ortho.param_groups(model, lr=0.1, weight_decay=0.1, activation_lr=0.3, groups=[decayed])
    ((group),) = [group for group in groups if "pattern" in group]
    assert (group["lr"], group["weight_decay"], group["pattern"]) == (0.3, 0.2, r"\.act\.")
    learned = [p for n, p in model.named_parameters() if ".act." in n and p.requires_grad]
    assert {id(p) for p in group["params"]} == {id(p) for p in learned}
    Accelerator(cpu=True).prepare(model, torch.optim.SGD(groups))
    assert "decays learnable activations" not in caplog.text


def test_a_tied_parameter_has_all_its_names(model):
    (group,) = hf_ortho.param_groups(model, lr=0.1, groups=[{"pattern": "^lm_head", "learning_rate": 0.2}])[-1:]
    assert (group["lr"], group["params"]) == (0.2, [model.transformer.wte.weight])


@pytest.mark.parametrize(
    "wrapper", ["plain", "compiled", "blocks compiled", "module", "lora", "lora compiled", "ortho"]
)
def test_names_are_those_of_the_plain_model(make_gpt2, model, wrapper):
    plain = {name for name, p in model.named_parameters() if p.requires_grad}
    if wrapper == "ortho":
        model = get_peft_model(make_gpt2()[0], OrthoConfig(activation="hermite_3"))
        plain = {name for name in plain if ".act." in name}
    if wrapper.startswith("lora"):
        model = add_lora(model, LoraArguments(), seed=0, policy="lora+activations")
        layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        plain = {name for name in plain if ".act." in name} | {
            f"transformer.h.{i}.{layer}.lora_{part}.weight" for i in range(2) for layer in layers for part in "AB"
        }
    if wrapper == "blocks compiled":
        model.transformer.h[0] = torch.compile(model.transformer.h[0], backend="eager")
        model.transformer.h[1].mlp.act = torch.compile(model.transformer.h[1].mlp.act, backend="eager")
    elif wrapper.endswith("compiled"):
        model = torch.compile(model, backend="eager")
    elif wrapper == "module":
        model = nn.DataParallel(model)
    found = parameter_names(model)
    trained = [found[id(p)][0] for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(plain)
    assert set(trained) == plain
    entries = [{"pattern": f"^{re.escape(name)}$", "learning_rate": 0.01 + i / 1000} for i, name in enumerate(trained)]
    groups = hf_ortho.param_groups(model, lr=1.0, groups=entries)
    assert sorted(group["lr"] for group in groups) == [entry["learning_rate"] for entry in entries]


def test_the_parameters_of_a_wrapper_have_its_names(make_gpt2):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(make_gpt2()[0], config)
    (group,) = hf_ortho.param_groups(model, lr=0.1, groups=[{"pattern": "prompt_encoder", "learning_rate": 0.2}])
    assert group["lr"] == 0.2


def test_each_group_is_counted(model, tmp_path, caplog):
    chosen = OptimizerArguments(activation_learning_rate=0.03, param_groups=[SLOW])
    args = arguments(tmp_path, learning_rate=0.01, weight_decay=0.1)
    with caplog.at_level("INFO", "hf_ortho"):
        ActivationTrainer(model=model, args=args, optimizer_arguments=chosen).create_optimizer()
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    embeddings = sizes["transformer.wte.weight"] + sizes["transformer.wpe.weight"]
    matrices = sum(n for name, n in sizes.items() if name.endswith("weight") and "ln_" not in name) - embeddings
    vectors = sum(sizes.values()) - embeddings - matrices - 8
    assert caplog.messages == [
        f"Parameter groups: others: {matrices:,} (learning rate 0.01, weight decay 0.1); "
        f"others: {vectors:,} (learning rate 0.01, weight decay 0); "
        "activations: 8 (learning rate 0.03, weight decay 0); "
        f"'wte|wpe': {embeddings:,} (learning rate 0.001, weight decay 0.1)"
    ]


def test_groups_of_the_same_values_are_counted_as_one(model):
    """Without weight decay, that of norms and biases has those of the matrices."""
    groups = hf_ortho.param_groups(model, lr=0.01, activation_lr=0.03)
    assert [group["weight_decay"] for group in groups] == [0, 0, 0]
    others = sum(p.numel() for name, p in model.named_parameters() if ".act." not in name)
    assert group_counts(model, groups) == (
        f"Parameter groups: others: {others:,} (learning rate 0.01, weight decay 0); "
        "activations: 8 (learning rate 0.03, weight decay 0)"
    )


def test_the_learning_rate_of_an_entry_has_precedence(model):
    """Over that of activations; a weight decay alone leaves it."""
    entries = [{"pattern": r"h\.0\..*act", "learning_rate": 0.2}, {"pattern": "act", "weight_decay": 0.5}]
    groups = hf_ortho.param_groups(model, lr=0.1, activation_lr=0.3, groups=entries)[-2:]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.2, 0.0), (0.3, 0.5)]


def test_the_example_of_the_guide(make_gpt2):
    text = (Path(__file__).parents[2] / "recipes" / "training.md").read_text()
    (example,) = (block for block in re.findall("```yaml\n(.*?)```", text, re.DOTALL) if "param_groups" in block)
    model = make_gpt2(n_layer=12)[0]
    hf_ortho.convert(model, "hermite_3")
    groups = hf_ortho.param_groups(model, lr=1e-4, groups=yaml.safe_load(example)["param_groups"])
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[2]) if ".h." in name else 12 if "ln_f" in name else 0
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-3 if ".act." in name else 1e-5 if layer < 6 else 1e-4), name


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "param_groups 3: must be a list, such as [{pattern: embed, learning_rate: 1e-4}]"),
        ({"pattern": "wte"}, "must be a list"),
        ("[{", "param_groups '[{' is not YAML; give a list"),
        ("wte", "param_groups 'wte': must be a list"),
        ([7], "param_groups, entry 1: 7 must be a mapping of pattern, learning_rate, weight_decay"),
        ([SLOW, {}], "param_groups, entry 2: pattern None must be a regular expression"),
        ([{"learning_rate": 1}], "pattern None must be"),
        ([{"pattern": "", "learning_rate": 1}], "pattern '' must be"),
        ([{"pattern": 3, "learning_rate": 1}], "pattern 3 must be"),
        ([{"pattern": "("}], "pattern '(' is not a regular expression: missing ), unterminated subpattern"),
        ([{"pattern": "*.wte", "learning_rate": 1}], "any text is .* in a regular expression"),
        ([{"pattern": "wte"}], "entry 1: 'wte' sets nothing; give learning_rate, weight_decay or both"),
        ([{"pattern": "wte", "lr": 1}], "unknown key 'lr'; the keys are pattern, learning_rate, weight_decay"),
        ([{"pattern": "wte", "weight_decy": 1}], "unknown key 'weight_decy'; did you mean weight_decay?"),
        ([{"pattern": "wte", "learning_rate": "fast"}], "learning_rate 'fast' must be a finite number and at least 0"),
        ([{"pattern": "wte", "learning_rate": True}], "learning_rate True must be"),
        ([{"pattern": "wte", "learning_rate": [1]}], "learning_rate [1] must be"),
        ([{"pattern": "wte", "learning_rate": -1}], "learning_rate -1 must be"),
        ([{"pattern": "wte", "learning_rate": 10**400}], "must be a finite number"),
        ([{"pattern": "wte", "weight_decay": float("nan")}], "weight_decay nan must be"),
        ([{"pattern": "wte", "weight_decay": ".inf"}], "weight_decay '.inf' must be"),
    ],
)
def test_entries_are_checked(value, message):
    for check in (parse_groups, lambda value: OptimizerArguments(param_groups=value)):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check(value)


@pytest.mark.parametrize(
    "text", ["[{pattern: wte, learning_rate: 1e-4}]", '[{"pattern": "wte", "learning_rate": 1e-04}]']
)
def test_yaml_reads_some_numbers_as_text(text):
    assert parse_groups(text) == [{"pattern": "wte", "learning_rate": 1e-4}]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            ["coeficients"],
            "pattern 'coeficients' matches no parameter; the closest are transformer.h.*.mlp.act.coefficients, ",
        ),
        (["^wte"], "pattern '^wte' matches no parameter; the closest are transformer.wte.weight, "),
        (
            ["wpe", "wte|wpe", "wte"],
            "pattern 'wte' only matches parameters of earlier entries, such as transformer.wte",
        ),
        (
            ["wte", "lm_head"],
            "pattern 'lm_head' only matches parameters of earlier entries, such as lm_head.weight (tied to "
            "transformer.wte.weight)",
        ),
        (["domain"], "pattern 'domain' only matches frozen parameters, such as transformer.h.0.mlp.act.domain"),
    ],
)
def test_an_entry_without_parameters_is_a_mistake(model, entries, message):
    groups = [{"pattern": pattern, "learning_rate": 0.1} for pattern in entries]
    with pytest.raises(ConfigError, match=re.escape(f"param_groups: {message}")):
        hf_ortho.param_groups(model, lr=0.1, groups=groups)
    with pytest.raises(ConfigError, match=re.escape(message)):
        hf_ortho.optimizer_cls_and_kwargs("sgd", lr=0.1, groups=groups)[0]()(model)


def test_the_factory_checks_entries_at_once():
    with pytest.raises(ConfigError, match="sets nothing"):
        hf_ortho.optimizer_cls_and_kwargs(lr=0.1, groups=[{"pattern": "wte"}])


def test_an_optimizer_with_groups_of_its_own_refuses(model, tmp_path, monkeypatch):
    def galore(args, model):
        return torch.optim.SGD, {"lr": 0.1, "params": list(model.parameters())}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(galore))
    chosen = OptimizerArguments(param_groups=[SLOW])
    trainer = ActivationTrainer(model=model, args=arguments(tmp_path), optimizer_arguments=chosen)
    with pytest.raises(ConfigError, match="creates its own parameter groups, so param_groups cannot be set"):
        trainer.create_optimizer()


def test_the_optimizer_of_a_deepspeed_config_refuses(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    pytest.importorskip("deepspeed")
    config = {"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 1}}
    (tmp_path / "ds.json").write_text(json.dumps(config | {"train_micro_batch_size_per_gpu": "auto"}))
    flags = ["--model", gpt2_folder, "--dataset", text_file, "--deepspeed", tmp_path / "ds.json"]
    flags += ["--param-groups", "[{pattern: wte, learning_rate: 0.1}]", "--output-dir", tmp_path / "out"]
    ran = hf_ortho_command("finetune", *flags, "--use-cpu", True)
    assert "param_groups: cannot be set with an optimizer in the DeepSpeed config" in ran.error
    assert not (tmp_path / "out").exists()


# ---- recipes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def finetune(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    """``finetune("flag", ..., key=value)``: a short training from a YAML file in the folder ``out``."""

    def run(*flags, **entries):
        defaults = {"model": str(gpt2_folder), "dataset": str(text_file), "activation": "hermite_3"}
        defaults |= {"calibration_samples": 0, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}
        defaults |= {
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(defaults | entries))
        return hf_ortho_command("finetune", "--config", tmp_path / "recipe.yaml", *flags)

    return run


@pytest.mark.slow
def test_a_training_its_record_its_card_and_its_resumption(finetune, tmp_path):
    frozen = {"pattern": "wte|wpe", "learning_rate": 0}
    ran = finetune(param_groups=[frozen], max_steps=1)
    assert ran.code == 0, ran.err
    assert "Parameter groups: " in ran.out
    assert ran.out.count("'wte|wpe': ") == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert '\n- param_groups: \\[{"pattern": "wte\\|wpe", "learning_rate": 0.0}\\]\n' in card
    record = json.loads((tmp_path / "out" / "checkpoint-1" / "training_recipe.json").read_text())
    assert record["param_groups"] == [{"pattern": "wte|wpe", "learning_rate": 0.0}]

    flag = "[{pattern: wte, learning_rate: 0}]"
    ran = finetune("--resume-from-checkpoint", "true", "--param-groups", flag)
    assert "saved with param_groups [{'pattern': 'wte|wpe', 'learning_rate': 0.0}], not [{'pattern': 'wte'" in ran.error
    assert "saved with param_groups" in finetune("--resume-from-checkpoint", "true").error
    ran = finetune("--resume-from-checkpoint", "true", param_groups=[frozen])
    assert ran.code == 0, ran.err
    before, after = (load_file(tmp_path / "out" / place / "model.safetensors") for place in ("checkpoint-1", "."))
    fixed = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in fixed if "act." not in name} == {"transformer.wte.weight", "transformer.wpe.weight"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"param_groups": [{"pattern": "embed", "learning_rate": 0.1}]}, "'embed' matches no parameter; the closest"),
        ({"param_groups": [{"pattern": "wte", "learning_rate": 0.1}], "train": "activations"}, "only matches frozen"),
        ({"param_groups": 3}, "param_groups 3: must be a list"),
        ({"param_groups": [{"pattern": "wte", "learning_rate": float("inf")}]}, "must be a finite number"),
        ({"param_groups": [{"pattern": "wte", "learning_rates": 1}]}, "did you mean learning_rate?"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence_and_nothing_is_written(finetune, tmp_path, entries, message):
    assert message in finetune(**entries).error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("entries", [None, []])
def test_no_entries_are_no_groups(finetune, entries):
    ran = finetune(param_groups=entries)
    assert ran.code == 0, ran.err
    assert "Parameter groups" not in ran.out
