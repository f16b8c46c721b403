import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import default_data_collator
from transformers.modeling_outputs import ImageClassifierOutput

from hf_ortho.errors import DataError
from hf_ortho.tasks.images import images as prepared
from hf_ortho.training import AugmentationArguments, AugmentedImages, MixingCollator, SoftTargetLoss
from hf_ortho.training.augment import erase

EVERYTHING = {
    "random_crop": 0.3,
    "horizontal_flip": True,
    "randaugment": [9.0, 0.5],
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
}


@pytest.fixture(scope="module")
def processor(make_convnext):
    pytest.importorskip("PIL")
    return make_convnext()[1]


def picture(seed, width=16, height=16):
    from PIL import Image as PILImage

    rng = np.random.default_rng(seed)
    return PILImage.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def images(processor):
    """Twelve pictures of 16 x 16 and of other sizes, in three classes."""
    sizes = [(16, 16), (16, 16), (40, 20), (18, 30)] * 3
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    columns = {"image": [picture(i, *size) for i, size in enumerate(sizes)], "label": [i % 3 for i in range(12)]}
    return prepared(Dataset.from_dict(columns, features=features), processor)


def augmented(images, processor, seed=0, **options):
    return AugmentedImages(images, processor, AugmentationArguments(**options), seed)


def pixels(samples):
    return torch.stack([sample["pixel_values"] for sample in samples])


# ---- each image ----------------------------------------------------------------------------------------------------


def test_without_an_operation_images_are_as_before(images, processor):
    samples = augmented(images, processor)
    assert len(samples) == 12
    for i in range(12):
        assert samples[i].keys() == images[i].keys()
        assert torch.equal(samples[i]["pixel_values"], images[i]["pixel_values"])
        assert samples[i]["labels"] == images[i]["labels"]


def test_images_depend_on_seed_epoch_and_row_alone(images, processor):
    samples = augmented(images, processor, **EVERYTHING)
    first = samples.__getitems__(range(12))
    torch.manual_seed(1)
    np.random.seed(1)
    for i in (7, 0, 3):
        again = samples[i]
        assert torch.equal(again["pixel_values"], first[i]["pixel_values"])
        assert again["key"] == first[i]["key"]
    samples.set_epoch(1)
    later = samples.__getitems__(range(12))
    other = augmented(images, processor, seed=1, **EVERYTHING).__getitems__(range(12))
    for changed in (later, other):
        assert not any(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, changed, strict=True))
        assert len({s["key"] for s in (*first, *changed)}) == 24
    samples.set_epoch(0)
    assert torch.equal(pixels(samples.__getitems__(range(12))), pixels(first))


def test_workers_give_the_same_batches_and_follow_the_epoch(images, processor):
    samples = augmented(images, processor, **EVERYTHING)
    options = {"batch_size": 4, "collate_fn": MixingCollator(3, 0.8, 1.0)}
    loaders = [torch.utils.data.DataLoader(samples, num_workers=n, persistent_workers=n > 0, **options) for n in (0, 1)]
    for epoch in (0, 1):
        samples.set_epoch(epoch)
        for here, there in zip(*loaders, strict=True):
            assert torch.equal(here["pixel_values"], there["pixel_values"])
            assert torch.equal(here["labels"], there["labels"])


def test_half_of_the_images_are_mirrored(images, processor):
    samples = augmented(images, processor, horizontal_flip=True)
    square, mirrored = 0, 0
    for epoch in range(50):
        samples.set_epoch(epoch)
        for i in (0, 1, 4, 5):
            before, after = images[i]["pixel_values"], samples[i]["pixel_values"]
            square += torch.equal(after, before)
            mirrored += torch.equal(after, before.flip(-1))
    assert square + mirrored == 200
    assert abs(mirrored - 100) < 5 * np.sqrt(50)


def test_a_crop_has_the_size_of_the_evaluation_images_and_its_colors(images, processor):
    samples = augmented(images, processor, random_crop=1.0)
    # A box of the whole square picture is the picture.
    for i in (0, 1, 4):
        assert torch.allclose(samples[i]["pixel_values"], images[i]["pixel_values"], atol=1e-6)
    assert {tuple(s["pixel_values"].shape) for s in samples.__getitems__(range(12))} == {(3, 16, 16)}


def test_crops_of_processors_that_cut_the_center(images):
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 8, "width": 10})
    raw = images.with_format(None)
    samples = augmented(prepared(raw, processor), processor, random_crop=0.3)
    assert samples[2]["pixel_values"].shape == (3, 8, 10)


