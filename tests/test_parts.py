"""A data set that several jobs write together."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import pytest
import tiny_dataset as tiny
import tiny_sources
from hypothesis import given
from hypothesis import strategies as st

from anonfw.data import parts
from anonfw.data.card import Card, DataError
from anonfw.data.verify import verify_dataset


@given(st.integers(1, 500), st.integers(1, 40))
def test_parts_are_neighbours_of_equal_size(total: int, count: int):
    if total < count:
        with pytest.raises(DataError, match="use fewer"):
            parts.Part(0, count).of(total)
        return
    shares = [parts.Part(index, count).of(total) for index in range(count)]
    assert [number for share in shares for number in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["1", "3/3", "-1/3", "a/b", "1/0"])
def test_a_part_is_one_of_several(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parts.part(text)


@pytest.fixture
def photos(tmp_path) -> Path:
    for person, pictures in enumerate(tiny_sources.faces(9)):
        (tmp_path / "photos" / f"p{person}").mkdir(parents=True)
        for number, content in enumerate(pictures):
            (tmp_path / "photos" / f"p{person}" / f"{number}.jpg").write_bytes(content)
    (tmp_path / "photos" / "p1" / "note.jpg").write_bytes(b"no picture")
    return tmp_path / "photos"


def script(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--size", str(tiny.SIZE), "--workers", "1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(root / "data" / name), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize(("name", "more"), [("casia_webface.py", []), ("image_folder.py", ["--aligned"])])
def test_parts_in_any_order_make_the_data_set_of_one_writer(name, more, photos, root, tmp_path, monkeypatch, capsys):
    arguments = [str(photos), str(tmp_path / "out"), *more, "--shard-samples", "6", "--splits", "train=0.7,val=0.3"]
    for index in (2, 0):
        assert script(root, monkeypatch, name, *arguments, "--part", f"{index}/3") == 0
        assert "waits for its other parts" in capsys.readouterr().out
        with pytest.raises(DataError, match=r"no card\.json"):
            Card.load(tmp_path / "out")
    assert script(root, monkeypatch, name, *arguments, "--part", "1/3") == 0
    arguments[1] = str(tmp_path / "whole")
    assert script(root, monkeypatch, name, *arguments) == 0
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert tiny_sources.contents(out) == tiny_sources.contents(whole)
    assert tiny_sources.skipped(out) == tiny_sources.skipped(whole) and len(tiny_sources.skipped(out)) == 1
    assert verify_dataset(out) == verify_dataset(whole)
    cards = Card.load(out), Card.load(whole)
    assert cards[0].about == cards[1].about
    assert not (out / parts.FOLDER).exists()
    assert [shard.file for shard in cards[0].of_split("train")] == [
        f"{cards[0].name}-train-{number:06d}.tar" for number in range(len(cards[0].of_split("train")))
    ]
    # Again, as a requeued task would.
    arguments[1] = str(out)
    capsys.readouterr()
    assert script(root, monkeypatch, name, *arguments, "--part", "1/3") == 0
    assert "complete already" in capsys.readouterr().out


def test_a_join_that_was_killed_is_done_again(photos, root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = [str(photos), str(out), "--aligned"]

    def killed(*_):
        raise KeyboardInterrupt

    assert script(root, monkeypatch, "image_folder.py", *arguments, "--part", "0/2") == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            Card, "save", lambda self, folder, plain=Card.save: killed() if folder == out else plain(self, folder)
        )
        patch.setattr(sys, "argv", ["x", *arguments, "--size", "32", "--workers", "1", "--part", "1/2"])
        runpy.run_path(str(root / "data" / "image_folder.py"), run_name="__main__")
    assert list(out.glob("*.tar")), "it was killed after it had linked the shards"
    assert script(root, monkeypatch, "image_folder.py", *arguments, "--part", "1/2") == 0
    assert len(tiny_sources.contents(out)) == 9


def test_parts_of_other_settings_are_not_joined(photos, root, tmp_path, monkeypatch, capsys):
    arguments = [str(photos), str(tmp_path / "out"), "--aligned"]
    assert script(root, monkeypatch, "image_folder.py", *arguments, "--part", "0/2", "--quality", "80") == 0
    assert script(root, monkeypatch, "image_folder.py", *arguments, "--part", "1/2") == 2
    assert "other settings" in capsys.readouterr().err


def test_a_data_set_begun_as_a_whole_takes_no_parts(tmp_path):
    tiny.write(tmp_path)
    assert parts.is_joined(tmp_path)
    card = Card.load(tmp_path)
    card.complete = False
    card.save(tmp_path)
    with pytest.raises(DataError, match="without parts"):
        parts.is_joined(tmp_path)
