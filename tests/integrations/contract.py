"""What every adapter promises, as tests that each framework runs.

To add a framework:

1. Write `faces/<framework>.py` with a subclass of `Face`: `ref`, `strategies`, `updates` and `resumes`, and the methods
   `model`, `construct`, `run`, `compare` and `weights_of_checkpoint`, each explained there. The metric, the checkpoints
   and the early stopping are the framework's own: they are the oracle of what keepbest keeps.
2. Write `test_<framework>.py`. Where the framework has the training loop and computes the metric, the face also
   provides `missing` and `stop_early`, and the tests are

       class TestContract(TrainerContract):
           face = Framework()

   Where the loop is the user's, as with Accelerate, `Contract` takes the place of `TrainerContract`.
3. Test below that what only this framework does.

Ranks get the face pickled. So it has no state.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from keepbest import EveryRank, load
from keepbest.errors import ConfigError, MissingMetricError, RunExistsError
from tests.integrations.faces.face import VALUES, Face
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import ledger, refs, snapshots

ALL_REFS = {"tolerances": [0, 1, 2], "keep_top_k": 3}

# {id: (strategy, settings)} of trainings whose snapshots are compared with what the framework has.
COMPARED = {
    "alone": ("alone", {}),
    "ddp": ("ddp", {}),
    "ddp-safetensors": ("ddp", {"async_save": True, "format": "safetensors"}),
    "fsdp1": ("fsdp1", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2-dcp": ("fsdp2", {"format": "dcp"}),
}

# {id: how a training is interrupted, and its other arguments}. It ends at, or fails at, each of these steps, and
# starts again from the newest checkpoint.
RESUMES = {
    "closed": {"ends_at": [3]},
    "failed-twice": {"fails_at": [4, 7], "async_save": True},
    "two-keepers": {"fails_at": [6], "save_every": 2, "beside": {**ALL_REFS, "id": "b", "min_delta": 1.5}},
}


def train_with_and_without_interruption(face: Face, root: Path, ends_at=(), fails_at=(), **arguments):
    """The states of the keepers at both ends."""
    arguments = {**ALL_REFS, **arguments}
    whole = face.train(root / "whole", VALUES, **arguments)
    root, checkpoint = root / "resumed", None
    for step in ends_at:
        checkpoint = face.train(root, VALUES[:step], resume_from=checkpoint, **arguments).checkpoint
    for step in fails_at:
        checkpoint = face.train(root, VALUES, resume_from=checkpoint, fails_at=step, **arguments).checkpoint
    return whole.states, face.train(root, VALUES, resume_from=checkpoint, **arguments).states


class Note:
    """A hook that writes what it is called with, if the snapshot is there, to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, outcome, path: Path) -> None:
        assert (path / "snapshot.json").is_file()
        with self.file.open("a") as file:
            file.write(f"{dist.get_rank()} {outcome.iteration} {outcome.value}\n")


def notes(file: Path) -> list[tuple[str, str, float]]:
    lines = [line.split() for line in file.read_text().splitlines()]
    return [(rank, iteration, float(value)) for rank, iteration, value in lines]


def train_with_hooks(face: Face, root: Path) -> None:
    hooks = [Note(root / "rank-0"), EveryRank(Note(root / "every-rank"))]
    face.train(root / "run", VALUES, save_every=None, on_new_best=hooks)


