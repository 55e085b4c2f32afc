"""The recognisers: the same numbers as onnxruntime gives, for any batch, with gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anonfw import align, weights
from anonfw.batch import FaceBatch
from anonfw.identity import ArcFace, EdgeFace, Recognizer, embed_aligned
from anonfw.identity.onnx_graph import _FrozenPReLU, convert, takes_raw_pixels, tidy

ENCODERS = {"arcface_mbf": ArcFace, "edgeface_s": EdgeFace}


def pictures(count: int, size: int = 112, seed: int = 0) -> Tensor:
    """(count,3,size,size) smooth colour fields in [-1,1], with the spectrum of a picture rather than of noise."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(count, 3, side, side, generator=generator) / side**0.5 for side in (4, 8, 16, 32, 64)]
    mixed = sum(F.interpolate(layer, (size, size), mode="bilinear", align_corners=False) for layer in layers)
    return (mixed / mixed.abs().amax(dim=(1, 2, 3), keepdim=True)).detach()


@pytest.fixture(scope="module", params=list(ENCODERS))
def encoder(request) -> Recognizer:
    return ENCODERS[request.param]()


def test_the_contract(encoder):
    row = weights.weight(encoder.name)
    assert isinstance(encoder, Recognizer)
    assert (encoder.dim, encoder.size, encoder.window, encoder.colour) == (512, 112, (0, 0, 112), "RGB")
    assert (encoder.licence, encoder.sha256) == (row.licence, row.sha256)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.train()
    assert not any(module.training for module in encoder.modules())


def test_parity_with_onnxruntime(encoder):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(weights.path(encoder.name)), options, ["CPUExecutionProvider"])
    images = pictures(6)
    name = session.get_inputs()[0].name
    reference = np.concatenate([session.run(None, {name: image[None].numpy()})[0] for image in images])
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    with torch.no_grad():
        np.testing.assert_allclose(encoder(images).numpy(), reference, atol=1e-5, rtol=0)


def test_unit_norm_and_any_batch(encoder):
    images = pictures(35)  # more than are computed at a time
    with torch.no_grad():
        together = encoder(images)
        alone = torch.cat([encoder(image[None]) for image in images])
        assert encoder(images[:0]).shape == (0, encoder.dim)
    assert together.shape == (35, encoder.dim) and together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(35), atol=1e-6, rtol=0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (together @ together.T - torch.eye(35)).abs().amax() > 0.01  # different pictures, different embeddings


