"""PAPERS.md names functions, configurations and results that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "PAPERS.md").read_text(encoding="utf-8")


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_function_is_defined_where_it_is_said_to_be():
    named = re.findall(r"\[`(\w+)`\]\((rag_lightning/[\w/]+\.py)\)", TEXT)
    assert len(named) > 30
    missing = [
        f"{name} in {path}"
        for name, path in named
        if not re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert missing == []


def test_every_configuration_is_there():
    named = re.findall(r"\]\((conf/[^)]+)\)", TEXT)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_every_table_is_in_the_results():
    headings = re.findall(r"^## (.+)$", (ROOT / "RESULTS.md").read_text(encoding="utf-8"), re.MULTILINE)
    linked = set(re.findall(r"\]\(RESULTS\.md#([^)]+)\)", TEXT))
    assert len(linked) > 8
    assert linked <= {anchor(heading) for heading in headings}
