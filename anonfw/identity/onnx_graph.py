"""ONNX file -> torch module that takes any batch."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def convert(file: Path) -> tuple[nn.Module, int, int]:
    """(module, input pixels S, output width D) of an ONNX file with one (B,3,S,S) input and one (B,D) output."""
    import onnx
    from onnx2torch import convert as to_torch

    model = onnx.load(str(file))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        while node.input and not node.input[-1]:
            node.input.pop()  # an optional input left out by name: onnx2torch wants it left out by position
        if node.op_type == "Reshape" and node.input[1] in constants:
            tensor = constants[node.input[1]]
            shape = onnx.numpy_helper.to_array(tensor).copy()
            if shape.size > 1 and shape[0] == 1:
                shape[0] = 0  # in ONNX: as in the input
                tensor.CopyFrom(onnx.numpy_helper.from_array(shape, tensor.name))
    size = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    dim = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    return to_torch(model).eval(), size, dim
