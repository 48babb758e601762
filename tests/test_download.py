"""`fma_nb.raw.download` against a real HTTP server on loopback that can misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from fma_nb.progress import Progress
from fma_nb.project import FmaNbError, project_root
from fma_nb.raw.download import Archive, RetryPolicy, download, extract, fetch, verify_checksums, verify_sha1

NAME = "fma_tiny"
ZIP = f"{NAME}.zip"
POLICY = RetryPolicy(timeout=5.0, attempts=3, backoff=0.0)
GOOD = f"{hashlib.sha1(b'').hexdigest()}  000/000000.mp3\n"
MP3S = [f"{i:03d}/{i:03d}{j:03d}.mp3" for i in range(3) for j in range(8)]


def make_members(seed: int = 0, n_bytes: int = 20_000) -> dict[str, bytes]:
    """FMA's structure: folders of clips, a README and the list of SHA-1 sums."""
    noise = random.Random(seed)
    members = {name: noise.randbytes(n_bytes) for name in MP3S} | {"README.txt": b"clips\n" * 50}
    sums = "".join(f"{hashlib.sha1(data).hexdigest()}  {name}\n" for name, data in members.items())
    return {"checksums": sums.encode()} | members


def make_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_BZIP2) -> bytes:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{NAME}/{name}", data)
    return path.read_bytes()


def archive_of(body: bytes, n_bytes: int = 0) -> Archive:
    return Archive(NAME, hashlib.sha1(body).hexdigest(), n_bytes, 0)


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, except the lock file, which filelock may leave or remove."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def write_times(folder: Path) -> dict[str, int]:
    clips = sorted(folder.rglob("*.mp3"))
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in clips}


@dataclass
class Answer:
    """How the server treats one request; the defaults are an honest answer."""

    status: int | None = None
    stop_after: int | None = None  # bytes of the body
    then: str = "close"  # or "reset" or "stall"
    is_mute: bool = False
    length_error: int = 0  # added to Content-Length
    range_error: int = 0  # added to the start that Content-Range tells
    headers: dict[str, str] = field(default_factory=dict)
    halfway: Callable[[], None] | None = None


@dataclass
class Request:
    path: str
    start: int | None  # what the Range header asked for
    if_range: str | None
    n_sent: int = 0


class FmaServer(ThreadingHTTPServer):
    """Serves ``body``; takes the next of ``answers`` for each request, then honest ones."""

    daemon_threads = True

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = body
        self.answers: list[Answer] = []
        self.has_ranges = True
        self.etag = '"v1"'
        self.requests: list[Request] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def starts(self) -> list[int | None]:
        return [request.start for request in self.requests]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet when a client goes away."""


class Handler(BaseHTTPRequestHandler):
    server: FmaServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else None
        request = Request(self.path, start, self.headers.get("If-Range"))
        server.requests.append(request)
        answer = server.answers.pop(0) if server.answers else Answer()
        if request.if_range not in (None, server.etag) or not server.has_ranges:
            start = None
        if answer.is_mute:
            server.over.wait()
        elif answer.status is not None:
            self.send_head(answer.status, 0, answer)
        elif start is not None and start >= len(server.body):
            self.send_head(416, 0, answer)
        else:
            body = server.body[start or 0 :]
            if start is not None:
                told = start + answer.range_error
                end = f"{len(server.body) - 1}/{len(server.body)}"
                answer.headers["Content-Range"] = f"bytes {told}-{end}"
            self.send_head(200 if start is None else 206, len(body), answer)
            self.send_body(body, answer, request)

    def send_head(self, status: int, n_bytes: int, answer: Answer) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(n_bytes + answer.length_error))
        self.send_header("ETag", self.server.etag)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_body(self, body: bytes, answer: Answer, request: Request) -> None:
        body = body[: answer.stop_after]
        middle = len(body) // 2
        self.wfile.write(body[:middle])
        if answer.halfway is not None:
            answer.halfway()
        self.wfile.write(body[middle:])
        request.n_sent = len(body)
        if answer.then == "stall":
            self.server.over.wait()
        if answer.then == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    return make_members()


@pytest.fixture(scope="module")
def body(members: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_zip(tmp_path_factory.mktemp("made") / ZIP, members)


@pytest.fixture
def server(body: bytes) -> Iterator[FmaServer]:
    with FmaServer(body) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FMA_NB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "data" / "raw"


@pytest.fixture
def part(raw: Path) -> Path:
    raw.mkdir(parents=True)
    return raw / f"{ZIP}.part"


def get(server: FmaServer, **options: Any) -> Path:
    options = {"archive": archive_of(server.body), "policy": POLICY} | options
    return download(base_url=server.url, **options)


def assert_complete(raw: Path, members: dict[str, bytes], body: bytes) -> None:
    files = files_below(raw)
    del files[f"{NAME}.json"]
    assert files == {f"{NAME}/{name}": data for name, data in members.items()} | {ZIP: body}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the download did not come as far"
        time.sleep(0.001)


CHILD = f"""
import sys
from pathlib import Path
from fma_nb.raw.download import Archive, RetryPolicy, download
from fma_nb.project import FmaNbError
sha1, base_url, path, limit = sys.argv[1:]
if limit != "-":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
try:
    download(
        Archive({NAME!r}, sha1, 0, 0), base_url=base_url,
        archive_path=None if path == "-" else Path(path), policy=RetryPolicy(backoff=0.0),
    )
