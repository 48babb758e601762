"""Stage 1: what FMA's ``tracks.csv`` says, and what happens when it says something else."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import (
    TRACKS_COLUMNS,
    assert_one_sentence,
    mp3_path,
    tiny_rows,
    track_row,
    tracks_csv_text,
    write_tracks_csv,
)

from fma_nb.metadata import (
    ERRATA,
    GENRES,
    INDEX_COLUMNS,
    artist_groups,
    artists_known,
    check_artists,
    check_index,
    dataset_rows,
    load_index,
    read_tracks,
)
from fma_nb.project import FmaNbError

SUBSETS = {
    "fma_small": {"small"},
    "fma_medium": {"small", "medium"},
    "fma_large": {"small", "medium", "large"},
}


@pytest.fixture
def data(project: Path, tiny_data: Path) -> Path:
    """A copy of the tiny dataset that a test may damage."""
    shutil.copytree(tiny_data, project / "data")
    return project / "data"


def tracks_csv(data: Path) -> Path:
    return data / "raw" / "fma_metadata" / "tracks.csv"


def real_rows(real: Path) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """Columns and rows of the real ``tracks.csv``, read without pandas."""
    with (real / "fma_metadata_head" / "tracks.csv").open(newline="", encoding="utf-8") as file:
        groups, names, _, *rows = csv.reader(file)
    return list(zip(groups[1:], names[1:], strict=True)), rows


def test_real_tracks_are_read_whole(real: Path) -> None:
    columns, rows = real_rows(real)
    tracks = read_tracks(real / "fma_metadata_head" / "tracks.csv")

    assert columns == TRACKS_COLUMNS
    assert list(tracks.columns) == TRACKS_COLUMNS
    assert len(tracks) == 682
    assert list(tracks.index) == [int(row[0]) for row in rows]
    for column in [("artist", "bio"), ("album", "information"), ("track", "title"), ("set", "split")]:
        expected = [row[1 + columns.index(column)] for row in rows]
        assert tracks[column].fillna("").tolist() == expected
    assert tracks["artist", "bio"].str.contains("\n").sum() > 10
    assert tracks["artist", "bio"].str.contains('"', regex=False).sum() > 10


@pytest.mark.parametrize("dataset", SUBSETS)
def test_real_subsets_match_a_plain_reading(real: Path, dataset: str) -> None:
    columns, rows = real_rows(real)
    subset, genre = (1 + columns.index(c) for c in [("set", "subset"), ("track", "genre_top")])
    expected = {int(row[0]): row[genre] for row in rows if row[subset] in SUBSETS[dataset] and row[genre]}

    found = dataset_rows(read_tracks(real / "fma_metadata_head" / "tracks.csv"), dataset)

    assert dict(zip(found["track_id"], found["genre"], strict=True)) == expected
    assert list(found["track_id"]) == sorted(expected)


def test_real_splits_are_the_official_ones(real: Path) -> None:
    official = pd.read_csv(real / "fma_small_128x128" / "tracks.csv", index_col="track_id")
    rows = dataset_rows(read_tracks(real / "fma_metadata_head" / "tracks.csv"), "fma_small")
    there = official.loc[rows["track_id"]]

    assert len(rows) == 58
    names = {"train": "training", "val": "validation", "test": "test"}
    assert rows["split"].map(names).tolist() == there["split"].tolist()
    assert rows["genre"].tolist() == there["genre_top"].tolist()
    assert rows["title"].tolist() == there["title"].tolist()
    check_artists(rows)


def test_index_of_a_dataset(data: Path) -> None:
    index = load_index("fma_small")

    assert list(index.tracks.columns) == INDEX_COLUMNS
    assert index.tracks["track_id"].tolist() == [row["track_id"] for row in tiny_rows()]
    assert index.tracks["split"].value_counts().to_dict() == {"train": 24, "val": 8, "test": 8}
    assert set(index.tracks["genre"]) == set(GENRES)
    assert index.tracks["path"].tolist() == [
        str(mp3_path(data, track_id)) for track_id in index.tracks["track_id"]
    ]
    assert index.tracks["title"].iloc[0] == "Song, no. 2"
    assert index.dropped.empty
    assert index.summary() == "40 tracks, 0 dropped"


def test_broken_clips_are_dropped_and_told(data: Path) -> None:
    errata = [track_row(track_id, "Rock", "training") for track_id in ERRATA]
    write_tracks_csv(tracks_csv(data), tiny_rows() + errata)
    for track_id in ERRATA[:3]:  # dropped by id, whether or not the file is there
        path = mp3_path(data, track_id)
        path.parent.mkdir(exist_ok=True)
        shutil.copy(mp3_path(data, 2), path)
    missing, empty = (row["track_id"] for row in tiny_rows()[:2])
    mp3_path(data, missing).unlink()
    mp3_path(data, empty).write_bytes(b"")

    index = load_index("fma_small")

    reasons = dict(zip(index.dropped["track_id"], index.dropped["reason"], strict=True))
    assert reasons == dict.fromkeys(ERRATA, "on FMA's list of broken clips") | {
        missing: "file missing",
        empty: "file empty",
    }
    assert not set(index.tracks["track_id"]) & set(reasons)
    assert index.dropped["path"].iloc[0] == str(mp3_path(data, missing))
    assert index.summary().startswith("38 tracks, 8 dropped; 6 on FMA's list of broken clips")
    assert "1 file missing" in index.summary()


def test_subsets_are_nested(project: Path) -> None:
    path = write_tracks_csv(
        project / "tracks.csv",
        [
            track_row(3, "Rock", subset="large"),
            track_row(2, "Rock", subset="medium"),
            track_row(1, "Pop", subset="small", split="validation"),
            track_row(4, "", subset="large"),  # without a top genre, as only fma_large has
            track_row(5, "Folk", subset="small", split="test"),
        ],
    )
    tracks = read_tracks(path)
    ids = {name: dataset_rows(tracks, name)["track_id"].tolist() for name in SUBSETS}
    assert ids == {"fma_small": [1, 5], "fma_medium": [1, 2, 5], "fma_large": [1, 2, 3, 5]}
    assert dataset_rows(tracks, "fma_small")["split"].tolist() == ["val", "test"]


def test_windows_line_ends_and_byte_order_mark(project: Path) -> None:
    plain = write_tracks_csv(project / "tracks.csv", tiny_rows())
    windows = project / "windows.csv"
    windows.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))

    expected = dataset_rows(read_tracks(plain), "fma_small")
    pd.testing.assert_frame_equal(dataset_rows(read_tracks(windows), "fma_small"), expected)


def test_an_empty_title_is_no_damage(project: Path) -> None:
    rows = [track_row(1, "Rock", title=""), track_row(2, "Rock", title="N/A?")]
    read = dataset_rows(read_tracks(write_tracks_csv(project / "tracks.csv", rows)), "fma_small")
    assert read["title"].tolist() == ["", "N/A?"]


def replace_row(position: int, **changes: object) -> Callable[[], str]:
    """The tiny ``tracks.csv`` with one row changed: keys are ``group_name``."""

    def text() -> str:
        rows = tiny_rows()
        for key, value in changes.items():
            column = key if key == "track_id" else tuple(key.split("_", 1))
            rows[position][column] = value
        return tracks_csv_text(rows)

    return text


DAMAGES: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "no header rows": (
        lambda: "".join(tracks_csv_text(tiny_rows()).splitlines(keepends=True)[3:]),
        ("tracks.csv", "header"),
    ),
    "one header row": (
        lambda: "track_id,genre_top,split,title\n2,Hip-Hop,training,Food\n",
        ("tracks.csv", "header"),
    ),
    "missing column": (
        lambda: tracks_csv_text(tiny_rows(), [c for c in TRACKS_COLUMNS if c != ("track", "genre_top")]),
        ("tracks.csv", "track.genre_top"),
    ),
    "empty file": (lambda: "", ("tracks.csv",)),
    "web page": (lambda: "<html>\n<body>404, not found</body>\n</html>\n", ("tracks.csv",)),
    "track twice": (replace_row(7, track_id=2), ("tracks.csv", "track 2")),
    "track_id no number": (replace_row(7, track_id="seven"), ("tracks.csv", "track_id")),
    "artist id no number": (replace_row(7, artist_id="somebody"), ("tracks.csv", "artist")),
    "no subset": (replace_row(7, set_subset=""), ("tracks.csv", "track 961")),
    "unknown split": (replace_row(7, set_split="dev"), ("tracks.csv", "'dev'", "validation")),
    "unknown genre": (replace_row(7, track_genre_top="Polka"), ("fma_small", "'Polka'", "Hip-Hop")),
    "artist in two splits": (replace_row(3, artist_id=2), ("tracks.csv", "artist 2 ")),
    "genre without test": (
        lambda: tracks_csv_text([r for i, r in enumerate(tiny_rows()) if i != 4]),
        ("fma_small", "'test'", "'Electronic'"),
    ),
    "no row of the subset": (
        lambda: tracks_csv_text([row | {("set", "subset"): "large"} for row in tiny_rows()]),
        ("tracks.csv", "fma_small"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metadata_is_one_clear_sentence(data: Path, damage: str) -> None:
    text, names = DAMAGES[damage]
    tracks_csv(data).write_text(text())
    with pytest.raises(FmaNbError) as caught:
        load_index("fma_small")
    assert_one_sentence(caught.value, *names)


def test_a_file_that_is_no_text_is_refused(data: Path) -> None:
    shutil.copy(mp3_path(data, 2), tracks_csv(data))
    with pytest.raises(FmaNbError) as caught:
        load_index("fma_small")
    assert_one_sentence(caught.value, tracks_csv(data))


def test_a_cut_anywhere_in_a_row_is_noticed(project: Path) -> None:
    whole = tracks_csv_text(tiny_rows()[:6]).encode()
    path = project / "tracks.csv"
    last_row = len(tracks_csv_text(tiny_rows()[:5]).encode())
    accepted = []
    for end in range(last_row + 1, len(whole)):
        path.write_bytes(whole[:end])
        try:
            read_tracks(path)
            accepted.append(whole[last_row:end])
        except FmaNbError as error:
            assert_one_sentence(error, path)
    assert accepted == []
    path.write_bytes(whole)
    assert len(read_tracks(path)) == 6


def test_what_is_missing_is_named_with_the_way_to_get_it(data: Path) -> None:
    shutil.rmtree(data / "raw" / "fma_small")
    with pytest.raises(FmaNbError, match=r"none of its 40 MP3s is there.*fma-nb download metadata small"):
        load_index("fma_small")
    tracks_csv(data).unlink()
    with pytest.raises(FmaNbError) as caught:
        load_index("fma_small")
    assert_one_sentence(caught.value, tracks_csv(data), "fma-nb download metadata small")
    with pytest.raises(FmaNbError, match=r"fma_mini_metadata.*fma-nb mini"):
        load_index("fma_mini")
    with pytest.raises(FmaNbError, match=r"fma_tiny.*fma_mini, fma_small"):
        load_index("fma_tiny")


def test_missing_files_may_not_empty_a_genre_silently(data: Path) -> None:
    val_of_folk = next(
        row["track_id"]
        for row in tiny_rows()
        if row["track", "genre_top"] == "Folk" and row["set", "split"] == "validation"
    )
    mp3_path(data, val_of_folk).unlink()
    with pytest.raises(FmaNbError, match="split 'val' has no track of genre 'Folk'"):
        load_index("fma_small")


def test_genres_outside_the_eight_belong_to_larger_sets(project: Path) -> None:
    rows = [
        track_row(i, genre, split)
        for i, (genre, split) in enumerate(
            (g, s) for g in ("Old-Time / Historic", "Rock") for s in ("training", "validation", "test")
        )
    ]
    tracks = read_tracks(write_tracks_csv(project / "tracks.csv", rows))
    found = dataset_rows(tracks, "fma_medium")
    check_index(found, "fma_medium")
    assert set(found["genre"]) == {"Old-Time-Historic", "Rock"}  # no folder within a folder
    with pytest.raises(FmaNbError, match="Old-Time-Historic"):
        check_index(found, "fma_small")
    with pytest.raises(FmaNbError, match="track 0 stands in the index twice"):
        check_index(pd.concat([found, found.head(1).assign(title="another")]), "fma_medium")


# ----- artists -----


def test_groups_are_artists_where_they_are_known(project: Path) -> None:
    write_tracks_csv(
        project / "data" / "raw" / "fma_metadata" / "tracks.csv",
        [track_row(2, "Rock", artist_id=70), track_row(5, "Rock", artist_id=70), track_row(9, "Pop")],
    )
    assert artists_known("fma_small")
    assert artist_groups("fma_small", [5, 9, 2]) == [70, 9, 70]
    # A track that the metadata does not have stays a group of its own, whatever the artists' ids.
    with_unknown = artist_groups("fma_small", [70, 2, 9, 71])
    assert len(set(with_unknown)) == 4
