"""IDDiffuse: what conditions it, what it trains on, and whom a person becomes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_training as tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from anonfw.batch import FaceBatch
from anonfw.data.open import open_loader
from anonfw.errors import AnonfwError
from anonfw.identity.bank import BankError, IdentityBank
from anonfw.identity.mapped import MappedIdentity, between
from anonfw.nets.non_identity import face_region
from anonfw.training.load import BASES, build_system, load_weights, start_from

pytestmark = pytest.mark.filterwarnings("ignore:.*")

RECIPE = tiny.ROOT / "recipes" / "iddiffuse.yaml"
GOLDEN = Path(__file__).parent / "golden" / "iddiffuse.json"


@pytest.fixture(scope="module")
def recipe(tiny_faces):
    return tiny.recipe(tiny_faces, path=RECIPE)


@pytest.fixture(scope="module")
def system(recipe):
    return build_system(recipe).eval()


@pytest.fixture(scope="module")
def batch(recipe) -> FaceBatch:
    """Four photographs of four people, each with another person beside it."""
    loader = open_loader(recipe, "train", seed=3, flip=0.0, limit_samples=None, batch_size=24)
    drawn = next(iter(loader))
    loader.close()
    first = [drawn.identity.tolist().index(person) for person in dict.fromkeys(drawn.identity.tolist())]
    return drawn.select(first[:4])


@pytest.fixture
def watched(system, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """What the network is handed, call by call."""
    seen, predict = [], system.predict

    def spy(x_t, t, z, c_image, beside):
        seen.append({"t": t, "z": z, "c_image": c_image, "beside": beside})
        return predict(x_t, t, z, c_image, beside)

    monkeypatch.setattr(system, "predict", spy)
    return seen


# The step.


def test_first_rows_become_their_partner_and_the_others_stay_themselves(system, batch, watched):
    out = system.step(batch, system.rng("train", 0))
    own, other = system.identity(batch), system.identity(batch.partner)
    torch.testing.assert_close(watched[0]["z"], torch.cat([other[:2], own[2:]]))
    # What the judged row's image shows, the losses see: the photograph around it, and a gradient to the network inside.
    assert out.x0_hat.shape == (1, 3, 112, 112)
    outside = (face_region(112) == 0).expand_as(out.x0_hat)
    assert torch.equal(out.x0_hat[outside], batch.pixels()[:1][outside])
    (gradient,) = torch.autograd.grad(out.x0_hat.square().sum(), system.unet.conv_out.weight)
    assert gradient.abs().sum() > 0


def test_a_cross_rows_error_inside_the_face_weighs_less(system, batch):
    """The scaled errors of one step, against those with a weight of 1."""
    light = system.step(batch, system.rng("train", 0))
    plain, system.cross_weight = system.cross_weight, torch.ones_like(system.cross_weight)
    try:
        full = system.step(batch, system.rng("train", 0))
    finally:
        system.cross_weight = plain
    ratio = (light.prediction - light.target).square() / (full.prediction - full.target).square()
    expected = system.cross_weight.expand_as(ratio[:2])
    torch.testing.assert_close(ratio[:2], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ratio[2:], torch.ones_like(ratio[2:]), rtol=1e-3, atol=1e-3)
    assert system.cross_weight.min() < 0.5 and system.cross_weight.max() == 1


def test_a_step_draws_from_nothing_but_its_generator(system, batch):
    """In training mode: the texture's dropout draws, too."""
    system.train()
    try:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first, _ = system.total(batch, system.rng("train", 0))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        second, _ = system.total(batch, system.rng("train", 0))
        third, _ = system.total(batch, system.rng("train", 1))
    finally:
        system.eval()
    assert first.item() == second.item() != third.item()


def test_dropout_drops_its_share_in_training_only(system):
    texture = system.texture
    features = torch.ones(2, texture.block[0].num_features, 10, 10)
    dropped = []
    handle = texture.block.register_forward_pre_hook(lambda _, inputs: dropped.append(inputs[0]))
    try:
        texture(features, torch.Generator().manual_seed(0))
        texture.train()
        texture(features, torch.Generator().manual_seed(0))
        texture(features)
    finally:
        handle.remove()
        system.eval()
    assert torch.equal(dropped[0], features) and torch.equal(dropped[2], features)
    assert (dropped[1] == 0).float().mean().item() == pytest.approx(texture.dropout, abs=0.02)
    assert dropped[1].mean().item() == pytest.approx(1, abs=0.03)


def test_plain_batches_are_refused(system, batch):
    alone = FaceBatch.concatenate([batch])
    with pytest.raises(AnonfwError, match="cross batches.*mode=cross"):
        system.step(alone, system.rng("train", 0))


@pytest.mark.slow
def test_without_conditions_the_network_reads_the_identity_alone(tiny_faces, batch):
    """The ablations, and the paper's form: no surroundings, the whole crop."""
    more = ["system.texture=null", "system.factors=null", "system.surroundings=false", "system.canvas=null"]
    bare = build_system(tiny.recipe(tiny_faces, *more, "system.paste=false", path=RECIPE)).eval()
    assert bare.seen(batch, batch.pixels()) == (None, None)
    assert not [name for name in bare.trained_state() if name.startswith(("texture", "measured"))]
    out = bare.anonymize(batch)
    assert out.shape == (4, 3, 112, 112)
    assert not torch.equal(out[..., :5, :5], batch.pixels()[..., :5, :5]), "the whole crop is generated"


