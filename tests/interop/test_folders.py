"""A checkpoint goes in and comes out with the same bits, and one that is not whole is refused."""

import json
import re
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from loading import CASES, FIXTURES, loaded, on_mesh

from llmjax.checkpoint.checkpoints import like, named
from llmjax.errors import DATA, Refused
from llmjax.interop import configs, folder, safetensors, weights
from llmjax.models import nn

CUT = dict(fsdp=2, tensor=2)


def contents(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(entry.map()) for name, entry in folder.read(path).tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_out_with_the_bits_that_went_in(case, tmp_path):
    found, model = loaded(case, "fsdp", fsdp=4)
    before = contents(FIXTURES / case)
    places = safetensors.create(tmp_path / "x.safetensors", {n: (x.dtype, x.shape) for n, x in before.items()})
    values = named(model)
    for weight in found.family.weights(found.model):
        weights.store(weight, values[weight.ours], places)
    after = {name: np.array(e.map()) for name, e in safetensors.header(tmp_path / "x.safetensors").items()}
    assert after.keys() == before.keys()
    for name, expected in before.items():
        assert after[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_a_config_of_ours_says_in_their_words_what_it_is(case):
    found = folder.read(FIXTURES / case)
    assert configs.read(folder.known(), configs.write(found.family, found.model, "float32"))[1] == found.model


def test_a_device_reads_the_slices_that_it_holds_and_no_other(monkeypatch):
    read, view = [], weights.Weight.view

    class Seen:
        def __init__(self, array):
            self.array = array

        def __getitem__(self, index):
            read.append(self.array[index].size)
            return self.array[index]

    monkeypatch.setattr(weights.Weight, "view", lambda *args: Seen(view(*args)))
    _, model = loaded("llama_grouped", "fsdp_tp", **CUT)
    held = sum(shard.data.size for x in jax.tree.leaves(model) for shard in x.addressable_shards)
    whole = sum(x.size for x in jax.tree.leaves(model))
    assert sum(read) <= held < 4 * whole / 3.5  # vectors are whole on every device


def test_on_any_mesh_the_weights_are_the_same():
    one, cut = named(loaded("mixtral")[1]), named(loaded("mixtral", "fsdp_tp", **CUT)[1])
    for name, x in one.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(cut[name]), err_msg=name)


PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())


@pytest.mark.parametrize("parameters", PUBLISHED, ids=lambda n: PUBLISHED[n]["model_type"])
def test_configs_as_they_are_published_give_models_of_the_size_that_is_published(parameters):
    """Those of DeepSeek-V3 and gpt-oss without the quantization that their first checkpoints have."""
    family, model, _ = configs.read(folder.known(), PUBLISHED[parameters])
    mesh, how = on_mesh()
    with jax.set_mesh(mesh), nn.compute(how):
        weights = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(weights)) == int(parameters)
    assert configs.read([family], configs.write(family, model, "bfloat16"))[1] == model


def test_files_that_disagree_with_their_index_are_refused(tmp_path):
    copy = shutil.copytree(FIXTURES / "llama_grouped", tmp_path / "copy")
    index = json.loads((copy / folder.INDEX).read_text())
    file = index["weight_map"].pop("model.norm.weight")
    (copy / folder.INDEX).write_text(json.dumps(index))
    with pytest.raises(Refused, match=r"disagree on model\.norm\.weight"):
        folder.read(copy)
    index["weight_map"]["model.norm.weight"] = f"../copy/{file}"
    (copy / folder.INDEX).write_text(json.dumps(index))
    with pytest.raises(Refused, match="which does not lie in it"):
        folder.read(copy)


