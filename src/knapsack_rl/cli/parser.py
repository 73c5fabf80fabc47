"""An argument parser whose errors help: the command's own usage, and the flag that was probably meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """Refuses unknown flags itself, where the stock parser leaves those of a command to the main one."""

    def parse_known_args(  # type: ignore[override] # the stock one is overloaded
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse; ends the program with an error if something is not known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return parsed, unknown

    def _meant(self, unknown: Iterable[str]) -> str:
        """The flags that look like those given."""
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        typed = (word.partition("=")[0] for word in unknown if word.startswith("--"))
        close = [found for word in typed for found in difflib.get_close_matches(word, known, n=1)]
        return f" (did you mean {', '.join(close)}?)" if close else f" ({self.prog} --help lists what there is)"
