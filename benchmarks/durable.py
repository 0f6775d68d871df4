"""How long does a durable save take, when training waits for it?"""

from __future__ import annotations

from pathlib import Path

from benchmarks import measure
from benchmarks.contestants import SYNC_PEERS, SYNCING, Action, Keepbest, RawWrite, ended
from benchmarks.measure import Line, Report, Samples, Size

OURS, RAW = "keepbest", "raw write + fsync"


def measure_on_rank(folder: Path, size: Size) -> Samples:
    model = measure.make_model(size.megabytes)
    contestants: dict[str, Action] = {
        RAW: RawWrite(model.state_dict().values(), folder / "raw"),
        OURS: Keepbest(model, folder),
    }
    contestants |= {name: make(model, folder) for name, make in SYNC_PEERS.items()}
    with ended(contestants):
        return measure.alternate(contestants, size.repetitions)


def run(quick: bool) -> Report:
    size = Size(8, 3) if quick else Size(1000, 9)
    report = Report()
    with measure.scratch() as folder:
        samples = measure.on_ranks(1, measure_on_rank, folder, size)[0]
    report.samples["one process"] = samples
    figures = measure.figures(samples, OURS, RAW)
    raw = measure.ratio(samples, OURS, RAW)
    report.add(Line("durable save", raw, "at most 1.25 x raw write + fsync", 1.25, detail=figures))
    for peer in SYNC_PEERS:
        what = f"durable save beside {peer}" + ("" if peer in SYNCING else ", which does not sync")
        beside = measure.ratio(samples, OURS, peer)
        report.add(Line(what, beside, "at most 1.0 x the peer", 1.0, detail=measure.figures(samples, peer)))
    return report


if __name__ == "__main__":
    measure.main("durable", run)
