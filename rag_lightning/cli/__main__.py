"""``rag-lightning COMMAND [key=value …]``; ``python -m rag_lightning`` is the same."""

import importlib
import os
import sys
from collections.abc import MutableMapping

COMMANDS = {
    "train": "fit on your data, then test; -m sweeps",
    "evaluate": "metrics and predictions of a finished run on a question file",
    "predict": "answer questions, with passages and their probabilities",
    "index": "plan, build, verify, describe or benchmark an index snapshot",
    "mine": "hard negatives for a question file",
    "data": "fetch published data and checkpoints, or list them",
    "report": "one table of several runs",
    "benchmark": "this machine: ours, transformers' RAG and the bare models side by side",
}
INDEX_ACTIONS = ("plan", "build", "verify", "info", "benchmark")
DATA_ACTIONS = ("fetch", "list")
SPIN_COUNT = 30_000
"""How often a thread of GNU's OpenMP looks again before it gives its core away; the default is ten times as many."""


def main() -> None:
    """Runs the command named first on the command line."""
    arguments = sys.argv[1:]
    parent = os.environ.get("RAG_LIGHTNING_COMMAND")
    if parent is not None and "LOCAL_RANK" in os.environ and arguments[:1] != [parent]:
        arguments = [parent, *arguments]  # started by Lightning (trainer=ddp), which passes Hydra's settings alone
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: rag-lightning COMMAND [key=value …]\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<11}{purpose}")
        print("\nrag-lightning COMMAND --help shows a command's settings.")
        return
    command = arguments[0]
    if command not in COMMANDS:
        sys.exit(f"error: expected one of {', '.join(COMMANDS)}, got {command!r}. See rag-lightning --help.")
    rest = arguments[1:]
    if command == "index" and rest and rest[0] in INDEX_ACTIONS:
        rest = [f"action={rest[0]}", *rest[1:]]
    if command == "data" and rest and rest[0] in DATA_ACTIONS:
        rest = [f"action={rest[0]}", *with_names(rest[1:])]
    rest = [quoted(argument) for argument in rest]
    spin_less(os.environ)
    from rag_lightning.cli.hydra_app import run_app

    module = importlib.import_module(f"rag_lightning.cli.{command}")
    run_app(command, module.run, rest)


def spin_less(environment: MutableMapping[str, str]) -> None:
    """Lets threads that wait for one another give their cores away sooner, unless the user has said how they wait.

    Beside another busy program the thread that is waited for has no core while the others spin on theirs. Read when
    torch is loaded, so this comes before.

    >>> environment = {}
    >>> spin_less(environment)
    >>> environment
    {'GOMP_SPINCOUNT': '30000'}
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def with_names(arguments: list[str]) -> list[str]:
    """Returns arguments whose bare words stand together as ``names``.

    >>> with_names(["nq_open", "wikipedia", "output=DIR"])
    ['names=[nq_open,wikipedia]', 'output=DIR']
    """
    names = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    settings = [argument for argument in arguments if argument not in names]
    return [f"names=[{','.join(names)}]", *settings] if names else settings


def quoted(argument: str) -> str:
    """Returns ``question=…`` with its text in quotes, so that commas and apostrophes are no syntax.

    >>> print(quoted("question=who wrote Alice, and Bob's film?"))
    question="who wrote Alice, and Bob's film?"
    """
    key, _, text = argument.partition("=")
    if key != "question" or text in ("", "null") or (text[0] in "'\"" and text[-1] == text[0]):
        return argument
    escaped = text.replace('"', '\\"')
    return f'{key}="{escaped}"'


if __name__ == "__main__":
    main()
