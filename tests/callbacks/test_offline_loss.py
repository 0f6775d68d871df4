from __future__ import annotations

from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from keepbest.callbacks import OfflineLossCallback, OfflineLossCallbackConfig
from keepbest.data import DataContainer, InterleavedSampler, build_loader
from keepbest.errors import ConfigError, RankFailedError
from tests.callbacks.context import Regression, make_context, make_counter, make_samples
from tests.kit.pool import run_ranks

LENGTHS = (2, 10, 11, 13)


def make_callback(context, **settings):
    defaults = {"every_n_epochs": 1, "dataset_key": "val", "batch_size": 2}
    return OfflineLossCallback(OfflineLossCallbackConfig(**defaults | settings), **context)


def logged(context):
    return {key: (scalar.value, scalar.weight) for key, scalar in context["log_writer"].log_cache.items()}


def one_by_one(length):
    """The exact mean of what the model gives for each sample alone."""
    model = Regression().eval()
    means = dict.fromkeys(("square", "absolute", "total"), Fraction(0))
    for sample in make_samples(length):
        batch = {key: value[None] for key, value in sample.items()}
        with torch.no_grad():
            losses = model.losses(model(batch), batch)
        means = {name: means[name] + Fraction(losses[name].item()) / length for name in means}
    return {f"loss/val/{name}": float(mean) for name, mean in means.items()}


WRAPPERS = {
    "none": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp1": partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True),
    "fsdp2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),))),
}


def evaluate(wrap):
    found = {}
    for length in LENGTHS:
        context = make_context({"val": make_samples(length)}, model=WRAPPERS[wrap](Regression()))
        callback = make_callback(context)
        callback.at_eval(update_counter=make_counter(), batch_size=2)
        found[length] = logged(context)
    return found


@pytest.mark.parametrize(
    ("world_size", "wrap"), [(1, "none"), (2, "none"), (3, "none"), (4, "none"), (3, "ddp"), (2, "fsdp1"), (3, "fsdp2")]
)
def test_losses_do_not_depend_on_the_number_of_ranks(world_size, wrap):
    by_rank = run_ranks(evaluate, world_size, wrap)
    # Every rank logs the very same, and the dataset of 2 samples is smaller than some of the worlds.
    assert all(found == by_rank[0] for found in by_rank)
    for length in LENGTHS:
        expected = one_by_one(length)
        assert by_rank[0][length].keys() == expected.keys()
        for key, (value, weight) in by_rank[0][length].items():
            assert value == pytest.approx(expected[key], abs=1e-12, rel=0)
            assert weight is None


def evaluate_through_the_shared_loader():
    """Two callbacks that take their batches from the loader of training; returns what is logged, and what is left."""
    container = {"train": make_samples(24), "val": make_samples(11), "test": make_samples(5)}
    context = make_context(container)
    ranks = context["ranks"]
    callbacks = [
        make_callback(context, batch_size=None),
        make_callback(context, dataset_key="test", every_n_epochs=None, every_n_updates=1),
    ]
    sampler = InterleavedSampler(
        DataContainer(container),
        train_key="train",
        batch_size=3,
        configs=[callback.sampler_config for callback in callbacks],
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=0,
        end_update=24 // (3 * ranks.world_size) * 2,
    )
    counter = make_counter(sampler.updates_per_epoch, sampler.effective_batch_size)
    data_iter = iter(build_loader(sampler))
    found = []
    for _ in range(sampler.end_update):
        next(data_iter)
        counter.next_update()
        for callback in callbacks:
            callback.after_update(update_counter=counter, batch_size=3, data_iter=data_iter)
        if counter.is_full_epoch:
            for callback in callbacks:
                callback.after_epoch(update_counter=counter, batch_size=3, data_iter=data_iter)
            found.append(logged(context))
    return found, list(data_iter)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_of_the_shared_loader_are_consumed_exactly(world_size):
    expected = one_by_one(11) | {key.replace("val", "test"): value for key, value in one_by_one(5).items()}
    for found, left in run_ranks(evaluate_through_the_shared_loader, world_size):
        assert left == []
        assert len(found) == 2
        for scalars in found:
            assert {key: value for key, (value, _) in scalars.items()} == pytest.approx(expected, abs=1e-12, rel=0)


def test_evaluation_leaves_no_trace_on_training():
    model = Regression()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    context = make_context(model=model)
    callback = make_callback(context)
    random_state = torch.get_rng_state()
    for _ in range(2):
        callback.at_eval(update_counter=make_counter(), batch_size=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_batch_size_of_training_is_used_where_none_is_given():
    sizes = []

    class Watched(Regression):
        def forward(self, batch):
            sizes.append(len(batch["y"]))
            return super().forward(batch)

    callback = make_callback(make_context({"val": make_samples(7)}, model=Watched()), batch_size=None)
    for batch_size in (3, 5):
        callback.at_eval(update_counter=make_counter(), batch_size=batch_size)
    assert sizes == [3, 3, 1, 5, 2]


def test_losses_that_are_not_finite_are_logged_as_they_are():
    class Diverged(Regression):
        def losses(self, outputs, batch):
            rows = torch.arange(len(batch["y"]))
            return {
                "total": torch.where(rows == 0, torch.inf, -torch.inf),
                "up": torch.where(rows == 0, torch.inf, 1.0),
            }

    context = make_context(model=Diverged())
    make_callback(context, batch_size=4).at_eval(update_counter=make_counter(), batch_size=2)
    assert str(logged(context)) == "{'loss/val/total': (nan, None), 'loss/val/up': (inf, None)}"


def test_a_loss_that_is_a_mean_already_is_refused():
    class Mean(Regression):
        def losses(self, outputs, batch):
            return {name: loss.mean() for name, loss in super().losses(outputs, batch).items()}

    callback = make_callback(make_context(model=Mean()))
    with pytest.raises(
        RankFailedError, match=r"result 'square' with one row for each of .* 4 samples, found shape \[2"
    ):
        callback.at_eval(update_counter=make_counter(), batch_size=2)


def test_an_iterator_that_ends_too_early_is_told():
    context = make_context()
    batch = context["data_container"].load_batch("val", [0, 1])
    with pytest.raises(RankFailedError, match="ended after 1 of 2 evaluation batches"):
        make_callback(context).at_eval(update_counter=make_counter(), batch_size=2, data_iter=iter([batch]))


def test_what_cannot_work_is_refused_before_training():
    with pytest.raises(ConfigError, match=r"needs a model with a method losses.*Linear has none"):
        make_callback(make_context(model=nn.Linear(1, 1)))
    with pytest.raises(ConfigError, match=r"no dataset 'vall'; the datasets are \['val'\]"):
        make_callback(make_context(), dataset_key="vall")


class FailingOnRank1(Regression):
    def losses(self, outputs, batch):
        if torch.distributed.get_rank() == 1:
            self.layers.train()
            raise ValueError("this batch is broken")
        return super().losses(outputs, batch)


def evaluate_a_model_that_fails_on_rank_1():
    model = FailingOnRank1()
    try:
        make_callback(make_context(model=model)).at_eval(update_counter=make_counter(), batch_size=2)
    except RankFailedError as error:
        return str(error), model.layers[2].training


def test_a_failure_of_one_rank_is_raised_on_all():
    first, second = run_ranks(evaluate_a_model_that_fails_on_rank_1, 2)
    assert first == second
    assert "evaluate dataset 'val' in OfflineLossCallback on rank 1 of 2: ValueError: this batch is broken" in first[0]
