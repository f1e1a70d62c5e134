"""A film world in which facts have changed: ``python -m rag_lightning.corpora.films.changed OUTPUT``.

For the index hot-swap of Lewis et al. 2020 (§4.5): there world leaders changed between two dumps of Wikipedia; here
films asked about by a test question change a fact with another such film. A model that answers from its passages
follows when the index is changed, without training; one that answers from its weights does not.

OUTPUT receives ``passages.jsonl.gz``, all 4,000 films with the changed facts, and the same questions twice:
``before.jsonl.gz`` with the answers of the bundled passages, ``after.jsonl.gz`` with those of the changed ones. One
example (MetaQA, CC BY 3.0, see ``README.md``)::

    who stars in Chimpanzee      before: Tim Allen      after: Yolande Moreau
"""

import argparse
import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from rag_lightning.corpora.passages import PassageCorpus, resolve, write_passages
from rag_lightning.corpora.questions import write_questions
from rag_lightning.types import Passage, Question
from rag_lightning.utils.io import read_json_lines

PASSAGES = "bundled:films/passages.jsonl.gz"
QUESTIONS = "bundled:films/test.jsonl.gz"


@dataclass(frozen=True)
class ChangedWorld:
    """Passages after the change, and questions about what changed.

    Attributes:
        passages: All passages, in the corpus's order; those of unchanged films as they were.
        before: Questions with the answers of the passages as they were.
        after: The same questions with the answers of ``passages``.
    """

    passages: list[Passage]
    before: list[Question]
    after: list[Question]


def change_facts(passages: Sequence[Passage], questions: Sequence[tuple[str, Question]]) -> ChangedWorld:
    """Exchanges answers between pairs of films asked the same kind of question.

    A question takes part where it has one answer, one gold passage that tells it, and a title that does not, and where
    its film takes part in no other; its partner is the next such question in an order by hash, with another answer
    that its own passage does not tell anyway. So a changed passage tells the new fact in the old one's place, once.

    Args:
        passages: The corpus.
        questions: Each with its kind, such as ``movie_to_director``.

    >>> films = [Passage("1", "A", "A is a film by Ann Lee."), Passage("2", "B", "B is a film by Bo Ek.")]
    >>> asked = [("director", Question(f"q{p.id}", f"who made {p.title}", (name,), (p.id,)))
    ...          for p, name in zip(films, ("Ann Lee", "Bo Ek"))]
    >>> world = change_facts(films, asked)
    >>> world.passages[0].text, [question.answers for question in world.after]
    ('A is a film by Bo Ek.', [('Bo Ek',), ('Ann Lee',)])
    """
    texts = {passage.id: passage for passage in passages}
    kinds: dict[str, list[Question]] = defaultdict(list)
    taken: set[str] = set()
    for kind, question in sorted(questions, key=lambda pair: _hash(pair[1].id)):
        if _has_one_fact(question, texts) and question.positive_passage_ids[0] not in taken:
            taken.add(question.positive_passage_ids[0])
            kinds[kind].append(question)
    changed: dict[str, Passage] = {}
    after: dict[str, Question] = {}
    for asked in kinds.values():
        for one, other in pairwise(asked):
            if one.id not in after and _can_exchange(one, other, texts):
                for question, partner in ((one, other), (other, one)):
                    passage = texts[question.positive_passage_ids[0]]
                    changed[passage.id] = _retold(passage, question.answers[0], partner.answers[0])
                    after[question.id] = replace(question, answers=partner.answers)
    before = [question for _, question in questions if question.id in after]
    return ChangedWorld(
        [changed.get(passage.id, passage) for passage in passages], before, [after[each.id] for each in before]
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _pattern(answer: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")


def _retold(passage: Passage, old: str, new: str) -> Passage:
    return replace(passage, text=_pattern(old).sub(lambda _: new, passage.text))


def _tells(passage: Passage, answer: str) -> bool:
    return _pattern(answer).search(passage.text) is not None


def _has_one_fact(question: Question, texts: dict[str, Passage]) -> bool:
    if len(question.answers) != 1 or len(question.positive_passage_ids) != 1:
        return False
    passage, answer = texts[question.positive_passage_ids[0]], question.answers[0]
    return _tells(passage, answer) and answer.casefold() not in passage.title.casefold()


def _can_exchange(one: Question, other: Question, texts: dict[str, Passage]) -> bool:
    pairs = ((one, other), (other, one))
    return not any(_tells(texts[mine.positive_passage_ids[0]], yours.answers[0]) for mine, yours in pairs)


def main() -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description="Writes a film world in which facts have changed.")
    parser.add_argument("output", type=Path, help="folder to write to")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    records = [record for _, record in read_json_lines(resolve(QUESTIONS))]
    questions = [
        (r["type"], Question(r["id"], r["question"], tuple(r["answers"]), tuple(r["positive_passage_ids"])))
        for r in records
    ]
    world = change_facts(PassageCorpus.read(resolve(PASSAGES)), questions)
    write_passages(output / "passages.jsonl.gz", world.passages)
    write_questions(output / "before.jsonl.gz", world.before)
    write_questions(output / "after.jsonl.gz", world.after)
    print(f"{len(world.after)} facts changed, written to {output}")


if __name__ == "__main__":
    main()
