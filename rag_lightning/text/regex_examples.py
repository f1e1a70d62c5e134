"""Plain texts that a regular expression of answers accepts: what to train on where answers are such expressions.

CuratedTREC states its answers so, ``Sept?(ember)?|Feb(ruary)?``, and a generator learns from texts. Where no passage
shows one, Lewis et al. 2020 (appendix) write out the expression: each alternative, each optional part present and
absent. Here likewise, the fullest form first, as far as the syntax of such answers goes (groups, alternatives,
``? * +``, ``{m,n}``, classes, escapes); what the expression itself does not accept is left out, so that what is
returned is right even where the reading is not.
"""

import unicodedata
from dataclasses import dataclass
from itertools import islice, product

from rag_lightning.text.normalise import compile_answer_regex

MAX_EXAMPLES = 64
_CLASSES = {"s": " ", "d": "0", "w": "a", "b": "", "B": "", "S": "a", "D": "a", "W": " ", "n": " ", "t": " "}


def regex_examples(pattern: str, limit: int = MAX_EXAMPLES) -> list[str]:
    r"""Returns texts that a pattern accepts whole, in the order of its alternatives; perhaps none.

    Args:
        pattern: As :func:`~rag_lightning.text.normalise.compile_answer_regex` takes it.
        limit: Forms written out at most, before those that are not accepted are left out.

    Raises:
        DataError: The pattern is not a regular expression.

    >>> regex_examples(r"Sept?(ember)?|New\s?York")
    ['September', 'Sept', 'Sepember', 'Sep', 'New York', 'NewYork']
    """
    compiled = compile_answer_regex(pattern)
    forms = dict.fromkeys(" ".join(text.split()) for text in islice(_Parser(pattern, limit).alternatives(), limit))
    return [text for text in forms if text and compiled.fullmatch(unicodedata.normalize("NFD", text)) is not None]


@dataclass
class _Parser:
    """Reads a pattern from left to right, writing out what each part may be."""

    pattern: str
    limit: int
    place: int = 0

    def alternatives(self) -> list[str]:
        """Returns the forms of everything up to the end of the group."""
        forms = self._sequence()
        while self._next_is("|"):
            self.place += 1
            forms += self._sequence()
        return forms

    def _next_is(self, character: str) -> bool:
        return self.pattern[self.place : self.place + 1] == character

    def _sequence(self) -> list[str]:
        forms = [""]
        while self.place < len(self.pattern) and self.pattern[self.place] not in "|)":
            part = self._repeated(self._atom())
            forms = [a + b for a, b in islice(product(forms, part), self.limit)]
        return forms

    def _atom(self) -> list[str]:
        character = self.pattern[self.place]
        self.place += 1
        if character == "(":
            return self._group()
        if character == "[":
            return self._character_class()
        if character == "\\" and self.place < len(self.pattern):
            self.place += 1
            escaped = self.pattern[self.place - 1]
            return [_CLASSES.get(escaped, escaped)]
        if character in "^$":
            return [""]
        if character == "." and self.pattern[self.place : self.place + 1] in ("*", "+", "?", "{"):
            return [" "]
        return [character]  # a dot that stands alone is mostly meant as one

    def _group(self) -> list[str]:
        if self._next_is("?"):  # (?: and its like: what follows the colon; look-around stands for nothing
            marks = self.pattern[self.place + 1 : self.place + 2]
            self.place += 2
            forms = self.alternatives()
            forms = forms if marks == ":" else [""]
        else:
            forms = self.alternatives()
        self.place += 1
        return forms

    def _character_class(self) -> list[str]:
        end = self.pattern.find("]", self.place + 1)
        end = len(self.pattern) if end < 0 else end
        inside = self.pattern[self.place : end]
        self.place = end + 1
        first = inside[1:2] if inside.startswith("\\") else inside[:1]
        return [_CLASSES.get(first, first)] if inside.startswith("\\") else [first]

    def _repeated(self, forms: list[str]) -> list[str]:
        """Returns the forms of an atom with what says how often it stands."""
        character = self.pattern[self.place : self.place + 1]
        if character == "{" and "}" in self.pattern[self.place :]:
            end = self.pattern.index("}", self.place)
            least = self.pattern[self.place + 1 : end].split(",")[0]
            self.place = end + 1
            return [form * int(least) for form in forms] if least.isdigit() else forms
        if not character or character not in "?*+":
            return forms
        self.place += 1
        if self._next_is("?"):  # as few as possible: the same texts
            self.place += 1
        return forms if character == "+" else [*forms, ""]
