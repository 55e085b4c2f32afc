"""Released Stable Diffusion pipelines and FaceID adapters that lie on this machine, for `doctor` and `bench`.

Looked for in the folder of weights placed by hand (`anonfw.weights.local_dir`) and in the hub's cache. Nothing is
opened but small JSON files, and nothing is fetched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from anonfw.weights import local_dir

Kind = Literal["sd15", "sdxl"]
TITLES: dict[Kind, str] = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL"}
HUB_IDS: dict[Kind, str] = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
ADAPTERS: dict[Kind, str] = {"sd15": "ip-adapter-faceid_sd15", "sdxl": "ip-adapter-faceid_sdxl"}
ADAPTER_REPOSITORY = "h94/IP-Adapter-FaceID"
RECIPES: dict[Kind, str] = {
    "sd15": "recipes/paper/sd15_adapter.yaml",
    "sdxl": "recipes/paper/reverse_personalization.yaml",
}
TRAINING: dict[Kind, str] = {"sd15": "recipes/paper/sd15_adapter.yaml", "sdxl": "recipes/paper/sdxl_adapter.yaml"}


class Released(NamedTuple):
    """What there is of one base model. pipeline: folder with model_index.json. adapter: released FaceID file."""

    kind: Kind
    pipeline: Path | None
    adapter: Path | None

    def command(self) -> str:
        """What to run now, or what is missing for that."""
        if self.pipeline is None:
            return f"no pipeline: hf download {HUB_IDS[self.kind]}, or place its folder in {local_dir()}"
        source = f"system.backbone.source={self.pipeline}"
        if self.adapter is None:
            return (
                f"no released adapter ({ADAPTER_REPOSITORY}): train one with python -m anonfw fit "
                f"{TRAINING[self.kind]} {source} dataset=FOLDER"
            )
        return f"python -m anonfw anonymize {RECIPES[self.kind]} {source} init={self.adapter} PHOTOGRAPH"


def released() -> list[Released]:
    """One row a base model: the first pipeline and the first adapter that are found, or None."""
    places = list(_folders())
    pipelines: dict[Kind, Path] = {}
    for folder in places:
        if (kind := kind_of(folder)) is not None:
            pipelines.setdefault(kind, folder)
    return [Released(kind, pipelines.get(kind), _adapter(kind, places)) for kind in TITLES]


def kind_of(folder: Path) -> Kind | None:
    """What a folder in diffusers' layout holds, by its U-Net's configuration; None for anything else.

    The U-Net must have its weights as safetensors (a hub cache may hold configurations alone), and 4 channels in and
    out (not an inpainting model); tiny pipelines have other widths.
    """
    if not (folder / "model_index.json").is_file() or not any((folder / "unet").glob("*.safetensors")):
        return None
    try:
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(config, dict) or (config.get("in_channels"), config.get("out_channels")) != (4, 4):
        return None
    layout = config.get("cross_attention_dim"), config.get("addition_embed_type")
    return "sd15" if layout == (768, None) else "sdxl" if layout == (2048, "text_time") else None


def hub_cache() -> Path:
    """Where huggingface_hub keeps snapshots."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def _folders() -> Iterator[Path]:
    """Every folder that could be a pipeline or hold an adapter; the ones placed by hand first."""
    here = local_dir()
    yield here
    for pattern in ("*", "*/*"):
        yield from sorted(path for path in here.glob(pattern) if path.is_dir())
    yield from sorted(path for path in hub_cache().glob("models--*/snapshots/*") if path.is_dir())


def _adapter(kind: Kind, folders: Iterable[Path]) -> Path | None:
    names = [ADAPTERS[kind] + suffix for suffix in (".safetensors", ".bin")]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)
