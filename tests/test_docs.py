"""What README.md and docs/*.md name is there: files, headings, programs and settings."""

import pathlib
import re
import runpy

import pytest

from revnet_jax import config, core

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md"))]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
REFERENCE = ROOT / "docs" / "reference"
CONFIGS = config.experiment, config.language_model, config.vision_transformer, config.digits
SETTINGS = {key for make in CONFIGS for key in config.flatten(make())}
# What people search for, and the page that index.md leads to.
SEARCHES = {
    "gradient accumulation": "memory.md",
    "mixed precision": "memory.md",
    "gradient checkpointing": "memory.md",
    "resume a run": "running.md",
    "add my own dataset": "your_own.md",
    "KV cache": "language_models.md",
    "nucleus (top-p) sampling": "language_models.md",
    "greedy decoding": "language_models.md",
    "learning-rate warm-up": "language_models.md",
    "pretrained weights": "pretrained.md",
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_to_files_and_headings(page):
    text = without_code(page.read_text())
    assert "```" not in text, "a code block is not closed: links in it would not be looked at"
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), f"{target} is outside of the repository"
        assert file.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


@each_page
def test_named_files_exist(page):
    pattern = (
        r"(?<![\w./])((?:scripts|configs|tests|revnet_jax|notebooks)/[\w./]*\.(?:py|sh|ipynb))\b"
    )
    for path in re.findall(pattern, page.read_text()):
        is_placeholder = pathlib.Path(path).stem.isupper()  # configs/NAME.py
        assert is_placeholder or (ROOT / path).exists(), f"{path} is not there"


@each_page
def test_named_settings_exist(page):
    for key in re.findall(r"--config\.([\w.]+)=", page.read_text()):
        assert key in SETTINGS, f"--config.{key} is no setting"


def test_readme_stays_short():
    assert len(README.read_text().splitlines()) <= 150


def test_index_leads_to_every_page():
    text = (ROOT / "docs" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\((\w+\.md)\)", text)) == pages


@pytest.mark.parametrize("words", SEARCHES)
def test_searches_end_at_a_page(words):
    rows = (ROOT / "docs" / "index.md").read_text().splitlines()
    (row,) = [row for row in rows if words in row]
    assert f"]({SEARCHES[words]})" in row


def test_the_reference_shows_every_module():
    """It shows what the package core exports, and all modules of the others."""
    shown = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    shown = re.findall(r"^::: (revnet_jax[\w.]*)", shown, re.MULTILINE)
    for path in (ROOT / "revnet_jax").rglob("[!_]*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not module.startswith("revnet_jax.core."):
            assert any(f"{name}.".startswith(f"{module}.") for name in shown), module
    assert len(shown) == len(set(shown))
    for name in shown:
        parts = name.split(".")
        paths = [ROOT.joinpath(*parts[:n]).with_suffix(".py") for n in (len(parts), -1)]
        assert any(path.is_file() for path in paths), f"{name} is not there"


def test_the_reference_shows_every_name_of_core():
    text = (REFERENCE / "core.md").read_text()
    shown = re.findall(r"^::: revnet_jax\.core\.\w+\.(\w+)$", text, re.MULTILINE)
    for members in re.findall(r"members: \[(.*)\]", text):
        shown += members.split(", ")
    assert sorted(shown) == sorted(core.__all__)


def test_figures_are_drawn_from_the_committed_rows():
    pytest.importorskip("matplotlib")
    drawing = runpy.run_path(str(ROOT / "docs" / "figures" / "draw.py"))
    for name, (rows, draw) in drawing["FIGURES"].items():
        assert (
            f"drawn from rows {drawing['digest'](rows())}"
            in (ROOT / "docs" / "figures" / name).read_text()
        ), f"{name} is of other rows: run docs/figures/draw.py"
        assert draw(rows()).axes


def test_the_page_says_what_the_figure_of_depth_shows():
    drawing = runpy.run_path(str(ROOT / "docs" / "figures" / "draw.py"))
    text = (ROOT / "docs" / "memory.md").read_text()
    for row in drawing["rows_of_depths"]()["compiled"]:
        cell = f"{row['needed_bytes'] / 2**30:.2f} GiB, {row['kernels_ms']:.0f} ms"
        (line,) = re.findall(rf"^\| {row['layers']} \|.*$", text, re.MULTILINE)
        assert cell in line
