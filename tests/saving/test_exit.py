"""Signals while the interpreter exits and waits for saves in the background."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
from torch import nn
from keepbest import BestKeeper
from tests.kit.files import SteppedFiles
from tests.kit.seams import use

directory, number, times = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
main, received = threading.main_thread().ident, []

def interrupt(signal_number, frame):
    received.append(signal_number)
    raise (KeyboardInterrupt if signal_number == signal.SIGINT else SystemExit)

def wait_until_main_waits():
    while True:
        frame = sys._current_frames()[main]
        while frame is not None:
            if frame.f_code.co_name == "close":
                return
            frame = frame.f_back

def step(operation):
    if operation.name == "sync" and operation.path.suffix == ".pt" and not received:
        for time in range(times):
            wait_until_main_waits()
            signal.pthread_kill(main, number)
            while len(received) == time:
                pass
        if times > 1:
            threading.Event().wait()  # a disk that does not answer
    return operation.do()

signal.signal(number, interrupt)
model = nn.Linear(1, 1)
with use(directory, files=SteppedFiles(step)) as held:
    keeper = BestKeeper(model, directory=directory, metric_key="loss", async_save=True, keep_top_k=3)
    for epoch in (1, 2):
        keeper.observe(3.0 - epoch, epoch=epoch)
"""


def exit_with_signals(directory, number: int, times: int) -> tuple[list[str], str]:
    """The snapshots that the ledger of a run names, and what its process printed."""
    command = [sys.executable, "-c", PROGRAM, str(directory), str(number), str(times)]
    found = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
    lines = map(json.loads, (directory / "checkpoints/ledger.jsonl").read_text().splitlines())
    return [line["snapshot"] for line in lines if "snapshot" in line], found.stderr


@pytest.mark.parametrize("number", [2, 15], ids=["SIGINT", "SIGTERM"])
def test_one_signal_at_the_exit_loses_no_save(number, tmp_path):
    saved, printed = exit_with_signals(tmp_path, number, 1)
    assert saved == ["E1", "E2"]
    assert printed.count("another interruption loses what is not") == 1


def test_second_signal_at_the_exit_is_obeyed(tmp_path):
    saved, printed = exit_with_signals(tmp_path, 2, 2)
    assert saved == []
    assert "KeyboardInterrupt" in printed
