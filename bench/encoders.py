"""Speed of the recognisers: `python bench/encoders.py [NAME ...]`.

Images a second, and images a second of one core (which hardly depends on what else runs), forward and with the
gradient in the images. Without the released weights of FaRL and AdaFace, their networks with drawn ones: as fast.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from anonfw.identity import AdaFace, FaRL, Recognizer, open_recognizer
from anonfw.identity.adaface import STAGES, ImprovedResNet
from anonfw.identity.farl import empty_tower

NAMES = ("arcface_mbf", "edgeface_s", "facenet_vggface2", "farl", "adaface_ir50", "adaface_ir101")


def opened(name: str, folder: Path) -> Recognizer:
    """The recogniser, with drawn weights for the names that are not in the weights table."""
    file = folder / f"{name}.ckpt"
    if name == "farl":
        torch.save({"state_dict": {f"visual.{key}": value for key, value in empty_tower().state_dict().items()}}, file)
        return FaRL(file)
    if name in ("adaface_ir50", "adaface_ir101"):
        with torch.random.fork_rng(devices=[]):
            net = ImprovedResNet(STAGES[name.partition("_")[2].upper().replace("IR", "IR-")])
        torch.save({"state_dict": {f"model.{key}": value for key, value in net.state_dict().items()}}, file)
        return AdaFace(file)
    return open_recognizer(name)


def measure(encoder: Recognizer, batch: int, seconds: float, gradient: bool) -> tuple[float, float]:
    """(images a second, images a second of one core)."""
    images = torch.rand(batch, 3, encoder.size, encoder.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images.requires_grad_(gradient)

    def once() -> None:
        with torch.set_grad_enabled(gradient):
            embedding = encoder(images)
            if gradient:
                torch.autograd.grad(embedding.sum(), images)

    once()
    start, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        once()
        count += batch
    return count / (time.perf_counter() - start), count / (time.process_time() - used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number (default 10)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'':<18} {'images/s':>9} {'a core':>8}   with gradient: {'images/s':>9} {'a core':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names:
            encoder = opened(name, Path(folder))
            plain = measure(encoder, args.batch, args.seconds, False)
            back = measure(encoder, args.batch, args.seconds, True)
            print(
                f"{name:<18} {plain[0]:>9.1f} {plain[1]:>8.1f}   {'':<14} {back[0]:>9.1f} {back[1]:>8.1f}", flush=True
            )


if __name__ == "__main__":
    main()
