"""Compiled programs are read as compilers print them: those of TPUs from files, those of a CPU as compiled here."""

import collections
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llmjax.plan import hlo
from llmjax.plan.hlo import Array

FOLDER = Path(__file__).parent / "hlo"
FILES = sorted(path.stem for path in FOLDER.glob("*.txt"))
# Five layers. Between slices the compiler takes one turn out of the loop, to speak while the next one computes.
LOOPS = {"v5p": [5, 5], "v6e": [5, 5], "v5e_overlap": [5, 5], "v5e_two_slices": [5, 4]}


def text(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", FILES)
def test_every_line_of_a_computation_is_an_instruction_with_its_operands(name):
    module = hlo.parse(text(name))
    lines = [line for line in text(name).splitlines() if re.match(r"  (ROOT )?%?[\w.\-]+ = ", line)]
    assert sum(len(inside) for inside in module.computations.values()) == len(lines) > 0
    for computation, inside in module.computations.items():
        assert module.roots[computation] in inside
        for x in inside.values():
            known = x.opcode in ("constant", "parameter") or all(name in inside for name in x.operands)
            assert known and all(called in module.computations for called in x.called()), x


@pytest.mark.parametrize("name", LOOPS)
def test_the_turns_of_a_tpus_loops_follow_from_their_conditions(name):
    module = hlo.parse(text(name))
    assert "known_trip_count" not in text(name)
    loops = [(r.computation, r.instruction) for r in hlo.walk(module) if r.instruction.opcode == "while"]
    assert [hlo.turns(module, computation, loop, {}) for computation, loop in loops] == LOOPS[name]


@pytest.mark.parametrize("name", FILES)
def test_products_carry_the_compilers_cycles_and_where_they_were_traced(name):
    module = hlo.parse(text(name))
    ran = collections.Counter()
    for r in hlo.walk(module):
        if r.instruction.cycles():
            ran[r.computation] += r.count
            assert r.instruction.cycles() > 0
    assert ran[module.entry] > 0
    places = {module.place(x) for inside in module.computations.values() for x in inside.values()}
    assert any(re.fullmatch(r"excerpt\.py:\d+", place) for place in places)


def test_types_with_tiles_and_memories_are_read():
    line = "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}, s32[<=4,2]{1,0}, token[])"
    assert hlo.arrays_of(line)[:3] == (Array("bf16", (8, 128)), Array("f32", ()), Array("s32", (4, 2)))
    assert hlo.arrays_of(line)[0].bytes == 2048


def test_what_is_inside_a_fusion_runs_in_the_order_of_what_holds_it():
    module = hlo.parse(text("v5e_overlap"))
    fused = [r for r in hlo.walk(module) if r.instruction.opcode == "all-gather"]
    bodies = {r.instruction.attribute("body") for r in hlo.walk(module) if r.instruction.opcode == "while"}
    assert fused and all(r.schedule in bodies and r.count == 5 for r in fused)
    assert any(r.computation != r.schedule for r in fused)


def test_an_instruction_without_a_name_has_the_origin_of_what_uses_it():
    module = hlo.parse("""HloModule a

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0), metadata={op_name="state.model.scale"}
  %a = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  %b = f32[4]{0} copy(%a)
  ROOT %c = f32[4]{0} negate(%b), metadata={op_name="jit(f)/mlp/neg"}
}
""")
    main = module.computations["main"]
    assert hlo.origin(module, "main", main["a"]) == "jit(f)/mlp/neg"
    assert hlo.origin(module, "main", main["p"]) == "state.model.scale"


def test_a_cpus_program_is_read_the_same_way():
    def f(x):
        with jax.named_scope("mlp"):
            return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=7)[0]

    module = hlo.parse(jax.jit(f).lower(jnp.zeros((8, 8))).compile().as_text())
    sines = [r for r in hlo.walk(module) if r.instruction.opcode == "sine"]
    assert sines and all(r.count == 7 and "mlp" in r.instruction.operation() for r in sines)
    assert all(r.instruction.cycles() is None for r in sines)
    assert any("test_hlo.py" in module.place(r.instruction) for r in sines)
