"""Published training speeds, each as an experiment of ours, predicted: how far the analytic model can be trusted.

A row gives the shape of a model, the chips, how they were used, and the speed. Its columns are those of the table that
`llmjax plan --published FILE` reads; see `COLUMNS`.
"""

import csv
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmjax import layout as layouts
from llmjax.errors import DATA, Refused
from llmjax.layout import Pipeline
from llmjax.mesh import AXES, Axes, Chip, Cluster, Efficiency
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.models.shapes import LAYER
from llmjax.optim.adamw import AdamW
from llmjax.plan import analytic
from llmjax.plan.work import Again, Method, Work, count
from llmjax.run import Run
from llmjax.train.loss import NextToken

COLUMNS = (
    "id", "system", "model", "params", "layers", "d_model", "ffn", "heads", "kv_heads", "head_dim", "vocab", "hardware",
    "chips", "mesh_or_sharding", "seq_len", "per_device_batch_or_global_batch", "dtype", "remat", "mfu_percent",
    "attention_accounting", "tokens_per_s_per_chip",
)  # fmt: skip
Row = dict[str, str]

# What is computed again, by what a row says of it; the first that is found counts.
REMAT = (
    (r"offload.*\bq, k, v, out", Again(0, 1, 1)),  # offloaded or saved: all but the feed-forward
    (r"q k v recomputed", Again(0.5, 1, 1)),
    (r"qkv_proj_offloaded", Again(0.25, 1, 1)),
    (r"with_context_except_mlp", Again(0, 1, 0)),
    (r"except_mlpwi", Again(0, 1, 1)),
    (r"minimal_flash", Again(0, 0, 0)),
    (r"minimal|selective|attention only", Again(0, 0, 1)),
    (r"full|every block|yes|layer input", Again(1, 1, 1)),
    (r"", Again(0, 0, 0)),
)
UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
TORCH = r"Megatron|PyTorch|torchtitan|llm-foundry|lit-gpt|Meta"


@dataclasses.dataclass(frozen=True)
class Published:
    """A row as an experiment of ours."""

    name: str
    run: Run
    sizes: Axes
    method: Method
    per_device: float
    "Published tokens a second on one JAX device."

    @property
    def step(self) -> float:
        """Published seconds of a step."""
        return self.run.batch * self.run.sequence / (self.per_device * math.prod(self.sizes.sizes()))

    @functools.cached_property
    def work(self) -> Work:
        return count(self.run, self.sizes, self.run.accumulate, self.method)

    def predicted(self, efficiency: Efficiency | None = None) -> analytic.Time:
        """Seconds of a step by the analytic model, with the chip's own constants or these."""
        cluster = self.run.mesh
        if efficiency:
            cluster = dataclasses.replace(cluster, chip=dataclasses.replace(cluster.chip, efficiency=efficiency))
        return analytic.predict(self.work, cluster, self.sizes)

    def error(self, efficiency: Efficiency | None = None) -> float:
        """Predicted over published time, less one."""
        return self.predicted(efficiency).step / self.step - 1


