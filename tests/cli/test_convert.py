"""``hf-ortho convert`` as a user runs it: what it writes, and that a failure writes nothing."""

import errno
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import hf_ortho
from hf_ortho.activations import FAMILIES, parse
from hf_ortho.cli import main
from hf_ortho.cli.main import COMMANDS
from hf_ortho.files import MANIFEST
from hf_ortho.folders import OutputFolder


@pytest.fixture
def output(tmp_path):
    """A folder that does not exist, in a parent of its own."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / "converted"


@pytest.fixture
def convert(hf_ortho_command, output):
    return lambda model, *flags: hf_ortho_command("convert", model, "-o", output, *flags)


def refusal(ran) -> str:
    """The one sentence on stderr of a command that exits with 2."""
    assert ran.code == 2, ran
    (line,) = ran.err.splitlines()
    assert line.startswith("hf-ortho: error: ")
    return line.removeprefix("hf-ortho: error: ")


def first_block(tokenizer, text):
    """The first 32 tokens of a document, as a batch."""
    return torch.tensor([tokenizer(text)["input_ids"][:32]])


def written_losses(folder):
    """Source and converted loss in the results table of the card."""
    row = re.search(r"^\| loss \| (\S+) \| (\S+) \|", (folder / "README.md").read_text(), re.MULTILINE)
    return row and [float(v) for v in row.groups()]


# ---- what it writes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_data_free_equals_the_library(convert, gpt2_folder, output, family, groups):
    ran = convert(gpt2_folder, "--family", family, "--degree", "4", *(["--groups", "4"] if groups else []))
    assert (ran.code, ran.err) == (0, "")
    assert "reloaded with from_pretrained" in ran.out
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= {p.name for p in output.iterdir()}
    assert list(output.parent.iterdir()) == [output]
    expected = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    report = hf_ortho.convert(expected, family, degree=4, groups=groups)
    found = AutoModelForCausalLM.from_pretrained(output)
    assert found.config.activation_function == f"{family}_4" + ("_g4" if groups else "")
    assert found.config.hf_ortho["source_model"] == str(gpt2_folder)
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in found.state_dict().items())
    assert f"{report.layers[0].fit.rms_error:.1e}" in ran.out
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (gpt2_folder, output)]
    assert tokenizers[0]("a text")["input_ids"] == tokenizers[1]("a text")["input_ids"]


def test_defaults(convert, gpt2_folder, output):
    assert convert(gpt2_folder).code == 0
    config = json.loads((output / "config.json").read_text())
    assert (config["activation_function"], config["hf_ortho"]["calibrated"]) == ("hermite_8", False)
    assert written_losses(output) is None


def test_the_help_names_the_default_degrees(hf_ortho_command):
    shown = " ".join(hf_ortho_command("convert", "--help").out.split())
    defaults = {family: parse(family).degree for family in FAMILIES}
    assert f"{defaults.pop('hermite')} for hermite, {defaults['fourier']} for the others" in shown
    assert set(defaults.values()) == {defaults["fourier"]}


def test_next_steps(convert, gpt2_folder, make_gpt2, output, tmp_path):
    make_gpt2(n_layer=1)[0].save_pretrained(tmp_path / "bare")  # no tokenizer, so no data for it
    assert convert(tmp_path / "bare", "--overwrite").out.splitlines()[-1].startswith("Load: ")
    lines = convert(gpt2_folder, "--overwrite").out.splitlines()
    assert lines[-3:] == [
        f'Load:    import hf_ortho; AutoModelForCausalLM.from_pretrained("{output}")',
        f"Compare: hf-ortho evaluate {output} --against {gpt2_folder}",
        f"Train:   hf-ortho finetune --model {output} --dataset DATA --output-dir OUTPUT",
    ]


@pytest.mark.slow
def test_calibration_files_of_all_kinds_agree(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    text = text_file.read_text()
    files = {suffix: tmp_path / f"words{suffix}" for suffix in (".jsonl", ".parquet", ".csv")}
    files[".jsonl"].write_text(json.dumps({"text": text, "id": 3}) + "\n")
    pq.write_table(pa.table({"id": [3], "text": [text]}), files[".parquet"])
    files[".csv"].write_text('text\n"' + text + '"\n')
    weights = []
    for path in (text_file, *files.values()):
        folder = tmp_path / f"from_{path.suffix[1:]}"
        flags = ("--calibration-data", path, "--calibration-samples", 1)
        ran = hf_ortho_command("convert", gpt2_folder, "-o", folder, *flags)
        assert (ran.code, ran.err) == (0, "")
        weights.append(load_file(folder / "model.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in other)

    tokens = first_block(AutoTokenizer.from_pretrained(gpt2_folder), text)
    losses = []
    for folder in (gpt2_folder, tmp_path / "from_txt"):
        with torch.no_grad():
            losses.append(AutoModelForCausalLM.from_pretrained(folder)(tokens, labels=tokens).loss.item())
    assert written_losses(tmp_path / "from_txt") == pytest.approx(losses, abs=2e-5)
    expected = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    hf_ortho.convert(expected, "hermite_8", calibration=[tokens])
    key = "transformer.h.1.mlp.act.coefficients"
    torch.testing.assert_close(weights[0][key], expected.state_dict()[key], rtol=1e-4, atol=1e-6)


def test_many_documents(convert, gpt2_folder, output, tmp_path):
    lines = [json.dumps({"text": f"document {i} " * 9}) for i in range(30)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    assert convert(gpt2_folder, "--calibration-data", tmp_path / "many.jsonl").code == 0
    assert json.loads((output / "config.json").read_text())["hf_ortho"]["calibrated"]


@pytest.fixture
def image_folder(tmp_path):
    """Nine pictures in each of three classes."""
    rng = np.random.default_rng(0)
    for name in ("bird", "cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(9):
            picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            picture.save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "labeled"), [(["bird", "cat", "dog"], True), (["cat", "dog"], False), (["a", "b", "c"], False)]
)
def test_image_classifier(convert, make_convnext, save_parts, tmp_path, image_folder, output, classes, labeled):
    """Labels that the model does not have give no loss."""
    source = save_parts(tmp_path / "source", *make_convnext(classes))
    ran = convert(source, "--family", "fourier", "--calibration-data", image_folder, "--calibration-samples", 2)
    assert (ran.code, ran.err) == (0, "")
    processors = [AutoImageProcessor.from_pretrained(folder) for folder in (source, output)]
    picture = Image.open(next(image_folder.rglob("*.png")))
    values = [p(picture, return_tensors="pt")["pixel_values"] for p in processors]
    assert torch.equal(*values)
    models = [AutoModelForImageClassification.from_pretrained(folder).eval() for folder in (source, output)]
    assert models[1].config.hidden_act == "fourier_6"
    with torch.no_grad():
        logits = [model(values[0]).logits for model in models]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-2, atol=1e-2)
    layer = models[1].config.hf_ortho["layers"][0]
    assert layer["rms_error"] < 1e-4
    losses = written_losses(output)
    assert (losses is not None) == labeled
    if labeled:
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_options(convert, gpt2_folder, output):
    flags = ("--dtype", "bfloat16", "--field", "activation_function", "--derivative-weight", "1.0", "--degree", "6")
    assert convert(gpt2_folder, *flags).code == 0
    weights = load_file(output / "model.safetensors")
    act = "transformer.h.0.mlp.act.coefficients"
    assert {v.dtype for k, v in weights.items() if ".act." not in k} == {torch.bfloat16}
    expected = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    hf_ortho.convert(expected, "hermite_6", derivative_weight=1.0)
    assert torch.equal(weights[act], expected.state_dict()[act])


def test_a_model_of_another_task(convert, tmp_path, output):
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    assert convert(tmp_path / "bert").code == 0
    assert json.loads((output / "config.json").read_text())["hidden_act"] == "hermite_8"


def test_overwrite(convert, gpt2_folder, output):
    assert convert(gpt2_folder).code == 0
    assert "--overwrite" in refusal(convert(gpt2_folder))
    ran = convert(gpt2_folder, "--overwrite", "--family", "fourier")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads((output / "config.json").read_text())["activation_function"] == "fourier_6"
    assert list(output.parent.iterdir()) == [output]
    (output / "README.md").write_text("my own words")
    assert "README.md in it was changed since hf_ortho wrote it" in refusal(convert(gpt2_folder, "--overwrite"))
    assert (output / "README.md").read_text() == "my own words"


def test_converted_again(hf_ortho_command, gpt2_folder, tmp_path):
    tokens = torch.arange(32)[None]
    before = AutoModelForCausalLM.from_pretrained(gpt2_folder)(tokens).logits.detach()
    for family, source in (("hermite", gpt2_folder), ("fourier", tmp_path / "hermite")):
        assert hf_ortho_command("convert", source, "-o", tmp_path / family, "--family", family).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fourier")
    assert model.config.activation_function == "fourier_6"
    assert model.config.hf_ortho["source_activations"] == {"activation_function": "gelu_new"}
    assert (model(tokens).logits - before).norm() < 2e-2 * before.norm()


def test_overwrite_deletes_nothing_of_others(hf_ortho_command, make_gpt2, save_parts, text_file, tmp_path, monkeypatch):
    """Neither a folder of other files, nor that of an input, nor the current one."""
    source = save_parts(tmp_path / "par" / "src", *make_gpt2())
    adapter = tmp_path / "adapter"
    for folder in (tmp_path / "home", tmp_path / "here", adapter):
        folder.mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "here" / "notes.txt").write_text("mine")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(source)})
    )
    monkeypatch.chdir(tmp_path / "here")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def refused(model, output, *flags):
        ran = hf_ortho_command("convert", model, "-o", output, "--overwrite", *flags)
        assert ran.out == ""  # not even the loading has begun
        return refusal(ran)

    assert "thesis.tex in it was not written by hf_ortho" in refused(source, tmp_path / "home")
    assert "name of the output folder is empty" in refused(source, "")
    assert "is the current folder" in refused(source, ".")
    assert "is the input" in refused(source, source)
    assert "contains the input" in refused(source, tmp_path / "par")
    assert "is the input" in refused(adapter, source)
    assert "contains the input" in refused(source, text_file.parent, "--calibration-data", text_file)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_names_are_printed_as_they_are(hf_ortho_command, gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shown in (("x[/b]", "x[/b]"), (":smile:", ":smile:"), ("\x1b[31mred", r"\x1b[31mred")):
        ran = hf_ortho_command("convert", gpt2_folder, "-o", name)
        assert (ran.code, ran.err) == (0, "")
        assert f"Wrote {shown} (" in ran.out
        assert (tmp_path / name / "model.safetensors").is_file()
        assert f"output folder {shown}: " in refusal(hf_ortho_command("convert", gpt2_folder, "-o", name))
    assert refusal(hf_ortho_command("convert", "[/x]\x1b", "-o", "out")).startswith(r"[/x]\x1b ")


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--family", "hermit"], r"'hermit'.*did you mean hermite\?"),
        (["--family", "Fourier", "--degree", "4"], r"did you mean fourier\?"),
        (["--family", "relu"], "hermite, fourier, tropical, tropical_rational"),
        (["--degree", "0"], "'0' of hermite: must be an integer from 1 to 32"),
        (["--degree", "33"], "'33' of hermite"),
        (["--degree", "-1"], "'-1' of hermite"),
        (["--degree", "x"], "'x' of hermite"),
        (["--degree", "2.5"], "2.5"),
        (["--degree", ""], "must be an integer from 1 to 32"),
        (["--family", "tropical", "--degree", "rational_6"], "rational_6"),
        (["--groups", "0"], "groups 0 of hermite: must be an integer from 1 to 65536"),
        (["--groups", "-4"], "groups -4 of hermite"),
        (["--groups", "2.5"], "--groups: invalid int value: '2.5'"),
        (["--family", "hermite_3_g16", "--groups", "4"], "'hermite_3_g16' already names its groups"),
        (["--family", "hermite_3_g16", "--degree", "4"], "'hermite_3_g16' already names its degree"),
        (["--dgree", "4"], r"unknown flag --dgree; did you mean --degree\?"),
        (["--deg", "4"], r"unknown flag --deg; did you mean --degree\?"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--derivative-weight", "much"], "--derivative-weight: invalid float value: 'much'"),
        (["--derivative-weight", "-1"], "derivative_weight -1.0"),
        (["--derivative-weight", "nan"], "derivative_weight nan"),
        (["--field", "hidden_act"], "hidden_act: no such activation field.*activation_function"),
        (["--calibration-data", "/no/such/file.txt"], "/no/such/file.txt does not exist"),
        (["--calibration-data", "missing.jsonl"], "missing.jsonl does not exist"),
    ],
)
def test_bad_flags(convert, gpt2_folder, output, flags, message):
    sentence = refusal(convert(gpt2_folder, *flags))
    assert re.search(message, sentence), sentence
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_that_are_nan_are_named(convert, make_gpt2, tmp_path, output, dtype):
    model, tokenizer = make_gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = torch.nan
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "damaged")
    sentence = refusal(convert(tmp_path / "damaged", "--dtype", dtype))
    assert sentence == (
        f"{tmp_path / 'damaged'} is damaged: transformer.h.1.mlp.c_fc.weight contains NaN; download or save it again"
    )
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calibration-samples", "0"], "--calibration-samples 0: must be at least 1"),
        (["--block-size", "1"], "block_size 1"),
        (["--block-size", "33"], "block_size 33: must be between 2 and the model's context length of 32"),
        (["--calibration-split", "test"], "no split 'test'; it has: train"),
    ],
)
def test_bad_flags_for_calibration(convert, gpt2_folder, text_file, output, flags, message):
    sentence = refusal(convert(gpt2_folder, "--calibration-data", text_file, *flags))
    assert message in sentence
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("blank.jsonl", b'{"text": null}\n{"text": ""}\n', "less than one block of 2 tokens: it has 0"),
        ("words.docx", b"text", r"must end in one of \.txt"),
        ("words", b"text", r"must end in one of \.txt"),
        ("binary.txt", b"\xff\xfe\x00" * 99, "binary.txt"),
        ("broken.jsonl", b'{"text": "a"', "broken.jsonl"),
        ("broken.parquet", b"PAR1", "broken.parquet"),
        ("numbers.jsonl", b'{"a": 1, "b": 2}\n' * 9, r"no unambiguous text column.*: a, b\)"),
        ("two.jsonl", b'{"a": "x", "b": "y"}\n' * 9, r"no unambiguous text column.*: a, b\)"),
    ],
)
def test_bad_calibration_files(convert, gpt2_folder, output, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    sentence = refusal(convert(gpt2_folder, "--calibration-data", tmp_path / name))
    assert re.search(message, sentence), sentence
    assert name in sentence
    assert list(output.parent.iterdir()) == []


@pytest.mark.slow
def test_calibration_data_of_any_kind_gives_the_same_model(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    rows = Dataset.from_dict({"title": ["none"], "body": [text_file.read_text()]})
    rows.save_to_disk(tmp_path / "saved")
    rows.to_json(tmp_path / "words.jsonl.gz", compression="gzip")
    column = ["--text-column", "body"]
    weights = []
    for place, flags in ((text_file, []), (tmp_path / "saved", column), (tmp_path / "wor*.gz", column)):
        folder = tmp_path / f"out{len(weights)}"
        flags = [*flags, "--calibration-samples", 2, "--block-size", 16]
        assert hf_ortho_command("convert", gpt2_folder, "-o", folder, "--calibration-data", place, *flags).code == 0
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


def test_a_column_that_does_not_exist(convert, gpt2_folder, tmp_path):
    (tmp_path / "two.csv").write_text("title,body\na,b\n")
    sentence = refusal(convert(gpt2_folder, "--calibration-data", tmp_path / "two.csv", "--text-column", "text"))
    assert sentence.endswith("two.csv has no column 'text'; it has: title, body; name one with --text-column")


def test_a_short_calibration_text_is_one_block(convert, gpt2_folder, tmp_path, caplog):
    (tmp_path / "short.txt").write_text("fifteen letters")
    ran = convert(gpt2_folder, "--calibration-data", tmp_path / "short.txt")
    assert ran.code == 0, ran.err
    assert "Compared with the source model on 16 predictions (the only calibration batch):" in ran.out
    assert any("has 16 tokens, which are one block shorter than 32" in message for message in caplog.messages)


@pytest.mark.parametrize("flags", [["--block-size", "0"], ["--block-size", "-4"], ["--calibration-samples", "-1"]])
def test_numbers_out_of_range_are_refused_before_loading(convert, flags):
    sentence = refusal(convert("no/model/here", "--calibration-data", "words.txt", *flags))
    assert f"{flags[0].removeprefix('--block-').removeprefix('--')} {flags[1]}: must be at least" in sentence


def test_text_needs_a_tokenizer(convert, make_gpt2, save_parts, text_file, output, tmp_path):
    source = save_parts(tmp_path / "source", make_gpt2()[0])
    assert "has no tokenizer" in refusal(convert(source, "--calibration-data", text_file))
    assert list(output.parent.iterdir()) == []


def test_images_for_a_language_model(convert, gpt2_folder, image_folder, output):
    assert "no unambiguous text column" in refusal(convert(gpt2_folder, "--calibration-data", image_folder))
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist"),
        ({}, "is not a checkpoint"),
        ({"model.safetensors": ""}, "is not a checkpoint"),
        ({"config.json": "{}"}, "cannot be loaded"),
        ({"config.json": '{"model_type": "gpt2", "architectures": ["GPT9Model"]}'}, "GPT9Model"),
        ({"config.json": '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'}, "cannot be loaded"),
    ],
)
def test_bad_models(convert, output, tmp_path, files, message):
    source = tmp_path / "source"
    if files is not None:
        source.mkdir()
        for name, content in files.items():
            (source / name).write_text(content)
    sentence = refusal(convert(source))
    assert str(source) in sentence
    assert message in sentence
    assert list(output.parent.iterdir()) == []


def test_a_source_that_cannot_be_followed(convert, make_gpt2, save_parts, output, tmp_path):
    source = save_parts(tmp_path / "source", *make_gpt2(activation_function="relu2"))
    assert "relu2 has no asymptotic slope" in refusal(convert(source))
    assert list(output.parent.iterdir()) == []


def test_output_that_cannot_be_a_folder(hf_ortho_command, gpt2_folder, tmp_path):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "file" in refusal(hf_ortho_command("convert", gpt2_folder, "-o", output, "--overwrite"))
    assert (tmp_path / "file").read_text() == "kept"


def test_missing_arguments(hf_ortho_command):
    assert "required: model, -o/--output" in refusal(hf_ortho_command("convert"))


# ---- failures while writing ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk(gpt2_folder, output, tmp_path_factory, forked):
    """A real one: the kernel refuses to write more than half of the weights."""
    limit = (gpt2_folder / "model.safetensors").stat().st_size // 2
    assert limit > (gpt2_folder / "tokenizer.json").stat().st_size
    script = tmp_path_factory.mktemp("script") / "limited.py"
    script.write_text("""
