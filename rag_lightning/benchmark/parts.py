"""What is measured: each part gives the sides that do the same work, and says why a side is missing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rag_lightning.benchmark import corpus_work
from rag_lightning.benchmark.answering import check_answers, hf_answers, ours_answers
from rag_lightning.benchmark.shape import Lengths
from rag_lightning.benchmark.sides import Kind, Run, check_same, floor_pass, hf_pass, ours_pass, training_step
from rag_lightning.benchmark.world import World
from rag_lightning.decoding.options import DecodingMode
from rag_lightning.errors import ConfigError

OURS, HF, HF_LONGEST, FLOOR = "ours", "hf_rag", "hf_rag_longest", "floor"
SIDES = (OURS, HF, HF_LONGEST, FLOOR)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The sides of a part.

    Attributes:
        runs: By side; called with a number that says which batch to take.
        missing: Why a side is not there.
        check: Called before anything is timed; refuses sides that do not do the same, and returns notes.
    """

    runs: Mapping[str, Run]
    missing: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to measure.

    Attributes:
        make: Builds the sides.
        sides: Those that it may have.
        lengths: The texts' lengths, where the part asks for its own.
        trains: Whether it is a training step, whose memory is estimated before anything is built.
        peak: Whether the peak memory of each side is measured, in a process of its own.
    """

    make: Callable[[World], Task]
    sides: tuple[str, ...]
    lengths: Lengths | None = None
    peak: bool = False
    trains: bool = False


def too_long(world: World) -> str | None:
    """Returns why transformers' side cannot read its contexts, if so."""
    shape = world.shape
    if shape.max_combined_length <= shape.generator_positions:
        return None
    return (
        f"contexts are padded to max_combined_length = {shape.max_combined_length}, and the generator has "
        f"{shape.generator_positions} positions"
    )


def training(kind: Kind) -> Callable[[World], Task]:
    """Returns a training step of one kind of marginal."""

    def make(world: World) -> Task:
        world.model.train()
        runs = {
            OURS: ours_pass(world, kind),
            HF: hf_pass(world, kind),
            HF_LONGEST: hf_pass(world, kind, to_longest=True),
            FLOOR: floor_pass(world),
        }
        reason = too_long(world)
        if reason is not None:
            del runs[HF]
        return Task(
            runs={side: training_step(world, run) for side, run in runs.items()},
            missing={HF: reason} if reason is not None else {},
            check=lambda: check_same(world, kind) if reason is None else {},
        )

    return make


NO_FLOOR = "bare models do not answer from several passages"
NO_HF_FAST = "transformers has no fast decoding of RAG-Sequence"
NO_HF_CORPUS = "transformers' RAG leaves it to others"


def answering(kind: Kind, mode: DecodingMode, *, against_hf: bool = True) -> Callable[[World], Task]:
    """Returns answering a batch in one mode."""

    def make(world: World) -> Task:
        world.model.eval()
        ours, reason = ours_answers(world, mode), too_long(world)
        if not against_hf:
            return Task(runs={OURS: ours}, missing={HF: NO_HF_FAST, FLOOR: NO_FLOOR})
        if reason is not None:
            return Task(runs={OURS: ours}, missing={HF: reason, FLOOR: NO_FLOOR})
        check = check_answers(world, kind, mode)
        return Task(runs={OURS: ours, HF: hf_answers(world, kind)}, missing={FLOOR: NO_FLOOR}, check=check)

    return make


def retrieval(world: World) -> Task:
    """Returns search and context assembly."""
    world.model.train()
    reason = "its RagRetriever searches a data set and tokenises texts in every step, which is left out of its time"
    return Task(runs={OURS: corpus_work.retrieval(world)}, missing={HF: reason, FLOOR: "bare models retrieve nothing"})


def passage_encoding(world: World) -> Task:
    """Returns encoding passages, beside a plain loop over the bare encoder."""
    world.model.eval()
    runs = {OURS: corpus_work.ours_encoding(world), FLOOR: corpus_work.plain_encoding(world)}
    return Task(runs=runs, missing={HF: NO_HF_CORPUS}, check=lambda: corpus_work.check_encoding(world))


def index_build(world: World) -> Task:
    """Returns building an exact index of vectors that are there."""
    missing = {HF: NO_HF_CORPUS, FLOOR: "bare models have no index"}
    return Task(runs={OURS: corpus_work.index_build(world)}, missing=missing)


def token_store_build(world: World) -> Task:
    """Returns building a token store, beside plain calls of the tokenizer."""
    runs = {OURS: corpus_work.store_build(world), FLOOR: corpus_work.plain_tokenising(world)}
    return Task(runs=runs, missing={HF: NO_HF_CORPUS})


PARTS: dict[str, Part] = {
    "training_step_token": Part(make=training("rag_token"), sides=SIDES, peak=True, trains=True),
    "training_step_sequence": Part(make=training("rag_sequence"), sides=SIDES, peak=True, trains=True),
    "training_step_equal_lengths": Part(
        make=training("rag_token"), sides=(OURS, HF, FLOOR), lengths="equal", trains=True
    ),
    "rag_token_beam": Part(make=answering("rag_token", "rag_token"), sides=(OURS, HF)),
    "rag_sequence_fast": Part(make=answering("rag_sequence", "rag_sequence_fast", against_hf=False), sides=(OURS,)),
    "rag_sequence_thorough": Part(make=answering("rag_sequence", "rag_sequence_thorough"), sides=(OURS, HF)),
    "retrieval": Part(make=retrieval, sides=(OURS,)),
    "passage_encoding": Part(make=passage_encoding, sides=(OURS, FLOOR)),
    "index_build": Part(make=index_build, sides=(OURS,)),
    "token_store_build": Part(make=token_store_build, sides=(OURS, FLOOR)),
}


def chosen_parts(names: list[str] | str | None) -> dict[str, Part]:
    """Returns the parts of the given names, in the table's order; all of them for None or ``all``.

    Raises:
        ConfigError: An unknown name.
    """
    if names is None or names == "all":
        return dict(PARTS)
    wanted = [names] if isinstance(names, str) else list(names)
    return {name: PARTS[name] for name in _known(wanted, PARTS, "parts")}


def chosen_sides(names: list[str] | str | None) -> tuple[str, ...]:
    """Returns the sides of the given names; all of them for None or ``all``.

    Raises:
        ConfigError: An unknown name.
    """
    if names is None or names == "all":
        return SIDES
    wanted = [names] if isinstance(names, str) else list(names)
    return tuple(_known(wanted, dict.fromkeys(SIDES), "sides"))


def _known(wanted: list[str], known: Mapping[str, Any], what: str) -> list[str]:
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        came = ", ".join(map(repr, unknown)) or "none"
        raise ConfigError(f"benchmark: expected {what} among {', '.join(known)}, came {came}. Choose some, or all.")
    return [name for name in known if name in wanted]
