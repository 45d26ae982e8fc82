"""Which of a test's cases `make test` runs on torch alone."""

import pytest


def once(names, but=()):
    """The names of cases, all but some marked `once`."""
    return [
        name if name in but else pytest.param(name, marks=pytest.mark.once)
        for name in names
    ]