# Whom a person becomes.


def test_anonymize_keeps_the_photograph_outside_the_face(system, batch, watched):
    out = system.anonymize(batch)
    assert out.shape == (4, 3, 112, 112) and out.abs().max() <= 1
    outside = (face_region(112) == 0).expand_as(out)
    assert torch.equal(out[outside], batch.pixels()[outside])
    assert not torch.equal(out, batch.pixels())
    assert torch.equal(out, system.anonymize(batch))
    assert not torch.equal(out, system.anonymize(batch, draw=1)), "another draw is other noise"
    # Two calls of the network a step, with the chosen identity and with the person's own: guidance.
    z = system.identity(batch)
    chosen = system.identity.centres(system.identity.choose(z, batch))
    torch.testing.assert_close(watched[0]["z"], chosen)
    assert torch.equal(watched[1]["z"], z)


def test_a_person_gets_one_identity_in_all_photographs(system, batch, watched):
    same = FaceBatch.concatenate([batch])
    same.identity = torch.tensor([7, 7, 9, 7])
    system.anonymize(same)
    z = watched[0]["z"]
    assert torch.equal(z[0], z[1]) and torch.equal(z[0], z[3]) and not torch.equal(z[0], z[2])
    # Mapped once by the caller, the batch does not matter.
    identities = system.identity.choose(system.identity(same), same)
    whole = system.anonymize(same, identities=identities)
    alone = system.anonymize(same.select([1]), identities=identities[1:2])
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-4)


def test_nobody_becomes_somebody_above_the_ceiling(system, batch):
    z = system.identity(batch)
    identities = system.identity.choose(z, batch)
    assert ((z * system.identity.centres(identities)).sum(-1) <= system.identity.ceiling + 1e-6).all()
    nearest = (z @ system.identity.bank.centres.T).max(-1).values
    assert (nearest > system.identity.ceiling).all(), "without a ceiling they would"


@given(seed=st.integers(0, 10**6), cosine=st.floats(-0.5, 0.5))
def test_strength_moves_monotonically_from_one_to_the_other(seed: int, cosine: float):
    z, drawn = F.normalize(torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)
    away = F.normalize(drawn - (drawn * z).sum() * z, dim=-1)
    z_hat = cosine * z + (1 - cosine**2) ** 0.5 * away
    shares = [between(z, z_hat, share / 10) for share in range(11)]
    cosines = [float((c * z).sum()) for c in shares]
    assert cosines == sorted(cosines) and cosines[0] == pytest.approx(cosine, abs=1e-5)
    assert all(float(c.norm()) == pytest.approx(1, abs=1e-5) for c in shares)
    torch.testing.assert_close(shares[10], z)


def test_strength_one_is_the_own_identity(system, batch):
    torch.testing.assert_close(system.anonymize(batch, strength=1.0), system.reconstruct(batch), rtol=0, atol=2e-3)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"strength is in \[0,1\]"):
            system.anonymize(batch, strength=wrong)


def test_the_recognisers_of_mapper_and_loss_cannot_judge(system):
    assert system.recognizer_names() == {"arcface_mbf", "edgeface_s"}


# Mapper and bank.


@pytest.fixture
def mapper(tmp_path) -> Path:
    """A copy of the shipped mapper, to be damaged."""
    return Path(shutil.copytree(BASES / "identity_mapper", tmp_path / "mapper"))


def replace_bank(folder: Path, dim: int, embedding: str | None = None) -> None:
    bank = IdentityBank.load(folder / "bank.safetensors")
    IdentityBank(bank.centres[:, :dim], bank.names, embedding or bank.embedding).save(folder / "bank.safetensors")


@pytest.mark.slow
def test_a_bank_of_another_mapper_or_width_is_refused(mapper):
    replace_bank(mapper, 512, "arcface_mbf+edgeface_s > E_I 0123456789abcdef")
    with pytest.raises(BankError, match="bank was made with .*0123456789abcdef, the system embeds with"):
        MappedIdentity(str(mapper))
    replace_bank(mapper, 256, IdentityBank.load(BASES / "identity_mapper" / "bank.safetensors").embedding)
    with pytest.raises(AnonfwError, match="mapper gives 512 numbers, its bank holds 256"):
        MappedIdentity(str(mapper))


