"""A script of the user's own, as docs/launch.md shows it."""

from __future__ import annotations

import sys

from keepbest.run.reader import read_history
from keepbest.run.verify import verify
from tests.docs.blocks import blocks
from tests.kit import cli_runs as runs
from tests.slurm.scripts import edited

REF = "best_model.loss.val"
# A rank is signalled in the first start, as SLURM does it before the time limit.
SIGNAL = """
            if epoch == 4 and not CHECKPOINT.exists() and rank == 1:
                os.kill(os.getpid(), 10)
"""


def test_loop_of_the_page_returns_to_the_queue_and_resumes(cluster, tmp_path):
    [text] = [block.text for block in blocks("docs/launch.md") if block.file_name == "loop.py"]
    observes = "            optimizer.step()\n"
    assert text.count(observes) == 1
    loop = tmp_path / "loop.py"
    loop.write_text(text.replace(observes, observes + SIGNAL).replace("runs/loop", str(tmp_path / "run")))
    command = {"COMMAND": f"({loop})", "PYTHON": f"({sys.executable})"}
    size = {"nodes": 2, "ntasks_per_node": 1, "gpus_per_node": None, "cpus_per_task": 1}
    job = cluster.submit(edited("slurm_requeue.sbatch", tmp_path, **command, **size), output=tmp_path / "job.out")
    assert job.wait() == "COMPLETED", job.printed()
    assert job.restarts == 1
    assert verify(tmp_path / "run") == []
    entries = read_history(tmp_path / "run").keepers[REF].present.entries
    assert [entry.observation.iteration.epoch for entry in entries] == list(range(1, 11))
    assert runs.checkpoints(tmp_path / "run")[REF].iteration == "E10"
