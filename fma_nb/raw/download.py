"""Download FMA's archives, check and unpack them into ``data/raw/``: the pipeline's first stage.

`download` calls `fetch`, `extract` and `verify_checksums`. Each step keeps what it finished on disk, so
that a call after a crash, a full disk or Ctrl-C goes on from there: bytes in ``<name>.zip.part``, members
under their final names, and at the end the record ``<name>.json``, which makes the next call return at once.
"""

import functools
import hashlib
import json
import re
import shutil
import stat
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile, ZipInfo

import requests
from filelock import FileLock, Timeout
from urllib3.exceptions import HTTPError

from fma_nb.bulk.folders import clear_temporaries
from fma_nb.progress import Progress, format_bytes
from fma_nb.project import FmaNbError, atomic_path, data_dir, make_folder, write_text

FMA_URL = "https://os.unil.cloud.switch.ch/fma/"
PIECE_BYTES = 1 << 20
_sha1 = functools.partial(hashlib.sha1, usedforsecurity=False)


@dataclass(frozen=True)
class Archive:
    """A zip archive of FMA: its SHA-1, and rough sizes in bytes for the first disk space check."""

    name: str
    sha1: str
    n_bytes: int
    unpacked_bytes: int


ARCHIVES = {
    "metadata": Archive("fma_metadata", "f0df49ffe5f2a6008d7dc83c6915b31835dfe733", 342 << 20, 1_400_000_000),
    "small": Archive("fma_small", "ade154f733639d52e35e32f5593efe5be76c6d70", 7_680_000_000, 7_680_000_000),
    "medium": Archive("fma_medium", "c67b69ea232021025fca9231fc1c7c1a063ab50b", 22 << 30, 22 << 30),
    "large": Archive("fma_large", "497109f4dd721066b5ce5e5f250ec604dc78939e", 93 << 30, 93 << 30),
}


@dataclass(frozen=True)
class RetryPolicy:
    """How long, in s, to wait for a server, and how often to ask it again."""

    timeout: float = 30.0  # the longest silence
    attempts: int = 6  # requests in a row that may bring nothing new
    backoff: float = 1.0  # the first pause; each is twice the one before, up to a minute


def download(
    archive: Archive,
    *,
    base_url: str = FMA_URL,
    archive_path: Path | None = None,
    policy: RetryPolicy = RetryPolicy(),
) -> Path:
    """Bring one of `ARCHIVES` to ``data/raw/`` and return its unpacked folder.

    ``<name>.zip`` comes from the folder at ``base_url``, or is the copy at ``archive_path``, which is checked
    and left alone. After any failure, an `FmaNbError`, call it again: it goes on where it stopped. Once all
    is done it does nothing; delete ``data/raw/<name>.json`` to have every file checked again.
    """
    raw = data_dir() / "raw"
    zip_path, folder, record = (raw / f"{archive.name}{end}" for end in (".zip", "", ".json"))
    try:
        if folder.is_dir() and record.is_file() and archive.sha1.encode() in record.read_bytes():
            return folder
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(raw / f".{archive.name}.lock", timeout=0):
            if archive_path is None:
                if not zip_path.exists():  # `extract` checks the space again, exactly
                    n_received = sum(part.stat().st_size for part in raw.glob(f"{zip_path.name}.part"))
                    n_missing = archive.n_bytes - n_received + archive.unpacked_bytes
                    _check_free_space(raw, n_missing, archive.name)
                fetch(f"{base_url.rstrip('/')}/{zip_path.name}", zip_path, archive.sha1, policy)
            else:
                verify_sha1(archive_path, archive.sha1)
            n_members = extract(archive_path or zip_path, folder)
            verify_checksums(folder)
            write_text(record, json.dumps({"sha1": archive.sha1, "members": n_members}))
    except Timeout as error:
        raise FmaNbError(
            f"Another process is downloading {archive.name} to {raw}: wait until it is done."
        ) from error
    except OSError as error:
        raise FmaNbError(
            f"Cannot use {error.filename or folder} ({error.strerror}): make space, allow access "
            "or move the data with FMA_NB_DATA, then call again: what is finished is kept."
        ) from error
    return folder


def _check_free_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise `FmaNbError` unless the disk that holds ``folder`` has ``n_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise FmaNbError(
            f"{what} needs {format_bytes(n_bytes)} in {folder}, where {format_bytes(free)} is free: "
            "make space, or move the data with FMA_NB_DATA."
        )


