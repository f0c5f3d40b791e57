"""The options prefixes that solves have of their own, and how they are shown: not at all."""

from __future__ import annotations

import re
from itertools import count

PRIVATE = re.compile("pfde[0-9]+_")
_number = count(1)


def private_prefix(prefix: str) -> str:
    """A prefix that no other solve has, for objects to be seen under `prefix`."""
    return f"{prefix}pfde{next(_number)}_"


def shown(text: str) -> str:
    """A text as the user knows it, with the prefixes that he has given."""
    return PRIVATE.sub("", text)
