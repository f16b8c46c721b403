import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, set_seed

from hf_ortho.activations import FAMILIES, LearnableActivation, build
from hf_ortho.errors import CheckpointError, ConfigError, HfOrthoError, WidthError
from hf_ortho.tasks.tokenizer import bpe_tokenizer, byte_tokenizer
from hf_ortho.training import DataArguments, ModelArguments
from hf_ortho.training.scratch import scratch_checkpoint

SIZES = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32}


def gpt2(seed=0, dataset=None, **options):
    defaults = {"init": "scratch", "model_type": "gpt2", "config_overrides": SIZES, "tokenizer": "bytes"}
    arguments = ModelArguments(**(defaults | options))
    return scratch_checkpoint(arguments, DataArguments(dataset=dataset), seed)


def activations(model):
    return [module for module in model.modules() if isinstance(module, LearnableActivation)]


def others(model):
    return {name: p for name, p in model.named_parameters() if ".act." not in name}


@pytest.mark.slow
@pytest.mark.parametrize("init", ["paper", "unit", "gelu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_draws_the_weights_whatever_the_activation(family, init):
    checkpoint, _ = gpt2(seed=3, activation=f"{family}_3", activation_init=init)
    set_seed(3)
    expected = GPT2LMHeadModel(GPT2Config(**SIZES, vocab_size=257))
    assert len(activations(checkpoint.model)) == 2
    assert checkpoint.model.config.activation_function == f"{family}_3"
    found = others(checkpoint.model)
    assert found.keys() == {name for name, _ in expected.named_parameters()}
    assert all(torch.equal(found[name], p) for name, p in expected.named_parameters())


@pytest.mark.parametrize("init", ["paper", "unit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_initializations_by_name(family, init):
    checkpoint, report = gpt2(activation=f"{family}_4", activation_init=init)
    assert report is None
    for module in activations(checkpoint.model):
        assert all(torch.equal(module.state_dict()[k], v) for k, v in build(f"{family}_4", init).state_dict().items())
        if init == "unit":
            assert module.gain()[0] == pytest.approx(1.0, abs=1e-5)
    assert checkpoint.model.config.hf_ortho == {"activation": f"{family}_4", "init": init}


@pytest.mark.parametrize(
    ("source", "function"), [("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu)]
)
def test_a_fit_as_initialization(source, function):
    checkpoint, report = gpt2(activation="hermite_12", activation_init=source)
    x = torch.linspace(-8, 8, 1001)
    expected = build("hermite_12")
    expected.fit(source)
    for module in activations(checkpoint.model):
        assert all(torch.equal(module.state_dict()[k], v) for k, v in expected.state_dict().items())
        error = (module(x) - function(x)).abs()
        assert error.max() < 1.2e-2  # beyond the domain, where silu is not straight yet
        assert error[(x > -3.5) & (x < 2.5)].max() < 4e-3  # two standard deviations of N(-0.5, 1.5^2)
    assert [layer.fit.source for layer in report.layers] == [source, source]


def test_a_fixed_activation(tmp_path):
    checkpoint, report = gpt2(activation="silu")
    assert (checkpoint.model.config.activation_function, report) == ("silu", None)
    assert activations(checkpoint.model) == []
    assert gpt2()[0].model.config.activation_function == "gelu_new"


def test_other_seeds_draw_other_weights():
    first, second, again = (gpt2(seed=seed)[0].model.transformer.wte.weight for seed in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_only_the_config_of_a_folder_is_taken(gpt2_folder):
    checkpoint, _ = gpt2(model=str(gpt2_folder), model_type=None, tokenizer=None, config_overrides={"n_layer": 1})
    trained = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    assert (checkpoint.model.config.n_layer, checkpoint.model.config.n_embd) == (1, 16)
    assert checkpoint.tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    assert not torch.equal(checkpoint.model.transformer.wte.weight, trained.transformer.wte.weight)


def test_an_image_classifier_and_its_processor():
    pytest.importorskip("PIL")
    sizes = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 16}
    checkpoint, _ = gpt2(
        model_type="convnext",
        config_overrides=sizes,
        tokenizer=None,
        activation="fourier_3",
        image_processor_overrides={"size": {"shortest_edge": 16}, "crop_pct": 1.0},
    )
    assert type(checkpoint.model).__name__ == "ConvNextForImageClassification"
    assert len(activations(checkpoint.model)) == 2
    pixels = checkpoint.image_processor([torch.zeros(3, 20, 20, dtype=torch.uint8)], return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 16, 16)
    assert checkpoint.model(**pixels).logits.shape == (1, 2)


# ---- tokenizers ----------------------------------------------------------------------------------------------------

TEXT = "naïve — ✓\tof the of the of the\n\nthe end  of the line"


@pytest.mark.parametrize("size", [257, 270])
def test_bpe_is_lossless_and_has_the_size(size):
    tokenizer = bpe_tokenizer([TEXT] * 3, size)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(tokenizer) == size
    assert tokenizer.decode(ids) == TEXT
    assert (len(ids) < len(TEXT.encode())) == (size > 257)
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"


def test_one_token_per_byte():
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT


def test_bpe_learned_from_the_dataset(text_file):
    checkpoint, _ = gpt2(dataset=str(text_file), tokenizer="bpe", vocab_size=280)
    config = checkpoint.model.config
    assert (config.vocab_size, checkpoint.model.transformer.wte.weight.shape[0]) == (280, 280)
    assert config.eos_token_id == checkpoint.tokenizer.eos_token_id
    assert len(checkpoint.tokenizer("seven", add_special_tokens=False)["input_ids"]) < 5  # a word of the file


def test_a_padded_vocabulary_is_not_generated(text_file, tmp_path):
    checkpoint, _ = gpt2(config_overrides=SIZES | {"vocab_size": 320})
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    assert (model.get_input_embeddings().num_embeddings, len(tokenizer)) == (320, 257)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([list(b"one two")])
    sample = {"do_sample": True, "max_new_tokens": 20, "num_return_sequences": 50, "pad_token_id": 256}
    ids = reloaded.generate(prompt, attention_mask=torch.ones_like(prompt), **sample)
    assert ids.max() < 257  # of 1000 tokens, a fifth would be padding: without training, all have about equal odds
    ids = reloaded.generate(prompt, attention_mask=torch.ones_like(prompt), suppress_tokens=None, **sample)
    assert ids.max() >= 257
    assert gpt2()[0].model.generation_config.suppress_tokens is None


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model_type": None}, ConfigError, "either model.*or model_type"),
        ({"model": "somewhere"}, ConfigError, "either model.*or model_type"),
        ({"model_type": "gtp2"}, CheckpointError, "gtp2"),
        ({"model_type": "vits", "config_overrides": {}}, ConfigError, "'vits'"),
        ({"config_overrides": {"n_layers": 2}}, ConfigError, "no 'n_layers'; did you mean n_layer"),
        ({"activation": "hermit_3"}, HfOrthoError, "unknown activation 'hermit_3'"),
        ({"activation": "hermite_3", "activation_init": "best"}, ConfigError, "'best': must be one of paper, unit"),
        *(
            ({"activation_init": init, "activation": "hermite_3_g24"}, WidthError, "64 channels.*must divide 64")
            for init in ("paper", "unit", "gelu")
        ),
        ({"config_overrides": SIZES | {"activation_function": "hermite_3_g24"}}, WidthError, "64 channels.* 24 groups"),
        ({"tokenizer": None}, ConfigError, "tokenizer is missing"),
        ({"tokenizer": "bpe", "vocab_size": 256}, ConfigError, "vocab_size 256"),
        ({"tokenizer": "/no/such"}, CheckpointError, "/no/such"),
        ({"model_type": None, "model": "/no/such"}, CheckpointError, "/no/such"),
    ],
)
def test_mistakes_are_named(options, error, message):
    with pytest.raises(error, match=message):
        gpt2(**options)


@pytest.mark.parametrize("value", ["4", "[1]", "{n_layer: "])
def test_overrides_must_be_a_mapping(value):
    with pytest.raises(ConfigError, match="config_overrides"):
        ModelArguments(config_overrides=value)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "init"), [("hermite_3", "unit"), ("tropical_2", "gelu"), ("gelu", "paper")])
def test_pretrain(hf_ortho_command, text_file, tmp_path, activation, init):
    flags = {"model_type": "gpt2", "config_overrides": json.dumps(SIZES), "tokenizer": "bytes", "max_steps": 3}
    flags |= {"dataset": text_file, "output_dir": tmp_path / "out", "activation": activation, "activation_init": init}
    argv = [word for key, value in flags.items() for word in (f"--{key}", value)]
    ran = hf_ortho_command("pretrain", *argv, "--use_cpu", "--save_strategy", "no", "--seed", "1")
    assert ran.code == 0, ran.err
    ((loss,), (perplexity,)) = ran.figures["loss"], ran.figures["perplexity"]
    assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.activation_function == activation
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("](activations.png)" in card) == (activation != "gelu")
    assert "trained from scratch" in card
    assert "converted from" not in card
    assert ("import hf_ortho" in card) == (activation != "gelu")


def test_groups_that_do_not_divide_the_width(hf_ortho_command, text_file, tmp_path):
    flags = ["--model_type", "gpt2", "--config_overrides", json.dumps(SIZES), "--tokenizer", "bytes", "--use_cpu"]
    flags += ["--dataset", text_file, "--output_dir", tmp_path / "out", "--activation", "hermite_3_g24"]
    ran = hf_ortho_command("pretrain", *flags, "--max_steps", 3)
    assert re.fullmatch(r"transformer\.h\.0\.mlp\.act has 64 channels.*: the number must divide 64", ran.error)
    assert not (tmp_path / "out").exists()


def test_init_must_be_known(hf_ortho_command, text_file, tmp_path):
    ran = hf_ortho_command(
        "finetune", "--init", "fresh", "--dataset", text_file, "--model", tmp_path, "--output_dir", tmp_path / "out"
    )
    assert ran.error == "init 'fresh': must be pretrained or scratch"
    assert not (tmp_path / "out").exists()
