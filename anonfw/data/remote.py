"""Data sets that lie elsewhere: copied into the cache by webdataset, checked by hash, then read as local ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from anonfw.data.card import CARD_NAME, Card, DataError, Shard
from anonfw.data.embeddings import read_record, sidecar_path, sidecar_record_path
from anonfw.data.files import cache_folder, sha256_of
from anonfw.data.index import Index, index_path
from anonfw.data.table import local_folder

ADDRESS = re.compile(r"(https?|s3|gs|pipe):")


def open_folder(dataset: str | Path, split: str, sidecars: Iterable[str] = ()) -> Path:
    """A local folder with the wanted part of a data set; for an address that is a cache folder, filled here.

    Args:
        dataset: a folder, `embedded`, or an address (`FaceLoader`).
        split: whose shards are needed.
        sidecars: recognisers whose embeddings are needed.
    Raises:
        DataError: a file cannot be fetched, or arrives with another hash than the card says.
    """
    address = str(dataset)
    if not ADDRESS.match(address):
        return local_folder(dataset)
    if address.startswith("pipe:") and "{}" not in address:
        raise DataError(f"{address}: a pipe needs {{}} where the file's name goes, such as pipe:cat /data/faces/{{}}")
    folder = cache_folder() / "datasets" / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    _fetch(address, folder / CARD_NAME)  # always anew: it is small, and it says whether the rest is still right
    card = Card.load(folder)
    for name in sidecars:
        _fetch(address, sidecar_record_path(folder, name))
    for shard in card.of_split(split):
        _fetch_shard(address, folder, shard)
        for name in sidecars:
            array = sidecar_path(folder / shard.file, name)
            entry = read_record(folder, name)["shards"].get(shard.stem)  # without one, the loader says what is missing
            if entry is not None and not (array.is_file() and sha256_of(array) == entry["sha256"]):
                _fetch(address, array)
    return folder


def _fetch_shard(address: str, folder: Path, shard: Shard) -> None:
    tar = folder / shard.file
    if tar.is_file() and tar.stat().st_size == shard.bytes:
        index = Index.load(index_path(tar))  # was made from the hashed tar, and saves hashing it again
        if (index.sha256 if index else sha256_of(tar)) == shard.sha256:
            return
    _fetch(address, tar)
    found = sha256_of(tar)
    if found != shard.sha256:
        tar.unlink()
        raise DataError(
            f"{shard.file} from {address} has sha256 {found[:12]}..., its card says {shard.sha256[:12]}...: "
            "the transfer broke off or the shard was changed. Run again; if it stays, publish the data set again."
        )


def _fetch(address: str, target: Path) -> None:
    """Copy one file under its final name, whole or not at all."""
    from webdataset import cache

    url = address.replace("{}", target.name) if "{}" in address else f"{address.rstrip('/')}/{target.name}"
    if url.startswith("s3:"):
        url = f"pipe:aws s3 cp {url} -"
    try:
        cache.download(url, str(target))
    except OSError as error:
        for left in target.parent.glob(f"{target.name}.temp*"):
            left.unlink()
        raise DataError(f"cannot fetch {url}: {error}. Check the address and the network, then run again.") from error
