"""Prompts worth reading on the page of a run: hardest, most improved and lost again, with sample completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knapsack_rl.report import page
from knapsack_rl.runs.log import RunLog

SHOWN = 6
"""Prompts in each list."""

REVERSED = "The task arithmetic writes answers with their digits reversed: 12+30= has the answer 24."
"""Without this note correct answers look wrong to a reader."""


@dataclass(frozen=True)
class PromptHistory:
    """The history of one prompt.

    Attributes:
        prompt_id: Its id.
        visits: Scored visits.
        rollouts: Rollouts over the whole run.
        successes: Successes over the whole run.
        first: Success rate at the first scored visit.
        last: Success rate at the last scored visit.
    """

    prompt_id: str | int
    visits: int
    rollouts: int
    successes: int
    first: float
    last: float


def histories(run: RunLog) -> list[PromptHistory]:
    """Return the history of every prompt with a scored visit, in the order of prompts."""
    visits = run.visits
    seen, rollouts, successes = (run.by_prompt(x) for x in (visits.scored > 0, visits.counts, visits.successes))
    first, last = run.first_and_last
    return [
        PromptHistory(
            run.prompt_ids[prompt],
            int(seen[prompt]),
            int(rollouts[prompt]),
            int(successes[prompt]),
            float(visits.successes[start] / visits.scored[start]),
            float(visits.successes[end] / visits.scored[end]),
        )
        for start, end in zip(first, last, strict=True)
        for prompt in (int(visits.prompt[start]),)
    ]


def worst(found: list[PromptHistory], count: int = SHOWN) -> list[PromptHistory]:
    """Return prompts without a success at their last visit: smallest share of successes first, then most rollouts."""
    unsolved = [one for one in found if one.last == 0]
    return sorted(unsolved, key=lambda one: (one.successes / one.rollouts, -one.rollouts))[:count]


def best(found: list[PromptHistory], count: int = SHOWN) -> list[PromptHistory]:
    """Return prompts whose success rate rose most from first to last visit; ties go to those with most rollouts."""
    risen = [one for one in found if one.last > one.first]
    return sorted(risen, key=lambda one: (one.first - one.last, -one.rollouts))[:count]


def lost(found: list[PromptHistory], count: int = SHOWN) -> list[PromptHistory]:
    """Return prompts whose success rate fell by more than one half."""
    fallen = [one for one in found if one.first - one.last > 0.5]
    return sorted(fallen, key=lambda one: (one.last - one.first, -one.rollouts))[:count]


def prompt_section(run: RunLog) -> list[str]:
    """Return the lists as parts of a page; without samples, prompts are shown by their ids."""
    found = histories(run)
    if run.samples:
        found = [one for one in found if one.prompt_id in run.samples]
    parts: list[str] = []
    lists = (
        (
            "Hardest prompts",
            worst(found),
            "No success at the last visit, and the smallest share of successes for the most rollouts. Read the "
            "completions: is the answer wrong, truncated, or correct but rejected by the verifier?",
        ),
        (
            "Most improved prompts",
            best(found),
            "The largest rise from the first visit to the last. Check whether the newest success shows the intended "
            "skill, or a trick.",
        ),
        (
            "Prompts lost again",
            lost(found),
            "The success rate fell by more than 50 points between the first visit and the last.",
        ),
    )
    for title, chosen, caption in lists:
        if chosen:
            parts += [page.heading(title), page.paragraph(caption, "soft")]
            parts.append(
                f'<div class="prompts">{"".join(_card(one, run.samples.get(one.prompt_id)) for one in chosen)}</div>'
            )
    if parts and run.config.get("dataset") == "arithmetic":
        parts.insert(1, page.paragraph(REVERSED, "soft"))  # below the first heading
    if parts and len(run.samples) < len(run.prompt_ids):
        kept = (
            f"Completions were kept for {len(run.samples):,} of {len(run.prompt_ids):,} prompts, chosen by their ids "
            "alone; the lists show only these."
            if run.samples
            else "No completions were kept in this run."
        )
        parts.append(page.paragraph(kept, "soft"))
    return parts


def _card(one: PromptHistory, sample: Mapping[str, Any] | None) -> str:
    facts = (
        f"{one.successes:,} of {one.rollouts:,} rollouts succeeded in {one.visits:,} "
        f"{'visit' if one.visits == 1 else 'visits'}; {one.first:.0%} at the first, {one.last:.0%} at the last"
    )
    parts = [f"<p><strong>{page.escape(one.prompt_id)}</strong></p>", page.paragraph(facts, "soft")]
    if sample is None:
        return f"<div>{''.join(parts)}</div>"
    if sample["prompt"] != str(one.prompt_id):
        parts.append(page.sample("Prompt", sample["prompt"]))
    if sample.get("answer") is not None:
        parts.append(page.sample("Correct answer", str(sample["answer"])))
    shown = [("First completion", sample.get("first"))]
    shown += [(f"Newest {kind}", sample.get(kind)) for kind in ("success", "failure")]
    done: list[Any] = []
    for label, completion in shown:
        # The first completion may still be the newest of its kind.
        if completion is not None and (completion.get("step"), completion["text"]) not in done:
            done.append((completion.get("step"), completion["text"]))
            parts.append(
                page.sample(f"{label}, step {completion.get('step')}, reward {_reward(completion)}", completion["text"])
            )
    return f"<div>{''.join(parts)}</div>"


def _reward(completion: Mapping[str, Any]) -> str:
    reward = completion.get("reward")
    return f"{reward:g}" if isinstance(reward, (int, float)) else page.MISSING
