"""A reader of runs that knows docs/format.md alone: nothing of keepbest, and no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from copy import deepcopy
from pathlib import Path

import xxhash


def read_events(path: Path) -> list[dict]:
    lines = path.read_bytes().split(b"\n")
    whole = next((i for i, line in enumerate(lines[:-1]) if b"\0" in line), len(lines) - 1)
    for line in lines[whole + 1 : -2]:
        if b"\0" not in line and is_waited_for(json.loads(line)):
            raise ValueError("the ledger is damaged")
    events = [json.loads(line) for line in lines[:whole]]
    if events[0]["event"] != "run" or events[0]["version"] != 6:
        raise ValueError("not a ledger of version 6")
    for line, event in zip(lines, events, strict=False):
        if zlib.crc32(line[: line.rindex(b',"crc":')]) != int(event["crc"], 16):
            raise ValueError("the ledger is damaged")
    return events


def is_waited_for(event: dict) -> bool:
    return event["event"] not in ("session", "observation") or "snapshot" in event or "refs" in event


def counts(iteration: str) -> list[int]:
    return [int(number) for number in re.findall("[0-9]+", iteration)]


def follows(iteration: str, other: str) -> bool:
    pairs = list(zip(counts(iteration), counts(other), strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def step(state: dict, policy: dict, seen: dict) -> None:
    """Change `state` to the one after an observation."""
    value, sign = float(seen["value"]), 1 if policy["higher_is_better"] else -1
    is_saved = math.isfinite(value) and ("snapshot" in seen or "counts" in seen)
    best = {"value": value, "iteration": seen["iteration"]}
    known = policy["baseline"]
    if policy["top_k"] > 1 and is_saved and (known is None or sign * (value - known) > 0):
        beaten = (place for place, other in enumerate(state["top"]) if sign * (value - other["value"]) > 0)
        state["top"].insert(next(beaten, len(state["top"])), best)
        del state["top"][policy["top_k"] :]
    before = known if state["best"] is None else state["best"]["value"]
    if is_saved and (before is None or sign * (value - before) > policy["min_delta"]):
        state |= {"best": best, "tolerance_counter": 0}
    else:
        state["tolerance_counter"] += 1
        for tolerance in policy["tolerances"]:
            if tolerance < state["tolerance_counter"]:
                state["exceeded"].setdefault(str(tolerance), state["best"])
    state["last_iteration"] = seen["iteration"]


class Run:
    """What the ledger of a run adds up to: refs, pins, digests of manifests, and the keepers."""

    def __init__(self, directory: Path):
        self.folder = directory / "checkpoints"
        self.refs, self.pins, self.manifests, self.keepers, self.needs = {}, {}, {}, {}, {}
        for event in read_events(self.folder / "ledger.jsonl"):
            if event["event"] in ("begin", "observation", "pin", "unpin", "checkpoint"):
                getattr(self, event["event"])(event)
            if event["event"] in ("begin", "refs", "end") or "lost" in event:
                self.keepers[event["keeper"]]["skipped"] = []
            self.refs |= event.get("refs", {})
        self.refs = {name: snapshot for name, snapshot in self.refs.items() if snapshot is not None}

    def begin(self, event):
        keeper = self.keepers.setdefault(event["keeper"], {"timelines": [], "best_value": None, "skipped": []})
        keeper["policy"] = event["policy"]
        base, seen = event["state"], []
        if base is None:
            base, seen = keeper["timelines"][event["timeline"]]
            seen = [each for each in seen if event["at"] and not follows(each["iteration"], event["at"])]
        keeper["timelines"].append((base, seen))

    def observation(self, event):
        keeper = self.keepers[event["keeper"]]
        keeper["timelines"][-1][1].append(event)
        if "superseded" in event:
            keeper["skipped"].append(event)
        if event.get("best"):
            for skipped in keeper["skipped"]:
                skipped["counts"] = True
            keeper["skipped"] = []
        if "snapshot" in event:
            self.manifests.setdefault(event["snapshot"], event["manifest"])
            if event.get("refs", {}).get(event["keeper"]) == event["snapshot"]:
                keeper["best_value"] = event["value"]

    def pin(self, event):
        self.pins[event["keeper"], event["tag"]] = set(event["snapshots"])

    def unpin(self, event):
        self.pins.pop((event["keeper"], event["tag"]), None)

    def checkpoint(self, event):
        self.manifests.setdefault(event["snapshot"], event["manifest"])
        self.needs[event["snapshot"]] = set(event["needs"])

    def state(self, keeper: str) -> dict:
        base, seen = self.keepers[keeper]["timelines"][-1]
        state = deepcopy(base)
        for each in seen:
            step(state, self.keepers[keeper]["policy"], each)
        return state

    def verified_files(self, ref: str) -> set[Path]:
        """The files of the snapshot that a ref names, after each was compared with its digest."""
        folder = self.folder / "snapshots" / self.refs[ref]
        text = (folder / "snapshot.json").read_bytes()
        if hashlib.blake2b(text, digest_size=16).hexdigest() != self.manifests[self.refs[ref]]:
            raise ValueError(f"the manifest in {folder} is damaged")
        for name, record in json.loads(text)["files"].items():
            data = (folder / name).read_bytes()
            if len(data) != record["bytes"] or xxhash.xxh3_128(data).hexdigest() != record["digest"]:
                raise ValueError(f"{folder / name} is damaged")
        return {folder / name for name in json.loads(text)["files"]}