def fetch(url: str, path: Path, sha1: str, policy: RetryPolicy) -> None:
    """Download ``url`` to ``path``, which appears once its SHA-1 is right; go on from ``<path>.part``.

    A failure of the server is an `FmaNbError`, one of the disk an `OSError`.
    """
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        if _hash_file(path).hexdigest() == sha1:
            return
        path.replace(part)  # Most likely an unfinished download by other means.
    digest = _hash_file(part) if part.exists() else _sha1()
    with part.open("ab") as file, Progress(None, path.name, "B") as bar:
        received = _Received(file, digest, file.tell(), bar)
        bar.start_at(received.n_bytes)
        _fetch_rest(url, received, sha1, policy)
    if (found := received.digest.hexdigest()) != sha1:
        part.unlink()
        raise FmaNbError(
            f"{url} sent {received.n_bytes} bytes with SHA-1 {found} instead of {sha1}: "
            "they were removed; call again to start over, or choose another address (--url, base_url)."
        )
    part.replace(path)


@dataclass
class _Received:
    """The bytes received so far: a growing file, its SHA-1, and the ETag of the server's version."""

    file: BinaryIO
    digest: "hashlib._Hash"
    n_bytes: int
    bar: Progress
    etag: str = ""


def _fetch_rest(url: str, received: _Received, sha1: str, policy: RetryPolicy) -> None:
    """Request what is missing, again and again, until ``sha1`` is reached or the server is done."""
    failures, furthest = 0, received.n_bytes
    # Asking the SHA-1, not the server, whether all is there also copes with a wrong Content-Length.
    while received.digest.hexdigest() != sha1:
        try:
            return _request_rest(url, received, policy.timeout)
        except (ConnectionError, requests.ConnectionError, requests.Timeout, HTTPError) as error:
            failures = 1 if received.n_bytes > furthest else failures + 1
            furthest = max(furthest, received.n_bytes)
            if failures >= policy.attempts:
                raise FmaNbError(
                    f"{url} failed {failures} times in a row ({error}): call again later to go on "
                    f"from {received.n_bytes} bytes, or choose another address (--url, base_url)."
                ) from error
            wait = min(policy.backoff * 2 ** (failures - 1), 60.0)
            received.bar.write(f"{error}: trying again in {wait:.0f} s")
            time.sleep(wait)
        except requests.RequestException as error:
            raise FmaNbError(f"{url} cannot be fetched ({error}): check --url (base_url).") from error


def _request_rest(url: str, received: _Received, timeout: float) -> None:
    """Make one request for the bytes that are missing and append what arrives."""
    headers: dict[str, str | None] = {"Accept-Encoding": "identity"}
    if received.n_bytes:  # requests leaves out a header that is None.
        headers |= {"Range": f"bytes={received.n_bytes}-", "If-Range": received.etag or None}
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        total = _check_answer(url, response, received)
        etag = response.headers.get("ETag", "")
        # RFC 9110, 13.1.5: a weak validator does not promise equal bytes.
        received.etag = "" if etag.startswith("W/") else etag
        if (length := response.raw.length_remaining) is not None:
            _check_free_space(Path(received.file.name).parent, length, url)
            received.bar.total = received.n_bytes + length
        # read1 hands over each piece as it arrives; read and iter_content drop one when cut off.
        while piece := response.raw.read1(PIECE_BYTES, decode_content=False):
            received.file.write(piece)
            received.digest.update(piece)
            received.n_bytes += len(piece)
            received.bar.update(len(piece))
    if received.n_bytes < total:
        raise ConnectionError(f"{url} sent {received.n_bytes} of {total} bytes")


def _check_answer(url: str, response: requests.Response, received: _Received) -> int:
    """Make sure that the body fits behind ``received``; return the file's length, 0 if untold."""
    status, start = response.status_code, received.n_bytes
    answer = f"{url} answered HTTP {status} {response.reason}"
    way_out = "choose another address (--url, base_url) or"
    if status in (200, 206) and "text/html" in response.headers.get("Content-Type", ""):
        raise FmaNbError(f"{url} is a web page, perhaps your network's login: {way_out} log in.")
    if status == 206:
        content_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(rf"bytes {start}-\d+/(?:(\d+)|\*)", content_range)
        if match is None:
            raise FmaNbError(
                f"{url} was asked for the bytes from {start} on and sent {content_range!r}: "
                f"{way_out} delete {received.file.name} to start over."
            )
        return int(match[1] or 0)
    if status in (200, 416) and start:
        # The server has no ranges, another version, or fewer bytes than we do.
        received.file.truncate(0)
        received.digest, received.n_bytes, received.etag = _sha1(), 0, ""
        received.bar.start_at(0)
    if status in (416, 429) or status >= 500:
        raise ConnectionError(answer)
    if status != 200:
        raise FmaNbError(f"{answer}: {way_out} give a copy of the archive (--archive, archive_path).")
    return 0


