"""A bounded number of sample completions per prompt, kept next to the metrics of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from knapsack_rl.ids import PromptId, stable_order
from knapsack_rl.runs.files import read_rows
from knapsack_rl.state import atomic_file

LONGEST = 600
"""Most characters kept of a text; a longer text loses its middle."""


class SampleStore:
    """Keeps the first completion, the newest success and the newest failure of each prompt.

    If there are more than ``prompts``, it keeps those whose ids come first in an order that depends on the ids alone.
    The choice is therefore the same in every process and after a resume, and independent of how a prompt fares. The
    size on disk is at most about ``4 * prompts * longest`` characters.

    Args:
        prompts: most prompts kept, >= 1.
        longest: most characters of a text, >= 20.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, prompts: int, *, longest: int = LONGEST) -> None:
        if prompts < 1 or longest < 20:
            raise ValueError(f"prompts must be at least 1 and longest at least 20, got {prompts} and {longest}")
        self._limit, self._longest = prompts, longest
        self._rows: dict[PromptId, dict[str, Any]] = {}
        self._rank: dict[PromptId, float] = {}
        self._last = float("inf")

    def add(
        self,
        prompt_id: PromptId,
        prompt: Any,
        completion: Any,
        *,
        reward: float,
        success: bool,
        step: int,
        answer: Any = None,
    ) -> None:
        """Take in one completion.

        Args:
            prompt_id: of its prompt.
            prompt: a text or a list of messages.
            completion: likewise.
            reward: what it was given.
            success: whether it counts as a success.
            step: when it was generated.
            answer: the right answer, if one is known.
        """
        if prompt_id not in self._rows and not self._admit(prompt_id):
            return
        shown = {"step": step, "reward": reward, "text": self._cut(completion)}
        row = self._rows.setdefault(
            prompt_id,
            {"step": step, "prompt_id": prompt_id, "prompt": self._cut(prompt), "first": shown | {"success": success}},
        )
        row["step"] = step
        if answer is not None:
            row["answer"] = self._cut(answer)
        row["success" if success else "failure"] = shown

    def write(self, path: Path) -> None:
        """Replace the file with the kept samples, one JSON line per prompt.

        Raises:
            OSError: the file cannot be written; an existing one stays unchanged.
        """
        with atomic_file(path) as file:
            for row in self._rows.values():
                file.write(json.dumps(row).encode() + b"\n")

    def read(self, path: Path) -> None:
        """Continue from a file, if it exists."""
        for row in read_samples(path):
            if self._admit(row["prompt_id"]):
                self._rows[row["prompt_id"]] = row

    def _admit(self, prompt_id: PromptId) -> bool:
        rank = float(stable_order([prompt_id])[0])
        if len(self._rows) >= self._limit:
            if rank >= self._last:
                return False
            dropped = max(self._rank, key=self._rank.__getitem__)
            del self._rows[dropped], self._rank[dropped]
        self._rank[prompt_id] = rank
        self._last = max(self._rank.values())
        return True

    def _cut(self, value: Any) -> str:
        text = _text(value)
        half = (self._longest - 3) // 2
        return text if len(text) <= self._longest else f"{text[:half]} … {text[-half:]}"


def read_samples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows of a sample file that have the shape written by :class:`SampleStore`; none if it is missing."""
    return [row for row in read_rows(Path(path)) if _whole(row)]


def _whole(row: dict[str, Any]) -> bool:
    named = isinstance(row.get("prompt_id"), (str, int)) and isinstance(row.get("prompt"), str)
    kinds = [row[kind] for kind in ("first", "success", "failure") if kind in row]
    return named and all(isinstance(shown, dict) and isinstance(shown.get("text"), str) for shown in kinds)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        parts = (_text(message.get("content") or message.get("text") or "") for message in value)
        return "\n".join(part for part in parts if part)
    return json.dumps(value, ensure_ascii=False, default=str)
