"""What a system promises, shown on ID²Face: randomness, recomposition, masking, and anonymization."""

from __future__ import annotations

import pytest
import tiny_training as tiny
import torch
import torch.nn.functional as F

from anonfw.batch import FaceBatch
from anonfw.data.open import open_loader
from anonfw.nets.non_identity import face_region
from anonfw.system import seed_of
from anonfw.training.load import build_system

pytestmark = pytest.mark.filterwarnings("ignore:.*")

STEPS = "system.steps=3"


@pytest.fixture(scope="module")
def batch(tiny_faces) -> FaceBatch:
    """Four pairs of four people."""
    more = ("data.train.limit_samples=null", "data.train.flip=0.0", "data.train.batch_size=24")
    loader = open_loader(tiny.recipe(tiny_faces, *more), "train", seed=3)
    drawn = next(iter(loader))
    loader.close()
    first = [drawn.identity.tolist().index(person) for person in dict.fromkeys(drawn.identity.tolist())]
    return drawn.select(first[:4])


@pytest.fixture(scope="module")
def build(tiny_faces):
    """Overrides -> system. Its zero-initialised layers are shaken awake, so that every input can reach the output."""

    def make(*more: str):
        system = build_system(tiny.recipe(tiny_faces, STEPS, *more)).eval()
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in system.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
        return system

    return make


@pytest.fixture(scope="module")
def system(build):
    return build()


def plain(batch: FaceBatch) -> FaceBatch:
    return batch.select(slice(0, len(batch)))


def outside(batch: FaceBatch) -> torch.Tensor:
    return (face_region(batch.image.shape[-1]) == 0).expand_as(batch.image)


# Randomness.


def test_seeds_are_the_same_everywhere():
    assert seed_of(0, "train", 0, 0) == 5257463487963123035
    seeds = {seed_of(s, d, r, i) for s in range(3) for d in ("train", "validate") for r in range(3) for i in range(20)}
    assert len(seeds) == 3 * 2 * 3 * 20 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3)


def test_rng_is_a_pure_function_of_seed_domain_rank_and_index(build, system, monkeypatch):
    def draw(of, domain, index):
        return torch.rand(4, generator=of.rng(domain, index)).tolist()

    here = draw(system, "train", 5)
    torch.manual_seed(9)
    system.rng("train", 6)
    assert draw(system, "train", 5) == here, "neither earlier calls nor the global state matter"
    assert draw(system, "train", 6) != here and draw(system, "validate", 5) != here
    monkeypatch.setattr(type(system), "global_rank", 1)
    assert draw(system, "train", 5) != here, "ranks draw different noise"
    monkeypatch.undo()
    system.seed = 1
    try:
        assert draw(system, "train", 5) != here
    finally:
        system.seed = 0


