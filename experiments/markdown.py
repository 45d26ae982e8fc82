"""Tables in Markdown."""

import numpy as np


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def mean(values, digits=2):
    """Mean ± standard deviation, or nothing where there are no values."""
    values = np.atleast_1d(values)
    if not len(values):
        return ""
    cell = f"{np.mean(values):.{digits}f}"
    return f"{cell} ± {np.std(values):.{digits}f}" if len(values) > 1 else cell
