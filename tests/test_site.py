"""The documentation's site builds without a warning, and its search finds what people look for.

Needs the extra docs, which is not part of dev: without it all is skipped. .ci/run installs it.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
STOP_WORDS = {
    "a",
    "an",
    "my",
    "own",
    "the",
    "to",
}  # left out of the query, as the site's search does
# What is typed into the search, and the page and heading that should be among the first results.
SEARCHES = {
    "gradient accumulation": "memory/#gradient-accumulation",
    "resume a run": "running/#resume-a-run",
    "add my own dataset": "your_own/#add-your-own-dataset",
    "add my own optimizer": "your_own/#add-your-own-optimizer",
    "choose a strategy": "memory/",
    "mixed precision": "memory/#mixed-precision",
    "check_reversible": "reference/core/#revnet_jax.core.check.check_reversible",
}
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs"
)
pytestmark = [needs_mkdocs, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. Strict: any warning ends the build."""
    folder = tmp_path_factory.mktemp("site")
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "WARNING" not in process.stderr
    return folder


def sections(site):
    """(location, title, text) of everything that the search knows."""
    index = json.loads((site / "search" / "search_index.json").read_text())
    return [(row["location"], row["title"], row["text"]) for row in index["docs"]]


def ranked(site, query):
    """Locations that have all words of a query, those with them in the title first."""
    words = set(re.findall(r"\w+", query.lower())) - STOP_WORDS
    found = []
    for location, title, text in sections(site):
        in_title = sum(word in title.lower() for word in words)
        in_text = sum(word in text.lower() for word in words)
        if all(word in f"{title} {text}".lower() for word in words):
            found.append((-in_title, -in_text, location))
    return [location for *_, location in sorted(found)]


@pytest.mark.parametrize("query", SEARCHES)
def test_the_search_finds(site, query):
    assert SEARCHES[query] in ranked(site, query)[:5]


def test_every_page_is_in_the_navigation(site):
    start = (site / "index.html").read_text()
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    for page in pages | {"contributing", "changelog", "reference/core", "reference/benchmark"}:
        assert f'href="{page}/"' in start, f"{page} is not in the navigation"


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]* (?:src|href)="(https?:[^"]*)"', page.read_text()
        )
        assert not loaded, f"{page.relative_to(site)} loads {loaded}"


def test_docstrings_are_shown(site):
    page = (site / "reference" / "core" / "index.html").read_text()
    for text in ("spends spare memory to save compute", "Parameters:", "reversible_block"):
        assert text in page
    assert "_swept" not in re.sub(
        r'<details class="mkdocstrings-source">.*?</details>', "", page, flags=re.DOTALL
    )