def read(path: str | Path, chips: Sequence[Chip]) -> tuple[list[Published], dict[str, str]]:
    """(rows as experiments, the reason for each row that is left out, by its id).

    Raises:
      Refused: the file cannot be read or lacks a column.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read ({error}): give a CSV file of published runs.", DATA) from None
    missing = [column for column in COLUMNS if not rows or column not in rows[0]]
    if missing:
        raise Refused(f"{path} has no column {missing[0]}: give a CSV file with {', '.join(COLUMNS)}.", DATA)
    found, left_out = [], {}
    for row in rows:
        try:
            found.append(experiment(row, chips))
        except Refused as why:
            left_out[row["id"]] = str(why)
        except ValueError as why:
            left_out[row["id"]] = f"a number in it cannot be read: {why}"
    if not found:
        raise Refused(f"{path} has no row that can be predicted; of the first: {next(iter(left_out.values()))}.", DATA)
    return found, left_out


def experiment(row: Row, chips: Sequence[Chip]) -> Published:
    """A row as an experiment.

    Raises:
      Refused: the row says too little, or tells of something that this trainer's blocks cannot express.
    """
    if re.search(r"MoE|expert|top-\d", row["model"]):
        raise Refused("a mixture of experts")
    if re.search(r"KV shared|double-wide|global head_dim", row["model"]):
        raise Refused("its layers are not all alike")
    if "eager" in row["mesh_or_sharding"]:
        raise Refused("not compiled")
    cluster = _cluster(row, chips)
    sizes = _axes(row, cluster)
    model, sequence = _model(row), int(row["seq_len"])
    batch, accumulate = _batch(row, cluster, sizes)
    again = next(again for pattern, again in REMAT if re.search(pattern, row["remat"]))
    again = dataclasses.replace(again, last=bool(re.search(TORCH, row["system"])))
    run = Run(
        model=model, data=None, optimizer=AdamW(lr=1e-4), loss=NextToken(), mesh=cluster, axes=sizes,
        layout=_layout(row, sizes), pipeline=_pipeline(row, batch, sizes), batch=batch, sequence=sequence,
        accumulate=accumulate, attention="reference", name=row["id"],
    )  # fmt: skip
    method = Method(
        again=again,
        fused="fp16" not in row["dtype"],
        score_bytes=2,
        loss_bytes=10,
        window=_window(row, sequence),
        faster=2 if re.search("int8|fp8", row["dtype"]) else 1,
        gradient_bytes=2 if "bf16" in row["dtype"] and "fp32 w" not in row["dtype"] else 4,
    )
    peak = cluster.chip.flops * cluster.chips / int(row["chips"])
    return Published(row["id"], run, sizes, method, _speed(row, model, peak) * int(row["chips"]) / cluster.chips)


def _cluster(row: Row, chips: Sequence[Chip]) -> Cluster:
    text = row["hardware"].replace(" ", "")
    if "W limit" in row["hardware"]:
        raise Refused(f"another card: {row['hardware']}")
    chip = next((chip for chip in chips if chip.flops and chip.name.replace(" ", "") in text), None)
    if chip is None:
        raise Refused(f"no facts of this chip: {row['hardware']}")
    slices = re.search(r"\((\d+)(?:x v| pods)", row["hardware"])
    topology = re.search(r"\((\d+x\d+(?:x\d+)?)\)", row["mesh_or_sharding"])
    devices = int(row["chips"]) * chip.devices
    return Cluster(row["id"], chip, devices, int(slices[1]) if slices else 1, topology[1] if topology else "")


def _axes(row: Row, cluster: Cluster) -> Axes:
    """The axes' sizes; devices that no axis is said to have go to fsdp, or to data if nothing is fully sharded."""
    text, known = row["mesh_or_sharding"], dict(data=1, fsdp=1, tensor=1, stage=1, context=1)
    if not text:
        raise Refused("its mesh is not known")
    words = {"dp": "data", "fsdp": "fsdp", "fsdp_transpose": "fsdp", "tp": "tensor", "model": "tensor", "pp": "stage",
             "cp": "context"}  # fmt: skip
    for word, size in re.findall(r"\b(fsdp_transpose|fsdp|dp|tp|pp|cp|model) (\d+)", text):
        known[words[word]] *= int(size)
    if re.search(r"dp \d+ \(fsdp\)", text):  # a data axis over which everything is sharded
        known["fsdp"], known["data"] = known["fsdp"] * known["data"], 1
    rest = cluster.chips / math.prod(known.values())
    if rest != int(rest):
        raise Refused(f"its mesh ({text}) does not multiply to {cluster.chips} devices")
    known["fsdp" if re.search("fsdp|ZeRO", text) else "data"] *= int(rest)
    return Axes(**{axis: known.get(axis, 1) for axis in AXES})


def _layout(row: Row, sizes: Axes) -> layouts.Layout:
    reduced = "all-reduce" in row["mesh_or_sharding"]  # tensor parallelism without sequence parallelism beside it
    kinds = [
        (sizes.fsdp > 1, layouts.fsdp),
        (sizes.tensor > 1, layouts.tp),
        (sizes.tensor > 1 and not reduced, layouts.sp),
        (sizes.context > 1, layouts.cp),
        (sizes.stage > 1, layouts.pp),
    ]
    return functools.reduce(layouts.Layout.__or__, (kind for used, kind in kinds if used), layouts.dp)


