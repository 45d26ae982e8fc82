"""Hints in messages: what a misspelt name may have meant."""

import difflib
from collections.abc import Iterable


def meant(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'rank'?)`, or an empty string if no name is close."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
