"""Schedules of the learning rate that end too early, or are not those of the run that is resumed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from keepbest.errors import ConfigError
from tests.kit import toys

CHECKPOINTS = {"name": "CheckpointCallback", "every_n_epochs": 1}
BESTS = [
    {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_epochs": 1},
    {
        "name": "BestCheckpointCallback",
        "metric_key": "loss/val/total",
        "every_n_epochs": 1,
        "save_training_state": True,
    },
]
HALVED = partial(StepLR, step_size=1, gamma=0.5)


def one_cycle(optimizer, steps=6):
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=steps, cycle_momentum=False)


def test_schedule_that_ends_before_training_is_refused_first(tmp_path):
    old = tmp_path / "run"
    toys.make_trainer(old, callbacks=[CHECKPOINTS], updates=1).train()
    before = sorted(old.rglob("*"))
    trainer = toys.make_trainer(old, schedule=one_cycle, updates=7, callbacks=[CHECKPOINTS], existing="set_aside")
    with pytest.raises(ConfigError, match=r"OneCycleLR of encoder has total_steps=6, .* after 7 updates") as caught:
        trainer.train()
    assert "give it total_steps=7" in str(caught.value)
    assert trainer.update_counter.update == 0
    assert sorted(old.rglob("*")) == before
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_schedule_of_as_many_steps_as_updates_is_that_of_torch(tmp_path):
    trainer = toys.make_trainer(tmp_path, schedule=one_cycle, updates=6)
    trainer.train()
    expected = toys.weights_by_hand(6, schedule=one_cycle)
    for name, value in toys.whole_weights(trainer).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


def test_run_that_resumes_has_the_steps_that_it_began_with(tmp_path):
    toys.make_trainer(tmp_path, schedule=one_cycle, updates=6, callbacks=[CHECKPOINTS]).train()
    longer = toys.make_trainer(
        tmp_path, schedule=partial(one_cycle, steps=8), updates=8, callbacks=[CHECKPOINTS], resume="auto"
    )
    with pytest.raises(ConfigError, match="has total_steps=6, but training ends after 8 updates"):
        longer.train()
    assert longer.update_counter.update == 6


def ends_after_two(step):
    if step > 2:
        raise ValueError("there is no rate")
    return 1.0


def test_step_that_a_schedule_refuses_names_it_and_the_update(tmp_path):
    trainer = toys.make_trainer(tmp_path, schedule=partial(LambdaLR, lr_lambda=ends_after_two), updates=6)
    with pytest.raises(ConfigError, match=r"LambdaLR of encoder cannot take its step 3: .*there is no rate"):
        trainer.train()


@pytest.mark.parametrize(("before", "after"), [(HALVED, None), (None, HALVED)], ids=["removed", "added"])
def test_best_is_not_continued_with_other_schedules(before, after, tmp_path):
    toys.make_trainer(tmp_path, schedule=before, callbacks=BESTS).train()
    trainer = toys.make_trainer(tmp_path, schedule=after, callbacks=BESTS, resume="best", epochs=4)
    with pytest.raises(ConfigError, match=r"a schedule of decoder, encoder.* set schedule as it was"):
        trainer.train()
    assert trainer.update_counter.update == 0


@pytest.mark.parametrize("resume", ["best", "auto"])
def test_optimizers_of_other_submodels_are_not_continued(resume, tmp_path):
    callbacks = [*BESTS, CHECKPOINTS]
    toys.make_trainer(tmp_path, callbacks=callbacks).train()
    model = toys.auto_encoder()
    model.encoder.requires_grad_(False)
    trainer = toys.make_trainer(tmp_path, model=model, callbacks=callbacks, resume=resume, epochs=4)
    with pytest.raises(ConfigError, match="trained decoder, encoder, this one trains decoder"):
        trainer.train()


def test_best_that_training_cannot_continue_from_says_why(tmp_path):
    trainer = toys.make_trainer(tmp_path / "none", callbacks=BESTS, resume="best")
    with pytest.raises(ConfigError, match=r"there is no run in .*none yet, so it has no best"):
        trainer.train()
    toys.make_trainer(tmp_path / "empty", callbacks=[CHECKPOINTS], updates=1).train()
    with pytest.raises(ConfigError, match=r"has no best_model\.loss\.val\.total; trainer\.resume=auto takes"):
        toys.make_trainer(tmp_path / "empty", callbacks=BESTS, resume="best").train()
    toys.make_trainer(tmp_path / "bare", callbacks=[BESTS[0], {**BESTS[1], "save_training_state": False}]).train()
    with pytest.raises(ConfigError, match="was kept without save_training_state"):
        toys.make_trainer(tmp_path / "bare", callbacks=BESTS, resume="best", epochs=4).train()


def test_settings_that_a_resumed_run_does_not_use_are_named(tmp_path, caplog):
    slower = {"encoder": partial(toys.ADAM, lr=0.01), "decoder": toys.MOMENTUM}
    toys.make_trainer(tmp_path, schedule=HALVED, updates=2, callbacks=[CHECKPOINTS]).train()
    same = toys.make_trainer(tmp_path, schedule=HALVED, updates=3, callbacks=[CHECKPOINTS], resume="auto")
    same.train()
    assert "settings that were saved" not in caplog.text
    rarer = partial(StepLR, step_size=4, gamma=0.5)
    toys.make_trainer(
        tmp_path, optimizers=slower, schedule=rarer, updates=4, callbacks=[CHECKPOINTS], resume="auto"
    ).train()
    [message] = [message for message in caplog.messages if "settings that were saved" in message]
    assert message.partition(": ")[2].split("; ") == [
        "initial_lr of the optimizer of encoder is 0.05 and not 0.01",
        "step_size of the schedule of encoder is 1 and not 4",
        "step_size of the schedule of decoder is 1 and not 4",
    ]


def test_learning_rate_that_is_not_used_is_named(tmp_path, caplog):
    toys.make_trainer(tmp_path, updates=2, callbacks=[CHECKPOINTS]).train()
    faster = {"encoder": toys.ADAM, "decoder": partial(toys.MOMENTUM, lr=0.5)}
    trainer = toys.make_trainer(tmp_path, optimizers=faster, updates=3, callbacks=[CHECKPOINTS], resume="auto")
    trainer.train()
    assert "lr of the optimizer of decoder is 0.05 and not 0.5" in caplog.text
    assert trainer.optimizers["decoder"].param_groups[0]["lr"] == 0.05