def _batch(row: Row, cluster: Cluster, sizes: Axes) -> tuple[int, int]:
    """(sequences of a step on all devices, microbatches)."""
    text = row["per_device_batch_or_global_batch"]
    everything = f"{text}; {row['mesh_or_sharding']}"
    whole = re.search(r"global (\d+)", text) or re.match(r"(\d+) =", text)
    accumulate = re.search(r"x (\d+) accumulation|accum (\d+)|(\d+) microbatches", everything)
    accumulate = int(next(filter(None, accumulate.groups()))) if accumulate else 1
    groups = sizes.data * sizes.fsdp
    each = re.search(r"(\d+) per dp rank", text)
    per_device = re.search(r"(\d+)/(?:chip|GPU|device)", text)
    if whole:
        batch = int(whole[1])
    elif each:
        batch = int(each[1]) * groups
    elif per_device:
        batch = int(per_device[1]) * int(row["chips"]) * accumulate
    else:
        raise Refused("its batch is not known")
    if micro := re.search(r"micro (\d+)", everything):
        accumulate = max(1, batch // groups // int(micro[1]))
    return batch, accumulate if sizes.stage == 1 else 1


def _pipeline(row: Row, batch: int, sizes: Axes) -> Pipeline:
    laps = re.search(r"(?:interleave|vp) (\d+)", row["mesh_or_sharding"])
    micro = re.search(r"micro (\d+)", row["per_device_batch_or_global_batch"] + row["mesh_or_sharding"])
    rows = batch // (sizes.data * sizes.fsdp) // (int(micro[1]) if micro else 1)
    laps = int(laps[1]) if laps else 1
    return Pipeline(schedule="circular" if laps > 1 else "gpipe", microbatches=rows, repeats=laps)


def _model(row: Row) -> Any:
    """Our block of the row's shape: with three matrices in the feed-forward, or two, whichever has its parameters."""
    names = dict(layers="layers", width="d_model", heads="heads", head_dim="head_dim", ff="ffn", vocab="vocab")
    try:
        shape = {field: int(row[column]) for field, column in names.items()} | {"positions": int(row["seq_len"])}
        number, unit = re.match(r"([\d.]+(?:e\d+)?) ?([TBMK]?)", row["params"]).groups()
        kv_heads, said = int(row["kv_heads"]), float(number) * UNITS[unit]
    except (ValueError, AttributeError):
        raise Refused("its shape is not known") from None
    choices = [Llama(**shape, kv_heads=kv_heads, tied=tied) for tied in (False, True)]
    found = [(abs(parameters(model) - said), model) for model in choices]
    if kv_heads == shape["heads"]:  # its head may be its own as well: as many products, more parameters
        plain, table = GPT2(**shape), shape["vocab"] * shape["width"]
        found += [(abs(parameters(plain) + more - said), plain) for more in (0, table)]
    return min(found, key=lambda each: each[0])[1]


def parameters(model: Any) -> int:
    """Numbers in a model's matrices."""
    sizes = model.sizes()
    return sum(
        (model.layers if module in LAYER else 1) * sum(m.size(sizes) for m in matrices)
        for module, matrices in model.matrices().items()
    )


def _window(row: Row, sequence: int) -> float:
    """What sliding windows leave of the causal triangle, on average over the layers."""
    if pattern := re.search(r"window pattern (\w+)", row["model"]):
        short = pattern[1].count("S") / len(pattern[1])
        return 1 - short / 4  # half a context wide: three quarters of the triangle
    ratio = re.search(r"(\d+) local : (\d+) global, window (\d+)", row["model"])
    if not ratio:
        return 1.0
    local, whole, width = map(int, ratio.groups())
    part = min(1.0, width / sequence)
    return (whole + local * (2 * part - part**2)) / (local + whole)


def _speed(row: Row, model: Any, peak: float) -> float:
    """Published tokens a second on one chip."""
    if row["tokens_per_s_per_chip"]:
        return float(row["tokens_per_s_per_chip"])
    if row["mfu_percent"] and row["attention_accounting"] in ("C", "F"):
        flops = model.flops_per_token(int(row["seq_len"]))["CF".index(row["attention_accounting"])]
        return float(row["mfu_percent"]) / 100 * peak / flops
    raise Refused("its speed is not given in tokens")
