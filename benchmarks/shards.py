# SPDX-License-Identifier: Apache-2.0
"""What pictures in shards cost beside the same pictures in files: room in the index, its first making, and an epoch.

    python benchmarks/shards.py --pictures 2000 --json FILE
    python benchmarks/shards.py --before ../older/checkout       # its figures beside ours

Pictures in JPEG, 80 KB each, are written as loose files, as a tar file, as Parquet (as `pyarrow` writes it, and in
row groups of 100, as the hub has it; packed by snappy), and as a folder of `datasets`. Each step is a fresh process.
Of an epoch in random order it tells the CPU time of reading each record and the size of its picture, which brings the
bytes and decodes nothing, and that of showing the picture: both without the imports, the smaller of two rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 2

GROUP = 100
"""Rows of a row group on the hub, where rows have pictures."""

WAYS = ("loose.json", "a.tar", "whole.parquet", "groups.parquet", "folder")


def jpeg(number: int) -> bytes:
    """A picture of about 80 KB."""
    from PIL import Image

    noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
    grain = np.random.default_rng(number + 10**6).integers(-12, 12, (480, 640, 3))
    pixels = np.asarray(Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)).astype(int) + grain
    written = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(written, "JPEG", quality=85)
    return written.getvalue()


def write(folder: Path, count: int) -> None:
    """The same records in all ways."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Noise."}]
    records = [{"id": str(number), "conversations": said} for number in range(count)]
    pictures = [jpeg(number) for number in range(count)]
    (folder / "images").mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, (record, picture) in enumerate(zip(records, pictures, strict=True)):
            (folder / "images" / f"{number:06d}.jpg").write_bytes(picture)
            for ending, content in (("json", json.dumps(record).encode()), ("jpg", picture)):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    loose = [record | {"image": f"{number:06d}.jpg"} for number, record in enumerate(records)]
    (folder / "loose.json").write_text(json.dumps(loose))
    rows = [record | {"image": {"bytes": one, "path": None}} for record, one in zip(records, pictures, strict=True)]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "whole.parquet")
    parquet.write_table(table, folder / "groups.parquet", row_group_size=GROUP)
    datasets.Dataset(table).save_to_disk(str(folder / "folder"))
    hour_ago = time.time() - 3600  # files that rest, as data do
    for path in [*folder.rglob("*")]:
        os.utime(path, (hour_ago, hour_ago))


def opened(path: str) -> tuple[Any, Any]:
    """The records of a data file, and where pictures lie."""
    from moellava.data import indexing
    from moellava.data.media import MediaFiles
    from moellava.data.records import load_records

    indexing.KEPT_FROM = 1
    files = MediaFiles(Path(path).parent / "images")
    began = time.process_time()
    records = load_records(path)
    opened.seconds = time.process_time() - began  # type: ignore[attr-defined]
    return records, files


def index(path: str) -> dict[str, float]:
    """The first index of a data file."""
    records, _ = opened(path)
    kept = Path(os.environ["MOELLAVA_CACHE"]) / "indexes"
    size = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    return {"index_s": opened.seconds, "index_mb": size / 1e6}  # type: ignore[attr-defined]


def epoch(path: str) -> dict[str, float]:
    """All records in random order."""
    from moellava.data.records import media_of

    records, files = opened(path)
    looks: dict[str, Callable[[Any], Any]] = {"read_s": files.size, "shown_s": files.read}
    found = dict.fromkeys(looks, float("inf"))
    for _ in range(ROUNDS):
        for name, look in looks.items():
            order = random.Random(0).sample(range(len(records)), len(records))
            began = time.process_time()
            for number in order:
                for medium in media_of(records[number]):
                    look(medium)
            found[name] = min(found[name], time.process_time() - began)
    return found


STEPS = {"index": index, "epoch": epoch}


def main() -> None:
    """Runs each step in a process of its own, and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--before", help="another checkout, whose figures stand beside those of this one")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--folder", help="where the generated files lie meanwhile (default: the system's)")
    parser.add_argument("--step", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(STEPS[args.step[0]](args.step[1])))
        return
    trees = {"now": Path(__file__).parent.parent} | ({"before": Path(args.before).resolve()} if args.before else {})
    found: dict[str, Any] = {"pictures": args.pictures}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder), args.pictures)
        found["pictures_mb"] = sum(file.stat().st_size for file in Path(folder, "images").iterdir()) / 1e6
        print(f"{args.pictures} pictures, {found['pictures_mb']:.0f} MB")
        for way in WAYS:
            for tree, root in trees.items():
                cache = {"MOELLAVA_CACHE": f"{folder}/{tree}-{way}", "PYTHONPATH": str(root)}
                told: dict[str, float] = {}
                for name in STEPS:
                    words = [sys.executable, __file__, "--step", name, f"{folder}/{way}"]
                    done = subprocess.run(words, env=os.environ | cache, check=True, stdout=subprocess.PIPE, text=True)
                    told |= json.loads(done.stdout.splitlines()[-1])
                found[f"{way}, {tree}"] = told
                print(f"{way}, {tree}: " + ", ".join(f"{key} {value:.2f}" for key, value in told.items()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
