"""Two hosts on one machine: network namespaces with a cable between them, each with a hostname of its own.

    with two_hosts() as network:
        agents = [network.start(host, ["hostname"], tmp_path / host.name) for host in HOSTS]
        network.cut()
        network.restore()

Needs root and iproute2. The hosts share the file system. Leaving the block kills every process in them and takes them
away; what an earlier process left because it was killed itself goes before.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_", "GROUP_", "GLOO_", "TP_")


@dataclass(frozen=True)
class Host:
    name: str
    address: str

    @property
    def namespace(self) -> str:
        return f"keepbest-{self.name}"

    @property
    def settings(self) -> Path:
        """What `ip netns exec` binds over the files of /etc."""
        return Path("/etc/netns") / self.namespace


# Sendings of a packet before Linux takes a connection for dead: after 13 seconds, instead of a quarter of an hour.
_TCP_RETRIES = 5
HOSTS = (Host("node0", "10.213.0.1"), Host("node1", "10.213.0.2"))


@contextmanager
def two_hosts() -> Iterator[Network]:
    _remove()
    try:
        _create()
        yield Network()
    finally:
        _remove()


class Network:
    def start(self, host: Host, command: Sequence[str | Path], output: Path) -> subprocess.Popen[bytes]:
        """A process on `host` that writes both its streams to `output`."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
        variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
        as_host = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host.name, *map(str, command)]
        with output.open("wb") as stream:
            return subprocess.Popen(
                ["ip", "netns", "exec", host.namespace, *as_host],
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[str]:
        """The ids of all processes on the hosts."""
        return [process for host in HOSTS for process in _ip("netns", "pids", host.namespace).split()]

    def cut(self) -> None:
        """Pull the cable: packets get lost, and nobody is told."""
        _ip("-n", HOSTS[1].namespace, "link", "set", "eth0", "down")

    def restore(self) -> None:
        _ip("-n", HOSTS[1].namespace, "link", "set", "eth0", "up")


def _create() -> None:
    names = "".join(f"{host.address} {host.name}\n" for host in HOSTS)
    for host in HOSTS:
        _ip("netns", "add", host.namespace)
        host.settings.mkdir(parents=True)
        (host.settings / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    ends = ["type", "veth", "peer", "name", "eth0", "netns", HOSTS[1].namespace]
    _ip("link", "add", "eth0", "netns", HOSTS[0].namespace, *ends)
    for host in HOSTS:
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("netns", "exec", host.namespace, "sysctl", "-qw", f"net.ipv4.tcp_retries2={_TCP_RETRIES}")
        for device in ("lo", "eth0"):
            _ip("-n", host.namespace, "link", "set", device, "up")


def _remove() -> None:
    there = {line.split()[0] for line in _ip("netns", "list").splitlines()}
    for host in HOSTS:
        if host.namespace in there:
            for process in _ip("netns", "pids", host.namespace).split():
                os.kill(int(process), signal.SIGKILL)
            _ip("netns", "delete", host.namespace)
        shutil.rmtree(host.settings, ignore_errors=True)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
