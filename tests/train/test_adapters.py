"""Adapters are the same model on any mesh, in every family, and merged; they cost what they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import named
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.evaluate import parity
from llmjax.layout import Pipeline
from llmjax.mesh import Axes
from llmjax.models import nn
from llmjax.models.deepseek_v3 import DeepseekV3
from llmjax.models.gemma3 import Gemma3
from llmjax.models.gpt2 import GPT2
from llmjax.models.gpt_oss import GptOss
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.optim.adamw import AdamW
from llmjax.optim.muon import Muon
from llmjax.run import DiLoCo, LoRA, Run, from_json, to_json
from llmjax.train import adapters
from llmjax.train.loss import NextToken
from llmjax.train.program import bytes_per_device, make
from meshes import chips, cpu8

SMALL = dict(vocab=64, layers=2, width=32, heads=4, head_dim=8, ff=64, positions=16)
LLAMA = Llama(**SMALL, kv_heads=2)
MIXTRAL = Mixtral(**SMALL, kv_heads=2, experts=4)
DEEPSEEK = DeepseekV3(
    **SMALL | dict(layers=3),
    kv_heads=4,
    experts=4,
    dense=1,
    dense_ff=64,
    latent=16,
    query_latent=16,
    rotary=4,
    value_dim=8,
)
FAMILIES = dict(
    llama=LLAMA, gpt2=GPT2(**SMALL), mixtral=MIXTRAL, deepseek=DEEPSEEK,
    gemma=Gemma3(**SMALL | dict(layers=3), kv_heads=2, window=8, every=2),
    gpt_oss=GptOss(**SMALL, kv_heads=2, experts=4, window=8),
)  # fmt: skip


def run_of(model=LLAMA, layout="dp", **fields) -> Run:
    fields = dict(steps=3, batch=16, sequence=16, accumulate=2, dtype="float32", lora=LoRA(rank=4, alpha=8)) | fields
    return Run(
        model=model, data=Synthetic(vocab=64), optimizer=fields.pop("optimizer", AdamW(lr=1e-2)), loss=NextToken(),
        mesh=cpu8.cluster, layout=layouts.preset(layout), **fields,
    )  # fmt: skip


def mesh_of(**axes: int):
    sizes = Axes(**dict.fromkeys(meshes.AXES, 1) | axes)
    return meshes.device_mesh(sizes, jax.devices()[: int(np.prod(list(axes.values())))])


def trace(model, layout="dp", on=(), **axes: int) -> parity.Trace:
    accumulate = 1 if "stage" in axes else 2
    run = run_of(model, layout, lora=LoRA(rank=4, alpha=8, on=on), accumulate=accumulate)
    return parity.trace(run, mesh_of(**axes), chips.CPU, 3)


@pytest.mark.parametrize(
    ("model", "on", "cases"),
    [
        (LLAMA, (), [("fsdp_tp_sp", dict(fsdp=4, tensor=2)), ("fsdp_pp", dict(stage=2, fsdp=4))]),
        (MIXTRAL, ("gate", "down_EFD", "query"), [("fsdp_ep", dict(fsdp=4, expert=2))]),
    ],
    ids=["llama", "experts"],
)  # fmt: skip
def test_adapters_learn_the_same_on_any_mesh(model, on, cases, capfd):
    one = trace(model, on=on)
    assert one.losses[-1] < one.losses[0] and all(np.abs(x).max() > 0 for x in one.parameters.values())
    for layout, axes in cases:
        verdict = parity.compare(one, trace(model, layout, on, **axes))
        assert verdict.passed, (layout, verdict)
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("llama", "mixtral", "deepseek") else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_of_every_family_the_merged_model_gives_the_logits_of_that_with_adapters(family):
    model, how = FAMILIES[family], LoRA(rank=2, alpha=4)
    if family == "mixtral":  # experts and their router as well
        how = dataclasses.replace(how, on=("gate", "up_EDF", "down", "router", "out"))
    with jax.set_mesh(mesh_of()), nn.compute(nn.Compute()):
        base = jax.jit(model.init)(jax.random.key(0))
        pairs = adapters.fresh(base, how, jax.random.key(1))
        noise = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), pairs)
        tokens = jnp.arange(32).reshape(2, 16) % 64
        logits = jax.jit(lambda model: model(tokens))
        same, apart = (np.asarray(logits(adapters.attached(base, p, how))) for p in (pairs, noise))
        one = np.asarray(logits(jax.jit(lambda m, p: adapters.merged(m, p, how))(base, noise)))
        plain = np.asarray(logits(base))
    np.testing.assert_allclose(same, plain, atol=1e-5)  # at first they change nothing
    np.testing.assert_allclose(one, apart, atol=1e-4)
    assert np.abs(apart - plain).max() > 0.01


def test_the_state_has_optimizer_state_of_adapters_alone_and_the_base_as_it_is_asked_for():
    run = run_of(parameters="bfloat16", layout="fsdp")
    made = make(run, mesh_of(fsdp=8), chips.CPU)
    state = made.abstract_state()
    size = sum(x.size for x in jax.tree.leaves(state.model))
    assert sum(x.size for x in jax.tree.leaves(state.opt)) <= 2 * size + 4
    assert all(x.dtype == jnp.bfloat16 for name, x in named(state.frozen).items() if "scale" not in name)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.model))
    assert bytes_per_device(state.frozen, made.mesh) < 2 * sum(x.size for x in jax.tree.leaves(state.frozen)) / 4
    cut = named(state.model)["blocks.query_DHK.down_DR"].sharding.spec
    assert cut == jax.P(None, "fsdp", None)  # as the weight's D


def test_a_step_holds_no_gradient_of_the_base():
    """Temporaries of a step fall by what the gradients of the layers' matrices take."""
    model = Llama(vocab=64, layers=2, width=256, heads=4, kv_heads=4, head_dim=64, ff=1024, positions=16)
    taken = {}
    for lora in (LoRA(), LoRA(rank=2)):
        made = make(run_of(model, lora=lora, batch=2, accumulate=1, unroll=1), mesh_of(), chips.CPU)
        with made.context():
            compiled = made.step.lower(made.abstract_state(), made.abstract_batch()).compile()
        taken[lora.rank] = compiled.memory_analysis().temp_size_in_bytes
    layers = 4 * 2 * (4 * 256 * 256 + 3 * 256 * 1024)
    assert taken[0] - taken[2] > 0.8 * layers, taken