def test_gradients_are_those_of_the_function(encoder):
    """The derivative along the gradient, in double precision, against a central difference; and no sample leaks."""
    double = ENCODERS[encoder.name]().double()
    images = pictures(3).double().requires_grad_()
    target = F.normalize(
        torch.randn(encoder.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=0
    )
    (gradient,) = torch.autograd.grad((double(images)[0] * target).sum(), images)
    assert gradient.isfinite().all() and gradient[0].abs().amax() > 0
    assert not gradient[1:].any()
    step = 1e-6 * gradient[:1] / gradient.norm()
    with torch.no_grad():
        ahead, behind = ((double(images[:1] + sign * step)[0] * target).sum() for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / 2e-6, gradient.norm(), rtol=1e-4, atol=0)


def test_half_precision_autocast_stays_close(encoder):
    images = pictures(4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = encoder(images)
    assert embeddings.dtype == torch.float32
    assert F.cosine_similarity(embeddings, encoder(images)).min() > 0.98
    (gradient,) = torch.autograd.grad(embeddings.sum(), images)
    assert gradient.isfinite().all()


def test_wrong_inputs_are_named(encoder):
    with pytest.raises(ValueError, match=rf"{encoder.name} takes \(B,3,112,112\).*\(2, 3, 128, 128\)"):
        encoder(pictures(2, 128))
    with pytest.raises(ValueError, match=r"uint8.*FaceBatch\.pixels"):
        encoder(torch.zeros(2, 3, 112, 112, dtype=torch.uint8))
    with pytest.raises(ValueError, match="divide by"):
        encoder((pictures(2) + 1) * 127.5)
    with pytest.raises(ValueError):
        encoder(pictures(1)[0])
    encoder(pictures(1) * 3)  # an unclamped prediction is welcome


@pytest.mark.parametrize("size", [112, 128])
def test_embed_aligned_crops_first(encoder, size):
    images = pictures(2, size).requires_grad_()
    embeddings = embed_aligned(encoder, images, "portrait")
    torch.testing.assert_close(embeddings, encoder(align.window_to_arcface(images, "portrait", 112)))
    (gradient,) = torch.autograd.grad(embeddings.sum(), images)
    x, _, side = align.arcface_window(size)
    assert gradient[..., size // 2].any() and not gradient[..., int(x + side) + 2 :].any()
    with pytest.raises(ValueError, match="unknown alignment"):
        embed_aligned(encoder, images, "passport")


def test_pixels_of_a_batch_are_what_a_recogniser_takes(encoder):
    image = ((pictures(2) + 1) * 127.5).round().to(torch.uint8)
    batch = FaceBatch(image, torch.zeros(2), torch.zeros(2), ["a", "b"], torch.zeros(2, 5, 2))
    with torch.no_grad():
        assert F.cosine_similarity(encoder(batch.pixels()), encoder(pictures(2))).min() > 0.99


def test_a_path_serves_as_well_as_a_name():
    file = weights.path("arcface_mbf")
    encoder = ArcFace(file)
    assert (encoder.name, encoder.licence) == ("w600k_mbf", "not stated")
    assert encoder.sha256 == weights.weight("arcface_mbf").sha256
    with torch.no_grad():
        torch.testing.assert_close(encoder(pictures(2)), ArcFace()(pictures(2)))
    with pytest.raises(weights.WeightsError, match="neither a file nor a name"):
        ArcFace("arcface_r5O")


def test_the_exported_graph_is_put_back_together():
    model = onnx.load(str(weights.path("edgeface_s")))
    tidy(model)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("LayerNorm"), kinds.count("Gelu"), kinds.count("Normalize")) == (26, 18, 6)
    left = {"ReduceMean", "Pow", "Erf", "ReduceL2", "Expand", "Clip", "Sqrt"} & set(kinds)
    assert not left
    assert not {node.op_type for node in model.graph.node if not node.domain} & {"Reshape", "Slice"}


def test_frozen_prelu_is_prelu():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64).requires_grad_()
    slope = torch.tensor([0.25, -0.5, 0.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close(_FrozenPReLU.apply(x, slope), F.prelu(x, slope))
    assert torch.autograd.gradcheck(lambda value: _FrozenPReLU.apply(value, slope), x)
    assert torch.autograd.gradgradcheck(lambda value: _FrozenPReLU.apply(value, slope), x)


def small_graph(file: Path, raw: bool, outputs: int = 7) -> Path:
    """A recogniser of two layers; `raw`: one that normalises 0..255 by itself, as insightface's oldest do."""
    numbers = np.random.default_rng(3)
    constants = {
        "kernel": numbers.standard_normal((4, 3, 3, 3)),
        "matrix": numbers.standard_normal((outputs, 4 * 6 * 6)),
        "half": np.array(127.5),
        "scale": np.array(1 / 127.5),
    }
    node = onnx.helper.make_node
    head = [node("Sub", ["x", "half"], ["centred"]), node("Mul", ["centred", "scale"], ["scaled"])] if raw else []
    nodes = [
        *head,
        node("Conv", ["scaled" if raw else "x", "kernel"], ["features"]),
        node("Flatten", ["features"], ["flat"]),
        node("Gemm", ["flat", "matrix"], ["embedding"], transB=1),
    ]
    real = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "small",
        [onnx.helper.make_tensor_value_info("x", real, ["B", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("embedding", real, ["B", outputs])],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), str(file))
    return file


def test_a_graph_that_wants_raw_pixels_gets_them(tmp_path):
    plain = small_graph(tmp_path / "plain.onnx", raw=False)
    raw = small_graph(tmp_path / "raw.onnx", raw=True)
    assert takes_raw_pixels(raw) and not takes_raw_pixels(plain)
    images = pictures(3, 8)
    first, second = ArcFace(plain), ArcFace(str(raw))
    assert (first.size, first.dim, second.name) == (8, 7, "raw")
    torch.testing.assert_close(first(images), second(images), atol=1e-5, rtol=0)


def test_a_graph_of_something_else_is_refused():
    with pytest.raises(ValueError, match="not a recogniser's graph"):
        convert(weights.path("scrfd_500m"))
