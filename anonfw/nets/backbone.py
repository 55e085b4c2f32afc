"""A text-to-image pipeline in diffusers' layout, opened as frozen networks: text, latents and the U-Net's prediction.

Stable Diffusion 1.5 and SDXL differ here in what their folder holds and in nothing else: with a second text encoder,
the tokens of both stand side by side, and the U-Net wants a pooled caption and time ids.

Shape legend: B images of H px, c channels on a grid of h = H / factor, L = 77 tokens of a caption of width D, P width
of a pooled caption.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anonfw.errors import AnonfwError
from anonfw.nets.codec import DTYPES, Autoencoder, Dtype
from anonfw.nets.pipeline_base import base_folder


class Text(NamedTuple):
    """B encoded captions. states: (B,L,D) float32. pooled: (B,P) float32, None where the U-Net wants none."""

    states: Tensor
    pooled: Tensor | None = None

    def where(self, chosen: Tensor, other: Text) -> Text:
        """Row by row: this one where `chosen` (B,) is true, else `other`, whose B may be 1."""
        pooled = None if self.pooled is None else torch.where(chosen[:, None], self.pooled, other.pooled)
        return Text(torch.where(chosen[:, None, None], self.states, other.states), pooled)


class Backbone(nn.Module):
    """Opens unet/, vae/, scheduler/, and each tokenizer and text_encoder that model_index.json names.

    Args:
        source: a folder that `save_pretrained` wrote, a base of the package (`face_model`), or a hub id.
        revision: commit of a hub id, which needs one: a branch may move under a run.
        dtype: of the frozen U-Net and the text encoders. With bf16 or fp16 they take half the memory; what is trained
            on top stays fp32, and the U-Net runs under autocast.
        vae_dtype: null is fp32 where the autoencoder's own configuration asks for it (SDXL's does), else `dtype`.
        checkpointing: recompute the U-Net's activations in the backward pass: less memory, about a third more time.
        slicing: decode images one by one, and large ones in tiles. offload: text encoders and autoencoder stay on the
            CPU while they are not used.
    Raises:
        AnonfwError: nothing there and no network to fetch it, or parts that are missing or do not fit each other.
    """

    def __init__(
        self,
        source: str,
        revision: str | None = None,
        dtype: Dtype = "fp32",
        vae_dtype: Dtype | None = None,
        checkpointing: bool = False,
        slicing: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__()
        from diffusers import DDPMScheduler

        for name in (dtype, vae_dtype or dtype):
            if name not in DTYPES:
                raise AnonfwError(f"{name!r} is no precision of a backbone: {', '.join(DTYPES)}")
        self.source, self.offload = source, offload
        folder = find(source, revision)
        parts = Parts(folder)
        self.unet = parts.open("unet", DTYPES[dtype])
        self.noise = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", clip_sample=False)
        self.tokenizers = [parts.open(name) for name in parts.named("tokenizer")]
        encoders = [parts.open(name, DTYPES[dtype]) for name in parts.named("text_encoder")]
        with parts.reading("vae") as kind:
            upcast = json.loads((folder / "vae" / "config.json").read_text()).get("force_upcast", False)
            vae_dtype = vae_dtype or ("fp32" if upcast else dtype)
            codec = Autoencoder(str(folder), "vae", kind=kind.__name__, dtype=vae_dtype)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        if slicing:
            codec.vae.enable_slicing()
            codec.vae.enable_tiling()
        # A plain list is no part of the module: `.to(device)` leaves what it holds where it is.
        self._encoders = encoders if offload else nn.ModuleList(encoders)
        self._codec = [codec] if offload else nn.ModuleList([codec])
        for frozen in (self.unet, codec, *encoders):
            frozen.requires_grad_(False).eval()
        self._check(folder)
        self._empty: Text | None = None

    def train(self, mode: bool = True) -> Backbone:  # noqa: ARG002 frozen nets stay in eval mode
        return super().train(False)

    @property
    def codec(self) -> Autoencoder:
        return self._codec[0]

    @property
    def factor(self) -> int:
        """Pixels a latent position, along each side."""
        return self.codec.factor

    @property
    def channels(self) -> int:
        """c."""
        return self.codec.channels

    @property
    def token_width(self) -> int:
        """D."""
        return self.unet.config.cross_attention_dim

    @property
    def pooled_width(self) -> int | None:
        """P; None where the U-Net reads no pooled caption."""
        return self._encoders[-1].config.projection_dim if self.wants_pooled else None

    @property
    def wants_pooled(self) -> bool:
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        """SD 1.5: the encoder's last layer. SDXL: both encoders' last but one, and the second's pooled vector."""
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self._encoders, strict=True):
            ids = tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            with self._here(encoder), torch.autocast(self.device.type, enabled=False):
                out = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2] if self.wants_pooled else out.last_hidden_state)
            pooled = out.text_embeds.float() if self.wants_pooled and "text_embeds" in out else pooled
        return Text(torch.cat(states, -1).float(), pooled)

    def empty_text(self) -> Text:
        """The caption "" (B = 1), encoded once."""
        if self._empty is None or self._empty.states.device != self.device:
            self._empty = self.encode_text([""])
        return self._empty

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] -> (B,c,h,w) float32, the mode of the autoencoder's posterior times its scale."""
        with self._here(self.codec), torch.autocast(self.device.type, enabled=False):
            return self.codec.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B,c,h,w) -> (B,3,H,W) float32, not clamped."""
        with self._here(self.codec), torch.autocast(self.device.type, enabled=False):
            return self.codec.decode(latents)

    def time_ids(self, n: int, original: int, size: int, corner: tuple[int, int] = (0, 0)) -> Tensor | None:
        """(n,6) float32: original height and width, top and left of the crop, height and width; None for SD 1.5.

        Args:
            original: side in px of the square photograph before it was resized to `size`. corner: of the crop in it.
        """
        if not self.wants_pooled:
            return None
        row = [original, original, *corner, size, size]
        return torch.tensor([row], dtype=torch.float32, device=self.device).expand(n, -1)

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Text,
        time_ids: Tensor | None = None,
        identity_tokens: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """The U-Net's output (B,c,h,w) in the schedule's prediction type, in the precision of x_t.

        Args:
            x_t: (B,c,h,w). t: (B,) int64. identity_tokens: (B,N,D), where `add_identity` has prepared the U-Net.
            scale: of the identity's attention.
        """
        kwargs = {"identity_tokens": identity_tokens, "identity_scale": scale} if identity_tokens is not None else None
        added = {"text_embeds": text.pooled, "time_ids": time_ids} if self.wants_pooled else None
        half = self.unet.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if half else self.unet.dtype
        with torch.autocast(self.device.type, self.unet.dtype) if half else nullcontext():
            out = self.unet(
                x_t.to(dtype), t, text.states.to(dtype), added_cond_kwargs=added, cross_attention_kwargs=kwargs
            )
        return out.sample.to(x_t.dtype)

    @contextmanager
    def _here(self, module: nn.Module) -> Iterator[None]:
        """Within the block, `module` is on the U-Net's device."""
        if not self.offload:
            yield
            return
        module.to(self.device)
        try:
            yield
        finally:
            module.to("cpu")

    def _check(self, folder: Path) -> None:
        config, width = self.unet.config, sum(encoder.config.hidden_size for encoder in self._encoders)
        if not self._encoders or len(self._encoders) != len(self.tokenizers):
            raise AnonfwError(
                f"{folder} has {len(self._encoders)} text encoders and {len(self.tokenizers)} tokenizers; a "
                "text-to-image pipeline has one of each (SD 1.5) or two (SDXL): place the missing folders there"
            )
        if config.cross_attention_dim != width:
            raise AnonfwError(
                f"the U-Net in {folder} reads tokens of width {config.cross_attention_dim}, and its text encoders make "
                f"{width}: a text encoder is missing in model_index.json, or is another model's"
            )
        if config.in_channels != self.channels or config.out_channels != self.channels:
            raise AnonfwError(
                f"the U-Net in {folder} has {config.in_channels} channels in and {config.out_channels} out, its "
                f"autoencoder {self.channels}: an inpainting or upscaling model? Take the plain one"
            )
        if self.wants_pooled:
            vector = self.pooled_width + 6 * config.addition_time_embed_dim
            if config.projection_class_embeddings_input_dim != vector:
                raise AnonfwError(
                    f"the U-Net in {folder} reads a pooled caption and time ids of width "
                    f"{config.projection_class_embeddings_input_dim} in all, and would get {vector}: is "
                    "the last text encoder this pipeline's own?"
                )