except FmaNbError as error:
    sys.exit(str(error))
"""


def start_child(
    body: bytes, base_url: str = "-", path: Path | str = "-", limit: int | str = "-", **options: Any
) -> subprocess.Popen[bytes]:
    arguments = [archive_of(body).sha1, base_url, str(path), str(limit)]
    command = [sys.executable, "-c", CHILD, *arguments]
    options = {"stderr": subprocess.PIPE, "cwd": project_root()} | options
    return subprocess.Popen(command, **options)


# ---------------------------------------------------------------- the plain way


def test_download_brings_every_file_and_keeps_the_archive(server, raw, members, body):
    assert get(server) == raw / NAME
    assert_complete(raw, members, body)
    assert server.starts == [None]


def test_second_call_asks_nothing_and_writes_nothing(server, raw):
    get(server)
    before = files_below(raw), write_times(raw)
    get(server)
    assert len(server.requests) == 1
    assert (files_below(raw), write_times(raw)) == before


def test_server_that_sends_a_range_in_pieces(server, part, members, body):
    part.write_bytes(body[:5000])
    n_missing = len(body) - 5000
    server.answers = [Answer(stop_after=2000, length_error=2000 - n_missing)]
    get(server)
    assert server.starts == [5000, 7000]
    assert_complete(part.parent, members, body)


def test_redirect_is_followed(server, raw, members, body):
    server.answers = [Answer(status=302, headers={"Location": f"/mirror/{ZIP}"})]
    get(server)
    assert [request.path for request in server.requests] == [f"/{ZIP}", f"/mirror/{ZIP}"]
    assert_complete(raw, members, body)


def test_bar_with_rate_on_a_terminal(server, body):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    # The pause lets tqdm draw again, which it does at most every 0.1 s.
    server.answers = [Answer(status=503), Answer(halfway=lambda: time.sleep(0.3))]
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 120))
    child = start_child(body, server.url, stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # Linux's end of file on a terminal
        pass
    os.close(terminal)
    finished = child.communicate()[0].decode()
    assert child.returncode == 0
    assert re.search(rf"{ZIP}: +\d+%.* \d+k/{len(body) / 1000:.0f}k \[.*, \d[^?]*B/s\]".encode(), shown)
    assert b"answered HTTP 503 Service Unavailable: trying again in 0 s" in shown
    assert finished.startswith(f"{ZIP}: {len(body) / 1000:.0f}kB in ")


def test_log_has_one_finished_line_for_each_step(server, part, members, body, capsys):
    part.write_bytes(body[:5000])
    get(server)
    shown = capsys.readouterr()
    n_unpacked = sum(map(len, members.values()))
    expected = [
        f"checking {ZIP}.part: 5.00kB",
        f"{ZIP}: {len(body) / 1000:.0f}kB",
        f"unpacking {NAME}: {n_unpacked / 1000:.0f}kB",
        f"checking {NAME}: {len(members) - 1} files",
    ]
    assert [re.sub(r" in [\d.]+ s$", "", line) for line in shown.out.splitlines()] == expected
    assert shown.err == ""


def test_log_tells_how_much_of_a_download_arrived(server, body, capsys):
    server.answers = [Answer(stop_after=5000)]
    with pytest.raises(FmaNbError):
        get(server, policy=RetryPolicy(attempts=1))
    assert capsys.readouterr().out.startswith(f"{ZIP}: 5.00kB of {len(body) / 1000:.0f}kB in ")


# ---------------------------------------------------------------- the bar itself


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_bytes_that_were_there_before_and_a_start_over(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(None, "clips.zip", "B") as bar:
        bar.total = 8_000_000_000
        bar.start_at(6_000_000_000)
        assert "clips.zip:  75%" in terminal.getvalue() and "6.00G/8.00G" in terminal.getvalue()
        bar.update(1_000_000_000)
        bar.start_at(0)
        assert "clips.zip:   0%" in terminal.getvalue() and "0.00/8.00G" in terminal.getvalue()
        bar.update(2_000_000_000)
    assert capsys.readouterr().out.startswith("clips.zip: 2.00GB of 8.00GB in ")


def test_log_of_unknown_totals_of_items_and_of_nothing(capsys):
    with Progress(None, "clips.zip", "B") as bar:
        bar.update(5_000_000)
    with Progress(3, "clips", "clip") as bar:
        bar.write("not for a log")
        bar.update(2)
    with Progress(3, "quiet", "clip", visible=False) as bar:
        bar.update(3)
    shown = capsys.readouterr()
    lines = [re.sub(r"[\d.]+ s$", "", line) for line in shown.out.splitlines()]
    assert lines == ["clips.zip: 5.00MB in ", "clips: 2 of 3 clips in "] and shown.err == ""


NOTEBOOK_CELL = """
import time
from fma_nb.progress import REDRAW_S, Progress
with Progress(None, "unknown", "B") as bar:
    bar.start_at(5_000_000)
    time.sleep(1.2 * REDRAW_S)
    bar.update(0)
    bar.total = 9_000_000
