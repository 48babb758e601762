"""How close the spectrogram stage is to its limit, the decoder, and how it compares with a plain pipeline.

    python benchmarks/bench_spectrograms.py [--recordings FOLDER] [--clips 200] [--repeats 15]

Prints ratios of CPU time per clip, measured in turns within one process so that a machine whose speed
drifts does not favour one side; then the throughput of one worker against two, memory, and projections.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import librosa
import matplotlib.pyplot as plt
import numpy as np
import soundfile as sf
from fma_like import encode_like_fma, write_clip, write_dataset

from fma_nb.audio import load_clip
from fma_nb.bulk.spectrograms import make_spectrograms
from fma_nb.project import spectrogram_dir
from fma_nb.spectrogram import PRESETS, log_mel, make_spectrogram, mel_power, to_grey

DATASET_CLIPS = {"fma_small": 8_000, "fma_medium": 25_000, "fma_large": 106_574}


def plain_pipeline(path: Path, png: Path) -> None:
    """The straightforward chain: librosa throughout, a colour picture at the end."""
    samples, sample_rate = librosa.load(path, sr=None, mono=True)
    power = np.abs(librosa.stft(samples, n_fft=2048, hop_length=512)) ** 2
    db = librosa.power_to_db(librosa.feature.melspectrogram(S=power, sr=sample_rate, n_mels=128), ref=np.max)
    plt.imsave(png, (db - db.min()) / (db.max() - db.min()), cmap="magma", origin="lower")


def decode(path: Path) -> None:
    """Decoding alone: the limit."""
    with sf.SoundFile(path) as file:
        file.read(30 * file.samplerate, dtype="float32", always_2d=True)


def cpu_seconds(job: Callable[[], object]) -> float:
    started = time.process_time()
    job()
    return time.process_time() - started


def measure(
    jobs: dict[str, Callable[[Path], object]], clips: list[Path], repeats: int
) -> dict[str, np.ndarray]:
    """Return CPU seconds [shape=(repeats * n_clips,)] of each job, all jobs in turns on every clip."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for clip in clips:
            for name, job in jobs.items():
                seconds = cpu_seconds(lambda job=job, clip=clip: job(clip))
                if repeat:  # the first round warms up
                    times[name].append(seconds)
    return {name: np.array(values) for name, values in times.items()}


def ratios(title: str, clips: list[Path], repeats: int, png: Path) -> dict[str, float]:
    jobs: dict[str, Callable[[Path], object]] = {
        "decode alone": decode,
        "full": lambda clip: make_spectrogram(clip, png, PRESETS["full"]),
        "compact": lambda clip: make_spectrogram(clip, png, PRESETS["compact"]),
        "plain pipeline": lambda clip: plain_pipeline(clip, png),
    }
    times = measure(jobs, clips, repeats)
    print(f"\n{title}: CPU time per clip on one core, {len(clips)} clips, {repeats} rounds")
    for name, values in times.items():
        ratio = np.median(values / times["decode alone"])
        print(f"  {name:16}{1000 * np.median(values):8.1f} ms   {ratio:5.2f} x decoding")
    for preset in ("full", "compact"):
        print(f"  plain pipeline / {preset}: {np.median(times['plain pipeline'] / times[preset]):.2f}")
    return {name: float(np.median(values)) for name, values in times.items()}


def stages(clip: Path, repeats: int) -> None:
    """Print what each stage takes of the whole."""
    for name, preset in PRESETS.items():
        samples, rate = load_clip(clip, preset.sample_rate)
        db = log_mel(samples, rate, preset)
        jobs: dict[str, Callable[[Path], object]] = {
            "decode": decode,
            "decode, mono, resample": lambda clip, p=preset: load_clip(clip, p.sample_rate),
            "mel power": lambda _, s=samples, r=rate, p=preset: mel_power(s, r, p),
            "log mel": lambda _, s=samples, r=rate, p=preset: log_mel(s, r, p),
            "grey": lambda _, d=db: to_grey(d),
        }
        with tempfile.TemporaryDirectory() as folder:
            jobs["whole clip to PNG"] = lambda clip, p=preset, f=folder: make_spectrogram(
                clip, Path(f) / "x.png", p
            )
            times = {k: 1000 * float(np.median(v)) for k, v in measure(jobs, [clip], repeats).items()}
        whole = times["whole clip to PNG"]
        shown = ", ".join(f"{stage} {ms:.1f} ms ({ms / whole:.0%})" for stage, ms in times.items())
        print(f"  {name}: {shown}")


