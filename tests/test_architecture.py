"""The walls of the architecture, held by reading the source."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import keepbest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "keepbest"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

PUBLIC_NAMES = [
    "BestKeeper",
    "EveryRank",
    "KeepBestError",
    "LoadedSnapshot",
    "MetricPropertyProvider",
    "Outcome",
    "PerRank",
    "RandomState",
    "TrainingIteration",
    "abandon",
    "average",
    "load",
    "open_run",
]

# What docs/reference.md documents: a name that goes, or comes, is seen here.
DOCUMENTED_NAMES = [
    "BestKeeper",
    "EveryRank",
    "abandon",
    "Outcome",
    "TrainingIteration",
    "MetricPropertyProvider",
    "decision.BestState",
    "load",
    "LoadedSnapshot",
    "PerRank",
    "RandomState",
    "open_run",
    "reading.run.Run",
    "reading.run.ToleranceAnswer",
    "reading.checkpoint.Checkpoint",
    "reading.keepers.KeeperSummary",
    "reading.rows.HistoryRow",
    "reading.activity.Activity",
    "average",
    "integrations.lightning.BestCheckpoint",
    "integrations.lightning_export.export_checkpoint",
    "integrations.transformers.BestCheckpoint",
    "integrations.peft.export_adapter",
    "integrations.accelerate.AcceleratedKeeper",
    "integrations.ignite.BestCheckpoint",
    "callbacks.BestCheckpointCallbackConfig",
    "callbacks.BestCheckpointCallback",
    "callbacks.OfflineLossCallbackConfig",
    "callbacks.OfflineLossCallback",
    "callbacks.CheckpointCallbackConfig",
    "callbacks.CheckpointCallback",
    "callbacks.MetricEarlyStopperConfig",
    "callbacks.MetricEarlyStopper",
    "callbacks.CallbackBase",
    "callbacks.TrainerView",
    "callbacks.CallBackBaseConfig",
    "callbacks.PeriodicCallback",
    "callbacks.PeriodicDataIteratorCallbackConfig",
    "callbacks.PeriodicDataIteratorCallback",
    "training.config.RunConfig",
    "training.config.TrainerConfig",
    "training.config.Component",
    "models.Model",
    "models.CompositeModel",
    "launch.distributed",
    "launch.Process",
    "training.preemption.Preemption",
    "errors",
]

# Decisions must be the same on all ranks: these modules see no tensors, no clock, no chance and no disk.
PURE = [
    "decision.py",
    "errors.py",
    "interval.py",
    "iteration.py",
    "listing.py",
    "metric_properties.py",
    "misspelling.py",
    "printable.py",
]
IMPURE_MODULES = {
    "datetime", "io", "json", "logging", "os", "pathlib", "random", "shutil", "subprocess", "tempfile", "threading",
    "time", "torch",
}  # fmt: skip

# The one path runs from the top to the bottom of this list, and no step calls back up; the shells stand around it.
PATH = [
    "keeper",
    "bookkeeping",
    "average",
    "export",
    "reading",
    "load",
    "settings",
    "settings_dict",
    "validation",
    "new_best",
    "face",
    "metric",
    "saving",
    "capture",
    "remote",
    "staging",
    "formats",
    "modules/sources",
    "modules/parts",  # knows the submodels of a composite
    "models",
    "modules",
    "run",
    "reduction",
    "ranks",
    "worker",
    "decision",
    "interval",
    "iteration",
    "misspelling",
    "metric_properties",
    "user_code",
    "errors",
    "listing",
    "printable",
]
SHELLS = ["__main__", "callbacks", "cli", "data", "integrations", "launch", "random_state", "training"]

# What may not be imported where, beside the order of the path.
WALLS = {
    "run/": ("ranks",),
    "formats/": ("ranks",),
    "remote/": ("ranks",),
    "saving/job.py": ("ranks",),
    "worker.py": ("ranks",),
    "staging/": ("ranks", "run"),
}

COLLECTIVES_LIVE_IN = (
    "ranks/",
    "capture/",
    "data/",
    "training/strategy.py",  # hands the same first weights to all ranks
)
SHARDED_APIS_LIVE_IN = (
    *COLLECTIVES_LIVE_IN,
    "formats/dcp.py",
    "formats/digested_files.py",  # what torch writes shards into
    "formats/index.py",  # reads what torch writes into an index
    "formats/sharded_part.py",  # reads what that one writes
    "modules/kinds.py",  # recognizes what is sharded
)
PROCESS_GROUPS_START_IN = ("launch.py",)
SHARDED_APIS = ("checkpoint", "fsdp", "tensor", "device_mesh")
COLLECTIVES = {
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce",
    "all_reduce_coalesced", "all_to_all", "all_to_all_single", "batch_isend_irecv", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "new_group", "new_subgroups", "recv",
    "recv_object_list", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
    "send_object_list", "split_group",
}  # fmt: skip
# Collectives as methods of tensors and of process groups, however the object is called.
COLLECTIVE_METHODS = {"allgather", "allreduce", "full_tensor", "redistribute"}
# Functions of torch.distributed.checkpoint that every rank calls.
COLLECTIVE_CHECKPOINTS = {
    "async_save", "get_model_state_dict", "get_optimizer_state_dict", "get_state_dict", "load", "load_state_dict",
    "save", "save_state_dict", "set_model_state_dict", "set_optimizer_state_dict", "set_state_dict",
}  # fmt: skip
FILE_FUNCTIONS = {"open", "mkdir", "read_bytes", "read_text", "rename", "rmtree", "unlink", "write_bytes", "write_text"}


@functools.cache
def parse(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(), filename=name)


def imports(tree: ast.AST) -> dict[str, str]:
    """{local name: dotted name that it stands for} of every import that runs."""
    names = {}
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                names[local] = alias.name if alias.asname else local
                names[alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, except those under `if TYPE_CHECKING:`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield from run_time_nodes(child)


def used_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import and attribute chain, with import aliases resolved."""
    known = imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            yield node.lineno, f"{known.get(first, first)}.{rest}"
        elif isinstance(node, ast.Name):
            yield node.lineno, known.get(node.id, node.id)


