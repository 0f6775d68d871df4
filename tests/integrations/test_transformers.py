"""The Trainer's own best checkpoint and EarlyStoppingCallback are the oracle of what is kept."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    EarlyStoppingCallback,
    TrainerCallback,
)

from keepbest.errors import ConfigError, MissingMetricError, RunExistsError
from keepbest.export import export
from keepbest.integrations.transformers import BestCheckpoint
from keepbest.run.files import Files
from tests.integrations.trainer_runs import (
    VALUES,
    abandon_all,
    kept,
    make_trainer,
    observed,
    run_in_pieces,
    weights_of,
    weights_of_checkpoint,
)
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import ledger, refs, snapshots


def run(directory, strategy, settings, arguments):
    """Trains to the end; the state of our keeper, the Trainer's best checkpoint, and the weights that it has loaded."""
    best = BestCheckpoint(tolerances=[0, 1, 2], keep_top_k=3, **settings)
    trainer = make_trainer(directory, callbacks=[best], strategy=strategy, load_best_model_at_end=True, **arguments)
    trainer.train()
    return best.keeper.state, trainer.state.best_model_checkpoint, weights_of(trainer.model.state_dict())


@pytest.mark.parametrize(
    ("strategy", "world_size", "settings"),
    [("alone", 1, {}), ("ddp", 2, {}), ("ddp", 2, {"async_save": True, "format": "safetensors"})],
)
def test_best_and_top_k_are_what_the_trainer_itself_wrote_at_these_steps(strategy, world_size, settings, tmp_path):
    results = run_ranks(run, world_size, tmp_path, strategy, settings, {}, init=world_size > 1)
    assert [state for state, *_ in results] == [results[0][0]] * world_size
    found, (_, path, loaded) = kept(tmp_path), results[0]
    assert found[""] == ("U6", 2.0, weights_of_checkpoint(path)) == ("U6", 2.0, loaded)
    for place, step in enumerate([6, 8, 2], start=1):
        of_trainer = weights_of_checkpoint(tmp_path / f"checkpoint-{step}")
        assert found[f".top={place}"] == (f"U{step}", VALUES[step - 1], of_trainer)
    assert len({str(weights) for *_, weights in found.values()}) == 3


@pytest.mark.parametrize(("strategy", "settings"), [("fsdp1", {}), ("fsdp2", {}), ("fsdp2", {"format": "dcp"})])
def test_best_of_sharded_models_is_what_the_trainer_loads_at_the_end(strategy, settings, tmp_path):
    results = run_ranks(run, 2, tmp_path, strategy, settings, {"save_steps": 2})
    assert [kept(tmp_path)[""]] * 2 == [("U6", 2.0, loaded) for *_, loaded in results]


def test_best_is_that_of_the_save_strategy_best(tmp_path):
    [(_, path, _), _] = run_ranks(run, 2, tmp_path, "ddp", {}, {"save_strategy": "best", "save_total_limit": 1})
    assert kept(tmp_path)[""] == ("U6", 2.0, weights_of_checkpoint(path))


def stop_early(directory):
    """What the Trainer ends with, in a run of its own for each patience."""
    found = {}
    for patience in (1, 2, 3, 4):
        stopper = EarlyStoppingCallback(early_stopping_patience=patience)
        trainer = make_trainer(directory / str(patience), callbacks=[stopper], load_best_model_at_end=True)
        trainer.train()
        found[patience] = trainer.state.global_step, trainer.state.best_metric, weights_of(trainer.model.state_dict())
    return found


def run_beside(directory):
    best = BestCheckpoint(tolerances=[0, 1, 2])
    stopper = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(directory, callbacks=[best, stopper], load_best_model_at_end=True)
    trainer.train()
    return trainer.state.global_step, weights_of(trainer.model.state_dict())


def run_tolerances(directory):
    best = BestCheckpoint(tolerances=[0, 1, 2, 3])
    make_trainer(directory / "run", callbacks=[best]).train()
    return stop_early(directory / "peer"), run_beside(directory / "beside")


def test_tolerance_keeps_what_early_stopping_with_one_more_of_patience_would_have_kept(tmp_path):
    stopped, (steps, weights) = run_ranks(run_tolerances, 2, tmp_path)[0]
    assert [step for step, *_ in stopped.values()] == [3, 4, 5, 8]  # the first three never saw the best of all
    found = kept(tmp_path / "run")
    for patience, (_, value, loaded) in stopped.items():
        iteration = "U2" if patience < 4 else "U6"
        assert found[f".tolerance={patience - 1}"] == (iteration, value, loaded)
    # Early stopping works beside it, and ends the run where the tolerance is exceeded.
    beside = kept(tmp_path / "beside")
    assert (steps, beside[""], beside[".tolerance=1"]) == (4, ("U2", 3.0, weights), found[".tolerance=1"])


