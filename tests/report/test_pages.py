"""The report and the view of the terminal say of any run directory what they can, and nothing of it does harm."""

import html.parser
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from browser import browser, found
from rich.console import Console

from llmjax import cli
from llmjax.commands.report import Options as ReportOptions
from llmjax.commands.report import report
from llmjax.commands.watch import Options as WatchOptions
from llmjax.commands.watch import watch
from llmjax.report import series
from llmjax.report.page import page
from llmjax.report.record import read
from llmjax.run import to_json

EVIL = "</script><script>alert(1)</script><b>\x1b[31m&\"'"
BEGAN = 1_700_000_000.0


def begin(folder: Path, steps: int = 60, *, name: str = "mine", lr: float = 1e-3) -> Path:
    """A run directory with a restart, a fault, evaluations, memory, a plan and samples, which never finished."""
    run = to_json(cli.load("stdlib_tiny")) | dict(steps=2 * steps, name=name)
    run["optimizer"]["lr"] = lr
    folder.mkdir(parents=True)
    env = dict(
        device_kind="cpu", device_count=8, layout="fsdp", parameters=10**7, flops_per_token=6e7, peak=None,
        bytes_per_device=dict(parameters=2**20, optimizer=2**21),
        planned=dict(step=0.5, memory=dict(parameters=2**20, optimizer=2**21)),
    )  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "env.json").write_text(json.dumps(env))
    half = steps // 2
    lines = []
    for step in range(1, steps + 1):
        elapsed = 5 + (step if step <= half else step - half)
        lines.append(
            dict(step=step, loss=8 * step**-0.2, grad_norm=1.0, lr=lr, tokens=2048 * step, tokens_per_s=2048.0,
                 step_ms=1000.0 + step, mfu=None, data_wait_ms=0.1, elapsed=elapsed)
            | (dict(compiled=True) if step in (1, half + 1) else {})
        )  # fmt: skip
        if step % 10 == 0:
            lines.append(
                dict(step=step, eval_loss=8 * step**-0.2, bits_per_byte=3.0, eval_targets=9.0, elapsed=elapsed)
            )
    spent = dict(start=2.0, compile=2.0, restore=1.0, save=0, data=0, evaluate=0, steps=half, other=0)
    second = BEGAN + half + 60
    events = [
        dict(kind="start", time=BEGAN + 5, elapsed=5.0, process_began=BEGAN, step=0),
        dict(kind="spent", time=BEGAN + 5 + half, elapsed=5.0 + half, **spent, host_bytes=2**30, device_bytes=2**29),
        dict(kind="fault", time=BEGAN + 20, elapsed=20.0, step=10, reason="not finite"),
        dict(kind="start", time=second + 5, elapsed=5.0, process_began=second, step=half),
        dict(kind="spent", time=second + 5 + half, elapsed=5.0 + half, **spent, host_bytes=2**31, device_bytes=2**30),
    ]
    write(folder / "metrics.jsonl", lines)
    write(folder / "events.jsonl", events)
    (folder / "samples").mkdir()
    (folder / "samples" / "60.json").write_text(json.dumps([dict(prompt="def ", text="main():")]))
    (folder / "processes").mkdir()
    (folder / "processes" / "0.json").write_text(
        json.dumps(dict(process=0, host="here", pid=1, step=steps, phase="train", time=BEGAN))
    )
    return folder


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def seen(folder: Path, *others: Path) -> str:
    """What `llmjax watch` prints of it, where there is no terminal."""
    console = Console(width=100, record=True, file=(folder.parent / "nowhere").open("w"))
    assert watch(WatchOptions((str(folder), *map(str, others))), console) == 0
    return console.export_text()


def test_time_and_flops_are_those_of_the_run_over_its_starts_and_what_was_planned_is_beside_what_was_measured(tmp_path):
    record = read(begin(tmp_path / "mine"))
    assert record.state == "gone" and record.last == 60 and not record.notes
    assert record.steps["time"][0] == 6 and record.steps["time"][30] == 90 + 6  # the second start began 90 s later
    assert record.steps["flops"][9] == 10 * 2048 * 6e7 and record.evals["flops"][0] == 10 * 2048 * 6e7
    shown = page([record])
    assert "mine: step</td>" in shown and "500.0 ms" in shown and "3 MiB" in shown and "fault at step 10" in shown
    assert "<b>def </b>main():" in shown and shown.count("x-flops") > 5
    out = seen(record.folder)
    assert "step 60/120" in out and "ended without a word" in out and "fault at step 10: not finite" in out
    assert re.search("[\u2801-\u28ff]{20}", out) and "here" in out


