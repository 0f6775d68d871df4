"""The best as a checkpoint of Lightning: what its trainers test with it, and what its modules load."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.optim.swa_utils import AveragedModel

from keepbest import load
from keepbest.errors import ConfigError, RankFailedError, StorageError
from keepbest.integrations.lightning import BestCheckpoint
from keepbest.integrations.lightning_export import export_checkpoint
from keepbest.run.files import Files
from tests.integrations.faces.face import VALUES, weights_of
from tests.integrations.faces.lightning import METRIC, Lightning, Model, fit
from tests.kit.pool import run_ranks
from tests.kit.runs import refs

FACE = Lightning()


def note_what_is_tested(module, batch, batch_idx):
    """A hook of modules."""
    module.tested = weights_of(module.state_dict())


class Sized(Model):
    """Has a hyperparameter, and something of its own in a checkpoint. Tests whether its weights are the expected."""

    def __init__(self, values=(), width=4, **settings):
        super().__init__(values, **settings)
        self.save_hyperparameters("width")
        self.register_buffer("wide", torch.ones(width))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["words"] = ["a", "b"]

    def on_load_checkpoint(self, checkpoint):
        self.words = checkpoint["words"]

    test_step = note_what_is_tested


def make_sized(values, **settings):
    return Sized(values, width=7, **settings)


def fit_and_test(directory, monitor=None):
    best, own = BestCheckpoint(METRIC), ModelCheckpoint(directory / "own", "{epoch}", monitor, mode="max")
    trainer = fit(directory, VALUES, [own, best], model=make_sized)
    module = trainer.lightning_module
    trainer.test(module, trainer.val_dataloaders, ckpt_path="best", verbose=False)
    shown = trainer.checkpoint_callback
    return module.tested, shown.best_model_path, shown.last_model_path, best.best_model_path, own.best_model_path


@pytest.mark.parametrize("world_size", [1, 2])
def test_trainer_tests_the_best_and_lightning_loads_it(world_size, tmp_path):
    for tested, shown, _, path, own in run_ranks(fit_and_test, world_size, tmp_path, init=world_size > 1):
        module = Sized.load_from_checkpoint(path)
        load(tmp_path, FACE.ref, expected := make_sized([]))
        assert weights_of(module.state_dict()) == weights_of(expected.state_dict()) == tested
        assert (module.hparams.width, module.words) == (7, ["a", "b"])
        assert shown == path != own
        assert re.fullmatch(rf"{re.escape(f'{tmp_path}/{FACE.ref}')}=E6_U12_B12\.[0-9a-f]{{8}}\.ckpt", path)
    checkpoint = torch.load(path, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (6, 12)
    assert not any(each.name.startswith(".") for each in tmp_path.iterdir())


class Configured(Sized):
    """Its callback is another one in each fit and test."""

    def configure_callbacks(self):
        return [BestCheckpoint(METRIC, tolerances=[0])]


def fit_and_test_twice(directory):
    trainer = fit(directory, VALUES, [], model=Configured, max_epochs=4)
    module, data, tested = trainer.lightning_module, (trainer.train_dataloader, trainer.val_dataloaders), []
    for epochs in (4, 8):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, *data)
        trainer.test(module, data[1], ckpt_path="best", verbose=False)
        tested.append(module.tested)
    return tested


@pytest.mark.parametrize("world_size", [1, 2])
def test_callback_of_a_module_continues_and_tests_the_best(world_size, tmp_path):
    results = run_ranks(fit_and_test_twice, world_size, tmp_path, init=world_size > 1)
    assert [value for _, value in FACE.observed(tmp_path)] == VALUES
    load(tmp_path, f"{FACE.ref}.tolerance=0", first := Configured())
    load(tmp_path, FACE.ref, last := Configured())
    expected = [weights_of(module.state_dict()) for module in (first, last)]
    assert results == [expected] * world_size


def make_shifted(values, *, by):
    module = Model(values)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)
    return module


def test_best_is_not_that_of_a_run_that_was_set_aside(tmp_path):
    for weight in (1.0, 2.0):
        best = BestCheckpoint(METRIC, existing="set_aside")
        module = fit(tmp_path / "run", VALUES[:1], [best], model=partial(make_shifted, by=weight)).lightning_module
        assert FACE.weights_of_checkpoint(best.best_model_path) == weights_of(module.state_dict())


def test_best_of_a_checkpoint_with_a_monitor_stays_the_best(tmp_path):
    tested, shown, _, path, own = fit_and_test(tmp_path, METRIC)
    assert shown == own != path
    assert tested == FACE.weights_of_checkpoint(own) == FACE.weights_of_checkpoint(tmp_path / "own" / "epoch=6.ckpt")


def refuse(files, path):
    raise OSError(28, "no space left", str(path))


def fit_in_a_fork(directory):
    own = ModelCheckpoint(directory, "own")
    trainer = fit(directory, VALUES[:2], [BestCheckpoint(METRIC), own], strategy="fork")
    return own.best_model_path, trainer.checkpoint_callback is own


def test_best_of_processes_that_have_ended_is_left_to_lightning(tmp_path):
    assert run_ranks(fit_in_a_fork, 1, tmp_path, init=False) == [(str(tmp_path / "own.ckpt"), True)]
    assert refs(tmp_path) == {FACE.ref: "E2_U4_B4"}


def look_for_best_on_full_disk(directory):
    trainer = fit(directory, VALUES[:2], [BestCheckpoint(METRIC)], model=make_sized)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Files, "sync_folder", refuse)
        with pytest.raises(StorageError, match=r"on rank 0 of 2.*no space left"):
            trainer.test(trainer.lightning_module, trainer.val_dataloaders, ckpt_path="best", verbose=False)


def test_best_that_cannot_be_written_is_raised_on_every_rank(tmp_path):
    run_ranks(look_for_best_on_full_disk, 2, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoints"]


def look_for_best_of_a_module_that_reads_a_file(directory):
    trainer = fit(directory, VALUES[:2], [BestCheckpoint(METRIC)], model=make_sized)
    trainer.lightning_module.on_save_checkpoint = lambda _: (directory / "words.txt").read_text()
    with pytest.raises(
        RankFailedError, match=r"on_save_checkpoint\(\) of the module raised FileNotFoundError"
    ) as raised:
        trainer.test(trainer.lightning_module, trainer.val_dataloaders, ckpt_path="best", verbose=False)
    return type(raised.value) is RankFailedError


def test_error_of_the_module_is_no_refusal_of_the_disk(tmp_path):
    assert run_ranks(look_for_best_of_a_module_that_reads_a_file, 2, tmp_path) == [True, True]


def test_parts_alone_make_no_checkpoint_of_lightning(tmp_path):
    fit(tmp_path, VALUES[:2], [BestCheckpoint(METRIC, model_names=["layers"])])
    with pytest.raises(ConfigError, match=r"has its parts layers alone \(model_names\)"):
        export_checkpoint(tmp_path, FACE.ref, tmp_path / "best.ckpt", Model())
    (tmp_path / "there.ckpt").touch()
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export_checkpoint(tmp_path, FACE.ref, tmp_path / "there.ckpt", Model())
    with pytest.raises(ConfigError, match=r"there\.ckpt is a file"):
        export_checkpoint(tmp_path, FACE.ref, tmp_path / "there.ckpt" / "best.ckpt", Model())


def test_checkpoint_that_is_written_meanwhile_stays(tmp_path, monkeypatch):
    def export_meanwhile(files, path):
        monkeypatch.setattr(Files, "create", create)
        file = create(files, path)
        export_checkpoint(tmp_path, FACE.ref, to, Model())
        return file

    fit(tmp_path, VALUES[:2], [BestCheckpoint(METRIC)])
    to, create = tmp_path / "best.ckpt", Files.create
    monkeypatch.setattr(Files, "create", export_meanwhile)
    with pytest.raises(ConfigError, match=r"best\.ckpt exists; nothing is overwritten"):
        export_checkpoint(tmp_path, FACE.ref, to, Model())
    kept = load(tmp_path, FACE.ref, best := Model())
    found = torch.load(to, weights_only=True)["state_dict"]
    assert set(found) == set(kept.keys)
    assert all(torch.equal(found[key], value) for key, value in best.state_dict().items())
    assert not list(tmp_path.glob(".tmp-*"))


class Compiled(Model):
    def __init__(self, values=(), **settings):
        super().__init__(values, **settings)
        self.layers = torch.compile(self.layers, backend="eager")


class Averaging(Model):
    def __init__(self, values=(), **settings):
        super().__init__(values, **settings)
        self.average = AveragedModel(self.layers)

    def on_train_batch_end(self, *_):
        self.average.update_parameters(self.layers)


class Frozen(Model):
    def __init__(self, values=(), **settings):
        super().__init__(values, **settings)
        self.base = torch.nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "settings"), [(Compiled, {}), (Averaging, {}), (Frozen, {"save_frozen_weights": False})]
)
def test_checkpoint_of_the_best_has_the_weights_of_lightnings(model, settings, tmp_path):
    own, best = ModelCheckpoint(tmp_path / "own", monitor=METRIC), BestCheckpoint(METRIC, **settings)
    fit(tmp_path, VALUES, [own, best], model=model)
    paths = own.best_model_path, best.best_model_path
    expected, found = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    # The number of weights that an average is of is that of the module now. It is no weight.
    assert [
        key for key in expected if not key.endswith("n_averaged") and not torch.equal(expected[key], found[key])
    ] == []
    assert found._metadata == expected._metadata
    assert found.keys() == expected.keys() == model.load_from_checkpoint(paths[1]).state_dict().keys()


def test_frozen_weight_that_trains_by_now_makes_no_checkpoint(tmp_path):
    best = BestCheckpoint(METRIC, save_frozen_weights=False)
    fit(tmp_path, VALUES[:2], [best], model=Frozen).lightning_module.base.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"base\.bias was frozen, and save_frozen_weights=False .* it trains now"):
        assert best.best_model_path
