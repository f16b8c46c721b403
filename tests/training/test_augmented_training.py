import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.errors import ConfigError
from hf_ortho.training import ActivationTrainer, AugmentationArguments, MixingCollator, SoftTargetLoss
from hf_ortho.training.augment import check_augmentation

DECAY = 0.6


@pytest.fixture(scope="module")
def colored_pictures(tmp_path_factory):
    """A training folder of 3 x 6 pictures and an evaluation folder of 3 x 2."""
    image = pytest.importorskip("PIL.Image")
    place = tmp_path_factory.mktemp("colored")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("eval", 2)):
        for name in ("red", "green", "blue"):
            (place / part / name).mkdir(parents=True)
            for i in range(count):
                picture = image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8))
                picture.save(place / part / name / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def finetune(hf_ortho_command, convnext_folder, colored_pictures):
    """Five steps of four batches of two; an epoch of nine batches has three steps, the last of one batch."""

    def run(folder, *flags, **changes):
        entries = {
            "model": str(convnext_folder),
            "dataset": str(colored_pictures / "train"),
            "eval_dataset": str(colored_pictures / "eval"),
            "activation": "hermite_3",
            "random_crop": 0.3,
            "horizontal_flip": True,
            "randaugment": [9, 0.5],
            "random_erasing": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
            "label_smoothing_factor": 0.1,
            "ema_decay": DECAY,
            "max_steps": 5,
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "use_cpu": True,
        } | changes
        recipe = folder.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump({key: value for key, value in entries.items() if value is not None}))
        return hf_ortho_command("finetune", "--config", recipe, "--output_dir", folder, *flags)

    return run


@pytest.fixture(scope="module")
def straight(finetune, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    ran = finetune(folder)
    assert ran.code == 0, ran.err
    return folder, ran


def test_the_final_model_is_the_average_of_the_weights(straight, hf_ortho_command, colored_pictures):
    folder, ran = straight
    kept = [load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 6)]
    final = load_file(folder / "model.safetensors")
    moved = 0
    for key, found in final.items():
        expected = kept[0][key].double()
        for weights in kept[1:]:
            expected = DECAY * expected + (1 - DECAY) * weights[key].double()
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7), key
        moved += not torch.allclose(found, kept[-1][key])
    assert moved > 5
    # What the training evaluated is the saved model, on images that no augmentation touched.
    evaluated = hf_ortho_command("evaluate", folder, "--dataset", colored_pictures / "eval").figures["loss"][0]
    assert ran.figures["loss"][1] == evaluated
    history = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    assert f"{history[-1]['eval_loss']:.5f}" == evaluated


def test_a_run_resumed_in_the_middle_of_an_epoch_is_bit_equal(straight, finetune, tmp_path):
    folder, ran = straight
    shutil.copytree(folder / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    resumed = finetune(tmp_path / "run", "--resume_from_checkpoint", "true")
    assert resumed.code == 0, resumed.err
    for file in ("model.safetensors", "checkpoint-5/model.safetensors"):
        expected, found = load_file(folder / file), load_file(tmp_path / "run" / file)
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert resumed.figures["loss"][1] == ran.figures["loss"][1]


def test_the_loss_is_the_mean_over_the_accumulated_batch(make_convnext, tmp_path):
    """With shares of 0 or 1 mixup only changes the order, so each way of making a batch of eight has the same loss."""
    rng = np.random.default_rng(0)
    samples = [
        {"pixel_values": torch.tensor(rng.normal(size=(3, 16, 16)), dtype=torch.float32), "labels": i % 10, "key": i}
        for i in range(8)
    ]
    model, _ = make_convnext()
    inputs = torch.stack([sample["pixel_values"] for sample in samples])
    labels = torch.tensor([sample["labels"] for sample in samples])
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(model.eval()(inputs).logits, labels).item()
    for size, accumulated in ((8, 1), (2, 4)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            learning_rate=0.0,
            max_steps=1,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = ActivationTrainer(
            model,
            arguments,
            train_dataset=samples,
            data_collator=MixingCollator(10, 1e-9, 0.0),
            compute_loss_func=SoftTargetLoss(0.1),
        )
        assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_crop": 0.0}, "random_crop 0.0: must be above 0 and at most 1"),
        ({"random_crop": 1.5}, "random_crop 1.5: must be above 0 and at most 1"),
        ({"random_erasing": -0.1}, "random_erasing -0.1: must be from 0 to 1"),
        ({"mixup": -1.0}, "mixup -1.0: must be at least 0 and finite"),
        ({"cutmix": float("inf")}, "cutmix inf: must be at least 0 and finite"),
        ({"ema_decay": 1.0}, "ema_decay 1.0: must be at least 0 and below 1"),
        ({"ema_decay": float("nan")}, "ema_decay nan: must be at least 0 and below 1"),
        ({"randaugment": [11.0]}, "randaugment 11.0: must be a magnitude between 0 and 10"),
        ({"randaugment": [9.0, -0.5]}, "randaugment 9.0 -0.5: must be a magnitude between 0 and 10"),
        ({"randaugment": [9.0, 0.5, 1.0]}, "randaugment 9.0 0.5 1.0: must be a magnitude between 0 and 10"),
        ({"mixup": 0.8}, "mixup: requires random access to the images"),
    ],
)
def test_values_that_do_not_fit(make_convnext, changes, message):
    checkpoint = Checkpoint(*make_convnext()[:1], None, None, None)
    stream = Dataset.from_dict({"image": [0]}).to_iterable_dataset()
    with pytest.raises(ConfigError, match=message):
        check_augmentation(AugmentationArguments(**changes), TrainingArguments(report_to="none"), checkpoint, stream)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_best_model_at_end": True, "save_steps": 5}, "ema_decay: averages the weights until the last step"),
        ({"dtype": "bfloat16"}, "is torch.bfloat16, too imprecise for an average; set dtype: float32"),
    ],
)
def test_an_average_that_cannot_be_taken(finetune, tmp_path, changes, message):
    assert message in finetune(tmp_path / "run", **changes).error
    assert not (tmp_path / "run").exists()


def test_text_is_not_augmented(finetune, tmp_path, gpt2_folder, text_file):
    changes = {"model": str(gpt2_folder), "dataset": str(text_file), "eval_dataset": None, "random_crop": None}
    message = finetune(tmp_path / "run", **changes).error
    assert message == "horizontal_flip: needs labeled images, which GPT2LMHeadModel does not take"
    assert not (tmp_path / "run").exists()
