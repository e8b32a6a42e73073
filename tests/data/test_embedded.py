# SPDX-License-Identifier: Apache-2.0
"""Images that a record holds itself: read like files, named when they are broken."""

from __future__ import annotations

import base64
import json
import shutil

import pytest

from moellava.data.dataset import SupervisedDataset
from moellava.data.embedded import Embedded, content_of, data_uri, file_name, is_embedded, mime_of
from moellava.data.encoder import CountedImages, Encoder
from moellava.data.media import MediaFiles
from moellava.data.records import Medium, load_records
from moellava.data.render import TemplateRenderer
from moellava.errors import DataError
from tests.tiny import record


def test_a_data_uri_holds_what_was_put_into_it(pictures):
    content = pictures[0].read_bytes()
    uri = data_uri(content)
    assert uri.startswith("data:image/png;base64,") and is_embedded(uri) and content_of(uri) == content
    assert content_of(uri.rstrip("=")) == content_of(uri.replace("data:", "DATA:")) == content
    head, _, packed = uri.partition(",")
    assert content_of(f"{head},{packed[:40]}\n {packed[40:]}") == content, "line breaks, as MIME has them"
    assert content_of("data:text/plain,a%20b") == b"a b"
    assert not is_embedded("data/0.png") and not is_embedded(pictures[0])


@pytest.mark.parametrize(
    ("begin", "mime", "ending"),
    [
        (b"\x89PNG\r\n", "image/png", ".png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg", ".jpg"),
        (b"RIFF\0\0\0\0WEBP", "image/webp", ".webp"),
        (b"RIFF\0\0\0\0AVI ", "video/x-msvideo", ".avi"),
        (b"\0\0\0\x20ftypisom", "video/mp4", ".mp4"),
        (b"\0\0\0\x20ftypavif", "image/avif", ".avif"),
        (b"", "application/octet-stream", ".bin"),
    ],
)
def test_a_file_is_told_by_its_first_bytes(begin, mime, ending):
    assert mime_of(begin) == mime and file_name(begin).endswith(ending)
    assert str(Embedded(begin)) == f"the embedded {mime} of {len(begin)} bytes"


@pytest.fixture
def encoder(tokenizers) -> Encoder:
    return Encoder(tokenizers["phi"], TemplateRenderer("v1"), CountedImages(4))


def test_training_reads_embedded_images_and_files_side_by_side(pictures, data_file, encoder):
    bare = base64.b64encode(pictures[1].read_bytes()).decode()
    rows = [
        record("both", "<image><image>", "a", image=[data_uri(pictures[0].read_bytes()), pictures[2].name]),
        record("bare", "<image>", "a", image=bare),
    ]
    dataset = SupervisedDataset(load_records(data_file(rows)), encoder, MediaFiles(pictures[0].parent))
    sizes = [[image.size for image in dataset[index]["media"]] for index in range(2)]
    assert sizes == [[(40, 24), (40, 40)], [(40, 32)]]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("data:image/png;base64,@@@", "is not valid base64"),
        ("data:image/png;base64,AAAA", "the embedded application/octet-stream of 3 bytes"),
        ("data:image/png;base64,", "the embedded"),
        ("data:nonsense", "has no head like data:image/png"),
    ],
)
def test_what_is_broken_is_told_with_its_record(uri, said, data_file, encoder):
    with pytest.raises(DataError, match=f"Record x of .*{said}"):
        SupervisedDataset(load_records(data_file([record("x", "<image>", "a", image=uri)])), encoder)


def test_a_cut_image_is_found(pictures, data_file, encoder):
    uri = data_uri(pictures[0].read_bytes()[:200])
    with pytest.raises(DataError, match="Record x of .*the embedded image/png of 200 bytes") as error:
        SupervisedDataset(load_records(data_file([record("x", "<image>", "a", image=uri)])), encoder)
    assert len(str(error.value)) < 400


def test_an_embedded_video_asks_for_a_file(data_file, encoder):
    uri = data_uri(b"\0\0\0\x20ftypisom")
    with pytest.raises(DataError, match="Record x of .*an embedded video lies in no file.*convert-data"):
        SupervisedDataset(load_records(data_file([record("x", "<video>", "a", video=uri)])), encoder)


def test_a_pipe_in_place_of_an_image_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.png")
    files = MediaFiles(tmp_path)
    said = {"a.png": "is a pipe", ".": "is a folder", "x" * 300 + ".png": "File name too long", "a\0.png": "null"}
    for name, words in said.items():
        for modality in ("image", "video"):
            assert words in str(files.problem(Medium(modality, name)))


def test_the_memory_of_records_grows_with_their_images_and_no_more(pictures, tmp_path):
    shutil.copy(pictures[0], tmp_path / "0.png")
    uri = data_uri((tmp_path / "0.png").read_bytes())
    (tmp_path / "a.json").write_text(json.dumps([record(n, "<image>", "a", image=uri) for n in range(50)]))
    assert load_records(tmp_path / "a.json").nbytes < 1.1 * 50 * (len(uri) + 150)
