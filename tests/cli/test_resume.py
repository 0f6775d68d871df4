from __future__ import annotations

import shutil

import pytest
import yaml

from keepbest.cli.work import train
from keepbest.errors import ConfigError
from tests.kit import cli_runs as runs
from tests.kit.runs import ledger

EPOCHS = 12


@pytest.mark.parametrize(
    ("world_size", "strategy"), [(1, "single"), (2, "ddp"), (4, "ddp"), (2, "fsdp1"), (2, "fsdp2")]
)
def test_run_that_is_resumed_equals_one_that_went_through(world_size, strategy, tmp_path):
    content = runs.describe_run(tmp_path / "whole", epochs=EPOCHS, strategy=strategy)
    content["trainer"]["callbacks"] += [{"name": "CheckpointCallback", "every_n_epochs": 2}]
    path = runs.write_config(tmp_path / "config.yaml", content)
    runs.succeeded(runs.train_on_ranks(world_size, path))

    parts = f"directory={tmp_path / 'parts'}"
    runs.succeeded(runs.train_on_ranks(world_size, path, parts, f"trainer.epochs={EPOCHS // 2}"))
    half = runs.checkpoints(tmp_path / "parts")
    provisional = [ref for ref, checkpoint in half.items() if checkpoint.exceeded is False]
    runs.succeeded(runs.train_on_ranks(world_size, path, parts, "trainer.resume=auto"))

    whole, resumed = runs.checkpoints(tmp_path / "whole"), runs.checkpoints(tmp_path / "parts")
    assert resumed.keys() == whole.keys() == {runs.BEST, *(f"{runs.BEST}.tolerance={n}" for n in (0, 1, 3))}
    assert provisional, "a tolerance must be open at the half for this to tell anything"
    assert half[runs.BEST].value != whole[runs.BEST].value, "the best must come in the second half"
    runs.assert_same_run(tmp_path / "parts", tmp_path / "whole")
    saved = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())
    assert (saved["trainer"]["epochs"], saved["trainer"]["resume"]) == (EPOCHS, "auto")


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "single"), (2, "ddp"), (2, "fsdp1"), (2, "fsdp2")])
def test_run_that_continues_from_its_best_ends_as_before(world_size, strategy, tmp_path):
    content = runs.describe_run(tmp_path / "whole", epochs=EPOCHS, strategy=strategy)
    content["trainer"]["callbacks"] = [runs.evaluation(), runs.best(tolerances=[0], save_training_state=True)]
    path = runs.write_config(tmp_path / "config.yaml", content)
    runs.succeeded(runs.train_on_ranks(world_size, path))
    parts = shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
    runs.succeeded(runs.train_on_ranks(world_size, path, f"directory={parts}", "trainer.resume=best"))
    events, best = ledger(parts), str(runs.checkpoints(tmp_path / "whole")[runs.BEST].iteration)
    [again] = [place for place, each in enumerate(events) if each["event"] == "begin" and each["at"] == best]
    seen = [(each["iteration"], each["value"]) for each in ledger(tmp_path / "whole") if each["event"] == "observation"]
    after_it = seen[[iteration for iteration, _ in seen].index(best) + 1 :]
    assert len(after_it) > 1
    assert after_it == [(each["iteration"], each["value"]) for each in events[again:] if each["event"] == "observation"]
    runs.assert_same_run(parts, tmp_path / "whole")


@pytest.mark.parametrize(
    ("trainer", "settings", "message"),
    [
        ({"ema_decay": 0.9}, {"save_training_state": True}, "remove trainer.ema_decay, or save_training_state"),
        ({}, {"save_training_state": True, "model_names": ["encoder"]}, "remove model_names"),
        ({"resume": "best"}, {}, "needs one BestCheckpointCallback with save_training_state, and the config has none"),
        ({"resume": "best"}, {"save_training_state": True}, "there is no run in .* yet, so it has no best"),
    ],
)
def test_best_that_training_cannot_continue_from_is_refused(trainer, settings, message, tmp_path):
    content = runs.describe_run(tmp_path / "run", updates=2, **trainer)
    content["trainer"]["callbacks"] = [runs.evaluation(), runs.best(**settings)]
    with pytest.raises(ConfigError, match=message):
        train(runs.write_config(tmp_path / "config.yaml", content), [])
