"""Aligned crops in a folder a person: DCFace after its own conversion, CASIA-WebFace exported to images, and others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from anonfw.data.build import PICTURES
from anonfw.data.card import DataError
from anonfw.data.sources import Source
from anonfw.data.sources.records import natural


class FilePictures:
    """Pictures by their path below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, place: str) -> bytes:
        try:
            return (self.folder / place).read_bytes()
        except OSError as error:
            raise DataError(f"{self.folder / place} cannot be read: {error.strerror}.") from error

    def close(self) -> None:
        """Nothing is kept open."""


def folders(folder: str | Path, name: str) -> Source:
    """FOLDER/PERSON/PHOTO.jpg (or png, webp, bmp), both in natural order. People are called NAME_PERSON.

    Raises:
        DataError: no such folder, or no picture in its sub-folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected {folder}/PERSON/PHOTO.jpg")
    people = sorted((entry.name for entry in os.scandir(folder) if entry.is_dir()), key=natural)
    labels: list[int] = []
    places: list[str] = []
    for number, person in enumerate(people):
        found = [e.name for e in os.scandir(folder / person) if Path(e.name).suffix.lower() in PICTURES]
        labels += [number] * len(found)
        places += [f"{person}/{photo}" for photo in sorted(found, key=natural)]
    if not places:
        raise DataError(f"{folder} has no sub-folder with pictures ({', '.join(PICTURES)}); expected PERSON/PHOTO.jpg")
    return Source(
        FilePictures(folder),
        np.array(labels, np.int64),
        np.array(places, object),
        name_of=lambda label: f"{name}_{people[label]}",
        photo_of=places.__getitem__,
        about={"images": len(places), "labels": len(set(labels))},
    )
