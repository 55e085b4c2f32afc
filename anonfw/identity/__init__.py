"""Face recognisers: aligned crops to unit-norm embeddings. One file a recogniser."""

from anonfw.errors import AnonfwError
from anonfw.identity.adaface import AdaFace
from anonfw.identity.arcface import ArcFace
from anonfw.identity.base import Recognizer, embed_aligned
from anonfw.identity.edgeface import EdgeFace
from anonfw.identity.facenet import FaceNet
from anonfw.identity.farl import FaRL

__all__ = ["AdaFace", "ArcFace", "EdgeFace", "FaRL", "FaceNet", "Recognizer", "embed_aligned", "open_recognizer"]

FAMILIES = {"adaface": AdaFace, "arcface": ArcFace, "edgeface": EdgeFace, "facenet": FaceNet, "farl": FaRL}


def open_recognizer(name: str) -> Recognizer:
    """The recogniser of a row of the weights table: `arcface_mbf` is `ArcFace(weights="arcface_mbf")`.

    Raises:
        AnonfwError: no recogniser is called like the part of the name before its first `_`.
        WeightsError: its weights cannot be had.
    """
    family = FAMILIES.get(name.partition("_")[0].lower())
    if family is None:
        raise AnonfwError(f"no recogniser for {name!r}: its name must begin with {' or '.join(sorted(FAMILIES))}.")
    return family(name)
