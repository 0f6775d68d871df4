"""How the Trainer is used: searches of hyperparameters, a batch size that is found, adapters of PEFT."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from keepbest.errors import ConfigError, RunExistsError, SnapshotError
from keepbest.integrations.peft import export_adapter
from keepbest.integrations.transformers import BestCheckpoint
from tests.integrations.faces.face import VALUES, weights_of
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
    with pytest.raises(RunExistsError):
        search(tmp_path, **settings)  # whose first trial is another one
    assert FACE.kept(tmp_path / "run-0")[""][:2] == ("U2", 3.0)


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


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def make_base():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=8, **SMALL))


def make_adapted(name, **settings):
    import peft

    settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", **settings}
    return peft.get_peft_model(make_base(), peft.LoraConfig(**settings), adapter_name=name)


def train_adapter(directory, name):
    """At its second step it is best."""
    data = [{"input_ids": list(range(8)), "labels": 1}] * 8
    trainer = make_trainer(
        directory,
        [3.0, 1.0, 2.0],
        [BestCheckpoint(save_frozen_weights=False)],
        trainer={"model": make_adapted(name), "train_dataset": data, "eval_dataset": data[:2]},
    )
    trainer.train()


# PEFT asks transformers in a way that will go.
asks_in_old_ways = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@asks_in_old_ways
@pytest.mark.parametrize(("name", "folder", "world_size"), [("default", "", 2), ("other", "other", 1)])
def test_peft_reads_the_best_adapter_and_nothing_else_is_kept(name, folder, world_size, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    run_ranks(train_adapter, world_size, tmp_path, name, init=world_size > 1)
    own = weights_of(load_file(tmp_path / "checkpoint-2" / folder / "adapter_model.safetensors"))
    kept = torch.load(tmp_path / "checkpoints" / FACE.ref / "model.pt", weights_only=True)
    assert {key.replace(f".{name}", "").replace(".modules_to_save", "") for key in kept} == own.keys()
    place = export_adapter(tmp_path, FACE.ref, tmp_path / "adapter", make_adapted(name), adapter_name=name)
    read = peft.PeftModel.from_pretrained(make_base(), str(place))
    assert weights_of(peft.get_peft_model_state_dict(read)) == own
    assert weights_of(load_file(tmp_path / "adapter" / folder / "adapter_model.safetensors")) == own
    assert not [each.name for each in tmp_path.iterdir() if each.name.startswith(".")]


@asks_in_old_ways
def test_adapter_that_is_not_there_is_not_exported(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    run_ranks(train_adapter, 1, tmp_path, "default", init=False)
    prompt = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    for error, message, model, name in [
        (ConfigError, "no adapter 'other'; there are: default", make_adapted("default"), "other"),
        (ConfigError, "none: expected a PeftModel", make_base(), "default"),
        (SnapshotError, "it has not 2 of them", make_adapted("default", target_modules=["key"]), "default"),
        (ConfigError, "which learns a prompt", peft.get_peft_model(make_base(), prompt), "default"),
    ]:
        with pytest.raises(error, match=message):
            export_adapter(tmp_path, FACE.ref, tmp_path / "adapter", model, adapter_name=name)
    assert {each.name for each in tmp_path.iterdir()} >= {"checkpoints", "checkpoint-1"}
    assert not (tmp_path / "adapter").exists()