with Progress(2, "two", "clip") as bar:
    time.sleep(1.2 * REDRAW_S)
    bar.update(0)
    bar.update(1)
    time.sleep(1.2 * REDRAW_S)
    raise ValueError("second clip")
"""


def test_notebook_keeps_the_finished_line_also_after_an_error():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK_CELL)])
    client = NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": project_root()}})
    client.execute()
    outputs = notebook.cells[0].outputs
    lines = [re.sub(r"[\d.]+ s$", "", o.data["text/plain"]) for o in outputs if "data" in o]
    assert lines == ["unknown: 5.00MB of 9.00MB in ", "two: 1 of 2 clips in "]
    assert [(o.ename, o.evalue) for o in outputs if o.output_type == "error"] == [
        ("ValueError", "second clip")
    ]


def test_progress_does_not_import_ipython():
    code = "import sys; from fma_nb.progress import Progress as P; P(1, 'a', 'b').__enter__(); "
    check = "sys.exit('IPython' in sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], cwd=project_root(), check=True)


# ---------------------------------------------------------------- connections that fail


@pytest.mark.parametrize("seed", range(4))
def test_cut_download_resumes_and_asks_for_no_byte_twice(server, raw, members, body, seed):
    cuts = random.Random(seed)
    server.answers = [Answer(stop_after=cuts.randrange(1, len(body) // 4)) for _ in range(4)]
    get(server)
    assert_complete(raw, members, body)
    assert server.starts[0] is None
    ends = [(request.start or 0) + request.n_sent for request in server.requests]
    assert server.starts[1:] == ends[:-1] and ends[-1] == len(body)


def test_reset_connection_resumes(server, raw, members, body):
    server.answers = [Answer(stop_after=100_000, then="reset") for _ in range(2)]
    get(server)
    assert_complete(raw, members, body)


def test_stalled_connection_resumes(server, raw, members, body):
    server.answers = [Answer(is_mute=True), Answer(stop_after=100_000, then="stall")]
    get(server, policy=RetryPolicy(timeout=0.3, attempts=2, backoff=0.0))
    assert server.starts == [None, None, 100_000]
    assert_complete(raw, members, body)


def test_silence_of_the_server_is_bounded_by_the_timeout(server):
    server.answers = [Answer(is_mute=True)]
    with pytest.raises(FmaNbError, match=r"1 times in a row.*read timeout=0\.2"):
        get(server, policy=RetryPolicy(timeout=0.2, attempts=1))


def test_server_without_ranges_starts_over(server, raw, members, body, capsys):
    server.has_ranges = False
    server.answers = [Answer(stop_after=100_000)]
    get(server)
    assert server.starts == [None, 100_000]
    assert capsys.readouterr().out.startswith(f"{ZIP}: {len(body) / 1000:.0f}kB in ")
    assert_complete(raw, members, body)


def test_file_that_changes_on_the_server_starts_over(server, raw, tmp_path):
    members = make_members(seed=1)
    new_body = make_zip(tmp_path / "new.zip", members)

    def change() -> None:
        server.body, server.etag = new_body, '"v2"'

    server.answers = [Answer(stop_after=100_000, halfway=change)]
    get(server, archive=archive_of(new_body))
    assert server.requests[1].if_range == '"v1"'
    assert_complete(raw, members, new_body)


def test_weak_etag_is_not_relied_on(server, raw, members, body):
    server.etag = 'W/"v1"'
    server.answers = [Answer(stop_after=100_000)]
    get(server)
    assert server.starts == [None, 100_000] and server.requests[1].if_range is None
    assert_complete(raw, members, body)


def test_busy_server_is_asked_again(server, raw, members, body):
    server.answers = [Answer(status=503), Answer(status=429)]
    get(server)
    assert len(server.requests) == 3
    assert_complete(raw, members, body)


def test_attempts_without_progress_are_bounded_and_the_rest_comes_later(server, part, body):
    server.answers = [Answer(stop_after=5000), *[Answer(status=500)] * 9]
    with pytest.raises(FmaNbError, match=r"3 times in a row.*500.*go on from 5000 bytes"):
        get(server)
    assert len(server.requests) == 3
    assert part.read_bytes() == body[:5000]
    server.answers = []
    get(server)
    assert server.starts[-1] == 5000


def test_cuts_of_a_server_without_ranges_are_bounded(server):
    server.has_ranges = False
    server.answers = [Answer(stop_after=n) for n in (5000, 4000, 5000, 4000, 5000)]
    with pytest.raises(FmaNbError, match="3 times in a row"):
        get(server)
    assert len(server.requests) == 3


def test_many_cuts_are_no_failure_while_bytes_arrive(server, raw, members, body):
    server.answers = [Answer(stop_after=9000) for _ in range(20)]
    get(server)
    assert_complete(raw, members, body)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(FmaNbError, match="3 times in a row"):
        download(archive_of(b"something"), base_url=f"http://127.0.0.1:{port}", policy=POLICY)


@pytest.mark.parametrize("status", [403, 404, 204])
def test_refusal_is_final(server, status):
    server.answers = [Answer(status=status)]
    with pytest.raises(FmaNbError, match=rf"{ZIP} answered HTTP {status}.*base_url.*archive_path"):
        get(server)
    assert len(server.requests) == 1


def test_address_that_is_none():
    with pytest.raises(FmaNbError, match="check --url"):
        download(archive_of(b"something"), base_url="no-address", policy=POLICY)


# ---------------------------------------------------------------- servers that lie


def test_login_page_does_not_wipe_what_was_received(server, part, body):
    part.write_bytes(body[:5000])
    server.has_ranges = False
    server.answers = [Answer(headers={"Content-Type": "text/html; charset=utf-8"})]
    with pytest.raises(FmaNbError, match="is a web page"):
        get(server)
    assert part.read_bytes() == body[:5000]


def test_length_told_too_short_is_a_wrong_checksum(server, raw, members, body):
    server.answers = [Answer(length_error=-1000)]
    with pytest.raises(FmaNbError, match=rf"sent {len(body) - 1000} bytes with SHA-1 .* removed"):
        get(server)
    assert files_below(raw) == {}
    get(server)
    assert_complete(raw, members, body)


def test_length_told_too_long_is_no_harm(server, raw, members, body):
    server.answers = [Answer(length_error=1000)]
    get(server)
    assert server.starts == [None]
    assert_complete(raw, members, body)


def test_length_told_too_long_for_ever_is_bounded(server, body):
    server.has_ranges = False
    server.body = body[:-1]
    server.answers = [Answer(length_error=1000) for _ in range(9)]
    with pytest.raises(FmaNbError, match="3 times in a row"):
        get(server, archive=archive_of(body))
    assert len(server.requests) == 3


def test_length_told_larger_than_the_disk(server):
    server.answers = [Answer(length_error=1 << 60)]
    with pytest.raises(FmaNbError, match=r"needs 1\.15EB .* is free: make space"):
        get(server)


@pytest.mark.parametrize("error", [-1, 1])
def test_wrong_content_range_is_refused_and_the_bytes_kept(server, part, body, error):
    part.write_bytes(body[:5000])
    server.answers = [Answer(range_error=error)]
    with pytest.raises(FmaNbError, match=rf"from 5000 on and sent 'bytes {5000 + error}-.*\.part"):
        get(server)
    assert part.read_bytes() == body[:5000]


@pytest.mark.parametrize("n_extra", [0, 10])
def test_part_that_is_no_part_of_the_archive_starts_over(server, part, members, body, n_extra):
    part.write_bytes(bytes(len(body) + n_extra))
    get(server)
    assert server.starts == [len(body) + n_extra, None]
    assert_complete(part.parent, members, body)


def test_wrong_checksum_removes_the_file_so_that_the_next_call_starts_over(server, raw, body):
    server.body = body[:-1] + b"?"
    with pytest.raises(FmaNbError, match=rf"{archive_of(server.body).sha1} instead of .* removed"):
        get(server, archive=archive_of(body))
    assert files_below(raw) == {}
    server.body = body
    get(server)
    assert server.starts == [None, None]


# ---------------------------------------------------------------- archives on disk


def test_archive_on_disk_is_used_and_left_alone(server, raw, members, body, tmp_path):
    path = tmp_path / "mine.zip"
    path.write_bytes(body)
    get(server, archive_path=path)
    assert server.requests == [] and path.read_bytes() == body
    (raw / ZIP).write_bytes(body)
    assert_complete(raw, members, body)


def test_wrong_archive_on_disk_is_named_and_left_alone(server, raw, body, tmp_path):
    path = tmp_path / "mine.zip"
    path.write_bytes(body[:-1])
    with pytest.raises(FmaNbError, match=r"mine\.zip has SHA-1 .* instead of"):
        get(server, archive_path=path)
    assert path.read_bytes() == body[:-1] and files_below(raw) == {}
    with pytest.raises(FmaNbError, match=r"The archive .*none\.zip is not a file"):
        verify_sha1(tmp_path / "none.zip", "")


def test_archive_under_its_final_name_is_used(server, part, members, body):
    part.with_name(ZIP).write_bytes(body)
    get(server)
    assert server.requests == []
    assert_complete(part.parent, members, body)


def test_unfinished_archive_under_its_final_name_is_completed(server, part, members, body):
    part.with_name(ZIP).write_bytes(body[:5000])
    get(server)
    assert server.starts == [5000]
    assert_complete(part.parent, members, body)


# ---------------------------------------------------------------- disks that fill up


def test_too_little_space_is_told_before_anything_is_asked(server, body):
    with pytest.raises(FmaNbError, match=r"fma_tiny needs 1\.15EB in .*raw, where .*B is free"):
        get(server, archive=archive_of(body, n_bytes=1 << 60))
    assert server.requests == []


def test_members_that_declare_more_than_the_disk_holds_are_not_unpacked(raw, tmp_path):
    path = tmp_path / ZIP
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr(info := zipfile.ZipInfo(f"{NAME}/bomb.mp3"), b"boom")
        info.file_size = 1 << 60
    with pytest.raises(FmaNbError, match=r"needs 1\.15EB"):
        extract(path, raw / NAME)
    assert files_below(raw) == {}


@pytest.fixture
def small_disk(raw: Path) -> Iterator[Path]:
    """Two MiB of real disk below ``raw``."""
    raw.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(raw)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield raw
    subprocess.run(["umount", str(raw)], check=True)


def test_disk_that_fills_during_download_keeps_what_arrived(server, small_disk, members, body):
    filler, is_full = small_disk / "filler", threading.Event()
    part = small_disk / f"{ZIP}.part"

    def fill_disk() -> None:
        wait_for(lambda: part.stat().st_size > 0)
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        is_full.set()

    server.answers = [Answer(halfway=fill_disk)]
    with pytest.raises(FmaNbError, match=r"No space left.*make space.*what is finished is kept"):
        get(server)
    assert is_full.wait(10)
    n_kept = part.stat().st_size
    assert 0 < n_kept < len(body) and part.read_bytes() == body[:n_kept]
    filler.unlink()
    get(server)
    assert server.starts == [None, n_kept]
    assert_complete(small_disk, members, body)


def test_full_disk_in_both_stages_goes_on_after_space_is_made(server, part, body, tmp_path):
    """A file size limit makes every write beyond it fail, for any user."""
    child = start_child(body, server.url, limit=100_000)
    assert "File too large): make space" in child.communicate()[1].decode()
    assert child.returncode == 1
    assert part.read_bytes() == body[:100_000]
    child = start_child(body, server.url)
    assert child.communicate()[1] == b"" and server.starts == [None, 100_000]

    folder = tmp_path / "data" / "raw" / NAME
    (part.parent / f"{NAME}.json").unlink()
    for name in MP3S[:4]:
        (folder / name).unlink()
    before = write_times(folder)
    child = start_child(body, path=part.with_name(ZIP), limit=10_000)
    assert "File too large): make space" in child.communicate()[1].decode()
    assert write_times(folder) == before
    child = start_child(body, path=part.with_name(ZIP))
    assert child.communicate()[1] == b""
    assert write_times(folder).items() > before.items() and len(write_times(folder)) == len(MP3S)


def test_folder_that_cannot_be_used(server, raw):
    raw.parent.mkdir()
    raw.write_text("a file where the folder should be")
    with pytest.raises(FmaNbError, match=r"Cannot use .*raw"):
        get(server)


# ---------------------------------------------------------------- processes that are killed


@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGINT])
def test_killed_download_goes_on_and_a_second_process_waits_its_turn(server, part, members, body, killer):
    server.answers = [Answer(stop_after=200_000, then="stall")]
    child = start_child(body, server.url)
    wait_for(lambda: part.exists() and part.stat().st_size > 190_000)
    with pytest.raises(FmaNbError, match="Another process is downloading fma_tiny"):
        get(server)
    child.send_signal(killer)
    child.communicate()
    n_kept = part.stat().st_size
    assert part.read_bytes() == body[:n_kept]
    if killer == signal.SIGINT:
        assert n_kept == 200_000
    get(server)
    assert server.starts == [None, n_kept]
    assert_complete(part.parent, members, body)


def test_killed_extraction_goes_on_without_redoing_finished_members(raw, tmp_path):
    members = make_members(n_bytes=200_000)
    path = tmp_path / ZIP
    body = make_zip(path, members)
    moments = random.Random(0)
    finished: dict[str, int] = {}
    n_interrupted = 0
    for _ in range(3):
        target = len(finished) + moments.randrange(1, 4)
        child = start_child(body, path=path)
        wait_for(lambda n=target: len(write_times(raw)) >= n)
        child.kill()
        child.communicate()
        times = write_times(raw)
        assert finished.items() <= times.items()
        assert all((raw / NAME / name).stat().st_size == 200_000 for name in clips_in(times))
        n_interrupted += len(times) < len(MP3S)
        finished = times
    assert n_interrupted > 0
    download(archive_of(body), archive_path=path)
    assert finished.items() <= write_times(raw).items()
    (raw / ZIP).write_bytes(body)
    assert_complete(raw, members, body)


def test_folders_that_are_links_to_another_disk_are_not_unpacked_again(raw, tmp_path):
    path = tmp_path / ZIP
    body = make_zip(path, make_members(n_bytes=20_000))
    folder = download(archive_of(body), archive_path=path)
    (raw / f"{NAME}.json").unlink()
    below = sorted(child for child in folder.iterdir() if child.is_dir())
    assert below
    for child in below:
        child.rename(tmp_path / child.name)
        child.symlink_to(tmp_path / child.name)
    before = {file: file.stat().st_mtime_ns for child in below for file in child.iterdir()}
    download(archive_of(body), archive_path=path)
    assert before and before == {file: file.stat().st_mtime_ns for file in before}


def clips_in(times: dict[str, int]) -> list[str]:
    return [name.removeprefix(f"{NAME}/") for name in times]


# ---------------------------------------------------------------- archives that cannot be trusted


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        f"{NAME}/../../evil",
        f"{NAME}/..",
        "/evil",
        "//evil",
        "C:/evil",
        f"{NAME}/C:evil",
        f"{NAME}/..\\..\\evil",
        "fma_other/evil",
        NAME,
    ],
)
def test_member_outside_its_folder_is_refused_before_any_is_written(raw, tmp_path, name):
    path = tmp_path / ZIP
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr(f"{NAME}/000/000002.mp3", b"clip")
        archive.writestr(name, b"evil")
    before = files_below(tmp_path)
    with pytest.raises(FmaNbError, match="is a link or lies outside the folder 'fma_tiny'"):
        extract(path, raw / NAME)
    assert files_below(tmp_path) == before and not raw.exists()


@pytest.mark.parametrize("kind", [0o120777, 0o010644, 0o060644])  # link, pipe, device
def test_special_member_is_refused(raw, tmp_path, kind):
    path = tmp_path / ZIP
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo(f"{NAME}/000002.mp3")
        info.external_attr = kind << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(FmaNbError, match=r"'fma_tiny/000002\.mp3' is a link"):
        extract(path, raw / NAME)
    assert not raw.exists()


def make_understated_zip(path: Path, *, honest_crc: bool) -> None:
    """Ten million bytes that declare themselves as a thousand."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        sums = f"{'0' * 40}  bomb.mp3\n"
        archive.writestr(f"{NAME}/checksums", sums)
        info = zipfile.ZipInfo(f"{NAME}/bomb.mp3")
        info.compress_type = zipfile.ZIP_BZIP2
        archive.writestr(info, bytes(10_000_000))
        info.file_size = 1000
        if not honest_crc:
            info.CRC = zlib.crc32(bytes(1000))


