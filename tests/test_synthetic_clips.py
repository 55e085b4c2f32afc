"""Clips of synthetic people: how they move, which are taken, and what is written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_synthetic_people import Inline, StudioWithPlan, TwinStudio, photo, unit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))

import synthetic_clips  # noqa: E402
import synthetic_people  # noqa: E402
from synthetic_studio import CYCLES, LAYERS, LONGEST_MOVE, MOVED, SPREAD, SWING, Photo, Studio, motion  # noqa: E402

from anonfw.data.card import Card  # noqa: E402
from anonfw.data.index import open_index  # noqa: E402


@given(st.integers(0, 10**6), st.integers(2, 48))
def test_motion_is_smooth_bounded_and_the_seeds_own(seed: int, count: int):
    steps = motion(np.random.default_rng(seed), count)
    assert steps == motion(np.random.default_rng(seed), count) and len(steps) == count
    for name, spread in SPREAD.items():
        path = np.array([step[name] for step in steps])
        assert np.abs(path).max() <= SWING[1] * spread
        assert np.abs(np.diff(path)).max() <= 2 * np.pi * CYCLES[1] / count * SWING[1] * spread  # the steepest sine
    assert min(step["mouth_open"] for step in steps) >= 0


class StudioWithDirections(StudioWithPlan):
    """Directions are unit vectors of their own; a rendering keeps the style that it shows."""

    moved, clip = Studio.moved, Studio.clip

    def direction(self, name: str) -> np.ndarray:
        return np.eye(512)[list(SPREAD).index(name)]

    def photograph(self, style: np.ndarray) -> Photo | None:
        self.styles = [*getattr(self, "styles", []), style]
        return super().photograph(style)


def test_a_move_touches_its_levels_and_is_never_too_long():
    studio = StudioWithDirections([])
    moved = studio.moved(np.zeros(512), {"yaw": 1.0, "smile": -0.5})
    for place, (name, levels) in enumerate(MOVED.items()):
        expected = {"yaw": 1.0, "smile": -0.5}.get(name, 0.0)
        assert moved.shape == (LAYERS, 512)
        for level in range(LAYERS):
            assert moved[level, place] == (expected if level in levels else 0)
    far = studio.moved(np.zeros(512), {"yaw": 30.0, "pitch": 40.0})
    assert np.linalg.norm(far[0]) == pytest.approx(LONGEST_MOVE)
    assert (studio.moved(np.ones(512), {"yaw": 0.0}) == 1).all()


def test_a_clip_needs_every_frame():
    whole = StudioWithDirections([0.9] * 5)
    frames = whole.clip(1, 0, photo(whole.first), np.zeros(512), 5)
    assert [int(frame.factors["yaw"]) for frame in frames] == [1, 2, 3, 4, 5]
    assert len({style.tobytes() for style in whole.styles}) == 5  # it moves
    for plan in ([0.9, None, 0.9], [0.9, 0.9, 0.2]):  # no face, somebody else
        studio = StudioWithDirections(plan)
        assert studio.clip(1, 0, photo(studio.first), np.zeros(512), 3) == []


class TwinClips(TwinStudio):
    """As TwinStudio; number 4 lacks a frame."""

    def clip(self, seed, number, first, style, count):
        return self.photos(seed, number, first, style, count) if number != 4 else []


def test_nobody_known_is_filmed(monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic_people, "_studio", TwinClips())
    monkeypatch.setattr(synthetic_people, "CHUNK", 1)
    steps: list[tuple[int, int]] = []
    known = [TwinStudio.vectors(2)]  # number 2 and 3 look like somebody in the data set
    series = synthetic_people.Series("clips", "clip", 0, lambda _: "test", "nobody", lambda: list(known))
    found = synthetic_people.people(Inline, tmp_path, 1, 4, 4, lambda *step: steps.append(step), series)
    assert [int(frames[0].factors["yaw"]) for frames in found] == [0, 5, 7, 8]
    assert steps[-1] == (8, 3)  # of those before the last
    assert len(known) == 1


def test_the_embedded_people_are_known(embedded):
    people = synthetic_clips.embedded_people()
    assert len(people) == sum(shard.identities for shard in Card.load(embedded).shards)
    assert people[0].shape == (2, 512)
    assert np.allclose(np.linalg.norm(people, axis=2), 1, atol=1e-4)


@pytest.mark.parametrize("frames", [3, 12])
def test_frames_lie_in_order(monkeypatch, tmp_path, frames):
    def shots(*_):
        for clip in range(2):
            vectors = unit(np.random.default_rng(clip).standard_normal((2, 512)))
            yield [photo(vectors, clip * 100 + number) for number in range(frames)]

    class Pool(Inline):
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(synthetic_people, "people", shots)
    monkeypatch.setattr(synthetic_people, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(
        sys, "argv", ["synthetic_clips.py", str(tmp_path / "out"), "--clips", "2", "--frames", str(frames)]
    )
    assert synthetic_clips.main() == 0
    card = Card.load(tmp_path / "out")
    assert (card.name, card.splits(), card.about["seed"]) == ("clips", ["test"], synthetic_clips.SEED)
    index = open_index(tmp_path / "out" / card.shards[0].file, card.shards[0])
    assert [name.decode() for name in index.names.tolist()] == ["c00000", "c00001"]
    assert index.key.tolist() == sorted(index.key.tolist())
    assert index.factors[:, 0].tolist() == [clip * 100 + number for clip in range(2) for number in range(frames)]


def test_the_command_line_refuses_in_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "settings.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["synthetic_clips.py", str(tmp_path), "--clips", "2"])
    assert synthetic_clips.main() == 2
    assert capsys.readouterr().err.startswith("synthetic_clips: ")


@pytest.mark.slow
def test_a_real_clip_moves_and_stays_one_person():
    pytest.importorskip("openvino", reason="needs the extra `faces`")
    studio = Studio()
    style, first = studio.base(seed=2, number=0)
    frames = [
        studio.photograph(studio.moved(style, amounts)) for amounts in motion(np.random.default_rng([2, 0, 1]), 5)
    ]
    assert first is not None and None not in frames
    yaw = np.array([frame.factors["yaw"] for frame in frames])
    assert np.ptp(yaw) > 3
    vectors = np.stack([frame.vectors for frame in frames])
    assert (vectors[:-1] * vectors[1:]).sum(-1).mean() > 0.5  # frames that follow show one person