def assert_continues(root: Path, model, optimizer, others=(), *, like):
    """`optimizer`, of `model`, loads what `like` has, which is in the state of the newest best; and so do others."""
    fresh = {"optimizer": optimizer, **dict(others)}
    loaded = load(root, next(iter(refs(root))), model, training_state=fresh)
    assert set(loaded.training_state) == set(fresh)
    found, expected = ([*each.state_dict()["state"].values()] for each in (optimizer, like))
    assert len(expected) > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Contract:
    """Of every adapter."""

    face: Face

    def pytest_generate_tests(self, metafunc):
        if "strategy" in metafunc.fixturenames:
            cases = {name: case for name, case in COMPARED.items() if case[0] in self.face.strategies}
            metafunc.parametrize(("strategy", "settings"), cases.values(), ids=cases)
        elif "interrupted" in metafunc.fixturenames:
            cases = {**RESUMES, **self.face.resumes}
            metafunc.parametrize("interrupted", cases.values(), ids=cases)

    def test_kept_weights_equal_those_of_the_framework(self, strategy, settings, tmp_path):
        world_size = 1 if strategy == "alone" else 2
        compare = partial(self.face.compare, tmp_path, strategy, **ALL_REFS, **settings)
        results = run_ranks(compare, world_size, init=world_size > 1)
        top, found = results[0].top, self.face.kept(tmp_path)
        assert [each.state for each in results] == [results[0].state] * world_size
        assert all(each.best in (None, top[0]) for each in results)
        places = {"": 1, ".top=1": 1, ".top=2": 2, ".top=3": 3, ".tolerance=0": 3, ".tolerance=1": 3, ".tolerance=2": 3}
        steps = {1: 6, 2: 8, 3: 2}
        assert found == {ref: (self.face.iteration(steps[place]), *top[place - 1]) for ref, place in places.items()}
        assert [value for value, _ in top] == [VALUES[step - 1] for step in steps.values()]
        assert len({str(weights) for _, weights in top}) == 3

    def test_resumed_run_ends_like_an_uninterrupted_one(self, interrupted, tmp_path):
        results = run_ranks(partial(train_with_and_without_interruption, self.face, tmp_path, **interrupted), 2)
        for whole, resumed in results:
            assert resumed == whole == results[0][0]
        assert self.face.kept(tmp_path / "resumed") == self.face.kept(tmp_path / "whole")
        assert self.face.observed(tmp_path / "resumed") == self.face.observed(tmp_path / "whole") != []
        assert len(refs(tmp_path / "whole")) == 7 * len(results[0][0])

    def test_what_the_newest_checkpoint_names_outlives_a_better_one(self, tmp_path):
        iteration, settings = self.face.iteration, {"tolerances": [1], "save_every": 2}
        failed = self.face.train(tmp_path, [5.0, 3.0, 2.0, 9.0], fails_at=4, **settings)
        assert (set(refs(tmp_path).values()), snapshots(tmp_path)) == ({iteration(3)}, {iteration(2), iteration(3)})
        of_framework = self.face.weights_of_checkpoint(failed.checkpoint)
        self.face.train(tmp_path, [5.0, 3.0, 7.0, 7.0], resume_from=failed.checkpoint, **settings)
        found = self.face.kept(tmp_path)
        assert found[".tolerance=1"] == (iteration(2), 3.0, of_framework)
        assert found[""][:2] == (iteration(3), 2.0)

    def test_failed_run_is_resumed_and_never_overwritten(self, tmp_path):
        failed = self.face.train(tmp_path, VALUES, fails_at=4, save_every=2, tolerances=[5])
        before = ledger(tmp_path)
        assert set(refs(tmp_path)) == {self.face.ref}
        ways = rf"resume it \({self.face.resumed_by}.*\), set it aside \(existing='set_aside'"
        with pytest.raises(RunExistsError, match=ways):
            self.face.train(tmp_path, VALUES, save_every=None)
        assert ledger(tmp_path) == before
        self.face.train(tmp_path, VALUES, resume_from=failed.checkpoint, tolerances=[5])
        assert self.face.observed(tmp_path) == [
            (self.face.iteration(step), value) for step, value in enumerate(VALUES, start=1)
        ]
        assert set(refs(tmp_path)) == {self.face.ref, f"{self.face.ref}.tolerance=5"}  # closed

    def test_run_that_is_there_can_be_set_aside(self, tmp_path):
        root = tmp_path / "run"
        self.face.train(root, VALUES, save_every=None)
        self.face.train(root, [9.0, 8.0], save_every=None, existing="set_aside")
        aside = tmp_path / "run.1"
        assert (refs(root), refs(aside)) == (
            {self.face.ref: self.face.iteration(2)},
            {self.face.ref: self.face.iteration(6)},
        )

    def test_given_directory_replaces_that_of_the_framework(self, tmp_path):
        self.face.train(tmp_path / "own", VALUES[:2], directory=tmp_path / "given")
        assert refs(tmp_path / "given") == {self.face.ref: self.face.iteration(2)}
        assert not (tmp_path / "own" / "checkpoints").exists()

    def test_given_direction_wins(self, tmp_path):
        self.face.train(tmp_path, VALUES, save_every=None, higher_is_better=True)
        assert refs(tmp_path) == {self.face.ref: self.face.iteration(7)}

    def test_hooks_are_called_on_each_new_best(self, tmp_path):
        run_ranks(train_with_hooks, 2, self.face, tmp_path)
        bests = [(self.face.iteration(step), VALUES[step - 1]) for step in (1, 2, 6)]
        assert notes(tmp_path / "rank-0") == [("0", *best) for best in bests]
        assert sorted(notes(tmp_path / "every-rank")) == [(rank, *best) for rank in "01" for best in bests]

    def test_metric_of_unknown_direction_is_refused_before_training(self, tmp_path):
        with pytest.raises(ConfigError, match=r"whether a higher '(eval_)?runtime' is better"):
            self.face.train(tmp_path, VALUES, metric_key="runtime", higher_is_better=None)
        assert not (tmp_path / "checkpoints").exists()

    def test_unknown_setting_is_refused_at_construction(self, tmp_path):
        with pytest.raises(ConfigError, match="tolerence"):
            self.face.construct(tmp_path, tolerence=[1])


