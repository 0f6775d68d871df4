"""The contract, and what only the callback of noether's trainer does. Where noether is installed: on Python 3.12."""

from __future__ import annotations

from typing import ClassVar

import pytest

pytest.importorskip("noether", reason="noether is not installed: it needs Python 3.12 and its own torch")

from keepbest import load
from keepbest.errors import ConfigError
from keepbest.integrations.noether import BestCheckpointCallback
from tests.integrations.contract import TrainerContract
from tests.integrations.faces.face import VALUES, failing, weights_of
from tests.integrations.faces.noether import METRIC, OURS, Noether, newest_in, saves, train, weights_in
from tests.kit.runs import ledger, refs

FACE = Noether()
PLAIN = {"kind": OURS, "metric_key": METRIC, "every_n_epochs": 1}


class TestContract(TrainerContract):
    face = FACE


def test_resumed_run_continues_in_the_folder_of_the_first(tmp_path):
    callbacks = [{**PLAIN, "tolerances": [1]}, saves(1)]
    for run_id, fails_at in [("first", 3), ("second", 5), ("third", None)]:
        newest = newest_in(tmp_path)
        with failing(fails_at):
            train(tmp_path, VALUES, callbacks, resume_from=newest, run_id=run_id, fails_at=fails_at)
    values = [(FACE.iteration(step), value) for step, value in enumerate(VALUES, start=1)]
    assert FACE.observed(tmp_path / "first") == values
    assert set(refs(tmp_path / "first")) == {FACE.ref, f"{FACE.ref}.tolerance=1"}
    assert not [*tmp_path.glob("[!f]*/checkpoints/ledger.jsonl")]


def test_submodels_are_named_as_in_noether(tmp_path):
    train(tmp_path, VALUES[:2], [{**PLAIN, "model_names": ["decoder"]}, saves(1)])
    load(tmp_path / "run", FACE.ref, model := FACE.model(), only="second")
    whole = weights_in(tmp_path / "run" / "checkpoints", FACE.iteration(2))
    kept = {name: value for name, value in weights_of(model.state_dict()).items() if name.startswith("second.")}
    assert kept == {name: value for name, value in whole.items() if name.startswith("second.")}
    [files] = (tmp_path / "run" / "checkpoints" / "snapshots").iterdir()
    assert {path.name for path in files.iterdir()} == {"second.pt", "snapshot.json"}
    with pytest.raises(ConfigError, match="no submodel first; there are: decoder, encoder"):
        train(tmp_path, VALUES[:2], [{**PLAIN, "model_names": ["first"]}], run_id="other")


def test_direction_that_is_registered_in_noether_wins(tmp_path):
    from noether.core.providers.metric_property import MetricPropertyProvider, Ordinality

    MetricPropertyProvider()  # which registers its own
    patterns = list(MetricPropertyProvider._PATTERNS)
    try:
        MetricPropertyProvider._PATTERNS.insert(0, ("loss/val/*", Ordinality.HIGHER_IS_BETTER))
        train(tmp_path, VALUES, [PLAIN])
    finally:
        MetricPropertyProvider._PATTERNS[:] = patterns
    assert refs(tmp_path / "run") == {FACE.ref: FACE.iteration(7)}


def test_two_callbacks_keep_states_of_their_own(tmp_path):
    callbacks = [{**PLAIN, "tolerances": [0]}, {**PLAIN, "id": "b", "min_delta": 1.5}, saves(1)]
    with failing(4):
        train(tmp_path, VALUES, callbacks, fails_at=4)
    resumed = train(tmp_path, VALUES, callbacks, resume_from=newest_in(tmp_path), run_id="second")
    expected = [f"2.0 at {FACE.iteration(6)}", f"3.0 at {FACE.iteration(2)}"]
    assert [str(keeper.state.best) for keeper in resumed.keepers] == expected
    assert {line["event"] for line in ledger(tmp_path / "run")} >= {"pin", "observation"}


def test_evaluation_alone_observes_nothing(tmp_path):
    trainer = train(tmp_path, VALUES[:2], [PLAIN])
    [ours] = [each for each in trainer.callbacks if isinstance(each, BestCheckpointCallback)]
    ours.at_eval(trainer.update_counter)
    assert len(FACE.observed(tmp_path / "run")) == 2


class Note:
    """A hook that remembers its calls."""

    calls: ClassVar[list[tuple[float, str]]] = []

    def __call__(self, outcome, path):
        self.calls.append((outcome.value, path.name))


def test_functions_are_called_on_each_new_best(tmp_path):
    Note.calls.clear()
    hook = {"kind": f"{Note.__module__}.{Note.__qualname__}"}
    train(tmp_path, [3.0, 4.0, 2.0], [{**PLAIN, "on_new_best": [hook]}])
    assert Note.calls == [(3.0, FACE.iteration(1)), (2.0, FACE.iteration(3))]
