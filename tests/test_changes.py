"""Every difference of two runs is told for what it changes, from the fields alone."""

import dataclasses

import pytest

from llmjax import changes
from llmjax import layout as layouts
from llmjax.mesh import Axes
from llmjax.optim.muon import Muon
from llmjax.run import FREE, DiLoCo, Guard, Remat, Run, fingerprint, load, to_json

RUN = load("stdlib_tiny")


def found(**fields):
    return changes.between(to_json(RUN), to_json(dataclasses.replace(RUN, **fields)))


@pytest.mark.parametrize(
    ("fields", "told", "kind"),
    [
        (dict(seed=3), "seed 0 -> 3", "numbers"),
        (dict(batch=16), "batch 8 -> 16", "numbers"),
        (dict(guard=Guard(skip=(7,))), "guard.skip () -> (7)", "numbers"),
        (dict(guard=Guard(policy="skip")), "guard.policy abort -> skip", "steps"),
        (dict(layout=layouts.fsdp_tp), "layout dp -> fsdp_tp", "speed"),
        (dict(axes=Axes(data=2)), "axes.data 0 -> 2", "speed"),
        (dict(remat=Remat("full")), "remat.policy none -> full", "speed"),
        (dict(guard=Guard(replicas=9)), "guard.replicas 0 -> 9", "records"),
        (dict(eval_every=7), "eval_every 200 -> 7", "records"),
    ],
)
def test_a_field_changes_the_numbers_the_speed_or_the_records(fields, told, kind):
    (change,) = found(**fields)
    assert (str(change), change.kind) == (told, kind)


def test_another_class_is_told_by_its_name_and_changes_the_numbers():
    first, *others = found(optimizer=Muon())
    assert str(first) == "optimizer AdamW -> Muon" and {change.kind for change in (first, *others)} == {"numbers"}


def test_workers_of_local_sgd_decide_the_numbers():
    local = dataclasses.replace(RUN, local=DiLoCo(every=5))
    more = dataclasses.replace(local, axes=Axes(data=2))
    (change,) = changes.between(to_json(local), to_json(more))
    assert change.kind == "numbers"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Run)])
def test_a_field_changes_numbers_exactly_where_it_takes_part_in_the_fingerprint(name):
    assert (changes.kind(name) == "numbers") == (name not in FREE | {"name"})


def test_what_only_records_is_free_and_leaves_the_fingerprint():
    tops = {field for field in changes.RECORDS if "." not in field}
    assert tops <= FREE | {"name"}
    assert fingerprint(dataclasses.replace(RUN, eval_every=3, keep=9, prompts=())) == fingerprint(RUN)


def facts(**others):
    how = {name: value for name, value in to_json(RUN).items() if name in FREE}
    return dict(how=how, mesh=dict(data=2, fsdp=1), versions=dict(jax="0.10.2", llmjax="0.1.0"), data="aaaa") | others


def since(facts, run=RUN, axes=(("data", 2), ("fsdp", 1)), versions=(("jax", "0.10.2"),), data="aaaa"):
    return changes.sentences(changes.since(facts, to_json(run), dict(axes), dict(versions), data))


def test_nothing_is_said_of_a_run_that_goes_on_as_it_was():
    assert since(facts()) == []
    assert since({}) == []  # of a version that wrote none of it


def test_what_changed_since_a_checkpoint_is_a_line_for_each_meaning():
    run = dataclasses.replace(RUN, layout=layouts.fsdp, axes=Axes(fsdp=2), keep=5)
    lines = since(facts(), run, (("data", 1), ("fsdp", 2)), (("jax", "0.12.0"),), "bbbb")
    assert lines == [
        "Changed since that checkpoint: data aaaa -> bbbb (another run from here on).",
        "Changed since that checkpoint: layout dp -> fsdp, axes data 2 -> fsdp 2, jax 0.10.2 -> 0.12.0 (same numbers "
        "up to rounding).",
        "Changed since that checkpoint: keep 2 -> 5 (same numbers).",
    ]
