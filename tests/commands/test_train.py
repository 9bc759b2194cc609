"""Training from the command line, in processes that are killed, stopped, moved to other meshes and started again.

Every command is a process of its own, with a compile cache that all of them share.
"""

import concurrent.futures
import dataclasses
import json
import re
import shutil
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from place import (
    EVALUATION,
    FOUR,
    METRICS,
    STEPS,
    Ended,
    Place,
    arrays,
    content,
    curve,
    equal,
    flip,
    kinds,
    losses,
    metrics,
    prepared,
)  # fmt: skip

from llmjax import cli
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints, like, named
from llmjax.errors import Refused
from llmjax.mesh import Axes
from llmjax.run import fingerprint
from llmjax.train.program import make
from llmjax.train.resume import restore

# The scenarios. Two at a time, as a process that starts keeps one core busy; the tests look at what came of them.


def golden(place: Place) -> list[Ended]:
    """A run that nothing disturbs, the same command once more, and the same run from its run.json."""
    command, folder = ("train", "synthetic.py", "--name", "golden", *FOUR), place.runs / "golden"
    first, before = place.run(*command), content(folder)
    again = place.run(*command)
    assert content(folder) == before
    return [first, again, place.run("train", str(folder / "run.json"), "--name", "other", *FOUR)]


