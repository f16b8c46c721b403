"""An ONNX graph, pushed to a stand-in for the Hub and run from there by the code on its card."""

import pytest
import torch
from huggingface_hub import ModelCard
from stand_in import Repositories, hub

from hf_ortho.checkpoints.load import load_checkpoint

pytestmark = [
    pytest.mark.slow,  # exports a graph
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # huggingface_hub's own
]


def test_the_code_on_the_pushed_card_runs(make_gpt2, save_parts, hf_ortho_command, connect, capsys, caplog, tmp_path):
    converted, folder = tmp_path / "converted", tmp_path / "graph"
    source = save_parts(tmp_path / "source", *make_gpt2(n_positions=64))
    for argv in (["convert", source, "-o", converted, "--degree", 3], ["export", converted, "-o", folder]):
        assert hf_ortho_command(*argv).code == 0
    repositories = Repositories()
    with hub(repositories) as endpoint:
        connect(endpoint)
        pushed = hf_ortho_command("push", folder, "me/graph")
        assert (pushed.code, pushed.err) == (0, ""), pushed.err
        files = repositories.get("models", "me/graph").files("main")
        assert {*files} == {
            *(".gitattributes", "README.md", "activations.png", "config.json", "conversion.json"),
            *("generation_config.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"),
        }
        assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
        (code,) = ModelCard.load("me/graph").text.split("```python\n")[1:]
        assert 'folder = snapshot_download("me/graph")' in code
        scope = {}
        capsys.readouterr()
        exec(code.partition("```")[0], scope)
        assert capsys.readouterr().out.startswith("Once upon a time")

        (folder / "onnx" / "model.onnx_data").write_bytes(b"of an earlier push")
        assert hf_ortho_command("push", folder, "me/graph").code == 0
        (folder / "onnx" / "model.onnx_data").unlink()
        assert hf_ortho_command("push", folder, "me/graph").code == 0
        assert repositories.get("models", "me/graph").files("main").keys() == files.keys()
        assert hf_ortho_command("push", converted, "me/graph").code == 0
        assert caplog.messages[-1].startswith("note: me/graph still has onnx/model.onnx; if it has other weights")

    checkpoint = load_checkpoint(str(converted))
    ids = checkpoint.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    checkpoint.model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 32, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert scope["text"][0].tolist() == checkpoint.model.generate(ids, **options)[0].tolist()
