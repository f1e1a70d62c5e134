"""The sizes of a benchmark, as data: models, batch, texts, decoding, and how often each is measured."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args

from rag_lightning.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]
Lengths = Literal["drawn", "equal"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is measured, in numbers.

    Attributes:
        name: Named in results.
        device: ``cpu`` or ``cuda``.
        dtype: ``bfloat16`` computes under autocast; weights stay float32.
        encoder_layers: Of the query encoder.
        encoder_width: Its hidden size, and D.
        encoder_heads: Its attention heads.
        generator_layers: Of the generator's encoder, and as many of its decoder.
        generator_width: Its hidden size.
        generator_ffn: Its feed-forward size.
        generator_heads: Its attention heads.
        generator_positions: The longest input it has positions for.
        vocab_size: V, of both.
        num_corpus_passages: N.
        batch_size: B.
        num_passages: K.
        max_combined_length: The longest context; transformers' side pads every context to it.
        max_target_tokens: The longest target, start token not included.
        num_beams: Of decoding.
        max_new_tokens: Every answer has so many.
        lengths: ``drawn`` from the kept quantiles, or all ``equal`` to the longest.
        num_batches: Different batches, cycled identically for each side.
        num_encoded: Passages that the encoding part encodes.
        repeats: Measurements of each side.
        warmup: Runs of each side before the first measurement.
        seed: Of weights, texts and vectors.

    Raises:
        ConfigError: A number below its least, a width that the heads do not divide, K larger than the corpus.
    """

    name: str
    device: Device = "cpu"
    dtype: Dtype = "float32"
    encoder_layers: int
    encoder_width: int
    encoder_heads: int
    generator_layers: int
    generator_width: int
    generator_ffn: int
    generator_heads: int
    generator_positions: int
    vocab_size: int
    num_corpus_passages: int
    batch_size: int
    num_passages: int
    max_combined_length: int
    max_target_tokens: int
    num_beams: int
    max_new_tokens: int
    lengths: Lengths = "drawn"
    num_batches: int = 4
    num_encoded: int = 512
    repeats: int = 7
    warmup: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name not in ("seed", "warmup") and value < 1:
                raise ConfigError(f"benchmark: expected {field.name} of at least 1, came {value}. Raise it.")
        for width, heads in (("encoder_width", "encoder_heads"), ("generator_width", "generator_heads")):
            if getattr(self, width) % getattr(self, heads) != 0:
                raise ConfigError(
                    f"benchmark: expected {width} to be a multiple of {heads}, came {getattr(self, width)} and "
                    f"{getattr(self, heads)}. Change one of them."
                )
        if self.num_passages > self.num_corpus_passages:
            raise ConfigError(
                f"benchmark: expected num_passages (K) of at most num_corpus_passages = {self.num_corpus_passages}, "
                f"came {self.num_passages}. Lower K, or search more passages."
            )
        if self.max_target_tokens < 2:
            raise ConfigError(
                f"benchmark: expected max_target_tokens of at least 2, came {self.max_target_tokens}. transformers' "
                "RAG-Sequence loses the prior of an answer of one scored token: raise it."
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Shape":
        """Returns the shape of a configuration's settings.

        Raises:
            ConfigError: An unknown or missing setting, a number that is none, or as the class.
        """
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"benchmark: expected sizes among {', '.join(known)}, came {', '.join(unknown)}.")
        for name, value in settings.items():
            wanted = int if known[name].type is int else str
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ConfigError(f"benchmark: expected {name} to be of type {wanted.__name__}, came {value!r}.")
        for name, values in (("device", Device), ("dtype", Dtype), ("lengths", Lengths)):
            if name in settings and settings[name] not in get_args(values):
                expected = " or ".join(get_args(values))
                raise ConfigError(f"benchmark: expected {name} {expected}, came {settings[name]!r}. Choose one.")
        missing = [name for name, field in known.items() if field.default is MISSING and name not in settings]
        if missing:
            raise ConfigError(f"benchmark: sizes are missing: {', '.join(missing)}. Give them, or choose shape=cpu.")
        return cls(**settings)
