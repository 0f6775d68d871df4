"""How the ranks share one model: on a single rank, with DDP, FSDP1 or FSDP2."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from keepbest.errors import ConfigError
from keepbest.models import CompositeModel, Model
from keepbest.ranks import Ranks

StrategyName = Literal["single", "ddp", "fsdp1", "fsdp2"]
Precision = Literal["float32", "float64", "bf16"]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler]

_MOST_RANKS_WITH_ONE_SUM = 2  # the gradients of two ranks add up to the same bits in either order
_MODEL = "model"  # name of the one optimizer of a model that is not a composite


def training_device() -> torch.device:
    """The device of this process: the current CUDA device if there is one and the process group uses it, else the CPU.

    **Rank-local**.
    """
    if not torch.cuda.is_available() or (torch.distributed.is_initialized() and _backend_of("cuda") != "nccl"):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _backend_of(device: str) -> str | None:
    # The name of the backend says nothing where there are several, or torch has chosen them: it is "undefined" then.
    config = torch.distributed.get_backend_config()
    return dict(each.split(":", 1) for each in config.split(",")).get(device)


def check_strategy(strategy: StrategyName, ranks: Ranks) -> None:
    """Refuse a strategy that these ranks cannot train with. **Rank-local**.

    Raises:
        ConfigError: If the strategy is "single" and there are several ranks, it is another one and there is no process
            group, or the ranks are those of a subgroup.
    """
    if strategy == "single" and ranks.world_size > 1:
        raise ConfigError(
            f'strategy "single" trains on one rank, but there are {ranks.world_size}; '
            'choose "ddp", "fsdp1" or "fsdp2", or start one process'
        )
    if strategy != "single" and not torch.distributed.is_initialized():
        raise ConfigError(
            f'strategy "{strategy}" needs a process group; start the processes with torchrun or srun inside '
            'keepbest.launch.distributed(), or choose "single"'
        )
    if ranks.process_group is not None:
        raise ConfigError("the trainer trains on all ranks of the default group; pass it Ranks.connect()")


def place(model: Model, strategy: StrategyName, *, precision: Precision, device: torch.device) -> nn.Module:
    """Return the model to call: on `device`, with rank 0's weights, wrapped by the strategy. **Collective**.

    FSDP shards every submodel of a `CompositeModel` on its own, so that each can be gathered alone. `model` itself
    changes, so optimizers must be made afterwards, from its parameters.
    """
    model.to(device)
    if precision == "float64":
        model.to(torch.float64)
        model.register_forward_pre_hook(_cast_inputs_to_float64)
    if strategy == "single":
        return model
    if strategy == "ddp":
        # DDP reorders its buckets, and with them its sums, after its first backward pass. A resumed run has a first
        # pass of its own and would differ in the last bit from an uninterrupted one. If DDP looks for unused parameters
        # it keeps its order. torch warns that this is seldom needed, and the sum of two ranks has one order only.
        return DistributedDataParallel(
            model, find_unused_parameters=torch.distributed.get_world_size() > _MOST_RANKS_WITH_ONE_SUM
        )
    # FSDP shards the weights that each rank has. FSDP1 can synchronise them itself on accelerators only.
    mine = model.state_dict() if torch.distributed.get_rank() == 0 else {}
    set_model_state_dict(model, mine, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    parts = model.leaves() if isinstance(model, CompositeModel) else {}
    parts = {name: part for name, part in parts.items() if any(True for _ in part.parameters())}
    if strategy == "fsdp1":
        for name, part in parts.items():
            model.set_submodule(name, FullyShardedDataParallel(part, device_id=device, use_orig_params=True))
        return FullyShardedDataParallel(model, device_id=device, use_orig_params=True)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in parts.values():
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def place_for_evaluation(
    model: Model, strategy: StrategyName, *, precision: Precision, device: torch.device
) -> nn.Module:
    """Return what `place` returns, for a model whose weights change other than by training. **Collective**.

    Call `expect_new_weights` before they change.
    """
    placed = place(model, strategy, precision=precision, device=device)
    if isinstance(placed, FullyShardedDataParallel):
        # FSDP1 leaves its outermost unit gathered for a backward pass, and would evaluate it with the old weights.
        return FullyShardedDataParallel(placed, device_id=device, use_orig_params=True)
    return placed


def expect_new_weights(model: nn.Module) -> None:
    """Make the next evaluation use the weights and buffers of that moment. **Rank-local**, but every rank must call it.

    Args:
        model: Model from `place_for_evaluation`.
    """
    if isinstance(model, DistributedDataParallel):
        # Buffers are rank 0's. DDP broadcasts them in evaluations only once after each training pass.
        model.require_forward_param_sync = True
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # frees what was left gathered for a backward pass that never came


def build_optimizers(
    model: Model, factories: OptimizerFactory | Mapping[str, OptimizerFactory]
) -> dict[str, Optimizer]:
    """Make one optimizer for each submodel that has something to train, or one named `model`. **Rank-local**.

    Args:
        model: Unwrapped model after `place`.
        factories: Function that makes an optimizer of parameters. One for all submodels, or one for each, by dotted
            name.

    Raises:
        ConfigError: If a submodel that trains has no factory, a factory has no submodel, a parameter that requires grad
            belongs to no submodel or to two, there is nothing to train, or something else than an optimizer is made, or
            one whose steps need a closure.
    """
    parts: Mapping[str, nn.Module] = model.leaves() if isinstance(model, CompositeModel) else {_MODEL: model}
    trainable = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
    _check_every_parameter_is_in_one_part(model, trainable)
    if isinstance(factories, Mapping):
        if unknown := sorted(set(factories) - set(parts)):
            raise ConfigError(f"there are optimizers for {unknown}, but the submodels are {sorted(parts)}")
        by_name = dict(factories)
    else:
        by_name = dict.fromkeys(parts, factories)
    trainable = {name: parameters for name, parameters in trainable.items() if parameters}
    if missing := sorted(set(trainable) - set(by_name)):
        raise ConfigError(f"there is no optimizer for {missing}; add one, or set requires_grad to False to freeze them")
    if not trainable:
        raise ConfigError("there is nothing to train: no parameter requires grad")
    optimizers = {name: by_name[name](parameters) for name, parameters in trainable.items()}
    for name, optimizer in optimizers.items():
        _check_optimizer(name, optimizer)
    return optimizers


def _check_optimizer(name: str, found: object) -> None:
    # A config may name anything.
    needs_closure = isinstance(found, Optimizer) and any(
        each.name == "closure" and each.default is each.empty
        for each in inspect.signature(found.step).parameters.values()
    )
    if not isinstance(found, Optimizer) or needs_closure:
        raise ConfigError(
            f"the optimizer of {name} is a {type(found).__name__}, expected an Optimizer of torch that takes a step "
            "without a closure"
        )


def build_schedules(optimizers: Mapping[str, Optimizer], factory: ScheduleFactory | None) -> dict[str, LRScheduler]:
    """Make the schedule of each optimizer; none without a `factory`. **Rank-local**.

    Raises:
        ConfigError: If one is no schedule of torch's, or needs a metric at each step.
    """
    schedules = {} if factory is None else {name: factory(each) for name, each in optimizers.items()}
    for name, schedule in schedules.items():
        found: object = schedule  # a config may name anything
        if not isinstance(found, LRScheduler) or isinstance(found, ReduceLROnPlateau):
            raise ConfigError(
                f"the schedule of {name} is a {type(found).__name__}, expected an LRScheduler of torch that takes a "
                "step after each update, without a metric"
            )
    return schedules


def check_lengths(schedules: Mapping[str, LRScheduler], updates: int) -> None:
    """Refuse schedules that take fewer than this many steps. **Rank-local**.

    Raises:
        ConfigError: If there is one, such as a `OneCycleLR`, which raises after its last step.
    """
    for name, schedule in schedules.items():
        if isinstance(schedule, OneCycleLR) and updates > schedule.total_steps:
            raise ConfigError(
                f"schedule: the OneCycleLR of {name} has total_steps={schedule.total_steps}, but training ends after "
                f"{updates} updates, with a step after each; give it total_steps={updates}, or train for as long as "
                "it lasts. A run that resumes has the schedule that it began with"
            )


def take_step(name: str, schedule: LRScheduler) -> None:
    """Let the schedule of a submodel set the learning rate of the next update. **Rank-local**.

    Raises:
        ConfigError: If it has no further step.
    """
    try:
        schedule.step()
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(
            f"schedule: the {type(schedule).__name__} of {name} cannot take its step {schedule.last_epoch}: {error!r}. "
            "It takes one after each update, so it must last for as long as training does"
        ) from error


def clip_gradients(model: nn.Module, most: float) -> None:
    """Scale the gradients of all parameters so that their norm together is at most `most`. **Collective** with FSDP."""
    parameters = list(model.parameters())
    if not isinstance(model, FullyShardedDataParallel):
        torch.nn.utils.clip_grad_norm_(parameters, most)
        return
    # Each rank has the gradients of its shards. FSDP1's own method takes no float64.
    shards = [parameter.grad for parameter in parameters if parameter.grad is not None]
    square = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    square += torch.nn.utils.get_total_norm(shards).double() ** 2
    torch.distributed.all_reduce(square)
    torch.nn.utils.clip_grads_with_norm_(parameters, most, square.sqrt())


def without_gradient_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Accumulate gradients on each rank only, where the strategy can. **Rank-local**.

    The next backward pass outside of the context reduces them all.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Compute in bfloat16 where torch considers it safe, if that is the precision. **Rank-local**."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _check_every_parameter_is_in_one_part(model: Model, trainable: Mapping[str, list[nn.Parameter]]) -> None:
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameters in trainable.items():
        for parameter in parameters:
            owners.setdefault(parameter, []).append(name)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and len(found := owners.get(parameter, [])) != 1:
            belongs = f"belongs to the submodels {found}" if found else "belongs to no submodel"
            raise ConfigError(f"parameter {name!r} {belongs}; every parameter that trains must belong to exactly one")


def _cast_inputs_to_float64(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    del module
    return tuple(_as_float64(part) for part in inputs)


def _as_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _as_float64(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_as_float64(part) for part in value)
    return value
