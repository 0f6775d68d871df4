"""What pages show of sessions and of outputs, line by line, beside where it comes from."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server import api as agent
from torch.distributed.elastic.multiprocessing import api as processes

from keepbest.cli.run_file import RunFile, parse_settings
from keepbest.errors import PreemptedError
from keepbest.ranks import Ranks
from keepbest.reading.checkpoint import Checkpoint
from keepbest.training.preemption import Preemption
from tests.docs.blocks import ROOT

PROMPT = re.compile(r"\w*\$ (.+?)(?=\s+\w+\$ |\s*(?:#|$))")
ITERATION = r"(?:E\d+)(?:_U\d+)(?:_S\d+)"
# What SLURM itself prints, and the header and end of tables.
OF_SLURM = re.compile(
    r"Submitted batch job \d+|srun: error: \S+: tasks? [\d-]+: Exited with exit code 75"
    r"| JOBID PARTITION .*| +\d+ +all keepbest .*"
)
OF_TABLE = re.compile(r"checkpoints of runs/\w+| +ref +value +iteration +tolerance +files| ─+| *\.\.\.")
SCRIPT_TESTS = "\n".join(
    (ROOT / path).read_text()
    for path in ("tests/slurm/test_scripts.py", "tests/slurm/test_torchrun_scripts.py", "tests/hosts/test_two_hosts.py")
)


def check_session(text: str, checkpoints: dict[str, Checkpoint]) -> None:
    """Every command and every line of output of a block `console`, beside a run of the example that it shows."""
    script = None
    # A message of ours is broken at the margin of the page.
    for line in text.replace("Start it\nagain, ", "Start it again, ").splitlines():
        if commands := PROMPT.findall(line):
            for command in commands:
                script = check_command(shlex.split(command), script)
        elif not OF_SLURM.fullmatch(line) and not OF_TABLE.fullmatch(line):
            check_output(line, checkpoints)


def check_command(words: list[str], script: Path | None) -> Path | None:
    """Check one of a session that follows on `script`; returns the script that the session is about now."""
    if words[0] == "sbatch" or words[0].startswith("launch/"):
        name, *settings = words[words[0] == "sbatch" :]
        assert Path(name).name in SCRIPT_TESTS, f"no test runs {name}"
        config = re.search(r"^COMMAND=\(-m keepbest train ([^ )]+)", (ROOT / name).read_text(), flags=re.MULTILINE)
        RunFile.read(ROOT / config[1], parse_settings(settings))
        return ROOT / name
    asked = script.read_text()
    if words[0] == "scancel":
        assert words[1].removeprefix("--signal=") in re.search(r"--signal=(\w+)@", asked)[1]
    elif words[0] == "cat":
        name, output = (
            re.search(rf"^#SBATCH --{key}=(\S+)", asked, flags=re.MULTILINE)[1] for key in ("job-name", "output")
        )
        assert re.fullmatch(output.replace("%x", name).replace("%j", r"\d+"), words[1])
    else:
        assert words == ["squeue"], f"nobody knows the command {words}"
    return script


def check_output(line: str, checkpoints: dict[str, Checkpoint]) -> None:
    if found := re.fullmatch(r"\[rank 0\] (\S+) with (?:\.\.\.|tolerance=(\d+): (\S+))", line):
        key, tolerance, value = found.groups()
        known = {str(each.tolerance): each for each in checkpoints.values() if each.metric_key == key}
        assert known, f"the example does not monitor {key}"
        assert tolerance is None or float(value) == pytest.approx(known[tolerance].value, rel=1e-5)
    elif found := re.fullmatch(rf" +(\S+) +(\S+) +({ITERATION}) +(exceeded)? +(\S.*)", line):
        ref, value, iteration, exceeded, files = found.groups()
        kept = checkpoints[ref]
        assert (iteration, exceeded == "exceeded") == (kept.iteration, bool(kept.exceeded))
        assert float(value) == pytest.approx(kept.value, rel=1e-5)
        assert files.split(", ") == list(kept.files)
    else:
        assert line == of_preemption(line), f"nobody prints {line!r}"


def of_preemption(line: str) -> str:
    """The message of a run that was stopped, at the iteration that `line` has."""
    found = re.search(ITERATION, line)
    with pytest.raises(PreemptedError) as stopped:
        Preemption(Ranks.connect()).stop(found and found[0])
    return str(stopped.value)


def check_timeout(text: str) -> None:
    """The message about ranks that did not arrive, of the form that tests see for real."""
    form = re.fullmatch(
        r"error: (rank \d+ of \d+ )waited \d+ s in step '[\w /]+'; (ranks .*?): [\d, ]+\. \.\.\.\n", text
    )
    tested = (ROOT / "tests" / "test_ranks.py").read_text()
    assert re.search(rf"waited \d+ s in step 'observe loss'; {form[2]}: \d", tested)
    assert "rank {self.rank} of {self.world_size} waited" in (ROOT / "src/keepbest/ranks/control_group.py").read_text()


def check_torchrun_log(text: str) -> None:
    """Lines of torchrun, as its sources print them, and the message of keepbest."""
    sources = {module.__name__.replace(".", "/"): inspect.getsource(module) for module in (agent, processes)}
    for line in text.splitlines():
        if found := re.fullmatch(r"W\d{4} [\d:]+ (\S+)\.py:\d+\] (.*)", line):
            module, message = found.groups()
            assert printed_by(sources[module], message), f"{module} does not print {message!r}"
        elif line.startswith("training was asked"):
            assert of_preemption(line).startswith(line.removesuffix(" ..."))
        else:
            name, _, message = line.partition(": ")
            assert name.rpartition(".")[2] == processes.SignalException.__name__
            assert printed_by(sources[processes.__name__.replace(".", "/")], message)


def printed_by(source: str, message: str) -> bool:
    """Whether a format in `source` gives the message, which differs from it in numbers and names of signals only."""
    form = re.sub(r"\b\d+\b|SIG[A-Z]+", "%", message)
    return form in re.sub(r"%[sd]|\{[\w.()]*\}", "%", source)
