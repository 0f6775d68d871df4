"""A copy in a folder of this machine, which has no object store's promises."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from torch import nn

from keepbest import load, open_run
from keepbest.errors import ConfigError, LedgerError, SnapshotError
from keepbest.remote.storage import Remote, check_remote
from keepbest.remote.verify import verify_run as verify
from tests.kit.runs import Run
from tests.remote.runs import local_files

BEST = "best_model.loss"


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


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_folder_that_could_not_be_removed_goes_with_the_next_save(kind, tmp_path, monkeypatch, caplog):
    snapshots, remove = [tmp_path / run / "checkpoints" / "snapshots" for run in ("run", "copy")], Path.rmdir

    def refuse(folder):
        if folder.parent == snapshots[1]:
            raise OSError(errno.EBUSY, "somebody reads in it", str(folder))
        remove(folder)

    def save(number):
        run = Run(tmp_path / "run", remote=f"file://{tmp_path}/copy", resume="ledger", format=kind)
        with run.keeper:
            run.observe(-float(number), first=number)

    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", refuse)
        save(2)
    assert "what is no longer needed stays until the next save" in caplog.text
    assert len(list(snapshots[1].iterdir())) == 2
    save(3)
    names = [[path.name for path in folder.iterdir()] for folder in snapshots]
    assert names[0] == names[1]
    assert verify(tmp_path / "copy") == [], "a copy in a folder can be read as a run"


def test_folders_with_files_stay(tmp_path):
    remote, snapshots = Remote(f"file://{tmp_path}"), tmp_path / "checkpoints" / "snapshots"
    (tmp_path / "file").write_bytes(b"content")
    for path in ("U1/model/a", "U1/model/b", "U1/c"):
        remote.put(tmp_path / "file", f"snapshots/{path}")
    for path, left in (("U1/model/a", ["U1/c", "U1/model/b"]), ("U1/model/b", ["U1/c"]), ("U1/c", [])):
        remote.remove(f"snapshots/{path}")
        remote.remove_empty_folders()
        assert sorted(files_in(snapshots)) == left
    assert list(snapshots.iterdir()) == []
    remote.remove_empty_folders()


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


@pytest.fixture
def copy(tmp_path):
    """The URL of a copy that nobody works on, and its folder."""
    url = f"file://{tmp_path}/copy"
    with (run := Run(tmp_path / "run", remote=url)).keeper:
        run.observe(3.0)
    return url, tmp_path / "copy" / "checkpoints"


def test_broken_connection_is_no_damage(copy, monkeypatch):
    url, _ = copy
    get = Remote.get

    def break_off(remote, path, file):
        if path.endswith("model.pt"):
            raise ConnectionResetError(errno.ECONNRESET, "broken off")
        get(remote, path, file)

    monkeypatch.setattr(Remote, "get", break_off)
    for read in (lambda: load(url, BEST, nn.Linear(1, 1)), lambda: verify(url)):
        with pytest.raises(SnapshotError, match=f"{url} cannot be read: .*broken off"):
            read()


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("snapshots/U1/model.pt", lambda data: data * 2, "model.pt is damaged: it has"),
        ("snapshots/U1/model.pt", lambda data: data[:-1], "model.pt is damaged: it has"),
        ("snapshots/U1/snapshot.json", lambda data: data + b" ", "snapshot.json is damaged: it is not what"),
        ("ledger.jsonl", lambda data: data.replace(b"3.0", b"3.1"), "ledger.jsonl, line 3 is damaged"),
    ],
    ids=["grown", "cut", "manifest", "ledger"],
)
def test_damage_is_named_where_it_is(name, change, found, copy, tmp_path):
    url, folder = copy
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    expected = f"{url}/checkpoints/{name.rpartition('/')[0]}".rstrip("/") + f"/{found}"

    def resume():
        Run(tmp_path / "elsewhere", remote=url, resume="ledger").keeper.start()

    for read in (lambda: load(url, BEST, nn.Linear(1, 1)), resume):
        with pytest.raises((SnapshotError, LedgerError)) as caught:
            read()
        assert expected in str(caught.value)
    if name == "ledger.jsonl":
        with pytest.raises(LedgerError) as caught:
            open_run(url)
        assert expected in str(caught.value)
    else:
        [fault] = verify(url)
        assert (fault.kind, expected in fault.message) == ("damage", True)
        assert (open_run(url).best().damage or expected).startswith(expected)


def test_line_that_was_torn_off_is_cut_in_the_copy_too(copy, tmp_path):
    url, folder = copy
    with (folder / "ledger.jsonl").open("ab") as ledger:  # as a copy that was made by hand after a crash has it
        ledger.write(b'{"event":"obser')
    [fault] = verify(url)
    assert (fault.kind, f"{url}/checkpoints/ledger.jsonl: the last line was torn off; 15" in fault.message) == (
        "unfinished",
        True,
    )
    with (run := Run(tmp_path / "elsewhere", remote=url, resume="ledger")).keeper:
        run.observe(2.0, first=2)
    assert verify(url) == []
    assert open_run(url).best().value == 2.0


def test_url_that_cannot_be_opened_is_an_error_of_the_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be opened: .*directory"):
        open_run(f"zip://run::file://{tmp_path}")


@pytest.mark.parametrize("url", ["file://", "file:///", "://", "memory:// ", "://a"])
def test_url_without_a_place_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (check_remote, open_run):
        with pytest.raises(ConfigError, match="expected the URL of a run, like s3://bucket/runs/a, got"):
            use(url)
    assert list(tmp_path.iterdir()) == []