def broken(place: Place) -> None:
    """A run that is killed, stopped, damaged, stopped and killed before it comes to its end."""
    command, folder = ("train", "synthetic.py", "--name", "broken", *FOUR), place.runs / "broken"
    checkpoints = Checkpoints(folder / "checkpoints")

    def kill(lines):
        assert place.signalled(signal.SIGKILL, "broken", lines, *command).code == -signal.SIGKILL
        assert lines <= len(metrics(folder)) < STEPS + 3 and "finish" not in kinds(folder)

    def stop(number, lines):
        ended = place.signalled(number, "broken", lines, *command)
        step = metrics(folder)[-1]["step"]
        assert (ended.code, ended.err) == (75, "")
        assert "Stopping after this step; saving. Press Ctrl-C again to leave at once." in ended.out
        assert f"Stopped and saved after step {step} of 24: run the same command to continue." in ended.out
        assert checkpoints.latest() == step < STEPS and kinds(folder)[-1] == "stop"
        return ended

    kill(lines=2)
    stop(signal.SIGINT, lines=6)

    older, newest = checkpoints.steps()
    damaged = checkpoints.folder / str(newest)
    flip(max((path for path in damaged.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    shutil.copytree(folder, place.runs / "lost")
    resumed = stop(signal.SIGTERM, lines=len(metrics(folder)) + 3)
    why = rf"Passed over checkpoint {damaged}: state/\S+ holds other bytes than were written\.\n"
    assert re.search(why, resumed.out) and f"Continuing runs/broken from step {older}." in resumed.out

    kill(lines=len(metrics(folder)) + 4)
    done = place.run(*command)
    assert (done.code, done.err) == (0, "") and "Continuing runs/broken from step" in done.out
    lost(place)


def lost(place: Place) -> None:
    """A run whose every checkpoint is damaged, which then gets one back."""
    folder = place.runs / "lost"
    command, checkpoints = ("train", "synthetic.py", "--name", "lost", *FOUR), Checkpoints(folder / "checkpoints")
    older, newest = checkpoints.steps()
    path = checkpoints.folder / str(older) / "commit_success.txt"
    kept = path.read_bytes()
    path.unlink()
    before = content(checkpoints.folder)
    refused = place.run(*command)
    expected = f"llmjax: no checkpoint in {checkpoints.folder} is what was written ({newest}: state/"
    assert refused.err.startswith(expected) and f"; {older}: commit_success.txt is missing): bring one" in refused.err
    assert refused.code == 65 and refused.err.count("\n") == 1 and content(checkpoints.folder) == before
    listed = place.run("checkpoints", "lost", "--verify")
    assert listed.code == 65 and listed.out.count("no: ") == 2 and listed.err == ""
    path.write_bytes(kept)
    listed = place.run("checkpoints", "lost", "--verify")
    assert listed.code == 65 and listed.out.count("no: ") == 1 and " ago" in listed.out
    done = place.run(*command)
    assert (done.code, done.err) == (0, "") and f"Continuing runs/lost from step {older}." in done.out


def moved(place: Place) -> int:
    """A run on mesh (4, 2) that is stopped and goes on in three other places; returns the step it stopped at."""
    train, mesh = ("train", "synthetic.py", "--layout", "fsdp_tp"), ("--axes.fsdp", "4", "--axes.tensor", "2")
    eight = ("--processes.devices", "8")
    ended = place.signalled(signal.SIGINT, "4x2", 13, *train, "--name", "4x2", *eight, *mesh)
    step = Checkpoints(place.runs / "4x2" / "checkpoints").latest()
    assert (ended.code, ended.err) == (75, "") and 11 <= step < STEPS
    launch = ("launch", "--processes", "2", "--devices", "4", "--logs", "logs_4x2")
    commands = {
        "2x4": (*train, *eight, "--axes.fsdp", "2", "--axes.tensor", "4"),
        "one": (*train, "--processes.devices", "1"),
        "two": (*launch, *train, *mesh),
    }
    changed = {"2x4": "axes fsdp 4 x tensor 2 -> fsdp 2 x tensor 4", "one": "axes fsdp 4 x tensor 2 -> one device"}
    for name, command in commands.items():
        shutil.copytree(place.runs / "4x2", place.runs / name)
        done = place.run(*command, "--name", name)
        assert (done.code, done.err) == (0, ""), name
        assert f"Continuing runs/{name} from step {step}." in done.out
        assert done.out.count("Changed since that checkpoint") == (name in changed), done.out
        assert f"{changed.get(name, '')} (same numbers up to rounding)." in done.out or name not in changed
    return step


def pair(place: Place) -> None:
    """Two processes that are stopped by Ctrl-C and started again."""
    launch = ("launch", "--processes", "2", "--devices", "2", "--logs", "logs", "train", "synthetic.py")
    checkpoints, log = Checkpoints(place.runs / "pair" / "checkpoints"), place.folder / "logs" / "process_1.log"
    ended = place.signalled(signal.SIGINT, "pair", 10, *launch, "--name", "pair")
    step = metrics(place.runs / "pair")[-1]["step"]
    assert ended.code == 75 and f"Stopped and saved after step {step} of 24" in ended.out
    assert all("SIGTERM caught" in line for line in ended.err.splitlines())  # JAX's own notice
    assert checkpoints.latest() == step < STEPS  # whole, so both have saved it
    flip(checkpoints.folder / str(step) / "state" / "manifest.ocdbt")
    before = checkpoints.steps()[-2]
    done = place.run(*launch, "--name", "pair", "--save-minutes", "0.0001", "--keep", "99")
    assert (done.code, done.err) == (0, "") and f"Continuing runs/pair from step {before}." in done.out
    assert done.out.count("Passed over") == 1 and "Passed over" not in log.read_text()
    after = [step for step in checkpoints.steps() if step > before]
    assert after == list(range(before + 1, STEPS + 1))  # by the clock, each one by both
    assert "devices  4 x cpu, 2 processes" in done.out
    assert "process 0 of 2: 2 of 4 devices, 8 of 16 rows" in done.out
    assert log.read_text() == "process 1 of 2: 2 of 4 devices, 8 of 16 rows\n"


def text(place: Place) -> Ended:
    """A run on text."""
    return place.run("train", "text.py", "--processes.devices", "1", "--sample-every", "10")


def wild(place: Place) -> Ended:
    """A run that cannot go well."""
    absurd = ("--optimizer.lr", "1e30", "--clip", "0", "--save-every", "1")
    return place.run("train", "synthetic.py", "--name", "wild", *absurd, "--processes.devices", "1")


def refused(place: Place) -> Ended:
    """Two processes whose data is not there."""
    launch = ("launch", "--processes", "2", "--devices", "1", "--logs", "logs_refused")
    return place.run(*launch, "train", "text.py", "--name", "refused", "--data.path", "nowhere")


def tutorial(place: Place) -> list[Ended]:
    """The tutorial's network on one, two and four devices and on two processes."""
    train = ("train", "tutorial_mlp", "--name")
    alone = [place.run(*train, f"mlp{n}", "--processes.devices", str(n)) for n in (1, 2, 4)]
    launch = ("launch", "--processes", "2", "--devices", "2", "--logs", "logs_mlp")
    return [*alone, place.run(*launch, *train, "mlp_pair")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return prepared(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def became(place) -> Iterator[Callable[[Callable[[Place], Any]], Any]]:
    """became(scenario) is what the scenario returned, once it has."""
    pool = concurrent.futures.ThreadPoolExecutor(2)
    scenarios = (golden, broken, moved, tutorial, pair, text, wild, refused)
    futures = {scenario: pool.submit(scenario, place) for scenario in scenarios}
    try:
        yield lambda scenario: futures[scenario].result()
    finally:
        pool.shutdown(cancel_futures=True)


def test_a_run_directory_holds_what_was_promised(place, became):
    first, folder = became(golden)[0], place.runs / "golden"
    assert (first.code, first.err) == (0, "") and "Done: 24 steps" in first.out
    names = {"run.json", "env.json", "lock", "metrics.jsonl", "events.jsonl", "tb", "checkpoints", "processes"}
    assert {path.name for path in folder.iterdir()} == names
    assert Checkpoints(folder / "checkpoints").steps() == [20, 24]  # the newest two
    assert next((folder / "tb").iterdir()).name.startswith("events.out.tfevents")
    assert kinds(folder) == ["start", *["save"] * 6, "finish"]
    lines = metrics(folder)
    first, *others = (list(line) for line in lines if "loss" in line)
    assert others == [METRICS] * (STEPS - 1) and first == [*METRICS[:-1], "compiled", METRICS[-1]]
    assert [list(line) for line in lines if "loss" not in line] == [EVALUATION] * 3
    assert [line["step"] for line in lines if "loss" not in line] == [8, 16, 24]
    assert [line["tokens"] for line in lines if "loss" in line] == [256 * step for step in range(1, STEPS + 1)]
    assert all(line["mfu"] is None for line in lines if "loss" in line)  # the peak of a CPU is not known
    environment = json.loads((folder / "env.json").read_text())
    assert environment["device_count"] == 4 and environment["mesh"]["data"] == 4 and environment["processes"] == 1
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= environment["versions"].keys()


def test_a_finished_run_says_so_and_changes_no_file(became):
    again = became(golden)[1]
    assert (again.code, again.err) == (0, "") and "Run golden is finished: 24 steps" in again.out


def test_run_json_fed_back_computes_the_same_bit_for_bit(place, became):
    done = became(golden)[2]
    assert (done.code, done.err) == (0, "")
    assert curve(place.runs / "other") == curve(place.runs / "golden")
    assert equal(arrays(place.runs / "other"), arrays(place.runs / "golden"))


def test_killed_stopped_and_damaged_a_run_ends_with_the_curve_and_the_weights_of_an_unbroken_one(place, became):
    became(golden), became(broken)
    assert curve(place.runs / "broken") == curve(place.runs / "golden")
    assert curve(place.runs / "lost") == curve(place.runs / "golden")
    assert equal(arrays(place.runs / "broken"), arrays(place.runs / "golden"))
    assert all(path.name.isdecimal() for path in (place.runs / "broken" / "checkpoints").iterdir())


def test_a_run_continues_on_another_mesh_and_on_other_processes(place, became):
    became(golden)
    step, names = became(moved), ("2x4", "one", "two")
    for name in names:
        np.testing.assert_allclose(losses(place.runs / name), losses(place.runs / "golden"), rtol=1e-5)
    at_once = np.array([losses(place.runs / name)[step] for name in names])  # the same state and the same batch
    np.testing.assert_allclose(at_once, at_once[:1].repeat(3, 0), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (8, 1), (1, 1)])
def test_a_checkpoint_is_restored_bit_for_bit_on_any_mesh(place, became, sizes):
    step, (fsdp, tensor) = became(moved), sizes
    run = dataclasses.replace(cli.load(str(place.folder / "synthetic.py")), layout=layouts.fsdp_tp)
    mesh = meshes.device_mesh(Axes(1, 1, fsdp, 1, 1, tensor), jax.devices()[: fsdp * tensor])
    with (program := make(run, mesh, meshes.chip_of(run.mesh, jax.devices()))).context():
        wanted = like(program.abstract_state(), mesh)
        with Checkpoints(place.runs / "4x2" / "checkpoints") as checkpoints:
            state = checkpoints.restore(step, wanted)
    assert equal(jax.tree.map(np.asarray, named(state)), arrays(place.runs / "4x2"))


def test_a_checkpoint_of_another_config_is_refused(place):
    run = cli.load(str(place.folder / "synthetic.py"))
    mesh = meshes.device_mesh(Axes(1, 1, 1, 1, 1, 1), jax.devices()[:1])
    program = make(run, mesh, meshes.chip_of(run.mesh, jax.devices()))
    facts = dict(config=fingerprint(dataclasses.replace(run, clip=2.0)))
    checkpoints = types.SimpleNamespace(newest_verified=lambda: 6, facts=lambda step: facts)
    ledger = types.SimpleNamespace(checkpoints=checkpoints, records=None)
    with pytest.raises(Refused, match=r"checkpoint 6 .* another config .* --name") as refusal:
        restore(program, types.SimpleNamespace(fingerprint="same"), ledger)
    assert refusal.value.code == 65


def test_two_processes_stop_together_and_compute_what_one_does(place, became):
    became(golden), became(pair)
    both = [place.runs / name for name in ("pair", "golden")]
    np.testing.assert_allclose(*map(losses, both), rtol=1e-6)
    evaluated = [[(line["step"], line["eval_loss"]) for line in metrics(f) if "eval_loss" in line] for f in both]
    np.testing.assert_allclose(*evaluated, rtol=1e-6)


def test_a_run_on_text_measures_bits_per_byte_and_keeps_samples(place, became):
    done, folder = became(text), place.runs / "text"
    assert (done.code, done.err) == (0, "") and "bits per byte" in done.out
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["10.json", "20.json", "24.json"]
    samples = json.loads((folder / "samples" / "24.json").read_text())
    assert [sample["prompt"] for sample in samples] == ["a quick", "the lazy"] and all(s["text"] for s in samples)
    evaluations = [line for line in metrics(folder) if "eval_loss" in line]
    assert [list(line) for line in evaluations] == [
        ["step", "eval_loss", "bits_per_byte", "eval_targets", "elapsed"]
    ] * 3
    assert (folder / "tokenizer.json").is_file()


def test_prompts_that_a_stop_left_uncompleted_are_completed_after_the_restart(place, became):
    became(text)
    before, folder = place.runs / "text", place.folder / "elsewhere" / "text"
    shutil.copytree(before, folder)
    shutil.rmtree(folder / "checkpoints" / "24")
    events = [line for line in (folder / "events.jsonl").read_text().splitlines() if '"finish"' not in line]
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in events))
    (folder / "samples" / "20.json").unlink()
    line = ("train", "text.py", "--runs", "elsewhere", "--processes.devices", "1", "--sample-every", "10")
    assert place.run(*line).code == 0
    texts = [(path / "samples" / "20.json").read_text() for path in (before, folder)]
    assert texts[0] == texts[1]


def test_a_loss_that_is_not_finite_ends_the_run_before_its_step_is_saved(place, became):
    done, folder = became(wild), place.runs / "wild"
    bad = metrics(folder)[-1]
    assert done.code == 70, done
    assert not np.isfinite([bad["loss"], bad["grad_norm"]]).all()
    assert done.err.startswith(f"llmjax: step {bad['step']}: the loss is ") and done.err.count("\n") == 1
    assert "so training stopped and this step was not saved (rows " in done.err and "--guard.policy skip" in done.err
    assert Checkpoints(folder / "checkpoints").latest() == bad["step"] - 1
    assert kinds(folder)[-1] == "fault"


def test_a_launch_passes_on_what_its_processes_refuse(became):
    done = became(refused)
    assert done.code == 65 and done.err.count("nowhere") == 1 and "Traceback" not in done.err + done.out


def test_the_tutorial_s_network_has_the_same_weights_on_any_devices(place, became):
    assert [(done.code, done.err) for done in became(tutorial)] == [(0, "")] * 4
    one = arrays(place.runs / "mlp1")
    assert {name for name in one if name.startswith("model")} == {
        f"model.{layer}.{part}" for layer in ("hidden", "out") for part in ("kernel", "bias")
    }
    for other in ("mlp2", "mlp4", "mlp_pair"):
        for name, array in arrays(place.runs / other).items():
            np.testing.assert_allclose(array, one[name], rtol=1e-6, atol=1e-6, err_msg=f"{other} {name}")
