"""A schedule has its stated values at the start, the peak and the end, and says no in one sentence."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from experiments import stdlib_tiny
from llmjax.cli import parse
from llmjax.errors import Refused
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import WSD, Constant, Cosine, Linear
from llmjax.optim.sgd import SGD
from llmjax.run import from_json, to_json
from llmjax.train.loop import learning_rates


def factors(schedule, steps: int) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(lambda step: schedule.build(steps)(step) * 1.0))(np.arange(steps)))


ALL = (Constant(warmup=10), Cosine(warmup=10), Linear(warmup=10, final=0.1), WSD(warmup=10, decay=20, final=0.1))


@pytest.mark.parametrize("schedule", ALL)
def test_a_warmup_of_ten_steps_takes_tenths_of_the_peak_and_wastes_no_step(schedule):
    np.testing.assert_allclose(factors(schedule, 100)[:10], np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize("schedule", ALL[1:])
def test_a_fall_reaches_its_final_share_one_step_after_the_last(schedule):
    after = float(schedule.build(100)(100))
    last = factors(schedule, 100)[-1]
    assert after == pytest.approx(0.1, rel=1e-6)
    assert 0.1 < last < 0.15


def test_a_cosine_and_a_line_are_halfway_down_in_the_middle():
    # 99 steps: the peak at step 0, then 99 steps down, of which step 49.5 is the middle
    for schedule in (Cosine(warmup=0, final=0.2), Linear(warmup=0, final=0.2)):
        around = factors(schedule, 99)[[49, 50]]
        assert np.mean(around) == pytest.approx(0.6, rel=1e-5)


def test_wsd_holds_the_peak_until_its_decay_and_does_not_depend_on_the_length_before_it():
    short, long = factors(WSD(warmup=10, decay=20), 100), factors(WSD(warmup=10, decay=20), 200)
    np.testing.assert_array_equal(short[9:80], 1)
    np.testing.assert_array_equal(short[:80], long[:80])
    np.testing.assert_allclose(short[80:], 1 - np.arange(1, 21) / 21, rtol=1e-5)
    np.testing.assert_allclose(factors(WSD(warmup=10, decay=90), 100), factors(Linear(warmup=10), 100), rtol=1e-6)


def test_a_warmup_below_one_is_a_fraction_of_the_run():
    np.testing.assert_array_equal(factors(Cosine(warmup=0.29), 100), factors(Cosine(warmup=29), 100))


@pytest.mark.parametrize("schedule", [Constant(), Cosine(), Linear(), WSD(), Cosine(warmup=0.9), WSD(decay=0.9)])
@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
def test_every_run_down_to_one_step_reaches_the_peak_and_stays_between_zero_and_it(schedule, steps):
    found = factors(schedule, steps)
    assert found.shape == (steps,) and found.max() == 1 and found.min() > 0


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (Cosine(warmup=100), "warmup is 100"),
        (Constant(warmup=2000), "warmup is 2000"),
        (Linear(warmup=-1), "warmup is -1"),
        (Cosine(warmup=float("nan")), "warmup is nan"),
        (Cosine(final=1.5), "final is 1.5"),
        (WSD(warmup=50, decay=60), "decay is 60, but only 50 of the run's 100 steps"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused_in_a_sentence_with_the_remedy(schedule, says):
    with pytest.raises(Refused, match=rf"^optimizer\.schedule\.{says}.*: (lower|give) [^\n]*\.$"):
        AdamW(schedule=schedule).build(100)


def test_a_learning_rate_that_is_none_is_refused():
    with pytest.raises(Refused, match=r"^optimizer\.lr is -1: give a positive number\.$"):
        AdamW(lr=-1).build(100)


def test_the_recorded_learning_rate_is_the_one_a_step_takes():
    sgd = SGD(lr=0.5, schedule=Cosine(warmup=3), momentum=0)
    tx, w = sgd.build(10), np.float32(0)
    state, taken = tx.init(w), []
    for _ in range(10):
        update, state = tx.update(np.float32(1), state, w)
        taken.append(-float(update))
    np.testing.assert_allclose(learning_rates(sgd, 10), taken, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Sawtooth:
    """A schedule of a user's own."""

    teeth: int = 4
    "Number of teeth."

    def build(self, steps: int) -> optax.Schedule:
        return lambda step: 1 - step * self.teeth % steps / steps


def test_the_command_line_sets_the_peak_and_the_fields_of_any_schedule():
    run = parse(stdlib_tiny.run, ["--optimizer.lr", "0.5", "--optimizer.schedule.warmup", "7"], "train")
    schedule = dataclasses.replace(stdlib_tiny.run.optimizer.schedule, warmup=7)
    assert run.optimizer == dataclasses.replace(stdlib_tiny.run.optimizer, lr=0.5, schedule=schedule)
    own = dataclasses.replace(run, optimizer=AdamW(schedule=Sawtooth()))
    run = parse(own, ["--optimizer.schedule.teeth", "5"], "train")
    assert run.optimizer.schedule == Sawtooth(5) and from_json(to_json(run)) == run
    np.testing.assert_allclose(learning_rates(run.optimizer, 10)[:3], 3e-4 * np.array([1, 0.5, 1]), rtol=1e-6)
