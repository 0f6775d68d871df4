"""Random histories with crashes and resumes end as the rules say, whatever happened on the way."""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from keepbest import BestKeeper, TrainingIteration
from keepbest.run.verify import verify
from tests.kit.files import SteppedFiles, without_waiting
from tests.kit.seams import use

REF = "best_model.loss"
Seen = tuple[float, int]


@dataclass
class Oracle:
    """The rules, slowly: everything is worked out anew from the timeline, a list of (value, stamp of the weights)."""

    higher: bool
    min_delta: float
    tolerances: list[int]
    top_k: int = 1
    timeline: list[Seen] = field(default_factory=list)
    ever_best: Seen | None = None
    left: dict[int, set[int]] = field(default_factory=dict)  # by the length of the timeline: the stamps that were there
    lost: set[int] = field(default_factory=set)  # stamps of which a resume found no weights

    def beats(self, value: float, other: Seen | None, by: float) -> bool:
        if math.isnan(value) or math.isinf(value):
            return False
        return other is None or (value - other[0] > by if self.higher else other[0] - value > by)

    def observe(self, value: float, stamp: int) -> bool:
        is_new_best = self.beats(value, self.best(), self.min_delta)
        self.timeline.append((value, stamp))
        if is_new_best and self.beats(value, self.ever_best, 0.0):
            self.ever_best = (value, stamp)
        return is_new_best

    def history(self) -> list[tuple[Seen | None, int]]:
        """The best and the length of the drought after each observation, before a resume found weights gone."""
        return [(best, drought) for best, _, drought in self.steps()]

    def steps(self) -> list[tuple[Seen | None, Seen | None, int]]:
        """After each observation: the best, the best once it was known what weights are gone, and the drought."""
        best, drought, steps = None, 0, []
        for length, (value, stamp) in enumerate(self.timeline, start=1):
            if self.beats(value, best, self.min_delta):
                best, drought = (value, stamp), 0
            else:
                drought += 1
            seen = best
            if best is not None and best[1] not in self.left.get(length, {best[1]}):
                best = None
            steps.append((seen, best, drought))
        return steps

    def resume(self, length: int, left: dict[int, set[int]], there: set[int]):
        """Go back to a timeline of this length, with the weights of these stamps on the disk."""
        self.left = {place: stamps for place, stamps in left.items() if place <= length}
        self.lost |= {stamp for _, stamp in self.timeline} - there
        named = {seen[1] for seen in [self.best(), *self.top()] if seen is not None}
        if not named <= there:
            self.left[length] = there & self.left.get(length, there)
        if self.ever_best is not None and self.ever_best[1] not in there:
            self.ever_best = self.best()

    def best(self) -> Seen | None:
        return self.steps()[-1][1] if self.timeline else None

    def drought(self) -> int:
        return self.history()[-1][1] if self.timeline else 0

    def top(self) -> list[Seen]:
        if self.top_k == 1:
            return []
        finite = [
            (value, stamp)
            for number, (value, stamp) in enumerate(self.timeline, start=1)
            if math.isfinite(value) and all(stamp in there for length, there in self.left.items() if length >= number)
        ]
        return sorted(finite, key=lambda seen: -seen[0] if self.higher else seen[0])[: self.top_k]  # stable: by age

    def exceeded(self) -> dict[int, Seen | None]:
        return {
            tolerance: next(best for best, drought in self.history() if drought > tolerance)
            for tolerance in self.tolerances
            if any(drought > tolerance for _, drought in self.history())
        }


VALUES = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, -1.0, 0.5, math.nan, math.inf, -math.inf])
TOLERANCES = st.lists(st.integers(0, 4), unique=True, max_size=3)


