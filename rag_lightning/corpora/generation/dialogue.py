"""Dialogue: the next turn of a conversation, from the turns before it.

Every turn but the first is a question: its history, each turn behind its speaker's mark, is what is asked, and the turn
itself the answer. Only the last ``max_turns`` of the history are kept; where they are still too long for the model,
``model.prompt.keep_question=end`` drops their beginning::

    Anna: Do you like the film? Ben: I do.      →      Who directed it?

- DailyDialog (Li et al. 2017; generally given as CC BY-NC-SA 4.0): ``{"id", "utterances": [str, …]}``. The passages are
  the training dialogues, whole, and none finds itself: the next turn of one dialogue stands in the history of the turn
  after it, so that passages of single turns would give answers away.
- CMU DoG (Zhou et al. 2018; licence not stated): dialogues ``{"id", "wiki_idx", "who_saw_doc": ["user1"], "history":
  [{"uid", "section", "text"}, …]}`` about documents ``{"wiki_idx", "section", "content"}``. The passages are the
  documents' sections; the gold one is the section that was shown when a turn was written.
- KdConv (Zhou et al. 2020, Chinese; Apache-2.0): ``{"id", "messages": [{"text", "knowledge": [[head, relation, tail],
  …]}, …]}``. The passages are the triples of all messages and of the knowledge bases ``kb_DOMAIN`` that are there; the
  gold ones are those attached to a turn.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rag_lightning.corpora.generation.parts import EXAMPLES, data_file, divided_by
from rag_lightning.corpora.generation.prepared import PreparedData, Split
from rag_lightning.corpora.passages import PassageCorpus, string_field
from rag_lightning.corpora.records import identified_lines, present, string_list
from rag_lightning.errors import ConfigError, DataError, MissingFileError
from rag_lightning.types import Passage, Question
from rag_lightning.utils.io import open_text

logger = logging.getLogger(__name__)
Triple = tuple[str, str, str]
_FIELDS = ("year", "genre", "director", "cast", "rating", "introduction", "critical_response")


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a dialogue.

    Attributes:
        speaker: The mark before it.
        text: What is said.
        knowledge: Ids of the passages that it is grounded in.
        wanted: Whether it is to be learned and asked for; else it is history only.
    """

    speaker: str
    text: str
    knowledge: tuple[str, ...] = ()
    wanted: bool = True


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue and, where passages were made of it, the id of its own."""

    id: str
    turns: tuple[Turn, ...]
    source_passage_id: str | None = None


def history(turns: Sequence[Turn]) -> str:
    """Returns turns as one text, each behind its speaker's mark.

    >>> history([Turn("A", "Hello."), Turn("B", "Hi!")])
    'A: Hello. B: Hi!'
    """
    return " ".join(f"{turn.speaker}: {turn.text}" for turn in turns)


def questions_of(dialogues: Sequence[Dialogue], max_turns: int) -> list[Question]:
    """Returns a question for each wanted turn that has a history.

    Args:
        dialogues: With unique ids.
        max_turns: How many turns of the history are kept, the last ones.

    Raises:
        ConfigError: ``max_turns`` below 1.
    """
    if max_turns < 1:
        raise ConfigError(f"task.prepare.max_turns: expected 1 or more, came {max_turns}.")
    return [
        Question(
            f"{dialogue.id}-{place}",
            history(dialogue.turns[max(0, place - max_turns) : place]),
            (turn.text,),
            positive_passage_ids=turn.knowledge,
            source_passage_id=dialogue.source_passage_id,
        )
        for dialogue in dialogues
        for place, turn in enumerate(dialogue.turns)
        if place > 0 and turn.wanted
    ]


def _prepared(
    passages: Sequence[Passage],
    max_turns: int,
    train: Sequence[Dialogue],
    validation: Sequence[Dialogue],
    test: Sequence[Dialogue],
) -> PreparedData:
    parts: dict[Split, Sequence[Dialogue]] = {"train": train, "validation": validation, "test": test}
    return PreparedData(passages, {split: questions_of(part, max_turns) for split, part in parts.items()})


@dataclass(frozen=True, kw_only=True)
class DailyDialog:
    """Reads dialogues of two speakers who take turns.

    Attributes:
        folder: Holds ``train`` and ``test`` (``.jsonl.gz`` or ``.jsonl``).
        validation_share: Of the training dialogues, by hashes of their ids.
        max_turns: Of the history.
        passages: ``examples``, the training dialogues, or a passage file.
    """

    folder: str
    validation_share: float = 0.1
    max_turns: int = 8
    passages: str = EXAMPLES

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        shares = (1 - self.validation_share, self.validation_share)
        train, validation = divided_by(self._read("train"), lambda dialogue: dialogue.id, shares)
        if self.passages != EXAMPLES:
            searched = list(PassageCorpus.read(self.passages))
        else:
            searched = [Passage(id=one.id, title="", text=history(one.turns)) for one in train]
            train = [Dialogue(one.id, one.turns, one.id) for one in train]
        return _prepared(searched, self.max_turns, train, validation, self._read("test"))

    def _read(self, split: str) -> list[Dialogue]:
        dialogues = []
        for place, record_id, record in identified_lines(data_file(self.folder, split)):
            texts = [
                string_field({"utterances": text}, "utterances", place)
                for text in string_list(record, "utterances", place)
            ]
            turns = tuple(Turn("AB"[number % 2], text.strip()) for number, text in enumerate(texts))
            dialogues.append(Dialogue(f"{split}-{record_id}", turns))
        return dialogues


@dataclass(frozen=True, kw_only=True)
class CmuDog:
    """Reads dialogues about documents.

    Attributes:
        folder: Holds ``documents``, ``train``, ``dev`` and ``test`` (``.jsonl.gz`` or ``.jsonl``).
        speakers: Whose turns are asked for: of those who saw the document (``informed``), or of ``all``.
        max_turns: Of the history.
    """

    folder: str
    speakers: Literal["informed", "all"] = "informed"
    max_turns: int = 8

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        if self.speakers not in ("informed", "all"):
            raise ConfigError(f"task.prepare.speakers: expected informed or all, came {self.speakers!r}.")
        sections = self._sections()
        known = {passage.id for passage in sections}
        train, validation, test = (self._read(name, known) for name in ("train", "dev", "test"))
        return _prepared(sections, self.max_turns, train, validation, test)

    def _sections(self) -> list[Passage]:
        file = data_file(self.folder, "documents")
        titles: dict[str, str] = {}
        texts: dict[tuple[str, str], str] = {}
        for place, _, record in identified_lines(file):
            document = str(present(record, "wiki_idx", place, "a document's number"))
            section = str(present(record, "section", place, "a section's number"))
            content = present(record, "content", place, "a text or a mapping of fields")
            if isinstance(content, Mapping):
                titles[document] = string_field(content, "movieName", place)
                content = " ".join(_field(content[name]) for name in _FIELDS if content.get(name))
            texts[document, section] = string_field({"content": content}, "content", place)
        return [
            Passage(f"{document}-{section}", titles.get(document, ""), " ".join(text.split()))
            for (document, section), text in texts.items()
        ]

    def _read(self, name: str, known: set[str]) -> list[Dialogue]:
        file = data_file(self.folder, name)
        dialogues, num_blank = [], 0
        for place, record_id, record in identified_lines(file):
            informed = string_list(record, "who_saw_doc", place)
            document = present(record, "wiki_idx", place, "a document's number")
            turns = []
            for said in present(record, "history", place, "a list of turns"):
                text = " ".join(string_field(said, "text", place, blank=True).split())
                passage_id = f"{document}-{present(said, 'section', place, 'a number')}"
                if passage_id not in known:
                    raise DataError(
                        f"{place}: expected sections of the documents, came section {passage_id} (document-section), "
                        "which is not there. Check that dialogues and documents belong together."
                    )
                speaker = string_field(said, "uid", place)
                num_blank += not text
                if text:
                    wanted = self.speakers == "all" or speaker in informed
                    turns.append(Turn(speaker, text, (passage_id,), wanted))
            dialogues.append(Dialogue(f"{name}-{record_id}", tuple(turns)))
        if num_blank:
            logger.info("%s: %d turns without text left out", file, num_blank)
        return dialogues


def _field(value: Any) -> str:
    return f"{'; '.join(str(one).strip() for one in value) if isinstance(value, list) else str(value).strip()}."


@dataclass(frozen=True, kw_only=True)
class KdConv:
    """Reads Chinese dialogues about triples of knowledge.

    The published training files are not needed: ``DOMAIN_dev`` is divided, by hashes of ids, to train and validate on.

    Attributes:
        folder: Holds ``DOMAIN_dev`` and ``DOMAIN_test`` and perhaps ``kb_DOMAIN`` (``.jsonl.gz`` or ``.jsonl``).
        domains: Which.
        validation_share: Of the dialogues of ``DOMAIN_dev``.
        max_turns: Of the history.
    """

    folder: str
    domains: Sequence[str] = ("film", "music", "travel")
    validation_share: float = 0.1
    max_turns: int = 8

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        ids: dict[Triple, str] = {}
        for domain in self.domains:
            self._read_knowledge(domain, ids)
        dev = [dialogue for domain in self.domains for dialogue in self._read(f"{domain}_dev", ids)]
        test = [dialogue for domain in self.domains for dialogue in self._read(f"{domain}_test", ids)]
        train, validation = divided_by(dev, lambda one: one.id, (1 - self.validation_share, self.validation_share))
        passages = [Passage(one, head, f"{relation}\uff1a{tail}") for (head, relation, tail), one in ids.items()]
        return _prepared(passages, self.max_turns, train, validation, test)

    def _read_knowledge(self, domain: str, ids: dict[Triple, str]) -> None:
        try:
            file = data_file(self.folder, f"kb_{domain}")
        except MissingFileError:
            logger.info("%s: no kb_%s; its passages are the triples of its dialogues", self.folder, domain)
            return
        with open_text(file) as stream:
            for number, line in enumerate(stream, start=1):
                place = f"{file}, line {number}"
                try:
                    triple = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{place}: expected [head, relation, tail], came {line[:80]!r}: {error}") from error
                _number(_triple(triple, place), ids)

    def _read(self, name: str, ids: dict[Triple, str]) -> list[Dialogue]:
        dialogues = []
        for place, record_id, record in identified_lines(data_file(self.folder, name)):
            turns = []
            for number, message in enumerate(present(record, "messages", place, "a list of messages")):
                triples = [_triple(one, place) for one in present(message, "knowledge", place, "a list of triples")]
                knowledge = tuple(dict.fromkeys(_number(one, ids) for one in triples))
                turns.append(Turn("AB"[number % 2], string_field(message, "text", place).strip(), knowledge))
            dialogues.append(Dialogue(f"{name}-{record_id}", tuple(turns)))
        return dialogues


def _triple(value: Any, place: str) -> Triple:
    if not (isinstance(value, list) and len(value) == 3 and all(isinstance(one, str) and one.strip() for one in value)):
        raise DataError(f"{place}: expected [head, relation, tail] of non-empty strings, came {str(value)[:80]}.")
    return (value[0], value[1], value[2])


def _number(triple: Triple, ids: dict[Triple, str]) -> str:
    return ids.setdefault(triple, f"triple-{len(ids)}")
