"""G1, C1: where the time went adds up, by hand, after kills, and whatever the clock did."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.errors import Refused
from llmjax.report.goodput import line, of
from llmjax.train.spent import BUCKETS, Spent


def start(began, step, elapsed=3.0):
    return dict(kind="start", time=began + elapsed, elapsed=elapsed, process_began=began, step=step)


def spent(elapsed, **buckets):
    assert abs(sum(buckets.values()) - elapsed) < 1e-9
    return dict(kind="spent", time=0, elapsed=elapsed) | dict.fromkeys(BUCKETS, 0.0) | buckets


def redo(steps, seconds, until, elapsed=2.0):
    return dict(kind="redo", time=0, elapsed=elapsed, steps=steps, seconds=seconds, until=until)


def metric(step, elapsed, ms=1000.0):
    return dict(step=step, loss=1.0, step_ms=ms, data_wait_ms=0.0, elapsed=elapsed)


# A run of steps of one second, saved every 10: 3 s to start, 2 s to restore and 5 s to compile each time, 1 s a save.
# It is killed in step 18 (seven steps after the save of 10 are lost) and in step 35 (four after 30), 60 s apart.
TWICE_KILLED = [
    start(1000.0, 0),
    dict(kind="save", time=0, elapsed=18.0, step=10),
    spent(18.0, start=3.0, compile=5.0, steps=9.0, save=1.0),
    redo(7, 7.0, 25.0),
    start(1000.0 + 25.5 + 60, 10, 5.0),
    spent(30.0, start=3.0, restore=2.0, compile=5.0, steps=18.0, save=2.0),
    redo(4, 4.0, 34.0),
    start(1000.0 + 25.5 + 60 + 34.2 + 60, 30, 5.0),
    spent(31.0, start=3.0, restore=2.0, compile=5.0, steps=19.0, save=2.0),
    dict(kind="finish", time=0, elapsed=31.0, step=50),
]


def test_g1_two_kills_at_known_steps_give_the_goodput_and_the_lost_steps_of_the_hand_value():
    found = of(TWICE_KILLED, [metric(50, 30.0)])
    wall = 25.5 + 60 + 34.2 + 60 + 31
    assert found.wall == pytest.approx(wall, rel=0.01)
    assert found.buckets["lost"] == pytest.approx(7 + 4, rel=0.01) and found.redone == 11
    assert found.buckets["steps"] == pytest.approx(9 + 18 + 19, rel=0.01)
    assert found.share == pytest.approx((9 + 18 + 19) / wall, rel=0.01)
    assert found.buckets["restart"] == pytest.approx(120, rel=0.01) and found.starts == 3
    assert line(found).startswith("Goodput 21.8%; 57.3% between two starts, 7.1% compiling")


def test_g1_a_restart_that_takes_longer_than_the_killed_process_lived_changes_no_kept_step():
    slow = [dict(event) for event in TWICE_KILLED]
    slow[3] |= dict(elapsed=40.0)  # the killed one lived 25.5 s
    slow[4] = start(1000.0 + 25.5 + 60, 10, 45.0)
    slow[5] = spent(70.0, start=3.0, restore=42.0, compile=5.0, steps=18.0, save=2.0)
    slow[6] |= dict(until=74.0)
    slow[7] |= dict(process_began=1000.0 + 25.5 + 60 + 74.2 + 60)
    found = of(slow, [])
    assert found.buckets["steps"] == pytest.approx(9 + 18 + 19, rel=0.01)
    assert found.buckets["lost"] == pytest.approx(7 + 4, rel=0.01)
    assert found.buckets["restart"] == pytest.approx(120, rel=0.01)


def test_what_a_process_takes_back_itself_is_counted_once():
    found = of(
        [
            start(0.0, 0),
            spent(20.0, start=3.0, compile=5.0, steps=12.0),
            dict(kind="rewind", time=0, elapsed=20.5, step=13, window=1),
            redo(4, 4.0, 20.0, 21.0),
            spent(31.0, start=3.0, compile=5.0, restore=1.0, steps=22.0),
        ],
        [],
    )
    assert found.buckets["steps"] == 18 and found.buckets["lost"] == 4 and found.wall == 31


@pytest.mark.parametrize("leap", [-86_400.0, 10 * 365 * 86_400.0])
def test_c1_a_clock_that_leaps_between_two_runs_makes_no_time_negative(leap):
    moved = [e | dict(process_began=e["process_began"] + leap * (i > 4)) if e["kind"] == "start" else e
             for i, e in enumerate(TWICE_KILLED)]  # fmt: skip
    found = of(moved, [])
    assert min(found.buckets.values()) >= 0 and 0 < found.share < 1
    assert found.buckets["restart"] == pytest.approx(60 if leap < 0 else 120 + leap, rel=0.01)
    assert sum(found.buckets.values()) == pytest.approx(found.wall)


def test_a_run_that_is_still_going_counts_the_steps_since_it_last_said_what_it_spent():
    found = of(TWICE_KILLED[:3], [metric(i, i + 8.0) for i in range(1, 21)])
    assert found.wall == pytest.approx(28.0) and found.buckets["steps"] == pytest.approx(9 + 10)


def test_records_of_an_older_version_are_refused_with_the_reason():
    with pytest.raises(Refused, match="older version") as refusal:
        of([dict(kind="start", time=0.0, step=0)], [])
    assert refusal.value.code == 65


seconds = st.floats(0, 1e6, allow_nan=False)


@st.composite
def ledgers(draw):
    """Any sequence of events that processes may leave."""
    events = []
    for _ in range(draw(st.integers(1, 4))):
        if events and draw(st.booleans()):
            events.append(redo(draw(st.integers(1, 9)), draw(seconds), draw(seconds), draw(seconds)))
        events.append(start(draw(st.floats(-1e9, 1e9)), draw(st.integers(0, 50)), draw(seconds)))
        for _ in range(draw(st.integers(0, 3))):
            parts = {bucket: draw(seconds) for bucket in draw(st.sets(st.sampled_from(BUCKETS)))}
            events.append(dict(kind="spent", time=0, elapsed=sum(parts.values()), **parts))
    lines = [metric(draw(st.integers(1, 60)), draw(seconds), draw(seconds)) for _ in range(draw(st.integers(0, 5)))]
    return events, lines


@settings(max_examples=300, derandomize=True, deadline=None)
@given(ledgers())
def test_whatever_happened_the_buckets_are_not_negative_and_add_up_to_the_wall_time(ledger):
    found = of(*ledger)
    assert min(found.buckets.values()) >= 0 and 0 <= found.share <= 1
    assert sum(found.buckets.values()) == pytest.approx(found.wall)


def test_what_a_process_spent_adds_up_to_its_time():
    clock = iter([10.0, 13.0, 14.0, 16.0, 21.0])
    spent = Spent(now=lambda: next(clock), before=2.0)
    assert spent.mark("start") == 5.0 and spent.mark("compile") == 1.0
    assert spent.mark_split("data", "steps", 0.5) == 2.0
    assert spent.totals() == dict.fromkeys(BUCKETS, 0.0) | dict(start=5.0, compile=1.0, data=0.5, steps=1.5)
    assert spent.elapsed() == 13.0


def test_a_process_counts_from_before_its_imports():
    assert Spent().elapsed() > 0.5  # this one has imported JAX
