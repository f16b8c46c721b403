"""``python -m tests.pretrained`` on tiny models: the numbers in its tables, and its errors."""

import contextlib
import importlib.machinery
import io
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, GPT2LMHeadModel

import hf_ortho

from .__main__ import main
from .inputs import TEXTS, sampled

SIZE, BLOCKS = 32, 2
ROUNDED = 0.006  # the table has three digits


def run(folder, text, *options, torchortho=None):
    """``rows, model``: the printed cells by fit, and the JSON results of the model."""
    path = folder / "results.json"
    options = ["--activations", "hermite_3", "--block-size", SIZE, "--test-blocks", BLOCKS, *options, "--json", path]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchortho", torchortho)
        assert main([str(v) for v in [folder, "--text", text, *options]]) == 0
    lines = [line for line in out.getvalue().splitlines() if line.startswith(" ")]  # of the table, not of its notes
    rows = {cells[1]: cells[2:] for line in lines if (cells := line.split())[:1] == ["hermite_3"]}
    (model,) = json.loads(path.read_text())["models"]
    return rows, model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, make_gpt2, save_parts):
    """With weights so large that the divergences are far above rounding, and each calibrated fit is kept."""
    return save_parts(tmp_path_factory.mktemp("gpt2"), *make_gpt2(initializer_range=0.3))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "numbers.txt"
    path.write_text(" ".join(map(str, range(100))))
    return path


@pytest.fixture(scope="module")
def language(gpt2, text_file, numbers):
    return run(gpt2, text_file, "--other", numbers, "--other-blocks", 1)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["data-free", "density", "fisher"])
def test_table_of_a_language_model(language, gpt2, text_file, numbers, make_gpt2, way):
    _, tokenizer = make_gpt2()
    text = text_file.read_text()
    first, second, other = (
        torch.tensor(tokenizer(t)["input_ids"])
        for t in (text[: len(text) // 2], text[len(text) // 2 :], numbers.read_text())
    )
    source, model = (GPT2LMHeadModel.from_pretrained(gpt2).eval() for _ in range(2))
    # the second of the five blocks is held out of the fits, so four remain, the default
    calibration = {"calibration": list(first[: 5 * SIZE].view(5, 1, SIZE)), "weights": way}
    hf_ortho.convert(model, "hermite_3", **({} if way == "data-free" else calibration))

    def log_probabilities(m, ids):
        with torch.no_grad():
            return m(ids).logits.double().log_softmax(-1)

    def kl(ids):
        p, q = log_probabilities(source, ids), log_probabilities(model, ids)
        return float((p.exp() * (p - q)).sum(-1).mean())

    rows, results = language
    (found,) = [result for result in results["results"] if result["way"] == way]
    shown = rows[way]
    blocks = second[: BLOCKS * SIZE].view(BLOCKS, SIZE)
    assert kl(blocks) > 1e-4
    assert len({row[0] for row in rows.values()}) == 3
    assert float(shown[0]) == pytest.approx(kl(blocks), rel=ROUNDED)
    assert found["test"]["kl"] == pytest.approx(kl(blocks), rel=1e-4)  # logits in float32
    assert float(shown[4]) == pytest.approx(kl(other[None, :SIZE]), rel=ROUNDED)
    p, q = log_probabilities(source, blocks), log_probabilities(model, blocks)
    losses = [-float(x[:, :-1].gather(-1, blocks[:, 1:, None]).mean()) for x in (p, q)]
    assert float(shown[1].rstrip("%")) / 100 == pytest.approx(math.exp(losses[1] - losses[0]) - 1, abs=1e-5)
    assert shown[2] == f"{float((p.argmax(-1) == q.argmax(-1)).double().mean()):.2%}"


def test_table_of_an_encoder(tmp_path, make_gpt2, save_parts, text_file):
    _, tokenizer = make_gpt2()
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=SIZE, initializer_range=0.5, **sizes)
    rows, _ = run(save_parts(tmp_path, BertModel(config), tokenizer), text_file)
    source, model = (AutoModel.from_pretrained(tmp_path).eval() for _ in range(2))
    hf_ortho.convert(model, "hermite_3")
    text = text_file.read_text()
    lines = [line.strip() for line in text[len(text) // 2 :].splitlines()][: BLOCKS * TEXTS]
    away, squares = [], np.zeros(2)
    for line in lines:  # one by one, so without padding
        with torch.no_grad():
            z, y = (
                m(torch.tensor([tokenizer(line)["input_ids"][:SIZE]])).last_hidden_state[0].double().numpy()
                for m in (source, model)
            )
        squares += ((y - z) ** 2).sum(), (z**2).sum()
        u, v = z.mean(0), y.mean(0)
        away.append(1 - u @ v / np.sqrt((u @ u) * (v @ v)))
    error, mean, worst = map(float, rows["data-free"][:3])
    assert error == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=ROUNDED)
    assert mean == pytest.approx(np.mean(away), rel=ROUNDED)
    assert worst == pytest.approx(max(away), rel=ROUNDED)


def test_samples_count_up_to_their_end(make_gpt2):
    model, _ = make_gpt2(vocab_size=5, bos_token_id=0, eos_token_id=3, pad_token_id=4)
    (batch,) = sampled(model.eval(), 1, SIZE, seed=0)
    assert batch["input_ids"].shape == (TEXTS, batch["attention_mask"].shape[1])
    lengths = set()
    for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        length = ids.index(3) + 1 if 3 in ids else SIZE
        assert mask == [1] * length + [0] * (len(ids) - length)
        lengths.add(length)
    assert len(lengths) > 1
    assert torch.equal(sampled(model, 1, SIZE, seed=0)[0]["input_ids"], batch["input_ids"])


def test_model_without_tokenizer(tmp_path, make_gpt2, save_parts, text_file):
    rows, results = run(save_parts(tmp_path, make_gpt2()[0]), text_file)
    assert list(rows) == ["data-free", "density", "fisher"]
    assert results["inputs"] == "sampled from the model, which has no tokenizer"
    assert list(results["tokens"]) == ["calibration", "test", "random"]


def test_torchortho_as_a_baseline(gpt2, text_file):
    class Exact(torch.nn.Module):
        """A fit without any error."""

        def __init__(self, degree, act_init, load_cached):
            super().__init__()
            assert (degree, load_cached) == (3, False)
            self.act = act_init

        def forward(self, x):
            return self.act(x)

    library = types.ModuleType("torchortho")
    library.__spec__ = importlib.machinery.ModuleSpec("torchortho", None)
    library.HermiteActivation = Exact
    rows, _ = run(gpt2, text_file, torchortho=library)
    assert list(rows) == ["data-free", "density", "fisher", "torchortho"]
    assert rows["torchortho"][:4] == ["0.00e+00", "0.000%", "100.00%", "0.00e+00"]
    assert float(rows["data-free"][0]) > 0


def test_errors(tmp_path, text_file, capsys, gpt2):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    short = tmp_path / "short.txt"
    short.write_text("a b c " * 12)
    for folder, text, reason in (
        (missing, text_file, f"{missing} does not exist"),
        (empty, text_file, f"{empty} is not a checkpoint"),
        (gpt2, tmp_path / "absent.txt", "absent.txt cannot be read"),
        (gpt2, short, "is too short: it has 1 of 5 blocks"),
    ):
        assert main([str(folder), "--text", str(text), "--block-size", str(SIZE)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert reason in line