class Histories(RuleBasedStateMachine):
    @initialize(
        higher=st.booleans(),
        min_delta=st.sampled_from([0.0, 0.0, 0.75]),
        tolerances=TOLERANCES,
        top_k=st.sampled_from([1, 1, 2, 3]),
        async_save=st.booleans(),
    )
    def begin(self, higher: bool, min_delta: float, tolerances: list[int], top_k: int, async_save: bool):
        self.async_save = async_save
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.seams = ExitStack()
        self.seams.enter_context(use(self.folder, files=SteppedFiles(without_waiting)))
        self.model = nn.Linear(1, 1, bias=False)
        self.oracle = Oracle(higher, min_delta, tolerances, top_k)
        self.stamp = 0
        self.checkpoints: dict[str, tuple[dict, list[Seen], dict[int, set[int]]]] = {}
        self.keeper = self.make_keeper()

    def make_keeper(self, *, resume: str | None = None) -> BestKeeper:
        oracle = self.oracle
        return BestKeeper(
            self.model,
            directory=self.folder,
            metric_key="loss",
            higher_is_better=oracle.higher,
            min_delta=oracle.min_delta,
            tolerances=oracle.tolerances,
            keep_top_k=oracle.top_k,
            async_save=self.async_save,
            resume=resume,
        )

    def now(self) -> TrainingIteration:
        return TrainingIteration(epoch=len(self.oracle.timeline))

    @rule(value=VALUES)
    def observe(self, value: float):
        self.stamp += 1
        with torch.no_grad():
            self.model.weight.fill_(self.stamp)
        is_new_best = self.oracle.observe(value, self.stamp)
        outcome = self.keeper.observe(value, self.now())
        assert outcome.is_new_best == is_new_best

    @rule()
    def checkpoint(self):
        name = f"checkpoint-{len(self.oracle.timeline)}"
        self.keeper.flush(pin=name)
        state = copy.deepcopy(self.keeper.state_dict())
        self.checkpoints[name] = (state, list(self.oracle.timeline), dict(self.oracle.left))

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data())
    def delete_checkpoint(self, data: st.DataObject):
        name = data.draw(st.sampled_from(sorted(self.checkpoints)))
        self.keeper.start()
        self.keeper.release(name)
        del self.checkpoints[name]

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data(), from_ledger=st.booleans())
    def crash_and_resume_from_a_checkpoint(self, data: st.DataObject, from_ledger: bool):
        name = data.draw(st.sampled_from(sorted(self.checkpoints)))
        state, timeline, left = self.checkpoints[name]
        # By its iteration alone, only a point of the present timeline can be found.
        is_present = [stamp for _, stamp in self.oracle.timeline][: len(timeline)] == [stamp for _, stamp in timeline]
        self.crash()
        self.oracle.timeline = list(timeline)
        self.oracle.resume(len(timeline), left, self.stamps())
        self.keeper = self.make_keeper()
        if from_ledger and timeline and is_present:
            self.keeper.start(at=self.now())
        else:
            self.keeper.load_state_dict(state)
            self.keeper.start()

    @precondition(lambda self: self.stamp)
    @rule()
    def crash_and_resume_from_the_ledger(self):
        self.crash()
        self.keeper = self.make_keeper(resume="ledger")
        self.keeper.start()

    @precondition(lambda self: self.oracle.timeline)
    @rule(data=st.data())
    def crash_and_resume_before_the_end(self, data: st.DataObject):
        length = data.draw(st.integers(1, len(self.oracle.timeline)))
        self.crash()
        del self.oracle.timeline[length:]
        self.oracle.resume(length, self.oracle.left, self.stamps())
        self.keeper = self.make_keeper()
        self.keeper.start(at=self.now())

    @precondition(lambda self: self.oracle.timeline)
    @rule(data=st.data())
    def crash_and_resume_without_some_weights(self, data: st.DataObject):
        self.crash()
        there = self.stamps()
        if there:
            gone = data.draw(st.sampled_from(sorted(there)))
            for path in self.weights():
                if self.stamp_in(path) == gone:
                    shutil.rmtree(path.parent)
        self.oracle.resume(len(self.oracle.timeline), self.oracle.left, self.stamps())
        self.keeper = self.make_keeper(resume="ledger")
        self.keeper.start()

    @precondition(lambda self: self.oracle.timeline and self.oracle.min_delta == 0.0)
    @rule()
    def crash_and_resume_with_a_greater_min_delta(self):
        self.crash()
        self.oracle.min_delta = 0.75
        self.oracle.resume(len(self.oracle.timeline), self.oracle.left, self.stamps())
        self.keeper = self.make_keeper(resume="ledger")
        self.keeper.start()

    def weights(self) -> list[Path]:
        return list((self.folder / "checkpoints/snapshots").glob("[!.]*/model.pt"))

    def stamps(self) -> set[int]:
        return set(map(self.stamp_in, self.weights()))

    def stamp_in(self, path: Path) -> int:
        return int(torch.load(path, weights_only=True)["weight"].item())

    @precondition(lambda self: self.stamp)
    @rule(tolerance=st.integers(0, 4))
    def crash_and_resume_without_a_tolerance(self, tolerance: int):
        self.crash()
        self.oracle.tolerances = [other for other in self.oracle.tolerances if other != tolerance]
        self.keeper = self.make_keeper(resume="ledger")
        self.keeper.start()

    @precondition(lambda self: self.stamp)
    @rule()
    def end_and_go_on(self):
        self.keeper.close()
        best = self.oracle.best()
        for tolerance in self.oracle.tolerances:
            if tolerance not in self.oracle.exceeded():
                assert self.stamp_of(f"{REF}.tolerance={tolerance}") == (None if best is None else best[1])
        self.keeper = self.make_keeper(resume="ledger")
        self.keeper.start()

    def crash(self):
        self.keeper.abandon()
        leftover = self.folder / "checkpoints/snapshots/.tmp-E99"
        leftover.mkdir(parents=True)
        (leftover / "model.pt").write_bytes(b"half a file")

    def stamp_of(self, ref: str) -> int | None:
        path = self.folder / "checkpoints" / ref / "model.pt"
        return self.stamp_in(path) if path.exists() else None

    @invariant()
    def state_is_as_the_rules_say(self):
        if not self.stamp:
            return
        oracle, state = self.oracle, self.keeper.state
        best = oracle.best()
        assert (None if state.best is None else state.best.value) == (None if best is None else best[0])
        assert state.tolerance_counter == oracle.drought()
        assert [best.value for best in state.top] == [value for value, _ in oracle.top()]
        exceeded = oracle.exceeded()
        assert {tolerance: None if kept is None else kept.value for tolerance, kept in state.exceeded.items()} == {
            tolerance: None if kept is None else kept[0] for tolerance, kept in exceeded.items()
        }
        if not self.async_save:
            self.refs_are_as_the_rules_say()

    @precondition(lambda self: self.stamp)
    @rule()
    def wait_and_look(self):
        self.keeper.flush()
        self.refs_are_as_the_rules_say()

    def refs_are_as_the_rules_say(self):
        oracle = self.oracle
        exceeded = {
            tolerance: None if kept is None or kept[1] in oracle.lost else kept
            for tolerance, kept in oracle.exceeded().items()
        }
        assert self.stamp_of(REF) == (None if oracle.ever_best is None else oracle.ever_best[1])
        for tolerance, kept in exceeded.items():
            assert self.stamp_of(f"{REF}.tolerance={tolerance}") == (None if kept is None else kept[1])
        refs = {path.name for path in (self.folder / "checkpoints").glob("best_model.*")}
        named = {f"{REF}.tolerance={tolerance}" for tolerance, kept in exceeded.items() if kept is not None}
        top = {f"{REF}.top={place}": stamp for place, (_, stamp) in enumerate(oracle.top(), start=1)}
        assert {ref: self.stamp_of(ref) for ref in refs if ".top=" in ref} == top
        refs -= top.keys()
        assert refs - {REF} - {f"{REF}.tolerance={tolerance}" for tolerance in range(5)} == set()
        assert named <= refs

    def teardown(self):
        if hasattr(self, "folder"):
            with self.seams:
                self.end()
            shutil.rmtree(self.folder)

    def end(self):
        if self.stamp:
            self.keeper.flush()
            self.refs_are_as_the_rules_say()
            self.keeper.close()
            assert verify(self.folder) == []
        else:
            self.keeper.abandon()


def test_random_histories_end_as_the_rules_say(request):
    everything = request.config.getoption("--crash-points") == "all"
    histories = 15 if request.config.getoption("--quick") else 2000 if everything else 250
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=histories,
            stateful_step_count=14,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
