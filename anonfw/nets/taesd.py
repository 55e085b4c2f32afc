"""TAESD, the tiny autoencoder for Stable Diffusion's latents (MIT): from the weights table into diffusers' layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from anonfw.data.files import cache_folder
from anonfw.nets.codec import Autoencoder, Dtype


def taesd(name: str = "taesd", dtype: Dtype = "fp32") -> Autoencoder:
    """The frozen autoencoder, for recipes: (B,3,H,H) in [-1,1] <-> (B,4,H/8,H/8) of about unit variance.

    Args:
        name: `taesd` (SD 1.5's latents) or `taesdxl` (SDXL's): the rows NAME_encoder and NAME_decoder.
        dtype: precision that it is run in.
    Raises:
        AnonfwError: the rows' files are not there and cannot be fetched.
    """
    return Autoencoder(str(taesd_folder(name)), kind="AutoencoderTiny", dtype=dtype)


def taesd_folder(name: str = "taesd") -> Path:
    """The autoencoder in diffusers' layout, written into the cache on first use."""
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    from anonfw import weights

    rows = [weights.table()[f"{name}_{half}"] for half in ("encoder", "decoder")]
    folder = cache_folder() / "autoencoders" / f"{name}_{rows[0].sha256[:8]}_{rows[1].sha256[:8]}"
    if folder.exists():
        return folder
    vae = AutoencoderTiny()
    encoder, decoder = (load_file(weights.path(f"{name}_{half}")) for half in ("encoder", "decoder"))
    # The released files number the layers of a Sequential. The decoder's begins with a clamp; diffusers has it outside.
    vae.encoder.load_state_dict({f"layers.{key}": value for key, value in encoder.items()})
    vae.decoder.load_state_dict({f"layers.{_one_less(key)}": value for key, value in decoder.items()})
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        vae.save_pretrained(partial, safe_serialization=True)
        os.rename(partial, folder)
    except OSError:
        if not (folder / "config.json").exists():  # else another process was faster, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _one_less(key: str) -> str:
    number, _, rest = key.partition(".")
    return f"{int(number) - 1}.{rest}"
