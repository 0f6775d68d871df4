"""Runs every benchmark, each in a process of its own, and prints each figure beside its bar."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import ROOT

PROGRAMS = (
    "stall",
    "many",
    "durable",
    "heartbeat",
    "gather",
    "memory",
    "quiet",
    "tolerance",
    "upload",
    "endurance",
    "sharded",
    "shards",
    "scale",
    "shards_scale",
    "cuda",
)


def main() -> int:
    options = sys.argv[1:]
    failed = []
    for program in PROGRAMS:
        print(f"\n## {program}", flush=True)
        # The programs are named above; the options are those of the command line.
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{program}", *options], cwd=ROOT, check=False)
        if done.returncode:
            failed.append(program)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
