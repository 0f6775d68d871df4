"""A copy in a folder of this machine, which has no object store's promises."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from keepbest.remote.storage import Remote
from keepbest.remote.verify import verify_run as verify
from tests.kit.runs import Run
from tests.remote.runs import local_files


def files_in(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_new_content_takes_its_place_in_one_step(tmp_path):
    remote, folder = Remote(f"file://{tmp_path}/copy"), tmp_path / "copy" / "checkpoints"
    for name, content in {"a": b"first", "b": b"second, and longer"}.items():
        (tmp_path / name).write_bytes(content)
    remote.write_first_ledger(b"first")
    remote.put(tmp_path / "a", "snapshots/U1/model.pt")
    with (folder / "ledger.jsonl").open("rb") as ledger, (folder / "snapshots/U1/model.pt").open("rb") as file:
        remote.write_ledger(b"second, and longer")
        remote.put(tmp_path / "b", "snapshots/U1/model.pt")
        assert (ledger.read(), file.read()) == (b"first", b"first"), "nothing is written over what somebody reads"
    assert files_in(folder) == dict.fromkeys(("ledger.jsonl", "snapshots/U1/model.pt"), b"second, and longer")


@pytest.mark.parametrize("has_links", [True, False])
def test_first_ledger_takes_no_place_that_is_taken(has_links, tmp_path, monkeypatch):
    def refuse(path, target):
        raise PermissionError(errno.EPERM, "no links here", str(path))

    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    remote = Remote(f"file://{tmp_path}")
    assert [remote.write_first_ledger(b"mine"), remote.write_first_ledger(b"other")] == [True, False]
    assert files_in(tmp_path / "checkpoints")["ledger.jsonl"] == b"mine"


def test_copy_in_a_folder_ends_like_the_run(tmp_path):
    url = f"file://{tmp_path}/copy"
    run = Run(tmp_path / "run", remote=url, tolerances=[0])
    with run.keeper:
        run.observe(3.0, 4.0, 2.0)
    assert files_in(tmp_path / "copy" / "checkpoints") == local_files(tmp_path / "run")
    assert verify(url) == []


def test_what_is_on_its_way_in_training_is_not_left_over(tmp_path):
    url, begun = f"file://{tmp_path}/copy", tmp_path / "copy" / "checkpoints" / "snapshots" / "U9" / "model.pt"
    run = Run(tmp_path / "run", remote=url)
    with run.keeper as keeper:
        run.observe(3.0)
        keeper.flush()
        begun.parent.mkdir(parents=True)
        begun.write_bytes(b"the first part")
        assert verify(url) == []
    [fault] = verify(url)
    assert (fault.kind, f"{url}/checkpoints/snapshots/U9/model.pt is left over" in fault.message) == (
        "unfinished",
        True,
    )
    with Run(tmp_path / "run", remote=url, resume="ledger").keeper:
        assert verify(url) == [], "it trains again"
