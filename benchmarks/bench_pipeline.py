"""From archives on a loopback server to the pack: wall time, peak memory, and the same under SIGKILLs.

    python benchmarks/bench_pipeline.py [--clips 8000] [--kills 5]

The clips are synthetic: 16 different 30-s MP3s under many names, in zip archives with FMA's structure and
bzip2 members, with ``checksums``. The same is then done again, killed at random moments and started again,
and must end in the same pack, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from fma_like import write_dataset

PIPELINE = """
import json, resource, sys, time
from pathlib import Path
from fma_nb.bulk.pack import load_pack
from fma_nb.raw.download import Archive, download
from fma_nb.bulk.spectrograms import make_spectrograms
clock, seconds = time.perf_counter(), {}
def lap(name):
    global clock
    seconds[name], clock = round(time.perf_counter() - clock, 1), time.perf_counter()
for one in json.loads(sys.argv[2]):
    download(Archive(*one), base_url=sys.argv[1])
    lap(f"download, unpack and verify {one[0]}")
make_spectrograms("fma_small", "compact", progress=False)
lap("spectrograms")
pack = load_pack("fma_small", "compact")
lap("pack")
peak = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"clips": sum(map(len, pack.splits.values())), "seconds": seconds, "peak_mb": peak}))
"""


class RangeHandler(SimpleHTTPRequestHandler):
    """Static files with byte ranges, as a download is resumed with."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        n_bytes, asked = path.stat().st_size, self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(n_bytes - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{n_bytes - 1}/{n_bytes}")
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            shutil.copyfileobj(file, self.wfile, 1 << 20)


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no error here."""


class CompressOnce:
    """A bzip2 compressor that remembers what it has compressed: most of the members are equal."""

    done: dict[bytes, bytes] = {}  # noqa: RUF012

    def __init__(self, compressor: object) -> None:
        self.compressor, self.content = compressor, b""

    def compress(self, piece: bytes) -> bytes:
        self.content += piece
        return b""

    def flush(self) -> bytes:
        key = hashlib.sha1(self.content).digest()
        if key not in self.done:
            self.done[key] = self.compressor.compress(self.content) + self.compressor.flush()
        return self.done[key]


def write_archives(folder: Path, n_clips: int, bit_rate_level: float) -> list[tuple[str, str, int, int]]:
    """Write FMA's two zip files; return what `fma_nb.raw.download.Archive` needs to know of each."""
    raw = folder / "made"
    write_dataset(raw, n_clips, bit_rate_level=bit_rate_level)
    archives = []
    make_compressor = zipfile._get_compressor
    with mock.patch.object(zipfile, "_get_compressor", lambda *a: CompressOnce(make_compressor(*a))):
        for name in ("fma_metadata", "fma_small"):
            files = sorted(p for p in (raw / name).rglob("*") if p.is_file())
            lines = [
                f"{hashlib.sha1(p.read_bytes()).hexdigest()}  {p.relative_to(raw / name)}" for p in files
            ]
            (raw / name / "checksums").write_text("\n".join(lines) + "\n")
            with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_BZIP2) as archive:
                for path in [raw / name / "checksums", *files]:
                    archive.write(path, path.relative_to(raw))
            content = folder / f"{name}.zip"
            with content.open("rb") as file:
                sha1 = hashlib.file_digest(file, "sha1").hexdigest()
            archives.append((name, sha1, content.stat().st_size, sum(p.stat().st_size for p in files)))
    shutil.rmtree(raw)
    return archives


def start(data: Path, server: HTTPServer, archives: list[tuple[str, str, int, int]]) -> subprocess.Popen[str]:
    url = f"http://127.0.0.1:{server.server_port}/"
    return subprocess.Popen(
        [sys.executable, "-c", PIPELINE, url, json.dumps(archives)],
        env=os.environ | {"FMA_NB_DATA": str(data)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    printed, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(printed)


def pack_hash(data: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((data / "spectrograms" / "fma_small-compact" / "pack").glob("*.npy")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--bit-rate-level", type=float, default=0.8, help="0.2 gives FMA's 256 kbit/s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archives = write_archives(folder, options.clips, options.bit_rate_level)
        print(f"fma_small.zip: {options.clips} synthetic clips, {archives[1][2] / 1e9:.2f} GB", flush=True)
        handler = type("Handler", (RangeHandler,), {"directory": str(folder)})
        server = QuietServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started = time.perf_counter()
        print("undisturbed:", finish(start(folder / "calm", server, archives)))
        calm_seconds = time.perf_counter() - started
        print(f"  {calm_seconds:.0f} s in all", flush=True)
        calm = pack_hash(folder / "calm")
        shutil.rmtree(folder / "calm")
        rng, started = random.Random(0), time.perf_counter()
        for _ in range(options.kills):
            process = start(folder / "killed", server, archives)
            time.sleep(rng.uniform(0.05, 0.3) * calm_seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        print("after the kills:", finish(start(folder / "killed", server, archives)))
        print(f"killed {options.kills} times: {time.perf_counter() - started:.0f} s in all; ", end="")
        print("the same pack:", pack_hash(folder / "killed") == calm)
        server.shutdown()


if __name__ == "__main__":
    main()
