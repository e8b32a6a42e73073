# SPDX-License-Identifier: Apache-2.0
"""What a picture in an archive costs (`--image_folder zip://…::…`, `tar://…`), whatever else is in it.

    python benchmarks/archives.py --json FILE

Small pictures are written into a zip and a tar, and some of them are read in random order, one process and one thread:
each by itself from an archive that is opened for it, and all of them from one that stays open, as a run does. Nothing
of what was read is kept.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

from moellava.data import file_systems
from moellava.data.fetched import LIMIT
from moellava.data.media import MediaFiles
from moellava.data.records import Medium


def write(folder: Path, names: list[str]) -> None:
    """A zip and a tar of one picture under many names."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, "JPEG")
    with zipfile.ZipFile(folder / "all.zip", "w") as packed, tarfile.open(folder / "all.tar", "w") as taped:
        for name in names:
            packed.writestr(name, file.getvalue())
            entry = tarfile.TarInfo(name)
            entry.size = len(file.getvalue())
            taped.addfile(entry, io.BytesIO(file.getvalue()))


def measured(files: MediaFiles, media: list[Medium], opens_each: bool) -> float:
    """CPU milliseconds of a picture."""
    began = time.process_time()
    for medium in media:
        if opens_each:
            file_systems._held.cache_clear()
        files.read(medium)
    return (time.process_time() - began) / len(media) * 1000


def main() -> None:
    """Prints CPU milliseconds of a picture, both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--pictures", type=int, default=20_000, help="in an archive")
    parser.add_argument("--read", type=int, default=1000, help="of them")
    args = parser.parse_args()
    os.environ[LIMIT] = "0"
    names = [f"images/{number % 10}/{number:08d}.jpg" for number in range(args.pictures)]
    chosen = random.Random(0).choices(names, k=args.read)
    media = [Medium("image", name.removeprefix("images/")) for name in chosen]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), names)
        for archive in ("zip", "tar"):
            began = time.process_time()
            files = MediaFiles(f"{archive}://images::file://{folder}/all.{archive}")
            opening = (time.process_time() - began) * 1000
            ms = {"open": measured(files, media, False), "opened each time": measured(files, media[:5], True)}
            found.append({"archive": archive, "pictures": args.pictures, "opening": opening, "ms": ms})
            told = ", ".join(f"{way} {value:.2f} ms" for way, value in ms.items())
            print(f"{archive} of {args.pictures:,} pictures, opened in {opening:.0f} ms; a picture: {told}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
