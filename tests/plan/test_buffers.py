"""The largest buffers of a program are found, and what a compiler says when it refuses is read."""

from pathlib import Path

import pytest

from llmjax.plan import buffers, hlo

FOLDER = Path(__file__).parent / "hlo"


def test_a_buffer_lives_from_its_instruction_to_its_last_use():
    module = hlo.parse("""HloModule a, is_scheduled=true

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0), metadata={op_name="state.model.scale"}
  %a = f32[64]{0} broadcast(%p), metadata={op_name="jit(f)/a"}
  %b = f32[64]{0} negate(%a), metadata={op_name="jit(f)/b"}
  %c = f32[64]{0} negate(%b), metadata={op_name="jit(f)/c"}
  ROOT %r = f32[16]{0} slice(%c), metadata={op_name="jit(f)/r"}
}
""")
    found = {buffer.operation: buffer for buffer in buffers.largest(module)}
    assert set(found) == {"state.model.scale", "jit(f)/a", "jit(f)/b"}
    assert found["state.model.scale"].what == "parameter" and found["jit(f)/a"].bytes == 256


def test_a_loop_shares_what_it_is_given_and_adds_what_its_body_makes():
    [weights, *_] = buffers.largest(hlo.parse((FOLDER / "v5p.txt").read_text()))
    assert (weights.operation, weights.shape, weights.count) == ("w", "f32[5,512,2048]", 1)
    found = buffers.largest(hlo.parse((FOLDER / "v5p.txt").read_text()))
    assert {"f32[5,512,2048]", "bf16[5,1024,2048]"} == {b.shape for b in found if b.bytes == 20 * 2**20}


@pytest.mark.parametrize("kind, size", [
    ("bf16[8,128]{1,0:T(8,128)(2,1)}", 8 * 128 * 2), ("bf16[8,64]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
    ("f32[3,5]{0,1:T(8,128)}", 128 * 8 * 4), ("f32[3,5]{1,0}", 60), ("f32[8,128]{1,0:T(8,128)S(1)}", 0),
    ("(f32[128]{0:T(128)}, s32[]{:T(128)})", 516), ("pred[16]{0}", 16),
])  # fmt: skip
def test_bytes_are_those_of_whole_tiles_in_main_memory(kind, size):
    assert buffers.padded(kind) == size


REFUSED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(train_step)/block/attention/scores/dot_general" source_file="attention.py" source_line=60
     Shape: f32[8,8,4096,4096]{3,2,1,0:T(8,128)}
     Unpadded size: 4.00G
     XLA label: fusion.1 = fusion(...)
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Operator: op_name="state.model.blocks.up_DF.value"
     Shape: f32[32,64,14336]{2,1,0:T(8,128)}
"""  # noqa: E501


def test_a_refusal_names_what_is_needed_and_the_buffers():
    said = buffers.refusal(REFUSED)
    assert said.needed == 20.5 * 2**30 and said.capacity == 15.75 * 2**30
    assert said.sentence == "the compiler needs 20.50G of 15.75G of memory"
    first, second = said.buffers
    assert (first.bytes, first.shape, first.what) == (4 * 2**30, "f32[8,8,4096,4096]", "temporary")
    assert first.operation.endswith("scores/dot_general") and first.source == "attention.py:60"
    assert (second.bytes, second.what) == (512 * 2**20, "parameter")


def test_a_refusal_before_the_buffers_are_laid_out_is_read_as_well():
    said = buffers.refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (24.66G) exceeds "
        "available HBM (15.75G)."
    )
    assert said.needed == round(24.66 * 2**30) and said.capacity == 15.75 * 2**30 and said.buffers == ()


def test_a_refusal_that_is_not_understood_is_one_line():
    assert buffers.refusal("INTERNAL: no\n  at a.cc:1") == buffers.Refusal(0, 0, "INTERNAL: no", ())