def run_whole_and_in_pieces(directory, pieces, settings, arguments):
    whole = run_in_pieces(directory / "whole", [(VALUES, None)], settings, arguments)
    return whole, run_in_pieces(directory / "resumed", pieces, settings, arguments)


@pytest.mark.parametrize(
    ("pieces", "settings", "arguments"),
    [
        ([(VALUES[:3], None), (VALUES, None)], [{}], {"save_total_limit": 1}),
        ([(VALUES, 4), (VALUES, 8), (VALUES, None)], [{"async_save": True}], {"save_steps": 2}),
        ([(VALUES, 5), (VALUES, None)], [{}], {"save_strategy": "best", "eval_on_start": True}),
        ([(VALUES, 6), (VALUES, None)], [{}], {"restore_callback_states_from_checkpoint": True}),
        ([(VALUES, 6), (VALUES, None)], [{}, {"id": "b", "min_delta": 1.5}], {"save_steps": 2}),
        ([(VALUES, 5), (VALUES, None)], [{}], {"eval_steps": 2, "save_steps": 3, "eval_on_start": True}),
        ([(VALUES, 5), (VALUES, None)], [{}], {"gradient_accumulation_steps": 3}),
        ([(VALUES, 6), (VALUES, None)], [{}], {"strategy": "fsdp2", "save_steps": 2}),
    ],
)
def test_run_that_goes_on_from_a_checkpoint_ends_like_one_that_was_never_stopped(pieces, settings, arguments, tmp_path):
    results = run_ranks(run_whole_and_in_pieces, 2, tmp_path, pieces, settings, arguments)
    for whole, resumed in results:
        assert resumed == whole == results[0][0]
    assert kept(tmp_path / "resumed") == kept(tmp_path / "whole")
    assert observed(tmp_path / "resumed") == observed(tmp_path / "whole") != []
    assert len(refs(tmp_path / "whole")) == 7 * len(settings)


def test_what_the_newest_checkpoint_names_is_there_though_a_better_one_came_later(tmp_path):
    trainer = make_trainer(
        tmp_path, [5.0, 3.0, 2.0, 9.0], [BestCheckpoint(tolerances=[1])], trainer={"fails_at": 4}, save_steps=2
    )
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    abandon_all(trainer)
    assert (set(refs(tmp_path).values()), snapshots(tmp_path)) == ({"U3"}, {"U2", "U3"})
    resumed = make_trainer(tmp_path, [5.0, 3.0, 7.0, 7.0], [BestCheckpoint(tolerances=[1])], save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    found = kept(tmp_path)
    assert found[".tolerance=1"] == ("U2", 3.0, weights_of_checkpoint(tmp_path / "checkpoint-2"))
    assert found[""][:2] == ("U3", 2.0)


def test_what_older_checkpoints_name_is_let_go(tmp_path):
    make_trainer(tmp_path, [5.0, 4.0, 3.0, 2.0], [BestCheckpoint()], save_total_limit=1).train()
    assert snapshots(tmp_path) == {"U4"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"save_strategy": "best"}, [1, 2, 6]),
        ({"save_strategy": "epoch", "per_device_train_batch_size": 8}, [3, 6, 8]),
        ({"save_steps": 3, "eval_steps": 2}, [2, 6, 8]),
    ],
)
def test_what_a_checkpoint_names_is_on_the_disk_before_it_is_written(arguments, expected, tmp_path, monkeypatch):
    create, found = Files.create, []

    def create_slowly(self, path):
        time.sleep(0.05)  # the thread that saves would otherwise be done in time, without anybody waiting for it
        return create(self, path)

    monkeypatch.setattr(Files, "create", create_slowly)
    trainer = make_trainer(tmp_path, callbacks=[BestCheckpoint(async_save=True)], **arguments)
    save_model = trainer.save_model
    monkeypatch.setattr(
        trainer, "save_model", lambda *where, **how: (found.append(observed(tmp_path)[-1]), save_model(*where, **how))
    )
    trainer.train()
    assert found == [(f"U{number}", VALUES[number - 1]) for number in expected]


