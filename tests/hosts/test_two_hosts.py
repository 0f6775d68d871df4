"""Runs of two torchrun agents on two hosts, started by launch/torchrun_multi_node.sh, and a network that is cut."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from keepbest.run.verify import verify
from tests.hosts.network import HOSTS, Network, two_hosts
from tests.kit import cli_runs as runs

EPOCHS = 12  # of two updates
CUT = 13  # update
SCRIPT = runs.ROOT / "launch/torchrun_multi_node.sh"
SECONDS = 60  # that a run, or its end after a cut, may take


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with two_hosts() as network:
        yield network


@pytest.fixture(scope="module")
def whole(network, tmp_path_factory) -> Path:
    """A run on both hosts that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    agents = start(network, folder, describe(folder / "run"))
    assert codes(agents) == [0, 0], told(folder)
    return folder / "run"


def describe(directory: Path) -> dict[str, Any]:
    content = runs.describe_run(directory, epochs=EPOCHS, strategy="fsdp2", precision="float64")
    # Random numbers in training would differ with the number of ranks.
    content["model"]["dropout"] = 0.0
    content["trainer"]["resume"] = "auto"
    content["trainer"]["callbacks"] = [
        runs.evaluation(),
        runs.best(tolerances=[0, 1, 3], rank_timeout=5),
        {"name": "CheckpointCallback", "every_n_updates": 5},
    ]
    return content


def start(network: Network, folder: Path, content: dict[str, Any], *arguments: str) -> list[subprocess.Popen[bytes]]:
    """The script on each host, with the lines at its top edited."""
    config = runs.write_config(folder / "config.yaml", content)
    text = SCRIPT.read_text()
    settings = {
        "COMMAND": f"(-m keepbest train {config})",
        "NODES": 2,
        "PROCESSES": 2,
        "MEETING_POINT": f"{HOSTS[0].name}:29500",
    }
    for name, value in settings.items():
        text, count = re.subn(rf"^{name}=.*", f"{name}={value}", text, flags=re.MULTILINE)
        assert count == 1, f"there is no line {name}=… in {SCRIPT}"
    script = folder / SCRIPT.name
    script.write_text(text)
    script.chmod(0o755)
    return [network.start(host, [script, *arguments], folder / f"{host.name}.txt") for host in HOSTS]


def codes(agents: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [agent.wait(timeout=SECONDS) for agent in agents]


def told(folder: Path) -> str:
    return "\n".join(f"--- {host.name}\n{(folder / f'{host.name}.txt').read_text()}" for host in HOSTS)


def wait_until(condition: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, told(folder)
        time.sleep(0.01)  # other processes do it, and only files show it


def table(directory: Path) -> dict[str, tuple[float | None, str | None, bool | None]]:
    return {ref: (each.value, each.iteration, each.exceeded) for ref, each in runs.checkpoints(directory).items()}


def test_two_hosts_end_like_one_process(whole, tmp_path):
    content = describe(tmp_path / "alone")
    content["trainer"]["strategy"] = "single"
    runs.succeeded(runs.train_on_ranks(1, runs.write_config(tmp_path / "config.yaml", content)))
    alone = table(tmp_path / "alone")
    assert table(whole).keys() == alone.keys() == {runs.BEST, *(f"{runs.BEST}.tolerance={n}" for n in (0, 1, 3))}
    for ref, (value, *rest) in alone.items():
        assert table(whole)[ref] == (pytest.approx(value, rel=1e-9), *rest)
        expected = runs.weights(tmp_path / "alone", ref)
        torch.testing.assert_close(runs.weights(whole, ref), expected, rtol=1e-7, atol=1e-10)


# Where each rank waits for `rank_timeout`, and where training does.
@pytest.mark.parametrize("place", [1, 3], ids=["before the metric is observed", "before the next update"])
def test_cut_network_ends_all_ranks_and_they_resume_bit_for_bit(place, network, whole, tmp_path):
    run, content = tmp_path / "run", describe(tmp_path / "run")
    waiting = {"kind": "tests.hosts.wait_for_cut.WaitForCut", "every_n_updates": 1, "update": CUT}
    content["trainer"]["callbacks"].insert(place, {**waiting, "folder": str(tmp_path)})
    agents = start(network, tmp_path, content)
    wait_until(lambda: len(list(tmp_path.glob("rank*"))) == 4, tmp_path)
    network.cut()
    cut = time.monotonic()
    (tmp_path / "cut").touch()
    try:
        assert 0 not in codes(agents), told(tmp_path)
        print(f"all agents ended {time.monotonic() - cut:.1f} s after the cut")
    finally:
        network.restore()
    wait_until(lambda: not network.processes(), tmp_path)

    assert not [fault for fault in verify(run) if fault.kind == "damage"]
    best = runs.checkpoints(run)[runs.BEST]
    [evaluated] = runs.succeeded(runs.eval_on_ranks(1, run))
    [loss] = re.findall(rf"^{runs.METRIC} (\S+)$", evaluated.output, flags=re.MULTILINE)
    assert float(loss) == pytest.approx(best.value, rel=1e-9)

    del content["trainer"]["callbacks"][place]
    assert codes(start(network, tmp_path, content)) == [0, 0], told(tmp_path)
    runs.assert_same_run(run, whole)
    assert verify(run) == []
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"] == content["trainer"]["callbacks"]
