"""The networks' blocks: parity with plain formulas, what starts where, and what hides the face."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given
from hypothesis import strategies as st

from anonfw.nets.attention import GatedKV, install
from anonfw.nets.codec import Pixels
from anonfw.nets.identity_vae import IdentityVAE, Posterior, orthogonal
from anonfw.nets.non_identity import Canvas, IdentityMask, face_region
from anonfw.nets.unet import pretrained_unet, small_unet


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def cross_attention(width: int = 32, tokens: int = 24) -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention(query_dim=width, cross_attention_dim=tokens, heads=4, dim_head=width // 4)


@pytest.mark.parametrize("gate", ["hidden", "prediction"])
def test_gate_starts_half_open(gate: str):
    """Before training, the two attentions are averaged: the mean of diffusers' own processor on each condition."""
    attn = cross_attention()
    processor = GatedKV(32, 24, 16, gate, image_channels=3)
    processor.start_from(attn)
    h, c_n, c_id, temb = randn(2, 16, 32), randn(2, 5, 24, seed=1), randn(2, 3, 24, seed=2), randn(2, 16, seed=3)
    out = processor(attn, h, c_n, identity_tokens=c_id, time_embedding=temb, gate_image=randn(2, 3, 8, 8))
    plain = AttnProcessor2_0()
    torch.testing.assert_close(out, (plain(attn, h, c_n) + plain(attn, h, c_id)) / 2, rtol=0, atol=1e-5)


def test_gate_is_the_formula():
    """Against Eq.: g = sigmoid(W2 SiLU(W1 [LN(h); A_id; A_n] + W_t t)), heads written out one by one."""
    attn = cross_attention()
    processor = GatedKV(32, 24, 16)
    with torch.no_grad():
        for number, parameter in enumerate(processor.parameters()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=number))
    h, c_n, c_id, temb = randn(2, 16, 32), randn(2, 5, 24, seed=1), randn(2, 3, 24, seed=2), randn(2, 16, seed=3)

    def attention(tokens, to_k, to_v):
        q, k, v = attn.to_q(h), to_k(tokens), to_v(tokens)
        heads = [
            torch.softmax(q[..., s] @ k[..., s].transpose(1, 2) / 8**0.5, -1) @ v[..., s]
            for s in (slice(i, i + 8) for i in range(0, 32, 8))
        ]
        return torch.cat(heads, -1)

    a_id = attention(c_id, processor.identity_k, processor.identity_v)
    a_n = attention(c_n, attn.to_k, attn.to_v)
    inside = processor.w1(torch.cat([processor.norm(h), a_id, a_n], -1)) + processor.time(temb)[:, None]
    g = torch.sigmoid(processor.w2(F.silu(inside)))
    expected = attn.to_out[0](g * a_id + (1 - g) * a_n)
    ours = processor(attn, h, c_n, identity_tokens=c_id, time_embedding=temb)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_installed_gates_reach_every_cross_attention_and_no_other():
    unet = small_unet(9, 4, 16, 24, widths=(16, 32), attention=(False, True), heads=2)
    install(unet, lambda attn: GatedKV(attn.to_q.in_features, 24, unet.time_embedding.linear_2.out_features))
    kinds = {name: type(processor).__name__ for name, processor in unet.attn_processors.items()}
    assert kinds and all((kind == "GatedKV") == ("attn2" in name) for name, kind in kinds.items())
    t = torch.tensor([3, 700])
    temb = unet.time_embedding(unet.time_proj(t))
    kwargs = {"identity_tokens": randn(2, 3, 24), "time_embedding": temb}
    out = unet(randn(2, 9, 16, 16), t, randn(2, 5, 24), cross_attention_kwargs=kwargs).sample
    assert out.shape == (2, 4, 16, 16)
    out.sum().backward()
    gates = [p for name, p in unet.named_parameters() if "processor" in name]
    assert gates and all(p.grad is not None and p.grad.isfinite().all() for p in gates)


