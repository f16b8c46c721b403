import numpy as np
import pytest

image = pytest.importorskip("PIL.Image")
pictures = pytest.importorskip("hf_ortho.training.pictures")


def ramp(width, height, step=2):
    """Red grows with x, green with y, by ``step`` per pixel."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return image.fromarray(np.stack([step * x, step * y, 0 * x], -1).astype(np.uint8))


def noise(width=16, height=12):
    return image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- crop ----------------------------------------------------------------------------------------------------------


def test_a_crop_is_a_box_of_the_picture_with_area_and_ratio_in_range():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        crop = np.asarray(pictures.random_resized_crop(ramp(120, 90), (40, 40), 0.1, rng)).astype(float)
        assert crop.shape == (40, 40, 3)
        # Two units per pixel of the picture: the slope in the middle times 40 is the box, the mean its center.
        box = [np.diff(crop[10:30, 10:30, c].mean(c)[[0, -1]])[0] / 2 / 19 * 40 for c in (0, 1)]
        center = [crop[..., c].mean() / 2 + 0.5 for c in (0, 1)]
        assert all(m - b / 2 > -1 and m + b / 2 < n + 1 for m, b, n in zip(center, box, (120, 90), strict=True))
        found.append(box)
    width, height = np.array(found).T
    share, ratio = width * height / (120 * 90), width / height
    assert 0.09 < share.min() < 0.15 < 0.8 < share.max() < 1.02
    assert 0.72 < ratio.min() < 0.8 < 1.25 < ratio.max() < 1.38


@pytest.mark.parametrize(("size", "box"), [((20, 20), (20, 20)), ((90, 20), (27, 20)), ((20, 90), (20, 27))])
def test_a_crop_that_fits_no_box_takes_the_largest_of_a_ratio_in_range(size, box):
    picture = ramp(*size)
    crop = np.asarray(pictures.random_resized_crop(picture, box, 1.0, np.random.default_rng(0)))
    x = 0 if size[0] == box[0] else int(crop[0, 0, 0]) // 2
    y = 0 if size[1] == box[1] else int(crop[0, 0, 1]) // 2
    assert np.array_equal(crop, np.asarray(picture.crop((x, y, x + box[0], y + box[1]))))


# ---- RandAugment ---------------------------------------------------------------------------------------------------

FORMULAS = {
    "invert": (0.3, lambda p: 255 - p),
    "solarize": (0.5, lambda p: np.where(p < 128, p, 255 - p)),
    "solarize_add": (-0.5, lambda p: np.where(p < 128, p + 55, p)),
    "posterize": (0.5, lambda p: p // 64 * 64),
    "brightness": (-0.5, lambda p: p * 0.55),
    "color": (1 / 0.9, lambda p: np.clip(2 * p - gray(p), 0, 255)),
    "contrast": (-0.5, lambda p: 0.55 * p + 0.45 * gray(p).mean()),
    "translate_x": (4 / 16 / 0.45, lambda p: np.concatenate([p[:, 4:], outside(p[:, :4])], 1)),
    "translate_y": (-3 / 12 / 0.45, lambda p: np.concatenate([outside(p[:3]), p[:-3]])),
    "rotate": (6.0, lambda p: p[::-1, ::-1]),
}


def gray(p):
    return (p @ [0.299, 0.587, 0.114])[..., None]


def outside(p):
    return np.broadcast_to([10.0, 20.0, 30.0], p.shape)


@pytest.mark.parametrize("name", FORMULAS)
def test_operations_follow_their_formula(name):
    level, formula = FORMULAS[name]
    found = np.asarray(pictures.OPERATIONS[name](noise(), level, (10, 20, 30))).astype(float)
    expected = formula(np.asarray(noise()).astype(float))
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("axis", ["x", "y"])
def test_shear_moves_each_line_in_proportion_to_its_place(axis):
    sheared = np.asarray(pictures.OPERATIONS[f"shear_{axis}"](ramp(60, 60), 0.5, (0, 0, 0))).astype(float)
    x, y = np.meshgrid(np.arange(60), np.arange(60))
    along, across, channel = (x, y, 0) if axis == "x" else (y, x, 1)
    expected = 2 * (along + 0.15 * (across + 0.5))
    inside = (expected < 110) & (along > 2)
    assert np.abs(sheared[..., channel] - expected)[inside].max() <= 1


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_operations_without_a_level_use_the_whole_range(name):
    dull = image.fromarray((100 + np.asarray(noise(64, 64)) // 8).astype(np.uint8))
    found = np.asarray(pictures.OPERATIONS[name](dull, 0.9, (0, 0, 0)))
    assert (found.min(), found.max()) == (0, 255)


def test_every_operation_keeps_the_size_and_changes_the_picture():
    sample = image.fromarray(60 + np.asarray(noise(40, 30)) // 2)
    for name, operation in pictures.OPERATIONS.items():
        for level in (-0.9, 0.9):
            found = operation(sample, level, (1, 2, 3))
            assert (found.size, found.mode) == (sample.size, "RGB")
            assert found.tobytes() != sample.tobytes(), name


def test_rand_augment_draws_two_operations_and_their_levels(monkeypatch):
    drawn = []
    recording = {
        name: lambda p, level, fill, name=name: drawn.append((name, level, fill)) or p for name in pictures.OPERATIONS
    }
    monkeypatch.setattr(pictures, "OPERATIONS", recording)
    rng = np.random.default_rng(0)
    for _ in range(3000):
        pictures.rand_augment(None, 8, 0.5, (1, 2, 3), rng)
    names, levels, fills = zip(*drawn, strict=True)
    # Two of fifteen, each with probability 1/2: 3000 operations, of N(8, 0.5²) tenths in both directions.
    assert len(drawn) == pytest.approx(3000, abs=5 * np.sqrt(1500))
    counts = [names.count(name) for name in recording]
    assert len(counts) == 15
    assert max(abs(np.array(counts) - 200)) < 5 * np.sqrt(200)
    assert np.abs(levels).mean() == pytest.approx(0.8, abs=0.005)
    assert np.abs(levels).std() == pytest.approx(0.05, abs=0.005)
    assert np.mean(np.array(levels) > 0) == pytest.approx(0.5, abs=0.05)
    assert set(fills) == {(1, 2, 3)}


def test_levels_stay_in_range(monkeypatch):
    levels = []
    monkeypatch.setattr(pictures, "OPERATIONS", {"only": lambda p, level, fill: levels.append(abs(level))})
    rng = np.random.default_rng(0)
    for mean in (0, 10):
        for _ in range(20):
            pictures.rand_augment(None, mean, 3, (0, 0, 0), rng)
    assert (min(levels), max(levels)) == (0, 1)
