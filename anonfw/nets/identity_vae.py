"""The identity VAE: a latent space N(0, I) of recogniser embeddings, so that identities can be drawn.

Shape legend: B samples, D width of the recogniser's embedding, Z latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Posterior:
    """q(z|e) = N(mu, diag exp(logvar)); both (B,Z) float32."""

    mu: Tensor
    logvar: Tensor

    def sample(self, rng: torch.Generator) -> Tensor:
        """z = mu + sigma * noise (reparameterisation)."""
        noise = torch.randn(self.mu.shape, generator=rng, device=self.mu.device)
        return self.mu + (0.5 * self.logvar).exp() * noise

    def kl_to_prior(self) -> Tensor:
        """(B,Z) KL(q || N(0,1)) of each dimension, in nats: -1/2 (1 + logvar - mu^2 - exp(logvar))."""
        return -0.5 * (1 + self.logvar - self.mu.square() - self.logvar.exp())

    def statistics(self) -> dict[str, Tensor]:
        """`kl`: nats of all dimensions, mean over the batch. `active_dimensions`: those with more than 0.05 nats."""
        kl = self.kl_to_prior().detach().mean(0)
        return {"kl": kl.sum(), "active_dimensions": (kl > 0.05).sum().float()}

    def symmetric_kl(self, other: Posterior) -> Tensor:
        """(B,) KL(q||p) + KL(p||q), averaged over the dimensions."""
        var, var_o, gap = self.logvar.exp(), other.logvar.exp(), (self.mu - other.mu).square()
        return 0.5 * ((var + gap) / var_o + (var_o + gap) / var - 2).mean(-1)


class IdentityVAE(nn.Module):
    """MLP encoder D -> hidden -> (mu, logvar), MLP decoder Z -> hidden -> D, unit norm."""

    def __init__(self, dim: int, latent_dim: int = 512, hidden: int = 512) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )
        # Unit-norm embeddings have entries of about D^-1/2: brought to unit scale, the first layer starts alive.
        self.input_scale = dim**0.5

    def encode(self, e: Tensor) -> Posterior:
        """(B,D) unit-norm embeddings -> their posterior."""
        mu, logvar = self.encoder(e * self.input_scale).float().chunk(2, -1)
        return Posterior(mu, logvar.clamp(-10.0, 4.0))

    def decode(self, z: Tensor) -> Tensor:
        """(B,Z) -> (B,D) unit-norm embeddings."""
        return F.normalize(self.decoder(z).float(), dim=-1)


def orthogonal(z_r: Tensor, z_s: Tensor) -> Tensor:
    """Orthogonal Identity Mapping: the part of z_r at right angles to z_s, at the length of z_r. (B,Z), (B,Z) -> (B,Z).

    z_a = z_r - <z_r, z_s> / |z_s|^2 z_s,   z_a <- z_a |z_r| / |z_a|
    """
    along = (z_r * z_s).sum(-1, keepdim=True) / z_s.square().sum(-1, keepdim=True).clamp_min(1e-12)
    z_a = z_r - along * z_s
    return z_a * (z_r.norm(dim=-1, keepdim=True) / z_a.norm(dim=-1, keepdim=True).clamp_min(1e-12))
