"""Groups by loops, for tests of what is done to all groups at once."""

from __future__ import annotations


def members_of(groups) -> dict[object, list[int]]:
    found: dict[object, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        found.setdefault(group, []).append(row)
    return found


def alike(rewards: list[float]) -> bool:
    """Equal within a millionth of the largest reward."""
    return max(rewards) - min(rewards) <= 1e-6 * max(map(abs, rewards))