def test_erasing_replaces_a_rectangle_by_noise():
    rng = np.random.default_rng(0)
    shares, ratios, values = [], [], []
    for _ in range(300):
        image = torch.full((3, 40, 50), 100.0)
        erase(image, rng)
        changed = (image != 100).all(0)
        assert torch.equal((image != 100).any(0), changed)
        rows, columns = changed.any(1), changed.any(0)
        height, width = int(rows.sum()), int(columns.sum())
        assert int(changed.sum()) == height * width > 0
        assert bool(changed[rows.nonzero().min() :, columns.nonzero().min() :][:height, :width].all())
        shares.append(height * width / 2000)
        ratios.append(height / width)
        values.append(image[:, changed].flatten())
    assert 0.015 < min(shares) < 0.04 < 0.28 < max(shares) < 0.35
    assert 0.25 < min(ratios) < 0.5 < 2 < max(ratios) < 3.8
    everything = torch.cat(values)
    assert everything.mean() == pytest.approx(0, abs=0.01)
    assert everything.std() == pytest.approx(1, abs=0.01)


def test_the_probability_of_erasing(images, processor):
    samples = augmented(images, processor, random_erasing=0.25)
    plain = pixels([images[i] for i in range(12)])
    erased = 0
    for epoch in range(30):
        samples.set_epoch(epoch)
        erased += int((pixels(samples.__getitems__(range(12))) != plain).flatten(1).any(1).sum())
    assert abs(erased - 90) < 5 * np.sqrt(360 * 0.25 * 0.75)


def test_a_broken_image_is_named(processor):
    rows = {"image": [{"bytes": b"no image", "path": None}], "label": [0]}
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a"])})
    whole = {"image": [{"bytes": png(), "path": None}], "label": [0]}
    both = Dataset.from_dict({k: whole[k] + rows[k] for k in rows}, features=features)
    samples = AugmentedImages(prepared(both, processor), processor, AugmentationArguments(), 0, "corpus")
    with pytest.raises(DataError, match="corpus: the image in row 2 is not in a known image format"):
        samples[1]


def png():
    buffer = io.BytesIO()
    picture(0).save(buffer, "png")
    return buffer.getvalue()


# ---- batches -------------------------------------------------------------------------------------------------------


def constant_samples(keys, side=12):
    """Image i is filled with i and has the class i."""
    return [
        {"pixel_values": torch.full((3, side, side), float(i)), "labels": i, "key": int(key)}
        for i, key in enumerate(keys)
    ]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_are_the_shares_of_the_images(mixup, cutmix):
    collate, rng = MixingCollator(4, mixup, cutmix), np.random.default_rng(0)
    shares, kinds = [], []
    for _ in range(400):
        batch = collate(constant_samples(rng.integers(2**63, size=4)))
        images, labels = batch["pixel_values"], batch["labels"]
        assert labels.shape == (4, 4)
        share = float(labels[0, 0])
        expected = torch.lerp(torch.eye(4).flip(0), torch.eye(4), share)
        assert torch.allclose(labels, expected, atol=1e-6)
        # Both mix the means alike; only cutmix leaves every pixel one of the two.
        means = images.mean((1, 2, 3))
        assert torch.allclose(means, labels @ torch.arange(4.0), atol=1e-5)
        kinds.append(bool(((images[0] == 0) | (images[0] == 3)).all()))
        if kinds[-1]:
            other = images[0, 0] == 3
            assert int(other.sum()) == int(other.any(0).sum()) * int(other.any(1).sum())
            assert torch.equal(images[0] == 3, images[3] == 0)
        shares.append(share)
    shares, cut = np.array(shares), np.array(kinds)
    if mixup and cutmix:
        assert abs(cut.sum() - 200) < 5 * np.sqrt(100)
    else:
        assert cut.mean() == (cutmix > 0)
    if mixup:
        # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2 a + 1)).
        mixed = shares[~cut]
        assert mixed.mean() == pytest.approx(0.5, abs=0.1)
        assert mixed.var() == pytest.approx(1 / (4 * 2.6), rel=0.2)


def test_a_batch_is_the_same_for_the_same_samples():
    collate = MixingCollator(4, 0.8, 1.0)
    first, again, other = (collate(constant_samples(keys)) for keys in ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5]))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["labels"], other["labels"])


def test_evaluation_samples_are_batched_as_they_are(images):
    samples = [images[i] for i in range(4)]
    found, expected = MixingCollator(3, 0.8, 1.0)(samples), default_data_collator(samples)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [True, False])
def test_loss_against_its_formula_and_over_an_accumulated_batch(smoothing, soft):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 5))
    targets = rng.dirichlet(np.ones(5), 6) if soft else np.eye(5)[rng.integers(5, size=6)]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -((1 - smoothing) * targets + smoothing / 5) * log_p
    expected = expected.sum(1).mean()

    labels = torch.tensor(targets, dtype=torch.float32) if soft else torch.tensor(targets.argmax(1))
    scores, loss = torch.tensor(logits, dtype=torch.float32), SoftTargetLoss(smoothing)
    assert float(loss(ImageClassifierOutput(logits=scores), labels)) == pytest.approx(expected, rel=1e-6)
    # As the Trainer counts them: the entries of the labels of all the micro-batches.
    count = sum(part.ne(-100).sum() for part in (labels[:2], labels[2:]))
    parts = [loss(ImageClassifierOutput(logits=scores[s]), labels[s], count) for s in (slice(2), slice(2, 6))]
    assert float(sum(parts)) == pytest.approx(expected, rel=1e-6)
