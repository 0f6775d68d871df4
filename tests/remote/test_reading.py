"""A run that is read from its remote copy, or goes on from there on another machine."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from keepbest import average, load, open_run
from keepbest.cli.app import app
from keepbest.errors import ConfigError, LedgerError, RunExistsError, SnapshotError
from keepbest.export import export
from keepbest.remote.storage import Remote
from keepbest.remote.verify import verify_run as verify
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, ledger, refs, saved_at, set_weights, snapshots, update
from tests.remote.server import BUCKET, CREDENTIALS

VALUES = (5.0, 4.0, 6.0, 3.0, 7.0, 7.0, 2.0)
BEST = "best_model.loss"
TOLERANCE = f"{BEST}.tolerance=0"


@pytest.fixture
def finished(tmp_path, place):
    run = Run(tmp_path / "finished", remote=place.url, tolerances=[0, 9], keep_top_k=2)
    with run.keeper:
        run.observe(*VALUES)
    return place


def test_copy_is_read_from_python_as_the_run_is(tmp_path, finished):
    here, there = open_run(tmp_path / "finished"), open_run(finished.url)
    assert (there.refs, there.history(), there.keepers) == (here.refs, here.history(), here.keepers)
    assert (there.place, there.activity, there.verify()) == (finished.url, None, [])
    to = tmp_path / "average.pt"
    average(finished.url, to, top=2)
    assert torch.load(to, weights_only=True)["weight"].item() == 5.5, "of the updates 4 and 7"


def test_temporary_copy_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, caplog):
    """One rank alone would raise it, when all have loaded."""
    run, rmdir, refused = Run(tmp_path / "a", remote=f"file://{tmp_path}/copy"), os.rmdir, []
    with run.keeper:
        run.observe(2.0)

    def refuse(path, **options):
        if "keepbest-" in str(path):
            refused.append(path)
            raise OSError(39, "Directory not empty")  # as NFS has it for files that are open
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", refuse)
    model = nn.Linear(1, 1)
    assert load(f"file://{tmp_path}/copy", BEST, model).value == 2.0
    monkeypatch.undo()
    [found] = refused
    assert [f"the temporary copy {found} cannot be removed" in each for each in caplog.messages] == [True]
    rmdir(found)


def observed(directory: Path) -> list[tuple]:
    return [
        (line["iteration"], line["value"], line.get("refs"), line.get("snapshot", "").split(".r")[0])
        for line in ledger(directory)
        if line["event"] == "observation"
    ]


@pytest.mark.parametrize("how", ["by the ledger", "by a state"])
def test_run_continues_from_its_remote_copy_in_an_empty_folder(tmp_path, place, how):
    whole = Run(tmp_path / "whole", tolerances=[0, 1], keep_top_k=2)
    with whole.keeper:
        whole.observe(*VALUES)
    cut = Run(tmp_path / "cut", remote=place.url, tolerances=[0, 1], keep_top_k=2)
    cut.observe(*VALUES[:4])
    state = cut.keeper.state_dict()
    cut.keeper.flush(pin="a")
    cut.keeper.abandon()
    resume = "ledger" if how == "by the ledger" else None
    again = Run(tmp_path / "again", remote=place.url, tolerances=[0, 1], keep_top_k=2, resume=resume)
    if how == "by a state":
        again.keeper.load_state_dict(state)
    with again.keeper as keeper:
        assert snapshots(tmp_path / "again") == snapshots(tmp_path / "cut")
        again.observe(*VALUES[4:], first=5)
        keeper.release("a")
    assert keeper.state == whole.keeper.state
    named, expected = refs(tmp_path / "again"), refs(tmp_path / "whole")
    assert named.keys() == expected.keys()
    for ref in expected:
        assert saved_at(tmp_path / "again", ref) == saved_at(tmp_path / "whole", ref)
    assert verify(tmp_path / "again") == verify(place.url) == []


def test_new_run_does_not_take_the_place_of_another(tmp_path, finished):
    before = finished.objects()
    with pytest.raises(RunExistsError, match="choose another remote"):
        Run(tmp_path / "new", remote=finished.url).keeper.start()
    assert finished.objects() == before
    assert not snapshots(tmp_path / "new")


def test_run_that_continued_elsewhere_is_not_resumed_here(tmp_path, finished):
    elsewhere = Run(tmp_path / "elsewhere", remote=finished.url, resume="ledger")
    with elsewhere.keeper:
        elsewhere.observe(1.0, first=8)
    alone = Run(tmp_path / "finished", resume="ledger")
    with alone.keeper:
        alone.observe(1.5, first=8)
    before = finished.objects()
    with pytest.raises(LedgerError, match="different ways"):
        Run(tmp_path / "finished", remote=finished.url, resume="ledger").keeper.start()
    assert finished.objects() == before
    assert verify(tmp_path / "finished") == []


def test_older_directory_is_brought_up_to_the_copy(tmp_path, finished):
    elsewhere = Run(tmp_path / "elsewhere", remote=finished.url, resume="ledger", tolerances=[0, 9])
    with elsewhere.keeper:
        elsewhere.observe(1.0, first=8)
    again = Run(tmp_path / "finished", remote=finished.url, resume="ledger", tolerances=[0, 9])
    with again.keeper as keeper:
        assert keeper.state.best.value == 1.0
        assert saved_at(tmp_path / "finished", BEST) == 8


def test_resume_that_breaks_off_while_it_fetches_can_be_repeated(tmp_path, finished, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    manifest = f"{finished.prefix}/checkpoints/snapshots/U7/snapshot.json"
    body = finished.server.client.get_object(Bucket=BUCKET, Key=manifest)["Body"].read()
    finished.server.client.delete_object(Bucket=BUCKET, Key=manifest)
    with pytest.raises(SnapshotError, match="U7"):  # others have been fetched by then
        Run(tmp_path / "again", remote=finished.url, resume="ledger").keeper.start()
    assert not (tmp_path / "again" / "checkpoints" / "ledger.jsonl").exists()
    finished.server.client.put_object(Bucket=BUCKET, Key=manifest, Body=body)
    with Run(tmp_path / "again", remote=finished.url, resume="ledger", tolerances=[0, 9]).keeper as keeper:
        assert keeper.state.best.value == 2.0
    assert verify(tmp_path / "again") == []


def test_load_and_export_read_the_copy(tmp_path, finished):
    model = nn.Linear(1, 1)
    loaded = load(finished.url, TOLERANCE, model)
    assert (loaded.value, loaded.iteration, loaded.path) == (4.0, update(2), None)
    assert {parameter.item() for parameter in model.parameters()} == {2.0}
    [path] = export(finished.url, BEST, tmp_path / "best.pt")
    assert {tensor.item() for tensor in torch.load(path, weights_only=True).values()} == {7.0}
    with pytest.raises(SnapshotError, match=f"no ref 'nonsense'; there are: {BEST}"):
        load(finished.url, "nonsense", model)
    with pytest.raises(SnapshotError, match="has no ledger"):
        load(f"{finished.url}-of-nobody", BEST, model)


def test_commands_read_the_copy(tmp_path, finished):
    def tell(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.output

    local, url = str(tmp_path / "finished"), finished.url
    assert json.loads(tell("show", url, "--json")) == json.loads(tell("show", local, "--json"))
    assert url in tell("show", url)
    for arguments in (["show", "{}", "--history"], ["tolerance", "{}", "0..5"]):
        here, there = (tell(*(each.format(run) for each in arguments)) for run in (local, url))
        assert [line for line in there.splitlines() if BEST in line] == [
            line for line in here.splitlines() if BEST in line
        ]
    assert "everything is as the ledger says" in tell("verify", url)
    tell("plot", url, "-o", str(tmp_path / "run.svg"))
    tell("report", url, "-o", str(tmp_path / "run.html"))
    assert url in (tmp_path / "run.html").read_text()
    assert "everything that" in tell("upload", local, url)


def test_damage_and_leftovers_of_the_copy_are_found(finished):
    key = f"{finished.prefix}/checkpoints/snapshots/U7/model.pt"
    body = bytearray(finished.server.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    finished.server.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(body))
    finished.server.client.put_object(Bucket=BUCKET, Key=f"{finished.prefix}/checkpoints/snapshots/U0/x", Body=b"x")
    damage, leftover = verify(finished.url)
    assert (damage.kind, leftover.kind) == ("damage", "unfinished")
    assert f"{finished.url}/checkpoints/snapshots/U7/model.pt is damaged" in damage.message
    assert f"{finished.url}/checkpoints/snapshots/U0/x is left over" in leftover.message
    with pytest.raises(SnapshotError, match="damaged"):
        load(finished.url, BEST, nn.Linear(1, 1))


def test_ranks_load_shards_from_the_copy(tmp_path, place):
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": place.link.url}
    assert run_ranks(save_and_load_shards, 2, tmp_path, place.url, environment) == [[2.0, 2.0]] * 2


def test_damage_on_the_way_to_a_rank_is_found_there(tmp_path, place):
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": place.link.url}
    run_ranks(save_and_load_shards, 2, tmp_path, place.url, environment)
    for told in run_ranks(told_damage, 2, place.url, environment):
        assert len(told) == 4
        assert all("damaged" in each and place.url in each for each in told)


def told_damage(url, environment):
    """What loading raises where each rank in turn gets each share damaged."""
    os.environ.update(environment)
    get, told = Remote.get, []
    for rank, share in itertools.product((0, 1), ("__0_0.distcp", "__1_0.distcp")):

        def get_damaged(remote, path, file, rank=rank, share=share):
            get(remote, path, file)
            if path.endswith(share) and torch.distributed.get_rank() == rank:
                body = bytearray(file.read_bytes())
                body[len(body) // 2] ^= 1
                file.write_bytes(body)

        Remote.get = get_damaged
        try:
            load(url, TOLERANCE, fully_shard(nn.Linear(4, 4)))
        except SnapshotError as error:
            told.append(str(error))
    return told


def save_and_load_shards(directory, url, environment):
    os.environ.update(environment)
    model = fully_shard(nn.Linear(4, 4))
    run = Run(directory, model, remote=url, format="dcp", tolerances=[0])
    with run.keeper:
        run.observe(5.0, 4.0, 6.0, 3.0)
    set_weights(model, 0.0)
    load(url, TOLERANCE, model)
    found = []
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        [value] = parameter.full_tensor().unique().tolist()
        found.append(value)
    return found


def test_remote_is_the_same_on_all_ranks(tmp_path, place):
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": place.link.url}
    assert run_ranks(told_remotes_differ, 2, tmp_path, place.url, environment) == ["DesyncError"] * 2


def told_remotes_differ(directory, url, environment):
    os.environ.update(environment)
    try:
        Run(directory, remote=f"{url}-{torch.distributed.get_rank()}")
    except Exception as error:  # noqa: BLE001  # its kind is what is asked
        return type(error).__name__


def test_what_needs_a_directory_says_so(place):
    result = CliRunner().invoke(app, ["repair", place.url])
    assert result.exit_code == 1
    assert "expected a directory of this machine" in result.output
    with pytest.raises(ConfigError, match="expected a directory of this machine"):
        Run(place.url)
    with pytest.raises(ConfigError, match="expected a directory of this machine"):
        Run(Path(place.url))


def test_config_error_where_the_storage_has_no_client(tmp_path):
    with pytest.raises(ConfigError, match="gcsfs"):
        load("gs://bucket/run", BEST, nn.Linear(1, 1))
