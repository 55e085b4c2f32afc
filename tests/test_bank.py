"""The bank of synthetic identities and the map onto it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anonfw.identity.bank import AGE_GROUPS, BankError, IdentityBank, centres_of

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


# A ceiling on the cosine, and people like the person


@given(seeds, st.integers(1, 20), st.integers(1, 12), st.floats(-1, 1))
def test_nobody_above_the_ceiling_and_the_best_below(seed: int, count: int, people: int, ceiling: float):
    bank, e = bank_of(count, seed), unit(people, seed + 1)
    cosine = e @ bank.centres.T
    if (cosine.min(1).values > ceiling).any():
        with pytest.raises(BankError, match="no identity has a cosine of"):
            bank.nearest(e, ceiling)
        return
    chosen = bank.nearest(e, ceiling)
    for row, number in zip(cosine.tolist(), chosen.tolist(), strict=True):
        assert row[number] == max(value for value in row if value <= ceiling)


@given(seeds, st.integers(1, 4), st.integers(0, 3), st.floats(-0.5, 1))
def test_one_to_one_below_the_ceiling_is_the_best_of_all(seed: int, people: int, spare: int, ceiling: float):
    bank, e = bank_of(people + spare, seed), unit(people, seed + 1)
    cosine = (e @ bank.centres.T).tolist()
    sums = [
        sum(cosine[row][column] for row, column in enumerate(columns))
        for columns in itertools.permutations(range(people + spare), people)
        if all(cosine[row][column] <= ceiling for row, column in enumerate(columns))
    ]
    if not sums:
        with pytest.raises(BankError, match="cannot have one of .* raise the ceiling"):
            bank.assign(e, ceiling)
        return
    chosen = bank.assign(e, ceiling).tolist()
    assert len(set(chosen)) == people
    assert sum(cosine[row][column] for row, column in enumerate(chosen)) == pytest.approx(max(sums), abs=1e-5)


def drawn_attributes(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {"female": torch.rand(count, generator=generator), "age": 90 * torch.rand(count, generator=generator)}
    return {
        name: values.masked_fill(torch.rand(count, generator=generator) < 0.2, torch.nan)
        for name, values in drawn.items()
    }


@given(seeds, st.integers(1, 15), st.integers(1, 10), st.sets(st.sampled_from(["female", "age"])))
def test_like_the_person_in_sex_then_age_then_cosine(seed: int, count: int, people: int, by: set[str]):
    bank, e = bank_of(count, seed), unit(people, seed + 1)
    bank.attributes = drawn_attributes(count, seed)
    like = {name: values for name, values in drawn_attributes(people, seed + 1).items() if name in by}

    def rank(row: int, number: int) -> tuple[bool, int, float]:
        """Smaller is better; the rule of the class's description, word for word."""
        other_sex, groups = False, 0
        if "female" in by and not like["female"][row].isnan():
            had = bank.attributes["female"][number]
            other_sex = bool(had.isnan()) or bool(had >= 0.5) != bool(like["female"][row] >= 0.5)
        if "age" in by and not like["age"][row].isnan():
            had = bank.attributes["age"][number]
            group = [sum(float(age) >= start for start in AGE_GROUPS) for age in (had, like["age"][row])]
            groups = len(AGE_GROUPS) + 1 if had.isnan() else abs(group[0] - group[1])
        return other_sex, groups, -float(e[row] @ bank.centres[number])

    allowed = [[n for n in range(count) if float(e[row] @ bank.centres[n]) <= 0.3] for row in range(people)]
    if all(allowed):
        expected = [min(numbers, key=lambda n, row=row: rank(row, n)) for row, numbers in enumerate(allowed)]
        assert bank.nearest(e, 0.3, like).tolist() == expected
    if people <= count:
        assert len(set(bank.assign(e, like=like).tolist())) == people


def test_one_to_one_keeps_to_sex_and_age():
    bank = bank_of(4)
    bank.attributes = {"female": torch.tensor([0.1, 0.2, 0.9, 0.8]), "age": torch.tensor([25.0, 65, 25, 65])}
    like = {"female": torch.tensor([1.0, 1, 0, 0]), "age": torch.tensor([62.0, 22, 61, 29])}
    for seed in range(5):
        assert bank.assign(unit(4, seed), like=like).tolist() == [3, 2, 1, 0]


def test_a_person_is_who_most_photos_say():
    bank = IdentityBank(unit(1, 0).repeat(2, 1), ["he", "she"], "e", attributes={"female": torch.tensor([0.0, 1.0])})
    e, person = unit(5, 1), torch.tensor([7, 7, 7, 3, 3])
    like = {"female": torch.tensor([0.9, 0.8, 0.1, torch.nan, 0.2])}  # a person's mean, of what is known
    assert bank.of_people(e, person, like=like).tolist() == [1, 1, 1, 0, 0]
    assert bank.of_people(e, person, one_to_one=True, like=like).tolist() == [1, 1, 1, 0, 0]


def test_a_person_is_below_the_ceiling_with_all_photos_together():
    bank, e = bank_of(30), unit(12, 1)
    person = torch.arange(12) // 3
    for one_to_one in (False, True):
        chosen = bank.of_people(e, person, one_to_one, ceiling=0.2)
        centres = centres_of(e, person, ["x"] * 4)
        assert (centres * bank.centres[chosen[::3]]).sum(1).max() <= 0.2


def test_attributes_are_kept_with_the_bank(tmp_path):
    attributes = {"female": torch.tensor([0.25, torch.nan, 0.75]), "age": torch.tensor([20.0, 40, 33])}
    IdentityBank(unit(3, 0), ["a", "b", "c"], "e", attributes=attributes).save(tmp_path / "bank.safetensors")
    again = IdentityBank.load(tmp_path / "bank.safetensors")
    for name, values in attributes.items():
        assert torch.equal(again.attributes[name].nan_to_num(-1), values.nan_to_num(-1))
    card = json.loads((tmp_path / "bank.json").read_text())
    assert card["attributes"] == {"female": {"known": 2, "mean": 0.5}, "age": {"known": 3, "mean": 31.0}}


def test_a_bank_without_attributes_loads(tmp_path):
    path = tmp_path / "bank.safetensors"
    bank = bank_of(4)
    bank.save(path)
    card = json.loads(path.with_suffix(".json").read_text())
    del card["attributes"]  # as banks were written before there were any
    path.with_suffix(".json").write_text(json.dumps(card))
    again = IdentityBank.load(path)
    assert torch.equal(again.centres, bank.centres) and again.attributes == {}
    with pytest.raises(BankError, match="does not know female of its identities.*anonfw.demographics"):
        again.nearest(unit(1, 0), like={"female": torch.tensor([1.0])})


def test_attributes_and_ceilings_that_make_no_sense():
    for attributes, complaint in (
        ({"height": torch.zeros(3)}, "no attribute 'height'"),
        ({"age": torch.zeros(2)}, r"age has the shape \(2,\) for 3 people"),
        ({"age": torch.tensor([1.0, 2, -1])}, r"age goes from -1 to 2, it must lie in \[0, 150\]"),
        ({"female": torch.tensor([1.0, 2, torch.nan])}, r"female goes from 0 to 2, it must lie in \[0, 1\]"),
    ):
        with pytest.raises(BankError, match=complaint):
            IdentityBank(unit(3, 0), ["a", "b", "c"], "e", attributes=attributes)
    with pytest.raises(BankError, match="a cosine from -1 to 1, not 1.5"):
        bank_of(3).nearest(unit(1, 0), 1.5)
