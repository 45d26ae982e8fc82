"""The links of Markdown to other files."""

import re


def relative(text):
    """The paths that a Markdown text links to, without anchors."""
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    paths = [x.partition("#")[0] for x in links if not re.match(r"\w+:", x)]
    return [path for path in paths if path]
