"""ONNX file -> torch module for any batch, through onnx2torch, after the graph has been tidied.

Exports spell out what torch has one kernel for (a layer norm is nine nodes), hold the batch size in constants, and pass
shapes as tensors, which on a GPU costs a synchronisation each. The patterns below are put back together first. Every
rewrite is exact in real arithmetic; parity with onnxruntime is tested.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx
    from torch import fx

DOMAIN = "anonfw"
COMMUTATIVE = {"Add", "Mul"}

# (our operation, the tree that it replaces, what its inputs are). In a tree, lower-case words stand for any value,
# capitals for a constant, numbers for themselves; `Op[-1]` is an Op over the last axis.
_MEAN = ("ReduceMean[-1]", "x")
_CENTRED = ("Sub", "x", _MEAN)
_VARIANCE = ("ReduceMean[-1]", ("Pow", _CENTRED, 2.0))
PATTERNS: list[tuple[str, tuple, list[str]]] = [
    (
        "LayerNorm",
        ("Add", ("Mul", ("Div", _CENTRED, ("Sqrt", ("Add", _VARIANCE, "EPSILON"))), "WEIGHT"), "BIAS"),
        ["x", "WEIGHT", "BIAS", "EPSILON"],
    ),
    ("Gelu", ("Mul", ("Mul", "x", ("Add", ("Erf", ("Div", "x", 2.0**0.5)), 1.0)), 0.5), ["x"]),
    ("Normalize", ("Div", "x", ("Expand", ("Clip", ("ReduceL2[-1]", "x"), "EPSILON"), "SHAPE")), ["x", "EPSILON"]),
    ("Linear", ("Add", ("MatMul", "x", "WEIGHT"), "BIAS"), ["x", "WEIGHT", "BIAS"]),
    ("Linear", ("MatMul", "x", "WEIGHT"), ["x", "WEIGHT"]),
    ("PReLU", ("PRelu", "x", "SLOPE"), ["x", "SLOPE"]),
    ("Reshape", ("Reshape", "x", "SHAPE"), ["x", "SHAPE"]),
    ("Slice", ("Slice", "x", "START", "END", "AXIS"), ["x", "START", "END", "AXIS"]),
]


def convert(file: Path) -> tuple[fx.GraphModule, int, int]:
    """(module, pixels S of its input, width D of its output) of a recogniser's ONNX file.

    Raises:
        ValueError: the graph is not one (B,3,S,S) input and one (B,D) output.
    """
    import onnx
    import onnx2torch

    _register()
    model = onnx.load(str(file))
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    shape = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if inputs else []
    if len(inputs) != 1 or len(model.graph.output) != 1 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"{file}: not a recogniser's graph: wanted one (B,3,S,S) input and one output, got {shape}")
    size = shape[2] or 112  # a free size is insightface's 112
    tidy(model)
    module = onnx2torch.convert(model).eval().requires_grad_(False)
    with torch.no_grad():
        output = module(torch.zeros(2, 3, size, size))
    if output.ndim != 2 or output.shape[0] != 2:
        raise ValueError(f"{file}: a batch of 2 gives {tuple(output.shape)} instead of (2,D)")
    return module, size, output.shape[1]


def early_and_late(module: fx.GraphModule, size: int) -> tuple[nn.Module, nn.Module]:
    """Cut a converted graph in two behind its early feature map; `late(early(images))` is the graph.

    The map is the last (C,h,h) value of the first resolution below the input's that alone carries everything on: in a
    residual network the end of a stage.

    Raises:
        ValueError: no such value; the graph has no convolutional stage.
    """
    from torch import fx
    from torch.fx.passes.shape_prop import ShapeProp

    with torch.no_grad():
        ShapeProp(module).propagate(torch.zeros(2, 3, size, size))
    nodes = [node for node in module.graph.nodes if node.op != "get_attr"]  # constants are ready at any time
    place = {node: index for index, node in enumerate(nodes)}
    reach, cuts = 0, []
    for index, node in enumerate(nodes):
        shape = getattr(node.meta.get("tensor_meta"), "shape", ())
        if index >= reach and len(shape) == 4 and shape[2] == shape[3] < size:
            cuts.append((shape[2], index))
        reach = max([reach, *(place[user] for user in node.users)])
    if not cuts:
        raise ValueError("the graph has no early feature map: no value of 4 dimensions that everything after needs")
    cut = max(index for side, index in cuts if side == cuts[0][0])

    def part(first: int, last: int) -> nn.Module:
        graph = fx.Graph()
        copies = {nodes[first]: graph.placeholder("x")}
        for node in nodes[first + 1 : last + 1]:
            for constant in node.all_input_nodes:
                if constant.op == "get_attr" and constant not in copies:
                    copies[constant] = graph.node_copy(constant)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if nodes[last].op != "output":
            graph.output(copies[nodes[last]])
        return fx.GraphModule(module, graph)

    return part(0, cut), part(cut, len(nodes) - 1)


def takes_raw_pixels(file: Path) -> bool:
    """Whether the graph normalises by itself and so wants 0..255 (insightface's own test: Sub and Mul up front)."""
    import onnx

    first = {node.op_type for node in onnx.load(str(file), load_external_data=False).graph.node[:8]}
    return {"Sub", "Mul"} <= first


def tidy(model: onnx.ModelProto) -> None:
    """Replace PATTERNS in place by operations of our domain, and drop what nothing needs any more."""
    import onnx

    graph = model.graph
    for node in graph.node:
        while node.input and not node.input[-1]:
            node.input.pop()  # an optional input left out by an empty name: onnx2torch wants it left out by position
    matcher = _Matcher(graph)
    for operation, pattern, wanted in PATTERNS:
        for index, node in enumerate(graph.node):
            found: dict[str, str] = {}
            if node.domain == DOMAIN or not matcher.match(pattern, node.output[0], found):
                continue
            if not _applies(operation, found, matcher.constants):
                continue
            inputs = [found[name] for name in wanted]
            new = onnx.helper.make_node(operation, inputs, [node.output[0]], name=node.name, domain=DOMAIN)
            graph.node[index].CopyFrom(new)
            matcher.producer[node.output[0]] = graph.node[index]
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    needed = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):  # a consumer always comes after its producer
        if needed.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            needed.update(node.input)


