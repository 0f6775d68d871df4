from __future__ import annotations

import pytest
import torch

from keepbest.data import DataContainer, EvaluationLoader, evaluation_indices
from keepbest.errors import ConfigError


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_delivers_the_share_of_the_rank_again_and_again(num_workers):
    container = DataContainer({"val": range(100, 111)}, {"val": sorted}, num_workers=num_workers)
    loader = EvaluationLoader(container, "val", batch_size=3, rank=1, world_size=2)
    expected = [[101, 103, 105], [107, 109, 100]]
    assert [100 + index for index in evaluation_indices(11, rank=1, world_size=2)] == [101, 103, 105, 107, 109, 100]
    random_state = torch.get_rng_state()
    for _ in range(2):
        assert list(loader) == [sorted(batch) for batch in expected]
    assert len(loader) == 2
    # Otherwise an evaluation on a new best would change the dropout of the training that follows.
    assert torch.equal(torch.get_rng_state(), random_state)


def test_unknown_dataset_is_refused():
    with pytest.raises(ConfigError, match="no dataset 'test'"):
        EvaluationLoader(DataContainer({"val": [1]}), "test", batch_size=1, rank=0, world_size=1)
