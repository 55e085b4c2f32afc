"""The triplet loss against loops over the definition, and what must hold for any batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anonfw.batch import FaceBatch, StepOut
from anonfw.errors import AnonfwError
from anonfw.losses.triplet import Triplet

MININGS = ("hard", "semi-hard", "random")


def batch_of(identity: list[int]) -> FaceBatch:
    count = len(identity)
    who = torch.tensor(identity)
    return FaceBatch(
        image=torch.zeros(count, 3, 0, 0, dtype=torch.uint8),
        identity=who,
        index=torch.arange(count),
        key=["k"] * count,
        landmarks=torch.zeros(count, 5, 2),
    )


def embeddings(count: int, seed: int, dim: int = 4) -> Tensor:
    drawn = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1).float()


def loss_of(z: Tensor, identity: list[int], mining: str, margin: float = 0.3, seed: int = 0) -> Tensor:
    out = StepOut(prediction=z, rng=torch.Generator().manual_seed(seed))
    return Triplet(margin, mining)(out, batch_of(identity))


def by_loops(z: Tensor, identity: list[int], mining: str, margin: float) -> list[float]:
    """Hermans' batch-hard, and Schroff's semi-hard as TensorFlow Addons computes it, an anchor at a time."""
    found = []
    for a in range(len(z)):

        def distance(other: int, a: int = a) -> float:
            return float((z[a] - z[other]).double().square().sum())

        positives = [distance(p) for p in range(len(z)) if p != a and identity[p] == identity[a]]
        negatives = [distance(n) for n in range(len(z)) if identity[n] != identity[a]]
        if not positives or not negatives:
            found.append(0.0)
        elif mining == "hard":
            found.append(max(max(positives) - min(negatives) + margin, 0))
        else:
            costs = []
            for d_p in positives:
                farther = [d_n for d_n in negatives if d_n > d_p]
                costs.append(max(d_p - (min(farther) if farther else max(negatives)) + margin, 0))
            found.append(sum(costs) / len(costs))
    return found


people = st.lists(st.integers(0, 4), min_size=4, max_size=14).filter(
    lambda who: len(set(who)) > 1 and len(set(who)) < len(who)
)


@pytest.mark.parametrize("mining", ["hard", "semi-hard"])
@given(who=people, seed=st.integers(0, 10**6), margin=st.sampled_from([0.0, 0.2, 1.0, 4.0]))
def test_as_the_loops_over_the_definition(mining: str, who: list[int], seed: int, margin: float):
    z = embeddings(len(who), seed)
    found = loss_of(z, who, mining, margin)
    assert found.shape == (len(who),)
    torch.testing.assert_close(found, torch.tensor(by_loops(z, who, mining, margin)), atol=2e-6, rtol=1e-5)


@given(who=people, seed=st.integers(0, 10**6), mining=st.sampled_from(MININGS))
def test_bounds_order_and_rotation(who: list[int], seed: int, mining: str):
    z = embeddings(len(who), seed)
    found = loss_of(z, who, mining)
    assert ((found >= 0) & (found <= 4.3001)).all()
    hard = loss_of(z, who, "hard")
    assert (found <= hard + 1e-5).all(), "no mining is harder than batch-hard"
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))[0]
    torch.testing.assert_close(loss_of(z @ turned, who, mining), found, atol=1e-5, rtol=1e-4)
    if mining != "random":
        order = torch.randperm(len(who), generator=torch.Generator().manual_seed(seed))
        mixed = loss_of(z[order], [who[i] for i in order.tolist()], mining)
        torch.testing.assert_close(mixed, found[order], atol=1e-6, rtol=1e-5)


@given(who=people, seed=st.integers(0, 10**6))
def test_random_takes_a_pair_that_exists_and_only_the_generator_decides(who: list[int], seed: int):
    z = embeddings(len(who), seed)
    found = loss_of(z, who, "random", 4.0, seed)
    assert torch.equal(found, loss_of(z, who, "random", 4.0, seed))
    distance = (z[:, None] - z[None]).square().sum(-1)
    for a in range(len(who)):
        possible = [
            float(distance[a, p] - distance[a, n] + 4)
            for p in range(len(who))
            for n in range(len(who))
            if p != a and who[p] == who[a] and who[n] != who[a]
        ] or [0.0]
        assert min(abs(value - float(found[a])) for value in possible) < 1e-5


def test_random_reaches_every_triplet():
    who = [0, 0, 0, 1, 2]
    z = embeddings(5, 3)
    seen = {round(float(loss_of(z, who, "random", 4.0, seed)[0]), 5) for seed in range(200)}
    assert len(seen) == 2 * 2


@pytest.mark.parametrize("mining", MININGS)
def test_perfect_and_worst(mining: str):
    perfect = torch.eye(4)[[0, 0, 1, 1]]
    assert loss_of(perfect, [0, 0, 1, 1], mining).tolist() == [0.0] * 4  # different people are 2 apart
    worst = torch.eye(4)[[0, 1, 0, 1]]
    # Semi-hard takes no negative that is nearer than the positive: here there is but one as far away.
    expected = 0.3 if mining == "semi-hard" else 2.3
    torch.testing.assert_close(loss_of(worst, [0, 0, 1, 1], mining).max(), torch.tensor(expected))


@pytest.mark.parametrize("mining", MININGS)
def test_gradients_are_finite_and_pull_the_right_way(mining: str):
    z = embeddings(12, 1)
    z[1] = z[0]  # two equal photos: no distance has an infinite slope
    z.requires_grad_(True)
    who = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4]
    before = loss_of(z, who, mining, 2.0)
    before.mean().backward()
    assert torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0
    with torch.no_grad():
        # A small step: the same triplets are mined again.
        after = loss_of(torch.nn.functional.normalize(z - 0.01 * z.grad, dim=-1), who, mining, 2.0)
    assert after.mean() < before.mean()


@pytest.mark.parametrize("mining", MININGS)
def test_half_precision_does_not_touch_the_distances(mining: str):
    z, who = embeddings(8, 5), [0, 0, 1, 1, 2, 2, 3, 3]
    plain = loss_of(z, who, mining)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss_of(z, who, mining), plain)


@pytest.mark.parametrize("mining", MININGS)
def test_an_anchor_whose_other_photos_are_missing_costs_nothing(mining: str):
    z = embeddings(5, 2)
    found = loss_of(z, [0, 0, 1, 1, 2], mining, 4.0)
    assert found[4] == 0 and (found[:4] > 0).all()


@pytest.mark.parametrize("mining", MININGS)
def test_no_triplets(mining: str):
    z = embeddings(4, 2)
    with pytest.raises(AnonfwError, match="no person has two photographs.*groups"):
        loss_of(z, [0, 1, 2, 3], mining)
    with pytest.raises(AnonfwError, match="one person's"):
        loss_of(z, [7, 7, 7, 7], mining)
    at_the_end_of_a_pass = Triplet(mining=mining).eval()
    out = StepOut(prediction=z, rng=torch.Generator().manual_seed(0))
    assert at_the_end_of_a_pass(out, batch_of([7] * 4)).tolist() == [0.0] * 4


def test_bad_arguments():
    with pytest.raises(ValueError, match="semi-hard or random, not 'soft'"):
        Triplet(mining="soft")
    with pytest.raises(ValueError, match="0 to 4, not 5"):
        Triplet(margin=5)