def test_a_step_draws_from_nothing_but_its_generator(system, batch):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = system.total(batch, system.rng("train", 0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, _ = system.total(batch, system.rng("train", 0))
    third, _ = system.total(batch, system.rng("train", 1))
    assert first.item() == second.item() != third.item()


# The step.


def watch(system, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """What `step` hands to the network, call by call."""
    seen, predict = [], system.predict

    def spy(x_t, t, beside, c_id, c_n):
        seen.append({"x_t": x_t, "t": t, "beside": beside, "c_id": c_id, "c_n": c_n})
        return predict(x_t, t, beside, c_id, c_n)

    monkeypatch.setattr(system, "predict", spy)
    return seen


def identities(system, batch: FaceBatch, rng: torch.Generator) -> torch.Tensor:
    """c_id that each of the 2B rows has of its own."""
    pair = FaceBatch.concatenate([batch, batch.partner])
    return system.identity_tokens(system.vae.decode(system.vae.encode(system.embed(pair)).sample(rng)))


@pytest.mark.parametrize(("share", "own"), [(0.0, False), (1.0, True)])
def test_recomposition_takes_the_identity_of_the_partner(build, batch, monkeypatch, share, own):
    system = build(f"system.self_share={share}", "system.null_share=0")
    seen = watch(system, monkeypatch)
    system.step(batch, system.rng("train", 0))
    mine = identities(system, batch, system.rng("train", 0))
    n = len(batch)
    partners = torch.cat([mine[n:], mine[:n]])
    torch.testing.assert_close(seen[0]["c_id"], mine if own else partners, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mine, partners, atol=1e-2)


def test_everything_else_stays_with_its_photograph(build, batch, monkeypatch):
    """The partner's face reaches a row through the identity alone."""
    system = build("system.self_share=0", "system.null_share=0")
    seen = watch(system, monkeypatch)
    system.step(batch, system.rng("train", 0))
    other = plain(batch)
    other.partner = other.partner.select([1, 2, 3, 0])
    system.step(other, system.rng("train", 0))
    n = len(batch)
    for name in ("x_t", "beside", "c_n"):
        assert torch.equal(seen[0][name][:n], seen[1][name][:n]), name
        assert not torch.equal(seen[0][name][n:], seen[1][name][n:]), name
    assert not torch.equal(seen[0]["c_id"][:n], seen[1]["c_id"][:n])
    assert torch.equal(seen[0]["c_id"][n:], seen[1]["c_id"][n:])


def test_token_masking_replaces_identities_by_the_null(build, batch, monkeypatch):
    system = build("system.masking=token", "system.null_share=1.0")
    seen = watch(system, monkeypatch)
    system.step(batch, system.rng("train", 0))
    assert torch.equal(seen[0]["c_id"], system.null_identity.expand_as(seen[0]["c_id"]))
    assert build("system.masking=spatial", "system.null_share=1.0").null_share == 0.0


@pytest.mark.parametrize(("masking", "hidden"), [("both", True), ("spatial", True), ("token", False), ("none", False)])
def test_spatial_masking_hides_the_face_from_all_but_the_recogniser(build, batch, monkeypatch, masking, hidden):
    system = build(f"system.masking={masking}", "system.null_share=0", "system.cell=16")
    seen = watch(system, monkeypatch)
    # The same photographs with the fine structure of the inner face turned upside down, cell by cell.
    changed = plain(batch)
    inside = F.avg_pool2d(face_region(112), 16, 16) == 1
    assert inside.sum() >= 4
    for side in (changed, changed.partner):
        cells = side.image.unfold(2, 16, 16).unfold(3, 16, 16).clone()
        cells[:, :, inside[0, 0]] = cells[:, :, inside[0, 0]].flip(-1, -2)
        side.image = cells.permute(0, 1, 2, 4, 3, 5).reshape(side.image.shape)
    for each in (batch, changed):
        system.step(each, system.rng("train", 0))
    for name in ("beside", "c_n"):
        same = torch.allclose(seen[0][name], seen[1][name], atol=1e-4)
        assert same == hidden, f"{name} with masking={masking}"
    assert not torch.allclose(seen[0]["x_t"], seen[1]["x_t"], atol=1e-2)


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_a_perfect_network_has_no_reconstruction_loss(build, batch, monkeypatch, prediction):
    system = build(f"system.noise.prediction={prediction}")
    target = system.step(batch, system.rng("train", 0)).target / system.error_weight.sqrt()
    monkeypatch.setattr(system, "predict", lambda *_: target)
    _, logged = system.total(batch, system.rng("train", 0))
    assert logged["reconstruction"].item() < 1e-10


def test_the_gate_can_read_the_prediction(build, batch):
    system = build("system.gate=prediction")
    loss, _ = system.total(batch, system.rng("train", 0))
    loss.backward()
    gates = [name for name, p in system.named_parameters() if ".processor.w1" in name and p.requires_grad]
    assert gates
    for name in gates:
        gradient = dict(system.named_parameters())[name].grad
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.any(), name
    out = system.anonymize(plain(batch).select([0, 1]))
    assert torch.isfinite(out).all() and out.shape == (2, 3, 112, 112)


def test_recognisers_are_frozen_and_named(system, batch):
    assert system.recognizer_names() == {"arcface_mbf"}
    assert not [name for name in system.trained_names() if name.startswith("identity.")]
    system.train()
    try:
        assert not system.identity.training
    finally:
        system.eval()


def test_embeddings_come_from_sidecars_or_from_the_recogniser(system, batch):
    """Both are the same up to the sidecars' half precision and the photographs' second compression."""
    stored = system.embed(batch)
    bare = plain(batch)
    bare.embeddings = {}
    computed = system.embed(bare)
    torch.testing.assert_close(stored.norm(dim=1), torch.ones(len(batch)), rtol=0, atol=2e-3)
    assert (stored * computed).sum(1).min() > 0.99


# Anonymization.


def test_shapes_and_ranges(system, batch):
    for out in (system.anonymize(batch), system.reconstruct(batch)):
        assert out.shape == batch.image.shape and out.dtype == torch.float32
        assert out.min() >= -1 and out.max() <= 1


def test_outside_the_face_the_pixels_are_the_photographs(build, system, batch):
    mask, x = outside(batch), batch.pixels()
    for out in (system.anonymize(batch), system.reconstruct(batch)):
        assert torch.equal(out[mask], x[mask])
        assert (out - x)[~mask].abs().mean() > 0.05, "inside it they are not"
    unpasted = build("system.paste=false").anonymize(batch)
    assert not torch.equal(unpasted[mask], x[mask])


def test_an_anonymization_is_repeatable_and_draws_differ(system, batch):
    torch.manual_seed(1)
    first = system.anonymize(batch, draw=0)
    torch.manual_seed(2)
    assert torch.equal(system.anonymize(batch, draw=0), first)
    second = system.anonymize(batch, draw=1)
    assert (first - second).abs().flatten(1).mean(1).min() > 1e-3
    assert not torch.allclose(system.draw_identity(batch, 0), system.draw_identity(batch, 1), atol=1e-2)


def test_an_anonymization_does_not_depend_on_who_shares_the_batch(system, batch):
    whole = system.anonymize(batch, draw=1)
    order = [2, 0, 3, 1]
    shuffled = system.anonymize(batch.select(order), draw=1)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-3)
    for row in range(len(batch)):
        alone = system.anonymize(batch.select([row]), draw=1)
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=0, atol=1e-3)
    people = system.draw_identity(batch, 1)
    assert (people @ people.T - torch.eye(len(batch))).abs().max() < 0.999, "each photo draws its own"


def cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(one.double(), other.double(), dim=-1).abs()


@pytest.mark.parametrize("space", ["latent", "recognizer", "none"])
def test_a_drawn_identity_is_at_right_angles_to_the_source(build, batch, monkeypatch, space):
    system = build(f"system.orthogonal_in={space}")
    decoded, decode = [], system.vae.decode
    monkeypatch.setattr(system.vae, "decode", lambda z: decoded.append(z) or decode(z))
    e = system.embed(batch)
    e_hat = system.draw_identity(batch, 0)
    (z,) = decoded
    mu = system.vae.encode(e).mu
    in_latent, in_recognizer = cosines(z, mu), cosines(e_hat, e)
    torch.testing.assert_close(e_hat.norm(dim=1), torch.ones(len(batch)), rtol=0, atol=1e-5)
    assert (in_latent.max() < 1e-5) == (space != "none")
    assert (in_recognizer.max() < 1e-5) == (space == "recognizer")
    lengths = torch.stack([system.noise_of(batch.select([row]), "identity", 0, mu.shape[1:])[0] for row in range(4)])
    torch.testing.assert_close(z.norm(dim=1), lengths.norm(dim=1), rtol=1e-4, atol=1e-4)


def test_a_reconstruction_keeps_the_identity_that_an_anonymization_replaces(system, batch, monkeypatch):
    used = []
    monkeypatch.setattr(system, "render", lambda batch, e_hat, *_: used.append(e_hat) or batch.pixels())
    system.reconstruct(batch)
    system.anonymize(batch)
    own, drawn = used
    torch.testing.assert_close(own, system.vae.decode(system.vae.encode(system.embed(batch)).mu))
    assert not torch.allclose(own, drawn, atol=1e-2)


@pytest.mark.parametrize("source", ["nobody", "source"])
def test_guidance_leaves_one_condition_for_the_other(build, batch, source):
    """w = 1 is the drawn identity alone; w = 0 is c' alone, which does not know what was drawn."""
    guided = build(f"system.guidance_from={source}", "system.steps=2")
    drawn, other = (torch.nn.functional.normalize(torch.randn(2, len(batch), 512), dim=-1)).unbind(0)
    assert torch.equal(guided.render(batch, drawn, 0, 0.0), guided.render(batch, other, 0, 0.0))
    assert not torch.equal(guided.render(batch, drawn, 0, 2.0), guided.render(batch, drawn, 0, 1.0))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_both_samplers_end_near_what_a_perfect_network_predicts(build, batch, monkeypatch, sampler):
    system = build(f"system.sampler={sampler}", "system.canvas=null")
    clean = system.codec.encode(batch.pixels())
    monkeypatch.setattr(system, "predict", lambda *_: clean)
    torch.testing.assert_close(system.anonymize(batch), batch.pixels(), rtol=0, atol=1e-3)