import os, resource, sys
from hf_ortho.cli import main
sys.stdout = open(os.devnull, "w")
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
assert main(sys.argv[2:]) == 2
""")
    (line,) = forked(1, script, limit, "convert", gpt2_folder, "-o", output).splitlines()
    assert line.startswith(f"hf-ortho: error: output folder {output}: it cannot be written")
    assert os.strerror(errno.EFBIG) in line
    assert list(output.parent.iterdir()) == []


@pytest.fixture(params=[False, True], ids=["new", "overwrite"])
def assert_untouched(request, output):
    """Start without or with an output folder, and check later that it is so still."""
    if request.param:
        with OutputFolder(output).writing() as draft:
            (draft / "config.json").write_text("old")

    def check():
        found = {str(p.relative_to(output.parent)) for p in output.parent.rglob("*")}
        assert found == ({"converted", "converted/config.json", f"converted/{MANIFEST}"} if request.param else set())
        assert not request.param or (output / "config.json").read_text() == "old"

    return check


@pytest.fixture
def after_save(monkeypatch):
    """Run something when the weights have just been written."""

    def install(action):
        save = PreTrainedModel.save_pretrained

        def patched(self, folder, **kwargs):
            save(self, folder, **kwargs)
            assert (Path(folder) / "model.safetensors").exists()
            action(self, Path(folder))

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", patched)

    return install


def test_sigterm_while_writing(convert, gpt2_folder, after_save, assert_untouched):
    after_save(lambda model, folder: os.kill(os.getpid(), signal.SIGTERM))
    ran = convert(gpt2_folder, "--overwrite")
    assert ran.code == 130
    assert len(ran.err.splitlines()) == 1
    assert "interrupted" in ran.err
    assert_untouched()


def test_an_error_while_writing(convert, gpt2_folder, output, after_save, assert_untouched):
    def fill(model, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    after_save(fill)
    sentence = refusal(convert(gpt2_folder, "--overwrite"))
    assert sentence.startswith(f"output folder {output}: it cannot be written")
    assert os.strerror(errno.ENOSPC) in sentence
    assert_untouched()


def test_a_model_that_reloads_differently(convert, gpt2_folder, after_save, assert_untouched):
    def damage(model, folder):
        weights = folder / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        weights.write_bytes(data)

    after_save(damage)
    assert "does not reload" in refusal(convert(gpt2_folder, "--overwrite"))
    assert_untouched()


# ---- the command itself --------------------------------------------------------------------------------------------


@pytest.fixture
def _sigterm():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("_sigterm")
@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    assert main([command, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: hf-ortho {command}")
    assert captured.err == ""


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_usage(hf_ortho_command, argv):
    ran = hf_ortho_command(*argv)
    assert (ran.code, ran.err) == (0, "")
    assert all(re.search(rf"^  {name} +\w", ran.out, re.MULTILINE) for name in COMMANDS)


def test_version(hf_ortho_command):
    ran = hf_ortho_command("--version")
    assert (ran.code, ran.out.strip()) == (0, hf_ortho.__version__)


@pytest.mark.parametrize(
    ("name", "hint"), [("convrt", "did you mean convert?"), ("zzz", "must be one of"), ("--x", "")]
)
def test_unknown_command(hf_ortho_command, name, hint):
    sentence = hf_ortho_command(name).error
    assert f"unknown command '{name}'" in sentence
    assert hint in sentence
    assert all(command in sentence for command in COMMANDS)


# ---- degree, tails, distillation, and what is saved beside the weights -----------------------------------------------


def test_the_report_and_its_picture_stand_beside_the_weights(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    ran = hf_ortho_command(
        "convert", gpt2_folder, "-o", tmp_path / "out", "--degree", 4, "--calibration-data", text_file
    )
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["activation"] == "hermite_4"
    assert re.search(rf"relative error of the output +{report['fidelity']['output_error']:.1e}\n", ran.out)
    assert (tmp_path / "out" / "activations.png").read_bytes().startswith(b"\x89PNG")
    assert "(activations.png)" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory, make_gpt2, save_parts):
    """A GPT-2 of seven layers, with weights so large that a fit of low degree changes the predictions."""
    return save_parts(tmp_path_factory.mktemp("deep"), *make_gpt2(n_layer=6, initializer_range=0.2))


@pytest.mark.slow
def test_the_fidelity_comes_first_then_the_worst_layers(hf_ortho_command, deep_folder, text_file, tmp_path):
    flags = ["--degree", 3, "--block-size", 32, "--calibration-samples", 4, "--calibration-data", text_file]
    printed = {}
    for name, more in (("five", []), ("all", ["--verbose"])):
        ran = hf_ortho_command("convert", deep_folder, "-o", tmp_path / name, *flags, *more)
        assert (ran.code, ran.err) == (0, "")
        printed[name] = ran.out
    report = json.loads((tmp_path / "five" / "conversion.json").read_text())
    fidelity = report["fidelity"]
    assert fidelity["held_out"]
    for text in printed.values():
        heading = (
            f"Compared with the source model on {fidelity['predictions']:,} predictions (held-out calibration data):"
        )
        assert (
            text.index("hermite_3: perplexity ")
            < text.index("6 activations of")
            < text.index(heading)
            < text.index("hermite_3 for gelu_new")
        )
        assert re.search(rf"{re.escape(heading)}\n +KL\(source \|\| converted\) +{fidelity['kl']:.1e} nats", text)
    rows = {name: [int(n) for n in re.findall(r"^ (\d) +\d", text, re.MULTILINE)] for name, text in printed.items()}
    effects = [layer["divergence"] for layer in report["layers"]]
    assert rows["all"] == list(range(6))
    assert rows["five"] == sorted(range(6), key=lambda i: -effects[i])[:5]
    assert "The 5 layers of 6 with the largest errors (--verbose for all)\n" in printed["five"]
    assert "--verbose" not in printed["all"]
    loss = [fidelity["loss_before"], fidelity["loss_after"]]
    assert written_losses(tmp_path / "five") == pytest.approx(loss, abs=6e-6)  # five digits


@pytest.mark.slow
def test_density_weights_are_those_of_the_library(convert, deep_folder, text_file, output):
    """All pre-activations count the same: other parameters than with the default, and no divergence of a layer."""
    flags = ["--degree", 3, "--block-size", 16, "--calibration-samples", 1, "--calibration-data", text_file]
    ran = convert(deep_folder, *flags, "--weights", "density")
    assert (ran.code, ran.err) == (0, "")
    assert "calibrated, density weights" in ran.out
    report = json.loads((output / "conversion.json").read_text())
    assert report["weights"] == "density"
    assert {layer["divergence"] for layer in report["layers"]} == {None}
    tokens = torch.tensor([AutoTokenizer.from_pretrained(deep_folder)(text_file.read_text())["input_ids"][:16]])
    key = "transformer.h.3.mlp.act.coefficients"
    found = load_file(output / "model.safetensors")[key]
    expected = {}
    for weights in ("fisher", "density"):
        model = AutoModelForCausalLM.from_pretrained(deep_folder)
        hf_ortho.convert(model, "hermite_3", calibration=[tokens], weights=weights)
        expected[weights] = model.state_dict()[key]
    torch.testing.assert_close(found, expected["density"], rtol=1e-4, atol=1e-6)
    assert (found - expected["fisher"]).abs().max() > 1e-3


@pytest.mark.slow
def test_auto_tails_and_distillation(hf_ortho_command, gpt2_folder, text_file, tmp_path):
    flags = ["--degree", "auto", "--tolerance", 5e-4, "--calibration-data", text_file]
    ran = hf_ortho_command("convert", gpt2_folder, "-o", tmp_path / "auto", *flags, "--distill", 2)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "auto" / "conversion.json").read_text())
    assert report["activation"] == "hermite_1"  # any degree is close enough
    assert "2 steps of distillation" in ran.out
    ran = hf_ortho_command("convert", gpt2_folder, "-o", tmp_path / "pure", "--no-tails", "--domain", -9, 9)
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "pure" / "config.json").read_text())
    assert {tuple(layer["domain"]) for layer in config["hf_ortho"]["layers"]} == {(-9.0, 9.0)}
    assert "no tails" in (tmp_path / "pure" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--degree", "auto", "--tolerance", "-1"], "tolerance -1"),
        (["--degree", "some"], "degree 'some'"),
        (
            ["--family", "hermite_3_g24"],
            "cannot be divided into 24 groups: the number must divide 64",
        ),
        (["--no-tails"], "needs calibration data or a domain"),
        (["--domain", "2", "1"], "domain"),
        (["--distill", "5"], "--distill 5 requires --calibration-data"),
        (["--distill", "-5"], "--distill -5"),
        (["--weights", "other"], "argument --weights: invalid choice: 'other' (choose from"),
    ],
)
def test_choices_that_cannot_be(hf_ortho_command, gpt2_folder, tmp_path, flags, reason):
    ran = hf_ortho_command("convert", gpt2_folder, "-o", tmp_path / "out", *flags)
    assert reason in ran.error
    assert not (tmp_path / "out").exists()


# ---- calibration of models without a task of their own --------------------------------------------------------------


def _bert(vocabulary):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=vocabulary, **sizes)), "encoder.layer.0.intermediate.intermediate_act_fn"


def _t5(vocabulary):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config), "decoder.block.0.layer.2.DenseReluDense.act"


@pytest.mark.parametrize("build", [_bert, _t5], ids=["encoder", "encoder-decoder"])
def test_text_calibrates_models_that_are_no_causal_lm(
    build, hf_ortho_command, make_gpt2, save_parts, text_file, tmp_path
):
    _, tokenizer = make_gpt2()
    model, module = build(len(tokenizer))
    save_parts(tmp_path / "in", model, tokenizer)
    flags = ["--calibration-data", text_file, "--block-size", 24, "--degree", 3]
    ran = hf_ortho_command("convert", tmp_path / "in", "-o", tmp_path / "out", *flags)
    assert ran.code == 0, ran.err
    layers = {v["module"]: v for v in json.loads((tmp_path / "out" / "conversion.json").read_text())["layers"]}
    assert layers[module]["minimum"] < layers[module]["maximum"]


def test_an_image_model_without_a_head(hf_ortho_command, make_convnext, save_parts, tmp_path):
    model, processor = make_convnext()
    save_parts(tmp_path / "in", model.convnext, processor)
    ran = hf_ortho_command("convert", tmp_path / "in", "-o", tmp_path / "out", "--calibration-data", "digits")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["weights"] == "fisher"


def test_inputs_that_the_command_cannot_make(hf_ortho_command, text_file, tmp_path):
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2Model(config).save_pretrained(tmp_path / "in")
    ran = hf_ortho_command("convert", tmp_path / "in", "-o", tmp_path / "out", "--calibration-data", text_file)
    assert "Wav2Vec2Model takes input_values" in ran.error
    assert not (tmp_path / "out").exists()


def test_a_field_can_be_chosen(hf_ortho_command, make_gpt2, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=sizes | {"vocab_size": 49}, vision_config=vision)).save_pretrained(tmp_path / "in")
    flags = ["--field", "text_config.hidden_act"]
    ran = hf_ortho_command("convert", tmp_path / "in", "-o", tmp_path / "out", *flags)
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["hidden_act"] == "hermite_8"
    assert config["vision_config"].get("hidden_act", "quick_gelu") == "quick_gelu"
    assert "left alone: vision_config.hidden_act: not selected" in ran.out