class Evaluates(TrainerCallback):
    """Evaluates beside the training, after each step and after each evaluation of the training."""

    def __init__(self):
        self.trainer, self.is_busy = None, False

    def on_step_end(self, args, state, control, **kwargs):
        self.evaluate(metric_key_prefix="test")

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluate()

    def evaluate(self, **settings):
        if not self.is_busy:
            self.is_busy = True
            should_evaluate = self.trainer.control.should_evaluate
            self.trainer.evaluate(**settings)
            self.trainer.control.should_evaluate = should_evaluate
            self.is_busy = False


def run_with_other_evaluations(directory):
    evaluates, best = Evaluates(), BestCheckpoint()
    trainer = make_trainer(directory, callbacks=[best, evaluates], eval_on_start=True, eval_steps=2)
    evaluates.trainer = trainer
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)


def test_only_one_evaluation_of_the_training_at_each_step_is_observed(tmp_path):
    run_ranks(run_with_other_evaluations, 2, tmp_path)
    assert observed(tmp_path) == [("U2", 3.0), ("U4", 6.0), ("U6", 2.0), ("U8", 2.5)]


def test_of_several_data_sets_the_one_with_the_metric_is_observed(tmp_path):
    make_trainer(
        tmp_path / "run",
        callbacks=[BestCheckpoint("second_loss"), BestCheckpoint()],
        trainer={"eval_dataset": {name: make_trainer(tmp_path).eval_dataset for name in ("first", "second", "third")}},
        metric_for_best_model="third_score",
    ).train()
    names = ["best_model.eval_second_loss", "best_model.eval_third_score"]
    assert set(refs(tmp_path / "run")) == set(names)
    assert [len(observed(tmp_path / "run", name)) for name in names] == [8, 8]


def run_without_metric(directory, lacking, settings):
    """On the ranks that are lacking it there is no score."""

    def look_up(_):
        return {} if dist.get_rank() in lacking else {"score": 1.0}

    best = BestCheckpoint("score", higher_is_better=False, **settings)
    trainer = make_trainer(
        directory, callbacks=[best], trainer={"compute_metrics": look_up}, metric_for_best_model=None
    )
    trainer.train()


@pytest.mark.parametrize("lacking", [[0, 1], [1]])
def test_metric_that_was_not_reported_is_told_on_every_rank_with_those_that_were(lacking, tmp_path):
    with start_ranks(run_without_metric, 2, tmp_path, lacking, {}) as ranks:
        outcomes = ranks.collect()
    for outcome in outcomes:
        with pytest.raises(MissingMetricError, match=f"missing on {len(lacking)} of 2 ranks"):
            raise outcome.exception
        reported = "'eval_score' was not reported by the evaluation; reported: epoch, eval_loss"
        assert all(f"rank {rank}: {reported}" in str(outcome.exception) for rank in lacking)


def test_metric_that_only_rank_0_has_is_enough_where_that_is_said(tmp_path):
    run_ranks(run_without_metric, 2, tmp_path, [1], {"metric_reduction": "rank0"})
    assert set(refs(tmp_path)) == {"best_model.eval_score"}


def test_metric_of_none_of_several_data_sets_is_told(tmp_path):
    data = make_trainer(tmp_path).eval_dataset
    trainer = make_trainer(
        tmp_path,
        callbacks=[BestCheckpoint("third_loss")],
        trainer={"eval_dataset": {"first": data, "second": data}},
        metric_for_best_model="first_loss",
    )
    with pytest.raises(
        MissingMetricError, match=r"'eval_third_loss' was not .*; reported: .*eval_first_loss.*eval_second_"
    ):
        trainer.train()
    assert trainer.state.global_step == 1


def test_run_that_failed_is_left_as_it_was_and_never_overwritten(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[BestCheckpoint(tolerances=[5])], trainer={"fails_at": 4}, save_steps=2)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    before = ledger(tmp_path)
    assert set(refs(tmp_path)) == {"best_model.eval_score"}
    with pytest.raises(RunExistsError, match="resume it"):  # the keeper of the training that failed is not in the way
        trainer.train()
    assert ledger(tmp_path) == before
    trainer.fails_at = None
    trainer.train(resume_from_checkpoint=True)
    assert observed(tmp_path) == [(f"U{number}", value) for number, value in enumerate(VALUES, start=1)]
    assert set(refs(tmp_path)) == {"best_model.eval_score", "best_model.eval_score.tolerance=5"}  # closed


