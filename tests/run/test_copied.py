"""Runs that were copied by programs which do not keep links."""

from __future__ import annotations

import shutil

import pytest

from keepbest.run.maintenance import repair
from keepbest.run.verify import verify
from tests.kit.runs import Run, refs

BEST = "best_model.loss"


@pytest.fixture
def kept(tmp_path):
    run = Run(tmp_path / "run", tolerances=[0])
    with run.keeper:
        run.observe(3.0, 2.0, 4.0)
    return tmp_path / "run"


@pytest.mark.parametrize("damage", [None, "other bytes", "other snapshot", "a file is missing"])
def test_folder_in_the_place_of_a_link_is_compared(damage, kept, tmp_path):
    copy = shutil.copytree(kept, tmp_path / "copy", symlinks=False)
    file = copy / "checkpoints" / BEST / "model.pt"
    match damage:
        case "other bytes":
            file.write_bytes(file.read_bytes()[::-1])
        case "other snapshot":  # of an older copy
            (file.parent / "snapshot.json").write_text("{}")
        case "a file is missing":
            file.unlink()
    found = verify(copy)
    if damage is None:
        assert found == []
    else:
        [fault] = found
        assert (fault.kind, f"{file.parent} is no link, and no copy of snapshots/U2" in fault.message) == (
            "unfinished",
            True,
        )
    repair(copy)
    assert verify(copy) == []
    assert damage is None or refs(copy) == refs(kept)


def test_file_in_the_place_of_a_link_is_found(kept):
    link = kept / "checkpoints" / BEST
    target = str(link.readlink())
    link.unlink()
    link.write_text(target)  # as programs unpack a link that may not make one
    [fault] = verify(kept)
    assert f"{link} is no link, and no copy of snapshots/U2, as the ledger says: it is no folder" in fault.message
    repair(kept)
    assert refs(kept)[BEST] == "U2"
