"""Released torch checkpoints, read without running what they hold besides numbers."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from anonfw.weights import WeightsError

# What torch and safetensors raise for damaged files: their readers check the structure as they go, or not.
UNREADABLE = (
    pickle.UnpicklingError, SafetensorError, struct.error, zipfile.BadZipFile, RuntimeError, ValueError, EOFError,
    OSError, LookupError, TypeError, AttributeError, AssertionError,
)  # fmt: skip


class _Unread:
    """Stands where a checkpoint holds an object of another library: callbacks, hyperparameters, a name space."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_state(file: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's `state_dict` (or of one that is nothing but it) whose names begin with `prefix`,
    without it.

    Objects that are not tensors are neither imported nor built: training frameworks leave them in their checkpoints.

    Raises:
        WeightsError: not a checkpoint of torch, or nothing in it has that prefix.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(file)
        else:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipfile.is_zipfile(file) else []
            with torch.serialization.safe_globals([(_Unread, name) for name in names]):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{file} is not a checkpoint that can be read safely: {reason}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    found = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if isinstance(name, str) and name.startswith(prefix) and isinstance(value, Tensor)
    }
    if not found:
        raise WeightsError(f"{file} has no tensors named {prefix!r}...: it is another network's checkpoint")
    return found


def load_state(net: nn.Module, state: dict[str, Tensor], file: Path, what: str) -> None:
    """Fill `net` with `state`: every name and shape must be right.

    Raises:
        WeightsError: they are not; the message has the first differences.
    """
    own = net.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is not one of its layers" for name in state if name not in own]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise WeightsError(f"{file} is not {what}: {'; '.join(wrong[:3])}{more}")
    net.load_state_dict(state)