def test_unet_from_a_folder_reads_more_channels(tmp_path):
    """As inpainting models do: with zeros in the added channels, the network is the released one."""
    released = small_unet(4, 4, 8, 16, widths=(16, 32), attention=(False, True), heads=2).eval()
    released.save_pretrained(tmp_path / "unet")
    wide = pretrained_unet(9, 4, 8, 16, str(tmp_path)).eval()
    x, t, tokens = randn(2, 4, 8, 8), torch.tensor([5, 800]), randn(2, 3, 16)
    beside = torch.cat([x, randn(2, 5, 8, 8, seed=4)], 1)
    torch.testing.assert_close(wide(beside, t, tokens).sample, released(x, t, tokens).sample)
    with pytest.raises(ValueError, match="token_width"):
        pretrained_unet(9, 4, 8, 24, str(tmp_path))
    with pytest.raises(ValueError, match="codec"):
        pretrained_unet(25, 12, 8, 16, str(tmp_path))


@given(patch=st.sampled_from([1, 2, 4]), seed=st.integers(0, 2**32))
def test_pixels_come_back(patch: int, seed: int):
    codec = Pixels(patch)
    images = torch.rand(2, 3, 16, 16, generator=generator(seed)) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (2, codec.channels, 16 // patch, 16 // patch)
    torch.testing.assert_close(codec.decode(codec.clip(latents)), images)


@given(seed=st.integers(0, 2**32), width=st.integers(2, 64))
def test_orthogonal_identity(seed: int, width: int):
    z_r, z_s = randn(2, 4, width, seed=seed).unbind(0)
    z_a = orthogonal(z_r, z_s)
    assert F.cosine_similarity(z_a, z_s).abs().max() < 1e-3
    torch.testing.assert_close(z_a.norm(dim=-1), z_r.norm(dim=-1), rtol=1e-3, atol=1e-4)


def test_divergences_are_torchs():
    one = Posterior(randn(3, 7), 0.3 * randn(3, 7, seed=1))
    two = Posterior(randn(3, 7, seed=2), 0.3 * randn(3, 7, seed=3))

    def normal(q: Posterior) -> torch.distributions.Normal:
        return torch.distributions.Normal(q.mu, (0.5 * q.logvar).exp())

    kl = torch.distributions.kl_divergence
    prior = torch.distributions.Normal(torch.zeros(3, 7), torch.ones(3, 7))
    torch.testing.assert_close(one.kl_to_prior(), kl(normal(one), prior))
    both = (kl(normal(one), normal(two)) + kl(normal(two), normal(one))).mean(-1)
    torch.testing.assert_close(one.symmetric_kl(two), both)
    torch.testing.assert_close(one.symmetric_kl(one), torch.zeros(3))


def test_vae_speaks_in_unit_vectors():
    vae = IdentityVAE(32, latent_dim=8)
    e = F.normalize(randn(5, 32), dim=-1)
    q = vae.encode(e)
    assert q.mu.shape == q.logvar.shape == (5, 8)
    torch.testing.assert_close(vae.decode(q.sample(generator())).norm(dim=-1), torch.ones(5))
    assert torch.equal(q.sample(generator(1)), q.sample(generator(1)))


@pytest.mark.parametrize("cell", [0, 8, 16])
def test_mask_hides_the_face(cell: int):
    """Two photographs that differ inside the face by detail of zero mean per cell look the same to the extractor."""
    mask = IdentityMask(112, cell)
    images = randn(2, 3, 112, 112).clamp(-1, 1)
    other = images.clone()
    region = face_region(112).bool().expand_as(images)
    other[region] = randn(int(region.sum()), seed=5).clamp(-1, 1)
    visible, hidden = mask(images)
    assert torch.equal(hidden[0], face_region(112)[0])
    assert torch.equal(visible[~region], images[~region])
    seen = (mask(other)[0] - visible)[region].std() / (other - images)[region].std()
    assert seen < 0.2
    assert torch.equal(IdentityMask(112, cell, enabled=False)(images)[0], images)


def test_canvas_cuts_and_puts_back():
    canvas = Canvas(112, 80)
    images = randn(2, 3, 112, 112)
    patch = canvas.cut(images)
    assert patch.shape == (2, 3, 80, 80)
    assert torch.equal(canvas.put(images, patch), images)
    changed = canvas.put(images, torch.zeros_like(patch))
    assert (changed != images).sum() == patch.numel()
    with pytest.raises(ValueError, match="does not hold the face"):
        Canvas(112, 48)