def train_with_tolerances(face: Face, root: Path):
    settings = {"tolerances": [0, 1, 2, 3], "save_every": None}
    face.train(root / "run", VALUES, **settings)
    stopped = {patience: face.stop_early(root / str(patience), VALUES, patience) for patience in (1, 2, 3, 4)}
    return stopped, face.stop_early(root / "beside", VALUES, 2, tolerances=[0, 1, 2])


class TrainerContract(Contract):
    """Of an adapter whose framework has the training loop and computes the metric."""

    def test_tolerance_equals_early_stopping_with_one_more_patience(self, tmp_path):
        stopped, (last, *best) = run_ranks(train_with_tolerances, 2, self.face, tmp_path)[0]
        assert [step for step, *_ in stopped.values()] == [3, 4, 5, 8]  # the first three never saw the best of all
        found = self.face.kept(tmp_path / "run")
        for patience, (_, *best_then) in stopped.items():
            iteration = self.face.iteration(2 if patience < 4 else 6)
            assert found[f".tolerance={patience - 1}"] == (iteration, *best_then)
        # Early stopping works beside the adapter, and ends the run where the tolerance is exceeded.
        beside = self.face.kept(tmp_path / "beside")
        assert (last, beside[""]) == (4, (self.face.iteration(2), *best))
        assert beside[".tolerance=1"] == found[".tolerance=1"]

    def test_missing_metric_is_reported_on_every_rank(self, tmp_path):
        with start_ranks(partial(self.face.train, tmp_path, VALUES, metric_key="accuracy"), 2) as ranks:
            outcomes = ranks.collect()
        for outcome in outcomes:
            with pytest.raises(MissingMetricError, match="missing on 2 of 2 ranks"):
                raise outcome.exception
            for rank in range(2):
                assert re.search(f"rank {rank}: .*{self.face.missing}", str(outcome.exception))
            assert "every_n_" not in str(outcome.exception)  # which are words of keepbest's own trainer

    def test_run_that_failed_without_a_checkpoint_may_start_over(self, tmp_path):
        settings = {"tolerances": [0, 1], "resume": "ledger", "save_every": None}
        self.face.train(tmp_path, VALUES, fails_at=5, **settings)
        self.face.train(tmp_path, VALUES, **settings)
        assert {ref: entry[:2] for ref, entry in self.face.kept(tmp_path).items()} == {
            "": (self.face.iteration(6), 2.0),
            ".tolerance=0": (self.face.iteration(2), 3.0),
            ".tolerance=1": (self.face.iteration(2), 3.0),
        }
