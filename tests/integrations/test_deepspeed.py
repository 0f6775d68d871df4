"""ZeRO-1, 2 and 3 of DeepSpeed: its own gathering is the oracle. Where it is installed."""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from torch import nn

if find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from keepbest import BestKeeper, load
from keepbest.errors import SnapshotError
from keepbest.integrations.transformers import BestCheckpoint
from keepbest.run.files import Files
from tests.integrations.faces import face
from tests.integrations.faces.on_accelerate import Model
from tests.integrations.faces.transformers import make_trainer
from tests.kit.pool import run_ranks
from tests.kit.runs import refs

# So that ZeRO-3 divides small parameters too.
ZERO = {"stage3_param_persistence_threshold": 0}


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))


def start():
    """Returns the module, which this process is to import only here."""
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    warnings.simplefilter("ignore")
    face.use_ranks()
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def whole(deepspeed, engine):
    """What DeepSpeed puts together."""
    divided = [each for each in engine.parameters() if hasattr(each, "ds_id")]
    with deepspeed.zero.GatheredParameters(divided) if divided else nullcontext():
        return face.weights_of({name: each.detach().clone() for name, each in engine.module.named_parameters()})


def train(root, stage, settings):
    """The third of five intervals is best. Returns the weights of all, and those before and after one more update."""
    deepspeed = start()
    engine, *_ = deepspeed.initialize(
        model=(model := make()),
        model_parameters=model.parameters(),
        config={
            "train_batch_size": 4,
            "zero_optimization": {"stage": stage, **ZERO},
            "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
    )
    random = torch.Generator().manual_seed(torch.distributed.get_rank())

    def update(batch):
        engine.backward(engine(batch).square().mean())
        engine.step()

    seen = []
    with BestKeeper(engine, directory=root, metric_key="loss", tolerances=[0], **settings) as keeper:
        for epoch, value in enumerate([5.0, 3.0, 2.0, 6.0, 4.0], start=1):
            update(torch.randn(2, 5, generator=random))
            seen.append(whole(deepspeed, engine))
            keeper.observe(value, epoch=epoch)
        keeper.restore_best()
    before = whole(deepspeed, engine)
    update(torch.ones(2, 5))
    return seen, before, whole(deepspeed, engine)


def updated(weights):
    """The same update, in one process and without DeepSpeed."""
    (plain := make()).load_state_dict({name: torch.tensor(values) for name, values in weights.items()})
    plain(torch.ones(2, 5)).square().mean().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    return face.weights_of(plain.state_dict())


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (1, {}),
        (2, {"async_save": True}),
        (3, {}),
        (3, {"async_save": True, "format": "safetensors"}),
        (3, {"format": "dcp"}),
    ],
)
def test_best_of_an_engine_is_what_deepspeed_gathers(stage, settings, tmp_path):
    for seen, before, after in run_ranks(train, 2, tmp_path, stage, settings):
        assert before == seen[2] != seen[4]
        # The optimizer continues from what was restored. ZeRO has another copy of the weights.
        expected = updated(before)
        for name, values in after.items():
            torch.testing.assert_close(torch.tensor(values), torch.tensor(expected[name]))
    assert refs(tmp_path) == {"best_model.loss": "E3", "best_model.loss.tolerance=0": "E3"}
    load(tmp_path, "best_model.loss", plain := make())
    assert face.weights_of(plain.state_dict()) == seen[2]


def fail_to_save(root):
    """A disk is full at the second best, and a file is damaged when it is loaded. Returns what was seen then."""
    deepspeed = start()
    settings = {"zero_optimization": {"stage": 3, **ZERO}, "zero_allow_untested_optimizer": True}
    optimizer = {"type": "SGD", "params": {"lr": 0.1}}
    config = {"train_batch_size": 4, "optimizer": optimizer, **settings}
    engine, *_ = deepspeed.initialize(model=(model := make()), model_parameters=model.parameters(), config=config)
    seen, outcomes = [], []
    with BestKeeper(engine, directory=root, metric_key="loss", on_save_error="warn") as keeper:
        for epoch in (1, 2, 3):
            engine.backward(engine(torch.ones(2, 5)).square().mean())
            engine.step()
            seen.append(whole(deepspeed, engine))
            with pytest.MonkeyPatch.context() as patch:
                if epoch == 2:
                    patch.setattr(Files, "rename", refuse)
                outcomes.append(keeper.observe(1.0 / epoch, epoch=epoch).save_failed)
        [path] = (root / "checkpoints" / "snapshots" / "E3").glob("*.pt")
        if torch.distributed.get_rank() == 0:
            path.write_bytes(b"")
        with pytest.raises(SnapshotError):
            keeper.restore_best()
    return outcomes, seen[2] == whole(deepspeed, engine), engine(torch.ones(2, 5)).shape


def refuse(files, old, new):
    raise OSError(28, "no space left", str(new))


def test_failed_save_and_load_leave_a_divided_model_as_it_was(tmp_path):
    assert run_ranks(fail_to_save, 2, tmp_path) == [([False, True, False], True, (2, 1))] * 2


def train_with_the_trainer(root, stage):
    start()
    config = {
        "zero_optimization": {"stage": stage, **ZERO},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    arguments = {"save_strategy": "no", "deepspeed": config}
    trainer = make_trainer(root, [5.0, 2.0, 3.0], [BestCheckpoint(tolerances=[0])], **arguments)
    found = []
    evaluate = trainer.evaluate

    def record(*given, **named):
        import deepspeed

        found.append(whole(deepspeed, trainer.model_wrapped))
        return evaluate(*given, **named)

    trainer.evaluate = record
    trainer.train()
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_best_of_the_trainer_with_deepspeed_is_kept(stage, tmp_path):
    [found, _] = run_ranks(train_with_the_trainer, 2, tmp_path, stage)
    loaded = load(tmp_path, "best_model.eval_score", model := Model())
    assert (str(loaded.iteration), loaded.value) == ("U2", 2.0)
    kept = face.weights_of(dict(model.named_parameters()))
    assert kept == found[1] != found[2]


def train_with_accelerate(root):
    deepspeed = start()
    from accelerate import Accelerator, DeepSpeedPlugin

    from keepbest.integrations.accelerate import AcceleratedKeeper

    settings = {"zero_optimization": {"stage": 3, **ZERO}, "zero_allow_untested_optimizer": True}
    plugin = DeepSpeedPlugin(hf_ds_config={**settings, "train_micro_batch_size_per_gpu": 2})
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    model = make()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    seen = []
    with AcceleratedKeeper(accelerator, model, directory=root, metric_key="loss") as keeper:
        for epoch, value in enumerate([3.0, 1.0, 2.0], start=1):
            accelerator.backward(model(torch.ones(2, 5)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            seen.append(whole(deepspeed, model))
            keeper.observe(value, epoch=epoch)
            accelerator.save_state(str(root / "state"))
    return seen


def test_best_of_accelerate_with_deepspeed_is_kept(tmp_path):
    [seen, _] = run_ranks(train_with_accelerate, 2, tmp_path)
    loaded = load(tmp_path, "best_model.loss", plain := make())
    assert (str(loaded.iteration), loaded.value) == ("E2", 1.0)
    assert face.weights_of(plain.state_dict()) == seen[1] != seen[2]