class Parts:
    """The networks of a pipeline's folder, each opened as model_index.json says."""

    def __init__(self, folder: Path) -> None:
        file = folder / "model_index.json"
        if not file.exists():
            raise AnonfwError(
                f"{folder} is no pipeline in diffusers' layout: there is no model_index.json in it, beside unet, vae, "
                "scheduler, tokenizer and text_encoder"
            )
        self.folder = folder
        self.index: dict[str, list[str | None]] = {
            name: value
            for name, value in json.loads(file.read_text(encoding="utf-8")).items()
            if isinstance(value, list) and value[0] is not None
        }
        for name in ("unet", "vae", "scheduler"):
            if name not in self.index:
                raise AnonfwError(f"{file} names no {name}: not a latent diffusion pipeline?")

    def named(self, prefix: str) -> list[str]:
        """`tokenizer` -> [`tokenizer`, `tokenizer_2`], as far as the index has them."""
        return sorted(name for name in self.index if name == prefix or name.startswith(f"{prefix}_"))

    def open(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """The network or tokenizer `name`. Raises: AnonfwError: as `reading`."""
        options: dict[str, Any] = {} if name.startswith("tokenizer") else {"use_safetensors": True}
        if dtype is not None:
            options["torch_dtype" if self.index[name][0] == "diffusers" else "dtype"] = dtype
        with self.reading(name) as kind:
            return kind.from_pretrained(self.folder / name, local_files_only=True, **options)

    @contextmanager
    def reading(self, name: str) -> Iterator[type]:
        """The class of `name`; what goes wrong in the block is told as a mistake in the folder.

        Raises:
            AnonfwError: the folder is missing or damaged, or of a class that the libraries here do not have.
        """
        library, kind = self.index[name]
        if library not in ("diffusers", "transformers"):
            raise AnonfwError(f"{self.folder}/model_index.json: {name} is of {library}, which is not opened here")
        found = getattr(importlib.import_module(library), str(kind), None)
        if found is None:
            raise AnonfwError(f"{self.folder}/model_index.json: the installed {library} has no {kind} ({name})")
        if not (self.folder / name).is_dir():
            raise AnonfwError(f"{self.folder} lacks its {name} ({library}.{kind}): copy that folder of the pipeline")
        from safetensors import SafetensorError

        try:
            with no_bars():
                yield found
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise AnonfwError(f"cannot open {self.folder / name} ({library}.{kind}): {reason}") from error


@contextmanager
def no_bars() -> Iterator[None]:
    """Within the block, transformers draws no progress bar for each network that it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def find(source: str, revision: str | None = None) -> Path:
    """The pipeline's folder: a base's, `source` itself, or the snapshot of a hub id, fetched if it is not in the cache.

    Raises:
        AnonfwError: no such folder, a damaged base, no revision for a hub id, or neither cached nor to be fetched.
    """
    if (base := base_folder(source)) is not None:
        return base
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.count("/") != 1 or source.startswith((".", "~")):
        raise AnonfwError(f"there is no pipeline folder {folder}; give one in diffusers' layout, or a hub id")
    if not revision:
        raise AnonfwError(f"{source} is no folder here, and a hub id needs a revision (the commit), or runs may differ")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(source, revision=revision, use_safetensors=True))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise AnonfwError(
            f"{source} at {revision[:12]} is neither a folder here, nor in the hub's cache, nor to be fetched "
            f"({type(error).__name__}: {reason}). Where there is a network, run `hf download {source} --revision "
            f"{revision} --local-dir FOLDER`, copy FOLDER here (model_index.json, unet, vae, scheduler, tokenizer*, "
            "text_encoder*) and name it as the backbone's source"
        ) from error
