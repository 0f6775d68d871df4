"""What cannot be kept and loaded again is refused when the keeper starts, on every rank, with nothing on the disk."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError
from tests.kit.models import WithState
from tests.kit.pool import run_ranks
from tests.kit.runs import update

ALL, GATHERED = ("torch", "safetensors", "dcp"), ("torch", "safetensors")


class Scaled(torch.Tensor):
    """As a library for quantization has it."""


class WithBuffer(nn.Linear):
    def __init__(self, buffer):
        super().__init__(2, 2)
        self.register_buffer("extra", buffer)


def scaled_parameter():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.randn(2, 2).as_subclass(Scaled))
    return model


def lazy():
    return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())


def quantized():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


REFUSED = {
    "lazy": (lazy, ALL, "'0.weight' is not initialized yet. Run one batch"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), ALL, "'weight' is on the meta device"),
    "subclass": (scaled_parameter, ALL, "'weight' is a .*Scaled, a subclass of Tensor"),
    "subclass buffer": (lambda: WithBuffer(torch.ones(2).as_subclass(Scaled)), ALL, "'extra' is a .*Scaled"),
    "io": (lambda: WithState(io.BytesIO(b"x")), ALL, "'_extra_state' in the state dict is a BytesIO"),
    "subclass in a state": (lambda: WithState([torch.ones(1).as_subclass(Scaled)]), ALL, "'_extra_state'"),
    "list state": (lambda: WithState([1, 2]), ("safetensors",), "is a list, and format 'safetensors' holds tensors"),
    "tuple state": (lambda: WithState((1, 2)), ("safetensors",), "is a tuple, and format 'safetensors' holds"),
    "coo": (lambda: WithBuffer(torch.eye(3).to_sparse()), ("safetensors", "dcp"), "'extra' is sparse"),
    "csr": (lambda: WithBuffer(torch.eye(3).to_sparse_csr()), ("safetensors", "dcp"), "'extra' is sparse"),
    "quantized": (lambda: WithBuffer(quantized()), ("safetensors", "dcp"), "'extra' is quantized"),
    "nested": (lambda: WithBuffer(torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])), ALL, "layout nested"),
    "mkldnn": (lambda: WithBuffer(torch.ones(2).to_mkldnn()), ALL, "'extra' is of layout _mkldnn"),
    "bits": (lambda: WithBuffer(torch.ones(2, dtype=torch.uint8).view(torch.bits8)), ("dcp",), "is torch.bits8"),
    "int4": (lambda: WithBuffer(torch.ones(2, dtype=torch.uint8).view(torch.int4)), ALL, "'extra' is torch.int4"),
    "uint1": (lambda: WithState([torch.ones(2, dtype=torch.uint8).view(torch.uint1)]), ALL[::2], "'_extra_state'"),
    "qint8": (lambda: WithBuffer(torch.ones(2, dtype=torch.int8).view(torch.qint8)), ALL, "qint8 without a scale"),
    "metadata": (lambda: nn.ParameterDict({"__metadata__": torch.ones(2)}), ("safetensors",), "'__metadata__' has"),
    "complex128": (lambda: WithBuffer(torch.ones(2, dtype=torch.complex128)), ("safetensors",), "complex128"),
    "expanded": (
        lambda: WithBuffer(torch.ones(2, 1).expand(2, 3)),
        ALL,
        "'extra' has elements that share memory.* its c",
    ),
    "expanded parameter": (
        lambda: nn.ParameterDict({"p": torch.ones(1).expand(3)}),
        ALL,
        "'p' has elements that share",
    ),
    "e8m0": (lambda: WithBuffer(torch.ones(2).to(torch.float8_e8m0fnu)), ("safetensors",), "float8_e8m0fnu"),
}
CASES = [(kind, file_format) for kind, (_, formats, _) in REFUSED.items() for file_format in formats]


@pytest.mark.filterwarnings(
    "ignore:Sparse", "ignore:torch.quantize", "ignore:Lazy modules", "ignore:The PyTorch API of nested"
)
@pytest.mark.parametrize(("kind", "file_format"), CASES)
def test_what_cannot_be_kept_is_refused_at_start(kind, file_format, tmp_path):
    make, _, message = REFUSED[kind]
    keeper = BestKeeper(make(), directory=tmp_path / "run", metric_key="loss", format=file_format)
    with pytest.raises(ConfigError, match=message):
        keeper.start()
    assert not (tmp_path / "run").exists()


def refuse_on_one_rank(directory):
    model = nn.Linear(2, 2)
    if dist.get_rank() == 1:
        model.weight = nn.Parameter(model.weight.detach().as_subclass(Scaled))
    with pytest.raises(ConfigError) as caught:
        BestKeeper(model, directory=directory, metric_key="loss").start()
    return str(caught.value)


def test_every_rank_raises_what_one_cannot_keep(tmp_path):
    messages = run_ranks(refuse_on_one_rank, 3, tmp_path / "run")
    assert len(set(messages)) == 1
    assert "on rank 1 of 3: ConfigError: 'weight' is a " in messages[0]
    assert not (tmp_path / "run").exists()


def test_frozen_weights_that_are_left_out_may_be_of_any_kind(tmp_path):
    model = nn.Sequential(scaled_parameter().requires_grad_(False), nn.Linear(2, 2))
    with BestKeeper(model, directory=tmp_path, metric_key="loss", save_frozen_weights=False) as keeper:
        keeper.observe(1.0, update(1))
        assert torch.load(keeper.best_path / "model.pt", weights_only=True).keys() == {"1.weight", "1.bias"}
        model[0].requires_grad_(True)
        with pytest.raises(
            ConfigError, match=r"'0\.weight' is a .*Scaled.*has changed: '0\.weight' is no longer frozen"
        ):
            keeper.observe(0.5, update(2))


@pytest.mark.parametrize("model", [nn.Linear(2, 2).requires_grad_(False), nn.ReLU()], ids=["frozen", "no weights"])
def test_selection_without_weights_to_save_is_refused_at_start(model, tmp_path):
    keeper = BestKeeper(model, directory=tmp_path / "run", metric_key="loss", save_frozen_weights=False)
    with pytest.raises(ConfigError, match="nothing to save"):
        keeper.start()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file_format", ALL)
@pytest.mark.parametrize(
    "make",
    [lambda: torch.ones(1).expand(4)[:1], lambda: torch.arange(5.0).unfold(0, 3, 1)],
    ids=["one of an expanded", "overlapping"],
)
def test_buffer_into_which_torch_writes_is_kept(make, file_format, tmp_path):
    with BestKeeper(WithBuffer(make()), directory=tmp_path, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, update(1))
    load(tmp_path, "best_model.loss", target := WithBuffer(make().mul_(0)))
    assert torch.equal(target.extra, make())


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_buffer_is_kept_by_torch(layout, in_background, tmp_path):
    model = REFUSED[layout][0]()
    with BestKeeper(model, directory=tmp_path, metric_key="loss", async_save=in_background) as keeper:
        for number in (1, 2, 3):
            keeper.observe(1.0 / number, update(number))
        keeper.flush()
        found = torch.load(keeper.best_path / "model.pt", weights_only=True)
    assert found["extra"].layout == model.extra.layout
    assert torch.equal(found["extra"].to_dense(), torch.eye(3))


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("file_format", GATHERED)
def test_conjugated_and_negated_views_are_kept_as_they_are(file_format, in_background, tmp_path):
    model = WithBuffer(torch.tensor([1 + 2j, 3 - 4j]).conj())
    model.register_buffer("negated", torch.tensor([1 + 2j]).conj().imag)
    assert model.extra.is_conj()
    assert model.negated.is_neg()
    settings = {"format": file_format, "async_save": in_background}
    with BestKeeper(model, directory=tmp_path, metric_key="loss", **settings) as keeper:
        keeper.observe(1.0, update(1))
        keeper.flush()
        path = next(keeper.best_path.glob("model.*"))
    if file_format == "torch":
        found = torch.load(path, weights_only=True)
    else:
        from safetensors.torch import load_file

        found = load_file(path)
    assert found["extra"].tolist() == [1 - 2j, 3 + 4j]
    assert found["negated"].tolist() == [-2.0]
    assert not found["extra"].is_conj()


def start_hybrid(directory):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = FullyShardedDataParallel(
        nn.Linear(4, 4), process_group=(mesh.get_group("shard"), mesh.get_group("replicate")),
        device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.HYBRID_SHARD, use_orig_params=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"FSDP1 cannot be saved where units are sharded over ranks \[0, 1\]"):
        BestKeeper(model, directory=directory, metric_key="loss", format="dcp").start()
    with BestKeeper(model, directory=directory, metric_key="loss") as keeper:
        return keeper.observe(1.0, update(1)).is_new_best


def test_hybrid_fsdp1_is_refused_by_dcp_and_kept_by_torch(tmp_path):
    assert run_ranks(start_hybrid, 4, tmp_path / "run") == [True] * 4


class HeadAlone(nn.Sequential):
    """As users write it who share only what they trained."""

    def state_dict(self, *arguments, **named):
        state = super().state_dict(*arguments, **named)
        for key in [key for key in state if "0." in key]:
            del state[key]
        return state


def start_fsdp1_with_a_state_dict_of_its_own(directory, file_format):
    inside = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)
    beside = HeadAlone(inside, nn.Linear(4, 1))
    around = FullyShardedDataParallel(
        HeadAlone(nn.Linear(4, 4), nn.Linear(4, 1)), device_id=torch.device("cpu"), use_orig_params=True
    )
    for number, model in enumerate((beside, around)):
        with pytest.raises(ConfigError, match=r"0\.weight.*A state_dict\(\) of the model's own"):
            BestKeeper(model, directory=directory / str(number), metric_key="loss", format=file_format).start()


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_fsdp1_with_a_state_dict_that_lacks_weights_is_refused(file_format, tmp_path):
    run_ranks(start_fsdp1_with_a_state_dict_of_its_own, 2, tmp_path, file_format)


def start_partial(directory):
    model = nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (2,))
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    with pytest.raises(ConfigError, match="'weight' is a DTensor with a Partial placement"):
        BestKeeper(model, directory=directory, metric_key="loss").start()


def start_on_a_part_of_the_ranks_that_shard(directory):
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 4), mesh))
    groups = [dist.new_group([rank]) for rank in range(2)]
    with pytest.raises(ConfigError, match=r"'weight' is sharded also over the global ranks \[\d\]"):
        BestKeeper(
            model, directory=directory / str(dist.get_rank()), metric_key="loss", process_group=groups[dist.get_rank()]
        ).start()


def start_with_a_dtensor_in_an_extra_state(directory):
    state = DTensor.from_local(torch.ones(2, 4), init_device_mesh("cpu", (2,)))
    for each in (state, [state]):
        with pytest.raises(ConfigError, match="'_extra_state' in the state dict is a"):
            BestKeeper(WithState(each), directory=directory, metric_key="loss").start()


def start_on_a_mesh_of_descending_ranks(directory):
    model = nn.Linear(2, 3)
    mesh = DeviceMesh("cpu", [1, 0])
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(0)], src_data_rank=None))
    with pytest.raises(ConfigError, match=r"'weight' is a DTensor over the ranks \[1, 0\]"):
        BestKeeper(model, directory=directory, metric_key="loss").start()


@pytest.mark.parametrize(
    "start",
    [
        start_on_a_mesh_of_descending_ranks,
        start_with_a_dtensor_in_an_extra_state,
        start_partial,
        start_on_a_part_of_the_ranks_that_shard,
    ],
)
def test_dtensor_of_which_not_all_is_there_is_refused(start, tmp_path):
    run_ranks(start, 2, tmp_path)


def test_model_is_not_changed_by_what_the_keeper_looks_at(tmp_path):
    model = WithBuffer(torch.tensor([1 + 2j]).conj())
    before = copy.deepcopy(model.state_dict())
    with BestKeeper(model, directory=tmp_path, metric_key="loss"):
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert model.extra.is_conj()
