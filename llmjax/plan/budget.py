"""The least recomputation with which a step keeps to a share of a device's memory."""

import dataclasses

from llmjax.checks import check
from llmjax.errors import Refused
from llmjax.mesh import Axes, Chip
from llmjax.plan import memory
from llmjax.plan.work import REMAT
from llmjax.run import Run
from llmjax.train.program import microbatches


def within(run: Run, sizes: Axes, chip: Chip) -> Run:
    """The run with the first policy, from none to full, whose step is predicted to keep to `remat.budget`.

    A run without a budget stays as it is.

    Raises:
      Refused: the chip's memory is not known, no policy is enough, or the run cannot be cut as it asks.
    """
    budget, tried = run.remat.budget, []
    if not budget:
        return run
    check(run, sizes, accumulate := run.accumulate or microbatches(run, sizes, chip))
    if not chip.memory or not hasattr(run.model, "matrices"):
        what = f"the memory of {chip.name} is" if not chip.memory else f"the sizes of {type(run.model).__name__} are"
        raise Refused(f"remat.budget is {budget}, but {what} not known: set it to 0 and give --remat.policy.")
    for policy in list(REMAT)[run.remat.offload :]:  # nothing that could be offloaded is kept by name under none
        tried.append(dataclasses.replace(run, remat=dataclasses.replace(run.remat, policy=policy)))
        if memory.predict(tried[-1], sizes, accumulate, chip).total <= budget * chip.memory:
            return tried[-1]
    least = min(memory.predict(each, sizes, accumulate, chip).total for each in tried)
    raise Refused(
        f"remat.budget is {budget}, but a step takes at least {least / chip.memory:.2f} of a {chip.name}'s memory: "
        f"raise it, or see what `llmjax plan` says would help."
    )
