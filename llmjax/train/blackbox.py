"""What is kept of a bad step: enough to name what went in, and to run it again."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoint.checkpoints import named
from llmjax.train import digest
from llmjax.train import step as steps
from llmjax.train.program import Program


def contents(
    program: Program, state: steps.State, step: int, batch: Any, rows: np.ndarray, loss: float, grad_norm: float
) -> dict[str, Any]:
    """The facts (JSON) of step number `step`, counted from 1, which began with `state` and read `rows`.

    Every process calls it. Numbers that are not finite are written as text, as JSON has none.
    """
    run = program.run
    facts = dict(
        step=step,
        loss=_number(loss),
        grad_norm=_number(grad_norm),
        rows=rows.tolist(),
        seed=run.seed,
        rng=dict(init=run.seed, order=[run.seed, step - 1]),  # all that is random in a run comes from these
        batch=digest.text(jax.jit(digest.digest)(batch)),
        state=digest.text(jax.jit(digest.digest)(dict(model=state.model, opt=state.opt))),
    )
    if not run.local.every:
        norms = jax.jit(functools.partial(gradient_norms, loss=program.loss(state)))(
            program.differentiated(state), batch
        )
        facts["gradient_norms"] = {name: _number(float(norm)) for name, norm in norms.items()}
    return facts


def gradient_norms(model, batch, *, loss: steps.Loss) -> dict[str, jax.Array]:
    """The norm of the gradient of every parameter, by name."""
    _, _, grads = steps.gradients(model, batch, loss)
    return {f"model.{name}": jnp.sqrt(jnp.sum(jnp.square(g))) for name, g in named(grads).items()}


def first_bad(facts: dict[str, Any]) -> str | None:
    """The first parameter whose gradient is not finite."""
    return next((name for name, norm in facts.get("gradient_norms", {}).items() if isinstance(norm, str)), None)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
