"""A run with a tracker that fails, and with one that hangs to the end, trains and ends as if they were not there."""

import json

from place import SYNTHETIC, prepared

TRACKERS = """
import dataclasses
import threading


@dataclasses.dataclass(frozen=True)
class Fails:
    def ready(self):
        pass

    def open(self, about):
        raise OSError("the server is away")


@dataclasses.dataclass(frozen=True)
class Hangs:
    def ready(self):
        pass

    def open(self, about):
        return self

    def metrics(self, step, numbers):
        pass

    def close(self):
        threading.Event().wait()

"""
PATCH = "from llmjax import tracking\n\ntracking.PATIENCE = 0.5"


def test_a_run_ends_well_beside_a_tracker_that_fails_and_one_that_never_ends(tmp_path):
    place = prepared(tmp_path)
    text = SYNTHETIC.replace("run = Run(", TRACKERS + "run = Run(\n    trackers=(Fails(), Hangs()),")
    (tmp_path / "tracked.py").write_text(text)
    ended = place.run("train", "tracked.py", "--steps", "6", "--name", "tracked", patch=PATCH)
    assert ended.code == 0 and "Done: 6 steps" in ended.out and ended.err == ""
    assert ended.out.count("without the tracker Fails: OSError: the server is away") == 1
    assert ended.out.count("without the tracker Hangs: it did not end within 0.5 s") == 1
    folder = place.runs / "tracked"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["tracker"] for e in events if e["kind"] == "tracker_failed"] == ["Fails", "Hangs"]
    vitals = json.loads((folder / "processes" / "0.json").read_text())
    assert (vitals["process"], vitals["step"], vitals["phase"]) == (0, 6, "finish") and vitals["host_bytes"] > 2**20
    environment = json.loads((folder / "env.json").read_text())
    assert environment["parameters"] > 1000 and environment["flops_per_token"] > 1000
