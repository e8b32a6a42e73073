# SPDX-License-Identifier: Apache-2.0
"""`moellava inspect`: records as the model sees them, what can be done with a model, or what a tokenizer does.

With records or a conversation: the rendered text with the trained tokens in green (in «…» without colour), the ids, the
counts of text, image and supervised tokens, and what is cut. With --model-path alone: whether the model can be trained,
asked, upcycled, and why not; or what a vision tower gives. With --tokenizer alone: what to know of it before training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.records import (
    DATA_HELP,
    MEDIA_LIMITS,
    add_confine_flag,
    add_limit_flags,
    add_role_flags,
    limits_of,
    roles_of,
)
from moellava.commands.values import CommandParser, count
from moellava.constants import DEFAULT_VIDEO_TOKEN, MODALITIES, ROLES
from moellava.data.media import NUM_FRAMES, MediaFiles, require_frames
from moellava.data.records import load_records, problem_of_turns, tags_of
from moellava.errors import UserError
from moellava.files import CONFIG, resolve_folder
from moellava.log import printable
from moellava.startup import importing

if TYPE_CHECKING:
    from moellava.data.encoder import Encoder
    from moellava.data.tokenizer_facts import Facts
    from moellava.data.view import View
    from moellava.doctor import Diagnosis
    from moellava.model.manifest import Manifest


def _as_json(view: View) -> dict[str, Any]:
    tokens = [{"id": t.id, "text": t.text, "trained": t.trained} for t in view.tokens]
    return {
        "record": view.record,
        "version": view.version,
        "counts": view.counts,
        "cut": view.cut,
        "text": "".join(token.text for token in view.tokens),
        "trained_text": "".join(token.text for token in view.tokens if token.trained),
        "tokens": tokens,
        "input_ids": [token.id for token in view.tokens],
        "labels": [token.label for token in view.tokens],
    }


def facts_text(facts: Facts) -> str:
    """What a tokenizer does, one fact a line, then the templates that fit."""
    special = [f"{name} {text!r} = {index}" for name, (text, index) in _present(facts)]
    missing = [name for name, value in facts.special.items() if value is None]
    rows = "unknown (no config.json beside it)"
    if facts.embedding_rows is not None:
        free = max(facts.free_rows or 0, 0)
        where = f"<image> takes row {facts.tokens}" if free else "the embedding grows for <image>"
        where = where if facts.image_token is None else f"<image> is row {facts.image_token}"
        rows = f"{facts.embedding_rows}, {free} free: {where}"
    fitting = [fit.version for fit in facts.fits if fit.fits]
    lines = [
        f"tokenizer                 {facts.row}",
        f"adds BOS                  {'yes' if facts.adds_bos else 'no'}",
        f"special tokens            {', '.join(special)}{'; none: ' + ', '.join(missing) if missing else ''}",
        f"can add special tokens    {'yes' if facts.can_add_tokens else 'no, but moellava adds <image>'}",
        f"tokens                    {facts.tokens}",
        f"embedding rows            {rows}",
        f"space before a word       {facts.spaces_before_words}",
        f"--version                 {', '.join(fitting) or 'none fits'}",
        "",
        "template        ends with             mask of the probe conversation",
    ]
    for fit in facts.fits:
        ends = f"{fit.terminator!r} {fit.terminator_ids}"
        lines.append(f"{fit.version:15} {ends:21} {'fits: ' if fit.fits else ''}{fit.verdict}")
    return "\n".join(lines)


def diagnosis_text(found: Diagnosis) -> str:
    """What can be done with a model, one line a question, then why it cannot be trained."""
    total = sum(found.parts.values())
    parts = [f"{part} {size:,}" for part, size in found.parts.items() if size]
    images = ", ".join(f"{size}: {tokens} tokens" for size, tokens in found.images.items())
    videos = "as their frames, an image each" if found.videos is None else f"{found.videos} tokens for 8 frames"
    ends = "" if found.ends else ", which is text and no special token: a model learns to stop less well"
    lines = [
        ("class", f"{found.model or 'unknown'} (model type {found.model_type})"),
        ("architecture", f"{found.architecture}{', by probes' if found.by_probes else ''}" or "none"),
        ("parts", f"{', '.join(parts)}; {total:,} in all" if parts else "cannot be told apart"),
        ("each parameter once", "yes" if found.covered else "no"),
        ("template", f"--version {found.version}" if found.version else "none that can be used"),
        ("masks", f"exactly; an answer ends with {found.ending!r}{ends}" if found.masks else "no"),
        ("images", images or "cannot be read"),
        ("videos", videos if found.images else "cannot be read"),
        *((f"LoRA, {part}", _linears(names)) for part, names in found.lora.items()),
        *((f"experts as {name}", verdict) for name, verdict in found.upcycles.items()),
        ("plain transformers", "opens it" if found.plain else f"no: {found.plain_reason or 'it cannot be opened'}"),
        ("exported as", found.exports or "nothing"),
        ("trains", "no:" if found.problems else "yes"),
    ]
    return "\n".join([*(f"{name:26}{said}" for name, said in lines), *(f"  {why}" for why in found.problems)])


def _linears(names: dict[str, int]) -> str:
    """How many linears of each name take an adapter."""
    return ", ".join(f"{count} {name}" for name, count in names.items()) or "none"


def _present(facts: Facts) -> list[tuple[str, tuple[str, int]]]:
    return [(name, value) for name, value in facts.special.items() if value is not None]


def _chosen(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, name) of what was asked for. Raises UserError on a number that no record has."""
    if args.conversation:
        from moellava.data.media_reader import blank

        turns = [{"from": ROLES[n % 2], "value": text} for n, text in enumerate(args.conversation)]
        tags = tags_of(turns)
        blanks = {modality: [blank(modality)] * tags.count(modality) for modality in MODALITIES}
        yield {"conversations": turns, **blanks}, "the conversation"
        return
    records = load_records(args.data, roles=roles_of(args))
    numbers = args.records if args.records is not None else range(min(args.limit, len(records)))
    for number in numbers:
        if not 0 <= number < len(records):
            raise UserError(f"--records {number}: the files hold records 0 to {len(records) - 1}")
        yield records[number], records.name(number)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="moellava inspect", description=__doc__)
    parser.add_argument("data", nargs="*", help=DATA_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model-path", help="folder or hub id of a model")
    source.add_argument("--tokenizer", help="folder or hub id of a tokenizer, or of a model that has one")
    parser.add_argument("--image-folder", help="what the image paths in the records are relative to")
    parser.add_argument("--video-folder", help="what the video paths are relative to (default: --image-folder)")
    parser.add_argument("--version", help="template; 'chat_template' is the tokenizer's own (default: the model's)")
    parser.add_argument("--conversation", nargs="+", metavar="TEXT", help="question, answer, … instead of files")
    parser.add_argument("--records", type=int, nargs="+", help="numbers of records, from 0")
    parser.add_argument("--limit", type=count, default=3, help="records shown without --records (default: 3)")
    parser.add_argument("--tokens-per-image", type=count, help="positions of an image, without a model (576)")
    parser.add_argument("--num-frames", type=int, default=NUM_FRAMES, help=f"images of a video (default: {NUM_FRAMES})")
    parser.add_argument("--max-length", type=count, help="positions; show what is cut beyond them")
    add_role_flags(parser)
    add_confine_flag(parser)
    add_limit_flags(parser)
    parser.add_argument("--ids", action="store_true", help="show the ids, too")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON, a line per record")
    return parser


OF_RECORDS = ("image_folder", "video_folder", "records", "limit", "user_key", "assistant_key")
OF_FILES = (*OF_RECORDS, "confine_media", *MEDIA_LIMITS)
OF_VIEWS = ("tokens_per_image", "num_frames", "max_length", "ids", "color")
"""Flags that are read where records come from files, and where any are shown."""


def idle_flags(args: argparse.Namespace) -> list[Idle]:
    """Flags that the others leave nothing to do."""
    facts = not args.data and not args.conversation
    videos = any(DEFAULT_VIDEO_TOKEN in text for text in args.conversation or ())
    return [
        Idle([*OF_FILES, *OF_VIEWS], facts, "is about records: give files, or --conversation"),
        Idle(["data", *OF_FILES], args.conversation, "is about files, and --conversation takes their place"),
        Idle(["num_frames"], args.conversation and not videos, "is about videos: type <video> in --conversation"),
        Idle(["limit"], args.records and args.data, "is for records that --records does not name"),
        Idle(["ids", "color"], args.json and not facts, "is about text, and --json prints all in its own way"),
    ]


def main(argv: list[str]) -> int:
    """Prints views of records, what can be done with a model, or the facts of a tokenizer. Exit status 1 if a mask
    shown trains nothing, or a model cannot be trained."""
    parser = _parser()
    args = parser.parse_args(argv)
    refuse_idle(parser, argv, idle_flags(args))
    require_frames(args.num_frames, "--num-frames")
    with importing():
        from moellava.vlm import open_encoder
    source = args.model_path or args.tokenizer
    if not args.data and not args.conversation:
        return _examine(parser, argv, args, source)
    flag = "--model-path" if args.model_path else "--tokenizer"
    encoder = open_encoder(source, version=args.version, tokens_per_image=args.tokens_per_image, flag=flag)
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    return _show(args, encoder, color)


def _examine(parser: argparse.ArgumentParser, argv: list[str], args: argparse.Namespace, source: str) -> int:
    """Prints what can be done with a vision-language model, what a tower gives, or the facts of a tokenizer."""
    from moellava.data.tokenizer_facts import facts_of
    from moellava.data.tokenizers import load_tokenizer
    from moellava.doctor import diagnose
    from moellava.lmm.architecture import holds_vlm
    from moellava.model.tower_facts import tower_facts
    from moellava.model.towers import is_tower

    manifest = manifest_at(source) if args.model_path else None
    if manifest is not None and holds_vlm(manifest):
        refuse_idle(parser, argv, [Idle(["version"], True, "is for records; the folder's own template is looked at")])
        found = diagnose(manifest)
        print(printable(found.to_json() if args.json else diagnosis_text(found)))
        return int(bool(found.problems))
    if manifest is not None and is_tower(str(manifest.config.get("model_type"))):
        refuse_idle(parser, argv, [Idle(["version"], True, "is a template's name, and this is a vision tower")])
        tower = tower_facts(manifest.config, manifest.called)
        print(printable(tower.to_json() if args.json else tower.text()))
        return 0
    facts = facts_of(load_tokenizer(source, args.version), source)
    print(printable(facts.to_json() if args.json else facts_text(facts)))
    return 0


def manifest_at(source: str) -> Manifest | None:
    """What a model's folder holds; None where it has no config.json, as a tokenizer's."""
    from moellava.model.manifest import read_folder

    folder = resolve_folder(source, "--model-path")
    return read_folder(source, "--model-path") if (folder / CONFIG).is_file() else None


def _show(args: argparse.Namespace, encoder: Encoder, color: bool) -> int:
    from moellava.data.view import view_text, views_of

    status, folders = 0, (args.image_folder, args.video_folder)
    files = MediaFiles(*folders, args.num_frames, limits_of(args), args.confine_media)
    for record, name in _chosen(args):
        problem = problem_of_turns(record["conversations"]) or encoder.renderer.problem(record)
        if problem:
            raise UserError(f"{name} {problem}")
        for view in views_of(encoder, record, name, files, args.max_length):
            if args.json:
                print(printable(json.dumps(_as_json(view), ensure_ascii=False)))
            else:
                print(view_text(view, color, args.ids))
            status |= view.counts["supervised_tokens"] == 0
    return status
