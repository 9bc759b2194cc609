"""A small real run on conversations: the model learns to answer, and nothing else of what it reads."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from place import curve
from tuned import MODEL, StopAfter

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.commands.imports import laid_out
from llmjax.commands.train import train
from llmjax.data import chat
from llmjax.data.conversations import Chat
from llmjax.mesh import Axes
from llmjax.models import nn
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.run import Run
from llmjax.train.display import Display
from llmjax.train.loss import NextToken, cross_entropy
from llmjax.train.resume import read_weights
from meshes import cpu8


def talk(n: int) -> dict:
    """A number nobody can foresee, and a letter, of which three are the answer."""
    draw = random.Random(n)
    letter, number = draw.choice("abcdefgh"), draw.randrange(10**6)
    said = [dict(role="user", content=f"{number:06} {letter}"), dict(role="assistant", content=letter * 3)]
    return dict(messages=said)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("sft")
    (folder / "talk.jsonl").write_text("".join(json.dumps(talk(n)) + "\n" for n in range(600)))
    run = Run(
        model=MODEL, data=Chat(str(folder / "talk.jsonl")), optimizer=AdamW(lr=1e-2, schedule=Constant()),
        loss=NextToken(), mesh=cpu8.cluster, layout=layouts.fsdp, steps=50, batch=16, sequence=128, accumulate=1,
        dtype="float32", save_every=25, name="whole", runs=str(folder / "runs"),
    )  # fmt: skip
    assert train(run, display=Display(quiet=True)) == 0
    return run


def rows_of(run: Run, split: str, count: int) -> dict[str, np.ndarray]:
    dataset = run.data.open(run.sequence, run.folder().parent / ".cache" / "data")
    return dataset.examples(split, np.arange(count))


def nats(run: Run, step: int) -> dict[str, float]:
    """Mean loss over held-out rows of the assistant's words, and of the users' numbers."""
    program, rows = laid_out(run, "local", "dp"), rows_of(run, "heldout", 8)
    with program.context(), Checkpoints(run.folder() / "checkpoints") as checkpoints:
        model = program.init(jax.random.key(run.seed)).model if not step else read_weights(program, checkpoints, step)
        of = jax.jit(lambda model, batch: cross_entropy(model(batch["tokens"], batch["segments"]), batch["targets"])[0])
        found = np.asarray(of(model, jax.tree.map(jnp.asarray, rows)))
    digits = (rows["targets"] >= ord("0")) & (rows["targets"] <= ord("9")) & (rows["weights"] == 0)
    return dict(answer=found[rows["weights"] > 0].mean(), number=found[digits].mean())


def test_answers_are_learnt_and_prompts_are_not(trained):
    before, after = nats(trained, 0), nats(trained, 50)
    assert after["answer"] < 0.2 < before["answer"] / 10
    assert after["number"] > before["number"] - 0.5  # what it was not trained on it knows no better


def test_a_run_that_was_stopped_has_the_curve_of_one_that_was_not(trained):
    stopped = dataclasses.replace(trained, name="stopped")
    assert train(stopped, notice=StopAfter(30), display=Display(quiet=True)) == 75
    assert train(stopped, display=Display(quiet=True)) == 0
    assert curve(stopped.folder()) == curve(trained.folder())


def test_the_run_directory_has_the_template_that_its_answers_are_asked_with(trained):
    found = chat.load(trained.folder())
    said = chat.render(found, talk(0)["messages"], prompt=False)
    assert said.endswith("<|endoftext|>\n") and found.own


def test_a_conversation_in_a_row_is_alone(trained):
    """Its logits do not change when those beside it do."""
    row = rows_of(trained, "train", 1)
    other = dict(row, tokens=np.where(row["segments"] == 0, (row["tokens"] + 1) % 250, row["tokens"]).astype(np.int32))
    one = meshes.device_mesh(Axes(**dict.fromkeys(meshes.AXES, 1)), jax.devices()[:1])
    with nn.compute(nn.Compute()), jax.set_mesh(one):
        model = MODEL.init(jax.random.key(0))
        of = jax.jit(lambda batch: model(batch["tokens"], batch["segments"]))
        a, b = (np.asarray(of(jax.tree.map(jnp.asarray, each))) for each in (row, other))
    beside = row["segments"][0] == 1
    assert beside.any() and np.array_equal(a[0, beside], b[0, beside]) and not np.array_equal(a, b)
