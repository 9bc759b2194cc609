"""The main experiments keep to their contracts, and a breach is named with its module, axis and source."""

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from llmjax import layout as layouts
from llmjax.errors import DATA, Refused
from llmjax.plan import compiled, contract
from llmjax.plan.contract import Contract, Term
from llmjax.train.program import resolve
from meshes import cpu8

KEPT = Path(__file__).parent / "contracts"
ON_CPU = [("stdlib_tiny", "fsdp_tp"), ("stdlib_tiny", "fsdp_tp_sp"), ("stdlib_moe", "fsdp_ep")]
ON_TPU = ["llama3_8b_v5p_64"]


@pytest.mark.parametrize(("experiment", "layout"), ON_CPU)
def test_an_experiment_keeps_to_its_contract(experiment, layout):
    run = importlib.import_module(f"experiments.{experiment}").run
    run = dataclasses.replace(run, mesh=cpu8.cluster, layout=layouts.preset(layout), name=experiment)
    made = contract.of(compiled.report(run, resolve(run, 8)), run)
    assert len(made.terms) > 5
    assert contract.check(KEPT / f"{experiment}_cpu8_{layout}.json", made) == []


def sends(*terms: Term, arguments: int = 100) -> Contract:
    return Contract(terms, {"arguments": arguments}, {"experiment": "x"})


GATHER = Term("all-gather", ("fsdp",), "mlp", 4, 16_000, ("jit(train_step)/block/mlp/reshard",))
SUM = Term("all-reduce", ("data", "fsdp"), "attention", 4, 16_000, ("jit(train_step)/block/attention/dot",))
AGREED = sends(GATHER)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the TPU compiler is not installed")
@pytest.mark.parametrize("experiment", ON_TPU)
def test_an_experiment_keeps_to_its_contract_on_tpus(experiment):
    run = importlib.import_module(f"experiments.{experiment}").run
    made = contract.of(compiled.report(run, resolve(run, run.mesh.chips)), run)
    assert contract.check(KEPT / f"{experiment}.json", made) == []


@pytest.fixture
def file(tmp_path) -> Path:
    contract.write(tmp_path / "contract.json", AGREED)
    return tmp_path / "contract.json"


def test_a_contract_is_read_as_it_was_written_without_sources(file):
    terms = tuple(dataclasses.replace(term, sources=()) for term in AGREED.terms)
    assert contract.read(file) == Contract(terms, AGREED.memory, AGREED.about)
    assert contract.check(file, AGREED) == []


def test_a_message_that_was_not_agreed_is_named_with_module_axis_and_source(file):
    [departure] = contract.check(file, sends(GATHER, SUM))
    assert departure == (
        "all-reduce over data x fsdp for attention: 4 runs of 16,000 bytes in a step are new; "
        "from jit(train_step)/block/attention/dot"
    )


def test_another_compiler_may_join_messages_of_modules_but_send_no_more(tmp_path):
    parts = [dataclasses.replace(GATHER, module=module) for module in ("attention", "mlp")]
    whole = dataclasses.replace(GATHER, module="block", bytes=32_000)
    old = dataclasses.replace(sends(*parts), about={"compiler": "jax 1"})
    contract.write(tmp_path / "old.json", old)
    new = dataclasses.replace(sends(whole), about={"compiler": "jax 2"})
    assert contract.check(tmp_path / "old.json", new) == []
    more = dataclasses.replace(new, terms=(dataclasses.replace(whole, bytes=64_000),))
    [departure] = contract.check(tmp_path / "old.json", more)
    assert departure.startswith("all-gather over fsdp for all modules: 64,000 bytes in a step, 100% more")


def test_more_bytes_than_the_tolerance_are_a_departure_and_fewer_are_none(file):
    def gathers(size):
        return sends(dataclasses.replace(GATHER, bytes=size))

    assert contract.check(file, gathers(16_800), 0.05) == []
    assert contract.check(file, gathers(8_000), 0.05) == [] == contract.check(file, sends())
    [departure] = contract.check(file, gathers(16_960), 0.05)
    assert departure.startswith("all-gather over fsdp for mlp: 16,960 bytes in a step, 6% more than 16,000; from jit")


def test_more_memory_is_a_departure(file):
    [departure] = contract.check(file, sends(GATHER, arguments=120), 0.1)
    assert departure == "memory for arguments: 120 bytes on a device, 20% more than 100"


def test_a_source_is_told_without_the_folders_of_a_machine():
    assert contract.short("jit(f)/dot at /home/me/llmjax/models/nn.py:74") == "jit(f)/dot at llmjax/models/nn.py:74"
    assert len(contract.short("x" * 1000)) < 200


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
