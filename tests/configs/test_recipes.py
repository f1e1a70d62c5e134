"""Recipes of papers: every row composes with every column, builds and runs at both sizes with tiny models."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rag_lightning.cli.prepared import with_prepared
from rag_lightning.corpora.fetch.sources import read_sources
from rag_lightning.corpora.questions import read_questions
from rag_lightning.index.factory import index_size
from rag_lightning.reports.papers import paper_results, paper_table, table_names
from rag_lightning.utils.io import read_json
from tests.labelled_files import write_labelled
from tests.recipe_files import NUMBER, write_published, write_samples
from tests.recipe_rows import COLUMNS, CONF, HEADS, PAIRS, compose, composed

SHARED = Path(__file__).parents[3] / "shared" / "data"
NUM_RECIPES = 24
NUM_FIGURES = 117  # of papers' tables, that headers give
NUM_CLUES = 1  # of those made up, tested on at the small size: few answers, divided by their hash
NUM_PAIRS = 85  # rows with each of their columns
DATASETS = sorted({column for _, column in PAIRS})
PAPERS = ("rag", "rag_end2end", "realm", "fid", "atlas", "dpr", "bert")


def header(row: str) -> str:
    text = (CONF / "experiment" / f"{row}.yaml").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if line.startswith("#"))


def test_the_recipes_are_all_here() -> None:
    files = {path.relative_to(CONF / "experiment").with_suffix("").as_posix()
             for paper in PAPERS for path in (CONF / "experiment" / paper).glob("*.yaml")}  # fmt: skip
    assert files == {*COLUMNS, *HEADS}
    assert len(files) == NUM_RECIPES
    assert len(PAIRS) == NUM_PAIRS
    published = {path.stem for path in (CONF / "dataset").glob("*.yaml")} - {"base"}
    assert published == set(DATASETS)
    samples = {path.stem.removeprefix("mini_") for path in (CONF / "dataset" / "sample").glob("mini_*.yaml")}
    assert samples == published - {"msmarco"}, "nothing of MS-MARCO is small and at hand"
    rows = {path.relative_to(CONF / "scale" / "rows").with_suffix("").as_posix().removeprefix("mini_")
            for path in (CONF / "scale" / "rows").rglob("*.yaml")}  # fmt: skip
    assert rows <= files


def followed(row: str) -> str:
    """Returns a recipe's header and those of the recipes that it names, which tell its data and hardware."""
    rows, queue = [], [row]
    while queue:
        one = queue.pop()
        rows.append(one)
        paper = one.partition("/")[0]
        named = [f"{paper}/{name}" for name in re.findall(r"(\w+)\.yaml", header(one))]
        queue += [other for other in named if other in {*COLUMNS, *HEADS} and other not in (*rows, *queue)]
    return "\n".join(header(one) for one in rows)


@pytest.mark.parametrize("row", [*COLUMNS, *HEADS])
def test_a_header_tells_what_a_reader_needs(row: str) -> None:
    text = header(row)
    assert f"rag-lightning train experiment={row}" in text
    assert "scale=mini" in text
    assert "Expected" in text
    assert re.search(r"Hardware: .{0,200}(hour|day|week|minute)", followed(row), re.DOTALL), "its own or its source's"
    known = read_sources(hydra_sources())
    fetched = re.findall(r"rag-lightning data fetch (.*?) output=", followed(row))
    assert fetched
    for command in fetched:
        assert set(command.split()) <= set(known)
    for command in re.findall(r"rag-lightning evaluate .*", text):
        assert "trainer=gpu" in command, "an evaluation is on a CPU unless told"


def expected_figures() -> list[tuple[str, str, float]]:
    """Returns each figure of a paper's table that a recipe reproduces on a data set that it takes."""
    found = []
    for name in table_names():
        table = paper_table(name)
        for row, recipe in table.experiments.items():
            for column in table.columns.values():
                figure = table.figure(row, column.name)
                taken = not column.datasets or set(column.datasets) & set(COLUMNS.get(recipe, ()))
                if figure is not None and taken:
                    found.append((recipe, f"{name}/{column.name}", figure))
    pretrained = paper_table("realm/stale").figures  # measured after fine-tuning, by no recipe alone
    for recipe, row in (("realm/fresh", "fresh"), ("realm/stale", "stale_30x")):
        found += [(recipe, column, figure) for column, figure in pretrained[row].items() if figure is not None]
    return found


