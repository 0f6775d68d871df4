"""How do the bytes of a sharded save grow with the number of ranks? See docs/scale.md for what follows."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from torch import nn

from benchmarks import measure
from benchmarks.measure import Line, Report, shard
from keepbest import BestKeeper, TrainingIteration
from keepbest.ranks.mailbox import Mailbox

RANKS = (2, 4, 8, 16, 32)
TENSORS = 40


def measure_on_rank(world_size: int, folder: Path) -> dict[str, int]:
    """Bytes of what this rank posts, and on rank 0 of what the snapshot has beside the shards."""
    model = shard(nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(TENSORS)]), world_size)
    posted: list[int] = []
    post = Mailbox.post

    def counting(mailbox: Mailbox, key: str, note: str) -> None:
        posted.append(len(note))
        post(mailbox, key, note)

    with (
        patch.object(Mailbox, "post", counting),  # what is posted is gone when it has been read
        BestKeeper(model, directory=folder, metric_key="loss/val", format="dcp", async_save=True) as keeper,
    ):
        keeper.observe(1.0, TrainingIteration(update=1))
        keeper.flush()
        best = (folder / "checkpoints" / "best_model.loss.val").resolve()
        files = [path for path in best.rglob("*") if path.is_file()]
        sizes = {path.name: path.stat().st_size for path in files}
    return {
        "posted": sum(posted),
        "files": len(files),
        "index": sizes[".metadata"],
        "manifest": sizes["snapshot.json"],
        "shards": max(size for name, size in sizes.items() if name.endswith(".distcp")),
    }


def run(quick: bool) -> Report:
    report = Report()
    for world_size in RANKS[:1] if quick else RANKS:
        with measure.scratch() as folder:
            ranks = measure.on_ranks(world_size, measure_on_rank, world_size, folder)
        chunks = TENSORS * world_size
        receipts = sum(rank["posted"] for rank in ranks[1:])
        for what, value, unit in (
            ("bytes of the receipts for each shard of a tensor", receipts / (chunks - TENSORS), ""),
            ("bytes of the index for each shard of a tensor", ranks[0]["index"] / chunks, ""),
            ("bytes of the manifest for each rank", ranks[0]["manifest"] / world_size, ""),
            ("files", ranks[0]["files"], ""),
        ):
            report.add(Line(f"{what}, {world_size} ranks", value, unit=unit))
        report.samples[f"{world_size} ranks"] = {key: [float(rank[key]) for rank in ranks] for key in ranks[0]}
    return report


if __name__ == "__main__":
    measure.main("shards_scale", run)
