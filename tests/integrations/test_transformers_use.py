"""How the Trainer is used: searches of hyperparameters, a batch size that is found, adapters of PEFT."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from keepbest.errors import ConfigError, InvalidMetricError, MissingMetricError, RunExistsError, SnapshotError
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
    # A study that continues, whose first trial here is another one.
    with pytest.raises(RunExistsError, match=r"a trial is not resumed; with hp_name=.* have folders of their own"):
        search(tmp_path, **settings)
    assert FACE.kept(tmp_path / "run-0")[""][:2] == ("U2", 3.0)


class EvaluatesWithPrefix(ScriptedTrainer):
    """Its evaluations are those of another prefix."""

    def evaluate(self, *arguments, **named):
        return super().evaluate(*arguments, **{**named, "metric_key_prefix": "val"})


class EvaluatesAlone(ScriptedTrainer):
    """Its evaluation is its own, and no callback hears of it."""

    def evaluate(self, *arguments, **named):
        metrics = {"eval_score": 1.0}
        self.log(metrics)
        return metrics


class EvaluatesMore(ScriptedTrainer):
    """One of its metrics is of another form, and one is in the result of its evaluation alone."""

    def evaluation_loop(self, *arguments, **named):
        output = super().evaluation_loop(*arguments, **named)
        output.metrics["eval_accuracy"] = {"accuracy": 0.5}
        return output

    def evaluate(self, *arguments, **named):
        return {**super().evaluate(*arguments, **named), "eval_bleu": 0.5}


class Cancels(TrainerCallback):
    """No evaluation takes place at odd steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step % 2 == 0


def make_unusual(kind, directory, best):
    made = make_trainer(directory, save_strategy="no", metric_for_best_model=None)
    data = {"train_dataset": made.train_dataset, "eval_dataset": made.eval_dataset}
    return kind(VALUES, model=Model(), args=made.args, callbacks=[best], **data)


def train_with_other_prefix(directory):
    trainer = make_unusual(EvaluatesWithPrefix, directory, BestCheckpoint("score", higher_is_better=False))
    with pytest.raises(MissingMetricError, match=r"'eval_score' was not reported .*val_loss, .*val_score"):
        trainer.train()
    return trainer.state.global_step


def test_evaluation_of_another_prefix_is_refused_at_once(tmp_path):
    assert run_ranks(train_with_other_prefix, 2, tmp_path) == [1, 1]


def test_metric_that_callbacks_cannot_take_is_refused_in_words(tmp_path):
    with pytest.raises(
        InvalidMetricError, match=r"the metric 'eval_accuracy' must be a number, got {'accuracy': 0\.5}"
    ):
        make_unusual(EvaluatesMore, tmp_path / "a", BestCheckpoint("accuracy")).train()
    with pytest.raises(
        MissingMetricError, match=r"What an evaluate.. of your own adds to its result they are not shown"
    ):
        make_unusual(EvaluatesMore, tmp_path / "b", BestCheckpoint("bleu", higher_is_better=True)).train()


def test_evaluation_that_no_callback_hears_of_is_warned_of_once(tmp_path, caplog):
    make_unusual(EvaluatesAlone, tmp_path, BestCheckpoint("score", higher_is_better=False)).train()
    found = [record.getMessage() for record in caplog.records if record.name.startswith("keepbest")]
    assert [message.split(": ")[1] for message in found] == [
        "no callback was shown the evaluation at step 1",
        "the run ends and no best is kept, since nothing was observed",
    ]
    assert not any("observe()" in message for message in found)  # which is no word of the Trainer


def test_evaluation_that_a_callback_cancels_is_not_warned_of(tmp_path, caplog):
    make_trainer(tmp_path, VALUES, [BestCheckpoint(), Cancels()]).train()
    assert FACE.observed(tmp_path) == [(f"U{step}", VALUES[step - 1]) for step in (2, 4, 6, 8)]
    assert not [record for record in caplog.records if record.name.startswith("keepbest")]


class EvaluatesTraining(TrainerCallback):
    """Evaluates the training data too at the end of some epochs, which cancels the evaluation of the Trainer."""

    def __init__(self, epochs):
        self.epochs, self.trainer = epochs, None

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.epoch in self.epochs:
            self.trainer.evaluate(metric_key_prefix="train")


def train_epochs(directory, beside):
    values = [5.0, 3.0, 4.0, 2.0, 1.0, 6.0]
    epochs = {"eval_strategy": "epoch", "save_strategy": "no", "num_train_epochs": 3, "per_device_train_batch_size": 12}
    trainer = make_trainer(directory, values, [BestCheckpoint(), beside], max_steps=-1, **epochs)
    beside.trainer = trainer
    trainer.train()
    assert trainer.state.global_step == 6


def test_evaluation_that_another_one_cancels_is_warned_of(tmp_path, caplog):
    train_epochs(tmp_path, EvaluatesTraining([2.0]))
    assert FACE.observed(tmp_path) == [("U2", 3.0), ("U6", 6.0)]
    [message] = [record.getMessage() for record in caplog.records if record.name.startswith("keepbest")]
    assert "no callback was shown the evaluation at step 4: an evaluate() that a hook of a callback calls" in message


