"""The evidence page, rebuilt from the committed rows: a table of claims, then a section for each experiment."""

from __future__ import annotations

from pathlib import Path

from experiments import catalogue
from experiments.contract import Row
from experiments.statistics import markdown_table

HEADER = ("claim", "paper", "here", "command", "seeds", "verdict")

NOT_MEASURED = "not measured yet"

LEAD = """# Evidence

What the paper claims, what was asked beyond it, and what was measured here, for and against. Every figure on this page
is computed from the rows in `docs/evidence/`, and `knapsack-rl experiment page` writes the page anew from them without
training anything; a test compares the two.

**How.** Training runs use the TRL trainer on the small model that ships with the package (223,000 parameters, addition
of one- to four-digit numbers): 400 steps of 64 prompts, N = 8 rollouts per prompt on average, 2,048 training prompts
and 512 held-out ones, unless a section says otherwise. The learning rate was chosen once, for uniform allocation, on a
seed that is not used here; nothing was chosen on the held-out prompts. Brackets after a figure of training runs are
95 % t-intervals over seeds; differences are paired by seed. Costs count everything generated, also what a policy throws
away. Accuracy at the end is the mean of the last three evaluations. Five seeds were planned; where there is a sixth, it
was added after the five had been seen, to narrow the intervals. A claim holds if its whole interval does, in part if
there is an effect in its direction but not surely of its size, and is undecided if the interval leaves it open. It is a
small model on one task: what holds here may fail elsewhere, and the reverse.

**Again.** `knapsack-rl experiment NAME` runs one experiment, two processes side by side; `all` runs every one. Finished
runs are used again and half-done ones resumed. With `--output docs/evidence` the runs whose rows stand there are not
trained again either, so that seeds can be added bit by bit; give another folder to measure everything anew. `--quick`
is the same code on next to nothing.
"""


def build(folder: Path) -> str:
    """The page as Markdown.

    Args:
        folder: of the experiments' rows and plots; the page stands beside it.

    Raises:
        ValueError: rows of a quick run are among them.
    """
    table, sections = [], []
    for name in catalogue.EXPERIMENTS:
        experiment, rows = catalogue.load(name), catalogue.read(name, folder)
        command = f"`knapsack-rl experiment {name}`"
        heading = f"## {experiment.TITLE}\n\n*{experiment.QUESTION}*\n"
        if rows is None:
            table.append((experiment.QUESTION, "", NOT_MEASURED, command, "", ""))
            sections.append(f"{heading}\nNot measured yet: {command}.\n")
            continue
        seeds = _seeds(rows)
        for found in experiment.findings(rows):
            table.append((found.claim, found.paper, found.ours, command, seeds, found.verdict))
        plot = f"![{experiment.TITLE}]({folder.name}/{name}.svg)"
        sections.append(f"{heading}\n{plot}\n\n{experiment.paragraph(rows).strip()}\n\n{command}\n")
    return "\n".join([LEAD, markdown_table(HEADER, table) + "\n", *sections])


def write(folder: Path) -> Path:
    """Write the page beside the folder, and every plot anew; returns the page.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: matplotlib is not installed.
        ValueError: rows of a quick run are among them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; run the experiments first")
    text = build(folder)
    for name in catalogue.EXPERIMENTS:
        rows = catalogue.read(name, folder)
        if rows is not None:
            catalogue.draw(name, rows, folder)
    page = folder.parent / "evidence.md"
    page.write_text(text, encoding="utf-8")
    return page


def _seeds(rows: list[Row]) -> str:
    return str(len({row["seed"] for row in rows}))
