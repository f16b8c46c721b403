import io
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, ByT5Tokenizer

from hf_ortho import convert


@pytest.fixture(scope="module")
def other_gpt2_folder(tmp_path_factory, make_gpt2, save_parts):
    """Converted to a coarse activation, with other weights besides, so that its loss differs visibly."""
    model, tokenizer = make_gpt2(initializer_range=0.2)
    convert(model, "hermite_2")
    return save_parts(tmp_path_factory.mktemp("other"), model, tokenizer)


@pytest.fixture(scope="module")
def evaluate(hf_ortho_command):
    def run(*argv):
        return hf_ortho_command("evaluate", *argv)

    return run


def text_loss(folder, document, block_size, count=None):
    """Mean loss over the blocks of one document, the last of them shorter, in float64 from the model's logits."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    blocks = tokenizer(document, return_tensors="pt")["input_ids"][0].split(block_size)[:count]
    losses = []
    for block in blocks:
        with torch.no_grad():
            logits = model(input_ids=block[None]).logits[0].double()
        losses.append(cross_entropy(logits[:-1], block[1:], reduction="none"))
    return torch.cat(losses).mean().item(), len(blocks)


def check(cells, expected):
    """Figures are printed with five decimals; float32 adds as much again."""
    assert [float(cell) for cell in cells] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_loss_and_perplexity(evaluate, gpt2_folder, text_file, batch_size):
    loss, count = text_loss(gpt2_folder, text_file.read_text(), 32)
    assert count % 7 > 1
    assert len(text_file.read_text()) % 32 > 1  # the last block is shorter
    ran = evaluate(gpt2_folder, "--dataset", text_file, "--batch-size", batch_size)
    check(ran.figures["loss"], [loss])
    assert float(ran.figures["perplexity"][0]) == pytest.approx(np.exp(loss), rel=1e-5)
    assert f"{text_file}, {count} samples" in ran.out.replace("\n", " ")


def test_block_size_and_number_of_samples(evaluate, gpt2_folder, text_file):
    loss, _ = text_loss(gpt2_folder, text_file.read_text(), 20, 6)
    ran = evaluate(gpt2_folder, "--dataset", text_file, "--block-size", 20, "--max-samples", 6)
    check(ran.figures["loss"], [loss])
    assert "6 samples" in ran.out


def test_text_is_evaluated_on_help_texts_by_default(evaluate, gpt2_folder):
    from hf_ortho.tasks.built_in import pydoc_topics

    loss, _ = text_loss(gpt2_folder, pydoc_topics()["validation"][0]["text"], 32, 4)
    ran = evaluate(gpt2_folder, "--max-samples", 4)
    check(ran.figures["loss"], [loss])
    assert "pydoc_topics, validation, 4 samples" in ran.out


def test_half_precision(evaluate, gpt2_folder, text_file):
    whole = evaluate(gpt2_folder, "--dataset", text_file).figures["loss"]
    half = evaluate(gpt2_folder, "--dataset", text_file, "--dtype", "bfloat16").figures["loss"]
    assert half != whole
    assert float(half[0]) == pytest.approx(float(whole[0]), rel=0.01)


def test_two_models_and_their_difference(evaluate, gpt2_folder, other_gpt2_folder, text_file):
    first, _ = text_loss(gpt2_folder, text_file.read_text(), 32)
    second, _ = text_loss(other_gpt2_folder, text_file.read_text(), 32)
    assert abs(first - second) > 1e-3
    ran = evaluate(gpt2_folder, "--against", other_gpt2_folder, "--dataset", text_file)
    *figures, relative = ran.figures["loss"]
    check(figures, [first, second, first - second])
    assert relative == f"{first / second - 1:+.3%}"
    *figures, relative = ran.figures["perplexity"]
    a, b = np.exp([first, second])
    assert [float(cell) for cell in figures] == pytest.approx([a, b, a - b], rel=1e-5)
    assert relative == f"{a / b - 1:+.3%}"


def test_a_model_against_itself(evaluate, gpt2_folder, text_file):
    ran = evaluate(gpt2_folder, "--against", gpt2_folder, "--dataset", text_file)
    for cells in (ran.figures["loss"], ran.figures["perplexity"]):
        assert cells[0] == cells[1]
        assert cells[2:] == ["0.00000", "0.000%"]


def test_two_models_that_read_the_data_differently(evaluate, gpt2_folder, make_gpt2, save_parts, text_file, tmp_path):
    wider = save_parts(tmp_path / "wider", *make_gpt2(n_positions=64))
    ran = evaluate(gpt2_folder, "--against", wider, "--dataset", text_file)
    assert "the samples of the models differ" in " ".join(ran.out.split())
    ran = evaluate(gpt2_folder, "--against", wider, "--dataset", text_file, "--block-size", 32)
    assert "differ" not in ran.out.replace("difference", "")


# ---- several models --------------------------------------------------------------------------------------------------


def cells(ran):
    """The header and the rows of the table of several models."""
    assert ran.code == 0, ran.err
    first, second, _, *rows = (line for line in ran.out.splitlines() if line.startswith(" ") and line.strip())
    return f"{first} {second}".split(), [row.split() for row in rows]


def test_several_models_in_one_table(evaluate, gpt2_folder, other_gpt2_folder, text_file):
    losses = [text_loss(folder, text_file.read_text(), 32)[0] for folder in (gpt2_folder, other_gpt2_folder)]
    ran = evaluate(gpt2_folder, other_gpt2_folder, gpt2_folder, "--dataset", text_file)
    assert "model 2 of 3" in ran.out.splitlines()[2]
    header, rows = cells(ran)
    assert " ".join(header) == "bits per bits per word perplexity perplexity byte word perplexity loss vs. first"
    assert [row[0] for row in rows] == [gpt2_folder.name, other_gpt2_folder.name, gpt2_folder.name]
    check([row[-2] for row in rows], [*losses, losses[0]])
    assert [float(row[1]) for row in rows] == pytest.approx(np.exp([*losses, losses[0]]), rel=1e-5)
    assert [row[-1] for row in rows] == ["-", f"{np.exp(losses[1] - losses[0]) - 1:+.3%}", "0.000%"]
    assert "note" not in ran.out


def test_models_with_other_tokenizers_compare_by_bytes(
    evaluate, gpt2_folder, make_gpt2, save_parts, text_file, tmp_path
):
    from hf_ortho.tasks.tokenizer import bpe_tokenizer

    tokenizer = bpe_tokenizer([text_file.read_text()], 270)
    other = save_parts(tmp_path / "other", make_gpt2(vocab_size=len(tokenizer))[0], tokenizer)
    ran = evaluate(gpt2_folder, other, "--dataset", text_file)
    assert "only figures per byte and per word compare" in ran.out
    header, rows = cells(ran)
    assert " ".join(header) == "bits per bits per word bits per byte perplexity byte word perplexity loss vs. first"
    first, second = (float(row[2]) for row in rows)
    assert second < 0.6 * first  # the same uniform guesses, at fewer tokens
    assert float(rows[1][-1].rstrip("%")) == pytest.approx(100 * (second / first - 1), abs=1e-3)
    total = float(rows[1][-2]) * (len(tokenizer(text_file.read_text())["input_ids"]) - 1)
    assert total / np.log(2) / len(text_file.read_text()) == pytest.approx(second, rel=0.05)  # without the first tokens


def test_a_terminal_shows_the_batches(evaluate, gpt2_folder, text_file, monkeypatch):
    from hf_ortho.cli import console, progress
    from hf_ortho.cli import evaluate as command

    out = io.StringIO()
    terminal = console.PlainConsole(soft_wrap=True, file=out, force_terminal=True, width=200)
    for module in (console, progress, command):
        monkeypatch.setattr(module, "console", terminal)
    assert evaluate(gpt2_folder, "--dataset", text_file, "--max-samples", 5, "--batch-size", 2).code == 0
    assert "3/3" in out.getvalue()


def test_models_of_two_tasks_are_refused_before_any_is_evaluated(evaluate, gpt2_folder, convnext_folder, text_file):
    ran = evaluate(gpt2_folder, convnext_folder, "--dataset", text_file)
    assert f"{gpt2_folder} is for causal language modeling and {convnext_folder} for image classif" in ran.error
    assert ran.out == ""


def test_a_model_that_fails_leaves_the_figures_of_those_before(evaluate, gpt2_folder, text_file, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(gpt2_folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"damaged")
    ran = evaluate(gpt2_folder, damaged, gpt2_folder, "--dataset", text_file)
    assert ran.code == 2
    assert "model.safetensors is damaged or truncated" in ran.error
    (line,) = (line.split() for line in ran.out.splitlines() if line.split()[:1] == ["loss"])
    check(line[1:], [text_loss(gpt2_folder, text_file.read_text(), 32)[0]])


def test_copies_of_a_slow_tokenizer_are_one(evaluate, make_gpt2, save_parts, text_file, tmp_path):
    model = make_gpt2(vocab_size=400)[0]
    folders = [save_parts(tmp_path / name, model, ByT5Tokenizer()) for name in ("a", "b")]
    ran = evaluate(folders[0], "--against", folders[1], "--dataset", text_file, "--max-samples", 2)
    assert ran.code == 0
    assert "note" not in ran.out


@pytest.mark.parametrize("flags", [["--mask-probability", 0.3], ["--whole-word-mask"]])
def test_masks_are_for_masked_models(evaluate, gpt2_folder, text_file, flags):
    error = evaluate(gpt2_folder, "--dataset", text_file, *flags).error
    assert f"{flags[0]} is only for masked language modeling, and {gpt2_folder} is for causal" in error


def test_one_revision_per_model_in_their_order(monkeypatch):
    from hf_ortho.cli.evaluate import _models, parser

    def models(*argv):
        return _models(parser().parse_args(list(argv)))

    assert models("a", "b", "--revision", "v1") == [("a", "v1"), ("b", None)]
    assert models("a", "b", "--revision", "v1", "--revision", "v2") == [("a", "v1"), ("b", "v2")]
    assert models("a", "--revision", "v1", "--against", "b") == [("a", "v1"), ("b", None)]
    assert models("a", "--against", "b", "--against-revision", "v2") == [("a", None), ("b", "v2")]


# ---- rolling windows -------------------------------------------------------------------------------------------------


def test_windows_that_overlap(evaluate, gpt2_folder, text_file):
    """Each token after the first window has 24 to 31 tokens before it."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(gpt2_folder).eval(),
        AutoTokenizer.from_pretrained(gpt2_folder),
    )
    ids = tokenizer(text_file.read_text(), return_tensors="pt")["input_ids"][0]
    losses = []
    for begin in range(0, len(ids) - 32 + 8, 8):
        window = ids[begin : begin + 32]
        with torch.no_grad():
            scores = model(input_ids=window[None]).logits[0, :-1].double()
        known = 0 if begin == 0 else 32 - 8 - 1
        losses.append(cross_entropy(scores[known:], window[known + 1 :], reduction="none"))
    losses = torch.cat(losses)
    assert len(losses) == len(ids) - 1
    ran = evaluate(gpt2_folder, "--dataset", text_file, "--stride", 8)
    check(ran.figures["loss"], [losses.mean().item()])
    some = evaluate(gpt2_folder, "--dataset", text_file, "--stride", 8, "--max-samples", 3)
    check(some.figures["loss"], [losses[: 31 + 8 + 8].mean().item()])


