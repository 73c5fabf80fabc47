"""Build hook: docstrings refer to functions by Sphinx roles, which Markdown would print literally."""

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|meth|mod):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Turn ``:func:`name``` into ``name`` in the finished page."""
    return ROLE.sub(r"<code>\1</code>", html)
