"""Adapters that earlier versions wrote keep loading, and this version writes the same."""

import adapter_formats
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft
FOLDERS = sorted(path.parent for path in adapter_formats.FIXTURES.glob("*/*/adapter_config.json"))


def test_there_are_fixtures():
    assert len(FOLDERS) >= 5


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_an_adapter_on_file_gives_the_logits_of_its_day(folder):
    base = adapter_formats.base("hermite_4" if folder.name.startswith("lora") else "gelu_new")
    model = PeftModel.from_pretrained(base, folder).eval()
    expected = load_file(folder / "expected.safetensors")["logits"]
    with torch.no_grad():
        torch.testing.assert_close(model(adapter_formats.IDS).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(adapter_formats.IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_is_written_today_has_the_tensors_on_file(tmp_path):
    adapter_formats.main(tmp_path, ["hermite"])
    latest = adapter_formats.FIXTURES / "1"
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["hermite_4", "lora_and_hermite_4"]
    for folder in tmp_path.iterdir():
        kept, written = (load_file(f / folder.name / "adapter_model.safetensors") for f in (latest, tmp_path))
        assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in kept.items()}
