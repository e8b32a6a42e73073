# SPDX-License-Identifier: Apache-2.0
"""Every flag of every subcommand is judged: it acts whatever stands beside it, or where it would not, it is refused."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields

import pytest

from moellava import cli
from moellava.cli import COMMANDS, main
from moellava.commands.values import PLACES
from moellava.errors import UserError
from moellava.moe import MoESpec
from tests import tiny
from tests.attacks.flags import attacks

ACTS: dict[str, str] = {
    "chat": "model-path image-file video-file question version max-new-tokens temperature top-p top-k num-beams "
    "repetition-penalty device",
    "serve": "model-path version device served-model-name host port api-key api-only batch-size max-requests "
    "max-new-tokens max-body-mb max-images max-image-pixels max-image-side max-aspect-ratio allow-domain",
    "check-data": "data image-folder video-folder num-frames max-image-pixels max-image-side max-aspect-ratio "
    "tokenizer skip-list known quick workers user_key assistant_key confine_media json",
    "inspect": "model-path tokenizer version conversation json",
    "convert-data": "data output image-folder skip-list user_key assistant_key",
    "verify": "dir files",
    "plan": "gpus hbm device per-host tokens tflops bandwidth link network json",
    "upcycle": "model-path from output-dir moe_preset",
    "compare": "stage2 data output-dir arms variant seeds task limit batch-size launcher moe-run",
    "prune": "model-path output-dir data image-folder records keep merge",
    "export": "model-path output-dir to",
    "merge-lora": "model-path adapter output-dir trust_remote_code",
    "models": "markdown",
    "recipe": "base stage",
    "env": "json",
    "demo": "task full smoke output-dir started",
    "eval": "model-path task shuffle-images limit batch-size max-new-tokens processes output output-dir against",
    "routing": "model-path data output image-folder video-folder limit pictures batch-size max-length num-frames "
    "version max-image-pixels max-image-side max-aspect-ratio user_key assistant_key confine_media",
    "report": "run output",
}
"""Command -> flags that are always read. Those of `MoESpec` are judged in tests/train/test_reconcile.py."""

IDLE: dict[str, dict[str, str]] = {
    "chat": {
        "num-frames": "--model-path m --question hi --num-frames 8",
        "max-image-pixels": "--model-path m --question hi --max-image-pixels 9",
        "max-image-side": "--model-path m --question hi --max-image-side 9",
        "max-aspect-ratio": "--model-path m --question hi --max-aspect-ratio 9",
        "seed": "--model-path m --seed 1",
        "model-base": "--model-path {folder} --model-base {folder}",
    },
    "serve": {"model-base": "--model-path {folder} --model-base {folder} --port 0"},
    "check-data": {
        "version": "d.json --version v1",
        "max-length": "d.json --max-length 5",
        "tokens-per-image": "d.json --tokens-per-image 576",
    },
    "inspect": {
        "data": "d.json --tokenizer t --conversation a b",
        "image-folder": "--tokenizer t --image-folder f",
        "video-folder": "--tokenizer t --conversation a b --video-folder f",
        "num-frames": "--tokenizer t --conversation a b --num-frames 8",
        "max-image-pixels": "--tokenizer t --max-image-pixels 9",
        "max-image-side": "--tokenizer t --max-image-side 9",
        "max-aspect-ratio": "--tokenizer t --max-aspect-ratio 9",
        "records": "--tokenizer t --records 0",
        "limit": "d.json --tokenizer t --records 0 --limit 3",
        "tokens-per-image": "--tokenizer t --tokens-per-image 5",
        "max-length": "--tokenizer t --max-length 5",
        "user_key": "--tokenizer t --user_key human",
        "assistant_key": "--tokenizer t --conversation a b --assistant_key gpt",
        "confine_media": "--tokenizer t --confine_media",
        "ids": "d.json --tokenizer t --json --ids",
        "color": "--tokenizer t --color auto",
    },
    "upcycle": {
        "data": "--model-path m --output-dir o --data d.json",
        "image-folder": "--from a b --output-dir o --image-folder i",
        "records": "--from a b --output-dir o --records 9",
        "shard-size": "--from a b --output-dir o --shard-size 4",
    },
    "compare": {"data-folder": "--stage2 m --data d.json --output-dir o --data-folder f"},
    "export": {
        "verify": "--model-path m --output-dir o --to llava --verify False",
        "shard-size": "--model-path m --output-dir o --to llava --shard-size 4",
        "adapter": "--model-path m --output-dir o --to llava --adapter a",
        "dropless": "--model-path m --output-dir o --to llava --dropless True",
    },
    "plan": {"supervised": "--gpus 1 --supervised 9", "images": "--gpus 1 --images 2"},
    "verify": {"atol": "{folder} --files --atol 1e-4", "update": "{folder} --update"},
    "models": {"family": "--markdown --family llava-1.5", "json": "--markdown --json"},
    "demo": {
        "runs": "--smoke --output-dir o --runs r",
        "make-base": "--task mixed --make-base",
        "processes": "--task mixed --processes 2",
    },
    "recipe": {"print": "--print", "output": "qwen3 pretrain --print --output a.yaml"},
    "eval": {
        "seed": "--model-path m --seed 0",
        "split": "--model-path m --task pope mme --split test",
        "data-folder": "--model-path m --data-folder f",
        "judge-url": "--model-path m --judge-url http://localhost",
        "judge-model": "--model-path m --task mm-vet --judge-model j",
    },
}
"""Command -> flag -> words with which it would do nothing."""


def flags_of(command: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What a command's parser takes, without its help; those of `MoESpec` left out."""
    parser = parser_of(command, monkeypatch)
    names = {(action.option_strings or [action.dest])[0].lstrip("-") for action in parser._actions}
    return names - {"h"} - ({item.name for item in fields(MoESpec)} if command == "upcycle" else set())


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """What reads a command's words."""
    found: list[argparse.ArgumentParser] = []

    def catch(parser, *args, **kwargs):
        found.append(parser)
        raise SystemExit

    monkeypatch.setattr(cli, "with_plugins", lambda argv: argv)  # --plugin is every command's: tests/test_plugins.py
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
    with pytest.raises(SystemExit):
        main([command])
    return found[0]


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """What a stage has left."""
    folder = tmp_path_factory.mktemp("idle") / "composed"
    tiny.compose_tiny(parts / "lm", parts / "tower", "qwen").save(folder)
    return folder


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train"}))  # of which tests/train has its own tables
def test_every_flag_of_a_command_is_judged_once(command, monkeypatch):
    judged = [*ACTS[command].split(), *IDLE.get(command, {})]
    assert sorted(judged) == sorted(flags_of(command, monkeypatch))


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train"}))
def test_a_flag_is_given_whole(command, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        parser = parser_of(command, patched)
    whole = [name for action in parser._actions for name in action.option_strings if len(name) > 5]
    assert whole
    for name in whole:
        with pytest.raises(SystemExit, match="2"):
            made_optional(parser).parse_args([name[:-1]])
        said = capsys.readouterr().err
        assert f"unrecognized arguments: {name[:-1]}" in said and "Did you mean --" in said


READ = {"data", "image_folder", "image_file", "video_file", "tokenizer", "model_path", "model_base", "sources", "base"}
READ |= {"dir", "run", "stage2", "moe_run", "files", "version"}
"""What is read: data and pictures from anywhere, a model from this machine or the hub, and a run, which is there."""


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train"}))
def test_an_address_is_no_place_on_this_machine(command, monkeypatch):
    """A folder of that name would be made, and lost with a rented machine."""
    with monkeypatch.context() as patched:
        parser = made_optional(parser_of(command, patched))
    named = re.compile(r"dir|folder|file|path|output|list|known|adapter|runs?$|against|data|base|sources|stage2")
    taken = {action.dest: action for action in parser._actions if named.search(action.dest) and action.nargs != 0}
    assert {*taken} <= READ | {*PLACES}
    for name in {*taken} & {*PLACES}:
        flag = taken[name].option_strings[0]
        with pytest.raises(UserError, match=f"{flag} s3:/+bucket/x: a place on this machine is needed"):
            parser.parse_args([flag, "s3://bucket/x"])
        assert parser.parse_args([flag, "x"])


def made_optional(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """One that asks for nothing, so that it complains of what is there."""
    for action in parser._actions:
        action.required = False
    for group in parser._mutually_exclusive_groups:
        group.required = False
    return parser


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command in IDLE for flag in IDLE[command]])
def test_a_flag_that_would_do_nothing_is_refused_by_name(command, flag, folder, capsys):
    words = IDLE[command][flag].format(folder=folder).split()
    assert main([command, *words]) == 2
    said = capsys.readouterr().err
    assert flag in said and "Traceback" not in said


def test_a_model_says_itself_how_many_positions_an_image_takes(folder, data_file, make_record, capsys):
    words = [str(data_file([make_record("a", "hi", "ho")])), "--tokenizer", str(folder), "--tokens-per-image", "9"]
    for command in ("inspect", "check-data"):
        assert main([command, *words]) == 2
        assert "--tokens-per-image 9: the model in" in capsys.readouterr().err


def test_all_bad_combinations_are_named(tmp_path):
    outcome = attacks(True, tmp_path)["combinations of flags"]
    assert not outcome.failures
    assert outcome.counts["named"] >= 40
