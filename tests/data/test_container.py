from __future__ import annotations

import pytest
import torch
from torch.utils.data import IterableDataset, Subset

from keepbest.data import DataContainer
from keepbest.errors import ConfigError


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_unknown_key_lists_those_that_exist():
    container = DataContainer({"train": [1], "val": [2]})
    with pytest.raises(ConfigError, match=r"no dataset 'test'; the datasets are \['train', 'val'\]"):
        container.get_dataset("test")
    with pytest.raises(ConfigError, match="no dataset 'test'"):
        container.get_collator("test")


def test_what_cannot_be_evaluated_is_refused_at_once():
    with pytest.raises(ConfigError, match="'val' has no samples"):
        DataContainer({"train": [1], "val": []})
    with pytest.raises(ConfigError, match="'train' is a Stream; expected one with __len__"):
        DataContainer({"train": Stream()})
    with pytest.raises(ConfigError, match="num_workers"):
        DataContainer({"train": [1]}, num_workers=-1)
    with pytest.raises(ConfigError, match=r"collators for \['vall'\]"):
        DataContainer({"val": [1]}, {"vall": sum})


def test_batches_are_made_by_the_collator_of_their_dataset():
    container = DataContainer({"train": [0.0, 1.0, 2.0], "val": [3, 4, 5]}, {"val": sum})
    assert torch.equal(container.load_batch("train", [2, 0]), torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert container.load_batch("val", [0, 2]) == 8


def test_datasets_that_load_many_samples_at_once_do_so():
    asked = []

    class Recorded(Subset):
        def __getitems__(self, indices):
            asked.append(indices)
            return super().__getitems__(indices)

    container = DataContainer({"train": Recorded([10, 11, 12, 13], [1, 3])})
    assert container.load_batch("train", [1, 0]).tolist() == [13, 11]
    assert asked == [[1, 0]]
