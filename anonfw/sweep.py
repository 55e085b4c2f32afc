"""The verb `sweep`: a recipe times values: every combination is a run, and all of them are one group of W&B's."""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from anonfw import recipe as recipes
from anonfw.errors import AnonfwError

LOGGER = "loggers.wandb={{_target_: anonfw.training.loggers.wandb, _partial_: true, group: {group}}}"
OPENING, CLOSING, QUOTES = "[{(", "]})", "'\""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m anonfw sweep`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; recipes/ of the package is searched too")
    parser.add_argument(
        "overrides",
        metavar="key=v1,v2",
        nargs="+",
        help="a dotted key and one or more YAML values; commas inside brackets and quotes belong to a value",
    )
    parser.add_argument(
        "--group", metavar="NAME", help="log to W&B as a group of this name (default: only where the recipe logs there)"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="train nothing, print a line a run: its overrides, quoted for a shell, for `launch slurm --sweep FILE`",
    )


def run(args: argparse.Namespace) -> int:
    """Train one combination after the other; 1 if one of them failed. The same command again goes on where it was."""
    lines = combinations(args.recipe, args.overrides, args.group)
    if args.list:
        print("\n".join(map(shlex.join, lines)))
        return 0
    failed = []
    for number, line in enumerate(lines, start=1):
        print(f"== run {number} of {len(lines)}: {shlex.join(line)}", flush=True)
        if folder := finished(args.recipe, line):
            print(f"finished already: {folder}", flush=True)
            continue
        code = train(args.recipe, line)
        if code in (130, -2):
            raise KeyboardInterrupt
        if code:
            failed.append(f"run {number} (exit code {code}): {shlex.join(line)}")
    folders = [str(folder) for line in lines if (folder := finished(args.recipe, line))]
    if folders:
        print(f"compare them: python -m anonfw compare {shlex.join(folders)}")
    if failed:
        print("\n".join(["failed:", *failed]), file=sys.stderr)
    return 1 if failed else 0


def train(recipe: str, overrides: Sequence[str]) -> int:
    """Exit code of `fit` in a process of its own: nothing is left of one run in the next."""
    return subprocess.run([sys.executable, "-m", "anonfw", "fit", recipe, *overrides]).returncode


def combinations(recipe: str, overrides: Sequence[str], group: str | None = None) -> list[list[str]]:
    """The overrides of each run: every value of each key with every value of the others, the last key varying fastest.

    Args:
        group: of the runs on W&B; None names one after recipe and keys, if the recipe logs there.
    Raises:
        AnonfwError: a key twice, or no key with several values. RecipeError: with the mistakes of every combination.
    """
    choices = [_choices(text) for text in overrides]
    keys = [options[0].partition("=")[0] for options in choices]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise AnonfwError(f"{twice[0]} is written twice; write its values with commas: {twice[0]}=1,2")
    varied = [key for key, options in zip(keys, choices, strict=True) if len(options) > 1]
    if not varied:
        raise AnonfwError("nothing to sweep: give a key several values, such as system.guidance=1,2,3")
    plain = recipes.load(recipe)
    if group is None and (plain.get("loggers") or {}).get("wandb"):
        group = "-".join([plain.name, *(key.rpartition(".")[2] for key in varied)])
    extra = [LOGGER.format(group=group)] if group else []
    lines = [[*chosen, *extra] for chosen in itertools.product(*choices)]
    mistakes = [mistake for line in lines for mistake in recipes.check(recipes.load(recipe, line))]
    if mistakes:
        raise recipes.RecipeError(list({str(mistake): mistake for mistake in mistakes}.values()))
    return lines


def finished(recipe: str, overrides: Sequence[str]) -> Path | None:
    """The run folder of the newest finished run of this recipe; None if there is none."""
    from anonfw.training import runs
    from anonfw.training.fit import PLACE

    resolved = recipes.load(recipe, list(overrides))
    text = recipes.dump({key: value for key, value in resolved.items() if key not in PLACE})
    return runs.find_finished(resolved.name, runs.fingerprint(text))


def _choices(text: str) -> list[str]:
    """`a.b=1,[2,3]` -> `a.b=1`, `a.b=[2,3]`."""
    key, equals, written = text.partition("=")
    if not equals or not key:
        raise AnonfwError(f"{text!r} is no override: write key=value or key=value1,value2")
    values, depth, quote = [""], 0, ""
    for character in written:
        if character == "," and not depth and not quote:
            values.append("")
            continue
        if character in QUOTES and quote in ("", character):
            quote = "" if quote else character
        elif not quote:
            depth += (character in OPENING) - (character in CLOSING)
        values[-1] += character
    return [f"{key}={value}" for value in values]
