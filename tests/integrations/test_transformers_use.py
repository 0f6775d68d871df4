"""How the Trainer is used: searches of hyperparameters, a batch size that is found, adapters of PEFT."""

from __future__ import annotations

import pytest
import torch

from keepbest.integrations.transformers import BestCheckpoint
from tests.integrations.faces.face import VALUES
from tests.integrations.faces.on_accelerate import Model
from tests.integrations.faces.transformers import ScriptedTrainer, Transformers, make_trainer
from tests.kit.pool import run_ranks
from tests.kit.runs import ledger

FACE = Transformers()


def search(directory, **settings):
    """Three trials of a search; the second is pruned at its second step. Returns the best values by the Trainer."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    offsets = iter([0.0, 5.0, -1.0])
    found = []

    class Searching(ScriptedTrainer):
        def look_up(self, prediction):
            if self.offset == 5.0 and self.state.global_step == 2:
                raise optuna.TrialPruned
            return {"score": super().look_up(prediction)["score"] + self.offset}

        def train(self, *arguments, **named):
            self.offset = next(offsets)
            super().train(*arguments, **named)
            found.append(self.state.best_metric)

    def choose(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.1)}

    made = make_trainer(directory, VALUES[:4], save_steps=2)
    best = BestCheckpoint("score", tolerances=[1], **settings)
    trainer = Searching(
        VALUES[:4],
        model_init=Model,
        args=made.args,
        train_dataset=made.train_dataset,
        eval_dataset=made.eval_dataset,
        callbacks=[best],
    )
    trainer.hyperparameter_search(choose, n_trials=3, backend="optuna", direction="minimize")
    best.keeper.abandon()
    return found


@pytest.mark.parametrize("settings", [{}, {"resume": "ledger"}])
def test_each_trial_of_a_search_has_a_run_of_its_own(settings, tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    assert search(tmp_path, **settings) == [3.0, 2.0]
    found = {place.name: FACE.kept(place)[""][:2] for place in sorted(tmp_path.glob("run-*"))}
    assert found == {"run-0": ("U2", 3.0), "run-1": ("U1", 10.0), "run-2": ("U2", 2.0)}
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "run-2" / "checkpoint-4").is_dir()  # beside those of the Trainer


class RunsOutOfMemory(ScriptedTrainer):
    """Runs out of memory at its second step while a batch has more than two samples."""

    def training_step(self, model, inputs, *arguments):
        if len(next(iter(inputs.values()))) > 2 and self.state.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(model, inputs, *arguments)


def find_batch_size(directory):
    made = make_trainer(directory, per_device_train_batch_size=4, auto_find_batch_size=True, save_strategy="no")
    best = BestCheckpoint(tolerances=[0])
    data = {"train_dataset": made.train_dataset, "eval_dataset": made.eval_dataset}
    trainer = RunsOutOfMemory(VALUES, model=Model(), args=made.args, callbacks=[best], **data)
    trainer.train()
    return trainer.state.train_batch_size


def test_training_that_starts_over_with_smaller_batches_is_kept(tmp_path):
    sizes = run_ranks(find_batch_size, 2, tmp_path)
    assert sizes[0] == sizes[1] <= 2
    assert FACE.observed(tmp_path) == [(f"U{step}", value) for step, value in enumerate(VALUES, start=1)]
    before = [line["iteration"] for line in ledger(tmp_path) if line["event"] == "observation"]
    assert before[:2] == ["U1", "U1"]  # the first of them of the attempt that failed
    assert {ref: entry[:2] for ref, entry in FACE.kept(tmp_path).items()} == {
        "": ("U6", 2.0),
        ".tolerance=0": ("U2", 3.0),
    }
