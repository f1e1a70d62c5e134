"""Which rows and columns the recipes of papers have, and their configurations, composed."""

from functools import cache

import hydra
from omegaconf import DictConfig, OmegaConf

from rag_lightning.cli.hydra_app import conf_dir, register_resolvers

CONF = conf_dir()
QA = ("nq", "triviaqa", "webquestions", "curatedtrec")
TEXTS = ("jeopardy", "msmarco", "fever3", "fever2")
COLUMNS = {
    "rag/table1_rag_token": QA,
    "rag/table1_rag_sequence": QA,
    "rag/table2_bart": TEXTS,
    "rag/table2_rag_token": TEXTS,
    "rag/table2_rag_sequence": TEXTS,
    **{
        f"rag/table6_rag_{kind}{way}": (*QA, *TEXTS)
        for kind in ("token", "sequence")
        for way in ("", "_frozen", "_bm25")
    },
    "rag/hotswap": ("nq", "squad_open"),
    "rag_end2end/squad_original": ("squad_open",),
    "rag_end2end/squad_end2end": ("squad_open",),
    "realm/ict": ("nq",),
    "realm/fresh": ("nq",),
    "realm/stale": ("nq",),
    "realm/finetune": ("nq", "webquestions", "curatedtrec"),
    "fid/base": ("nq", "triviaqa"),
    "fid/large": ("nq", "triviaqa"),
    "atlas/nq_64_shot": ("nq",),
    "dpr/single_nq": ("nq_gold",),
    "dpr/single_nq_mined_negatives": ("nq_gold",),
}
HEADS = ("bert/conll2003_ner",)
PAIRS = [(row, column) for row, columns in COLUMNS.items() for column in columns]


def compose(*overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose("train", list(overrides))


@cache
def composed(row: str, column: str | None, scale: str = "paper") -> DictConfig:
    """Returns a recipe to look at: composed once for all tests, so never to be changed."""
    columns = [f"dataset={column}"] if column is not None else []
    config = compose(f"experiment={row}", *columns, "task.folder=D", f"scale={scale}")
    OmegaConf.set_readonly(config, True)
    return config