def test_a_damaged_mapper_is_refused(mapper):
    content = bytearray((mapper / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (mapper / "model.safetensors").write_bytes(content)
    with pytest.raises(AnonfwError, match="not the file that was exported"):
        MappedIdentity(str(mapper))


def test_what_is_no_mapper_is_refused(tmp_path, system, batch):
    with pytest.raises(AnonfwError, match="no recipe.yaml"):
        MappedIdentity(str(tmp_path))
    with pytest.raises(AnonfwError, match="no recogniser 'facenet_vggface2'; it has arcface_mbf, edgeface_s"):
        system.identity.recognizer("facenet_vggface2")
    narrow = batch.select([0])
    narrow.embeddings["edgeface_s"] = narrow.embeddings["edgeface_s"][:, :128]
    with pytest.raises(AnonfwError, match="edgeface_s embeddings are 128 wide, edgeface_s gives 512"):
        system.anonymize(narrow)


def test_identities_of_the_same_sex_come_first(system, batch, monkeypatch):
    bank = system.identity.bank
    for female in (0.0, 1.0):
        looks = {"female": torch.full((4,), female), "age": torch.full((4,), 33.0)}
        monkeypatch.setattr(system.identity, "demographics", lambda *_, looks=looks: looks)
        chosen = system.identity.choose(system.identity(batch), batch)
        assert ((bank.attributes["female"][chosen] >= 0.5) == (female >= 0.5)).all()
        assert ((bank.attributes["age"][chosen] - 33).abs() < 10).all()


# Weights.


@pytest.mark.slow
def test_parts_of_another_base(recipe, tmp_path, capsys):
    fresh, other = build_system(recipe), tmp_path / "other.safetensors"
    before = {name: value.clone() for name, value in fresh.trained_state().items()}
    theirs = {name.replace("unet", "net"): value + 1 for name, value in before.items() if "down_blocks.0" in name}
    save_file(theirs | {"net.conv_in.bias": torch.zeros(3)}, other)  # of another shape: left alone
    start_from(fresh, {"from": str(other), "parts": {"unet": "net"}})
    after = fresh.trained_state()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {name.replace("unet", "net") for name in changed} == theirs.keys()
    assert f"unet: {len(theirs)} of" in capsys.readouterr().out
    with pytest.raises(AnonfwError, match="nothing in vae of .* has name and shape"):
        start_from(fresh, {"from": str(other), "parts": {"unet": "vae"}})
    with pytest.raises(AnonfwError, match="init is a file, a base or {from: SOURCE"):
        start_from(fresh, {"source": "x"})


@pytest.mark.slow
def test_the_loss_curve_is_the_one_in_git(tiny_faces, tmp_path):
    """Six steps. `ANONFW_UPDATE_GOLDEN=1 pytest ...` writes the curve anew."""
    folder = tiny.train(tiny.recipe(tiny_faces, f"run={tmp_path / 'run'}", path=RECIPE))
    names = ("train/loss", "train/reconstruction", "train/anonymization")
    found = {name: list(tiny.curve(folder, name).values()) for name in names}
    if os.environ.get("ANONFW_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(json.loads(GOLDEN.read_text()) | {"curves": found}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert set(golden["curves"]) == set(names)
    for name, values in golden["curves"].items():
        assert found[name] == pytest.approx(values, rel=golden["relative_tolerance"]), name


@pytest.mark.slow
def test_a_run_that_was_cut_ends_bitwise_equal(tiny_faces, tmp_path, monkeypatch):
    """Batch statistics of the texture extractor included."""
    from anonfw.system import System

    whole = tiny.train(tiny.recipe(tiny_faces, f"run={tmp_path / 'whole'}", path=RECIPE))
    again = tiny.recipe(tiny_faces, f"run={tmp_path / 'cut'}", path=RECIPE)
    plain = System.training_step

    def training_step(self, *arguments):
        if self.batches_seen == 4:
            raise InterruptedError
        return plain(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(System, "training_step", training_step)
        tiny.train(again)
    tiny.assert_same_end(tiny.train(again), whole)
    assert "texture.block.0.running_mean" in tiny.checkpoint(whole)["state_dict"]


@pytest.mark.slow
def test_less_strength_is_another_person():
    """The shipped base, six solver steps: the measured identity leaves the person's as the strength falls."""
    from anonfw import recipe as recipes
    from anonfw.identity import embed_aligned, open_recognizer

    shipped = build_system(recipes.read(RECIPE, ["system.steps=6", "system.identity.demographics=null"])).eval()
    load_weights(shipped, "iddiffuse")
    loader = open_loader(recipes.read(RECIPE, []), "test", shuffle=False, batch_size=64, workers=0)
    drawn = next(iter(loader))
    loader.close()
    first = [drawn.identity.tolist().index(person) for person in dict.fromkeys(drawn.identity.tolist())]
    photos = drawn.select(first[:8])
    judge = open_recognizer("edgeface_s")
    originals = embed_aligned(judge, photos.pixels(), "portrait")
    with torch.no_grad():
        cosines = [
            (embed_aligned(judge, shipped.anonymize(photos, strength=strength), "portrait") * originals).sum(-1).mean()
            for strength in (1.0, 0.75, 0.5, 0.25, 0.0)
        ]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] > 0.5 > 0.3 > cosines[-1]


def test_the_shipped_bases_are_small():
    assert (BASES / "iddiffuse.safetensors").stat().st_size <= 20e6
    assert sum(file.stat().st_size for file in (BASES / "identity_mapper").iterdir()) <= 5e6
