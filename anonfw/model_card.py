"""The text of a model card: what an exported system is, what made it, what it is worth, and what it is not for."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anonfw.errors import AnonfwError

if TYPE_CHECKING:
    from anonfw.export import Source


def model_card(source: Source, use: str) -> str:
    """Markdown. `use` says how the weights are loaded. No path of the machine that trained is in it."""
    facts, system = source.facts, source.recipe["system"]["_target_"]
    measured = _read_table(source.table)
    parts = [
        f"# {source.name}",
        f"A face anonymizer of anonfw {facts['anonfw']}: `{system}`, {facts['parameters'] / 1e6:.2f} M trained "
        f"parameters ({facts['dtype']}). Load it with {use}.",
        _section("How it was made", _training(source)),
        _section("Training data", _data(source.recipe)),
        _section("Privacy", _privacy(measured)),
        _section("Result table", _table(source.table)),
        _section("Intended use", USE),
        _section("Out of scope", OUT_OF_SCOPE),
        _section("Licences", _licences(source, measured)),
        f"Weights: {facts['bytes']} bytes, sha256 `{facts['sha256']}`.",
    ]
    return "\n\n".join(parts) + "\n"


USE = (
    "Research on face anonymization, and replacing the people in photographs by people who do not exist, where the "
    "result is verified before it is published: measure leakage with a recogniser of your own choice, keep what "
    "passes, and look at it."
)
OUT_OF_SCOPE = (
    "Anything that needs a guarantee. The numbers here hold for the recogniser, the threshold and the people that they "
    "were measured on; another recogniser, the background, clothes, gait, text, metadata or several photographs of one "
    "event can still tell who somebody is. Not for impersonation, not for putting a chosen person's face into a "
    "picture, and not for evading a lawful identity check. Faces outside what it was trained on (size, pose, age, skin "
    "tone, occlusion) are anonymized less well, or worse to look at."
)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}"


def without_paths(text: str) -> str:
    """Absolute paths cut to their last part: a card tells nothing about the machine."""
    return re.sub(r"(?<![\w.:/])~?/(?:[^/\s='\",]+/)*([^/\s='\",]+)", r"\1", text)


def _training(source: Source) -> str:
    facts, recipe = source.facts, source.recipe
    lines = []
    if facts["command"]:
        lines.append(f"- command: `{shlex.join(facts['command'])}`")
    lines.append(f"- commit: `{facts['commit'] or 'unknown'}` (+ behind it: with local changes)")
    start = recipe.get("init")
    lines.append(f"- started from: {without_paths(str(start)) if start else 'scratch'}")
    if facts["steps"]:
        lines.append(f"- steps: {facts['steps']}{_images(facts, recipe)}")
    if facts["seconds"]:
        lines.append(f"- wall time: {facts['seconds'] / 60:.1f} minutes since the last start of the command")
    lines.append(f"- weights: {facts['from']['file']}, sha256 `{facts['from']['sha256'][:16]}`")
    return "\n".join(lines)


def _images(facts: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    train, trainer = recipe["data"]["train"], recipe["trainer"]
    per_step = train["batch_size"] * (2 if train.get("mode") in ("pairs", "cross") else 1)
    per_step *= trainer.get("accumulate_grad_batches", 1)
    images = facts["steps"] * per_step * (facts["ranks"] or 1)
    return f", {images} images seen" + ("" if facts["ranks"] else " by each process")


def _data(recipe: Mapping[str, Any]) -> str:
    from anonfw.data.card import Card, DataError
    from anonfw.data.table import local_folder

    train = recipe["data"]["train"]
    dataset, split = str(train.get("dataset") or recipe["dataset"]), train["split"]
    try:
        card = Card.load(local_folder(dataset))
    except (DataError, OSError):
        unread = "Its card could not be read here: ask who trained it for source and licence."
        return f"`{without_paths(dataset)}`, split {split}. {unread}"
    shards = card.of_split(split)
    people, photos = sum(s.identities for s in shards), sum(s.samples for s in shards)
    limits = [f"{k} {train[k]}" for k in ("limit_identities", "limit_samples") if train.get(k)]
    lines = [
        f"- {card.name}, split {split}: {people} people, {photos} photos of {card.image_size} px"
        + (f" (used: {', '.join(limits)})" if limits else ""),
        f"- source: {without_paths(card.source)}",
        f"- licence: {card.licence}",
    ]
    return "\n".join(lines)


def _read_table(folder: Path | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    try:
        return json.loads((folder / "table.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise AnonfwError(f"no result table in {folder}: {error}") from error


def _privacy(table: Mapping[str, Any] | None) -> str:
    if table is None:
        return "Not measured: the run has no result table of these weights (`python -m anonfw validate RUN` makes one)."
    if "judge" not in table:
        return "It makes no pictures, so the table below measures no anonymization: measure the system that uses it."
    lines = [
        f"Recogniser: {table['judge']['name']} (sha256 {table['judge']['sha256'][:16]}), which neither conditioned nor "
        f"trained this system. {table['people']} people and {table['photos']} photos never trained on, "
        f"{table['draws']} anonymizations of each. 95 % intervals.",
        "",
    ]
    ours, original = table["rows"]["anonymized"], table["rows"].get("original", {})
    for threshold in table["thresholds"]:
        label = f"{threshold['fpr']:.0e}".replace("e-0", "e-")
        text = f"- cosine > {threshold['value']:.4f} (false positive rate {label}): "
        text += f"an anonymized photo is matched to its own original in {_rate(ours[f'tpr_source@{label}'])}"
        text += f", to another photo of the person in {_rate(ours[f'tpr_other@{label}'])}"
        if f"tpr_other@{label}" in original:
            text += f"; two original photos of a person in {_rate(original[f'tpr_other@{label}'])}"
        lines.append(text)
    return "\n".join(lines)


def _rate(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "- %"
    interval = "" if estimate["low"] is None else f" [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"
    return f"{100 * estimate['value']:.1f} %{interval}"


def _table(folder: Path | None) -> str:
    if folder is None:
        return "None."
    path = folder / "table.md"
    if not path.exists():
        raise AnonfwError(f"{folder} has a table.json, but no table.md; run validate again")
    return path.read_text().strip()


def _licences(source: Source, table: Mapping[str, Any] | None) -> str:
    lines = [
        "The code is Apache-2.0. The trained parameters also depend on what they were trained on and with: see the "
        "licence of the training data above, and of the frozen networks, which are not part of the file:",
        "",
    ]
    lines += [f"- {name}: {licence}" for name, licence in sorted(source.licences.items())]
    for place in _released(source.recipe["system"]):
        lines.append(f"- {without_paths(place)}: released weights, under the licence of their publisher")
    if table is not None and "judge" in table:
        lines.append(f"- {table['judge']['name']}, the judge of the table only: {table['judge']['licence']}")
    return "\n".join(lines)


def _released(node: Any) -> list[str]:
    """Every `source` of a node: weights opened from a folder or a hub (`pretrained_unet`, `Autoencoder`)."""
    if isinstance(node, Mapping):
        own = [str(node["source"])] if "_target_" in node and "source" in node else []
        return sorted({*own, *(place for value in node.values() for place in _released(value))})
    return []
