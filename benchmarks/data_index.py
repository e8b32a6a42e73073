# SPDX-License-Identifier: Apache-2.0
"""What it costs to read a data set of any size: time and memory of its first index, of opening it, and of an epoch.

    python benchmarks/data_index.py --records 20000 --json FILE

A JSON list of records as LLaVA's instruction data has them (1.1 kB each, six turns, an image in six of seven) is
generated, and deleted in the end. Every step is a fresh process; memory is what it has beyond the same process with
all imports done and nothing read. For an epoch, eight forked workers read all records once, each an eighth in random
order; their memory is the sum over them and their parent of the proportional set size (PSS: a page that n processes
share counts a nth for each), after a tenth of the epoch and at its end. Beside it, in the same run: `json.load`, and
`datasets` where it is installed, each by itself. The steps about lengths make a data set as a run does before it
begins; at 665,000 records, leave them out by --only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WORKERS = 8

SENTENCE = (
    "the a an of in on with and is are there what where which who how many color red blue green small large left right "
    "cat dog man woman child street table window tree car sky grass water building sign plate bowl cup chair picture "
    "shows standing sitting holding looking wearing near behind front background appears scene image"
)


def generated(count: int) -> Iterator[dict[str, Any]]:
    """Records, the same for the same number of them."""
    draw, words = random.Random(0), SENTENCE.split()
    pool = [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(5000)]
    for number in range(count):
        turns = []
        for turn in range(3):
            question = pool[draw.randrange(5000)][:60] + "?"
            turns.append({"from": "human", "value": f"<image>\n{question}" if turn == 0 and number % 7 else question})
            turns.append({"from": "gpt", "value": pool[draw.randrange(5000)].capitalize() + f", {number}."})
        record = {"id": f"{number:09d}", "conversations": turns}
        yield record | {"image": f"coco/train2017/{number:012d}.jpg"} if number % 7 else record


def write(path: Path, count: int, with_lines: bool) -> None:
    """A JSON list of records, and beside it, where they are asked for, the same as JSON Lines."""
    with path.open("w", encoding="utf-8") as file, open(f"{path}l", "w", encoding="utf-8") as lines:
        for number, record in enumerate(generated(count)):
            text = json.dumps(record)
            file.write(("," if number else "[") + text + "\n")
            if with_lines:
                lines.write(text + "\n")
        file.write("]\n")


def peak_mb() -> float:
    """Most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def pss_mb(processes: list[int]) -> float:
    """Proportional set size of processes together, in MB."""
    total = 0
    for process in processes:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock and by the CPU, and memory beyond what was there before, at its most."""
    before, began, used = peak_mb(), time.perf_counter(), cpu_seconds()
    kept = work()
    found = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - used}
    del kept
    return found | {"peak_mb": peak_mb() - before}


def imports() -> None:
    """What a step has loaded before it is measured."""
    import pyarrow.compute  # noqa: F401
    import pyarrow.ipc  # noqa: F401
    import torch  # noqa: F401


def ours(path: str) -> dict[str, float]:
    """`load_records`: the first index of a file, or, when there is one, opening it."""
    imports()
    from moellava.data.records import load_records

    return measured(lambda: load_records(path))


def lengths(path: str) -> dict[str, float]:
    """A data set, as a run makes it before its first step: every record encoded and every file looked at, or, the
    second time, found again. The tokenizer is a small one."""
    imports()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from moellava.data.dataset import SupervisedDataset
    from moellava.data.encoder import CountedImages, Encoder
    from moellava.data.media import MediaFiles
    from moellava.data.records import load_records
    from moellava.data.render import TemplateRenderer
    from moellava.data.tokenizers import load_tokenizer
    from tests.tiny import write_tokenizer

    records, images = load_records(path), Path(path).parent / "images"
    if not images.exists():
        pictures(images, len(records))
    encoder = Encoder(
        load_tokenizer(write_tokenizer(Path(path).parent / "tokenizer")), TemplateRenderer("v1"), CountedImages(576)
    )
    return measured(lambda: SupervisedDataset(records, encoder, MediaFiles(images)))


def pictures(folder: Path, count: int) -> None:
    """An image for every record: links to one of 1,000 files."""
    from PIL import Image

    target = folder / "coco" / "train2017"
    target.mkdir(parents=True)
    for number in range(1000):
        Image.effect_noise((336, 336), 50 + number % 100).save(folder / f"{number}.jpg")
    for number in range(count):
        os.symlink(f"../../{number % 1000}.jpg", target / f"{number:012d}.jpg")


def by_json(path: str) -> dict[str, float]:
    """`json.load`, as each process of LLaVA does it."""

    def load() -> Any:
        with open(path, encoding="utf-8") as file:
            return json.load(file)

    return measured(load)


def by_datasets(path: str) -> dict[str, float]:
    """`datasets.load_dataset`, from JSON Lines, which it reads best."""
    import datasets

    datasets.disable_progress_bars()
    return measured(lambda: datasets.load_dataset("json", data_files=path + "l", cache_dir=path + ".hf")["train"])


def forked(work: Callable[[int, Any, Any], None]) -> tuple[list[int], list[Any], list[Any]]:
    """Workers, with a pipe to each and one from each."""
    pids, tell, hear = [], [], []
    for number in range(WORKERS):
        (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
        if (pid := os.fork()) == 0:
            work(number, their_in, their_out)
            os._exit(0)
        pids.append(pid)
        tell.append(our_out)
        hear.append(our_in)
    return pids, tell, hear


def ended(pids: list[int], tell: list[Any]) -> None:
    """Lets workers end."""
    for pipe in tell:
        os.write(pipe, b"x")
    for pid in pids:
        os.waitpid(pid, 0)


def waiting(pids: list[int], hear: list[Any]) -> float:
    """Memory of workers and parent once all workers have come to a point."""
    for pipe in hear:
        os.read(pipe, 1)
    return pss_mb([os.getpid(), *pids])


def epoch(path: str) -> dict[str, float]:
    """Memory of eight workers while they read all records once."""
    imports()
    from moellava.data.records import load_records

    def idle(number: int, told: Any, said: Any) -> None:
        os.write(said, b"x")
        os.read(told, 1)

    pids, tell, hear = forked(idle)
    before = waiting(pids, hear)
    ended(pids, tell)
    records = load_records(path)

    def read(number: int, told: Any, said: Any) -> None:
        mine = np.random.default_rng(number).permutation(np.arange(number, len(records), WORKERS, dtype=np.int32))
        for place, index in enumerate(mine):
            records[int(index)]
            if place == len(mine) // 10:
                os.write(said, b"x")
                os.read(told, 1)
        os.write(said, b"x")
        os.read(told, 1)

    began = time.perf_counter()
    pids, tell, hear = forked(read)
    early = waiting(pids, hear)
    for pipe in tell:
        os.write(pipe, b"x")
    late = waiting(pids, hear)
    seconds = time.perf_counter() - began
    ended(pids, tell)
    return {"seconds": seconds, "over_mb": late - before, "growth_mb": late - early}


STEPS: dict[str, Callable[[str], dict[str, float]]] = {
    "first index": ours,
    "opening": ours,
    "an epoch, 8 workers": epoch,
    "lengths, first": lengths,
    "lengths, again": lengths,
    "json.load": by_json,
    "datasets, first": by_datasets,
    "datasets, opening": by_datasets,
}


def main() -> None:
    """Runs each step in a process of its own, and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20000)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--folder", help="where the generated files lie meanwhile (default: the system's)")
    parser.add_argument("--only", nargs="+", choices=STEPS, help="steps to run (default: all)")
    parser.add_argument("--step", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(STEPS[args.step[0]](args.step[1])))
        return
    found: dict[str, Any] = {"records": args.records}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "records.json"
        write(path, args.records, any("datasets" in name for name in args.only or STEPS))
        found["file_mb"] = path.stat().st_size / 2**20
        hour_ago = time.time() - 3600  # a file that rests, as data does
        os.utime(path, (hour_ago, hour_ago))
        environment = os.environ | {"MOELLAVA_CACHE": f"{folder}/cache", "HF_HOME": f"{folder}/hf"}
        for name in args.only or STEPS:
            words = [sys.executable, __file__, "--step", name, str(path)]
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
                continue
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found[name].items()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