def test_member_bigger_than_declared_is_damaged(raw, tmp_path):
    make_understated_zip(tmp_path / ZIP, honest_crc=True)
    with pytest.raises(FmaNbError, match=r"damaged \(member fma_tiny/bomb\.mp3"):
        extract(tmp_path / ZIP, raw / NAME)
    assert not (raw / NAME / "bomb.mp3").exists()


@pytest.mark.parametrize("compress_size", [4, 5000])
def test_member_smaller_than_declared_is_damaged(raw, tmp_path, compress_size):
    with zipfile.ZipFile(tmp_path / ZIP, "w") as archive:
        archive.writestr(info := zipfile.ZipInfo(f"{NAME}/short.mp3"), b"clip")
        info.file_size, info.compress_size = 5000, compress_size
    with pytest.raises(FmaNbError, match=r"damaged \(member fma_tiny/short\.mp3"):
        extract(tmp_path / ZIP, raw / NAME)
    assert files_below(raw / NAME) == {}


def test_encrypted_member_is_named(raw, tmp_path):
    with zipfile.ZipFile(tmp_path / ZIP, "w") as archive:
        archive.writestr(info := zipfile.ZipInfo(f"{NAME}/secret.mp3"), b"clip")
        info.flag_bits |= 1
    with pytest.raises(FmaNbError, match=r"damaged \(member fma_tiny/secret\.mp3: .*encrypted"):
        extract(tmp_path / ZIP, raw / NAME)


