"""Synthetic people: who is accepted, what is shipped, and that a seed gives the same people again."""

from __future__ import annotations

import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from anonfw.data.card import Card
from anonfw.errors import AnonfwError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))

import synthetic_people  # noqa: E402
import synthetic_report  # noqa: E402
import synthetic_studio  # noqa: E402
from synthetic_studio import COLLISION, SAME_AS_CENTRE, Photo, centre, collides, cosines  # noqa: E402

MEGABYTE = 1_000_000


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def photo(vectors: np.ndarray, number: int = 0) -> Photo:
    return Photo(b"\xff\xd8" + bytes([number % 256]), np.arange(10.0).reshape(5, 2), {"yaw": float(number)}, vectors)


def at_cosine(vector: np.ndarray, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """A unit vector with that cosine to `vector`, another one each time."""
    other = rng.standard_normal(vector.shape)
    other = unit(other - (other @ vector) * vector)
    return cosine * vector + np.sqrt(1 - cosine**2) * other


# --- who is accepted


def test_a_person_collides_by_either_recogniser():
    rng = np.random.default_rng(0)
    person = unit(rng.standard_normal((2, 512)))
    for recogniser in (0, 1):
        for excess, expected in ((-0.02, False), (0.02, True)):
            other = unit(rng.standard_normal((2, 512)))
            other[recogniser] = at_cosine(person[recogniser], COLLISION[recogniser] + excess, rng)
            assert collides(person, [other]) is expected
            assert collides(person, [unit(rng.standard_normal((2, 512))), other]) is expected
    assert collides(person, []) is False


def test_the_centre_is_the_unit_mean():
    rng = np.random.default_rng(1)
    vectors = unit(rng.standard_normal((3, 2, 512)))
    found = centre([photo(v) for v in vectors])
    assert np.allclose(found, unit(vectors.sum(0)))


def test_splits_keep_their_shares_and_never_change():
    counts = Counter(synthetic_people.split_of(number) for number in range(7500))
    assert counts == {"train": 6300, "val": 200, "test": 1000}
    assert {synthetic_people.split_of(number) for number in range(25)} == {"train", "val", "test"}


class StudioWithPlan:
    """Stands for the networks: photo k of a person is as far from the first as the plan says."""

    def __init__(self, plan: list[float | None]):
        self.plan = plan
        self.made = 0
        self.rng = np.random.default_rng(2)
        self.first = unit(self.rng.standard_normal((2, 512)))

    def moment(self, style, rng):
        return style

    def photograph(self, style):
        cosine = self.plan[self.made]
        self.made += 1
        if cosine is None:
            return None
        return photo(np.stack([at_cosine(vector, cosine, self.rng) for vector in self.first]), self.made)


@pytest.mark.parametrize(
    ("plan", "kept", "tried"),
    [
        ([0.9, 0.9, 0.9], [0, 1, 2, 3], 3),
        ([0.2, 0.9, None, 0.9, 0.9], [0, 2, 4, 5], 5),  # a stranger, and a rendering without a face
        ([0.2, None, 0.3, 0.9, 0.1], [0, 4], 5),  # gives up after two more than asked for
    ],
)
def test_photos_of_one_person(plan, kept, tried):
    studio = StudioWithPlan(plan)
    photos = synthetic_studio.Studio.photos(studio, 1, 0, photo(studio.first), np.zeros(512), 4)
    assert [int(p.factors["yaw"]) for p in photos] == kept
    assert studio.made == tried


def test_photos_far_from_the_common_centre_are_dropped_worst_first():
    studio = StudioWithPlan([0.95, 0.95, 0.95, 0.95, 0.5])
    photos = synthetic_studio.Studio.photos(studio, 1, 0, photo(studio.first), np.zeros(512), 6)
    assert [int(p.factors["yaw"]) for p in photos] == [0, 1, 2, 3, 4]
    assert all((cosines(p.vectors, centre(photos)) >= SAME_AS_CENTRE).all() for p in photos)


class Inline:
    """A pool without processes."""

    map = staticmethod(map)


class TwinStudio:
    """Stands for the networks: candidates 2k and 2k + 1 look alike, and of number 4 there are too few photos."""

    @staticmethod
    def vectors(number: int) -> np.ndarray:
        return unit(np.random.default_rng(number // 2).standard_normal((2, 512)))

    def base(self, seed, number):
        return np.full(512, float(number)), photo(self.vectors(number), number) if number != 6 else None

    def photos(self, seed, number, first, style, count):
        return [photo(self.vectors(number), number)] * (2 if number == 4 else count)


def numbers(work: Path, wanted: int) -> list[int]:
    steps: list[tuple[int, int]] = []
    found = synthetic_people.people(Inline, work, 1, 4, wanted, lambda *step: steps.append(step))
    return [int(photos[0].factors["yaw"]) for photos in found]


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_a_double_is_not_taken_and_the_first_of_two_is(monkeypatch, tmp_path, chunk):
    monkeypatch.setattr(synthetic_people, "_studio", TwinStudio())
    monkeypatch.setattr(synthetic_people, "CHUNK", chunk)
    # 1 is 0's double; 4 has too few photos; 5 takes its place unless both were compared at once; 6 has no face.
    expected = [0, 2, 5, 7, 8, 10] if chunk == 1 else [0, 2, 7, 8, 10, 12]
    assert numbers(tmp_path, 6) == expected


def test_finished_people_are_read_and_not_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic_people, "_studio", TwinStudio())
    first = numbers(tmp_path, 4)
    monkeypatch.setattr(synthetic_people, "_studio", None)  # nothing can be rendered now
    assert numbers(tmp_path, 4) == first


def test_a_person_survives_the_disk(tmp_path):
    rng = np.random.default_rng(3)
    photos = [photo(unit(rng.standard_normal((2, 512))), number) for number in range(3)]
    synthetic_people.save_person(tmp_path / "person.npz", np.arange(512.0), photos)
    style, found = synthetic_people.load_person(tmp_path / "person.npz")
    assert (style == np.arange(512.0)).all()
    for a, b in zip(photos, found, strict=True):
        assert a.jpeg == b.jpeg and a.factors == b.factors
        assert (a.landmarks == b.landmarks).all() and (a.vectors == b.vectors).all()
    assert not list(tmp_path.glob("*.partial"))


def test_half_made_people_of_other_settings_are_refused(monkeypatch, tmp_path):
    synthetic_people.check_work(tmp_path, 1)
    synthetic_people.check_work(tmp_path, 1)
    with pytest.raises(AnonfwError, match="another seed or version. Delete it, or choose another --work"):
        synthetic_people.check_work(tmp_path, 2)
    monkeypatch.setattr(synthetic_studio, "JPEG_QUALITY", 50)
    with pytest.raises(AnonfwError, match="another seed or version"):
        synthetic_people.check_work(tmp_path, 1)


def test_the_command_line_refuses_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["synthetic_people.py", str(tmp_path / "nothing"), "--report"])
    assert synthetic_people.main() == 2
    assert capsys.readouterr().err.startswith("synthetic_people: ")
    monkeypatch.setattr(sys, "argv", ["synthetic_people.py", str(tmp_path), "--people", "0"])
    with pytest.raises(SystemExit):
        synthetic_people.main()
    assert "0 is not a positive number" in capsys.readouterr().err


# --- the report


def test_pairs_are_counted_once():
    rng = np.random.default_rng(4)
    vectors = unit(rng.standard_normal((7, 16)))
    person = np.array([0, 0, 0, 1, 1, 2, 2])
    genuine, impostor = synthetic_report.pair_cosines(vectors, person)
    assert len(genuine) == 3 + 1 + 1 and len(impostor) == 21 - 5
    every = (vectors @ vectors.T)[np.triu_indices(7, 1)]
    assert np.allclose(np.sort(np.concatenate([genuine, impostor])), np.sort(every))


def test_verification_by_hand():
    impostor = np.linspace(0, 0.999, 1000)
    accepted, threshold = synthetic_report.verification(np.array([0.5, 0.98, 0.995, 1.0]), impostor, 0.01)
    assert threshold == pytest.approx(0.99, abs=0.001)
    assert accepted == 0.5


def test_report_and_picture_of_the_shipped_people(embedded, tmp_path):
    text = synthetic_report.report(embedded)
    card = Card.load(embedded)
    assert f"{sum(shard.samples for shard in card.shards)} photos" in text
    assert text.count("TPR") == 4 and "brightness" in text
    synthetic_report.contact_sheet(embedded, tmp_path / "sheet.png", people=4, photos=3)
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (224, 672, 3)


# --- what is shipped


def test_the_shipped_set_is_small_and_split_by_people(embedded):
    size = sum(file.stat().st_size for file in embedded.iterdir() if file.suffix in (".tar", ".npy", ".npz", ".json"))
    assert size <= 40 * MEGABYTE
    card = Card.load(embedded)
    assert card.image_size == 112 and card.alignment == "portrait"
    identities: dict[str, set] = {split: set() for split in ("train", "val", "test")}
    photos: Counter = Counter()
    for shard in card.shards:
        with tarfile.open(embedded / shard.file) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    assert member.size <= 500
                    record = json.load(tar.extractfile(member))
                    identities[record["split"]].add(record["identity"])
                    photos[record["identity"]] += 1
                    assert set(record["factors"]) == set(synthetic_report.FACTORS)
    assert len(identities["test"]) >= 120 and len(identities["train"]) >= 750
    assert sum(map(len, identities.values())) == len(photos)
    assert min(photos.values()) >= 5 and max(photos.values()) == 6


def test_shipped_people_are_distinct_and_themselves(embedded):
    rows = synthetic_report.read(embedded)
    for recogniser, vectors in enumerate(rows.vectors.values()):
        people = np.unique(rows.person)
        centres = unit(np.stack([vectors[rows.person == p].mean(0) for p in people]))
        between = centres @ centres.T - 2 * np.eye(len(people))
        assert between.max() <= COLLISION[recogniser] + 0.002  # sidecars are half precision
        own = (vectors * centres[rows.person]).sum(1)
        assert own.min() >= SAME_AS_CENTRE[recogniser] - 0.002


@pytest.fixture(scope="module")
def studio():
    pytest.importorskip("openvino", reason="needs the extra `faces`")
    return synthetic_studio.Studio()


@pytest.mark.slow
def test_the_shipped_people_come_from_this_script(studio, embedded):
    """Other processors round otherwise, so the pictures are compared, not the bytes."""
    with tarfile.open(embedded / "people-train-000000.tar") as tar:
        content = tar.extractfile("p00000_0.jpg").read()
        record = json.load(tar.extractfile("p00000_0.json"))
    _, made = studio.base(seed=1, number=0)
    shipped, now = (cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR) for jpeg in (content, made.jpeg))
    assert np.abs(shipped.astype(int) - now).mean() < 2
    assert np.abs(np.array(record["landmarks"]) - made.landmarks).max() < 0.5