def test_first_evaluation_that_another_one_cancels_is_an_error(tmp_path):
    with pytest.raises(MissingMetricError, match="unless the hook returns a copy of control from before"):
        train_epochs(tmp_path, EvaluatesTraining([1.0]))


@pytest.mark.parametrize("settings", [{"metric_key": "loss"}, {"id": "other"}])
def test_callback_without_a_state_in_a_checkpoint_may_join(settings, tmp_path):
    FACE.train(tmp_path, VALUES, fails_at=5)
    checkpoint = tmp_path / "checkpoint-4"
    name = "best_model.eval_loss" if "id" not in settings else "best_model.eval_score.id=other"
    message = rf"resume it \(resume='ledger' of BestCheckpoint, since the checkpoint has no state of {name}\)"
    with pytest.raises(RunExistsError, match=message):
        FACE.train(tmp_path, VALUES, resume_from=checkpoint, **settings)
    FACE.train(tmp_path, VALUES, resume_from=checkpoint, beside={"resume": "ledger", **settings})
    assert len(FACE.observed(tmp_path)) == len(VALUES)
    assert [step for step, _ in FACE.observed(tmp_path, name)] == ["U5", "U6", "U7", "U8"]


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


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


def kinds_of_adapters():
    """Of some PEFT does not write all that has their name, and of some it writes weights of the base."""
    import peft

    layers = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    return {
        "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=3, **layers),
        "vera": peft.VeraConfig(r=2, **layers),
        "bias": peft.LoraConfig(r=2, bias="all", **layers),
        "tokens": peft.LoraConfig(r=2, trainable_token_indices=[1], **layers),
    }


def train_kind(directory, kind, name):
    import peft

    trainer = make_trainer(
        directory,
        [3.0, 1.0, 2.0],
        [BestCheckpoint(save_frozen_weights=False)],
        trainer={
            "model": peft.get_peft_model(make_base(), kinds_of_adapters()[kind], adapter_name=name),
            "train_dataset": (data := [{"input_ids": list(range(8)), "labels": 1}] * 8),
            "eval_dataset": data[:2],
        },
    )
    trainer.train()
    place = export_adapter(directory, FACE.ref, directory / "adapter", trainer.model, adapter_name=name)
    own = directory / "checkpoint-2" / ("" if name == "default" else name)
    return [
        weights_of(load_file(folder / "adapter_model.safetensors"))
        | {"logits": logits(peft.PeftModel.from_pretrained(make_base(), str(folder))).tolist()}
        for folder in (own, place)
    ]


@asks_in_old_ways
@pytest.mark.filterwarnings("ignore:The current implementation of AdaLoRA")
@pytest.mark.parametrize("name", ["default", "query"])  # the second is that of a module, too
@pytest.mark.parametrize("kind", ["adalora", "vera", "bias", "tokens"])
def test_export_of_an_adapter_has_what_peft_writes(kind, name, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    [[own, exported]] = run_ranks(train_kind, 1, tmp_path, kind, name, init=False)
    assert exported == own


class Allocation(TrainerCallback):
    """Lets AdaLoRA leave out ranks: its best step has two of them, and the last one has one."""

    def on_optimizer_step(self, args, state, control, model, **_):
        model.base_model.update_and_allocate(state.global_step + 1)


def train_adalora(directory):
    """The weight with the adapter of PEFT's own checkpoint of the best step, of what was exported, and of the end."""
    import peft

    settings = {"init_r": 4, "target_r": 1, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 10, "lora_alpha": 999}
    config = peft.AdaLoraConfig(target_modules=["query"], task_type="SEQ_CLS", **settings)
    model = peft.get_peft_model(make_base(), config)
    data = [{"input_ids": list(range(8)), "labels": 1}] * 8
    callbacks = [Allocation(), BestCheckpoint(save_frozen_weights=False)]
    arguments = {"model": model, "train_dataset": data, "eval_dataset": data[:2]}
    make_trainer(directory, [3.0, 1.0, 2.0], callbacks, trainer=arguments).train()
    chosen = dict(config.rank_pattern)
    place = export_adapter(directory, FACE.ref, directory / "adapter", model)
    assert config.rank_pattern == chosen
    read = [peft.PeftModel.from_pretrained(make_base(), str(each)) for each in (directory / "checkpoint-2", place)]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    return [each.merge_and_unload().get_parameter(name).detach() for each in (*read, model)]


@asks_in_old_ways
def test_adapter_is_exported_with_the_ranks_that_it_had(tmp_path):
    """AdaLoRA chooses among them after the best, too."""
    pytest.importorskip("peft", reason="peft is not installed")
    [[own, exported, ended]] = run_ranks(train_adalora, 1, tmp_path, init=False)
    torch.testing.assert_close(exported, own)
    assert not torch.allclose(ended, own)


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
