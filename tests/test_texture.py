"""IDDiffuse's networks: patch statistics against a loop, concatenated attention against its formula."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given
from hypothesis import strategies as st

from anonfw.align import window_to_arcface
from anonfw.batch import FaceBatch, StepOut
from anonfw.losses.anonymization import Anonymization
from anonfw.nets.attention import ConcatKV
from anonfw.nets.texture import TextureExtractor


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_tokens_are_means_and_deviations_of_patches():
    """Against Eq. 6 written as a loop: token 0 is the whole image, then the patches row by row."""
    extractor = TextureExtractor(channels=6, width=8, grid=3).eval()
    features = randn(2, 6, 9, 9)
    x = extractor.block(features)

    def statistics_of(pixels: torch.Tensor) -> torch.Tensor:
        # The 1e-6 gives the root a gradient where a patch is flat.
        return torch.stack([pixels.mean(-1), (pixels.var(-1, unbiased=False) + 1e-6).sqrt()])

    expected = [statistics_of(x.flatten(2))]
    for row in range(3):
        for column in range(3):
            patch = x[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].flatten(2)
            expected.append(statistics_of(patch))
    statistics = torch.stack(expected, 2)  # 2, B, N, D
    mixed = (extractor.mix[:, None, None] * statistics).sum(0)
    torch.testing.assert_close(extractor(features), extractor.norm(mixed + extractor.position), rtol=0, atol=1e-4)


@given(side=st.integers(3, 30), grid=st.integers(1, 5))
def test_any_map_gives_the_same_number_of_tokens(side: int, grid: int):
    extractor = TextureExtractor(channels=4, width=8, grid=grid).eval()
    if side < grid:
        with pytest.raises(ValueError, match="too few"):
            extractor(randn(1, 4, side, side))
    else:
        assert extractor(randn(1, 4, side, side)).shape == (1, grid * grid + 1, 8)


def test_concatenated_attention_is_the_formula():
    """Eq. 8, heads written out: one softmax over the features' own keys and the condition's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attn = Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8)
        processor = ConcatKV(32)
    h, c = randn(2, 16, 32), randn(2, 5, 24, seed=1)
    q = attn.to_q(h)
    k = torch.cat([processor.own_k(h), attn.to_k(c)], 1)
    v = torch.cat([processor.own_v(h), attn.to_v(c)], 1)
    heads = [
        torch.softmax(q[..., s] @ k[..., s].transpose(1, 2) / 8**0.5, -1) @ v[..., s]
        for s in (slice(i, i + 8) for i in range(0, 32, 8))
    ]
    torch.testing.assert_close(processor(attn, h, c), attn.to_out[0](torch.cat(heads, -1)), rtol=0, atol=1e-5)


class Average(torch.nn.Module):
    """A recogniser that a test can compute by hand: the mean colour, as a unit vector."""

    name = "average"

    def crop(self, images: torch.Tensor, alignment: str) -> torch.Tensor:
        return window_to_arcface(images, alignment)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)


def one_colour(*rgb: int) -> FaceBatch:
    image = torch.tensor(rgb, dtype=torch.uint8)[None, :, None, None].expand(1, 3, 112, 112)
    zeros = torch.zeros(1, dtype=torch.int64)
    return FaceBatch(image, zeros, zeros, ["a"], torch.zeros(1, 5, 2))


@pytest.mark.parametrize(("gamma", "share"), [("time", 0.25), ("reversed", 0.75), ("constant", 0.0)])
def test_anonymization_loss_follows_time(gamma: str, share: float):
    """t = T/4 and a prediction that is exactly X_hat: only the real identity's term remains, times gamma."""
    batch = one_colour(255, 0, 0)
    batch.partner = one_colour(0, 255, 0)
    out = StepOut(prediction=torch.zeros(1), target=torch.zeros(1), t=torch.tensor([250]))
    out.x0_hat = batch.partner.pixels()
    loss = Anonymization(Average(), gamma=gamma, real_weight=0.1)
    to_real = 1 - (Average()(batch.pixels()) @ Average()(batch.partner.pixels()).T).item()
    assert to_real > 0.5
    assert loss(out, batch).item() == pytest.approx((share + 0.1) * to_real, abs=1e-4)
    out.x0_hat = out.x0_hat.clone().requires_grad_()
    loss(out, batch).sum().backward()
    assert out.x0_hat.grad.isfinite().all()
    with pytest.raises(ValueError, match="cross batch"):
        loss(out, batch.partner)