@functools.cache
def used_in(name: str) -> list[tuple[int, str]]:
    return list(used_names(parse(name)))


def uses(is_forbidden: Callable[[str], bool], *, outside: tuple[str, ...] = ()) -> list[str]:
    """`file:line: name` of every forbidden use in the sources that do not lie in the places `outside`."""
    names = [name for name in SOURCES if not name.startswith(outside)]
    return [f"{name}:{line}: {used}" for name in names for line, used in used_in(name) if is_forbidden(used)]


def place_of(path: str) -> str:
    """The entry of PATH or SHELLS that a path below the package belongs to: the longest one."""
    stem = path.removesuffix(".py")
    entries = [entry for entry in [*PATH, *SHELLS] if stem == entry or stem.startswith(f"{entry}/")]
    return max(entries, key=len, default="")


def imported(name: str) -> Iterator[str]:
    """Paths, without ending, of what a source imports of this package."""
    for dotted in imports(parse(name)).values():
        package, _, rest = dotted.partition(".")
        if package == "keepbest" and rest:
            yield rest.replace(".", "/")


@pytest.mark.parametrize("name", PURE)
def test_pure_module_imports_nothing_that_differs_between_ranks(name: str):
    roots = {dotted.partition(".")[0] for dotted in imports(parse(name)).values()}
    assert roots & IMPURE_MODULES == set()