def test_member_bigger_than_declared_never_writes_more(raw, tmp_path):
    make_understated_zip(tmp_path / ZIP, honest_crc=False)
    extract(tmp_path / ZIP, raw / NAME)
    assert (raw / NAME / "bomb.mp3").stat().st_size == 1000
    with pytest.raises(FmaNbError, match=r"1 of 1 files .*\(bomb\.mp3\)"):
        verify_checksums(raw / NAME)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("place", [0.0, 0.02, 0.5, 0.98])
def test_damaged_member_is_named_and_the_others_stay(raw, tmp_path, members, place, method):
    path = tmp_path / ZIP
    make_zip(path, members, method)
    bad = f"{NAME}/{MP3S[-1]}"
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(bad)
    with path.open("r+b") as file:
        file.seek(info.header_offset + 30 + len(bad) + int(place * info.compress_size))
        file.write(b"damage")
    with pytest.raises(FmaNbError, match=rf"damaged \(member {bad}"):
        extract(path, raw / NAME)
    make_zip(path, members)
    before = write_times(raw)
    assert bad not in before and len(before) > 0
    assert extract(path, raw / NAME) == len(members)
    assert before.items() <= write_times(raw).items()
    assert files_below(raw / NAME) == members


@pytest.mark.parametrize("n_kept", [0, 10, 5000])
def test_truncated_archive_is_damaged(raw, tmp_path, body, n_kept):
    path = tmp_path / ZIP
    path.write_bytes(body[:n_kept])
    with pytest.raises(FmaNbError, match=rf"{ZIP} is damaged"):
        extract(path, raw / NAME)


