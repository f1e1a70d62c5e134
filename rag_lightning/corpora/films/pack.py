"""Packs the film world's warmed-up model: ``python -m rag_lightning.corpora.films.pack RETRIEVER_RUN READER_RUN``.

Takes the query tower of a run of ``experiment=films/warm_retriever`` and the generator of one of
``experiment=films/warm_reader``, packs their weights (float16, word vectors float8; safetensors) and
puts them into ``model/`` beside this file, with what trained them. ``make films-model`` does all of it.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from rag_lightning.utils.io import atomic_directory, existing_file

WEIGHTS = "model.safetensors"
MAX_BYTES = 8_000_000
TERM_WEIGHTS = "log_weights.weight"
WORD_VECTORS = ("vectors.weight", "model.shared.weight")
"""Of the retriever and the reader; stored in float8 (e4m3). The rounding moves a vector by 3 % of its length: the
reader answers as before (``RESULTS.md``), and the room goes to more dimensions."""
WEIGHT_RATE = 30.0
"""The packed retriever's term weights learn three times as fast as in its warm-up: joint training has few steps, and
by weights it learns which words of a question do not matter. The same weights, otherwise divided."""
TOLD = ("run_name", "seed", "objective", "optim")
"""What ``trained_by.yaml`` keeps of a run's configuration: nothing of the machine that it ran on."""


def pack(retriever_run: Path, reader_run: Path, target: Path) -> int:
    """Writes ``target`` and returns its size in bytes.

    Raises:
        MissingFileError: A run has no saved model.
        ValueError: The result is larger than 8 MB.
    """
    sources = {
        "encoder": (retriever_run, retriever_run / "model" / "encoder" / "query"),
        "generator": (reader_run, reader_run / "model" / "generator"),
    }
    with atomic_directory(target, replace=True) as part:
        for name, (run, source) in sources.items():
            weights = load_file(existing_file(source / WEIGHTS, f"{name} weights"))
            (part / name).mkdir()
            config = json.loads(existing_file(source / "config.json", f"{name} configuration").read_text("utf-8"))
            if TERM_WEIGHTS in weights:
                weights[TERM_WEIGHTS] *= config["weight_rate"] / WEIGHT_RATE
                config["weight_rate"] = WEIGHT_RATE
            (part / name / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            packed = {
                key: value.to(torch.float8_e4m3fn if key in WORD_VECTORS else torch.float16)
                for key, value in weights.items()
            }
            save_file(packed, part / name / WEIGHTS, metadata={"format": "pt"})
            settings = yaml.safe_load(existing_file(run / "config.yaml", f"{name} run").read_text(encoding="utf-8"))
            kept = {key: settings[key] for key in TOLD}
            (part / name / "trained_by.yaml").write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
            (part / name / WEIGHTS).chmod(0o644)
        size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise ValueError(f"the packed model has {size:,} bytes, more than the {MAX_BYTES:,} it may ship with")
    return size


def main() -> None:
    """Packs the runs named on the command line."""
    parser = argparse.ArgumentParser(description="Pack the film world's warmed-up model.")
    parser.add_argument("retriever_run", type=Path)
    parser.add_argument("reader_run", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    arguments = parser.parse_args()
    size = pack(arguments.retriever_run, arguments.reader_run, arguments.output)
    print(f"{arguments.output}: {size:,} bytes")


if __name__ == "__main__":
    main()
