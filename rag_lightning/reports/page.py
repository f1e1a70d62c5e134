"""Predictions as one HTML file to browse: no server, no network, nothing beside it.

The file holds its data as JSON and builds what is shown from it, as text nodes alone, so no text of a passage or an
answer is ever read as HTML; a policy in the file lets only its own script run and loads nothing from anywhere. So there
is one place to fill in for each part, and the standard library's ``string.Template`` does; a template language with
loops would have nothing to loop over. Filters stand in the address, ``predictions.html#right=wrong&retrieved=no``, so a
view can be sent as a link.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.reports.error_analysis import ErrorCounts, Judged
from rag_lightning.types import Passage
from rag_lightning.utils.io import atomic_path

PARTS = Path(__file__).with_name("page_parts")


def write_page(
    path: Path, judged: Sequence[Judged], passages: Mapping[str, Passage], *, title: str, max_passages: int = 10
) -> None:
    """Writes the page of some predictions, atomically.

    Args:
        path: An ``.html`` file.
        judged: The predictions.
        passages: With their texts, by id.
        title: Of the page.
        max_passages: Of each question at most, from the best; the page says how many there were.

    Raises:
        ConfigError: A file of another kind, or no passage to show.
        DataError: No prediction.
    """
    if path.suffix != ".html":
        raise ConfigError(f"page: expected a file ending in .html, got {str(path)!r}. Rename it.")
    if max_passages < 1:
        raise ConfigError(f"page_passages: expected at least 1, got {max_passages}.")
    if not judged:
        raise DataError("page: expected at least one prediction, came none.")
    script, style = ((PARTS / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    data = json.dumps(_data(judged, passages, max_passages), ensure_ascii=False, allow_nan=False)
    text = Template((PARTS / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        style=style,
        script=script,
        script_hash=_policy_hash(script),
        style_hash=_policy_hash(style),
        data=data.replace("<", "\\u003c"),  # so that no text can end the element that holds it
    )
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def _data(judged: Sequence[Judged], passages: Mapping[str, Passage], max_passages: int) -> dict[str, Any]:
    """Returns what the page shows; a passage's text stands in it once, however often it was retrieved."""
    shown = {found.id for one in judged for found in one.prediction.passages[:max_passages] if found.id}
    counts = ErrorCounts.of(judged)
    return {
        "questions": [_item(one, max_passages) for one in judged],
        "passages": {key: [passages[key].title, passages[key].text] for key in sorted(shown)},
        "counts": dict(counts.counts),
        "without": [counts.num_right_without_passage, counts.num_without_passage],
    }


def _item(judged: Judged, max_passages: int) -> dict[str, Any]:
    prediction, question = judged.prediction, judged.question
    found = list(zip(prediction.passages, judged.holds_answer, judged.is_gold, strict=True))[:max_passages]
    item: dict[str, Any] = {
        "id": prediction.id,
        "question": prediction.question,
        "answer": prediction.answer,
        "accepted": list(question.answers),
        "pattern": question.answer_regex,
        "probability": _number(math.exp(min(0.0, prediction.log_likelihood))),
        "verdict": judged.verdict,
        "retrieved": judged.retrieved,
        "found": len(prediction.passages),
        "passages": [
            [one.id, _number(one.probability), _number(one.posterior), int(holds), int(gold)]
            for one, holds, gold in found
        ],
    }
    posteriors = prediction.token_posteriors
    if posteriors is not None and posteriors.tokens:
        rows = [[_number(value) for value in row] for row in posteriors.probabilities[:max_passages]]
        item["tokens"], item["heat"] = list(posteriors.tokens), rows
    return item


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _policy_hash(text: str) -> str:
    """Returns what a content security policy knows a script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