def test_muon_takes_adapters_as_the_matrices_they_are():
    made = make(run_of(optimizer=Muon()), mesh_of(), chips.CPU)
    with made.context():
        state = made.init(jax.random.key(0))
        before = jax.tree.map(np.asarray, state.model)
        state, metrics = made.step(state, parity.batch(made, 0))
        state, metrics = made.step(state, parity.batch(made, 1))
    assert np.isfinite(float(metrics["loss"]))
    assert all(
        np.abs(x - y).max() > 0 for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(state.model), strict=True)
    )


def test_a_run_with_adapters_is_read_back_as_it_was_written():
    run = run_of(lora=LoRA(rank=4, on=("query", "value")))
    assert from_json(to_json(run)) == run


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(lora=LoRA(rank=-1)), "lora.rank is -1"),
        (dict(lora=LoRA(alpha=3.0)), "lora.rank is 0, and other fields of lora are set"),
        (dict(lora=LoRA(rank=2, alpha=0.0)), "lora.alpha is 0.0: give a positive number"),
        (dict(local=DiLoCo(every=2)), "lora.rank is 4, but local.every is 2"),
        (dict(layout="pp", pipeline=Pipeline("1f1b")), "pipeline.schedule 1f1b takes the gradient of all weights"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields, words):
    with pytest.raises(Refused, match=words):
        make(run_of(**fields), mesh_of(), chips.CPU)


@pytest.mark.parametrize("name", ["queri", "embed_VD", "attention_scale"])
def test_a_weight_that_is_none_of_a_layer_is_refused_with_those_that_are(name):
    with pytest.raises(Refused, match=rf"lora.on has {name}, .*choose of down_FD, gate_DF, key_DGK"):
        make(run_of(lora=LoRA(rank=2, on=(name,))), mesh_of(), chips.CPU)
