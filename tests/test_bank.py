"""The bank of synthetic identities and the map onto it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anonfw.identity.bank import BankError, IdentityBank, centres_of

seeds = st.integers(0, 10**6)


def unit(count: int, seed: int, dim: int = 6) -> Tensor:
    drawn = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def bank_of(count: int, seed: int = 0, dim: int = 6) -> IdentityBank:
    return IdentityBank(unit(count, seed, dim), [f"person {n}" for n in range(count)], "tiny > E_I 0123")


@given(seeds, st.integers(1, 30), st.integers(1, 12))
def test_centres_are_the_mean_directions(seed: int, extra: int, people: int):
    generator = torch.Generator().manual_seed(seed)
    who = torch.cat([torch.arange(people), torch.randint(people, (extra,), generator=generator)])
    e = unit(len(who), seed)
    centres = centres_of(e, who, ["x"] * people)
    for number in range(people):
        mean = e[who == number].double().mean(0)
        torch.testing.assert_close(centres[number], (mean / mean.norm()).float(), atol=1e-5, rtol=1e-4)
    # A person's own centre is nearest to all of their photos where the photos are equal.
    alone = IdentityBank.from_embeddings(unit(people, seed + 1), torch.arange(people), ["x"] * people, "e")
    assert alone.nearest(unit(people, seed + 1)).tolist() == list(range(people))


@given(seeds, st.integers(1, 8), st.integers(0, 20))
def test_nearest_by_cosine(seed: int, count: int, photos: int):
    bank, e = bank_of(count, seed), unit(photos, seed + 1)
    expected = [max(range(count), key=lambda j, row=row: float(row @ bank.centres[j])) for row in e]
    assert bank.nearest(e).tolist() == expected


def test_nearest_in_parts_is_nearest():
    bank, e = bank_of(5), unit(9000, 3)
    assert torch.equal(bank.nearest(e), (e @ bank.centres.T).argmax(1))


@given(seeds, st.integers(1, 5), st.integers(0, 3))
def test_one_to_one_is_the_best_of_all_assignments(seed: int, people: int, spare: int):
    bank, e = bank_of(people + spare, seed), unit(people, seed + 1)
    chosen = bank.assign(e).tolist()
    assert len(set(chosen)) == people
    similarity = (e @ bank.centres.T).tolist()

    def total(assignment) -> float:
        return sum(similarity[row][column] for row, column in enumerate(assignment))

    best = max(map(total, itertools.permutations(range(people + spare), people)))
    assert total(chosen) == pytest.approx(best, abs=1e-5)


@given(seeds, st.booleans())
def test_a_person_has_one_identity_in_all_photos(seed: int, one_to_one: bool):
    generator = torch.Generator().manual_seed(seed)
    person = torch.randint(-3, 9, (25,), generator=generator) * 11  # any numbers
    e, bank = unit(25, seed), bank_of(20, seed + 1)
    given_to = bank.of_people(e, person, one_to_one)
    by_person = {who: set(given_to[person == who].tolist()) for who in person.unique().tolist()}
    assert all(len(identities) == 1 for identities in by_person.values())
    if one_to_one:
        assert len(set().union(*by_person.values())) == len(by_person)
    else:
        who = int(person[0])
        mean = torch.nn.functional.normalize(e[person == who].mean(0, keepdim=True), dim=-1)
        assert by_person[who] == set(bank.nearest(mean).tolist())
    # The order of the photos does not matter.
    order = torch.randperm(25, generator=generator)
    assert torch.equal(bank.of_people(e[order], person[order], one_to_one), given_to[order])


def test_saved_and_loaded(tmp_path):
    about = {"data": "people", "split": "train"}
    bank = IdentityBank(3 * unit(4, 1), ["Ä", "b", "c", "d"], "tiny > E_I 0123", about)
    bank.save(tmp_path / "bank.safetensors")
    again = IdentityBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(again.centres, bank.centres)
    assert (again.names, again.embedding, again.about) == (bank.names, bank.embedding, about)
    torch.testing.assert_close(again.centres.norm(dim=1), torch.ones(4))
    card = json.loads((tmp_path / "bank.json").read_text())
    assert (card["identities"], card["dim"]) == (4, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank.json", "bank.safetensors"]


def test_files_that_are_no_bank(tmp_path):
    path = tmp_path / "bank.safetensors"
    with pytest.raises(BankError, match="no bank at .*identity_mapper"):
        IdentityBank.load(path)
    bank_of(4).save(path)
    card = path.with_suffix(".json")
    whole = card.read_text()
    bank_of(4, 1).save(path)
    card.write_text(whole)
    with pytest.raises(BankError, match="not the file that bank.json describes"):
        IdentityBank.load(path)
    for text in ("{", "[]", "{}"):
        card.write_text(text)
        with pytest.raises(BankError, match="no card of a bank"):
            IdentityBank.load(path)
    card.unlink()
    with pytest.raises(BankError, match="no bank at"):
        IdentityBank.load(path)


def test_embeddings_that_do_not_fit():
    bank = bank_of(4)
    for use in (bank.nearest, bank.assign, lambda e: bank.of_people(e, torch.zeros(len(e), dtype=torch.long))):
        with pytest.raises(BankError, match=r"width 6 \(tiny > E_I 0123\), got \(2, 5\)"):
            use(unit(2, 0, 5))
    with pytest.raises(BankError, match="5 people cannot have 4 identities"):
        bank.assign(unit(5, 0))
    bank.require("tiny > E_I 0123")
    with pytest.raises(BankError, match="made with tiny > E_I 0123, the system embeds with other"):
        bank.require("other")


def test_labels_out_of_range():
    e, names = unit(3, 0), ["a", "b"]
    with pytest.raises(BankError, match="labels go from 0 to 2, there are 2 names"):
        IdentityBank.from_embeddings(e, torch.tensor([0, 1, 2]), names, "x")
    with pytest.raises(BankError, match="labels go from -1 to 1"):
        IdentityBank.from_embeddings(e, torch.tensor([0, 1, -1]), names, "x")
    with pytest.raises(BankError, match=r"1 of 2 identities have no photograph \(a\)"):
        IdentityBank.from_embeddings(e, torch.tensor([1, 1, 1]), names, "x")
    with pytest.raises(BankError, match="do not fit"):
        IdentityBank.from_embeddings(e, torch.tensor([0, 1]), names, "x")
    with pytest.raises(BankError, match="one centre a name"):
        IdentityBank(e, names, "x")
    with pytest.raises(BankError, match="one centre a name"):
        IdentityBank(e[:0], [], "x")
    with pytest.raises(BankError, match="not finite"):
        IdentityBank.from_embeddings(e * torch.nan, torch.tensor([0, 1, 1]), names, "x")
