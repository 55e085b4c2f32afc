"""FaceLoader: the order, what is in a batch, ranks, workers, resumption."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tiny_dataset as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from anonfw.batch import FaceBatch
from anonfw.data import order
from anonfw.data.card import DataError
from anonfw.data.loader import FaceLoader

seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """17 + 5 people with 1 to 4 photos, several shards."""
    return tiny.write(tmp_path_factory.mktemp("loader") / "tiny", 17, 5, [3, 1, 4, 2], 8)


@pytest.fixture
def loader(request):
    """Makes loaders and ends their processes."""
    made = []

    def make(dataset: Path, split: str = "train", batch_size: int = 4, **arguments) -> FaceLoader:
        made.append(FaceLoader(dataset, split, batch_size, **{"workers": 0, **arguments}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rows_of(batch: FaceBatch) -> list:
    """Everything that must be equal, for comparison."""
    rows = []
    sides = [batch] if batch.partner is None else [batch, batch.partner]
    for i in range(len(batch)):
        rows.append(
            tuple(
                (
                    side.key[i],
                    int(side.image[i].sum()),
                    tuple(side.landmarks[i, 0].tolist()),
                    float(side.factors["yaw"][i]),
                )
                for side in sides
            )
        )
    return rows


# The order


@given(seeds, epochs, st.integers(1, 300))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, count: int):
    found = order.permutation(seed, epoch, count)
    assert sorted(found.tolist()) == list(range(count))
    if count > 20:
        assert found.tolist() != order.permutation(seed, epoch + 1, count).tolist()
        assert found.tolist() != order.permutation(seed + 1, epoch, count).tolist()


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 7))
def test_ranks_share_a_global_batch(start: int, per_rank: int, world: int):
    stop = start + per_rank * world
    shares = [order.rank_positions(start, stop, rank, world).tolist() for rank in range(world)]
    assert {len(share) for share in shares} == {per_rank}
    assert sorted(chain(*shares)) == list(range(start, stop))


@given(seeds, epochs, st.integers(0, 10**9), st.integers(1, 50))
def test_noise_of_a_position_does_not_depend_on_its_neighbours(seed: int, epoch: int, start: int, count: int):
    positions = np.arange(start, start + count)
    together = order.uniform(seed, epoch, order.FLIP, positions)
    assert ((together >= 0) & (together < 1)).all()
    alone = [order.uniform(seed, epoch, order.FLIP, positions[i : i + 1])[0] for i in range(count)]
    assert together.tolist() == alone


@given(seeds, epochs, st.lists(st.integers(2, 6), min_size=1, max_size=20))
def test_a_partner_is_another_photo_of_the_person(seed: int, epoch: int, counts: list[int]):
    counts = np.array(counts)
    first = np.cumsum(counts) - counts
    place = np.arange(counts.sum())
    person = np.repeat(np.arange(len(counts)), counts)
    partner = order.other_member(seed, epoch, place, place, first[person], counts[person])
    assert (partner != place).all()
    assert (person[partner] == person).all()


def test_partners_and_noise_are_even():
    counts = np.full(4000, 5)
    place = np.full(4000, 2)
    partner = order.other_member(1, 2, np.arange(4000), place, np.zeros(4000, int), counts)
    assert all(900 < Counter(partner.tolist())[i] < 1100 for i in (0, 1, 3, 4))
    noise = order.uniform(3, 0, order.FLIP, np.arange(100_000))
    assert abs(noise.mean() - 0.5) < 0.005 and abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.01


def test_the_order_is_the_one_of_earlier_versions():
    """Checkpoints hold positions in this order: it may never change."""
    assert order.permutation(0, 0, 10).tolist() == [1, 9, 0, 8, 4, 6, 7, 2, 3, 5]
    assert order.permutation(7, 3, 10).tolist() == [9, 1, 6, 7, 3, 4, 5, 8, 0, 2]
    assert order.bits(1, 2, 3, np.array([4])).tolist() == [17003501328650533216]


# What is in a batch


def test_a_pass_without_shuffling_is_every_sample_in_order(dataset: Path, loader):
    val = loader(dataset, "val", batch_size=5, shuffle=False, sidecars=[tiny.ENCODER])
    for _ in range(2):  # a fixed pass begins anew each time
        batches = list(val)
        assert [len(batch) for batch in batches] == [5, 5, 1] and len(val) == 3
    batch = FaceBatch.concatenate(batches)
    first = sum([3, 1, 4, 2][i % 4] for i in range(17))  # photos of the people of `train`
    numbers = np.arange(first, first + 11)
    assert batch.index.tolist() == list(range(11))
    assert batch.identity.tolist() == [0] + [1] * 4 + [2] * 2 + [3] * 3 + [4]
    for i, number in enumerate(numbers.tolist()):
        expected = simplejpeg.decode_jpeg(tiny.jpeg(number)).transpose(2, 0, 1)
        assert np.array_equal(batch.image[i].numpy(), expected)
        assert batch.factors["yaw"][i] == number + 1 and batch.factors["pitch"][i] == -number - 1
        assert batch.landmarks[i, 0].tolist() == pytest.approx([8 + 0.01 * number, 10 + 0.01 * number], abs=1e-4)
        assert np.allclose(batch.embeddings[tiny.ENCODER][i], tiny.embedding(number), atol=1e-3)
    assert batch.image.dtype == torch.uint8 and batch.image.is_contiguous()
    assert batch.identity.dtype == batch.index.dtype == torch.int64


def test_identity_numbers_people(dataset: Path, loader):
    train = loader(dataset, batch_size=1, shuffle=False)
    batches = list(train)
    people = [train.table.people[int(batch.identity)] for batch in batches]
    assert [f"person {int(batch.key[0][1:4])}" for batch in batches] == people
    assert sorted(set(people), key=people.index) == [f"person {i}" for i in range(17)]


def test_a_flip_mirrors_picture_landmarks_yaw_and_roll_only(dataset: Path, loader):
    plain = next(iter(loader(dataset, batch_size=8, shuffle=False, sidecars=[tiny.ENCODER])))
    flipped = next(iter(loader(dataset, batch_size=8, shuffle=False, flip=1.0, sidecars=[tiny.ENCODER])))
    assert torch.equal(flipped.image, plain.image.flip(-1))
    assert torch.equal(flipped.factors["yaw"], -plain.factors["yaw"])
    assert torch.equal(flipped.factors["pitch"], plain.factors["pitch"])
    assert torch.equal(flipped.embeddings[tiny.ENCODER], plain.embeddings[tiny.ENCODER])
    expected = plain.landmarks[:, [1, 0, 2, 4, 3]].clone()
    expected[..., 0] = tiny.SIZE - 1 - expected[..., 0]
    assert torch.allclose(flipped.landmarks, expected)
    assert (flipped.landmarks[:, 0, 0] < flipped.landmarks[:, 1, 0]).all()  # image left first, as before


def test_flips_are_drawn_anew_each_epoch(dataset: Path, loader):
    train = loader(dataset, batch_size=6, flip=0.5)
    signs = [
        {key: float(yaw) > 0 for batch in train for key, yaw in zip(batch.key, batch.factors["yaw"], strict=True)}
        for _ in range(2)
    ]
    assert {True, False} == set(signs[0].values())
    both = signs[0].keys() & signs[1].keys()
    assert any(signs[0][key] != signs[1][key] for key in both)


def test_shuffled_epochs_visit_every_sample_once(dataset: Path, loader):
    train = loader(dataset, batch_size=4)
    total = 43
    assert len(train) == total // 4
    epochs = [[key for batch in train for key in batch.key] for _ in range(2)]
    assert all(len(keys) == len(set(keys)) == 40 for keys in epochs)
    assert epochs[0] != epochs[1]
    again = loader(dataset, batch_size=4)
    assert [[key for batch in again for key in batch.key] for _ in range(2)] == epochs
    other = loader(dataset, batch_size=4, seed=1)
    assert [key for batch in other for key in batch.key] != epochs[0]


def test_pairs_are_two_photos_of_one_person(dataset: Path, loader):
    train = loader(dataset, batch_size=6, mode="pairs", flip=0.5, sidecars=[tiny.ENCODER])
    keys = []
    for batch in train:
        assert torch.equal(batch.identity, batch.partner.identity)
        assert all(a != b and a[:4] == b[:4] for a, b in zip(batch.key, batch.partner.key, strict=True))
        assert batch.partner.embeddings[tiny.ENCODER].shape == (6, 8)
        keys += batch.key
    singles = {f"p{i:03d}_0" for i in range(17) if i % 4 == 1}
    assert len(set(keys)) == len(keys) == 36 and not singles & set(keys)  # of 39: 43 - 4 people with one photo


def test_groups_are_k_photos_of_p_people(dataset: Path, loader):
    train = loader(dataset, batch_size=8, mode="groups", per_identity=2)
    assert len(train) == 13 // 4  # people with two photos or more, four a batch
    seen = []
    for batch in train:
        people = batch.identity.view(4, 2)
        assert torch.equal(people[:, 0], people[:, 1])
        assert all(a != b for a, b in zip(batch.key[::2], batch.key[1::2], strict=True))
        seen += people[:, 0].tolist()
    assert len(seen) == len(set(seen)) == 12
    repeated = next(iter(loader(dataset, batch_size=8, mode="groups", per_identity=8)))
    assert len(set(repeated.identity.tolist())) == 1 and len(set(repeated.key)) in (2, 3, 4)


def test_cross_batches_take_partners_from_the_other_data_set(dataset: Path, loader, tmp_path: Path):
    other = tiny.write(tmp_path / "other", 6, 2, 2, name="other", first=100)
    train = loader(dataset, batch_size=8, mode="cross", cross=other, sidecars=[tiny.ENCODER])
    partners = []
    for batch in train:
        assert all(int(key[1:4]) < 17 for key in batch.key)
        assert all(100 <= int(key[1:4]) < 106 for key in batch.partner.key)
        person, photo = batch.partner.key[3][1:].split("_")  # p103_1: two photos a person, numbered from 100,000
        number = 100_000 + 2 * (int(person) - 100) + int(photo)
        expected = simplejpeg.decode_jpeg(tiny.jpeg(number)).transpose(2, 0, 1)
        assert np.array_equal(batch.partner.image[3].numpy(), expected)
        partners += batch.partner.key
    assert len(set(partners)) > 6
    val = loader(dataset, batch_size=8, mode="cross", cross=other, cross_split="val")
    assert all(int(key[1:4]) >= 106 for key in next(iter(val)).partner.key)


def test_limits(dataset: Path, loader):
    few = loader(dataset, batch_size=2, shuffle=False, limit_identities=3)
    assert {key[:4] for batch in few for key in batch.key} == {"p000", "p001", "p002"}
    assert sum(len(batch) for batch in loader(dataset, batch_size=2, shuffle=False, limit_samples=5)) == 5


# Ranks and workers


@pytest.mark.parametrize("mode", ["images", "pairs", "groups"])
def test_global_batches_do_not_depend_on_ranks(dataset: Path, loader, mode: str):
    extra = {"mode": mode, "flip": 0.5, "per_identity": 2}
    alone = [sorted(rows_of(batch)) for batch in loader(dataset, batch_size=12, **extra)]
    for world in (2, 3):
        ranks = [loader(dataset, batch_size=12 // world, rank=rank, world=world, **extra) for rank in range(world)]
        assert {len(each) for each in ranks} == {len(alone)}
        together = [sorted(chain(*map(rows_of, batches))) for batches in zip(*ranks, strict=True)]
        assert together == alone


def test_batches_do_not_depend_on_workers(dataset: Path, loader):
    expected = None
    for workers in (0, 1, 2, 3):
        train = loader(dataset, batch_size=5, mode="pairs", flip=0.5, workers=workers)
        found = [rows_of(batch) for _ in range(2) for batch in train]
        expected = expected or found
        assert found == expected and len(found) == 14


def test_a_validation_pass_shares_the_rest_among_ranks(dataset: Path, loader):
    ranks = [
        loader(dataset, "val", batch_size=2, shuffle=False, rank=rank, world=3, limit_samples=7) for rank in range(3)
    ]
    batches = [list(each) for each in ranks]  # 6 and 1
    assert [len(each) for each in ranks] == [len(each) for each in batches] == [2, 1, 1]
    indices = sorted(index for each in batches for batch in each for index in batch.index.tolist())
    assert indices == list(range(7))


def test_rank_and_world_come_from_the_environment(dataset: Path, loader, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    train = loader(dataset, batch_size=4)
    assert train.place() == (1, 2) and len(train) == 43 // 8


# Resumption


@pytest.mark.parametrize("mode", ["images", "pairs"])
@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 9, 12])
def test_resumed_run_sees_the_rest(dataset: Path, loader, mode: str, stop: int):
    """At every kind of place: the start, inside an epoch, at its end, in the next; then other ranks and workers."""
    extra = {"mode": mode, "flip": 0.5}

    def stream(source: FaceLoader, count: int) -> list:
        found = []
        while len(found) < count:
            for batch in source:
                found.append(rows_of(batch))
                if len(found) == count:
                    break
        return found

    whole = stream(loader(dataset, batch_size=6, **extra), 14)
    first = loader(dataset, batch_size=6, **extra)
    assert stream(first, stop) == whole[:stop]
    state = first.state_dict()
    places = [(1, 0), (2, 0), (3, 0)] + ([(1, 1), (1, 3), (2, 2)] if stop == 4 and mode == "pairs" else [])
    for world, workers in places:
        ranks = [
            loader(dataset, batch_size=6 // world, rank=r, world=world, workers=workers, **extra) for r in range(world)
        ]
        for each in ranks:
            each.load_state_dict(state)
        rest = zip(*[stream(each, 14 - stop) for each in ranks], strict=True)
        assert [sorted(chain(*parts)) for parts in rest] == [sorted(rows) for rows in whole[stop:]]


def test_state_after_a_resumed_epoch_yields_exactly_its_rest(dataset: Path, loader):
    train = loader(dataset, batch_size=6)
    whole = [batch.key for batch in train]
    state = {**train.state_dict(), "position": 18}
    train.load_state_dict(state)
    assert [batch.key for batch in train] == whole[3:]
    assert len(train) == 7  # of a whole epoch, wherever the stream stands: Lightning counts with that


def test_state_counts_what_was_given_out_and_not_what_was_prefetched(dataset: Path, loader):
    train = loader(dataset, batch_size=6, workers=2)
    iterator = iter(train)
    assert train.state_dict()["position"] == 0
    next(iterator)
    assert train.state_dict() | {"order": ""} == {"version": 1, "order": "", "epoch": 0, "position": 6}


def test_a_stream_that_was_left_goes_on(dataset: Path, loader):
    train = loader(dataset, batch_size=6)
    whole = [batch.key for batch in loader(dataset, batch_size=6)]
    left = next(iter(train)).key
    assert [left] + [batch.key for batch in train] == whole


def test_an_old_iterator_cannot_disturb_a_new_one(dataset: Path, loader):
    train = loader(dataset, batch_size=6, workers=1)
    old = iter(train)
    next(old)
    new = iter(train)
    next(new)
    with pytest.raises(RuntimeError, match="replaced"):
        next(old)
    assert next(new).key == list(loader(dataset, batch_size=6))[2].key


def test_state_of_other_data_is_refused(dataset: Path, loader):
    state = loader(dataset).state_dict()
    for other in (
        loader(dataset, "val"),
        loader(dataset, mode="pairs"),
        loader(dataset, seed=1),
        loader(dataset, flip=0.5),
        loader(dataset, limit_samples=20),
    ):
        with pytest.raises(DataError, match="other data"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="version"):
        loader(dataset).load_state_dict({**state, "version": 0})


# Processes


def test_workers_end_with_their_loader(dataset: Path):
    train = FaceLoader(dataset, "train", 4, workers=2)
    next(iter(train))
    processes = train._decoder._workers
    assert all(process.poll() is None for process in processes)
    train.close()
    assert all(process.poll() is not None for process in processes)
    assert len(list(train)) == 9  # they start again; one batch of the ten was taken before
    train.close()


def test_a_dead_worker_is_an_error_and_not_a_hang(dataset: Path):
    train = FaceLoader(dataset, "train", 4, workers=1)
    iterator = iter(train)
    next(iterator)
    train._decoder._workers[0].kill()
    with pytest.raises(DataError, match="decoding process ended"):
        list(iterator)
    train.close()


# Refusals


def test_wrong_arguments(dataset: Path):
    for arguments, message in (
        ({"mode": "triplets"}, "unknown mode"),
        ({"mode": "cross"}, "mode='cross'"),
        ({"cross": dataset}, "mode='cross'"),
        ({"rank": 0}, "both"),
        ({"flip": 2}, "probability"),
        ({"batch_size": 0}, "positive"),
        ({"mode": "groups", "batch_size": 6}, "divisible"),
    ):
        with pytest.raises(ValueError, match=message):
            FaceLoader(dataset, "train", **{"batch_size": 4, **arguments})


def test_unusable_data_is_refused_before_training(dataset: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        FaceLoader(tmp_path / "nothing", "train", 4)
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        FaceLoader(dataset, "test", 4)
    with pytest.raises(DataError, match=r"43 samples: too few for batch_size=64.*image_folder"):
        FaceLoader(dataset, "train", 64)
    with pytest.raises(DataError, match=r"5 samples.*Raise the loader's limit"):
        FaceLoader(dataset, "train", 64, limit_samples=5)
    with pytest.raises(DataError, match="too few for 3 ranks"):
        iter_first(FaceLoader(dataset, "train", 16, rank=0, world=3, workers=0))
    with pytest.raises(DataError, match="anonfw embed"):
        FaceLoader(dataset, "train", 4, sidecars=["edgeface_s"])
    with pytest.raises(DataError, match="other weights"):
        FaceLoader(dataset, "train", 4, sidecars={tiny.ENCODER: "b" * 64})
    single = tiny.write(tmp_path / "single", 4, 1, 1)
    with pytest.raises(DataError, match="0 photos of people with two"):
        FaceLoader(single, "train", 2, mode="pairs")


def iter_first(loader: FaceLoader) -> FaceBatch:
    return next(iter(loader))
