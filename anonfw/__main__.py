"""The verbs: `python -m anonfw VERB ...`. A verb is one row of VERBS; its module is imported when it is called.

Each module offers `add_arguments(parser)` and `run(args) -> int` (the exit code) and imports nothing heavy at its top.
Exit codes: 0 done, 1 mistakes found or a crash (with traceback), 2 wrong usage or an expected error, 75 stopped
by a signal and saved, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from anonfw import __version__
from anonfw.errors import AnonfwError


class Verb(NamedTuple):
    module: str
    summary: str
    example: str


VERBS = {
    "check": Verb(
        "anonfw.check",
        "print a recipe with everything resolved, or every mistake in it",
        "python -m anonfw check recipes/id2face.yaml trainer.max_steps=100",
    ),
    "fit": Verb(
        "anonfw.training.fit",
        "train a recipe's system, or resume its last run, and print its result table",
        "python -m anonfw fit recipes/id2face.yaml trainer.max_steps=100",
    ),
    "validate": Verb(
        "anonfw.evaluate.validate",
        "measure a trained system on people it has never seen and print the table",
        "python -m anonfw validate runs/id2face/LATEST",
    ),
    "anonymize": Verb(
        "anonfw.photographs",
        "anonymize every face in photographs with a trained system",
        "python -m anonfw anonymize runs/id2face/LATEST holiday.jpg party.jpg --out anonymized",
    ),
    "weights": Verb(
        "anonfw.weights_verb",
        "list, fetch or verify the pretrained networks",
        "python -m anonfw weights list",
    ),
    "embed": Verb(
        "anonfw.data.sidecars",
        "compute a data set's identity embeddings once and keep them beside its shards",
        "python -m anonfw embed path/to/dataset --encoder arcface_mbf",
    ),
    "launch": Verb(
        "anonfw.launch.verb",
        "submit a training or an array job to SLURM, or check before a start",
        "python -m anonfw launch slurm recipes/id2face.yaml --nodes 2 --gpus-per-node 4 --dry-run",
    ),
    "export": Verb(
        "anonfw.export",
        "turn a checkpoint into weights, recipe and model card that others can load",
        "python -m anonfw export runs/id2face/LATEST exported",
    ),
    "compare": Verb(
        "anonfw.compare",
        "put runs side by side: table, recipe differences, cost, plots, as one HTML page",
        "python -m anonfw compare runs/id2face",
    ),
    "sweep": Verb(
        "anonfw.sweep",
        "train a recipe once for each combination of values, or list the combinations",
        "python -m anonfw sweep recipes/id2face.yaml system.guidance=1,2,3 --group guidance",
    ),
    "doctor": Verb(
        "anonfw.doctor",
        "show versions, devices, weights, caches, and whether the GPU really computes",
        "python -m anonfw doctor",
    ),
}


def overview() -> str:
    """The text of `python -m anonfw --help`."""
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        f"anonfw {__version__}: train, measure and run face anonymization\n\n"
        "usage: python -m anonfw VERB [arguments]\n\n"
        f"verbs:\n{rows}\n\n"
        "  python -m anonfw VERB --help    arguments and an example\n"
        "  python -m anonfw --version\n\n"
        "start here:\n  python -m anonfw fit recipes/id2face.yaml\n"
    )


def parser_of(name: str) -> tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], int]]:
    """The argument parser of one verb and what runs it. Imports that verb's module and no other."""
    verb = VERBS[name]
    summary = verb.summary[0].upper() + verb.summary[1:] + "."
    parser = argparse.ArgumentParser(
        prog=f"python -m anonfw {name}",
        description=summary,
        epilog=f"example:\n  {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module = importlib.import_module(verb.module)
    module.add_arguments(parser)
    return parser, module.run


def dispatch(arguments: list[str]) -> int:
    """Run one verb; errors pass through."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(__version__)
        return 0
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"anonfw: no verb {name!r}; {hint}There are: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    parser, run = parser_of(name)
    try:
        args = parser.parse_intermixed_args(rest)  # key=value before and after options
    except TypeError:  # a parser with sub-commands cannot intermix
        args = parser.parse_args(rest)
    return run(args)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        return dispatch(sys.argv[1:] if arguments is None else arguments)
    except AnonfwError as error:
        print("\n".join([f"anonfw: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("anonfw: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has left: point stdout elsewhere, or the interpreter complains again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
