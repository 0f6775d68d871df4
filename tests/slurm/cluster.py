"""A SLURM cluster of two nodes on this machine, with folders, ports and keys of its own.

with Cluster.start() as cluster:
    job = cluster.submit(script, "trainer.epochs=3", output=tmp_path / "job.out")
    job.wait_until("has ended", lambda: job.state in ENDED)
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pwd import getpwuid

from tests.kit.debian import install
from tests.kit.ports import held_ports

ROOT = Path(__file__).resolve().parents[2]
# A node's name is where the ranks meet, so each is a name that leads to this machine wherever Linux runs.
NODES = ("127.0.0.2", "127.0.0.3")
PACKAGES = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# cred_expire: a job that is requeued waits for as long, or two minutes. FirstJobId: the port that ranks meet at follows
# from the job's number, and clusters of two test runs are on one machine.
_CONFIG = """
ClusterName=keepbest
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Job:
    """A job of `cluster`; what its tasks and its script print is in the file at `output`."""

    cluster: Cluster
    number: int
    output: Path

    @property
    def state(self) -> str:
        return self._shown("JobState")

    @property
    def exit_status(self) -> int:
        return int(self._shown("ExitCode").partition(":")[0])

    @property
    def restarts(self) -> int:
        return int(self._shown("Restarts"))

    def wait_until(self, what: str, condition: Callable[[], bool], *, timeout: float = 500) -> None:
        """Look again and again. A job that ends meanwhile will not do it any more, so that is an error as well."""
        deadline = time.monotonic() + timeout
        while not condition():
            state = self.state
            if time.monotonic() > deadline or (state in ENDED and not condition()):
                raise AssertionError(f"job {self.number} is {state}, but not: {what}. It printed:\n{self.printed()}")
            time.sleep(0.1)  # SLURM reports on a job only when it is asked

    def wait(self, *, timeout: float = 500) -> str:
        """Its state at its end."""
        self.wait_until("ended", lambda: self.state in ENDED, timeout=timeout)
        return self.state

    def processes(self) -> dict[int, int]:
        """{rank: process} of the running step."""
        listed = "".join(self.cluster.run("scontrol", "listpids", f"{self.number}.0", node) for node in NODES)
        rows = [line.split() for line in listed.splitlines()]
        return {int(rank): int(process) for process, *_, rank in rows if rank.isdecimal()}

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def _shown(self, key: str) -> str:
        shown = self.cluster.run("scontrol", "show", "job", str(self.number))
        found = re.search(rf"\b{key}=(\S+)", shown)
        assert found is not None, shown
        return found[1]


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs; its config, logs and spool are in `folder`."""

    folder: Path

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Cluster]:
        """Start it, and stop everything at the end.

        Raises:
            RuntimeError: if SLURM is not there and cannot be installed.
        """
        install(PACKAGES)
        with ExitStack() as stack:
            # Not below pytest's folder: the name of a socket must be short, and munged insists on who may enter.
            folder = Path(tempfile.mkdtemp(prefix="slurm-"))
            stack.callback(shutil.rmtree, folder)
            folder.chmod(0o755)
            cluster = cls(folder)
            cluster._configure(stack.enter_context(held_ports(1 + len(NODES))))
            for name, command in cluster._daemons():
                stack.enter_context(cluster._daemon(name, command))
                if name == "munged":
                    _wait_until("munged listens", (folder / "munge.socket").exists)
            stack.callback(cluster._cancel_all)
            _wait_until("both nodes are idle", lambda: cluster.run("sinfo", "-h", "-o", "%T %D").strip() == "idle 2")
            yield cluster

    def run(self, *command: str) -> str:
        """What a command of SLURM prints."""
        ended = subprocess.run(
            command, env=self._environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr}{self._logs()}")
        return ended.stdout

    def submit(self, script: Path, *arguments: str, output: Path) -> Job:
        printed = self.run("sbatch", "--parsable", f"--output={output}", str(script), *arguments)
        return Job(self, int(printed), output)

    def _configure(self, ports: list[int]) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} CPUs=4 State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        config = _CONFIG.format(
            first_job=os.getpid(),
            host=host,
            controller_port=ports[0],
            user=_user(),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        self._config_file.write_text(config)

    @property
    def _config_file(self) -> Path:
        return self.folder / "slurm.conf"

    def _daemons(self) -> Iterator[tuple[str, list[str]]]:
        places = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        yield "munged", ["munged", "-F", *(f"--{option}={self.folder / name}" for option, name in places.items())]
        yield "slurmctld", ["slurmctld", "-D", "-f", str(self._config_file)]
        for node in NODES:
            yield f"slurmd-{node}", ["slurmd", "-D", "-N", node, "-f", str(self._config_file)]

    @contextmanager
    def _daemon(self, name: str, command: list[str]) -> Iterator[None]:
        with (self.folder / f"{name}.log").open("w") as log:
            # Ends with the tests, however they end, but not before them: an interrupt from the keyboard is theirs.
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield
            finally:
                daemon.terminate()
                try:
                    daemon.wait(timeout=60)
                finally:
                    daemon.kill()

    def _cancel_all(self) -> None:
        self.run("scancel", "--user", _user())
        _wait_until("all jobs have ended", lambda: not self.run("squeue", "-h"))

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        # slurmctld and slurmd are not in every user's path.
        return {**kept, "PATH": f"{kept['PATH']}:/usr/sbin", "SLURM_CONF": str(self._config_file)}

    def _logs(self) -> str:
        return "".join(f"\n{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


def _user() -> str:
    return getpwuid(os.geteuid()).pw_name


def _wait_until(what: str, condition: Callable[[], bool], *, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {timeout} seconds, but not: {what}")
        time.sleep(0.1)  # the daemons report on themselves only when they are asked