def _applies(operation: str, found: dict[str, str], constants: dict[str, np.ndarray]) -> bool:
    value = {name: constants[found[name]] for name in found if name.isupper()}
    if operation == "Linear":
        return value["WEIGHT"].ndim == 2 and ("BIAS" not in value or value["BIAS"].shape == value["WEIGHT"].shape[1:])
    if operation == "LayerNorm":
        return value["WEIGHT"].ndim == 1 and value["WEIGHT"].shape == value["BIAS"].shape
    if operation == "PReLU":
        return value["SLOPE"].ndim == 3 and value["SLOPE"].shape[1:] == (1, 1)
    if operation == "Reshape":  # a leading 1 is the batch that it was exported with
        return value["SHAPE"].size > 1 and value["SHAPE"][0] == 1 and 0 not in value["SHAPE"]
    if operation == "Slice":
        return value["AXIS"].size == 1 and int(value["START"][0]) >= 0 and int(value["END"][0]) > int(value["START"][0])
    return True


class _Matcher:
    def __init__(self, graph: onnx.GraphProto) -> None:
        import onnx

        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.producer = {name: node for node in graph.node for name in node.output}

    def match(self, pattern: Any, value: str, found: dict[str, str]) -> bool:
        """Whether the tree that computes `value` is `pattern`; `found` gets what its words stand for."""
        if isinstance(pattern, float):
            return value in self.constants and self.constants[value].size == 1 and self._scalar(value, pattern)
        if isinstance(pattern, str):
            if pattern.isupper() and value not in self.constants:
                return False
            return found.setdefault(pattern, value) == value
        operation, *inputs = pattern
        operation, last, _ = operation.partition("[")
        node = self.producer.get(value)
        if node is None or node.op_type != operation or node.domain or len(node.input) != len(inputs):
            return False
        if last and [list(a.ints) for a in node.attribute if a.name == "axes"] != [[-1]]:
            return False
        orders = itertools.permutations(node.input) if operation in COMMUTATIVE else [node.input]
        for order in orders:
            trial = dict(found)
            if all(self.match(part, name, trial) for part, name in zip(inputs, order, strict=True)):
                found.update(trial)
                return True
        return False

    def _scalar(self, value: str, wanted: float) -> bool:
        return bool(np.isclose(float(self.constants[value].reshape(())), wanted, rtol=1e-5))


class _FrozenPReLU(torch.autograd.Function):
    """PReLU whose slope takes no gradient: torch computes that one too, and most of its backward time goes there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, slope = ctx.saved_tensors
        passed = torch.ops.aten.threshold_backward(gradient, x, 0)  # ReLU's; `where` is not vectorised on a CPU
        return torch.lerp(passed, gradient, slope[:, None, None]), None


class PReLU(nn.Module):
    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.register_buffer("slope", slope)

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenPReLU.apply(x, self.slope.to(x.dtype))


class Normalize(nn.Module):
    """Unit length along the last axis."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=self.epsilon)


class Reshape(nn.Module):
    """Everything but the batch gets another shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)


class Slice(nn.Module):
    def __init__(self, start: int, end: int, axis: int) -> None:
        super().__init__()
        self.start, self.end, self.axis = start, end, axis

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, self.start, min(self.end, x.shape[self.axis]) - self.start)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None)
    layer.weight.data = weight.T.contiguous()
    if bias is not None:
        layer.bias.data = bias
    return layer


def _layer_norm(weight: Tensor, bias: Tensor, epsilon: Tensor) -> nn.LayerNorm:
    layer = nn.LayerNorm(len(weight), eps=float(epsilon))
    layer.weight.data, layer.bias.data = weight, bias
    return layer


# Our operations: the constants after `x`, in the order of PATTERNS, to a module of one argument.
MODULES = {
    "LayerNorm": _layer_norm,
    "Linear": _linear,
    "PReLU": lambda slope: PReLU(slope.reshape(-1)),
    "Gelu": nn.GELU,
    "Normalize": lambda epsilon: Normalize(float(epsilon)),
    "Reshape": lambda shape: Reshape(tuple(shape[1:].tolist())),
    "Slice": lambda start, end, axis: Slice(int(start), int(end), int(axis)),
}


@cache
def _register() -> None:
    """Teach onnx2torch our operations, once a process."""
    from onnx2torch.node_converters.registry import add_converter
    from onnx2torch.utils.common import OnnxMapping, OperationConverterResult

    def converter(node, graph):
        x, *constants = node.input_values
        module = MODULES[node.operation_type](*(graph.initializers[name].to_torch() for name in constants))
        return OperationConverterResult(module, OnnxMapping(inputs=(x,), outputs=tuple(node.output_values)))

    for operation in MODULES:
        add_converter(operation, version=1, domain=DOMAIN)(converter)
