# SPDX-License-Identifier: Apache-2.0
"""Random records in random dialects, keys and wrappings, many of them damaged: read faithfully, or refused by name.

A record that is read has lost nothing: every text in it is in the rendered prompt, or is the path of what it shows, or
stands under a key that is known to mean nothing or was reported. That is checked leaf by leaf on the record as it was
written, by code that knows nothing of how records are read.
"""

from __future__ import annotations

import base64
import copy
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from moellava.constants import IGNORE_INDEX
from moellava.conversation import Origin
from moellava.data.encoder import CountedImages, Encoder
from moellava.data.record_keys import KEYS, TURN_KEYS, Meaning, TurnMeaning
from moellava.data.records import Records, media_of, read_records, trained_answers
from moellava.data.render import TemplateRenderer
from moellava.data.render.chat import ChatRenderer
from moellava.data.tokenizers import load_tokenizer
from moellava.errors import DataError
from tests.archives import unpack
from tests.attacks.outcome import Outcome

TOKENIZERS = Path(__file__).parents[1] / "golden" / "tokenizers"

ALL, QUICK = 5000, 300

PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0\x1f\x15\xc4\x89\0\0\0\nIDATx\x9cc\0\1\0\0\5\0\1"
    b"\r\n-\xb4\0\0\0\0IEND\xaeB`\x82"
).decode()

WORDS = [
    "cat",
    "naïve",
    "🐱",
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "USER:",
    "\n",
    "  ",
    "<image",
    "{{ x }}",
    "\t",
    "日本",
]
PATHS = ["a.png", "sub/b.jpg", "ü ü.webp", f"data:image/png;base64,{PNG}"]
ASKS, ANSWERS = ("human", "user", "User"), ("gpt", "assistant", "model")
JUNK: list[Any] = [None, "", 0, 1, -1, 0.5, True, False, [], {}, "x", ["x"], {"x": 1}, [[]], [None], 10**30]
HARMLESS = {key for key, meaning in KEYS.items() if meaning is Meaning.NOTE} | {
    key for key, meaning in TURN_KEYS.items() if meaning is TurnMeaning.NOTE
}
NAMES = {"from", "role", "type"}

IN_PARTS = """{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.content is string -%}{{ m.content }}
{%- else -%}{%- for part in m.content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}
{{- '[' + part.type + ']' }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
"""A chat template that keeps every character, as Qwen2-VL's does."""