def test_a_header_gives_each_figure_of_the_paper_with_a_tolerance() -> None:
    figures = expected_figures()
    assert len(figures) == NUM_FIGURES
    told = {*COLUMNS, *HEADS} - {recipe for recipe, _, _ in figures}
    assert told == {"rag/hotswap", "realm/ict"}, "of evaluations in other corpora; without a published figure"
    missing = [
        (recipe, where, figure)
        for recipe, where, figure in figures
        if not re.search(rf"(?<![\d.]){re.escape(str(figure))} ± \d", header(recipe))
    ]
    assert missing == []
    swapped = paper_results()["rag"]["index_hot_swap_82_leaders"]
    for figure in (swapped["matched_2016"], swapped["matched_2018"], *swapped["mismatched"]):
        assert f"{figure} ± " in header("rag/hotswap")


def test_development_sets_are_evaluated_as_the_headers_say() -> None:
    for row in (row for row in COLUMNS if row.startswith("rag/table6")):
        text = header(row)
        assert "data.test=VALIDATION" in text
        assert "msmarco, fever3, fever2: without data.test" in text, "their test file is the development set"
    for row in ("rag/table2_rag_token", "rag/table2_rag_sequence", "rag/table6_rag_token", "rag/table6_rag_sequence"):
        assert "jeopardy, msmarco: num_passages=10" in header(row)


def test_the_index_takes_the_memory_that_the_header_says() -> None:
    factory = composed("rag/table1_rag_token", "nq").index.factory
    gigabytes = round(index_size(factory, 768).bytes_for(21_015_324) / 1e9)
    assert f"{gigabytes} GB of memory for the index in each process" in header("rag/table1_rag_token")


def settings_of(config: DictConfig) -> dict[str, Any]:
    """Returns what papers' recipes say, in their words."""
    accumulate = config.trainer.get("accumulate_grad_batches", 1)
    learns = [name for name in ("query_encoder", "passage_encoder", "generator") if config.optim[f"train_{name}"]]
    rates = {config.optim[f"lr_{name}"] for name in learns}
    return {
        "gpus": config.trainer.devices,
        "batch": config.data.batch_size * accumulate,
        "accumulate": accumulate,
        "lr": rates.pop() if len(rates) == 1 else sorted(rates),
        "schedule": config.optim.schedule,
        "warmup_steps": config.optim.warmup_steps,
        "weight_decay": config.optim.weight_decay,
        "adam_eps": config.optim.eps,
        "epochs": config.trainer.max_epochs,
        "steps": config.trainer.max_steps,
        "clip": config.trainer.gradient_clip_val,
        "label_smoothing": config.objective.get("label_smoothing"),
        "hard_negatives": config.objective.get("hard_negatives"),
        "objective": config.model.objective,
        "max_source": config.encoder.max_query_tokens,
        "max_target": config.model.max_target_tokens,
        "target_tokens": config.model.max_target_tokens,
        "max_tokens": config.encoder.max_query_tokens + 2,  # and the two that BERT adds
        "n_docs": config.model.num_passages,
        "n_contexts": config.model.num_passages,
        "max_combined": config.model.prompt.max_tokens,
        "text_tokens": config.model.prompt.max_tokens,
    }


UNLIKE = {"dropout", "attention_dropout", "title_sep", "doc_sep"}
RECIPES = {  # where a script says its settings; those that it tells in other words (below), or that a header names
    "rag/table1_rag_sequence": ("rag.recipe_transformers_script", UNLIKE),
    "rag/table1_rag_token": ("rag.recipe_transformers_script", UNLIKE),
    "rag_end2end/squad_original": ("rag_end2end.recipe", {"reindex_every_batches", "index"}),
    "rag_end2end/squad_end2end": ("rag_end2end.recipe", {"reindex_every_batches", "index"}),
    "atlas/nq_64_shot": (
        "atlas.recipe_nq_64_shot",
        {"gpus", "lr_retriever", "loss", "temperature_gold", "temperature_score", "refresh"},
    ),
    "dpr/single_nq": ("dpr.recipe", set()),
    "dpr/single_nq_mined_negatives": ("dpr.recipe", set()),
}


@pytest.mark.parametrize("row", RECIPES)
def test_a_recipe_has_the_settings_of_the_paper(row: str) -> None:
    place, apart = RECIPES[row]
    paper, _, name = place.partition(".")
    told = dict(paper_results()[paper][name])
    told["batch"] = told["gpus"] * told.pop("per_gpu_batch") * told.get("accumulate", 1)
    ours = settings_of(composed(row, COLUMNS[row][0]))
    assert apart <= set(told)
    assert {key: ours[key] for key in set(told) - apart} == {key: told[key] for key in set(told) - apart}


def test_a_recipe_has_what_its_paper_says_in_other_words() -> None:
    end2end = composed("rag_end2end/squad_end2end", "squad_open")
    told = paper_results()["rag_end2end"]["recipe"]
    assert end2end.reindex.schedule == told["reindex_every_batches"] // told["accumulate"], "batches, of which 8 a step"
    assert f"{end2end.index.factory}, inner product" == told["index"]
    assert end2end.model.metric == "inner_product"
    rag, script = composed("rag/table1_rag_token", "nq"), paper_results()["rag"]["recipe_transformers_script"]
    assert rag.model.prompt.passage_template == "{title}" + script["title_sep"] + "{text}"
    assert rag.model.prompt.question_template == script["doc_sep"] + "{question}"
    atlas, told = composed("atlas/nq_64_shot", "nq"), paper_results()["atlas"]["recipe_nq_64_shot"]
    ((loss, settings),) = atlas.objective.retriever_losses.items()
    assert (loss, settings.temperature, settings.atlas_compat) == (told["loss"], told["temperature_gold"], True)
    assert atlas.model.temperature == pytest.approx(told["temperature_score"] * 768**0.5, abs=5e-4)
    assert atlas.optim.lr_query_encoder == told["lr_retriever"]
    assert not atlas.optim.train_passage_encoder, "query-side tuning"


def hydra_sources() -> Any:
    return OmegaConf.to_container(OmegaConf.load(CONF / "data.yaml").sources)


def test_every_source_is_well_formed() -> None:
    sources = read_sources(hydra_sources())
    named = "nq_open triviaqa webquestions curatedtrec msmarco fever searchqa wikipedia conll2003"
    assert set(named.split()) <= set(sources)
    assert all(source.about for source in sources.values())


LENGTHS = {  # tokens of a target that is learned, and of an answer that is written: at the paper's size, the small one
    "jeopardy": ((64, 50), (48, 40)),
    "msmarco": ((128, 100), (128, 100)),
    "fever3": ((6, 6), (6, 6)),
    "fever2": ((6, 6), (6, 6)),
}
OTHER_LENGTHS = {  # of papers whose rows tell them; DPR's read and write nothing
    "fid/base": (50, 50),
    "fid/large": (50, 50),
    "atlas/nq_64_shot": (16, 16),
    "realm/ict": (32, 24),
    "realm/fresh": (32, 24),
    "realm/stale": (32, 24),
    "realm/finetune": (16, 24),
}


def lengths(row: str, column: str, scale: str) -> tuple[int, int]:
    return OTHER_LENGTHS.get(row) or LENGTHS.get(column, ((25, 25), (25, 25)))[scale == "mini"]


@pytest.mark.parametrize(("row", "column"), PAIRS)
def test_every_row_composes_with_its_columns(row: str, column: str) -> None:
    """The paper's size names the paper's parts and the column's data; the small size names none that is downloaded.

    A row is composed after its column: when RAG's rows told how long answers are, clues were cut at 25 tokens.
    """
    paper, mini = composed(row, column), composed(row, column, "mini")
    for scale, config in (("paper", paper), ("mini", mini)):
        found = (config.model.max_target_tokens, config.decoding.max_new_tokens)
        assert found == lengths(row, column, scale) or row.startswith("dpr/"), "which neither reads nor writes"
    assert paper.run_name == mini.run_name == row.replace("/", "_")
    assert paper.trainer.accelerator == "gpu"
    assert paper.trainer.devices > 1 or row == "realm/finetune"
    assert "/" in str(paper.generator.source)
    assert paper.data.batch_size > mini.data.batch_size or row.startswith("rag_end2end")
    assert (mini.trainer.accelerator, mini.trainer.max_steps, mini.encoder.source) == ("cpu", 60, "minilm")
    assert mini.generator._target_.endswith("from_config")
    assert mini.index.factory == "exact"
    assert paper.model.objective == mini.model.objective
    assert (paper.model.num_passages == 0) == (mini.model.num_passages == 0) == (row == "rag/table2_bart")
    sequence = paper.model.objective == "rag_sequence"
    if column in ("jeopardy", "msmarco"):
        assert paper.decoding.mode == mini.decoding.mode == ("rag_sequence_fast" if sequence else "rag_token")
        assert paper.decoding.num_beams == 4
    stays = row.endswith(("_frozen", "_bm25")) or row.startswith("fid/")
    assert paper.optim.train_query_encoder == mini.optim.train_query_encoder == (not stays)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("recipes")
    write_labelled(root / "mini")
    return {"paper": write_published(root / "paper"), "mini": write_samples(root / "mini")}


# nothing of MS-MARCO is small and at hand: what its small size says is tested below
SIZES = [
    (column, scale) for column in DATASETS for scale in ("paper", "mini") if (column, scale) != ("msmarco", "mini")
]


@pytest.mark.parametrize(("column", "scale"), SIZES)
def test_every_column_is_prepared_at_both_sizes(
    column: str, scale: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    row = next(row for row, one in PAIRS if one == column)
    chosen = (f"experiment={row}", f"dataset={column}", f"scale={scale}", f"task.folder={folders[scale]}")
    config = with_prepared(compose(*chosen, f"paths.cache_dir={tmp_path}"))
    assert Path(config.data.passages).is_file()
    train, test = (read_questions(config.data[split]) for split in ("train", "test"))
    assert read_questions(config.task.prepared + "/validation.jsonl")
    assert all(question.answers for question in train)
    if column in ("nq", "webquestions"):
        assert all(len(question.answers) == 1 for question in train), "each answer is an example of its own"
    if column == "nq" and scale == "mini":
        assert not [question for question in train if "known" in question.question], "the development set's"
        assert test[0].positive_passage_ids
    if column == "curatedtrec":
        assert all(question.answer_regex is not None and not question.answers for question in test)
        assert train[0].answers[0].startswith("Maker")
    if column.startswith("fever"):
        words = {question.answers[0] for question in [*train, *test]}
        allowed = Path(config.decoding.allowed).read_text().split()
        assert words <= set(allowed)
        assert allowed == ["true", "false", "unknown"][: 3 if column == "fever3" else 2]
    if column == "nq_gold":
        assert all(question.positive_passage_ids for question in train)
        mined = [bool(question.negative_passage_ids) for question in train]
        assert set(mined) == {scale == "paper"}, "at the small size they are mined first, by a command of the header"
    divided = {("jeopardy", "mini"): NUM_CLUES}  # one file of which a tenth is tested on
    whole = {"fever2": 27, "msmarco": NUMBER - 1}.get(column, NUMBER)
    assert len(test) == divided.get((column, scale), whole)


AT_HAND = {  # passages, and questions to train, validate and test on
    "nq": (4007, 9612, 880, 1355),
    "triviaqa": (4007, 7964, 865, 4999),
    "webquestions": (4007, 7112, 755, 1422),
    "curatedtrec": (4007, 1521, 172, 536),
    "jeopardy": (4007, 1679, 228, 210),
    "fever3": (4007, 7174, 826, 1999),
    "fever2": (4007, 4802, 546, 1318),
    "squad_open": (2067, 5219, 511, 1338),
    "nq_gold": (2067, 5176, 554, 1338),
}
PREPARE = """
import json, sys
from hydra import compose, initialize_config_dir
from rag_lightning.cli.hydra_app import conf_dir, register_resolvers
from rag_lightning.cli.prepared import with_prepared
register_resolvers()
with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
    for column, row in json.loads(sys.argv[3]).items():
        chosen = [f"experiment={row}", f"dataset={column}", "scale=mini", f"task.folder={sys.argv[1]}"]
        config = with_prepared(compose("train", [*chosen, f"paths.cache_dir={sys.argv[2]}"]))
        print(column, config.task.prepared, sep="|")
"""


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not there")
def test_every_small_column_is_prepared_from_the_data_at_hand(tmp_path: Path) -> None:
    """In a process of its own: a hundred thousand aliases, each call type-checked, would take minutes."""
    rows = {column: next(row for row, one in PAIRS if one == column) for column in AT_HAND}
    command = [sys.executable, "-c", PREPARE, str(SHARED), str(tmp_path), json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    folders = dict(line.split("|") for line in done.stdout.splitlines() if line.count("|") == 1)
    found = {
        column: tuple(
            (Path(folder) / f"{name}.jsonl").read_bytes().count(b"\n")
            for name in ("passages", "train", "validation", "test")
        )
        for column, folder in folders.items()
    }
    assert found == AT_HAND
    assert set(AT_HAND) == set(DATASETS) - {"msmarco"}
    trained = (Path(folders["triviaqa"]) / "train.jsonl").read_text(encoding="utf-8")
    assert '"answers": ["["' not in trained, "lists taken apart into characters are put together again"


TINY = "d_model=16 encoder_layers=1 decoder_layers=1 encoder_attention_heads=2 decoder_attention_heads=2"
TINY += " encoder_ffn_dim=24 decoder_ffn_dim=24"
# one column of each row runs, in turn; MS-MARCO, which has no small size, with tiny models: test_paper_scale.py
SMALL = {row: [column for column in columns if column != "msmarco"] for row, columns in COLUMNS.items()}
RUNS = [(row, columns[number % len(columns)]) for number, (row, columns) in enumerate(SMALL.items())]


@pytest.mark.parametrize(("row", "column"), RUNS)
def test_every_row_runs(row: str, column: str, folders: dict[str, Path], cli: Any, tmp_path: Path) -> None:
    if row.endswith("_bm25"):
        pytest.importorskip("bm25s", reason="needs the extra bm25")
    small = [f"task.folder={folders['mini']}", f"paths.cache_dir={tmp_path / 'cache'}", "scale=mini"]
    small += [f"generator.settings.{one}" for one in TINY.split()]
    small += "encoder=own_vocabulary encoder.settings.hidden_size=16 model.num_passages=2 data.batch_size=4".split()
    if row == "rag/table2_bart":
        small.remove("model.num_passages=2")
    small += "trainer.enable_progress_bar=false trainer.max_steps=2 trainer.val_check_interval=2".split()
    small += "trainer.limit_test_batches=1 data.limit_validation=4 data.eval_batch_size=4".split()
    if row.startswith("dpr/"):
        small.append(f"data.train={folders['mini'] / 'squad_open' / 'train.jsonl.gz'}")
    if row == "rag_end2end/squad_end2end":
        small.append("reindex.schedule=1")
    cli("train", tmp_path / "run", f"experiment={row}", f"dataset={column}", *small)
    metrics = read_json(tmp_path / "run" / "metrics.json")
    wanted = "bleu1" if column == "jeopardy" else "exact_match"
    assert wanted in metrics or row.startswith(("dpr/", "realm/ict"))
    assert (tmp_path / "run" / "model").is_dir()
    if row == "rag_end2end/squad_end2end":
        assert len(list((tmp_path / "run" / "index").glob("step*"))) > 1


def test_the_tagging_recipe_runs_small_on_other_data(
    folders: dict[str, Path], cli: Any, tmp_path: Path, tiny_world: Any
) -> None:
    words = PreTrainedTokenizerFast.from_pretrained(tiny_world.tokenizer)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(**size, vocab_size=len(words), max_position_embeddings=80)).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    small = f"task.folder={folders['mini']} reader.source={tmp_path / 'bert'} reader.max_tokens=32 trainer.max_steps=2"
    small += " task.data.allow_unknown=true trainer.enable_progress_bar=false trainer.val_check_interval=2"
    cli("train", tmp_path / "run", "experiment=bert/conll2003_ner", "scale=mini", *small.split())
    assert read_json(tmp_path / "run" / "metrics.json")


def test_what_has_no_small_form_says_what_is_missing(folders: dict[str, Path], cli: Any, tmp_path: Path) -> None:
    chosen = ("experiment=rag/table2_rag_token", "dataset=msmarco", "scale=mini", f"task.folder={folders['mini']}")
    with pytest.raises(SystemExit, match="msmarco"):
        cli("train", tmp_path / "run", *chosen, f"paths.cache_dir={tmp_path}")