def verify_sha1(path: Path, sha1: str) -> None:
    """Raise `FmaNbError` unless the file at ``path`` is there and has this SHA-1."""
    if not path.is_file():
        raise FmaNbError(f"The archive {path} is not a file: give the path of a zip file.")
    if (found := _hash_file(path).hexdigest()) != sha1:
        raise FmaNbError(
            f"{path} has SHA-1 {found} instead of {sha1}, so it is unfinished, damaged or another "
            "file: give a good copy, or none to download one."
        )


def extract(zip_path: Path, folder: Path) -> int:
    """Unpack an archive whose members all lie in ``<folder's name>/``; return their number.

    A member appears under its name when it is complete, so what is there already stays as it is.
    Members are unpacked in threads: bzip2 is slow (20 MB/s a core) and leaves Python's lock free.
    """
    try:
        with ZipFile(zip_path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in members:
                _check_member(member, folder.name, zip_path)
            paths = {member: folder.parent / member.filename for member in members}
            missing = [m for m, p in paths.items() if not (p.is_file() and p.stat().st_size == m.file_size)]
            n_bytes = sum(member.file_size for member in missing)
            make_folder(folder)
            _check_free_space(folder, n_bytes, str(zip_path))
            clear_temporaries(folder)
            extract_one = functools.partial(_extract_member, archive, threading.Lock(), folder)
            with Progress(n_bytes, f"unpacking {folder.name}", "B") as bar, ThreadPoolExecutor() as pool:
                for n_extracted in pool.map(extract_one, missing):
                    bar.update(n_extracted)
    except BadZipFile as error:
        raise FmaNbError(
            f"{zip_path} is damaged ({error}): delete it and call again, or give a good copy."
        ) from error
    return len(members)


def _check_member(member: ZipInfo, top: str, zip_path: Path) -> None:
    """Refuse a member that is not a plain file or would land outside ``top``."""
    is_file = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
    if not is_file or not _is_inside(member.filename) or not member.filename.startswith(f"{top}/"):
        raise FmaNbError(
            f"{zip_path}: member {member.filename!r} is a link or lies outside the folder {top!r}: "
            "do not use this archive."
        )


def _is_inside(name: str) -> bool:
    """Tell whether a path stays below the folder it is joined to, on every operating system."""
    return not (name.startswith("/") or ".." in PurePosixPath(name).parts or set("\\:") & set(name))


def _extract_member(archive: ZipFile, lock: threading.Lock, folder: Path, member: ZipInfo) -> int:
    """Unpack one member and return its number of bytes."""
    with atomic_path(folder.parent / member.filename) as temporary:
        try:
            with lock:  # ZipFile counts its open members without a lock.
                source = archive.open(member)
            try:
                with temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, PIECE_BYTES)
            finally:
                with lock:
                    source.close()
            if (n_bytes := temporary.stat().st_size) != member.file_size:
                raise BadZipFile(f"{n_bytes} bytes")
        except (EOFError, OSError, RuntimeError, zlib.error, BadZipFile) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # A full disk, say; bz2's "Invalid data stream" has no number.
            raise BadZipFile(f"member {member.filename}: {error}") from error
    return n_bytes


def verify_checksums(folder: Path) -> None:
    """Raise `FmaNbError` unless all that ``<folder>/checksums`` names is right; remove files that differ."""
    bad, checksums = [], _read_checksums(folder / "checksums")
    with Progress(len(checksums), f"checking {folder.name}", "file") as bar:
        for name, sha1 in checksums.items():
            path = folder / name
            if not path.is_file() or _hash_file(path, visible=False).hexdigest() != sha1:
                path.unlink(missing_ok=True)
                bad.append(name)
            bar.update()
    if bad:
        raise FmaNbError(
            f"{folder}: {len(bad)} of {len(checksums)} files are missing or differ from FMA's "
            f"checksums ({', '.join(bad[:3])}{', ...' if bad[3:] else ''}): what differs was "
            "removed; call again to unpack it anew."
        )


def _read_checksums(path: Path) -> dict[str, str]:
    """Read lines of ``<sha1>  <path relative to this file's folder>``."""
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    matches = [re.fullmatch(r"([0-9a-f]{40}) [ *](.+)", line) for line in lines]
    checksums = {match[2]: match[1] for match in matches if match and _is_inside(match[2])}
    if not checksums or len(checksums) < len(lines):
        raise FmaNbError(
            f"{path} is no list of SHA-1 sums and relative paths: delete it and call again, or get "
            "a good copy of the archive."
        )
    return checksums


def _hash_file(path: Path, *, visible: bool = True) -> "hashlib._Hash":
    digest, n_bytes = _sha1(), path.stat().st_size
    with path.open("rb") as file, Progress(n_bytes, f"checking {path.name}", "B", visible=visible) as bar:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            bar.update(len(piece))
    return digest