def test_a_link_out_of_the_folder_is_refused_and_one_of_the_hub_s_cache_is_not(tmp_path):
    copy = shutil.copytree(FIXTURES / "qwen3_tied", tmp_path / "models--x" / "snapshots" / "abc")
    (tmp_path / "models--x" / "blobs").mkdir()
    (copy / folder.SINGLE).rename(tmp_path / "models--x" / "blobs" / "f00")
    (copy / folder.SINGLE).symlink_to("../../blobs/f00")
    assert folder.read(copy).tensors
    (tmp_path / "secret").write_text("{}")
    (copy / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(Refused, match="is a link out of the folder"):
        folder.read(copy).texts()


def file_with(path: Path, said, data: bytes = b"", length: int | None = None) -> Path:
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


F4 = dict(dtype="F32", shape=[1], data_offsets=[0, 4])


@pytest.mark.parametrize(
    ("said", "data", "length", "why"),
    [
        ({"a": F4}, b"1234", 10**9, "give its header 1,000,000,000 bytes"),
        ({"a": F4}, b"1234", 1, "give its header 1 bytes"),
        ({"a": F4}, b"123", None, "which its shape or the file's end denies"),
        ({"a": F4}, b"12345678", None, "4 bytes that belong to no array"),
        ({"a": F4, "b": F4}, b"1234", None, "overlaps what lies before it"),
        ({"a": F4 | dict(data_offsets=[4, 8])}, b"12345678", None, "leaves a gap"),
        ({"a": F4 | dict(shape=[2**62, 4])}, b"1234", None, "denies"),
        ({"a": F4 | dict(shape=[-1])}, b"1234", None, "no count"),
        ({"a": F4 | dict(data_offsets=[0, 4, 5])}, b"1234", None, "too many values"),
        ({"a": F4 | dict(dtype="PICKLE")}, b"1234", None, "'PICKLE', which is none"),
        ({"a": 3}, b"", None, "not subscriptable"),
        ([1], b"", None, "its header is no object"),
        (b'{"a": {}, "a": {}}', b"", None, "names something twice"),
        (b"{not json", b"", None, "Expecting"),
        (b"[" * 10**5, b"", None, "recursion"),
        (b"\xff\xfe{}", b"", None, "decode"),
    ],
)
def test_a_hostile_file_is_refused(said, data, length, why, tmp_path):
    with pytest.raises(Refused, match=re.escape(why)) as refusal:
        safetensors.header(file_with(tmp_path / "x.safetensors", said, data, length))
    assert refusal.value.code == DATA


def test_a_truncated_file_is_refused_whatever_its_length(tmp_path):
    whole = (FIXTURES / "qwen3_tied" / folder.SINGLE).read_bytes()
    for length in [0, 1, 7, 8, 9, 100, 1000, 5000, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(Refused, match="no whole safetensors file"):
            safetensors.header(tmp_path / "x")


def changed(tmp_path: Path, case: str, **fields) -> Path:
    copy = shutil.copytree(FIXTURES / case, tmp_path / "changed")
    config = json.loads((copy / folder.CONFIG).read_text()) | fields
    (copy / folder.CONFIG).write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("case", "fields", "said"),
    [
        (
            "llama_grouped",
            dict(architectures=["MambaForCausalLM"]),
            "known are DeepseekV3ForCausalLM, GPT2LMHeadModel, ",
        ),
        ("llama_grouped", dict(architectures=["LlamaForCasualLM"]), "did you mean LlamaForCausalLM?"),
        ("llama_grouped", dict(attention_bias=True), "attention_bias True, and llmjax computes Llama with False only"),
        ("llama_grouped", dict(quantization_config=dict(bits=4)), "config.json has quantization_config"),
        ("llama_grouped", dict(attention_multiplier=0.1), "attention_multiplier 0.1, which llmjax does not honour"),
        ("llama_grouped", dict(rope_parameters=dict(rope_type="longrope")), "rotary positions of type 'longrope'"),
        ("llama_grouped", dict(hidden_size="32"), "hidden_size '32', which is no int"),
        ("llama_grouped", dict(vocab_size=None), "config.json lacks vocab_size"),
        ("qwen2_tied", dict(use_sliding_window=True, sliding_window=4), "use_sliding_window true"),
        ("gemma2", dict(layer_types=["full_attention", "sliding_attention"]), "no turns of local layers and a global"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True"),
    ],
)
def test_a_config_that_is_not_honoured_is_refused_by_name(case, fields, said, tmp_path):
    with pytest.raises(Refused, match=re.escape(said)):
        folder.read(changed(tmp_path, case, **fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(num_hidden_layers=3), "lacks model.layers.2.self_attn.q_proj.weight"),
        (dict(num_hidden_layers=1), "has, and this family has not, model.layers.1."),
        (dict(intermediate_size=40), "model.layers.0.mlp.gate_proj.weight [48, 32] in place of [40, 32]"),
        (dict(tie_word_embeddings=False), "lacks lm_head.weight"),
    ],
)
def test_tensors_that_are_missing_unknown_or_of_another_shape_are_listed(fields, said, tmp_path):
    found, (mesh, how) = folder.read(changed(tmp_path, "qwen2_tied", **fields)), on_mesh()
    with jax.set_mesh(mesh), nn.compute(how), pytest.raises(Refused, match=re.escape(said)):
        found.load(like(jax.eval_shape(found.model.init, jax.random.key(0)), mesh))


def test_what_changes_no_numbers_is_taken_and_dropout_is_said(tmp_path):
    found = folder.read(changed(tmp_path, "llama_grouped", torch_dtype="bfloat16", attention_dropout=0.1))
    assert found.notes == ["attention_dropout is 0.1 there; llmjax trains without dropout."]


def test_a_config_of_an_older_transformers_means_the_same(tmp_path):
    new = folder.read(FIXTURES / "llama_tied_scaled").model
    factors = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    old = dict(rope_theta=5e5, rope_scaling=dict(type="llama3", **factors), rope_parameters=None)
    assert folder.read(changed(tmp_path, "llama_tied_scaled", **old)).model == new