class Generator:
    """Records from a seed, each with what is done to it."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def text(self, longest: int = 6) -> str:
        """A few words, hostile ones among them."""
        return " ".join(self.random.choices(WORDS, k=self.random.randint(0, longest)))

    def record(self, number: int) -> dict[str, Any]:
        """A sound record in one of the dialects."""
        dialect = self.random.choice([self.llava, self.messages, self.parts, self.pairs, self.tools])
        record = dialect()
        if self.random.random() < 0.9:
            record["id"] = self.random.choice([f"r{number}", number])
        if self.random.random() < 0.3:
            record[self.random.choice(["source", "score", "my_note"])] = self.text()
        opens = record.get("messages", [{}])[0].get("role")
        if self.random.random() < 0.2 and opens != "system":
            record[self.random.choice(["system", "system_prompt"])] = "Be brief. " + self.text()
        return record

    def llava(self) -> dict[str, Any]:
        """LLaVA's layout; the images under any of their names."""
        shown = self.random.choices(PATHS, k=self.random.choice([0, 0, 1, 1, 2, 3]))
        turns = self.turns("from", "value", self.random.randint(1, 3))
        for _ in shown:
            turn = self.random.choice(turns[::2])
            place = self.random.choice([0, len(turn["value"])])
            turn["value"] = turn["value"][:place] + self.random.choice(["<image>", "<image>\n", "\n<image>"]) + (
                turn["value"][place:]
            )  # fmt: skip
        if not shown and self.random.random() < 0.2:
            turns[0]["value"] += " the <video> tag, or <image>"
        single = len(shown) == 1 and self.random.random() < 0.5
        key = self.random.choice(["image", "images", "image_path"])
        return {"conversations": turns} | ({key: shown[0] if single else shown} if shown else {})

    def messages(self) -> dict[str, Any]:
        """Messages with role and content, after a system turn."""
        system = [{"role": "system", "content": "You see. " + self.text()}] if self.random.random() < 0.3 else []
        turns = self.turns("role", "content", self.random.randint(1, 3))
        if self.random.random() < 0.3:
            turns[-1][self.random.choice(["loss", "weight", "train"])] = self.random.choice([0, 1, True])
        return {"messages": [*system, *turns]}

    def parts(self) -> dict[str, Any]:
        """OpenAI's and Hugging Face's lists of parts."""
        turns = self.turns("role", "content", self.random.randint(1, 2))
        for turn in turns[::2]:
            parts: list[dict[str, Any]] = [{"type": "text", "text": turn["content"]}]
            for _ in range(self.random.randint(0, 2)):
                path = self.random.choice(PATHS)
                part: dict[str, Any] = self.random.choice(
                    [
                        {"type": "image", "image": path},
                        {"type": "image_url", "image_url": {"url": path}},
                        {"type": "image", "image": {"bytes": None, "path": path}},
                    ]
                )
                parts.insert(self.random.randint(0, len(parts)), part)
            turn["content"] = parts
        return {"messages": turns}

    def pairs(self) -> dict[str, Any]:
        """The Cauldron's rows of question and answer, without tags."""
        texts = [{"user": self.text(), "assistant": self.text()} for _ in range(self.random.randint(1, 2))]
        return {"images": [self.random.choice(PATHS)], "texts": texts}

    def tools(self) -> dict[str, Any]:
        """A call of a tool and what it gives."""
        call = {"function": {"name": "look", "arguments": json.dumps({"where": self.text()})}, "type": "function"}
        return {
            "messages": [
                {"role": "user", "content": self.text()},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "it is " + self.text(), "tool_call_id": "c1"},
                {"role": "assistant", "content": "so " + self.text()},
            ]
        }

    def turns(self, who: str, text: str, rounds: int) -> list[dict[str, Any]]:
        """Rounds of question and answer."""
        ask, answer = self.random.choice(ASKS), self.random.choice(ANSWERS)
        return [{who: answer if n % 2 else ask, text: self.text()} for n in range(2 * rounds)]

    def damaged(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with one to three things in it changed, added or taken away."""
        record = copy.deepcopy(record)
        for _ in range(self.random.randint(1, 3)):
            holders = [node for node in nodes(record) if node]
            if not holders:
                break
            holder = self.random.choice(holders)
            key: Any = self.random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            change = self.random.randrange(8)
            if change == 0:
                del holder[key]
            elif change == 1:
                holder[key] = copy.deepcopy(self.random.choice(JUNK))
            elif change == 2 and isinstance(holder, dict):
                holder[self.random.choice([*KEYS, *TURN_KEYS, "photo", "caption"])] = self.text() or "said"
            elif change == 3 and isinstance(holder, dict):
                holder[self.random.choice(["photo", "extra_turns", "x"])] = self.random.choice(
                    ["c.png", [{"role": "user", "content": "lost"}], ["d.mp4"], {"path": "e.jpg"}]
                )
            elif change == 4 and isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            elif change == 5 and isinstance(holder, list):
                self.random.shuffle(holder)
            elif change == 6:
                holder[key] = "half \ud83d pair" if isinstance(holder[key], str) else holder[key]
            else:
                holder[key] = nest(holder[key], self.random.choice([1, 2, 70, 150]))
        return record

    def write(self, record: dict[str, Any], folder: Path, number: int) -> tuple[Path, bool]:
        """Writes the record into a file of its own; whether the bytes were damaged afterwards."""
        ways: list[Callable[[], tuple[str, bytes]]] = [
            lambda: (".json", json.dumps([record]).encode()),
            lambda: (".json", json.dumps([record], ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")),
            lambda: (".jsonl", json.dumps(record).encode() + b"\n"),
            lambda: (".jsonl", json.dumps([record]).encode()),
            lambda: (".jsonl", json.dumps(record, indent=2).encode()),
            lambda: (".jsonl.gz", gzip.compress(json.dumps(record).encode())),
            lambda: (".json", b"\xef\xbb\xbf" + json.dumps([record]).encode()),
            lambda: (".json", json.dumps([record]).encode("utf-16")),
        ]
        ending, content = self.random.choice(ways)()
        path = folder / f"{number}{ending}"
        if self.random.random() < 0.04 and write_parquet(record, path.with_suffix(".parquet")):
            return path.with_suffix(".parquet"), False
        spoilt = self.random.random() < 0.1
        if spoilt:
            place = self.random.randrange(len(content))
            flipped = content[:place] + bytes([content[place] ^ 1 << self.random.randrange(8)]) + content[place + 1 :]
            content = self.random.choice([content[:place], flipped])
        path.write_bytes(content)
        return path, spoilt


def nodes(value: Any) -> list[Any]:
    """All lists and objects in a value, however deep they lie."""
    found, waiting = [], [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            found.append(node)
            waiting += node.values() if isinstance(node, dict) else node
    return found


def nest(value: Any, depth: int) -> Any:
    """A value in so many lists."""
    for _ in range(depth):
        value = [value]
    return value


def write_parquet(record: dict[str, Any], path: Path) -> bool:
    """Whether a record could be written as a table; one of mixed types, or with empty objects, cannot."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.Table.from_pylist([record]), path)
    except (pa.ArrowException, UnicodeEncodeError, RecursionError, OverflowError):
        return False
    return True


def leaves(value: Any, exempt: frozenset[str]) -> Iterator[str]:
    """The texts in a record that say something, without those under keys that are exempt. What a tool is called with
    is as JSON writes it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "arguments":
                said = leaves(as_json(inner) if isinstance(inner, str) else inner, frozenset())
                yield from (json.dumps(text, ensure_ascii=False)[1:-1] for text in said)
            elif name not in exempt:
                yield from leaves(inner, exempt)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, exempt)
    elif isinstance(value, str) and value:
        yield value


def as_json(text: str) -> Any:
    """What a text says in JSON; itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class Attack:
    """Reads what the generator writes, and keeps count.

    Args:
        tokenizer: a fast one with ChatML's special tokens or without.
    """

    def __init__(self, tokenizer: Any):
        self.encoder = Encoder(tokenizer, TemplateRenderer("v1"), CountedImages(4))
        self.in_parts = ChatRenderer(tokenizer, IN_PARTS, in_parts=True)
        self.counts: Counter[str] = Counter()

    def run(self, count: int, folder: Path, seed: int = 0) -> Counter[str]:
        """Reads `count` records. Raises AssertionError, naming the file, for the first that is lost or misread."""
        generator = Generator(seed)
        for number in range(count):
            record = generator.record(number)
            is_sound = generator.random.random() < 0.4
            record = record if is_sound else generator.damaged(record)
            path, spoilt = generator.write(record, folder, number)
            try:
                self.one(record, path, is_sound, spoilt)
            except Exception as error:
                raise AssertionError(f"record {number} (seed {seed}), {path}: {record!r:.2000}") from error
        return self.counts

    def one(self, record: dict[str, Any], path: Path, is_sound: bool, spoilt: bool) -> None:
        """Reads one file and judges what came of it."""
        records, problems = read_records(path)
        assert len(records) + len(problems) == 1 or spoilt, problems
        for problem in problems:
            assert str(path) in problem.text, f"not named: {problem}"
            assert problem.text.isprintable(), problem.text
            assert spoilt or not is_sound, f"a sound record is refused: {problem}"
        self.counts["refused"] += bool(problems)
        for index in range(len(records)):
            self._read(records, index, None if spoilt else record)

    def _read(self, records: Records, index: int, written: dict[str, Any] | None) -> None:
        record, name = records[index], records.name(index)
        renderings = []
        for pieces in (self._in_tags, self._in_parts):
            try:
                renderings.append(pieces(record, name))
            except DataError as error:
                assert name in str(error), error
                self.counts["refused by a template"] += 1
        self.counts["read"] += 1
        if written is None:
            return
        for rendered in renderings:
            for text in self._said(records, record, written):
                assert text in rendered, f"{text!r} is not in {rendered!r}"

    def _in_tags(self, record: dict[str, Any], name: str) -> str:
        example = self.encoder.encode(record, name)
        assert len(example.media) == len(media_of(record))
        runs = [trained for trained, _ in groupby(example.labels, lambda label: label != IGNORE_INDEX) if trained]
        assert len(runs) == sum(trained_answers(record["conversations"]))
        return "".join(piece.text for piece in self.encoder.pieces(record, name))

    def _in_parts(self, record: dict[str, Any], name: str) -> str:
        shown = media_of(record)
        given = {"has_media": bool(shown), "system": record.get("system_prompt")}
        pieces = self.in_parts.pieces(record["conversations"], name=name, **given)
        template = "".join(piece.text for piece in pieces if piece.origin is Origin.TEMPLATE)
        assert template.count("[image]") + template.count("[video]") == len(shown)
        return "".join(piece.text for piece in pieces)

    def _said(self, records: Records, record: dict[str, Any], written: dict[str, Any]) -> Iterator[str]:
        """The texts that a prompt must hold: those of the record, without its media and what is reported."""
        reported = {key for notice in records.notices for key in notice.split("'")[1::2]}
        assert reported <= {"my_note", "caption", "x", "photo", "extra_turns", *written, *_turn_keys(written)}
        paths = {medium.path for medium in media_of(record)}
        for text in leaves(_without_leading_answer(written), frozenset(HARMLESS | NAMES | reported)):
            if text in paths:
                continue
            if not paths:
                yield text
            for segment in text.replace("<video>", "<image>").split("<image>") if paths else ():
                yield segment.strip("\n")


def _turn_keys(record: dict[str, Any]) -> set[str]:
    return {key for node in nodes(record) if isinstance(node, dict) for key in node}


def _without_leading_answer(record: dict[str, Any]) -> dict[str, Any]:
    """The record without an answer that no question leads to, which is left out as LLaVA does."""
    record = copy.deepcopy(record)
    for key, value in record.items():
        if KEYS.get(key) is Meaning.TURNS and isinstance(value, list):
            first = next((n for n, turn in enumerate(value) if not _is_from(turn, ("system", "developer"))), None)
            if first is not None and _is_from(value[first], ANSWERS):
                del value[first]
    return record


def _is_from(turn: Any, names: tuple[str, ...]) -> bool:
    return isinstance(turn, dict) and str(turn.get("from") or turn.get("role")).lower() in names


def attacks(everything: bool, folder: Path) -> dict[str, Outcome]:
    """Random records."""
    unpack(TOKENIZERS / "phi.tar.xz", folder)
    attack = Attack(load_tokenizer(folder / "phi"))
    outcome = Outcome(attack.counts)
    try:
        attack.run(ALL if everything else QUICK, folder)
    except AssertionError as error:
        outcome.failures.append(f"{error}: {error.__cause__}")
    return {"random records": outcome}
