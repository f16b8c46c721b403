"""Pixels of any depth as 8-bit RGB, against numpy; images and labels that are missing or broken."""

import io
import struct
import zlib

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.errors import DataError
from hf_ortho.tasks.image_classification import IMAGE_CLASSIFICATION
from hf_ortho.tasks.images import images, rgb
from hf_ortho.tasks.labels import class_names, with_classes
from hf_ortho.tasks.samples import load_splits
from hf_ortho.training import DataArguments

PIL = pytest.importorskip("PIL.Image")
RAMP = np.arange(65536).reshape(256, 256)


@pytest.fixture(scope="module")
def processor(make_convnext):
    return make_convnext()[1]


def encoded(picture, kind="png"):
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def noise(seed):
    return encoded(PIL.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)))


def rows_of(*content, labels=None):
    """A dataset with an image column of encoded images, undecoded, and labels."""
    features = {"image": Image(decode=False)} | ({} if labels is None else {"label": ClassLabel(names=["a", "b"])})
    columns = {"image": [None if c is None else {"bytes": c, "path": None} for c in content]}
    return Dataset.from_dict(columns | ({} if labels is None else {"label": labels}), features=Features(features))


# ---- pixels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind"), [("<u2", "png"), ("<u2", "tiff"), (">u2", "tiff"), ("<u2", "ppm"), ("<i4", "ppm")]
)
def test_sixteen_bits_keep_their_range(dtype, kind):
    """All 65536 values: 0 is black, 65535 is white, and each gray is the closest of the 256."""
    picture = PIL.open(io.BytesIO(encoded(PIL.fromarray(RAMP.astype(dtype)), kind)))
    found = np.asarray(rgb(picture))
    expected = np.rint(RAMP / 65535 * 255).astype(np.uint8)
    assert (found == expected[..., None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_eight_bits_are_as_pillow_converts_them(mode):
    picture = PIL.open(io.BytesIO(noise(0))).convert(mode)
    assert (np.asarray(rgb(picture)) == np.asarray(picture.convert("RGB"))).all()


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "integers"), (np.float32, "floats")])
def test_pixels_without_a_known_range_are_refused(processor, dtype, kind):
    rows = rows_of(noise(0), encoded(PIL.fromarray(np.ones((16, 16), dtype)), "tiff"))
    samples = images(rows, processor, name="scans", labeled=False)
    assert list(samples[0]) == ["pixel_values"]
    with pytest.raises(DataError, match=rf"^scans: the image in row 2 cannot be read: its pixels are .*{kind}, whose"):
        samples[1]


