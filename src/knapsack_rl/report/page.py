"""Parts of a self-contained HTML page: escaped text, tables, inline SVG plots and the frame around them.

A page loads no other resources and runs no scripts. Its content security policy forbids both, so text from a data set
or a model stays text.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "–"
LONGEST_TEXT = 160

STYLE = """
:root { color-scheme: light dark; --text: #1c1f23; --soft: #59616b; --page: #ffffff; --card: #f3f5f7;
  --line: #d7dce1; --notice: #fff3d6; --notice-line: #b97a00; --panel: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a4adb8; --page: #15181c; --card: #20252b;
  --line: #39414a; --notice: #3a2e12; --notice-line: #e0a63a; --panel: #f4f5f6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 3rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; max-width: 48rem; }
.soft, figcaption, .tiles small { color: var(--soft); }
.soft { font-size: .92rem; }
.notice { background: var(--notice); border-left: 4px solid var(--notice-line); padding: .5rem .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.3rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.tiles div { background: var(--card); border-radius: 6px; padding: .6rem .8rem; }
.tiles dt { font-size: .85rem; color: var(--soft); }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: .8rem; font-weight: 400; line-height: 1.35; }
.plots { display: grid; gap: 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, max(21rem, 50% - .7rem)), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: .5rem; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: system-ui, sans-serif !important; }
@media (prefers-color-scheme: dark) { figure svg { background: #fff; border-color: transparent;
  filter: invert(.91) hue-rotate(180deg) saturate(1.3); } }
figcaption { font-size: .88rem; margin-top: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: min(100%, 36rem); font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; line-height: 1.25; }
tbody th { font-weight: 400; }
th:first-child { position: sticky; left: 0; background: var(--page); }
td, tbody th { unicode-bidi: isolate; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
.text { overflow-wrap: anywhere; min-width: 8rem; }
details { margin: 1.4rem 0; border-top: 1px solid var(--line); padding-top: .6rem; }
summary { cursor: pointer; font-weight: 600; }
.prompts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .8rem;
  align-items: start; }
.prompts > div { background: var(--card); border-radius: 6px; padding: .6rem .8rem; break-inside: avoid; }
.sample { display: block; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto;
  font-size: .85rem; border-left: 3px solid var(--line); padding-left: .6rem; unicode-bidi: isolate; }
