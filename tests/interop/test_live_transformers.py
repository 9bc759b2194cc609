"""With transformers at hand: new random models, and what we export, read by transformers itself."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from loading import on_mesh

from llmjax.checkpoint.checkpoints import like, named
from llmjax.evaluate.generate import Sampling, complete
from llmjax.interop import configs, folder, safetensors, weights
from llmjax.models import nn

if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
    pytest.skip("transformers and torch are not installed (the extra transformers)", allow_module_level=True)

import make_fixtures
import torch
import transformers

NEW = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=96)
GPT2 = dict(n_embd=48, n_head=6, n_positions=96)


def fields_of(case: str) -> tuple[str, dict]:
    """A case of the fixtures with other sizes."""
    family, fields = make_fixtures.CASES[case]
    own = dict(GPT2=GPT2, DeepseekV3=NEW | dict(num_key_value_heads=6))
    return family, fields | own.get(family, NEW)


def ours(path: Path):
    found, (mesh, how) = folder.read(path), on_mesh()
    with jax.set_mesh(mesh), nn.compute(how):
        model = found.load(like(jax.eval_shape(found.model.init, jax.random.key(0)), mesh))
        tokens = np.random.default_rng(2).integers(0, 64, (2, 40))
        return found, model, tokens, np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, tokens))


def exported(path: Path, found: folder.Checkpoint, model) -> None:
    """As `llmjax export` writes it, with a config of our own words."""
    path.mkdir()
    (path / folder.CONFIG).write_text(json.dumps(configs.write(found.family, found.model, "float32")))
    values, shapes = named(model), {}
    parts = found.family.weights(found.model)
    for weight in parts:
        shape = values[weight.ours].shape
        shapes |= {name: (np.float32, weight.shape(shape)) for _, name in weight.names(shape)}
    places = safetensors.create(path / folder.SINGLE, shapes)
    for weight in parts:
        weights.store(weight, values[weight.ours], places)


@pytest.mark.parametrize("case", sorted(make_fixtures.CASES))
def test_both_ways_the_numbers_and_the_likeliest_tokens_are_the_same(case, tmp_path):
    made = make_fixtures.model_of(*fields_of(case))
    made.save_pretrained(tmp_path / "in")
    found, model, tokens, logits = ours(tmp_path / "in")
    with torch.no_grad():
        expected = made(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))

    exported(tmp_path / "out", found, model)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    assert all(torch.equal(x, y) for x, y in zip(made.parameters(), back.parameters(), strict=True))
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    prompt = tokens[:1, :20]
    greedy = back.generate(torch.from_numpy(prompt), **settings)[0, 20:].tolist()
    mesh, how = on_mesh()
    with jax.set_mesh(mesh), nn.compute(how):
        assert complete(model, [prompt[0].tolist()], Sampling(tokens=12), positions=96) == [greedy]
