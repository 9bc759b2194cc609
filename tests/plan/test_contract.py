"""The main experiments keep to their contracts, and a breach is named with its module, axis and source."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import pytest

from llmjax import layout as layouts
from llmjax.errors import DATA, Refused
from llmjax.plan import contract
from llmjax.plan.collectives import Collective
from llmjax.plan.contract import Contract
from llmjax.plan.hlo import Array
from llmjax.train.program import resolve
from meshes import cpu8

KEPT = Path(__file__).parent / "contracts"
ON_CPU = [("stdlib_tiny", "fsdp_tp"), ("stdlib_tiny", "fsdp_tp_sp"), ("stdlib_moe", "fsdp_ep")]


@pytest.mark.parametrize(("experiment", "layout"), ON_CPU)
def test_an_experiment_keeps_to_its_contract(experiment, layout):
    run = importlib.import_module(f"experiments.{experiment}").run
    run = dataclasses.replace(run, mesh=cpu8.cluster, layout=layouts.preset(layout), name=experiment)
    made = contract.emulated(run, resolve(run, 8), jax.devices())
    assert len(made.terms) > 5
    assert contract.check(KEPT / f"{experiment}_cpu8_{layout}.json", made) == []


def collective(kind="all-gather", axes=("fsdp",), numbers=1000, count=4, source="jit(train_step)/block/mlp/reshard"):
    return Collective(kind, axes, 8, (Array("f32", (numbers,)),), count, source, "", "main")


AGREED = contract.of([collective(), collective(axes=("tensor",), source="x/block/attention/y")], {"arguments": 100})


@pytest.fixture
def file(tmp_path) -> Path:
    contract.write(tmp_path / "contract.json", AGREED)
    return tmp_path / "contract.json"


def test_a_contract_is_read_as_it_was_written_without_sources(file):
    terms = tuple(dataclasses.replace(term, sources=()) for term in AGREED.terms)
    assert contract.read(file) == Contract(terms, AGREED.memory, AGREED.about)
    assert contract.check(file, AGREED) == []


def test_a_message_that_was_not_agreed_is_named_with_module_axis_and_source(file):
    source = "jit(train_step)/block/attention/dot at /home/me/llmjax/models/nn.py:74"
    made = contract.of([collective(), collective("all-reduce", ("tensor",), source=source)], {"arguments": 100})
    [departure] = contract.check(file, made)
    assert departure == (
        "all-reduce over tensor for attention: 4 runs of 16,000 bytes in a step are new; "
        "from jit(train_step)/block/attention/dot at llmjax/models/nn.py:74"
    )


def test_more_bytes_than_the_tolerance_are_a_departure_and_fewer_are_none(file):
    def sends(numbers):
        return contract.of([collective(numbers=numbers)], {"arguments": 100})

    assert contract.check(file, sends(1050), 0.05) == []
    assert contract.check(file, sends(500), 0.05) == []
    [departure] = contract.check(file, sends(1060), 0.05)
    assert departure.startswith("all-gather over fsdp for mlp: 16,960 bytes in a step, 6% more than 16,000; from jit")


def test_more_memory_is_a_departure(file):
    [departure] = contract.check(file, dataclasses.replace(AGREED, memory={"arguments": 120, "unknown": 9}), 0.1)
    assert departure == "memory for arguments: 120 bytes on a device, 20% more than 100"


def test_sums_of_single_numbers_are_no_terms():
    assert contract.of([collective(numbers=2)], {}).terms == ()


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("jit(train_step)/while/body/jvp()/block/attention/reshard at llmjax/models/nn.py:79", "attention"),
        ("jit(train_step)/transpose(jvp())/block/mlp/experts/add", "mlp"),
        (
            "jit(train_step)/(reduce_sum:while/block/mlp/BTD,BTF->DF/dot:while/block/attention/dot) at x",
            "attention+mlp",
        ),
        ("jit(train_step)/while/block/(mlp/BTD,BTF->DF/dot:reduce_sum) at x", "mlp"),
        ("jit(train_step)/transpose(jvp(BTV,VD->BTD))/dot_general at llmjax/models/nn.py:74", "head"),
        ("jit(train_step)/jvp()/reduce_max at llmjax/train/loss.py:51", "loss"),
        ("jit(train_step)/reduce_sum at site-packages/optax/tree_utils/_tree_math.py:187", "optimizer"),
        ("jit(train_step)/something", "other"),
    ],
)
def test_an_operation_belongs_to_a_module(source, module):
    assert contract.module(source) == module


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot be read"), ("{", "holds no contract"), ("[]", "holds no contract"),
     (json.dumps({"terms": [{}], "memory": {}, "about": {}}), "holds no contract")],
)  # fmt: skip
def test_a_file_that_holds_no_contract_is_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(Refused, match=words) as refusal:
        contract.check(tmp_path / "x.json", AGREED)
    assert refusal.value.code == DATA