@media print { html { font-size: 11px; }
  :root { --text: #000; --soft: #444; --page: #fff; --card: #fff; --line: #ccc; --notice: #fff; }
  figure svg { filter: none; } .sample { max-height: none; }
  body { max-width: none; padding: 0; font-size: 1rem; } .scroll { overflow: visible; }
  .plots { grid-template-columns: 1fr 1fr; } .tiles div { border: 1px solid var(--line); }
  tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def escape(value: object) -> str:
    """Return any value as HTML text, shortened to ``LONGEST_TEXT`` characters."""
    text = str(value)
    if len(text) > LONGEST_TEXT:
        text = text[: LONGEST_TEXT - 1] + "…"
    return html.escape(text, quote=True)


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as a percentage, a dash for None and NaN."""
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def _prose(text: str) -> str:
    """Return running text, escaped; a number and its percent sign stay on one line."""
    return re.sub(r"(?<=\d) %", "&nbsp;%", html.escape(text))


def document(title: str, body: Iterable[str]) -> str:
    """Return a complete page; the title is escaped, the body must be HTML."""
    content = "\n".join(part for part in body if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{content}
</body>
</html>
"""


def write(target: Path, title: str, body: Iterable[str]) -> Path:
    """Write a page and return its path; lone surrogates, which UTF-8 cannot encode, become "?"."""
    target.write_text(document(title, body), encoding="utf-8", errors="replace")
    return target


def paragraph(text: str, style: str = "") -> str:
    """Return an escaped paragraph, optionally with a CSS class."""
    return f'<p class="{style}">{_prose(text)}</p>' if style else f"<p>{_prose(text)}</p>"


def heading(text: str) -> str:
    """Return an escaped second-level heading."""
    return f"<h2>{html.escape(text)}</h2>"


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Return key figures: name, value and a short remark, all escaped."""
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{_prose(remark)}</small></dd></div>"
        for name, value, remark in items
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str, numeric: bool = True) -> str:
    """Return a table whose first column names the row; every cell is escaped.

    Args:
        header: Column titles.
        rows: Cells; None is shown as a dash.
        caption: What the table shows.
        numeric: Whether the columns after the first hold numbers.
    """
    style = "number" if numeric else "text"
    head = "".join(
        f'<th scope="col" class="{style if i else "text"}">{escape(name)}</th>' for i, name in enumerate(header)
    )
    body: list[str] = []
    for first, *others in rows:
        cells = "".join(f'<td class="{style}">{escape(MISSING if cell is None else cell)}</td>' for cell in others)
        body.append(f'<tr><th scope="row" class="text">{escape(first)}</th>{cells}</tr>')
    # The region can be focused, so that a keyboard can scroll a table wider than the screen.
    return (
        f'{paragraph(caption, "soft")}<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def details(summary: str, parts: Iterable[str]) -> str:
    """Return a collapsed section; the summary is escaped."""
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(parts)}</details>"


def sample(label: str, text: str) -> str:
    """Return a text verbatim (line breaks included, escaped) under a label."""
    return f'<p class="soft">{html.escape(label)}</p><code class="sample">{html.escape(text) or "(empty)"}</code>'


def plots(figures: Iterable[str]) -> str:
    """Return figures side by side where the screen is wide enough."""
    return f'<div class="plots">{"".join(figures)}</div>'


def plot(name: str, caption: str, draw: Callable[[Axes], Axes]) -> str:
    """Return a captioned inline SVG.

    Args:
        name: Unique name of the plot on its page; keeps ids inside the SVGs distinct.
        caption: What to look for, as plain text.
        draw: Draws on the Axes it is given.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    return f"<figure>{_svg(name, draw)}<figcaption>{_prose(caption)}</figcaption></figure>"


@dataclass(frozen=True)
class Plot:
    """A plot of a page, before it is drawn.

    Attributes:
        name: Unique name on its page, and of its file.
        caption: What to look for, as plain text.
        draw: Draws on the Axes it is given.
    """

    name: str
    caption: str
    draw: Callable[[Axes], Axes]


def save_plots(specs: Iterable[Plot], folder: Path, kind: str) -> list[Path]:
    """Write each plot into a separate file, with its caption in the metadata.

    Args:
        specs: What to draw.
        folder: Target folder; created if missing.
        kind: "png" or "svg".

    Raises:
        ImportError: If matplotlib is not installed.
    """
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for spec in specs:
        path = folder / f"{spec.name}.{kind}"
        with _drawn(spec.name, spec.draw) as (figure, title):
            about = {"Title": title, "Description": spec.caption}
            figure.savefig(path, format=kind, dpi=200, facecolor="white", metadata=about | _undated(kind))
        written.append(path)
    return written


def _undated(kind: str) -> dict[str, None]:
    """Return metadata without date and program, so that the same run gives the same bytes."""
    return {"Creator": None, "Date": None} if kind == "svg" else {"Software": None}


@contextmanager
def _drawn(name: str, draw: Callable[[Axes], Axes]) -> Iterator[tuple[Figure, str]]:
    """Yield a figure and its title; styles apply inside the body, where the figure must be saved."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "knapsack-rl[plots]"') from error

    style = matplotlib.rc_context(
        {
            "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
            "svg.hashsalt": name,  # ids are the same in every run and differ between plots
            "text.parse_math": False,  # a dollar sign in a label is a dollar sign
            "font.size": 10.0,
        }
    )
    with style, warnings.catch_warnings():
        # The browser chooses the font, so glyphs missing from matplotlib's font do not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(4.8, 3.2), layout="constrained")
        yield figure, draw(figure.add_subplot()).get_title(loc="left")


def _svg(name: str, draw: Callable[[Axes], Axes]) -> str:
    buffer = io.StringIO()
    with _drawn(name, draw) as (figure, title):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """Cut a stand-alone SVG file down to what belongs inside an HTML page."""
    svg = svg[svg.index("<svg") :]
    # Its style element would apply to the whole page; the page's style holds the rule instead.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every plot, and nothing refers to them
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib writes a view box"
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(title, quote=True)}">'
    return opening + svg[svg.index(">") + 1 :].strip()
