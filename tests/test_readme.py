"""The results of the README are those of the evidence page, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments import page

ROOT = Path(__file__).parent.parent
HEADING = "## Results\n"
FIGURE = re.compile(r"(?:(?<![\w.])[+-])?\d+(?:,\d{3})*\.\d+(?: [%×])?|\d+ [%×]")


def plain(text: str) -> str:
    return text.replace("−", "-")


@pytest.fixture(scope="module")
def section() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").split(HEADING, 1)[1].split("\n## ", 1)[0]


def test_the_table_of_the_readme_is_that_of_the_rows(section):
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert "\n".join(lines) == page.readme_table(ROOT / "docs" / "evidence"), "run `python -m experiments readme`"


def test_every_figure_of_the_readme_is_on_a_page_of_evidence(section):
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in page.PAGES]
    known = set(FIGURE.findall(plain("\n".join(pages))))
    claimed = set(FIGURE.findall(plain("\n".join(line for line in section.splitlines() if line[:1] != "|"))))
    assert claimed
    assert sorted(claimed - known) == []


def test_the_check_finds_a_figure_that_was_made_up():
    assert FIGURE.findall("+6.6 [-4.4, +17.6] points, 74.7 %, 0.74 ×, 2,048 prompts, 95 %, N=8") == [
        *("+6.6", "-4.4", "+17.6", "74.7 %", "0.74 ×", "95 %")
    ]