BULK = """
import resource, sys, time
from fma_nb.bulk.spectrograms import make_spectrograms
started = time.perf_counter()
make_spectrograms("fma_small", "full", workers=int(sys.argv[1]), progress=False)
print(time.perf_counter() - started)
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def bulk_run(n_clips: int, workers: int) -> tuple[float, float, float]:
    """Return clips per second of a whole bulk run, start of the workers included, and MB: parent, worker.

    In a process of its own, as a child's memory figure begins with that of its parent. Linux only.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "raw", n_clips)
        done = subprocess.run(
            [sys.executable, "-c", BULK, str(workers)],
            env=os.environ | {"FMA_NB_DATA": folder},
            capture_output=True,
            text=True,
            check=True,
        )
    seconds, parent_mb, worker_mb = map(float, done.stdout.split())
    return n_clips / seconds, parent_mb, worker_mb


def scaling(n_clips: int, repeats: int = 3) -> None:
    pairs = [(bulk_run(n_clips, 1), bulk_run(n_clips, 2)) for _ in range(repeats)]
    one, two = (np.median([pair[i][0] for pair in pairs]) for i in (0, 1))
    gain = np.median([b[0] / a[0] for a, b in pairs])
    print(f"\nBulk run, full, {n_clips} clips, started and ended:")
    print(f"  {one:.1f} clips/s with 1 worker, {two:.1f} with 2: {gain:.2f} x")
    parent_mb, worker_mb = (max(run[i] for pair in pairs for run in pair) for i in (1, 2))
    print(f"  memory: at most {worker_mb:.0f} MB a worker, {parent_mb:.0f} MB the parent")
    tenth = bulk_run(n_clips // 10, 2)
    print(f"  with a tenth of the clips: {tenth[2]:.0f} MB a worker, {tenth[1]:.0f} MB the parent")


def nothing_to_do(n_clips: int = 8_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FMA_NB_DATA"] = folder
        write_dataset(Path(folder) / "raw", n_clips, n_different=1)
        tree = spectrogram_dir("fma_small", "compact")
        from fma_nb.metadata import load_index
        from fma_nb.spectrogram import png_path

        for row in load_index("fma_small").tracks.itertuples():
            png = png_path(tree, row.split, row.genre, row.track_id)
            png.parent.mkdir(parents=True, exist_ok=True)
            png.touch()
        started = time.perf_counter()
        make_spectrograms("fma_small", "compact", progress=False)
        print(f"\nNothing to do on {n_clips} finished clips: {time.perf_counter() - started:.2f} s")


def projection(seconds: dict[str, float]) -> None:
    print("\nProjected hours at this machine's speed per core")
    for dataset, n_clips in DATASET_CLIPS.items():
        for preset in ("full", "compact"):
            hours = [f"{n_clips * seconds[preset] / cores / 3600:.2f} on {cores}" for cores in (2, 16, 64)]
            print(f"  {dataset:11} {preset:8} " + ", ".join(hours) + " cores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=Path, help="folder of real recordings to measure as well")
    parser.add_argument("--clips", type=int, default=600, help="clips of the bulk runs (default: 600)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of the ratios (default: 15)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generated = [Path(folder) / f"{i}.mp3" for i in range(4)]
        for i, clip in enumerate(generated):
            write_clip(clip, i)
        rate = np.mean([clip.stat().st_size * 8 / 30_000 for clip in generated])
        png = Path(folder) / "x.png"
        seconds = ratios(f"Generated clips, stereo, {rate:.0f} kbit/s", generated, options.repeats, png)
        print("Stages")
        stages(generated[0], options.repeats)
        if options.recordings:
            real = sorted(p for p in options.recordings.iterdir() if p.suffix in (".mp3", ".ogg"))
            few = max(3, options.repeats // 3)
            ratios("Real recordings as they are, mostly OGG", real, few, png)
            encoded = [Path(folder) / f"{p.stem}.mp3" for p in real]
            for recording, clip in zip(real, encoded, strict=True):
                encode_like_fma(recording, clip)
            ratios("The same as 30-s MP3s of 256 kbit/s", encoded, few, png)
    scaling(options.clips)
    nothing_to_do()
    projection(seconds)


if __name__ == "__main__":
    main()
