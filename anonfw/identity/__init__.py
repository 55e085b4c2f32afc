"""Face recognisers: aligned crops to unit-norm embeddings. One file a recogniser."""

from anonfw.identity.arcface import ArcFace
from anonfw.identity.base import Recognizer, embed_aligned
from anonfw.identity.edgeface import EdgeFace

__all__ = ["ArcFace", "EdgeFace", "Recognizer", "embed_aligned"]
