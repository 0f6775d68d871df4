"""Handwritten digits: 1,797 real images of 8 x 8 pixels, from scikit-learn."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from keepbest.errors import ConfigError

Split = Literal["train", "val", "test"]

# Where each split starts and ends in a fixed order of the images.
_SPLITS = {"train": (0, 997), "val": (997, 1397), "test": (1397, 1797)}
_SEED_OF_THE_ORDER = 20


class Digits(Dataset[dict[str, Tensor]]):
    """One split. A sample is `image` (64 float32 in [0, 1]) and `label` (int64, 0 to 9).

    Args:
        split: no image is in two of them.
        size: only so many images of the split, the first ones; `None` is all.

    Raises:
        ConfigError: if there is no such split, it has fewer images, or scikit-learn is not installed.
    """

    def __init__(self, split: Split, size: int | None = None) -> None:
        if split not in _SPLITS:
            raise ConfigError(f"there is no split {split!r}; the splits are {list(_SPLITS)}")
        start, end = _SPLITS[split]
        if size is not None and not 0 < size <= end - start:
            raise ConfigError(f"the split {split!r} has {end - start} images; size must be 1 to that, found {size}")
        images, labels = _load()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SEED_OF_THE_ORDER))
        chosen = order[start : end if size is None else start + size]
        self.images, self.labels = images[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


def _load() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError("the digits come with scikit-learn: pip install 'keepbest[examples]'") from error
    images, labels = load_digits(return_X_y=True)
    # Pixels are counts from 0 to 16.
    return torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
