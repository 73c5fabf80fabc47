"""Every page shows hostile text as text, in a parser and in a real browser, and asks for nothing from elsewhere."""

from __future__ import annotations

import http.server
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from knapsack_rl.offline.dry_run import Settings, dry_run
from knapsack_rl.offline.reward_logs import RewardLog
from knapsack_rl.report import page, write_comparison, write_report
from knapsack_rl.report.dry_run_page import write_dry_run
from knapsack_rl.runs.samples import SampleStore
from run_folders import write_rows, write_run

RUN = "document.documentElement.setAttribute('data-run', 'yes')"
TEXTS = [
    f"<script>{RUN}</script>",
    f'"\'><img src=HOST/image onerror="{RUN}">',
    f'</title></style></svg></text><svg onload="{RUN}">',
    "<link rel=stylesheet href=HOST/style><iframe src=HOST/frame></iframe><base href=HOST/>",
    f'<a href="javascript:{RUN}" autofocus onfocus="{RUN}">a</a>',
    f"<!--><script>{RUN}</script-->",
    f"<![CDATA[><script>{RUN}</script>]]>",
    "<meta http-equiv=refresh content='0;url=HOST/refresh'>",
    "<style>@import 'HOST/import'; body { background: url(HOST/background) }</style>",
    f"&lt;script&gt;{RUN}&lt;/script&gt; &#60;b&#62;",
    "\ud800<b>\udfff \x00\x08\x1b[2J \u202eevil\u202c \u2028 \ufeff",
    "$\\frac{$ %s {0.__class__} ${7*7} {{7*7}}",
]
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "dl", "div", "dt", "dd", "small", "figure"),
    *("figcaption", "table", "thead", "tbody", "tr", "th", "td", "svg", "g", "path", "defs", "use", "text", "tspan"),
    *("clippath", "rect", "ul", "li", "code", "strong", "br", "details", "summary", "span"),
}


def texts(host: str) -> list[str]:
    return [text.replace("HOST", host) for text in TEXTS]


def write_pages(folder: Path, host: str) -> list[Path]:
    """All four kinds of page, with hostile text wherever untrusted text can appear."""
    nasty = texts(host)
    for number in range(2):
        where = {"model": nasty[number], "dataset": nasty[2], "seed": number}
        write_run(folder / f"<b>{number}", steps=5, ids=[*nasty, 7], prompts_per_step=10, **where)
    warning = {"kind": nasty[0], "seen": nasty[1], "cause": nasty[2], "remedy": nasty[3]}
    write_rows(folder / "<b>0" / "warnings.jsonl", [{"step": 3} | warning])
    store = SampleStore(20)
    for number, prompt_id in enumerate([*nasty, 7]):
        for success in (False, True):
            text = nasty[(number + success) % len(nasty)]
            fields = {"reward": float(success), "success": success, "step": 1 + success, "answer": text}
            store.add(prompt_id, f"{prompt_id} {text}", text, **fields)
    store.write(folder / "<b>0" / "samples.jsonl")
    one = write_report(folder / "<b>0")
    two = write_comparison([folder / "<b>0", folder / "<b>1"], folder / "comparison.html")
    dice = np.random.default_rng(0)
    ids = [nasty[k % len(nasty)] for k in range(24) for _ in range(8)] * 3
    steps = np.repeat(np.arange(9), 64).astype(float)
    log = RewardLog.from_rollouts(ids, steps, dice.integers(0, 2, 576).astype(float), source=nasty[0], notes=nasty)
    three = write_dry_run(dry_run(log, Settings(seeds=1)), folder / "dry.html")
    return [one, two, three]


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def test_no_page_interprets_text_as_markup(tmp_path: Path) -> None:
    for path in write_pages(tmp_path, "//elsewhere.test"):
        source = path.read_text(encoding="utf-8")
        found = Elements(source)
        assert found.tags <= ALLOWED, (path.name, found.tags - ALLOWED)
        assert not [
            name for name, _ in found.attributes if name.startswith("on") or name in ("src", "srcdoc", "action")
        ]
        references = [value for name, value in found.attributes if name in ("href", "xlink:href")]
        assert all(value.startswith("#") for value in references)
        assert not re.findall(r"url\((?!#)", re.sub(r">[^<]*<", "><", source))
        assert "default-src 'none'" in source
        assert "&lt;script&gt;" in source, "the text is there, as text"


def test_every_text_is_escaped_the_same_way() -> None:
    for text in texts("//elsewhere.test"):
        for part in (page.escape(text), page.paragraph(text), page.heading(text), page.tiles([(text, text, text)])):
            assert Elements(part).tags <= {"p", "h2", "dl", "div", "dt", "dd", "small"}
        for part in (page.sample(text, text), page.details(text, [])):
            assert Elements(part).tags <= {"p", "code", "details", "summary"}


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Asked(http.server.BaseHTTPRequestHandler):
    """Notes what is asked for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(404)
        self.end_headers()

    def log_message(self, *arguments) -> None:
        """Nothing is printed."""


def opened(path: Path, folder: Path) -> str:
    """The page as a browser has it after its scripts have run and its resources have loaded."""
    done = subprocess.run(
        [
            *(
                str(browser()),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--dump-dom",
                "--virtual-time-budget=2000",
            ),
            *(f"--user-data-dir={folder / 'profile'}", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    assert "</html>" in done.stdout, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no browser is installed")
def test_a_browser_runs_nothing_and_asks_for_nothing(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        try:
            control = tmp_path / "control.html"  # the same texts, not escaped: the test can fail
            control.write_text(f"<html><body>{''.join(texts(host)[:2])}</body></html>", errors="replace")
            assert 'data-run="yes"' in opened(control, tmp_path)
            assert server.asked
            server.asked.clear()
            for path in write_pages(tmp_path, host):
                assert "data-run=" not in opened(path, tmp_path), path.name
            assert [asked for asked in server.asked if "favicon" not in asked] == []
        finally:
            server.shutdown()
