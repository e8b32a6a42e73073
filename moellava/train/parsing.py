# SPDX-License-Identifier: Apache-2.0
"""All flags of training, ours and Hugging Face's: words or a file -> the four dataclasses, conflicts refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
import transformers
from transformers import HfArgumentParser

from moellava.errors import UserError, did_you_mean
from moellava.moe.flags import FlagHelp
from moellava.plugins import load_plugins
from moellava.processes import world_size
from moellava.train.arguments import (
    DROPPED_FLAGS,
    RENAMED_FLAGS,
    DataArguments,
    ModelArguments,
    MoEArguments,
    RunArguments,
    settle,
    translate_flags,
)
from moellava.train.conflicts import Flags, find_conflicts
from moellava.train.deepspeed.extensions import leave_out_shared_memory
from moellava.train.deepspeed.launch import stand_alone
from moellava.train.deepspeed.named import settings_named
from moellava.train.deepspeed.zero import settle_overlap
from moellava.train.hf_flags import find_problems, word
from moellava.train.run_file import read_run_file, split_file, words_of
from moellava.train.split import keep_samples
from moellava.train.trial import construct, field_names, try_out

HELP = "`moellava train --help` lists the flags"


@dataclass
class TrainingArguments(RunArguments, transformers.TrainingArguments):
    """HF's arguments with the defaults that a run here needs, and the adapters'."""

    def __post_init__(self):
        self.given: dict[str, Any] = {}  # what stands on the command line: what run.yaml keeps
        # Where the launcher would guess wrong: without an accelerator, HF must be told, or its batch check fails.
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            self.use_cpu = True
        if isinstance(self.activation_checkpointing_kwargs, str):
            with suppress(ValueError):  # what is no JSON stays text, and find_conflicts refuses it by name
                self.activation_checkpointing_kwargs = json.loads(self.activation_checkpointing_kwargs)
        if self.deepspeed:  # the next line starts its process group
            stand_alone()
            leave_out_shared_memory()
        super().__post_init__()
        if self.deepspeed:
            settle_overlap(self.hf_deepspeed_config, has_streams=not self.use_cpu)


ARGUMENT_CLASSES = (ModelArguments, DataArguments, MoEArguments, TrainingArguments)


class FlagParser(HfArgumentParser):
    """Hugging Face's parser; what it cannot read is a UserError of one line, in place of a usage of all flags and an
    exit."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        told = message.removeprefix("argument ")
        flag, _, reason = told.partition(": ")
        named = f"{flag.split('/')[0]}: {reason}" if told != message else message
        raise UserError(f"{named.rstrip('.')}. {HELP}.")


SORTS = {int: "whole number", float: "number"}
"""What a flag takes, in words."""


def made(sort: Callable[[str], Any], choices: Iterable[Any] | None) -> Callable[[str], Any]:
    """A flag's type, whose refusal says in a line what the flag takes, and the choice that was probably meant."""
    known = None if choices is None else [str(word(choice)) for choice in choices]

    def make(text: str) -> Any:
        try:
            value = sort(text)
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            needed = SORTS.get(sort, "value of True or False")  # type: ignore[call-overload]
            raise argparse.ArgumentTypeError(f"{text!r} is no {needed}") from error
        if known is not None and text not in known:
            hint = did_you_mean(text, known)
            raise argparse.ArgumentTypeError(f"{text!r} is unknown.{hint} Known: {', '.join(known)}")
        return value

    return make


def make_parser() -> HfArgumentParser:
    """The parser of all flags; also used to check that every shipped script parses."""
    parser = FlagParser(ARGUMENT_CLASSES, formatter_class=FlagHelp, allow_abbrev=False)
    for action in parser._actions:
        if callable(action.type):
            action.type = made(action.type, action.choices)
            action.choices = None
    return parser


def given_flags(argv: list[str]) -> dict[str, Any]:
    """Values by name of the flags that are given, whether or not they are the defaults: those of a file, if one leads
    the words, and those that stand there, which win.

    Raises:
        UserError: unknown flags and values that cannot be read; a file that is no run's.
    """
    file, words = split_file(argv)
    return {**(flags_in_file(file) if file else {}), **_given(words)}


def flags_in_file(path: str) -> dict[str, Any]:
    """The flags of a run file. Raises UserError: see `given_flags`."""
    try:
        return flags_in(read_run_file(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def flags_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, of YAML or Python -> the same as typed on a command line. Raises UserError: see `given_flags`."""
    names = known_flags()
    for name in values:
        if name.replace("-", "_") not in names:
            raise UserError(f"{name} is no flag.{did_you_mean(name, names)} {HELP}.")
    return _given(words_of(values))


def _given(argv: list[str]) -> dict[str, Any]:
    absent = object()
    nothing = argparse.Namespace(**{name: absent for group in ARGUMENT_CLASSES for name in field_names(group)})
    words = translate_flags(argv)
    read, unknown = make_parser().parse_known_args(words, nothing)
    if unknown:
        raise UserError(f"{_unknown(words, unknown[0])} {HELP}.")
    return {name: value for name, value in vars(read).items() if value is not absent}


def _unknown(words: list[str], found: str) -> str:
    """What a word is that no flag takes."""
    flag = found.partition("=")[0]
    if flag.startswith("--"):
        return f"{flag} is no flag.{did_you_mean(flag, [f'--{name}' for name in known_flags()])}"
    before = words[words.index(found) - 1] if found in words[1:] else "the command"
    return f"{found!r} (after {before!r}) belongs to no flag: names of flags begin with --."


def known_flags() -> set[str]:
    """Every name that a flag has or had, without its dashes."""
    own = {item.name for group in ARGUMENT_CLASSES for item in fields(group) if item.init}
    return own | {name.removeprefix("--") for name in (*RENAMED_FLAGS, *DROPPED_FLAGS)}


def defaults() -> dict[str, Any]:
    """Values by name of all flags, none given."""
    items = [item for group in ARGUMENT_CLASSES for item in fields(group)]
    return {item.name: item.default_factory() if callable(item.default_factory) else item.default for item in items}


Arguments = tuple[ModelArguments, DataArguments, MoEArguments, TrainingArguments]


def parse_arguments(argv: list[str]) -> Arguments:
    """Words, as they are typed -> dataclasses. Raises UserError: see `given_flags` and `arguments_of`."""
    return arguments_of(given_flags(argv))


def arguments_of(given: Mapping[str, Any]) -> Arguments:
    """Flags that are given, by name -> dataclasses, conflicts refused.

    Raises:
        UserError: flags that are not served, values out of range, and conflicts, by name.
    """
    flags = dict(given)
    if (settings := settings_named(flags.pop("deepspeed", None))) is not None:
        flags["deepspeed"] = settings
    flags = keep_samples(flags, defaults(), world_size())
    load_plugins(flags.get("plugin") or ())
    if problems := find_problems(flags, defaults()):
        raise UserError("\n".join(problems))
    model = construct(ModelArguments, flags)
    data = construct(DataArguments, flags)
    moe = construct(MoEArguments, flags)
    training = construct(TrainingArguments, flags)
    training.given = dict(given)
    settle(model, training)
    if problems := find_conflicts(Flags(model, data, moe, training)):
        raise UserError("\n".join(problems))
    try_out(training, flags, moe.moe_enable)
    return model, data, moe, training
