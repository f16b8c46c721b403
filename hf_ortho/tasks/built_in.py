"""Built-in datasets: they ship with the dependencies and need no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def pydoc_topics() -> DatasetDict:
    """CPython's help texts (``pydoc_data.topics``, English): unique paragraphs, every tenth held out."""
    from pydoc_data.topics import topics

    from datasets import Dataset, DatasetDict

    paragraphs = list(
        dict.fromkeys(p.strip("\n") for _, text in sorted(topics.items()) for p in text.split("\n\n") if p.strip())
    )
    held_back = paragraphs[9::10]
    del paragraphs[9::10]

    def documents(part: list[str]) -> Dataset:
        return Dataset.from_dict({"text": ["\n\n".join(part[i : i + 50]) for i in range(0, len(part), 50)]})

    return DatasetDict(train=documents(paragraphs), validation=documents(held_back))


def digits() -> DatasetDict:
    """scikit-learn's ``load_digits``: 1,797 real 8 x 8 scans of handwritten digits, every fifth held out."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    try:
        from PIL import Image as PILImage
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the digits dataset needs {error.name}: pip install 'hf-ortho[vision]'") from error
    data = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in range(10)])})

    def part(rows: list[int]) -> Dataset:
        images = [PILImage.fromarray((data.images[i] * 15.9375).astype("uint8")).resize((32, 32)) for i in rows]
        return Dataset.from_dict({"image": images, "label": [int(data.target[i]) for i in rows]}, features=features)

    everything = range(len(data.images))
    return DatasetDict(train=part([i for i in everything if i % 5 != 4]), validation=part(list(everything)[4::5]))


BUILT_IN = {"pydoc_topics": pydoc_topics, "digits": digits}
