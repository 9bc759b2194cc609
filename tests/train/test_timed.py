"""A checkpoint by the clock comes at a step that all processes find, after few looks at the clock."""

import pytest

from llmjax.train.timed import Timed


@pytest.mark.parametrize("seconds", [0.1, 1.0, 7.0, 1000.0])
def test_a_checkpoint_is_due_soon_after_the_time_has_passed(seconds):
    now, looks, saves = 0.0, 0, []
    timed = Timed(60.0, 0, lambda: now)
    for step in range(1, 2000):
        now += seconds
        looks += timed.looks(step)
        if timed.due(step):
            saves.append(now)
            timed.saved(step)
    gaps = [b - a for a, b in zip([0.0, *saves], saves, strict=False)]
    assert all(60 <= gap <= 60 + 2 * seconds for gap in gaps) and saves
    assert looks <= len(saves) * 12 + 12


def test_a_process_with_another_clock_looks_at_the_same_steps_and_does_as_the_first_says(monkeypatch):
    def decisions(pace, said):
        now = 0.0
        timed = Timed(60.0, 5, lambda: now)

        def agree(mine):
            said.append(mine)
            return said[-1]

        def follow(mine):
            return said.pop(0)

        monkeypatch.setattr("llmjax.processes.agree", agree if pace == 1.0 else follow)
        found = []
        for step in range(6, 400):
            now += pace
            if timed.due(step):
                found.append(step)
                timed.saved(step)
        return found

    said: list[int] = []
    first = decisions(1.0, said)
    assert first and decisions(17.0, said) == first and said == []


def test_without_minutes_nobody_looks():
    timed = Timed(0.0, 0, lambda: 1e9)
    assert not any(timed.looks(step) or timed.due(step) for step in range(100))
