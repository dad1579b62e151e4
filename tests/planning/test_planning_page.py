"""The tables of docs/planning.md are those of the plans in docs/results."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30


def rows_of(name):
    """(topology, cells) of each row of a config's table; empty cells are those above."""
    text = (ROOT / "docs" / "planning.md").read_text()
    section = re.split(r"^##+ ", text.split(f"\n### {name}\n")[1], flags=re.MULTILINE)[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    topology = batch = ""
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        topology, batch = cells[0] or topology, cells[1] or batch
        yield topology, [batch, *cells[2:]]


def cells_of(report, row):
    sent = [sum(row[network].values()) / GIB for network in ("ici_bytes", "dcn_bytes")]
    name = row["strategy"].removesuffix("/lockstep")
    return [
        f"{report['batch_size']:,}",
        f"**{name}**" if row["strategy"] == report["recommendation"]["strategy"] else name,
        f"{row['needed_bytes'] / GIB:.2f}",
        "yes" if row["fits"] else "no",
        f"{row['flops'] / 1e12:,.1f}",
        f"{row['hbm_bytes'] / GIB:,.0f}",
        *(f"{n:.2f}" if n >= 0.005 else "" for n in sent),
        f"{row['least_ms']:,.0f}, {row['in_turn_ms']:,.0f}",
    ]


@pytest.mark.parametrize("name", ["lm_124m", "lm_1b", "lm_8b_32k", "imagenet_revnet104"])
def test_tables_are_those_of_the_plans(name):
    written = list(rows_of(name))
    assert [topology for topology, _ in written[::3]] == ["h100:1", "h100:8", "4xh100:8"]
    planned = []
    for topology, _ in written[::3]:
        file = f"plan_{name}_{topology.replace(':', '_')}.json"
        report = json.loads((ROOT / "docs" / "results" / file).read_text())
        planned += [(topology, cells_of(report, row)) for row in report["rows"]]
    assert written == planned