def bomb():
    """A PNG file that claims 400 million pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0), b"IDAT" + zlib.compress(b"")
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: noise(1)[:200], "cannot be read: image file is truncated"),
        (lambda: b"words", "is not in a known image format"),
        (lambda: b"", "is not in a known image format"),
        (lambda: None, "is missing"),
        (bomb, r"cannot be read: Image size \(400000000 pixels\) exceeds limit"),
    ],
    ids=["truncated", "text", "empty", "missing", "bomb"],
)
def test_a_broken_image_is_located(processor, broken, message):
    rows = rows_of(noise(0), noise(1), broken(), labels=[0, 1, 0])
    samples = images(rows, processor, name="scans").select([2, 0])  # the number in the dataset
    with pytest.raises(DataError, match=f"^scans: the image in row 3 {message}"):
        samples[0]
    unnumbered = images(rows, processor, name="scans", numbered=False)
    with pytest.raises(DataError, match=f"^scans: an image {message}"):
        unnumbered[2]


def test_the_file_of_a_broken_image_is_named(processor, tmp_path):
    (tmp_path / "3.png").write_bytes(noise(0)[:200])
    rows = Dataset.from_dict({"image": [str(tmp_path / "3.png"), "/none/4.png"]}).cast_column("image", Image())
    samples = images(rows, processor, name="scans", labeled=False)
    with pytest.raises(DataError, match=r"^scans: the image in row 1 \(3.png\) cannot be read: image file is trunc"):
        samples[0]
    with pytest.raises(DataError, match=r"^scans: the image in row 2 \(4.png\) cannot be read: .*No such file"):
        samples[1]


def test_a_column_without_images(processor):
    with pytest.raises(DataError, match=r"^scans: column 'image' does not contain images"):
        images(Dataset.from_dict({"image": [1, 2]}), processor, name="scans", labeled=False)


# ---- labels --------------------------------------------------------------------------------------------------------


def labeled(values, feature):
    columns = {"label": values, "id": list(range(len(values)))}
    return Dataset.from_dict(columns, features=Features({"label": feature, "id": Value("int64")}))


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        ([0, None, 1], Value("int64"), "None in row 2: the label is missing"),
        ([0, 1, -1], Value("int64"), "-1 in row 3: a label must not be negative"),
        ([0, -1, 1], ClassLabel(names=["a", "b"]), "-1 in row 2: a label must not be negative"),
        ([None, 1], ClassLabel(names=["a", "b"]), "None in row 1: the label is missing"),
        ([0.0, float("nan")], Value("float64"), "nan in row 2: the label is missing"),
        ([0.0, 1.0, 0.5], Value("float32"), "0.5 in row 3: a label must be an integer or a name"),
        ([0.0, float("inf")], Value("float32"), "inf in row 2: a label must be an integer or a name"),
        (["a", None], Value("string"), "None in row 2: the label is missing"),
    ],
)
def test_a_value_that_is_no_label_is_located(values, feature, message):
    with pytest.raises(DataError, match=f"^scans: column 'label' contains {message}"):
        with_classes(labeled(values, feature), "label", [], "scans")


def test_several_labels_per_row_are_refused():
    with pytest.raises(DataError, match=r"contains \[0, 1\] in row 1: each row must have one label"):
        with_classes(Dataset.from_dict({"label": [[0, 1], [1]]}), "label", [], "scans")


def test_whole_numbers_of_any_type_are_the_same_labels():
    for dtype in ("int8", "uint16", "int64", "float32", "float64"):
        found = with_classes(labeled([2, 0, 1], Value(dtype)), "label", [], "scans")
        assert (found["label"][:], class_names(found)) == ([2, 0, 1], ["0", "1", "2"])


@pytest.fixture
def pictures(tmp_path):
    """Save a dataset of images with the labels given."""

    def make(name, labels):
        rows = Dataset.from_dict({"image": [{"bytes": noise(i), "path": None} for i in range(len(labels))]})
        rows.cast_column("image", Image()).add_column("label", labels).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize(
    ("train", "held_back", "message"),
    [
        (
            ["cat", "dog", "cat"],
            ["dog", "emu"],
            "the class 'emu', which is not among the 2 classes of the",
        ),
        ([0, 1, 2], [0, 7], "has the label 7, but the training data has 3 classes, numbered from 0"),
    ],
)
def test_evaluation_data_with_other_classes(make_convnext, pictures, train, held_back, message):
    arguments = DataArguments(dataset=pictures("train", train), eval_dataset=pictures("held_back", held_back))
    checkpoint = Checkpoint(make_convnext(("x", "y"))[0], None, make_convnext()[1], None)
    with pytest.raises(DataError, match=message) as caught:
        load_splits(checkpoint, arguments)
    assert str(caught.value).startswith(arguments.eval_dataset)


@pytest.mark.parametrize(("train", "held_back"), [(["cat", "dog", "emu"], ["emu", "dog"]), ([0, 1, 2], [2, 1])])
def test_evaluation_data_with_fewer_classes(make_convnext, pictures, train, held_back):
    arguments = DataArguments(dataset=pictures("train", train), eval_dataset=pictures("held_back", held_back))
    checkpoint = Checkpoint(make_convnext(("x", "y"))[0], None, make_convnext()[1], None)
    assert [sample["labels"] for sample in load_splits(checkpoint, arguments)[1]] == [2, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bird", "cat"], "the dataset has the class 'bird', which .* does not have"),
        (["cat", "emu", "dog", "fox"], "the dataset has 4 classes, .* has 3"),
        (["dog", "gull", "cat"], "the dataset has the class 'gull'"),
        (["cat", "Dog", "emu"], None),  # another spelling at the same place
        (["0", "1"], None),
        (["x", "y", "z"], None),
    ],
)
def test_classes_that_an_evaluated_model_has(make_convnext, names, message):
    model = make_convnext(("cat", "dog", "emu"))[0]
    samples = labeled([0], ClassLabel(names=names))
    if message is None:
        IMAGE_CLASSIFICATION.check(model, samples)
        return
    with pytest.raises(DataError, match=message):
        IMAGE_CLASSIFICATION.check(model, samples)
