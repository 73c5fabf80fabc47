"""Write the results of simulated policies as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from knapsack_rl.offline.scoring import HEADINGS, Result, cell
from knapsack_rl.report import page, plots


def write_experiment(results: Sequence[Result], output: Path, *, title: str, lead: str) -> Path:
    """Write the page: a table, the gains by seed and the reliability curves for each environment.

    Args:
        results: of one or more environments.
        output: the file to write.
        title: heading of the page.
        lead: description of the experiment, as plain text.

    Raises:
        ImportError: matplotlib is not installed.
    """
    body = [f"<h1>{page.escape(title)}</h1>", page.paragraph(lead, "soft")]
    for number, where in enumerate(dict.fromkeys(result.environment for result in results)):
        rows = [result for result in results if result.environment == where]
        body.append(page.heading(where[:1].upper() + where[1:]))
        cells = [[row.policy, *(cell(name, row.mean(name), row.deviation(name)) for name in HEADINGS)] for row in rows]
        seeds = len(rows[0].by_seed)
        caption = f"Mean ± standard deviation over {seeds} {'seed' if seeds == 1 else 'seeds'}"
        body.append(page.table(("policy", *HEADINGS.values()), cells, caption=caption))
        body.append(page.plots(_plots(rows, number)))
    return page.write(output, title, body)


def _plots(rows: Sequence[Result], number: int) -> list[str]:
    gains = {row.policy: [figures["gain_captured"] for figures in row.by_seed.values()] for row in rows}
    found = [
        page.plot(
            f"gain-{number}",
            "0 % is uniform allocation, 100 % is allocation by the true success rates. Dots are seeds, bars means. "
            "Below 0 % a policy loses more than it gains.",
            partial(plots.final_values, gains, quantity="gain captured"),
        )
    ]
    curves = {row.policy: row.calibration for row in rows if row.calibration.visits.size}
    if curves:
        found.append(
            page.plot(
                f"reliability-{number}",
                "Predicted against realised chance that a group carries a gradient, in ten bins. On the diagonal a "
                "prediction can be trusted; below it the policy is too optimistic.",
                partial(plots.reliability, curves),
            )
        )
    return found
