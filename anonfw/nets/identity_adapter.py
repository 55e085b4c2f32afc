"""IP-Adapter-FaceID on a frozen U-Net: what is trained, and the released files' layout of it.

    tokens = LayerNorm(reshape(MLP(e)))                 (N,D), for the zero vector as well: the null identity is trained
    each cross-attention layer adds scale * Attn(Q, K_id tokens, V_id tokens)      (`anonfw.nets.attention.DecoupledKV`)
    optionally LoRA on to_q, to_k, to_v and to_out of every self- and cross-attention layer        (peft, alpha = rank)

The released layout has two groups of names, in which a layer is its index in the order of `unet.attn_processors`:

    image_proj.proj.0 / proj.2 / norm       the MLP and its LayerNorm
    ip_adapter.I.to_k_ip / to_v_ip          K_id and V_id of the cross-attention layer I (the odd ones)
    ip_adapter.I.to_{q,k,v,out}_lora.down / .up        of every layer I, where there is LoRA
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anonfw.errors import AnonfwError
from anonfw.nets.attention import DecoupledKV, install

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_PROJECTION = {"ff.net.0.proj": "proj.0", "ff.net.2": "proj.2", "norm": "norm"}


def identity_projection(dim: int, token_width: int, tokens: int = 4, widening: int = 2) -> nn.Module:
    """(B,dim) -> (B,N,D): Linear(dim, widening dim), GELU, Linear(.., N D), LayerNorm(D).

    It is the module that diffusers itself loads a FaceID adapter into.
    """
    from diffusers.models.embeddings import IPAdapterFaceIDImageProjection

    return IPAdapterFaceIDImageProjection(
        image_embed_dim=dim, cross_attention_dim=token_width, mult=widening, num_tokens=tokens
    )


def add_identity(unet: nn.Module, lora_rank: int = 0) -> None:
    """Freezes `unet` and gives it what is trained: `DecoupledKV` in each cross-attention layer, and LoRA.

    Args:
        lora_rank: the released FaceID adapters have 128; 0 is none.
    Raises:
        AnonfwError: a U-Net without cross-attention.
    """
    width = unet.config.cross_attention_dim
    unet.requires_grad_(False)

    def decoupled(attn) -> DecoupledKV:
        processor = DecoupledKV(attn.to_q.in_features, width)
        processor.start_from(attn)
        return processor

    install(unet, decoupled)
    if not any(isinstance(processor, DecoupledKV) for processor in unet.attn_processors.values()):
        raise AnonfwError("this U-Net has no cross-attention: an identity adapter has nothing to sit in")
    if lora_rank:
        from peft import LoraConfig

        unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(LORA_TARGETS)))
    for processor in unet.attn_processors.values():
        if isinstance(processor, DecoupledKV):
            processor.requires_grad_(True)  # after LoRA: peft freezes whatever else is in the U-Net


def names_of(unet: nn.Module) -> dict[str, str]:
    """Released name -> name of the parameter inside the U-Net, of all that `add_identity` has put there."""
    parameters = dict(unet.named_parameters())
    names = {}
    for index, processor in enumerate(unet.attn_processors):
        layer = processor.removesuffix(".processor")
        pairs = {"to_k_ip": f"{processor}.identity_k", "to_v_ip": f"{processor}.identity_v"}
        for target in LORA_TARGETS:
            for side, part in (("down", "lora_A"), ("up", "lora_B")):
                pairs[f"{target.removesuffix('.0')}_lora.{side}"] = f"{layer}.{target}.{part}.default"
        names |= {
            f"ip_adapter.{index}.{theirs}.weight": f"{ours}.weight"
            for theirs, ours in pairs.items()
            if f"{ours}.weight" in parameters
        }
    return names


def released_state(projection: nn.Module, unet: nn.Module) -> dict[str, Tensor]:
    """The trained parameters under the released names."""
    state = {_released(name): value.detach() for name, value in projection.state_dict().items()}
    parameters = dict(unet.named_parameters())
    return state | {theirs: parameters[ours].detach() for theirs, ours in names_of(unet).items()}


def is_released(names: Mapping[str, object]) -> bool:
    """Whether these are the names of a released adapter."""
    return any(name.startswith(("image_proj.", "ip_adapter.")) for name in names)


def from_released(state: Mapping[str, Tensor], projection: nn.Module, unet: nn.Module) -> dict[str, dict[str, Tensor]]:
    """{"projection": ..., "unet": ...}: a released file's tensors by our names.

    Raises:
        AnonfwError: another kind of adapter, another width, number of tokens, layer order or LoRA rank than built here.
    """
    ours = {name: value.shape for name, value in released_state(projection, unet).items()}
    if "image_proj.norm.weight" not in state or "image_proj.proj.0.weight" not in state:
        kind = "a FaceID-Plus adapter" if any("perceiver" in name for name in state) else "an adapter for CLIP images"
        raise AnonfwError(f"this is {kind}, not a FaceID one: its image_proj is no MLP on an identity embedding")
    _same_projection(state, ours)
    lora = {"file": _rank(state), "recipe": _rank(ours)}
    if lora["file"] != lora["recipe"]:
        raise AnonfwError(f"the adapter has LoRA of rank {lora['file']}, the recipe {lora['recipe']}: set lora_rank")
    if state.keys() != ours.keys():
        layers = {len({name.split(".")[1] for name in names if "_ip." in name}) for names in (state, ours)}
        odd = sorted(state.keys() ^ ours.keys())
        raise AnonfwError(
            f"the adapter is of another U-Net: {len(odd)} names differ, the first is {odd[0]} "
            f"(layers with an identity attention: {', '.join(map(str, sorted(layers)))})"
        )
    for name in sorted(ours, key=_index):
        if state[name].shape != ours[name]:
            raise AnonfwError(
                f"the adapter's {name} is {tuple(state[name].shape)} and this U-Net's layer needs {tuple(ours[name])}: "
                "an adapter of another base model, or with its layers in another order (that of unet.attn_processors)"
            )
    inside = names_of(unet)
    return {
        "projection": {name: state[_released(name)] for name in projection.state_dict()},
        "unet": {ours: state[theirs] for theirs, ours in inside.items()},
    }


def _released(name: str) -> str:
    """Name inside the projection -> released name."""
    stem, _, leaf = name.rpartition(".")
    return f"image_proj.{_PROJECTION[stem]}.{leaf}"


def _same_projection(state: Mapping[str, Tensor], ours: Mapping[str, torch.Size]) -> None:
    def sizes(shape_of) -> tuple[int, int, int]:
        width = shape_of("image_proj.norm.weight")[0]
        return shape_of("image_proj.proj.0.weight")[1], width, shape_of("image_proj.proj.2.weight")[0] // width

    theirs, mine = sizes(lambda name: state[name].shape), sizes(lambda name: ours[name])
    if theirs != mine:
        said = "embeddings of width {}, tokens of width {}, {} tokens"
        raise AnonfwError(
            f"the adapter is for {said.format(*theirs)}; this recipe has {said.format(*mine)}: take the adapter of "
            "this base model (SD 1.5: 768, SDXL: 2048), and set identity and identity_tokens to its"
        )


def _rank(state: Mapping[str, Tensor | torch.Size]) -> int:
    for name, value in state.items():
        if name.endswith("_lora.down.weight"):
            return (value.shape if isinstance(value, Tensor) else value)[0]
    return 0


def _index(name: str) -> tuple[str, int, str]:
    group, index, rest = name.split(".", 2)
    return (group, int(index), rest) if index.isdecimal() else (group, -1, rest)
