"""Averages in bfloat16 take half the memory and are right on average."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.optim.adamw import AdamW
from llmjax.optim.lion import Lion
from llmjax.optim.moments import round_at_random
from llmjax.optim.muon import Muon
from llmjax.optim.schedules import Constant


def test_a_number_goes_to_one_of_its_neighbours_and_in_the_mean_nowhere():
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    found = np.stack([round_at_random(jnp.asarray(x), jnp.uint32(seed)) for seed in range(2000)]).astype(np.float32)
    apart = np.abs(x) * 2.0**-7
    assert (np.abs(found - x) <= apart).all()
    assert (np.abs(np.mean(found, 0) - x) < 0.06 * apart).all()  # five deviations of a mean of 2,000 draws
    assert len(np.unique(found[0] > x)) == 2  # every place has a draw of its own


def test_what_bfloat16_holds_stays_as_it_is_and_so_does_what_is_no_number():
    exact = jnp.asarray([1.0, -0.5, 0.0, 3.0, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    for seed in range(20):
        np.testing.assert_array_equal(np.float32(round_at_random(exact, jnp.uint32(seed))), exact)


@pytest.mark.parametrize(("optimizer", "numbers"), [(AdamW, 2), (Lion, 1), (Muon, 1)])
def test_the_averages_take_half_the_memory_and_nothing_else_does(optimizer, numbers):
    params = {"kernel": jnp.ones((32, 64))}

    def held(moments):
        return [x for x in jax.tree.leaves(optimizer(moments=moments).build(9).init(params)) if x.ndim]

    assert sum(x.nbytes for x in held("float32")) == 4 * numbers * 32 * 64
    assert sum(x.nbytes for x in held("bfloat16")) == 2 * numbers * 32 * 64


def test_an_average_of_squares_decays_where_rounding_to_the_nearest_would_hold_it():
    steps, b2, shape = 1500, 0.999, (64, 64)
    tx = AdamW(schedule=Constant(), b2=b2, moments="bfloat16").build(steps)
    params = {"kernel": jnp.zeros(shape)}
    after = tx.update({"kernel": jnp.ones(shape)}, tx.init(params), params)[1]

    def nothing(state, _):
        return tx.update({"kernel": jnp.zeros(shape)}, state, params)[1], None

    [v] = [s.nu["kernel"] for s in jax.lax.scan(nothing, after, None, steps)[0].inner if hasattr(s, "nu")]
    expected = (1 - b2) * b2**steps
    assert np.mean(np.float32(v)) == pytest.approx(expected, rel=0.01)
    nearest = jnp.asarray(1 - b2, jnp.bfloat16)
    assert nearest == (nearest.astype(jnp.float32) * b2).astype(jnp.bfloat16)  # it would stay for ever


def test_steps_are_those_of_float32_up_to_the_rounding():
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(16, 24)).astype(np.float32)}
    grads = [{"kernel": random.normal(size=(16, 24)).astype(np.float32)} for _ in range(20)]
    for optimizer in (AdamW, Muon, functools.partial(Muon, b2_neurons=0.9)):
        ends = []
        for moments in ("float32", "bfloat16"):
            tx = optimizer(lr=0.1, schedule=Constant(), moments=moments).build(20)
            update, state, at = jax.jit(tx.update), tx.init(params), params
            for grad in grads:
                step, state = update(grad, state, at)
                at = optax.apply_updates(at, step)
            ends.append(np.asarray(at["kernel"]) - params["kernel"])
        assert 0 < np.linalg.norm(ends[1] - ends[0]) < 0.02 * np.linalg.norm(ends[0])