# ---- images --------------------------------------------------------------------------------------------------------


def image_figures(folder, samples):
    """Loss, top-1 and top-5 over (pixel_values, label) pairs, by hand."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    labels = torch.tensor([label for _, label in samples])
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([pixels for pixels, _ in samples])).logits.double()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    return [cross_entropy(logits, labels).item(), *((ranks < k).double().mean().item() for k in (1, 5))]


def image_columns(ran):
    return [ran.figures[key][0] for key in ("loss", "top1", "top5")]


def test_top_1_and_top_5_on_digits(evaluate, convnext_folder, make_convnext):
    from hf_ortho.tasks.built_in import digits

    pytest.importorskip("sklearn")
    processor = make_convnext()[1]
    rows = digits()["validation"].select(range(50))
    pixels = [processor([image.convert("RGB")], return_tensors="pt")["pixel_values"][0] for image in rows["image"]]
    expected = image_figures(convnext_folder, list(zip(pixels, rows["label"], strict=True)))
    assert 0 < expected[2] < 1
    ran = evaluate(convnext_folder, "--dataset", "digits", "--max-samples", 50, "--batch-size", 16)
    check(image_columns(ran), expected)
    assert "digits, validation, 50 samples" in ran.out


@pytest.fixture
def parquet_of(tmp_path, make_convnext):
    """Write one random picture per label; (path, samples as the model of ``names`` takes them)."""
    image = pytest.importorskip("PIL.Image")
    processor = make_convnext()[1]

    def make(labels, ids):
        rng = np.random.default_rng(0)
        rows, pixels = [], []
        for _ in labels:
            picture = image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            rows.append({"bytes": buffer.getvalue(), "path": None})
            pixels.append(processor([picture], return_tensors="pt")["pixel_values"][0])
        pa.parquet.write_table(pa.table({"image": rows, "label": labels}), tmp_path / "images.parquet")
        return tmp_path / "images.parquet", list(zip(pixels, ids, strict=True))

    return make


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (list(range(12)) * 2, list(range(12)) * 2),  # 10 does not come before 2
        ([10, 11, 3] * 8, [10, 11, 3] * 8),  # some classes do not occur
        (["frog", "ant"] * 12, [5, 0] * 12),  # names are those of the model
    ],
    ids=["all", "some", "names"],
)
def test_labels_are_the_classes_of_the_model(evaluate, make_convnext, save_parts, parquet_of, tmp_path, labels, ids):
    names = ("ant", "bee", "cat", "dog", "elk", "frog", "gnu", "hen", "ibis", "jay", "kiwi", "lynx")
    folder = save_parts(tmp_path / "model", *make_convnext(names))
    path, samples = parquet_of(labels, ids)
    check(image_columns(evaluate(folder, "--dataset", path)), image_figures(folder, samples))


def test_labels_beyond_the_classes_of_the_model(evaluate, convnext_folder, parquet_of):
    path, _ = parquet_of(list(range(12)), list(range(12)))
    assert "classes" in evaluate(convnext_folder, "--dataset", path).error


# ---- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "/no/such.txt"], "/no/such.txt does not exist"),
        (["--dataset", "nobody/no-such-dataset"], "nobody/no-such-dataset"),
        (["--dataset", "digits"], "no unambiguous text column"),
        (["--split", "missing"], "no split 'missing'; it has: train, validation"),
        (["--text-column", "missing"], "no column 'missing'"),
        (["--block-size", "33"], "block_size 33"),
        (["--block-size", "1"], "block_size 1"),
        (["--max-samples", "0"], "--max-samples 0: must be at least 1"),
        (["--batch-size", "-1"], "--batch-size -1: must be at least 1"),
        (["--batch-size", "many"], "--batch-size"),
        (["--dtype", "float33"], "--dtype"),
        (["--max-samples", "2", "--against", "/no/such/model"], "/no/such/model"),
        (["--agains", "x"], "--agains"),
        (["--stride", "0"], "--stride 0: must be at least 1"),
        (["--stride", "33"], "stride 33: must be between 1 and the block size of 32"),
        (["--stride", "9", "--block-size", "8"], "stride 9: must be between 1 and the block size of 8"),
        (["--revision", "a", "--revision", "b"], "--revision b: there are more than models (1)"),
        (["--against-revision", "v1"], "--against-revision v1 requires --against"),
    ],
)
def test_an_argument_that_does_not_fit(evaluate, gpt2_folder, argv, message):
    assert message in evaluate(gpt2_folder, *argv).error


@pytest.mark.parametrize("place", ["/no/such/model", "nobody/no-such-model", "."])
def test_a_model_that_cannot_be_loaded(evaluate, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(place).error.startswith(place)


def test_no_model(evaluate):
    assert "model" in evaluate().error


def test_images_have_no_stride(evaluate, convnext_folder):
    error = evaluate(convnext_folder, "--dataset", "digits", "--stride", 5).error
    assert f"--stride is only for causal language modeling, and {convnext_folder} is for image" in error


def test_three_models_and_another_one(evaluate, gpt2_folder):
    assert "--against x: for one model" in evaluate(gpt2_folder, gpt2_folder, "--against", "x").error


def test_images_need_a_dataset(evaluate, convnext_folder):
    assert "--dataset is required for ConvNextForImageClassification" in evaluate(convnext_folder).error


def test_a_model_without_a_tokenizer(evaluate, make_gpt2, tmp_path):
    make_gpt2()[0].save_pretrained(tmp_path / "bare")
    assert "has no tokenizer" in evaluate(tmp_path / "bare").error


def test_a_model_of_another_task(evaluate, make_gpt2, save_parts, tmp_path):
    from transformers import GPT2Model

    model, tokenizer = make_gpt2()
    folder = save_parts(tmp_path / "base", GPT2Model(model.config), tokenizer)
    assert "causal language modeling, image classification" in evaluate(folder, "--dataset", "pydoc_topics").error


def test_the_flag_named_for_an_ambiguous_column_works(evaluate, gpt2_folder, tmp_path):
    pa.parquet.write_table(pa.table({"title": ["a " * 99], "body": ["b " * 99]}), tmp_path / "two.parquet")
    error = evaluate(gpt2_folder, "--dataset", tmp_path / "two.parquet").error
    flag = re.search(r"--\w+[-_]column", error).group()
    assert evaluate(gpt2_folder, "--dataset", tmp_path / "two.parquet", flag, "body").code == 0


def test_a_picture_that_cannot_be_decoded(evaluate, convnext_folder, tmp_path):
    for name in ("0", "1"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "broken.png").write_bytes(b"not a picture")
    assert str(tmp_path / "images") in evaluate(convnext_folder, "--dataset", tmp_path / "images").error


def test_long_names_of_models_leave_the_figures_whole(evaluate, gpt2_folder, text_file):
    longer = "/.".join([str(gpt2_folder), *[""] * 30])
    ran = evaluate(longer, "--against", f"{longer}/.", "--dataset", text_file)
    assert ran.figures["loss"][2:] == ["0.00000", "0.000%"]
    assert "…" not in ran.out
