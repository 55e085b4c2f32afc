"""Runs on W&B's server, through wandb's public API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from anonfw.compare.experiment import Experiment
from anonfw.compare.sources import from_wandb
from anonfw.errors import AnonfwError
from anonfw.wandb_files import STEP, StoredRun

MOST_RUNS = 50  # a group with more is no comparison that a person reads
PAGE = re.compile(r"(?:https?://[^/]+/)?([^/\s]+)/([^/\s]+)/(?:runs/)?([^/\s?#]+)(?:[?#].*)?")


def address(word: str, project: str | None) -> tuple[str, str] | None:
    """(project's path, id, name or group) of a run on the server; None where neither `word` nor `project` tells it."""
    if project is not None:
        return project, word
    page = PAGE.fullmatch(word)
    return (f"{page[1]}/{page[2]}", page[3]) if page else None


def read(project: str, word: str) -> list[Experiment]:
    """The runs of `project` whose id, name or group is `word`, oldest first.

    Raises:
        AnonfwError: not logged in, no network, no such project, no such run, or more than MOST_RUNS of them.
    """
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        api = wandb.Api()
        chosen = {"$or": [{"name": word}, {"display_name": word}, {"group": word}]}
        runs = list(api.runs(project, filters=chosen, order="+created_at", lazy=False)[: MOST_RUNS + 1])
        if not runs:
            raise AnonfwError(f"W&B's {project} has no run with the id, name or group {word!r}")
        if len(runs) > MOST_RUNS:
            raise AnonfwError(f"W&B's {project} has more than {MOST_RUNS} runs in {word!r}: name those to compare")
        return [from_wandb(stored(run), f"wandb:{project}/{run.id}") for run in runs]
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:  # no key, or a wrong one
        raise AnonfwError(f"W&B does not let us in: `wandb login`, or WANDB_API_KEY ({_line(error)})") from error
    except (wandb.errors.Error, WandbApiFailedError, ValueError) as error:
        raise AnonfwError(f"cannot read {project} from W&B: {_line(error)}") from error


def stored(run: Any) -> StoredRun:
    """A run of wandb's API as its files would have it, every row of its history included."""
    return StoredRun(
        id=run.id,
        name=run.name,
        project=run.project,
        config=dict(run.config),
        summary=_plain(run.summary_metrics),
        rows=[row for row in run.scan_history() if STEP in row],
    )


def _plain(tree: Any) -> Any:
    return {key: _plain(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
