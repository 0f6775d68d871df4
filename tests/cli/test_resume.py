from __future__ import annotations

import pytest
import yaml

from tests.kit import cli_runs as runs

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
