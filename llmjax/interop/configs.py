"""What a Hugging Face config.json says, as one of our configs, and the other way round.

Every field is honoured, known to change no numbers, or refused: none is passed over because nobody thought of it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmjax.errors import DATA, Refused, did_you_mean
from llmjax.interop.weights import Weight
from llmjax.models.attention import LinearScaling, RopeScaling, Yarn

Json = dict[str, Any]

# Names, records and habits of other programs.
WITHOUT_NUMBERS = frozenset({
    "architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version", "auto_map", "dtype",
    "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
    "decoder_start_token_id", "initializer_range", "initializer_factor", "attn_implementation", "_attn_implementation",
    "output_router_logits", "router_aux_loss_coef", "pretraining_tp", "gradient_checkpointing", "return_dict",
    "output_attentions", "output_hidden_states", "torchscript", "task_specific_params", "id2label", "label2id",
    "is_decoder", "is_encoder_decoder", "chunk_size_feed_forward", "cache_implementation", "hybrid_cache_dtype",
    "keys_to_ignore_at_inference", "problem_type", "tokenizer_class", "prefix", "finetuning_task", "base_model_tp_plan",
    "_commit_hash", "use_bfloat16", "is_llama_config", "unsloth_version", "unsloth_fixed", "max_length", "min_length",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_return_sequences",
})  # fmt: skip
DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a config that is not field for field: their `names`, and the two ways."""

    names: tuple[str, ...]
    read: Callable[[Json], Json]
    "Their fields -> ours; raises ValueError with the reason where they cannot be honoured."
    write: Callable[[Any], Json]
    "One of our configs -> their fields."


