"""Records survive a kill, and a resumed run leaves no step twice."""

import json

from llmjax.trackers.tensorboard import TensorBoard
from llmjax.train.records import Records, read


def test_lines_come_back_and_what_comes_after_the_resumed_step_is_dropped(tmp_path):
    with Records(tmp_path, [TensorBoard()]) as records:
        for step in range(1, 6):
            records.metrics(dict(step=step, loss=1 / 3 / step, mfu=None))
        records.event("save", step=3)
    with Records(tmp_path) as records:
        records.rewind(3)
        records.metrics(dict(step=4, loss=9.0))
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == 1 / 3 and lines[-1]["loss"] == 9.0  # every digit
    assert [e["kind"] for e in read(tmp_path / "events.jsonl")] == ["save"]
    assert list((tmp_path / "tb").iterdir())


def test_an_evaluation_at_the_end_that_will_be_done_again_is_dropped(tmp_path):
    with Records(tmp_path) as records:
        for step in (1, 2):
            records.metrics(dict(step=step, loss=1.0))
            records.metrics(dict(step=step, eval_loss=2.0))
        records.rewind(2, 2)
    assert read(tmp_path / "metrics.jsonl") == [
        dict(step=1, loss=1.0), dict(step=1, eval_loss=2.0), dict(step=2, loss=1.0)
    ]  # fmt: skip


def test_half_a_line_left_by_a_kill_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(dict(step=1)) + '\n{"step": 2, "lo')
    assert read(path) == [dict(step=1)]
    with Records(tmp_path) as records:
        records.metrics(dict(step=2, loss=1.0))
    assert read(path) == [dict(step=1), dict(step=2, loss=1.0)]


def test_no_file_has_no_lines(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []
