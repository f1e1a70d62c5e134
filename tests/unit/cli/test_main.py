"""The first word of the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rag_lightning.cli.__main__ import COMMANDS, main, quoted

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("question=who made Kismet", 'question="who made Kismet"'),
        ("question=a, b: {c} [d] = 'e'", "question=\"a, b: {c} [d] = 'e'\""),
        ('question=the "Kid"', 'question="the \\"Kid\\""'),
        ('question="quoted already"', 'question="quoted already"'),
        ("question='quoted already'", "question='quoted already'"),
        ("question=", "question="),
        ("question=null", "question=null"),
        ("questions=a,b", "questions=a,b"),
        ("decoding.num_beams=1,2", "decoding.num_beams=1,2"),
    ],
)
def test_a_question_is_quoted_for_hydra(argument: str, expected: str) -> None:
    assert quoted(argument) == expected


@pytest.mark.parametrize("text", ["a, b: {c} [d] = 'e'", 'the "Kid" ran', "100 % (so)", "#1 & more?"])
def test_hydra_reads_the_quoted_question_back(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([quoted(f"question={text}")])
    assert override.value() == text
    assert not override.is_sweep_override()


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rag-lightning", *arguments])
    main()
    shown = capsys.readouterr().out
    for name, purpose in COMMANDS.items():
        assert name in shown
        assert purpose in shown


def test_an_unknown_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rag-lightning", "dance"])
    with pytest.raises(
        SystemExit, match="expected one of train, evaluate, predict, index, mine, data, report, benchmark, got 'dance'"
    ):
        main()


def test_every_command_has_a_primary_configuration_and_a_module() -> None:
    for name in COMMANDS:
        assert (ROOT / "conf" / f"{name}.yaml").is_file()
        assert (ROOT / "rag_lightning" / "cli" / f"{name}.py").is_file()


@pytest.mark.parametrize("statement", ["import rag_lightning", "import rag_lightning.cli.__main__"])
def test_importing_is_cheap_and_silent(statement: str) -> None:
    heavy = "torch transformers lightning hydra numpy faiss wandb".split()
    program = f"{statement}; import sys; loaded = set({heavy}) & set(sys.modules); assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_public_names_are_there() -> None:
    import rag_lightning

    for name in rag_lightning.__all__:
        assert getattr(rag_lightning, name) is not None
        assert name in dir(rag_lightning)
    with pytest.raises(AttributeError, match="no attribute 'RagModle'"):
        _ = rag_lightning.RagModle


WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Watch())
sys.argv = ["rag-lightning", "train"]
from rag_lightning.cli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_are_told_how_to_wait_before_torch_is_loaded(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        [sys.executable, "-c", WATCH], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **given}
    )
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
