"""A hook of mkdocs: links of the guides lead to pages of the site."""

import re


def on_page_content(html, page, **kwargs):
    """From `../choosing.md`, which serves where notebooks are read as files."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(
        r'href="\.\./(\w+)\.md(#[\w-]*)?"', r'href="../../\1/\2"', html
    )