# ---------------------------------------------------------------- FMA's checksums


def test_file_that_changed_on_disk_is_named_and_made_anew(server, raw, members, body):
    folder = get(server)
    (raw / f"{NAME}.json").unlink()
    (folder / MP3S[3]).write_bytes(bytes(20_000))
    with pytest.raises(FmaNbError, match=rf"1 of {len(members) - 1} files .*\({MP3S[3]}\)"):
        get(server)
    get(server)
    assert_complete(raw, members, body)


def test_file_that_another_tool_left_unfinished_is_replaced(server, part, members, body):
    unfinished = part.parent / NAME / MP3S[3]
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(members[MP3S[3]][:1000])
    get(server)
    assert_complete(part.parent, members, body)


def test_archive_whose_list_disagrees_is_never_finished(server, raw, members, tmp_path):
    wrong = members | {name: members[name][::-1] for name in MP3S[:5]}
    server.body = make_zip(tmp_path / "wrong.zip", wrong)
    for _ in range(2):
        with pytest.raises(FmaNbError, match=rf"5 of .*{MP3S[0]}, {MP3S[1]}, {MP3S[2]}, \.\.\."):
            get(server)
    assert not (raw / f"{NAME}.json").exists() and len(server.requests) == 1


@pytest.mark.parametrize(
    "text", ["", f"{GOOD}not a sum  000/000001.mp3\n", f"{GOOD}{'0' * 40}  ../kept.txt\n"]
)
def test_list_that_cannot_be_used_touches_nothing(tmp_path, text):
    kept = tmp_path / "kept.txt"
    kept.write_text("outside the folder")
    folder = tmp_path / NAME
    folder.mkdir()
    with pytest.raises(FmaNbError, match=r"checksums is no list"):
        verify_checksums(folder)
    (folder / "checksums").write_text(text)
    with pytest.raises(FmaNbError, match=r"checksums is no list"):
        verify_checksums(folder)
    assert kept.exists()


def test_fetch_alone_brings_one_file(server, tmp_path, body):
    path = tmp_path / "copy.zip"
    fetch(server.url, path, archive_of(body).sha1, POLICY)
    assert path.read_bytes() == body and list(tmp_path.iterdir()) == [path]
