"""A trained text classifier and an adapter of one, pushed to a stand-in for the Hub and evaluated from there."""

import pytest
from huggingface_hub import ModelCard
from stand_in import Repositories, hub
from transformers import TrainingArguments

from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.training import DataArguments, ModelArguments, Recipe, evaluate_model, finetune

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_a_classifier_from_the_hub_gives_the_metrics_of_its_training(
    gpt2_folder, hf_ortho_command, connect, tmp_path, adapter
):
    rows = "".join(f"a fine film {i},pos\na dull film {i},neg\n" for i in range(20))
    (tmp_path / "data.csv").write_text(f"text,label\n{rows}")
    training = {"max_steps": 3, "learning_rate": 0.01, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    training = TrainingArguments(str(tmp_path / "out"), disable_tqdm=True, **training)
    options = {"task": "text-classification", "activation": "hermite_3", "train": "activations", "adapter": adapter}
    recipe = Recipe(
        ModelArguments(model=str(gpt2_folder), **options), DataArguments(str(tmp_path / "data.csv")), training
    )
    result = finetune(recipe)
    repositories = Repositories()
    with hub(repositories) as endpoint:
        connect(endpoint)
        base = ["--base-model", "me/base"] if adapter else []
        for argv in (["push", gpt2_folder, "me/base"], ["push", tmp_path / "out", "me/reviews", *base]):
            done = hf_ortho_command(*argv)
            assert done.code == 0, done.err
        pushed = repositories.get("models", "me/reviews").files("main")
        place = "me/reviews"
        if adapter:  # peft keeps the address of the Hub from its import: a copy, with its base from the stand-in
            place = tmp_path / "copy"
            place.mkdir()
            for name, content in pushed.items():
                (place / name).write_bytes(content)
        loaded = load_checkpoint(str(place))
        assert loaded.model.config.id2label == {0: "neg", 1: "pos"}
        assert evaluate_model(loaded, result.held_back) == pytest.approx(result.after, abs=1e-5)
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.pipeline_tag == "text-classification"
    assert "The classes are neg, pos." in card.text
    place = 'AutoTokenizer.from_pretrained("me/reviews")' if adapter else 'Classification.from_pretrained("me/reviews")'
    assert place in card.text