@pytest.mark.slow
def test_the_cut_graph_renders_the_whole_graph_at_half_size(studio):
    import openvino

    from anonfw.weights import path

    core = openvino.Core()
    graph = core.read_model(path("style_synthesis_xml"), path("style_synthesis_bin"))
    whole = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    style = studio.fitted["mean"] + 0.7 * (studio.generator.style(np.random.default_rng(5)) - studio.fitted["mean"])
    image = whole([style[None].astype(np.float32)])[0][0]
    halved = image.reshape(3, 512, 2, 512, 2).mean((2, 4)).transpose(1, 2, 0)
    expected = np.clip((halved + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
    difference = np.abs(studio.generator.render(np.repeat(style[None], 8, axis=0)).astype(int) - expected)
    assert difference.max() <= 1


@pytest.mark.slow
def test_directions_move_what_they_are_named_after(studio):
    """A step of one deviation to either side: the factor follows for every person, and the person stays."""
    mean = studio.fitted["mean"]
    for name, levels in synthetic_studio.MOVED.items():
        rises, same = [], []
        for seed in range(2):
            style, _ = studio.base(seed=77, number=seed)
            ends = []
            for step in (-1.2, 1.2):
                moved = np.repeat(style[None], 8, axis=0)
                moved[list(levels)] += step * studio.direction(name)
                ends.append(studio.photograph(moved))
            if None not in ends:
                rises.append(ends[1].factors[name] - ends[0].factors[name])
                same.append(cosines(ends[0].vectors, ends[1].vectors).mean())
        assert len(rises) == 2 and min(rises) > 0, name
        assert np.mean(same) > 0.3, name
    assert mean.shape == (512,)


def make(monkeypatch, out: Path, workers: int) -> dict[str, str]:
    """Run the script's main in a folder; file name -> sha256 of its shards."""
    arguments = [
        "synthetic_people.py",
        str(out),
        "--people",
        "3",
        "--photos",
        "2",
        "--seed",
        "5",
        "--shard-samples",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--workers", str(workers)])
    monkeypatch.setattr(synthetic_people, "CHUNK", 3)
    assert synthetic_people.main() == 0
    return {shard.file: shard.sha256 for shard in Card.load(out).shards}


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_also_after_a_crash_and_with_other_workers(monkeypatch, tmp_path):
    pytest.importorskip("openvino", reason="needs the extra `faces`")
    expected = make(monkeypatch, tmp_path / "undisturbed", workers=1)
    assert len(expected) == 3
    add = synthetic_people.DatasetWriter.add_identity

    def crash(writer, split, identity, samples):
        if identity == "p00001":
            raise KeyboardInterrupt
        add(writer, split, identity, samples)

    with monkeypatch.context() as patched:
        patched.setattr(synthetic_people.DatasetWriter, "add_identity", crash)
        with pytest.raises(KeyboardInterrupt):
            make(monkeypatch, tmp_path / "crashed", workers=2)
    assert len(list((tmp_path / "crashed").glob("*.tar"))) == 1
    assert make(monkeypatch, tmp_path / "crashed", workers=2) == expected