def test_several_runs_are_compared_with_what_differs_in_their_config(tmp_path):
    a, b = begin(tmp_path / "a", name="a"), begin(tmp_path / "b", name="b", lr=5e-4)
    shown = page([read(a), read(b)])
    differs = shown[shown.index("<h2>Config") : shown.index("<details><summary>All")]
    assert re.findall(r"<tr><td><code>([^<]*)</code>", differs) == ["optimizer.lr"]
    assert 'class="raw c0 ' in shown and 'class="raw c1 ' in shown
    assert seen(a, b).count("step 60/120") == 2


class Tags(html.parser.HTMLParser):
    """What a page is made of, and where it leads."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.leads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.leads += [v for k, v in attrs if k in ("src", "href") or k.startswith("on")]


def test_all_that_a_run_holds_is_escaped_and_steers_no_terminal(tmp_path):
    folder = begin(tmp_path / "evil<b>")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"name": EVIL, EVIL: EVIL, "model": {"is": EVIL}}))
    (folder / "samples" / "60.json").write_text(json.dumps([dict(prompt=EVIL, text=EVIL)]))
    (folder / "env.json").write_text(json.dumps(dict(device_kind=EVIL, layout=EVIL, device_count=EVIL)))
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(dict(kind=EVIL, time=EVIL, reason=EVIL, step=EVIL)) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, "loss": EVIL, EVIL: 1}) + "\n")
    (folder / "processes" / "0.json").write_text(json.dumps(dict(process=0, host=EVIL, pid=EVIL, step=1, phase=EVIL)))
    tags = Tags(page([read(folder)]))
    assert tags.tags.count("script") == 2 and tags.leads == ["data:,"]
    assert "b" not in tags.tags[tags.tags.index("h1") : tags.tags.index("main")]
    assert "\x1b" not in seen(folder)


def damaged(kind: str, folder: Path) -> None:
    """Does to a run directory what its name says."""
    metrics, events = folder / "metrics.jsonl", folder / "events.jsonl"
    match kind:
        case "torn":
            metrics.write_bytes(metrics.read_bytes()[:-40])
            events.write_bytes(events.read_bytes()[:-40])
        case "noise":
            for path in folder.rglob("*.json*"):
                path.write_bytes(bytes(range(256)) * 9)
        case "other JSON":
            for path in folder.rglob("*.json*"):
                path.write_text('[1]\n{"step": 1}\n{"step": "x", "kind": 3}\n{"kind": "start"}\nnull\n')
        case "no numbers":
            write(metrics, [dict(step=1, loss=None), dict(step=2, loss="x", tokens=[1]), dict(step=3, loss=True)])
        case "huge numbers":
            write(
                metrics, [dict(step=s, loss=10.0 ** (300 * (s % 2)), tokens=10**400, step_ms=-1e299) for s in range(9)]
            )
        case "not finite":
            metrics.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": -3, "loss": 1}\n')
        case "old":
            write(events, [dict(kind="start", time=1.0, step=0)])
            (folder / "env.json").write_text(json.dumps(dict(device_kind="cpu")))
        case "no events":
            events.unlink()
        case "no run.json":
            (folder / "run.json").unlink()
        case "only run.json":
            for name in ("metrics.jsonl", "events.jsonl", "env.json"):
                (folder / name).unlink()
        case "folders in place of files":
            for path in (metrics, events, folder / "env.json"):
                path.unlink()
                path.mkdir()
        case "events of no sense":
            write(events, [dict(kind="start", time="x", elapsed=[], process_began={}, step=1.5), dict(kind="spent")])


KINDS = ("torn", "noise", "other JSON", "no numbers", "huge numbers", "not finite", "old", "no events", "no run.json",
         "only run.json", "folders in place of files", "events of no sense")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_damaged_run_both_views_say_what_they_can(tmp_path, kind):
    folder, sound = begin(tmp_path / "harmed"), begin(tmp_path / "sound")
    damaged(kind, folder)
    record = read(folder)
    for shown in (page([record]), page([record, read(sound)])):
        assert "harmed" in shown and "NaN" not in shown and ">nan<" not in shown
        json.loads(re.search(r'id="data">(.*?)</script>', shown).group(1))
    assert "harmed" in seen(folder, sound)
    assert bool(record.notes) == (
        kind in ("torn", "noise", "other JSON", "old", "folders in place of files", "events of no sense")
    )


@pytest.mark.parametrize(
    "make", [lambda f: f.mkdir(), lambda f: (f.mkdir(), (f / "photo.jpg").write_text("x")), lambda f: None]
)
@pytest.mark.parametrize("command", ["report", "watch"])
def test_a_folder_that_is_no_run_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, make, command):
    make(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["llmjax", command, "other"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    err = capsys.readouterr().err
    assert end.value.code in (2, 65) and err.startswith("llmjax: ") and err.count("\n") == 1


def test_the_report_of_a_run_lies_in_its_folder_and_of_several_beside_them(tmp_path, capsys):
    for name in ("a", "b"):
        begin(tmp_path / name)
    assert report(ReportOptions(("a",), runs=str(tmp_path))) == 0 and (tmp_path / "a/report/index.html").is_file()
    assert report(ReportOptions(("a", "b"), runs=str(tmp_path))) == 0
    assert (tmp_path / "reports/a+b/index.html").is_file() and "index.html" in capsys.readouterr().out


def test_the_curves_are_written_as_pictures_where_matplotlib_is_there(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    for name in ("a", "b"):
        begin(tmp_path / name)
    assert report(ReportOptions(("a", "b"), runs=str(tmp_path))) == 0
    pictures = [(tmp_path / f"reports/a+b/{name}.png").read_bytes() for name in ("loss", "steps", "goodput")]
    assert all(data.startswith(b"\x89PNG") for data in pictures)


def test_a_hundred_thousand_steps_make_a_page_below_a_megabyte_that_shows_every_extreme(tmp_path):
    folder = begin(tmp_path / "long")
    random = np.random.default_rng(0)
    lines = [
        dict(step=s, loss=4 + x, grad_norm=1 + abs(x), lr=1e-3, tokens=2048 * s, tokens_per_s=2000 + 99 * x,
             step_ms=1000 + 9 * x, mfu=0.4 + x / 99, data_wait_ms=abs(x), elapsed=5.0 + s)
        for s, x in enumerate(random.normal(size=100_000).tolist(), 1)
    ]  # fmt: skip
    write(folder / "metrics.jsonl", lines)
    assert len(page([read(folder)]).encode()) < 1_000_000
    y = random.normal(size=100_000)
    y[777], y[888] = 50, -50
    kept = series.thin(y, 900)
    assert kept.size <= 901 and {0, 777, 888, 99_999} <= set(kept.tolist())


def test_smoothing_keeps_a_constant_passes_over_gaps_and_halves_in_a_half_life():
    assert np.allclose(series.smooth(np.full(9, 3.0), 2.0), 3.0)
    assert np.allclose(series.smooth(np.array([1.0, math.nan, 1.0]), 1.0), 1.0)
    step = np.r_[np.zeros(200), np.ones(10)]
    assert series.smooth(step, 10.0)[-1] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 1e15), (-3, 7), (1e-9, 2e-9), (0.999, 1.001)])
def test_ticks_are_few_and_within(low, high):
    found_ = series.ticks(low, high)
    assert 2 <= len(found_) <= 6 and all(low - 1e-12 * high <= t <= high * (1 + 1e-12) for t in found_)


@pytest.mark.skipif(found() is None, reason="no Chromium is installed")
def test_in_a_browser_the_page_fits_a_desk_and_a_phone_draws_every_chart_and_asks_for_nothing(tmp_path):
    records = [
        read(begin(tmp_path / name, name=name)) for name in ("one", "two_with_a_name_that_is_rather_long_for_a_phone")
    ]
    for number, chosen in enumerate((records[:1], records)):
        (tmp_path / f"{number}.html").write_text(page(chosen))
    with browser(found()) as tab:
        for number in (0, 1):
            papers = {}
            for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
                tab.open(tmp_path / f"{number}.html", width, 844, scheme)
                assert tab.js("document.documentElement.scrollWidth") == width
                papers[scheme] = tab.js("getComputedStyle(document.body).backgroundColor")
                assert tab.js("document.querySelectorAll('.chart').length") >= 8
                for axis in ("steps", "tokens", "time", "flops"):
                    tab.js(f"document.getElementById('x-{axis}').click()")
                    assert tab.js(EMPTY) == []
                    assert tab.js(OTHERS.replace("AXIS", axis)) == 0
                readout = tab.js(HOVER)
                assert "smooth" in readout and "FLOPs" not in readout and "flops" in readout
                assert tab.console == [] and len(tab.asked) == 1
            assert papers["light"] != papers["dark"]


# Charts with no path of a nonzero size that can be seen.
EMPTY = """[...document.querySelectorAll('.chart')].filter(
  chart => ![...chart.querySelectorAll('path:not(.grid):not(.mark)')].some(path => {
    const box = path.getBoundingClientRect();
    return box.width > 1 && getComputedStyle(path).display != 'none';
  })).map(chart => chart.textContent)"""
OTHERS = """[...document.querySelectorAll('.xs.ax')].filter(
  labels => labels.offsetParent && !labels.classList.contains('x-AXIS')).length"""
HOVER = """(() => { const area = document.querySelector('.chart .area'), box = area.getBoundingClientRect();
  area.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top + 5}));
  return document.querySelector('.chart .readout').textContent; })()"""
