"""DCFace's id images: the picture of each synthetic person from which the others were made.

The release repeats it ("oversampled") among a person's pictures and does not name it. So by default the picture that
occurs several times, byte for byte, is the id image. It gets the factor `id_image` 1, the person's others 0; where no
picture is repeated nothing is known, and there is no such factor.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from anonfw.data.sources import Verdict

COPY = "a copy of another picture of this person"


def mark(
    photos: Sequence[str], pictures: Sequence[bytes], id_image: str | None = None, keep_copies: bool = False
) -> list[Verdict]:
    """The verdict on each picture of one person.

    Args:
        photos: paths or names of the pictures.
        pictures: their encoded bytes.
        id_image: regular expression that finds the names of id images; None goes by repetition.
        keep_copies: copies are samples too, marked like the picture that they repeat.
    """
    hashes = [hashlib.sha256(picture).digest() for picture in pictures]
    if id_image is None:
        most, times = Counter(hashes).most_common(1)[0]  # the first one of equals
        marked = {most} if times > 1 else set()
    else:
        marked = {digest for photo, digest in zip(photos, hashes, strict=True) if re.search(id_image, photo)}
    seen: set[bytes] = set()
    verdicts: list[Verdict] = []
    for digest in hashes:
        copy = digest in seen and not keep_copies
        seen.add(digest)
        factors = {"id_image": float(digest in marked)} if marked else {}
        verdicts.append(COPY if copy else factors)
    return verdicts
