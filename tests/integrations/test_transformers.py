"""The contract, and what only the callback of the Trainer does."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, TrainerCallback

from keepbest.errors import ConfigError, MissingMetricError, RunExistsError
from keepbest.export import export
from keepbest.integrations.transformers import BestCheckpoint
from keepbest.run.files import Files
from tests.integrations.contract import TrainerContract, assert_continues
from tests.integrations.faces.face import VALUES, failing, weights_of
from tests.integrations.faces.transformers import Transformers, make_trainer
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import refs, snapshots

FACE = Transformers()


class TestContract(TrainerContract):
    face = FACE

    @pytest.fixture(autouse=True)
    def skip_what_torch_cannot_resume(self, request):
        resumed = getattr(request.node, "callspec", None) and request.node.callspec.params.get("interrupted")
        if resumed and "strategy" not in resumed and torch.__version__ < "2.11":
            pytest.skip("torch 2.10 loads nothing to cpu:0, where transformers wants the optimizer of each rank")


def test_optimizer_and_scheduler_of_the_best_can_be_loaded(tmp_path):
    kept = {"callbacks": [BestCheckpoint(save_training_state=True)], "lr_scheduler_type": "linear"}
    trainer = make_trainer(tmp_path, [3.0, 2.0], optim="adamw_torch", **kept)
    trainer.train()
    fresh = make_trainer(tmp_path / "fresh", optim="adamw_torch")
    fresh.create_optimizer_and_scheduler(8)
    others = {"scheduler": fresh.lr_scheduler}
    assert_continues(tmp_path, fresh.model, fresh.optimizer, others, like=trainer.optimizer)
    assert fresh.lr_scheduler.last_epoch == 2


def keep_best_only(directory):
    arguments = {"save_strategy": "best", "save_total_limit": 1, "load_best_model_at_end": True}
    trainer = make_trainer(directory, callbacks=[BestCheckpoint()], **arguments)
    trainer.train()
    return trainer.state.best_model_checkpoint


def test_best_is_that_of_the_save_strategy_best(tmp_path):
    path, _ = run_ranks(keep_best_only, 2, tmp_path)
    assert FACE.kept(tmp_path)[""] == ("U6", 2.0, FACE.weights_of_checkpoint(path))


def evaluate_before_training(directory):
    """The Trainer then takes the model for prepared, and trains without DDP."""
    trainer = make_trainer(directory, callbacks=[BestCheckpoint()])
    trainer.evaluate()
    with pytest.raises(ConfigError, match="ranks 0, 1 hold different weights under the same name"):
        trainer.train()


def test_ranks_that_the_trainer_does_not_synchronize_are_refused(tmp_path):
    run_ranks(evaluate_before_training, 2, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"eval_strategy": "no"},
        {"eval_strategy": "epoch", "eval_delay": 9},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 9},
    ],
)
def test_training_that_is_never_evaluated_is_refused(arguments, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[BestCheckpoint("loss")], save_strategy="no", **arguments)
    with pytest.raises(ConfigError, match="there is no evaluation with eval_strategy="):
        trainer.train()
    assert not (tmp_path / "checkpoints").exists()


def test_what_older_checkpoints_name_is_released(tmp_path):
    FACE.train(tmp_path, [5.0, 4.0, 3.0, 2.0], framework={"save_total_limit": 1})
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
def test_what_a_checkpoint_names_is_on_disk_before_it(arguments, expected, tmp_path, monkeypatch):
    create, found = Files.create, []

    def create_slowly(self, path):
        time.sleep(0.05)  # the thread that saves would otherwise be done in time, without anybody waiting for it
        return create(self, path)

    monkeypatch.setattr(Files, "create", create_slowly)
    trainer = make_trainer(tmp_path, callbacks=[BestCheckpoint(async_save=True)], **arguments)
    save_model = trainer.save_model
    monkeypatch.setattr(
        trainer,
        "save_model",
        lambda *where, **how: (found.append(FACE.observed(tmp_path)[-1]), save_model(*where, **how)),
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


def test_one_evaluation_of_the_training_per_step_is_observed(tmp_path):
    evaluates, best = Evaluates(), BestCheckpoint()
    trainer = make_trainer(tmp_path, callbacks=[best, evaluates], eval_on_start=True, eval_steps=2)
    evaluates.trainer = trainer
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert FACE.observed(tmp_path) == [("U2", 3.0), ("U4", 6.0), ("U6", 2.0), ("U8", 2.5)]


def start_with_a_wrong_metric(directory):
    best = BestCheckpoint("scor", higher_is_better=False)
    trainer = make_trainer(directory, callbacks=[best], eval_on_start=True)
    with pytest.raises(MissingMetricError, match=r"'eval_scor' was not reported by the evaluation; .* eval_score"):
        trainer.train()
    best.keeper.abandon()
    return trainer.state.global_step


def test_wrong_metric_is_found_by_the_evaluation_before_training(tmp_path):
    assert run_ranks(start_with_a_wrong_metric, 2, tmp_path) == [0, 0]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("metric_for_best_model", "metric_key"), ("save_total_limit", "keep_top_k"), ("output_dir", "directory")],
)
def test_names_of_the_trainer_lead_to_those_of_the_callback(wrong, right):
    with pytest.raises(ConfigError, match=f"there is no setting '{wrong}'; did you mean '{right}'"):
        BestCheckpoint(**{wrong: "loss"})


def test_functions_on_a_new_best_beside_restored_callbacks(tmp_path):
    with pytest.raises(ConfigError, match="on_new_best"):
        make_trainer(
            tmp_path, callbacks=[BestCheckpoint(on_new_best=print)], restore_callback_states_from_checkpoint=True
        )


def test_data_set_with_the_metric_is_observed_among_several(tmp_path):
    make_trainer(
        tmp_path / "run",
        callbacks=[BestCheckpoint("second_loss"), BestCheckpoint()],
        trainer={"eval_dataset": {name: make_trainer(tmp_path).eval_dataset for name in ("first", "second", "third")}},
        metric_for_best_model="third_score",
    ).train()
    names = ["best_model.eval_second_loss", "best_model.eval_third_score"]
    assert set(refs(tmp_path / "run")) == set(names)
    assert [len(FACE.observed(tmp_path / "run", name)) for name in names] == [8, 8]


def run_with_metric_on_rank_0(directory):
    def look_up(_):
        return {"score": 1.0} if dist.get_rank() == 0 else {}

    for reduction in ("rank0", "mean"):
        best = BestCheckpoint("score", higher_is_better=False, metric_reduction=reduction)
        settings = {"trainer": {"compute_metrics": look_up}, "metric_for_best_model": None}
        make_trainer(directory / reduction, callbacks=[best], **settings).train()


def test_metric_that_only_rank_0_has_is_enough_if_asked_for(tmp_path):
    with start_ranks(run_with_metric_on_rank_0, 2, tmp_path) as ranks:
        outcomes = ranks.collect()
    assert set(refs(tmp_path / "rank0")) == {"best_model.eval_score"}
    for outcome in outcomes:
        with pytest.raises(MissingMetricError, match="missing on 1 of 2 ranks"):
            raise outcome.exception
        reported = "rank 1: 'eval_score' was not reported by the evaluation; reported: epoch, eval_loss"
        assert reported in str(outcome.exception)


def test_metric_of_none_of_several_data_sets_is_reported(tmp_path):
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


def test_trainer_that_failed_refuses_to_start_over_and_resumes(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[BestCheckpoint()], trainer={"fails_at": 4}, save_steps=2)
    with failing(4):
        trainer.train()
    with pytest.raises(RunExistsError, match="resume it"):  # the keeper of the training that failed is not in the way
        trainer.train()
    trainer.fails_at = None
    trainer.train(resume_from_checkpoint=True)
    assert FACE.observed(tmp_path) == [(f"U{number}", value) for number, value in enumerate(VALUES, start=1)]


def test_callback_may_join_a_run_that_began_without_it(tmp_path):
    make_trainer(tmp_path, VALUES[:4]).train()
    FACE.train(tmp_path, VALUES, resume_from=tmp_path / "checkpoint-4")
    assert FACE.observed(tmp_path) == [("U5", 3.5), ("U6", 2.0), ("U7", 7.0), ("U8", 2.5)]


@pytest.mark.parametrize(
    ("settings", "arguments", "best"),
    [
        ({}, {"metric_for_best_model": "eval_score", "greater_is_better": True}, "U7"),
        ({"higher_is_better": False}, {"greater_is_better": True}, "U6"),
        ({"metric_key": "eval_runtime", "higher_is_better": True}, {}, None),
    ],
)
def test_direction_is_that_of_the_arguments_unless_one_is_given(settings, arguments, best, tmp_path):
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
    ],
)
def test_metric_that_is_not_known_is_refused_before_training(settings, arguments, message, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[BestCheckpoint(**settings)], **arguments)
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_training_state_of_deepspeed_is_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[BestCheckpoint(save_training_state=True)])
    trainer.args.deepspeed_plugin = SimpleNamespace()
    with pytest.raises(ConfigError, match="save_training_state: the optimizer of DeepSpeed"):
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
