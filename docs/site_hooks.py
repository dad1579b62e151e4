"""Hooks of the site (mkdocs.yml): two pages of the root of the clone become pages of the site.

CONTRIBUTING.md and CHANGELOG.md stay where people look for them. The site shows them, too, and
links between them and docs/*.md lead to the pages of the site.
"""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files, config):
    """Adds the pages of the root, with links as if they were in docs."""
    for name, page in PAGES.items():
        text = re.sub(r"\]\((?:docs/)?", "](", (ROOT / name).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, **_):
    """Leads links of docs/*.md to the root of the clone to the pages that were added."""
    for name, page in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown
