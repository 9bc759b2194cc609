"""The analytic model predicts what others have published."""

import csv
import dataclasses
from pathlib import Path

import pytest

from llmjax import names
from llmjax.errors import Refused
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.plan import fit, published

FILE = Path(__file__).parent / "published_runs.csv"
CHIPS = names.load("meshes", "local", "cluster").known


@pytest.fixture(scope="module")
def rows():
    return published.read(FILE, CHIPS)[0]


def test_step_times_are_within_ten_percent_on_average_and_nine_in_ten_rows_within_twenty(rows):
    found = fit.accuracy(row.error() for row in rows)
    assert found.rows >= 80
    assert found.mean <= 0.10
    assert found.within >= 0.90


def test_every_kind_of_chip_is_covered(rows):
    covered = {row.run.mesh.chip.name for row in rows}
    assert {"TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU 7x", "A100", "H100", "H200"} <= covered


def test_constants_fitted_on_half_of_a_family_predict_the_other_half(rows):
    for family, members in fit.families(rows).items():
        assert fit.held_out(members) <= 0.12, family


def test_the_constants_of_the_chips_are_those_that_fit(rows):
    """To the two or three digits that they are written with."""
    for family, members in fit.families(rows).items():
        best, written = fit.fit(members), members[0].run.mesh.chip.efficiency
        assert fit._misfit(members, written) <= fit._misfit(members, best) + 0.004, family


def test_every_row_is_predicted_or_left_out_with_a_reason(rows):
    found, left_out = published.read(FILE, CHIPS)
    with FILE.open() as file:
        ids = {row["id"] for row in csv.DictReader(file)}
    assert {row.name for row in found} | set(left_out) == ids
    assert all(left_out.values())
    assert "a mixture of experts" in left_out["mt-v5p-mixtral-8x7b"]


def row(**changes):
    with FILE.open() as file:
        first = next(csv.DictReader(file))
    return first | changes


def test_a_row_becomes_an_experiment_of_its_shape_mesh_and_batch():
    one = published.experiment(row(), CHIPS)
    assert (one.run.model.layers, one.run.model.width, one.run.batch, one.run.sequence) == (32, 10240, 512, 2048)
    assert (one.sizes.fsdp, one.sizes.tensor) == (16, 4)
    assert one.step == pytest.approx(512 * 2048 / (1652 * 64))


@pytest.mark.parametrize(
    ("text", "batch", "accumulate"),
    [
        ("8/chip", 512, 1),
        ("global 256", 256, 1),
        ("64 = 16 microbatches of 4", 64, 16),
        ("micro 4/GPU x 2 accumulation (global 512)", 512, 8),
        ("2/GPU x 8 accumulation", 1024, 8),
        ("16 per dp rank", 256, 1),
    ],
)
def test_batches_are_read_in_every_way_that_rows_give_them(text, batch, accumulate):
    one = published.experiment(row(per_device_batch_or_global_batch=text), CHIPS)
    assert (one.run.batch, one.run.accumulate) == (batch, accumulate)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(mesh_or_sharding=""), "mesh is not known"),
        (dict(mesh_or_sharding="ICI fsdp 48"), "does not multiply to 64 devices"),
        (dict(hardware="Cerebras WSE"), "no facts of this chip"),
        (dict(layers="?"), "shape is not known"),
        (dict(params="many"), "shape is not known"),
        (dict(per_device_batch_or_global_batch="?"), "batch is not known"),
        (dict(tokens_per_s_per_chip="", mfu_percent=""), "speed is not given"),
    ],
)
def test_a_row_that_says_too_little_is_left_out_with_the_reason(changes, reason):
    with pytest.raises(Refused, match=reason):
        published.experiment(row(**changes), CHIPS)


def test_a_file_that_is_no_table_of_runs_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(Refused, match="has no column id"):
        published.read(tmp_path / "runs.csv", CHIPS)
    with pytest.raises(Refused, match="cannot be read"):
        published.read(tmp_path / "none.csv", CHIPS)


@pytest.mark.parametrize("said", ["8.03e9", "8.03B", "8030M (dense)"])
def test_the_number_of_parameters_tells_a_gated_feed_forward_from_a_plain_one(said):
    llama = dict(d_model="4096", ffn="14336", heads="32", kv_heads="8", head_dim="128", vocab="128256", layers="32")
    assert isinstance(published.experiment(row(params=said, **llama), CHIPS).run.model, Llama)
    assert isinstance(published.experiment(row(), CHIPS).run.model, GPT2)


def test_a_number_that_cannot_be_read_leaves_its_row_out_and_no_other(tmp_path):
    text = FILE.read_text().replace("TPU v5p (1x v5p-128),64,", "TPU v5p (1x v5p-128),sixty-four,", 1)
    (tmp_path / "runs.csv").write_text(text)
    found, left_out = published.read(tmp_path / "runs.csv", CHIPS)
    assert "a number in it cannot be read" in left_out["mt-v5p-32b-1x"]
    assert len(found) == len(published.read(FILE, CHIPS)[0]) - 1


def test_sliding_windows_leave_the_part_of_the_triangle_that_they_cover():
    one = published.experiment(row(model="X (1 local : 1 global, window 1024)"), CHIPS)
    assert one.method.window == pytest.approx((1 + 0.75) / 2)  # of T = 2048 a window of half leaves 3/4


def test_quantised_products_take_half_the_time(rows):
    one = published.experiment(row(), CHIPS)
    half = dataclasses.replace(one, method=dataclasses.replace(one.method, faster=2))
    assert half.predicted().matmul == pytest.approx(one.predicted().matmul / 2)
