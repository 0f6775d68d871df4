"""What several ranks hold whole is shared out among them, when each rank writes a share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.ranks import Ranks
from tests.kit.pool import run_ranks

REF = "best_model.loss"


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)], nn.BatchNorm1d(64))


def keep(directory, in_background):
    model = layers()
    if not Ranks.connect().is_main:
        for buffer in model.buffers():
            buffer.fill_(7)  # the snapshot has those of rank 0
    model = DistributedDataParallel(model, broadcast_buffers=False)
    settings = {"format": "dcp", "async_save": in_background}
    with BestKeeper(model, directory=directory, metric_key="loss", **settings) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))


def test_replicated_weights_are_written_by_all_ranks(tmp_path):
    for in_background in (False, True):
        run = tmp_path / str(in_background)
        run_ranks(keep, 3, run, in_background)
        sizes = sorted(path.stat().st_size for path in (run / "checkpoints" / REF).glob("model.dcp/*.distcp"))
        assert len(sizes) == 3
        assert sizes[-1] < 1.3 * sizes[0]
        model, expected = layers(), layers()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().fill_(3)
        load(run, REF, model)
        assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
