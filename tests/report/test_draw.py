"""`llmjax draw`: a page for every experiment on every mesh that it types on, whole, escaped and of no other file."""

import dataclasses
import html.parser
import re
import sys
from pathlib import Path

import pytest
from browser import browser, found

import experiments
from llmjax import cli, names
from llmjax import layout as layouts
from llmjax.commands.draw import Options, drawing
from llmjax.commands.show import on_mesh
from llmjax.errors import USAGE, Refused
from llmjax.mesh import AXES, Axes
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.processes import Processes
from llmjax.report.drawing import html as page_of
from llmjax.report.elements import Markup, tag
from llmjax.report.steps import cells, idle
from llmjax.run import Pipeline, load
from llmjax.train.display import Display

NAMES = [path.stem for path in sorted(Path(experiments.__path__[0]).glob("*.py")) if path.stem != "__init__"]
TINY = Llama(vocab=64, layers=4, width=512, heads=16, kv_heads=16, head_dim=8, ff=512, positions=64)
RUN = dataclasses.replace(load("stdlib_tiny"), model=TINY, batch=1024, sequence=32)
VOID = {"meta", "input", "br"}


class Reader(html.parser.HTMLParser):
    """Checks that elements are closed in order, and keeps what they are."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.seen.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text.append(data)


def drawn(run) -> tuple[str, Reader]:
    program = on_mesh(run, Processes())
    text = page_of(drawing(program, Options(), Display(quiet=True))[0])
    return text, Reader(text)


def on(mesh: str, layout: str = "fsdp", **fields):
    cluster = names.load("meshes", mesh, "cluster")
    return dataclasses.replace(RUN, mesh=cluster, layout=layouts.preset(layout), **fields)


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_drawn_on_its_own_mesh(name):
    run = load(name)
    text, found = drawn(dataclasses.replace(run, batch=64) if run.mesh.chips is None else run)
    chips = [attributes for kind, attributes in found.seen if attributes.get("class") == "chip"]
    assert len(chips) == (run.mesh.chips or 8)
    assert f"<h1>{run.name} on {run.mesh.name}</h1>" in text


@pytest.mark.parametrize("mesh", [name for name in names.names("meshes") if name != "local"])
def test_a_model_is_drawn_on_every_mesh(mesh):
    _, found = drawn(on(mesh, "fsdp_tp" if "cpu" in mesh else "fsdp"))
    said = " ".join(found.text)
    assert "What becomes of one matrix" in said and "Where every array lives" in said
    outlines = [a for kind, a in found.seen if a.get("class") == "mine"]
    assert len(outlines) >= 9 and all(float(a["width"]) > 0 and float(a["height"]) > 0 for a in outlines)


@pytest.mark.parametrize("layout", ["dp", "tp", "fsdp_tp_sp", "cp", "ring", "fsdp_pp", "pp_vp"])
def test_every_kind_of_parallelism_is_drawn(layout):
    fields = dict(pipeline=Pipeline("circular")) if "pp" in layout else {}
    _, found = drawn(on("v5p_64", layout, **fields))
    said = " ".join(found.text)
    assert ("The pipeline" in said) == ("pp" in layout)
    titles = re.findall(r"[1-5]  ([\w-]+)", said)
    assert titles[1] == ("All-gather" if "fsdp" in layout else "In")
    assert titles[4] == ("Reduce-scatter" if "fsdp" in layout else "All-reduce")


def test_experts_are_drawn():
    model = Mixtral(vocab=64, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, experts=8, positions=64)
    _, found = drawn(on("cpu8", "ep", model=model))
    assert "E over expert 2" in " ".join(found.text)


def test_what_a_run_is_called_is_escaped():
    bad = '<script>alert("x")</script>&'
    text, found = drawn(dataclasses.replace(on("cpu8"), name=bad))
    assert "<script>alert" not in text and any(bad in data for data in found.text)
    assert tag("p", "<b>", Markup("<i>x</i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i>x</i></p>'


def test_the_page_asks_for_nothing_from_anywhere():
    text, found = drawn(on("cpu8"))
    assert "http:" not in text and "https:" not in text and "url(" not in text.replace("url(#partial)", "")
    assert not [a for _, a in found.seen if "src" in a or "href" in a]
    (policy,) = [a["content"] for _, a in found.seen if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


FIGURES = {  # of llmjax.models.pipeline, three stages and four microbatches
    "gpipe": ["F0 F1 F2 F3 . . . . B3 B2 B1 B0", ". F0 F1 F2 F3 . . B3 B2 B1 B0 .", ". . F0 F1 F2 F3 B3 B2 B1 B0 . ."],
    "1f1b": ["F0 F1 F2 F3 B0 B1 B2 B3", ". F0 F1 F2B0 F3B1 B2 B3 .", ". . F0B0 F1B1 F2B2 F3B3 . ."],
}


@pytest.mark.parametrize("schedule", FIGURES)
def test_the_grid_of_a_schedule_is_what_the_model_draws(schedule):
    rows = [
        " ".join("".join(f"{what}{n}" for what, n, _ in cell) or "." for cell in row)
        for row in cells(schedule, 3, 4, 1)
    ]
    assert rows == FIGURES[schedule]


@pytest.mark.parametrize(("schedule", "laps"), [("gpipe", 1), ("1f1b", 1), ("circular", 2), ("circular", 3)])
def test_the_time_that_a_stage_waits_is_the_known_one(schedule, laps):
    assert idle(cells(schedule, 4, 8, laps), schedule) == pytest.approx(3 / (laps * 8 + 3))


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["llmjax", "draw", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr()


def test_the_command_writes_its_page_and_says_where(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, said = command(monkeypatch, capsys, "llama3_8b_v5p_64")
    assert (code, said.err) == (0, "")
    assert said.out.startswith("Wrote llama3_8b_v5p_64_on_v5p_64.html: 64 devices, 12 weights, 957 MiB of them on each")
    assert [path.name for path in tmp_path.iterdir()] == ["llama3_8b_v5p_64_on_v5p_64.html"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing_such"], "there is no experiment named 'nothing_such'"),
        (["llama3_8b_v5p_64", "--mesh", "v5p_65"], "there is no mesh named 'v5p_65': did you mean"),
        (["llama3_8b_v5p_64", "--axes.fsdp", "48", "--axes.data", "0"], "axes multiply to 48"),
        (["llama3_8b_v5p_64", "--out", "no/folder/x.html"], "is no folder: make it, or choose another file"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(monkeypatch, capsys, words, sentence):
    code, said = command(monkeypatch, capsys, *words)
    assert code in (2, 74) and said.err.count("\n") <= 2 and "Traceback" not in said.err
    assert sentence in said.err


@pytest.mark.skipif(found() is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_sideways_scrolling_and_moves_the_outlines(tmp_path):
    text, _ = drawn(on("v5p_64", "fsdp_pp"))
    (tmp_path / "page.html").write_text(text)
    with browser(found()) as tab:
        for width, scheme in ((1100, "light"), (1100, "dark"), (390, "light"), (390, "dark")):
            tab.open(tmp_path / "page.html", width, 900, scheme)
            assert tab.js("document.documentElement.scrollWidth") == width
            before = tab.js(OUTLINE)
            tab.js("slider.value = 63; slider.dispatchEvent(new Event('input'))")
            assert tab.js(OUTLINE) != before
            assert tab.js("document.getElementById('name').value").startswith("device 63: ")
            assert tab.console == [] and len(tab.asked) == 1


OUTLINE = "document.querySelector('rect.mine').getAttribute('y')"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_drawn_on_every_mesh_over_which_it_can_be_cut(name):
    meshes = [mesh for mesh in names.names("meshes") if mesh != "local"]
    refused = []
    for mesh in meshes:
        cluster = names.load("meshes", mesh, "cluster")
        run = dataclasses.replace(load(name), mesh=cluster, axes=Axes(), accumulate=1, batch=8 * cluster.chips)
        try:
            _, found = drawn(run)
        except Refused as refusal:
            assert refusal.code == USAGE and re.fullmatch(r"[^\n]+: [^\n]+\.", str(refusal)), refusal
            refused.append(mesh)
            continue
        assert len([a for _, a in found.seen if a.get("class") == "chip"]) == cluster.chips
        assert all(len(a["data-at"].split(",")) == len(AXES) for _, a in found.seen if a.get("class") == "chip")
    assert len(refused) < len(meshes), refused