@dataclasses.dataclass(frozen=True)
class Family:
    """A family in Hugging Face's words."""

    model: type
    "The class of our config."
    architecture: str
    model_type: str
    fields: Mapping[str, str]
    "Theirs -> ours, the value being the same."
    weights: Callable[[Any], list[Weight]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    "Of these fields: what is meant by a file without them."
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    "Theirs -> the values that mean what we compute; the first is also what is meant by a file without the field."
    parts: tuple[Part, ...] = ()
    spare: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    "Patterns of the names of tensors that may be there and are not used; {layers} is their number."
    prefix: str = ""
    "What some checkpoints leave out in front of all names."


def read(families: Iterable[Family], found: Json) -> tuple[Family, Any, list[str]]:
    """(family, our config, what is honoured differently, in sentences) of a config.json.

    Raises:
      Refused: the architecture is none of these, or a field means what we do not compute.
    """
    family = _of(families, found)
    given = {**family.defaults, **{name: value for name, value in found.items() if value is not None}}
    _refuse_unknown(family, found)
    for name, values in family.fixed.items():
        if given.get(name, values[0]) not in values:
            raise Refused(
                f"config.json has {name} {given[name]!r}, and llmjax computes {family.model.__name__} with "
                f"{values[0]!r} only: give a checkpoint with that.",
                DATA,
            )
    ours = {}
    for theirs, name in family.fields.items():
        if theirs not in given:
            raise Refused(f"config.json lacks {theirs}, which says {name} of the model: give a whole one.", DATA)
        ours[name] = given[theirs]
    _typed(family, ours)
    for part in family.parts:
        try:
            ours |= part.read(given)
        except (ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as error:
            why = f"lacks {error}" if isinstance(error, KeyError) else f"has {error}"
            raise Refused(
                f"config.json {why}, which llmjax does not compute: give another checkpoint.", DATA
            ) from error
    notes = [f"{name} is {found[name]:g} there; llmjax trains without dropout." for name in DROPOUTS if found.get(name)]
    return family, family.model(**_typed(family, ours)), notes


def _of(families: Iterable[Family], found: Json) -> Family:
    """The family of the config's architecture."""
    families = {family.architecture: family for family in families}
    named = next(iter(found.get("architectures") or [""]))
    family = families.get(named) or next(
        (f for f in families.values() if f.model_type == found.get("model_type")), None
    )
    if family is None or (named and named not in families):
        raise Refused(
            f"config.json is of architecture {named or found.get('model_type')!r}, which llmjax does not know: "
            f"{did_you_mean(str(named), families)}known are {', '.join(sorted(families))}.",
            DATA,
        )
    return family


def _refuse_unknown(family: Family, found: Json) -> None:
    known = {*family.fields, *family.fixed, *(name for part in family.parts for name in part.names), *DROPOUTS}
    unknown = [name for name, value in found.items() if name not in known | WITHOUT_NUMBERS and value is not None]
    if unknown:
        shown = ", ".join(f"{name} {found[name]!r:.40}" for name in unknown[:8])
        raise Refused(
            f"config.json has {shown}, which llmjax does not honour: take out what changes no numbers, or give another "
            f"checkpoint.",
            DATA,
        )


def _typed(family: Family, ours: Json) -> Json:
    """Our fields with their types, as JSON has whole numbers for floats; refuses what is of another."""
    for field in dataclasses.fields(family.model):
        value, kind = ours.get(field.name), field.type
        if field.name not in ours or kind not in (int, float, bool):
            continue
        good = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not good or (kind is not bool and isinstance(value, bool)) or (kind is int and not 0 <= value < 2**31):
            theirs = next((theirs for theirs, name in family.fields.items() if name == field.name), field.name)
            raise Refused(
                f"config.json has {theirs} {value!r:.40}, which is no {kind.__name__}: restore the file.", DATA
            )
        ours[field.name] = kind(value)
    return ours


def write(family: Family, model: Any, dtype: str) -> Json:
    """The config.json of one of our configs.

    Raises:
      Refused: it has something that the family has not.
    """
    theirs = {name: getattr(model, ours) for name, ours in family.fields.items()}
    theirs |= {name: values[0] for name, values in family.fixed.items() if values[0] is not None}
    for part in family.parts:
        theirs |= part.write(model)
    theirs |= dict(architectures=[family.architecture], model_type=family.model_type, torch_dtype=dtype)
    back = read([family], theirs)[1]
    if back != model:
        fields = [f.name for f in dataclasses.fields(model) if getattr(model, f.name) != getattr(back, f.name)]
        raise Refused(
            f"model.{fields[0]} is {getattr(model, fields[0])!r}, which {family.architecture} has no field for."
        )
    return theirs


KEYS = Part(
    ("num_key_value_heads",),
    lambda given: dict(kv_heads=given.get("num_key_value_heads", given["num_attention_heads"])),
    lambda model: dict(num_key_value_heads=model.kv_heads),
)
HEAD = Part(
    ("head_dim",),
    lambda given: dict(head_dim=given.get("head_dim", given["hidden_size"] // given["num_attention_heads"])),
    lambda model: dict(head_dim=model.head_dim),
)


def rope(theta: float) -> Part:
    """Rotary positions, whose theta is this where it is not said."""
    return Part(
        ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
        lambda given: _rope(given, theta),
        lambda model: dict(rope_theta=model.theta, rope_scaling=scaling_of(model.scaling, model.positions)),
    )


def _rope(given: Json, theta: float) -> Json:
    said = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if given.get("partial_rotary_factor", said.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("partial_rotary_factor other than 1")
    theta = said.get("rope_theta", given.get("rope_theta", theta))
    return dict(theta=float(theta), scaling=scaling(said, given.get("max_position_embeddings")))


def scaling(said: Json, positions: int | None) -> Any:
    """What their rope_scaling or rope_parameters are in our words."""
    kind = said.get("rope_type", said.get("type", "default"))
    original = said.get("original_max_position_embeddings") or positions
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(float(said["factor"]))
        case "llama3":
            factors = (float(said[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
            return RopeScaling(*factors, original)
        case "yarn":
            length = said.get("attention_factor") or _length(said)
            fast, slow = float(said.get("beta_fast") or 32), float(said.get("beta_slow") or 1)
            return Yarn(float(said["factor"]), fast, slow, original, length, said.get("truncate", True))
    raise ValueError(f"rotary positions of type {kind!r}")


def _length(said: Json) -> float:
    one, other = (said.get(name) for name in ("mscale", "mscale_all_dim"))
    if not (one and other):
        return 0.0
    return stretched(said["factor"], one) / stretched(said["factor"], other)


def stretched(factor: float, weight: float) -> float:
    """YaRN's length with a weight."""
    return dataclasses.replace(Yarn(), factor=float(factor)).weighted(weight)


def scaling_of(scaling: Any, positions: int) -> Json | None:
    """The inverse of `scaling`."""
    match scaling:
        case None:
            return None
        case LinearScaling(factor):
            return dict(rope_type="linear", factor=factor)
        case RopeScaling(factor, low, high, original):
            return dict(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
                        original_max_position_embeddings=original)  # fmt: skip
        case Yarn(factor, fast, slow, original, length, truncate):
            said = dict(rope_type="yarn", factor=factor, beta_fast=fast, beta_slow=slow, truncate=truncate,
                        original_max_position_embeddings=original)  # fmt: skip
            return said | (dict(attention_factor=length) if length else {})
