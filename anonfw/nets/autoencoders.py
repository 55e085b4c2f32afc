"""Frozen autoencoders by the name that `embed --latents` and recipes use: a base's, a pipeline's, or TAESD (MIT)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from anonfw.data.files import cache_folder
from anonfw.errors import AnonfwError
from anonfw.nets import backbone
from anonfw.nets.codec import Autoencoder, Dtype

ROWS = ("taesd", "taesdxl")


def autoencoder(source: str = "face_model", revision: str | None = None, dtype: Dtype = "fp32") -> Autoencoder:
    """The frozen autoencoder, for recipes: (B,3,H,H) in [-1,1] <-> (B,c,H/8,H/8), times its scaling factor.

    Args:
        source, revision: as in `autoencoder_folder`. dtype: precision that it is run in.
    Raises:
        AnonfwError: there is none, or its folder is no autoencoder's.
    """
    folder = autoencoder_folder(source, revision)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise AnonfwError(f"{folder} is no autoencoder in diffusers' layout ({error})") from error
    return Autoencoder(str(folder), kind=kind, dtype=dtype)


def autoencoder_folder(source: str, revision: str | None = None) -> Path:
    """The folder, in diffusers' layout, of the autoencoder `source`.

    Args:
        source: a base of the package (`face_model` has TAESD inside), `taesd` or `taesdxl` of the weights table, a
            pipeline's folder or hub id, or an autoencoder's own folder. revision: commit of a hub id.
    Raises:
        AnonfwError: there is none.
    """
    if source in ROWS:
        return _taesd_folder(source)
    folder = backbone.find(source, revision)
    return folder / "vae" if (folder / "vae").is_dir() else folder


def _taesd_folder(name: str) -> Path:
    """The rows NAME_encoder and NAME_decoder of the weights table, written into the cache on first use."""
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
