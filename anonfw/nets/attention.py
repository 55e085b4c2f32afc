"""The three ways in which a face reaches a diffusion U-Net's attention, as diffusers attention processors.

Shape legend: B batch, S positions of the layer, C its width, N tokens of a condition, D width of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn


def attend(attn: Attention, query: Tensor, tokens: Tensor, to_k: nn.Module, to_v: nn.Module) -> Tensor:
    """Multi-head attention of `query` (B,S,C), already projected, to `tokens` (B,N,D) -> (B,S,C)."""
    b, s, c = query.shape
    q = query.view(b, s, attn.heads, -1).transpose(1, 2)
    k = to_k(tokens).view(b, tokens.shape[1], attn.heads, -1).transpose(1, 2)
    v = to_v(tokens).view(b, tokens.shape[1], attn.heads, -1).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, c)


class SelfAttention(AttnProcessor2_0):
    """The layer's own attention, unchanged; it ignores what `cross_attention_kwargs` carries for the other layers."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        identity_tokens: Tensor | None = None,  # noqa: ARG002 read by GatedKV in the cross-attention layers
        time_embedding: Tensor | None = None,  # noqa: ARG002
        gate_image: Tensor | None = None,  # noqa: ARG002
        identity_scale: float = 1.0,  # noqa: ARG002 read by DecoupledKV
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class GatedKV(nn.Module):
    """ID²Face's harmonizer: a soft gate mixes an identity and a non-identity attention (our reading of the abstract).

        A_id = Attn(h, c_id),  A_n = Attn(h, c_n)
        g    = sigmoid(W_2 SiLU(W_1 [LN(s); A_id; A_n; temb]))  in (B,S,C)
        out  = g * A_id + (1 - g) * A_n

    s is the layer's noisy hidden state h (`gate="hidden"`) or the predicted clean sample, pooled to the layer's grid
    (`gate="prediction"`). W_2 starts at zero, so g = 1/2. The residual h + out is the transformer block's own.

    Args:
        width: C. token_width: D. time_width: width of the time embedding. image_channels: of the predicted sample.
    """

    def __init__(
        self, width: int, token_width: int, time_width: int, gate: str = "hidden", image_channels: int = 0
    ) -> None:
        super().__init__()
        if gate not in ("hidden", "prediction"):
            raise ValueError(f"gate is 'hidden' or 'prediction', not {gate!r}")
        self.gate = gate
        self.identity_k = nn.Linear(token_width, width, bias=False)
        self.identity_v = nn.Linear(token_width, width, bias=False)
        source = width if gate == "hidden" else image_channels
        self.norm = nn.LayerNorm(source)
        self.w1 = nn.Linear(source + 2 * width, width // 2)
        self.time = nn.Linear(time_width, width // 2)
        self.w2 = nn.Linear(width // 2, width)
        nn.init.zeros_(self.w2.weight)
        nn.init.zeros_(self.w2.bias)

    def start_from(self, attn: Attention) -> None:
        """The identity projections begin as the layer's own (as IP-Adapter does)."""
        self.identity_k.load_state_dict(attn.to_k.state_dict())
        self.identity_v.load_state_dict(attn.to_v.state_dict())

    # diffusers reads the names of `__call__` to decide which keywords a processor takes, so it is not `forward`.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002 part of diffusers' processor signature
        temb: Tensor | None = None,  # noqa: ARG002
        identity_tokens: Tensor | None = None,
        time_embedding: Tensor | None = None,
        gate_image: Tensor | None = None,
    ) -> Tensor:
        """h (B,S,C), c_n in `encoder_hidden_states` (B,N,D), c_id in `identity_tokens` (B,N_id,D) -> (B,S,C)."""
        h = hidden_states
        query = attn.to_q(h)
        a_id = attend(attn, query, identity_tokens, self.identity_k, self.identity_v)
        a_n = attend(attn, query, encoder_hidden_states, attn.to_k, attn.to_v)
        source = h if self.gate == "hidden" else self._on_grid(gate_image, h.shape[1])
        mixed = self.w1(torch.cat([self.norm(source), a_id, a_n], -1)) + self.time(time_embedding).unsqueeze(1)
        g = torch.sigmoid(self.w2(F.silu(mixed)))
        out = g * a_id + (1 - g) * a_n
        return attn.to_out[1](attn.to_out[0](out))

    @staticmethod
    def _on_grid(image: Tensor, positions: int) -> Tensor:
        """(B,c,H,W) pooled to the square grid of a layer -> (B,S,c)."""
        side = round(positions**0.5)
        return F.adaptive_avg_pool2d(image, (side, side)).flatten(2).transpose(1, 2)


class ConcatKV(nn.Module):
    """IDDiffuse's and DCFace's rule (Eq. 8): keys and values of the condition stand beside those of the features.

        out = softmax(Q [K, K_c]^T / sqrt(d)) [V, V_c],   Q, K, V of the hidden state, K_c, V_c of the condition

    It sits in a cross-attention layer, whose own projections are those of the condition; K and V are added.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own_k = nn.Linear(width, width, bias=False)
        self.own_v = nn.Linear(width, width, bias=False)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002 part of diffusers' processor signature
        temb: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """h (B,S,C), condition in `encoder_hidden_states` (B,N,D) -> (B,S,C)."""
        h, c = hidden_states, encoder_hidden_states
        b, s, width = h.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(b, -1, attn.heads, width // attn.heads).transpose(1, 2)

        k = heads(torch.cat([self.own_k(h), attn.to_k(c)], 1))
        v = heads(torch.cat([self.own_v(h), attn.to_v(c)], 1))
        out = F.scaled_dot_product_attention(heads(attn.to_q(h)), k, v).transpose(1, 2).reshape(b, s, width)
        return attn.to_out[1](attn.to_out[0](out))


class DecoupledKV(nn.Module):
    """IP-Adapter's rule: a second attention, to the identity's tokens, is added to the layer's own (Ye et al. 2023).

        out = softmax(Q K^T / sqrt(d)) V + scale softmax(Q K_id^T / sqrt(d)) V_id,   Q shared

    It sits in a cross-attention layer, whose own projections are those of the text. Without tokens, or at scale 0, the
    layer is what it was.

    Args:
        width: C. token_width: D.
    """

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.identity_k = nn.Linear(token_width, width, bias=False)
        self.identity_v = nn.Linear(token_width, width, bias=False)

    def start_from(self, attn: Attention) -> None:
        """The identity's projections begin as the layer's own, in fp32."""
        self.identity_k.load_state_dict(attn.to_k.state_dict())
        self.identity_v.load_state_dict(attn.to_v.state_dict())

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002 part of diffusers' processor signature
        temb: Tensor | None = None,  # noqa: ARG002
        identity_tokens: Tensor | None = None,
        identity_scale: float = 1.0,
    ) -> Tensor:
        """h (B,S,C), text in `encoder_hidden_states` (B,L,D), `identity_tokens` (B,N,D) -> (B,S,C)."""
        query = attn.to_q(hidden_states)
        out = attend(attn, query, encoder_hidden_states, attn.to_k, attn.to_v)
        if identity_tokens is not None and identity_scale != 0:
            out = out + identity_scale * attend(attn, query, identity_tokens, self.identity_k, self.identity_v)
        return attn.to_out[1](attn.to_out[0](out))


def install(unet: nn.Module, make) -> None:
    """Gives every cross-attention layer of a diffusers U-Net the processor `make(attn)`; self-attention stays its own.

    Args:
        make: Attention -> processor. Its parameters become the U-Net's (they are sub-modules of the layer).
    """
    processors = {}
    for name in unet.attn_processors:
        attn = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = make(attn) if attn.is_cross_attention else SelfAttention()
    unet.set_attn_processor(processors)
