"""A run is one value: it survives run.json, is compared field by field, and is refused in words where it cannot be."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

import experiments
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax import run as runs
from llmjax.checks import check
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.layout import Pipeline
from llmjax.mesh import Axes
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.optim.adamw import AdamW
from llmjax.run import Remat, Run, differences, from_json, to_json
from llmjax.train.loss import NextToken
from llmjax.train.routed import RoutedNextToken
from meshes import cpu8

EXPERIMENTS = sorted(path.stem for path in Path(experiments.__path__[0]).glob("*.py") if path.stem != "__init__")
TINY = Run(
    model=Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16),
    data=Synthetic(vocab=64),
    optimizer=AdamW(),
    loss=NextToken(),
    mesh=cpu8.cluster,
    axes=Axes(fsdp=4, tensor=2),
    layout=layouts.fsdp_tp_sp,
    batch=8,
    sequence=16,
    name="tiny",
)
STAGED = dict(layout=layouts.fsdp | layouts.pp, axes=Axes(stage=4, fsdp=2), model__layers=8, batch=16)

MIXTURE = dataclasses.replace(
    TINY,
    model=Mixtral(vocab=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16, experts=4),
    loss=RoutedNextToken(),
    axes=Axes(data=2, expert=4),
    layout=layouts.ep,
)


def changed(run: Run, **fields) -> Run:
    """The run with other values; `model__heads=3` changes a field of its model."""
    for path, value in fields.items():
        part, _, field = path.partition("__")
        value = dataclasses.replace(getattr(run, part), **{field: value}) if field else value
        run = dataclasses.replace(run, **{part: value})
    return run


def checked(run: Run) -> None:
    layout = run.layout
    axes = meshes.fill(run.axes, 8, used=layout.axes(), rest=layout.rest(), tensor=run.mesh.tensor)
    check(run, axes, max(run.accumulate, 1))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_feeding_run_json_back_gives_the_same_run(name):
    run = importlib.import_module(f"experiments.{name}").run
    assert from_json(json.loads(json.dumps(to_json(run)))) == run


def test_run_json_is_read_from_its_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_json(changed(TINY, prompts=("déf", "class")))), encoding="utf-8")
    assert runs.read(path) == changed(TINY, prompts=("déf", "class"))


def test_a_value_that_json_cannot_hold_is_refused_before_it_is_written():
    with pytest.raises(Refused, match=r"a run holds <object object.*use dataclasses, numbers and strings"):
        to_json(changed(TINY, data=object()))


@pytest.mark.parametrize(
    ("text", "words", "code"),
    [
        ("{", "is not JSON", 65),
        ("[]", "does not hold a run", 65),
        ('{"is": "llmjax.mesh:Axes"}', "does not hold a run", 65),
        ('{"is": "llmjax.run:Run"}', "no whole Run", 65),
        ('{"is": "llmjax.run:Run", "stpes": 3}', "fields that Run lacks (stpes)", 65),
        ('{"is": "llmjax.run:read"}', "not a dataclass", 65),
        ('{"is": "os:system"}', "os:system, which is posix:system", 65),
        ('{"is": "llmjax.commands.train:subprocess.run"}', "which is subprocess:run", 65),
        ('{"is": "function", "name": "os:system"}', "cannot be imported here", 65),
        ('{"is": "function", "name": "llmjax.commands.train:subprocess.run"}', "which is subprocess:run", 65),
        ('{"is": "function", "name": "llmjax.run:Run"}', "not a function", 65),
        ('{"is": 7}', "cannot be imported here", 65),
        ('{"is": "llmjax.run:"}', "cannot be imported here", 65),
        ("[" * 100_000, "nested too deeply", 65),
        ('{"is": "no_such_module:Model"}', "cannot be imported here", 65),
        (b"\xff\xfe", "is not JSON", 65),
        (None, "cannot be read (No such file or directory)", 2),
    ],
)
def test_a_run_json_that_is_no_run_is_refused(text, words, code, tmp_path):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Refused) as refusal:
        runs.read(path)
    assert words in str(refusal.value) and refusal.value.code == code


def test_differences_are_named_by_their_dotted_fields():
    other = changed(TINY, seed=1, model__heads=8, axes=Axes(fsdp=8))
    assert differences(to_json(TINY), to_json(TINY)) == []
    assert differences(to_json(TINY), to_json(other)) == ["model.heads", "axes.fsdp", "axes.tensor", "seed"]


def test_another_class_or_a_missing_field_is_a_difference():
    gpt2 = differences(to_json(TINY.model), to_json(GPT2()))
    assert "is" in gpt2 and "kv_heads" in gpt2
    assert differences({"a": 1}, {"b": 2}) == ["a", "b"]
    assert differences({"a": None}, {}) == []


def test_the_remat_of_an_older_version_is_todays_policy():
    assert from_json(to_json(TINY) | {"remat": "dots"}).remat == Remat("dots")


def test_a_field_that_an_older_version_did_not_write_has_its_default():
    older, now = to_json(TINY), to_json(TINY)
    for path in (("seed",), ("local",), ("optimizer", "moments"), ("optimizer", "schedule", "final")):
        *outer, name = path
        place = older
        for part in outer:
            place = place[part]
        place.pop(name)
    assert differences(older, now) == differences(now, older) == []
    other = to_json(
        dataclasses.replace(TINY, seed=1, optimizer=dataclasses.replace(TINY.optimizer, moments="bfloat16"))
    )
    assert set(differences(older, other)) == {"optimizer.moments", "seed"}


def test_what_may_change_between_two_starts_are_fields_of_a_run():
    assert {field.name for field in dataclasses.fields(Run)} >= runs.FREE
    moved = changed(TINY, **dict.fromkeys(runs.FREE), name="other")
    assert runs.fingerprint(moved) == runs.fingerprint(TINY)
    for other in (dict(seed=1), dict(model__ff=128), dict(optimizer__lr=1e-5), dict(data__vocab=63)):
        assert runs.fingerprint(changed(TINY, **other)) != runs.fingerprint(TINY)
    assert not runs.FREE & {"model", "data", "optimizer", "loss", "steps", "batch", "sequence", "dtype", "clip", "seed"}


def test_a_run_that_fits_is_not_refused():
    for layout in map(layouts.preset, (*layouts.KINDS, "fsdp_tp_sp")):
        checked(changed(TINY, layout=layout, axes=Axes()))
        checked(changed(MIXTURE, layout=layout, axes=Axes()))


@pytest.mark.parametrize(
    ("wrong", "words", "remedy"),
    [
        (dict(steps=0), "steps is 0: give at least 1", dict(steps=1)),
        (dict(batch=0), "batch is 0: give at least 1", dict(batch=4)),
        (dict(sequence=-1), "sequence is -1: give at least 1", dict(sequence=2)),
        (dict(accumulate=-1), "accumulate is -1: give at least 0", dict(accumulate=0)),
        (dict(clip=-1.0), "clip is -1.0: give at least 0", dict(clip=0.0)),
        (dict(clip=float("nan")), "clip is nan: give at least 0", dict(clip=0.0)),
        (dict(seed=-1), "seed is -1: give at least 0", dict(seed=0)),
        (dict(eval_every=-1), "eval_every is -1: give at least 0", dict(eval_every=0)),
        (dict(eval_rows=0), "eval_rows is 0: give at least 1", dict(eval_rows=1)),
        (dict(save_every=-5), "save_every is -5: give at least 0", dict(save_every=0)),
        (dict(keep=0), "keep is 0: give at least 1", dict(keep=1)),
        (dict(keep_every=-1), "keep_every is -1: give at least 0", dict(keep_every=4)),
        (dict(save_minutes=-1), "save_minutes is -1: give at least 0", dict(save_minutes=5)),
        (dict(keep_best=1), "keep_best is 1, but no step both", dict(keep_best=1, eval_every=8, save_every=8)),
        (dict(prompts=("def ", "")), "prompts holds an empty text", dict(prompts=())),
        (dict(batch=6), "batch is 6, which fsdp 4 does not divide: use batch 8", dict(batch=8)),
        (dict(batch=2), "batch is 2, which fsdp 4 does not divide: use batch 4", dict(batch=4)),
        (dict(batch=8, accumulate=4), "fsdp 4 x accumulate 4 = 16 does not divide: use batch 16", dict(batch=16)),
        (dict(batch=8, accumulate=4), "or other axes or accumulation", dict(accumulate=2)),
        (dict(axes=Axes(data=2, fsdp=2), batch=6), "data 2 x fsdp 2 = 4 does not divide: use batch 8", dict(batch=8)),
        (dict(model__heads=3), "model.heads is 3, which axis tensor 2 does not divide", dict(model__heads=6)),
        (dict(model__kv_heads=1), "model.kv_heads is 1, which axis tensor 2 does not divide", dict(model__kv_heads=2)),
        (dict(model__kv_heads=1), "a smaller tensor axis (--axes.tensor)", dict(axes=Axes(fsdp=8, tensor=1))),
        (dict(model__ff=63), "model.ff is 63, which axis tensor 2 does not divide: choose a mul", dict(model__ff=64)),
        (dict(model__vocab=65), "model.vocab is 65, which axis tensor 2 does not divide", dict(model__vocab=66)),
        (dict(model__width=30), "model.width is 30, which axis fsdp 4 does not divide", dict(model__width=32)),
        (dict(sequence=15), "sequence is 15, which axis tensor 2 does not divide", dict(sequence=14)),
        (dict(sequence=32), "longer than the model's 16 positions: lower --sequence", dict(sequence=16)),
        (dict(sequence=32), "or raise --model.positions", dict(model__positions=32)),
        (dict(model__kv_heads=0), "model.kv_heads is 0: give at least 1", dict(model__kv_heads=2)),
        (dict(model__layers=0), "model.layers is 0: give at least 1", dict(model__layers=1)),
        (dict(model__head_dim=0), "model.head_dim is 0: give at least 1", dict(model__head_dim=8)),
        (
            dict(model__heads=6, model__kv_heads=4),
            "model.heads is 6, which model.kv_heads 4 does",
            dict(model__heads=8),
        ),
        (
            dict(pipeline__microbatches=-1),
            "pipeline.microbatches is -1: give at least 0",
            dict(pipeline__microbatches=0),
        ),
        (dict(pipeline__repeats=0), "pipeline.repeats is 0: give at least 1", dict(pipeline__repeats=1)),
        (STAGED | dict(model__layers=6), "model.layers is 6, which stage 4 does not divide", dict(model__layers=8)),
        (STAGED | dict(model__layers=6), "a smaller stage axis (--axes.stage)", dict(axes=Axes(stage=2, fsdp=4))),
        (
            STAGED | dict(pipeline=Pipeline("circular", repeats=3)),
            "model.layers is 8, which stage 4 x pipeline.repeats 3 = 12 does not divide",
            dict(model__layers=12),
        ),
        (
            STAGED | dict(pipeline__microbatches=2),
            "pipeline.microbatches is 2, fewer than the 4 stages to keep busy: give at least 4",
            dict(pipeline__microbatches=4),
        ),
        (
            STAGED | dict(pipeline__microbatches=5),
            "pipeline.microbatches is 5, which does not divide the 8 rows of a device: use batch 20",
            dict(batch=20),
        ),
        (
            STAGED | dict(batch=12, accumulate=2),
            "batch is 12, 3 rows on a device, which cannot be cut into a microbatch for each of 4 stages: use batch 16",
            dict(batch=16),
        ),
        (
            STAGED | dict(model=Synthetic()),
            "axes.stage is 4, but Synthetic has no layers to cut into stages: set it to 1",
            dict(axes=Axes(stage=1)),
        ),
        (
            STAGED | dict(pipeline=Pipeline("1f1b"), loss=AdamW()),
            "pipeline.schedule is 1f1b, which AdamW has no loss of logits for: choose gpipe or circular",
            dict(pipeline=Pipeline("gpipe")),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_cannot_be_is_refused_in_one_sentence_whose_remedy_works(wrong, words, remedy):
    refused(TINY, wrong, words, remedy)


def refused(run: Run, wrong: dict, words: str, remedy: dict) -> None:
    with pytest.raises(Refused) as refusal:
        checked(changed(run, **wrong))
    message = str(refusal.value)
    assert words in message and refusal.value.code == 2
    assert re.fullmatch(r"[^\n]+: [^\n]+\.", message) and not re.search(r"\. [A-Z]", message)
    checked(changed(run, **wrong | remedy))


@pytest.mark.parametrize(
    ("wrong", "words", "remedy"),
    [
        (dict(model__experts=6), "model.experts is 6, which axis expert 4 does not divide", dict(model__experts=8)),
        (dict(model__experts=6), "a smaller expert axis (--axes.expert)", dict(axes=Axes(expert=2))),
        (dict(model__experts=0), "model.experts is 0: give at least 1", dict(model__experts=4)),
        (dict(model__top_k=5), "model.top_k is 5, and there are 4 experts: give 1 to 4", dict(model__top_k=4)),
        (dict(model__top_k=0), "model.top_k is 0, and there are 4 experts: give 1 to 4", dict(model__top_k=1)),
        (dict(model__shared=-1), "model.shared is -1: give the number", dict(model__shared=0)),
        (
            dict(model__capacity=-1.0),
            "model.capacity is -1.0: give a multiple such as 1.25",
            dict(model__capacity=1.25),
        ),
        (dict(model__capacity=float("nan")), "or 0 to drop no token", dict(model__capacity=0.0)),
        (dict(batch=6), "batch is 6, which data 2 x expert 4 = 8 does not divide: use batch 8", dict(batch=8)),
        (dict(model=TINY.model), "but Llama has no experts to keep even: use NextToken", dict(loss=NextToken())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mixture_that_cannot_be_is_refused_in_one_sentence_whose_remedy_works(wrong, words, remedy):
    refused(MIXTURE, wrong, words, remedy)


def test_a_model_without_letters_is_checked_by_its_batch_alone():
    other = changed(TINY, model=Synthetic(), layout=layouts.dp, axes=Axes(), batch=16)
    checked(other)
    with pytest.raises(Refused, match="batch is 12, which data 8 does not divide"):
        checked(changed(other, batch=12))


@pytest.mark.parametrize(
    ("part", "more", "words"),
    [
        ("stream", {"T": "data"}, "cuts two dims of an array BTD over 'data': name an axis for one of B and T"),
        ("inner", {"T": "tensor"}, "cuts two dims of an array BTHK over 'tensor': name an axis for one of T and H"),
        ("params", {"V": "fsdp"}, "cuts two dims of an array VD over 'fsdp': name an axis for one of V and D"),
    ],
)
def test_a_layout_that_names_an_axis_twice_for_one_array_is_refused(part, more, words):
    whole = layouts.fsdp_tp
    twice = dataclasses.replace(whole, name="mine", **{part: dict(getattr(whole, part)) | more})
    with pytest.raises(Refused, match=words):
        checked(changed(TINY, layout=twice))
