"""Released diffusion weights on this machine: what counts as one, and the command that `doctor` prints for it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from anonfw import __main__ as cli
from anonfw import recipe as recipes
from anonfw.released import kind_of, released

SD15 = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768}
SDXL = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 2048, "addition_embed_type": "text_time"}


@pytest.fixture
def empty_machine(monkeypatch, tmp_path) -> Path:
    """Weights by hand in `hand`, the hub's cache in `hub`; both empty."""
    monkeypatch.setenv("ANONFW_WEIGHTS", str(tmp_path / "hand"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def pipeline(folder: Path, unet: dict, weights: bool = True) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "config.json").write_text(json.dumps(unet))
    if weights:
        (folder / "unet" / "diffusion_pytorch_model.safetensors").touch()
    return folder


def test_nothing_is_found_where_nothing_is(empty_machine):
    assert [(row.kind, row.pipeline, row.adapter) for row in released()] == [("sd15", None, None), ("sdxl", None, None)]
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0" in released()[1].command()


def test_both_places_are_searched_and_the_hand_wins(empty_machine):
    cached = empty_machine / "hub" / "models--somebody--sdxl" / "snapshots" / "0123abc"
    pipeline(cached, SDXL)
    assert released()[1].pipeline == cached
    by_hand = pipeline(empty_machine / "hand" / "sdxl", SDXL)
    pipeline(empty_machine / "hand" / "stable" / "sd15", SD15)
    adapter = (
        empty_machine / "hub" / "models--h94--IP-Adapter-FaceID" / "snapshots" / "77" / "ip-adapter-faceid_sdxl.bin"
    )
    adapter.parent.mkdir(parents=True)
    adapter.touch()
    sd15, sdxl = released()
    assert sdxl == ("sdxl", by_hand, adapter) and sd15.adapter is None
    assert sd15.pipeline == empty_machine / "hand" / "stable" / "sd15"
    assert "train one with python -m anonfw fit" in sd15.command()


@pytest.mark.parametrize(
    "change",
    [
        {"in_channels": 9},
        {"cross_attention_dim": 1024},
        {"cross_attention_dim": 32},
        {"cross_attention_dim": [768, 768]},
        {"addition_embed_type": "text_time"},
    ],
    ids=str,
)
def test_other_models_are_not_taken_for_it(tmp_path, change):
    assert kind_of(pipeline(tmp_path / "model", SD15 | change)) is None


def test_half_a_pipeline_is_none(tmp_path):
    assert kind_of(pipeline(tmp_path / "no_weights", SDXL, weights=False)) is None
    assert kind_of(tmp_path / "not_there") is None
    damaged = pipeline(tmp_path / "damaged", SDXL)
    (damaged / "unet" / "config.json").write_text("{")
    assert kind_of(damaged) is None


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_printed_command_is_one_that_the_program_takes(empty_machine, kind):
    """The verb exists, its recipe passes `check` with the printed overrides."""
    pipeline(empty_machine / "hand" / "base", SD15 if kind == "sd15" else SDXL)
    (empty_machine / "hand" / f"ip-adapter-faceid_{kind}.bin").touch()
    row = next(row for row in released() if row.kind == kind)
    words = shlex.split(row.command())
    assert words[:3] == ["python", "-m", "anonfw"] and words[3] in cli.VERBS and words[-1] == "PHOTOGRAPH"
    overrides = [word for word in words[5:] if "=" in word]
    assert f"system.backbone.source={row.pipeline}" in overrides and f"init={row.adapter}" in overrides
    assert recipes.check(recipes.load(words[4], overrides)) == []


def test_doctor_shows_it(empty_machine, capsys):
    assert cli.main(["doctor", "diffusion"]) == 0
    shown = capsys.readouterr().out
    assert "Stable Diffusion XL" in shown and "FaceID adapter" in shown and "not here" in shown
