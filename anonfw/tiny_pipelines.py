"""Stable Diffusion 1.5 and SDXL small enough for a CPU: the released layout, block types and files, random weights.

They exist so that everything around released weights (opening, text, latents, adapters, interchange) runs anywhere as
it runs there. They draw nothing that is worth looking at. The tokenizers' vocabulary is the project's own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from anonfw.data.files import cache_folder
from anonfw.errors import AnonfwError
from anonfw.nets.backbone import Backbone, no_bars

Kind = Literal["sdxl", "sd15"]

# Words of face captions; each becomes one token, everything else falls apart into letters.
WORDS = (
    "a an the of photo picture portrait face person people man woman boy girl baby child adult old young middle aged "
    "year years asian black indian white latino hispanic eastern male female with without and in on hair beard glasses "
    "smiling smile neutral happy sad angry surprised blond brown dark light grey long short eyes mouth open closed "
    "looking left right up down camera"
)  # fmt: skip

START, END = "<|startoftext|>", "<|endoftext|>"


def tiny(kind: Kind = "sdxl", seed: int = 0, **options) -> Backbone:
    """The opened tiny pipeline, for recipes. It is written into the cache on first use.

    Args:
        kind: which layout. seed: of the weights. options: of `Backbone`.
    """
    return Backbone(str(cached(kind, seed, cache_folder() / "pipelines")), **options)


def cached(kind: Kind, seed: int, cache: Path) -> Path:
    """The folder of the pipeline in `cache`, made if it is not there. Several processes may ask at once."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache / f"tiny_{kind}_{seed}_{code}_torch{torch.__version__.partition('+')[0]}"
    if not folder.exists():
        save(folder, kind, seed)
    return folder


def save(folder: Path, kind: Kind, seed: int = 0) -> Path:
    """Writes the pipeline in diffusers' layout, whole or not at all. `folder` must not exist, or is left as it is.

    Raises:
        AnonfwError: unknown kind, or the folder cannot be written.
    """
    if kind not in BUILDERS:
        raise AnonfwError(f"there is no tiny pipeline {kind!r}: kind is {' or '.join(BUILDERS)}")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with no_bars():
            BUILDERS[kind](seed).save_pretrained(partial, safe_serialization=True)
        try:
            os.rename(partial, folder)
        except OSError:
            if not (folder / "model_index.json").exists():  # else another process was faster, with the same content
                raise
    except OSError as error:
        raise AnonfwError(f"cannot write the pipeline {folder}: {error}; ANONFW_CACHE names another cache") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def tokenizer(words: str = WORDS, pad: str = END, length: int = 77):
    """A `CLIPTokenizer` of our own vocabulary: all bytes, and one token for each of `words` (lower case).

    Args:
        pad: the padding token; SDXL's second tokenizer pads with "!". length: L, tokens of a caption.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())  # one printable character for each byte
    merges = byte_pairs(words.split())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    # The end has the largest number: CLIP finds it that way.
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=length)


def byte_pairs(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding learned until each of `words` is one piece: the pairs in the order in which they merge."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for parts in split for pair in pairwise(parts)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in split:
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    return merges


def text_encoder(vocabulary: int, width: int, projection: int | None = None, act: str = "quick_gelu"):
    """A CLIP text encoder of two layers; with `projection` it also gives a pooled vector of that width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=projection or width,
        hidden_act=act,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def autoencoder(scaling_factor: float, force_upcast: bool):
    """8 x 8 px become one position of 4 channels, as in the released ones."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        force_upcast=force_upcast,
    )


def schedule(kind: str, **more):
    """The released models' noise schedule, under the sampler that they name."""
    import diffusers

    return getattr(diffusers, kind)(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **more
    )


def forked(build: Callable[[], object]) -> Callable[[int], object]:
    """`build` with torch's global state seeded for it and put back afterwards."""

    @functools.wraps(build)
    def seeded(seed: int) -> object:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return seeded


@forked
def sd15():
    """Stable Diffusion 1.5: one text encoder, four levels, tokens of width 32 (released: 768)."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=autoencoder(0.18215, force_upcast=False),
        text_encoder=text_encoder(len(words), 32),
        tokenizer=words,
        unet=unet,
        scheduler=schedule("PNDMScheduler", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@forked
def sdxl():
    """SDXL: two text encoders (32 + 48 wide; released 768 + 1280), pooled text and time ids, three levels."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    one, two = tokenizer(), tokenizer(pad="!")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=80,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(0.13025, force_upcast=True),
        text_encoder=text_encoder(len(one), 32),
        text_encoder_2=text_encoder(len(two), 48, projection=48, act="gelu"),
        tokenizer=one,
        tokenizer_2=two,
        unet=unet,
        scheduler=schedule("EulerDiscreteScheduler", steps_offset=1),
        add_watermarker=False,
    )


BUILDERS: dict[str, Callable[[int], object]] = {"sdxl": sdxl, "sd15": sd15}
