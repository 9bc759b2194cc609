"""Self-contained HTML pages: elements that escape what they hold, and one style for light, dark, desktop and phone."""

import html
from collections.abc import Iterable
from typing import Any

# Okabe and Ito's colours, which people with any colour vision tell apart: one for every mesh axis.
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c636b; --line: #e2e4e7; --paper: #fdfdfc; --card: #ffffff;
  --data: #009e73; --stage: #b0559a; --fsdp: #0072b2; --expert: #d55e00; --context: #3a9bd0; --tensor: #d98a00;
  --matmul: #31598c; --attention: #6f93bd; --memory: #9aa7b4; --wait: #c9503c; --idle: #d8dee4; --mine: #1b1f24; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9eb; --soft: #a0a7b0; --line: #30353c; --paper: #14161a;
  --card: #1b1e23; --data: #2bbf92; --stage: #d58cc2; --fsdp: #4aa3df; --expert: #f0803c; --context: #7cc4ee;
  --tensor: #f0b03a; --matmul: #6c9bd6; --attention: #9dbde3; --memory: #6b7682; --wait: #e8745f; --idle: #2a313a;
  --mine: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 40px 0 4px; }
h3 { font-size: 15px; margin: 0 0 2px; }
p { margin: 4px 0 12px; max-width: 72ch; }
small, .soft { color: var(--soft); font-size: 13px; }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
.row { display: flex; flex-wrap: wrap; gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 12px; }
svg { display: block; max-width: 100%; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg text.soft { fill: var(--soft); }
"""


class Markup(str):
    """Text that is HTML already; everything else is escaped where it is put into an element."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Attributes that are None are left out; `class_` is class, and `data_x` is data-x."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    shown = "".join(f' {key}="{html.escape(_text(value))}"' for key, value in given.items())
    if name in ("br", "hr", "input", "meta"):
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{joined(children)}</{name}>")


def joined(children: Iterable[Any]) -> Markup:
    """The children one after the other, each escaped unless it is markup."""
    parts = (joined(c) if isinstance(c, (list, tuple)) else c for c in children if c is not None)
    return Markup("".join(part if isinstance(part, Markup) else html.escape(_text(part)) for part in parts))


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], numbers: Iterable[int] = ()) -> Markup:
    """A table that scrolls by itself where it is too wide; columns with these numbers are set as numbers."""
    numbers = set(numbers)

    def cells(kind: str, row: Iterable[Any]) -> list[Markup]:
        return [tag(kind, cell, class_="number" if i in numbers else None) for i, cell in enumerate(row)]

    head, body = tag("tr", cells("th", columns)), [tag("tr", cells("td", row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="wide")


def page(title: str, body: Iterable[Any], *, style: str = "", script: str = "") -> str:
    """A whole document. It asks for nothing from anywhere: its policy forbids it."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'),
        tag("title", title),
        Markup(f"<style>{STYLE}{style}</style>"),
    ]
    scripts = Markup(f"<script>{script}</script>") if script else None
    return f'<!DOCTYPE html>\n<html lang="en">{tag("head", *head)}{tag("body", tag("main", *body), scripts)}</html>\n'


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
