"""A search finds every legal mesh, ranks them, and says why where there is none."""

import dataclasses
import importlib
import math

import pytest

from llmjax import names
from llmjax.checks import check
from llmjax.errors import Refused
from llmjax.layout import Pipeline
from llmjax.mesh import Axes
from llmjax.plan import search, slices
from llmjax.plan.estimate import estimate
from meshes import h100x8, v5p_64, v5p_128_x2


def run_of(name: str, **changes):
    run = importlib.import_module(f"experiments.{name}").run
    return dataclasses.replace(run, name=name, **changes)


LLAMA, MIXTRAL = run_of("llama3_8b_v5p_64"), run_of("stdlib_moe", batch=64)


def test_every_candidate_is_legal_uses_all_chips_and_no_two_are_alike():
    found = list(search.candidates(LLAMA, v5p_64.cluster))
    for run in found:
        check(run, run.axes, 1)
        assert math.prod(run.axes.sizes()) == 64
        assert {axis for axis, n in dataclasses.asdict(run.axes).items() if n > 1} - {
            "data",
            "fsdp",
        } <= run.layout.axes()
    assert len({(run.axes, run.layout.name, run.pipeline) for run in found}) == len(found) > 1000


def test_candidates_are_of_every_kind_of_parallelism():
    kinds = {part for run in search.candidates(MIXTRAL, v5p_64.cluster) for part in run.layout.name.split("_")}
    assert kinds == {"dp", "fsdp", "tp", "sp", "cp", "ring", "ep", "pp", "vp"}
    schedules = {run.pipeline.schedule for run in search.candidates(LLAMA, v5p_64.cluster)}
    assert schedules == {"gpipe", "circular", "1f1b"}


def test_only_the_data_axis_spans_slices():
    assert all(run.axes.data % 2 == 0 for run in search.candidates(LLAMA, v5p_128_x2.cluster))


def test_the_ranking_is_that_of_looking_at_every_mesh():
    four = slices.cluster("h100", 4)
    ranking = search.ranked(LLAMA, four, 5)
    every = filter(None, map(search.settle, search.candidates(LLAMA, four)))
    fastest = sorted(each.time.step for each in every)[:5]
    assert [each.time.step for each in ranking.best] == pytest.approx(fastest)
    assert ranking.looked < ranking.legal


def test_what_is_found_fits_and_is_what_estimate_says_of_it():
    for found in search.ranked(LLAMA, h100x8.cluster, 3).best:
        assert found.fits
        again = estimate(found.run)
        assert (again.time, again.memory, again.accumulate) == (found.time, found.memory, found.accumulate)


def test_less_is_computed_again_where_there_is_more_memory():
    roomy = dataclasses.replace(
        h100x8.cluster, chip=dataclasses.replace(h100x8.cluster.chip, memory=100 * h100x8.cluster.chip.memory)
    )
    best = search.ranked(LLAMA, roomy, 1).best[0]
    assert (best.run.remat.policy, best.accumulate) == ("none", 1)
    assert best.time.step < search.ranked(LLAMA, h100x8.cluster, 1).best[0].time.step


def test_where_nothing_can_be_cut_it_says_what_is_in_the_way():
    with pytest.raises(Refused, match=r"no mesh of 64 chips can be cut for odd, in \d+ of \d+ tries because of batch"):
        search.ranked(dataclasses.replace(odd(), batch=1), v5p_64.cluster)


def odd():
    """A model and a batch of odd sizes."""
    model = dataclasses.replace(LLAMA.model, layers=7, heads=9, kv_heads=9, ff=15, vocab=33, width=9 * 128)
    return dataclasses.replace(LLAMA, model=model, batch=3, sequence=27, name="odd")


def test_where_nothing_fits_it_says_how_much_is_needed():
    with pytest.raises(Refused, match=r"mesh is h100x2, where big needs at least \S+ \wiB of a device's 74.5 GiB"):
        search.ranked(dataclasses.replace(run_of("llama31_405b_v5p_512"), name="big"), slices.cluster("h100", 2))


def test_a_pipeline_is_tried_with_few_and_with_many_microbatches():
    assert {p.microbatches for p in search.pipelines(LLAMA, Axes(1, 4, 1, 1, 1, 1))} == {8, 16}
    assert search.pipelines(LLAMA, Axes(4, 1, 1, 1, 1, 1)) == [Pipeline()]


def test_rank_correlation_is_spearmans():
    assert search.rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert search.rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert search.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert search.rank_correlation([1, 1, 2], [1, 1, 2]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "count", "name", "slices_", "topology"),
    [
        ("v5p", 64, "v5p_64", 1, "4x4x4"),
        ("V5P", 128, "v5p_128", 1, "4x4x8"),
        ("v6e", 256, "v6e_256", 1, "16x16"),
        ("v6e", 1024, "v6e_256_x4", 4, "16x16"),
        ("tpu7x", 64, "tpu7x_64", 1, "4x4x4"),
        ("v5p", 8192, "v5p_4096_x2", 2, "16x16x16"),
        ("h100", 64, "h100x64", 1, ""),
    ],
)
def test_chips_without_a_mesh_file_come_in_the_most_cubic_topology(kind, count, name, slices_, topology):
    made = slices.cluster(kind, count)
    assert (made.name, made.slices, made.topology) == (name, slices_, topology)
    assert made.chips == (2 if kind == "tpu7x" else 1) * count


@pytest.mark.parametrize(
    ("kind", "count", "words"),
    [
        ("v5p", 63, "chips is 63, which no TPU v5p topology has: give 32 or 64"),
        ("v6e", 300, "chips is 300, which no TPU v6e topology has: give 256"),
        ("h100", 12, "chips is 12, but H100s come in nodes of 8: give 8 or 16"),
        ("v5", 64, "there is no chip named 'v5': did you mean v5"),
        ("v5p", 0, "chips is 0, which no TPU v5p topology has: give 1"),
    ],
)
def test_a_number_of_chips_that_cannot_be_had_is_answered_with_the_near_ones(kind, count, words):
    with pytest.raises(Refused) as refusal:
        slices.cluster(kind, count)
    assert words in str(refusal.value)


def test_a_mesh_is_written_as_the_others_are_and_is_the_cluster_again(tmp_path):
    made = slices.cluster("v6e", 1024)
    slices.write(tmp_path / "mine.py", made)
    assert names.load_file(tmp_path / "mine.py", "cluster") == dataclasses.replace(made, name="mine")
    assert (tmp_path / "mine.py").read_text().startswith('"""4 slices of 256 TPU v6e chips, 16x16."""\n')
    with pytest.raises(Refused, match="which exists: name another file, or delete it"):
        slices.write(tmp_path / "mine.py", made)
    with pytest.raises(Refused, match="name a Python file, such as meshes"):
        slices.write(tmp_path / "mine.txt", made)