@pytest.mark.parametrize("name", PURE)
def test_pure_module_brings_in_no_torch(name: str):
    # The package itself may import torch, so an empty one stands in for its __init__.
    program = f"""
import importlib, sys, types
package = types.ModuleType("keepbest")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["keepbest"] = package
importlib.import_module("keepbest.{Path(name).stem}")
print(sorted(module for module in sys.modules if module.partition(".")[0] == "torch"))
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout == "[]\n"


@pytest.mark.parametrize("position", range(len(PATH)), ids=PATH)
def test_no_step_of_the_path_calls_back_up(position: int):
    step, above = PATH[position], {*PATH[:position], *SHELLS}
    names = [name for name in SOURCES if place_of(name) == step]
    assert names
    assert [f"{name}: {path}" for name in names for path in imported(name) if place_of(path) in above] == []


def test_every_module_has_its_place():
    assert [name for name in SOURCES if name != "__init__.py" and not place_of(name)] == []


@pytest.mark.parametrize("place", WALLS)
def test_no_place_looks_over_its_wall(place: str):
    names = [name for name in SOURCES if name.startswith(place)]
    assert names
    over = [f"{name}: {path}" for name in names for path in imported(name) if path.partition("/")[0] in WALLS[place]]
    assert over == []


def is_collective(used: str) -> bool:
    prefix, _, last = used.rpartition(".")
    return (
        last in COLLECTIVE_METHODS
        or (prefix.startswith("torch.distributed") and last in COLLECTIVES)
        or (prefix.startswith("torch.distributed.checkpoint") and last in COLLECTIVE_CHECKPOINTS)
    )


def is_sharded_api(used: str) -> bool:
    return used.startswith(tuple(f"torch.distributed.{api}" for api in SHARDED_APIS))


def is_barrier(used: str) -> bool:
    return used.rpartition(".")[2].endswith("barrier")


def test_no_collective_outside_its_place():
    assert uses(is_collective, outside=COLLECTIVES_LIVE_IN) == []


def test_no_sharded_api_outside_its_place():
    assert uses(is_sharded_api, outside=SHARDED_APIS_LIVE_IN) == []


def test_default_process_group_is_made_by_the_launcher_only():
    def makes_or_ends(used: str) -> bool:
        return used.rpartition(".")[2] in {"init_process_group", "destroy_process_group"}

    assert uses(makes_or_ends, outside=PROCESS_GROUPS_START_IN) == []


def test_no_barrier_but_where_the_launcher_connects_ranks():
    assert uses(is_barrier, outside=PROCESS_GROUPS_START_IN) == []


@pytest.mark.parametrize("place", ["keeper.py", "bookkeeping.py", "capture/", "ranks/", "staging/", "modules/"])
def test_place_opens_no_file(place: str):
    def is_file_access(used: str) -> bool:
        # What capture/feed.py packs goes to memory: plain data on its way to other ranks.
        is_torchs = used in {"torch.save", "torch.load"} and place != "capture/"
        return is_torchs or used.rpartition(".")[2] in FILE_FUNCTIONS

    assert uses(is_file_access, outside=tuple(name for name in SOURCES if not name.startswith(place))) == []


def test_no_assert_validates():
    found = [
        f"{name}:{node.lineno}" for name in SOURCES for node in ast.walk(parse(name)) if isinstance(node, ast.Assert)
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch\ntorch.distributed.all_reduce(x)",
        "from torch import distributed\ndistributed.all_reduce(x)",
        "from torch.distributed import all_reduce as add\nadd(x)",
        "def late():\n    from torch.distributed import all_reduce",
        "group().allreduce([x])",
        "parameter.full_tensor()",
        "from torch.distributed.checkpoint.state_dict_saver import save\nsave(state)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(state)",
    ],
)
def test_collectives_are_seen_however_they_are_spelled(source: str):
    assert any(is_collective(used) for _, used in used_names(ast.parse(source)))


def test_methods_of_ranks_are_no_collectives_of_torch():
    source = "ranks.broadcast('step', work)\nself.ranks.gather_json('step', work)\nqueue.send(x)"
    assert not any(is_collective(used) for _, used in used_names(ast.parse(source)))


def test_no_file_is_longer_than_400_lines():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for folder in ("src", "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_public_names():
    assert sorted(keepbest.__all__) == sorted(PUBLIC_NAMES)
    assert all(hasattr(keepbest, name) for name in PUBLIC_NAMES)


def test_documented_names_are_those_that_are_pinned_here():
    documented = re.findall(r"^::: keepbest\.(\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(DOCUMENTED_NAMES)


@pytest.mark.parametrize("name", DOCUMENTED_NAMES)
def test_documented_name_can_be_imported(name: str):
    module, _, attribute = f"keepbest.{name}".rpartition(".")
    found = importlib.import_module(module)
    assert hasattr(found, attribute) or importlib.import_module(f"{module}.{attribute}")