def test_run_that_failed_before_its_first_checkpoint_may_start_over_in_its_folder(tmp_path):
    best = BestCheckpoint(tolerances=[0, 1], resume="ledger")
    trainer = make_trainer(tmp_path, callbacks=[best], trainer={"fails_at": 5}, save_strategy="no")
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    best.keeper.abandon()
    whole = BestCheckpoint(tolerances=[0, 1], resume="ledger")
    make_trainer(tmp_path, callbacks=[whole], save_strategy="no").train()
    assert {ref: entry[:2] for ref, entry in kept(tmp_path).items()} == {
        "": ("U6", 2.0),
        ".tolerance=0": ("U2", 3.0),
        ".tolerance=1": ("U2", 3.0),
    }


def test_callback_may_join_a_run_that_was_begun_without_it(tmp_path):
    make_trainer(tmp_path, VALUES[:4]).train()
    make_trainer(tmp_path, callbacks=[BestCheckpoint()]).train(resume_from_checkpoint=True)
    assert observed(tmp_path) == [("U5", 3.5), ("U6", 2.0), ("U7", 7.0), ("U8", 2.5)]


@pytest.mark.parametrize(
    ("settings", "arguments", "best"),
    [
        ({}, {"metric_for_best_model": "eval_score", "greater_is_better": True}, "U7"),
        ({"higher_is_better": False}, {"greater_is_better": True}, "U6"),
        ({"metric_key": "eval_runtime", "higher_is_better": True}, {}, None),
    ],
)
def test_direction_is_that_of_the_arguments_unless_another_is_given(settings, arguments, best, tmp_path):
    callback = BestCheckpoint(**settings)
    make_trainer(tmp_path, callbacks=[callback], save_strategy="no", **arguments).train()
    assert best is None or set(refs(tmp_path).values()) == {best}
    assert callback.keeper.policy.higher_is_better == (best != "U6")


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"metric_for_best_model": None}, "no metric is named"),
        (
            {},
            {"metric_for_best_model": "wer", "greater_is_better": None},
            "is True for 'eval_wer', but its name says False",
        ),
        ({"metric_key": "runtime"}, {}, "whether a higher 'eval_runtime' is better"),
    ],
)
def test_metric_that_is_not_known_is_refused_before_training(settings, arguments, message, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[BestCheckpoint(**settings)], **arguments)
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_deepspeed_is_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[BestCheckpoint()])
    trainer.args.deepspeed_plugin = SimpleNamespace()
    with pytest.raises(ConfigError, match="one of DeepSpeed"):
        trainer.train()


@pytest.mark.parametrize(("largest_file", "files"), [(5_000_000_000, 1), (3_000, 3)])
@pytest.mark.parametrize(
    ("automatic", "labels", "is_tied"),
    [(AutoModelForSequenceClassification, 1, False), (AutoModelForMaskedLM, list(range(8)), True)],
)
def test_from_pretrained_reads_the_best_from_an_exported_folder(
    automatic, labels, is_tied, largest_file, files, tmp_path
):
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    data = [{"input_ids": list(range(8)), "labels": labels}] * 8
    trainer = make_trainer(
        tmp_path / "run",
        [2.0, 1.0, 3.0],
        [BestCheckpoint()],
        trainer={
            "model": automatic.from_config(BertConfig(vocab_size=32, max_position_embeddings=8, **small)),
            "train_dataset": data,
            "eval_dataset": data[:2],
        },
        load_best_model_at_end=True,
    )
    trainer.train()
    trainer.model.config.save_pretrained(tmp_path / "exported")
    written = export(tmp_path / "run", "best_model.eval_score", tmp_path / "exported", largest_file=largest_file)
    model, info = automatic.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert {problem: keys for problem, keys in info.items() if keys} == {}
    assert weights_of(model.state_dict()) == weights_of(trainer.model.state_dict())
    head = model.get_output_embeddings()
    assert (head is not None and head.weight is model.get_input_embeddings().weight) == is_tied
    assert len([path for path in written if path.suffix == ".safetensors"]) == files


def test_frameworks_are_imported_by_nobody_who_does_not_use_them():
    program = """
import pkgutil, sys, keepbest
for module in pkgutil.walk_packages(keepbest.__path__, "keepbest."):
    if module.name != "keepbest.__main__" and not module.name.startswith("keepbest.integrations."):
        __import__(module.name)
print([name for name in sys.modules if name.split(".")[0] in ("transformers", "accelerate")])
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout == "[]\n"
