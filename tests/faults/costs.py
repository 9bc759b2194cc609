"""What never losing a step costs, per step: `uv run python tests/faults/costs.py`, on an idle machine.

A Llama of 3.7 M parameters on this machine's own devices; medians of alternating measurements.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import optax

from experiments import stdlib_tiny
from llmjax import mesh as meshes
from llmjax import processes
from llmjax.checkpoint import manifest
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.data.dataset import Synthetic
from llmjax.train import corruption, loop
from llmjax.train import step as steps
from llmjax.train.display import Display
from llmjax.train.ledger import Ledger
from llmjax.train.program import make, resolve, transformation
from llmjax.train.records import Records

PAIRS = 30


def unguarded(state, batch, *, loss, tx):
    """The step as it is without a guard."""
    total, sums, grads = steps.gradients(state.model, batch, loss)
    updates, opt = tx.update(grads, state.opt, state.model)
    model = optax.apply_updates(state.model, updates)
    return steps.State(state.step + 1, model, opt, state.watch), dict(
        loss=total, grad_norm=optax.tree.norm(grads), **sums
    )


def timed(call):
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - began), result


def main() -> None:
    run = dataclasses.replace(stdlib_tiny.run, data=Synthetic(vocab=4096), seed=1)
    devices = processes.start(run.mesh, processes.Processes(count=1))
    program = make(run, meshes.device_mesh(resolve(run, len(devices)), devices), meshes.chip_of(run.mesh, devices))
    dataset = run.data.open(run.sequence, Path(tempfile.mkdtemp()))
    with program.context(), tempfile.TemporaryDirectory() as folder:
        rows = loop.rows_of(run, dataset, 0)
        batch = loop.place(dataset, "train", rows, accumulate=program.accumulate, sharding=program.batch_sharding())
        plain = jax.jit(lambda s, b: unguarded(s, b, loss=run.loss, tx=transformation(run)), donate_argnums=0)
        states = {name: program.init(jax.random.key(0)) for name in ("guarded", "plain")}
        calls, times = dict(guarded=program.step, plain=plain), dict(guarded=[], plain=[])
        for number in range(PAIRS + 3):
            for name in sorted(calls, reverse=number % 2):
                took, (states[name], _) = timed(lambda n=name: calls[n](states[n], batch))
                times[name] += [took] * (number >= 3)
        ours, theirs = (statistics.median(times[name]) for name in ("guarded", "plain"))
        differences = [a - b for a, b in zip(times["guarded"], times["plain"], strict=True)]
        print(f"guard: {statistics.median(differences):+.2f} ms per step of {theirs:.1f} ms ({ours:.1f} with it)")

        state = states["guarded"]
        with Records(Path(folder)) as records:
            ledger = Ledger(Display(quiet=True), None, records)
            report = loop.Reporter(program, dataset, ledger, 0, frozenset())
            _, metrics = jax.block_until_ready(program.step(jax.tree.map(lambda x: x.copy(), state), batch))
            took = [timed(lambda n=n: report.read(loop.Pending(n, batch, metrics, 0.0)))[0] for n in range(500)]
            spent = [timed(lambda: ledger.account(now=True))[0] for _ in range(100)]
        print(f"ledger: {statistics.mean(took[10:]):.3f} ms per step, and {statistics.mean(spent):.2f} ms every 10 s")

        held = [program.init(jax.random.key(1))]

        def step_on():
            held[0], metrics = program.step(held[0], batch)
            return metrics

        with Checkpoints(Path(folder) / "checkpoints", say=lambda text: None) as checkpoints:
            quiet = [timed(step_on)[0] for _ in range(20)][2:]
            stall = []
            busy = []
            for number in range(1, 5):
                stall += [timed(lambda n=number: checkpoints.save(n, state, {}))[0]]
                while checkpoints._writing and not checkpoints._writing[1].done():
                    busy += [timed(step_on)[0]]
                checkpoints.wait()
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        print(
            f"save of {size / 2**20:.0f} MiB: stalls a step {statistics.median(stall[1:]):.0f} ms; steps while it is "
            f"written, hashed and read back {statistics.median(busy):.0f} ms, else {statistics.median(quiet):.0f} ms"
        )
        step = Path(folder) / "checkpoints" / "4"
        verifying = [timed(lambda: (manifest.write(step, {}), manifest.damage(step)))[0] for _ in range(5)]
        print(f"verification: {statistics.median(verifying):.0f} ms per save, in a thread of its own")
        for name, call in (
            ("copies compared", lambda: corruption.replicas(state.model, program.mesh)),
            (
                "a step taken twice",
                lambda: corruption.repeat(program.step, jax.tree.map(lambda x: x.copy(), state), batch, number=1),
            ),
        ):
            call()
            print(f"{name}: {statistics.median(timed(call)[0] for _ in range(5)):.0f} ms each time")


if __name__ == "__main__":
    main()
