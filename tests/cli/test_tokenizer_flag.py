"""``--tokenizer`` for a model that is saved without one."""

import shutil

import pytest
from transformers import AutoTokenizer

from hf_ortho.tasks.tokenizer import bpe_tokenizer, byte_tokenizer

NAMED = "has no tokenizer, so text cannot be read for it; give one with --tokenizer"


@pytest.fixture
def silent(tmp_path, make_gpt2):
    """A GPT-2 that is saved without its byte-level tokenizer."""
    make_gpt2()[0].save_pretrained(tmp_path / "silent")
    return tmp_path / "silent"


@pytest.fixture
def spoken(tmp_path):
    """A folder with nothing but a tokenizer."""
    byte_tokenizer().save_pretrained(tmp_path / "spoken")
    return tmp_path / "spoken"


def test_a_model_without_a_tokenizer(hf_ortho_command, silent, text_file, tmp_path):
    out = tmp_path / "out"
    for command in (
        ["convert", silent, "-o", out, "--calibration-data", text_file],
        ["evaluate", silent, "--dataset", text_file],
        ["finetune", "--model", silent, "--dataset", text_file, "--output_dir", out, "--max_steps", 1],
    ):
        assert NAMED in hf_ortho_command(*command).error
    assert not out.exists()


@pytest.mark.slow
def test_every_command_takes_one(hf_ortho_command, gpt2_folder, silent, spoken, text_file, tmp_path):
    out, tuned = tmp_path / "out", tmp_path / "tuned"
    data = ["--calibration-data", text_file, "--calibration-samples", 2]
    ran = hf_ortho_command("convert", silent, "-o", out, "--degree", 3, "--tokenizer", spoken, *data)
    assert ran.code == 0, ran.err
    assert AutoTokenizer.from_pretrained(out).get_vocab() == byte_tokenizer().get_vocab()  # saved with the model
    options = ["--dataset", text_file, "--max-samples", 8, "--tokenizer", "bytes"]
    figures = hf_ortho_command("evaluate", silent, "--against", gpt2_folder, *options).figures
    assert figures["loss"][0] == figures["loss"][1]
    (out / "tokenizer.json").unlink()
    (out / "tokenizer_config.json").unlink()
    assert NAMED in hf_ortho_command("plot", out, "-o", tmp_path / "a.png", *data).error
    assert hf_ortho_command("plot", out, "-o", tmp_path / "a.png", "--tokenizer", "bytes", *data).code == 0
    recipe = ["--model", silent, "--dataset", text_file, "--output_dir", tuned, "--max_steps", 1, "--use_cpu"]
    assert hf_ortho_command("finetune", *recipe, "--tokenizer", spoken).code == 0
    assert AutoTokenizer.from_pretrained(tuned).get_vocab() == byte_tokenizer().get_vocab()


def test_nothing_of_the_replaced_tokenizer_is_carried_over(hf_ortho_command, gpt2_folder, tmp_path, caplog):
    model = shutil.copytree(gpt2_folder, tmp_path / "model")
    for name in ("vocab.txt", "chat_template.jinja", "LICENSE"):
        (model / name).write_text(name)
    for name, kept in (("own", True), ("bytes", False)):
        options = ["--tokenizer", "bytes"] if name == "bytes" else []
        ran = hf_ortho_command("convert", model, "-o", tmp_path / name, "--degree", 3, *options)
        assert ran.code == 0, ran.err
        assert (tmp_path / name / "LICENSE").exists()
        assert (tmp_path / name / "vocab.txt").exists() is kept
        assert (tmp_path / name / "chat_template.jinja").exists() is kept
    assert f"note: not carried over from {model}: chat_template.jinja, vocab.txt" in caplog.text


def test_what_is_no_tokenizer_for_the_model(hf_ortho_command, silent, text_file, tmp_path):
    bpe_tokenizer(["never the same word twice"], 265).save_pretrained(tmp_path / "larger")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name, message in (
        (silent, f"{silent} has no tokenizer; give another folder or Hub model, or bytes"),
        (tmp_path / "larger", "larger has 265 tokens, more than the 257 of"),
        (tmp_path / "broken", f"the tokenizer of {tmp_path / 'broken'}: "),
        (tmp_path / "none", f"{tmp_path / 'none'} does not exist"),
    ):
        command = ["evaluate", silent, "--dataset", text_file, "--tokenizer", name]
        assert message in hf_ortho_command(*command).error
    recipe = ["--model", silent, "--dataset", text_file, "--output_dir", tmp_path / "out", "--max_steps", 1]
    assert "only with init scratch" in hf_ortho_command("finetune", *recipe, "--tokenizer", "bpe").error
