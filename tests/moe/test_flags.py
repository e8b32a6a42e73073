# SPDX-License-Identifier: Apache-2.0
"""An option stands once, as a field: its flag, help, range and place in config.json follow, in every command."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

import pytest
from transformers import HfArgumentParser

from moellava.commands.upcycle import parse
from moellava.errors import UserError
from moellava.moe.flags import Range, check_options, option, optional_flags
from moellava.moe.spec import MoESpec, given_options
from moellava.train.arguments import make_parser, parse_arguments

OPTIONS = {item.name: item for item in fields(MoESpec)}


def by_training(words: list[str]) -> MoESpec:
    """The options as `train.py` understands them."""
    base = "--model_name_or_path lm --data_path a.json --output_dir out --moe_enable True"
    return parse_arguments([*base.split(), *words])[2].spec()


def by_upcycle(words: list[str]) -> MoESpec:
    """The options as `moellava upcycle` understands them."""
    flags = parse(["--model-path", "dense", "--output-dir", "sparse", *words])
    return MoESpec.from_preset(flags.moe_preset, **given_options(flags))


COMMANDS = [by_training, by_upcycle]


@pytest.fixture
def helps(monkeypatch, capsys):
    """What the two commands say of their flags, a line each."""
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit):
        parse(["--help"])
    texts = [capsys.readouterr().out, make_parser().format_help()]
    return [[" ".join(entry.split()) for entry in text.split("\n  --")] for text in texts]


def test_every_option_is_explained_by_both_commands(helps):
    for lines in helps:
        for name, item in OPTIONS.items():
            [line] = [line for line in lines if line.startswith((f"{name} ", f"{name}, "))]  # Python 3.13
            assert item.metadata["help"] in line and ("_" not in name or f", --{name.replace('_', '-')} " in line)
            assert all(choice in line for choice in item.metadata["choices"])
            default = getattr(MoESpec(), name)
            default = default[0] if isinstance(default, list) else default
            assert line.endswith("." if default is None else f" Default: {default}.")


def another(name: str):
    """A value of an option that is in range and not its default."""
    default, choices = getattr(MoESpec(), name), OPTIONS[name].metadata["choices"]
    if choices:
        return next(choice for choice in choices if choice != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, float):
        return default / 2 or 0.5
    return [5] if default is None or isinstance(default, list) else default + 1


NEEDS = {
    "granularity": {"init": "granular"},
    "init_noise": {"init": "noise"},
    "init_drop_ratio": {"init": "drop"},
    "router_bias_rate": {"router_balance": "bias"},
}
"""Options that go with another one only."""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_goes_from_the_flag_into_config_json_and_back(name, command):
    values = {name: another(name), **NEEDS.get(name, {})}
    words = []
    for key, value in values.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    spec = command(words)
    assert getattr(spec, name) == another(name) != getattr(MoESpec(), name)
    assert MoESpec.from_config(json.loads(json.dumps(spec.to_config()))) == spec


def outside() -> list[tuple[str, str]]:
    """(option, a value just out of its range) for each bound of each option."""
    found = []
    for name, item in OPTIONS.items():
        if bounds := item.metadata["range"]:
            ends = (bounds.least, -1), (bounds.above, 0), (bounds.most, 1), (bounds.below, 0)
            found += [(name, str(end + step)) for end, step in ends if end is not None]
    return found


def test_the_options_that_have_a_range():
    numbers = {name for name in OPTIONS if not isinstance(getattr(MoESpec(), name), (bool, str))}
    assert {name for name, _ in outside()} == numbers - {"moe_layers_idx", "init_seed"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "value"), outside())
def test_what_is_out_of_range_is_refused_by_its_flag(name, value, command):
    with pytest.raises(UserError, match=f"--{name} {value}(.0)? is out of range: it must be "):
        command([f"--{name}", value])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [name for name, item in OPTIONS.items() if item.metadata["choices"]])
def test_an_unknown_choice_is_refused_with_those_that_are_known(name, command):
    first = next(iter(OPTIONS[name].metadata["choices"]))
    with pytest.raises(UserError, match=f"--{name} 'other' is unknown. Known: {first}, "):
        command([f"--{name}", "other"])


@pytest.mark.parametrize("command", COMMANDS)
def test_spellings_and_bare_flags(command):
    assert command(["--top-k-experts", "3", "--use-residual"]) == MoESpec(top_k_experts=3, use_residual=True)


def test_a_list_is_checked_number_by_number_and_is_not_empty():
    for value in ([4, 0], []):
        with pytest.raises(UserError, match="--num_experts"):
            MoESpec(num_experts=value)


def test_a_new_option_is_one_field(capsys):
    @dataclass
    class Cooled(MoESpec):
        cooling: float = option(0.5, "How fast the router cools.", Range(above=0, most=1))

    parser = HfArgumentParser(optional_flags(Cooled, "cooled"))
    assert parser.parse_args(["--cooling", "0.25"]).cooling == 0.25
    assert parser.parse_args([]).cooling is None
    assert "How fast the router cools. Above 0 and at most 1. Default: 0.5." in " ".join(parser.format_help().split())
    for value in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"--cooling {value} is out of range: it must be above 0 and at most 1"):
            Cooled(cooling=value)
    check_options(Cooled(cooling=1.0))
    assert Cooled.from_config(Cooled(cooling=0.75).to_config()).cooling == 0.75
