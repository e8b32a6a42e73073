# SPDX-License-Identifier: Apache-2.0
"""What only shows when it is built is built before anything loads: arguments, trackers, optimizer, schedule.

transformers and torch report a user's mistake in many types of exceptions, and rarely by its flag. Here each of them
becomes a `UserError` that names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler

from moellava.errors import UserError
from moellava.train.hf_flags import typed, word

T = TypeVar("T")

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a wrong value has been seen to raise in transformers, accelerate, DeepSpeed, torch and trackers."""

ADAM = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
"""Flag -> the optimizer's argument that it becomes, if it has one of that name."""

OWN_LOOP = ("galore_", "apollo_", "lomo", "adalomo")
"""Optimizers that want to group parameters, or to step, by themselves: beginnings of their names."""

EXTRAS = {
    **{name: name for name in ("wandb", "mlflow", "trackio")},
    **{"tensorboard": "train", "bitsandbytes": "quant", "deepspeed": "train"},
}
"""Package -> the extra of ours that installs it."""


def construct(make: type[T], flags: Mapping[str, Any]) -> T:
    """A dataclass of arguments from those of the flags on the command line that are its own.

    Raises:
        UserError: its checks have failed; names the flags that are at fault, found by giving them one at a time, and
            then by leaving them out one at a time.
    """
    own = field_names(make)
    given = {name: value for name, value in flags.items() if name in own}
    try:
        return make(**given)
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(blame(make, given, error)) from error


def blame(make: Callable[..., Any], given: Mapping[str, Any], error: Exception) -> str:
    """A line for each flag that a constructor fails for, or one for those that it fails for together."""
    alone = {name: fault_of(make, {name: given[name]}) for name in given}
    guilty = [named(name, given[name], fault) for name, fault in alone.items() if fault is not None]
    if guilty:
        return "\n".join(guilty)
    without = [name for name in given if fault_of(make, _others(given, name)) is None]
    return f"{' '.join(typed(name, given[name]) for name in without or given)}: {said(error)}"


def fault_of(make: Callable[..., Any], given: Mapping[str, Any]) -> Exception | None:
    """What a constructor raises. Our own UserErrors pass: they name their flag."""
    try:
        make(**given)
    except UserError:
        raise
    except FAULTS as error:
        return error
    return None


def _others(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in given.items() if other != name}


def named(name: str, value: Any, error: Exception) -> str:
    """One line: the flag, what was said, and the extra to install if a package is missing."""
    text = said(error)
    extra = next((extra for package, extra in EXTRAS.items() if package in text and "install" in text), None)
    return f"{typed(name, value)}: {text}" + (f" Here: pip install 'moellava[{extra}]'." if extra else "")


def said(error: Exception) -> str:
    """An error's message in one line; its type where the message alone says nothing."""
    text = " ".join(str(error).split())
    return text if text and not isinstance(error, LookupError) else f"{type(error).__name__} {text}".strip()


def try_out(args: Any, given: Iterable[str], moe_enable: bool) -> None:
    """Builds trackers, optimizer and schedule as the Trainer will, on one small parameter.

    Raises:
        UserError: what cannot be built, and arguments that nothing reads.
    """
    asked = set(given)
    if "report_to" in asked:
        _attempt("report_to", " ".join(args.report_to), lambda: [make() for make in _trackers(args.report_to)])
    if asked & {"optim", "optim_args", *ADAM}:
        _try_optimizer(args, asked, moe_enable)
    if asked & {"lr_scheduler_type", "lr_scheduler_kwargs"}:
        _try_schedule(args)


def _attempt(name: str, value: Any, act: Callable[[], T]) -> T:
    try:
        return act()
    except FAULTS as error:
        raise UserError(named(name, value, error)) from error


def _trackers(names: list[str]) -> list[Callable[[], Any]]:
    return get_reporting_integration_callbacks(names)


def _try_optimizer(args: Any, asked: set[str], moe_enable: bool) -> None:
    optimizer = word(args.optim)
    if optimizer.startswith(OWN_LOOP):
        raise UserError(f"--optim {optimizer} is not served: it groups parameters by itself. Choose adamw_torch.")
    if args.deepspeed and moe_enable and not optimizer.startswith("adamw_torch"):
        raise UserError(
            f"--optim {optimizer}: experts under --deepspeed are trained by adamw_torch alone. Leave --optim out, or "
            "train without --deepspeed."
        )
    kwargs = _attempt("optim", optimizer, lambda: _optimizer(args)[1]) if not args.optim_args else None
    if kwargs is None:
        kwargs = _attempt("optim_args", args.optim_args, lambda: _optimizer(args)[1])
        _refuse_idle_arguments(args, kwargs)
    for flag in sorted(asked & set(ADAM)):
        if ADAM[flag] not in kwargs:
            raise UserError(f"--{flag} {getattr(args, flag)}: --optim {optimizer} does not read it.")
    _attempt("optim_args" if args.optim_args else "optim", args.optim_args or optimizer, lambda: _step(args))


def _optimizer(args: Any) -> tuple[Any, dict[str, Any]]:
    return Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))


def _refuse_idle_arguments(args: Any, kwargs: dict[str, Any]) -> None:
    """Raises UserError for a part of --optim_args without which the optimizer is the same."""
    parts = args.optim_args.replace(" ", "").split(",")
    for part in parts:
        without = copy.copy(args)
        without.optim_args = ",".join(other for other in parts if other != part)
        if fault_of(lambda rest=without: _optimizer(rest), {}) is None and _optimizer(without)[1] == kwargs:
            raise UserError(f"--optim_args {args.optim_args}: --optim {word(args.optim)} does not read {part!r}.")


def _step(args: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(64, 64, device=args.device))  # bitsandbytes packs from 4,096 numbers on
    make, kwargs = _optimizer(args)
    optimizer = make([{"params": [parameter], "weight_decay": args.weight_decay}], **kwargs)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _try_schedule(args: Any) -> None:
    name, options = word(args.lr_scheduler_type), args.lr_scheduler_kwargs
    if options and name in ("constant", "constant_with_warmup"):
        raise UserError(f"--lr_scheduler_kwargs {options}: --lr_scheduler_type {name} does not read it.")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else 100
    flag, value = ("lr_scheduler_kwargs", options) if options is not None else ("lr_scheduler_type", name)

    def run() -> None:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
        for _ in range(3):
            optimizer.step()
            schedule.step()

    _attempt(flag, value, run)


def field_names(make: Any) -> set[str]:
    """Names of a dataclass's fields that can be given."""
    return {item.name for item in fields(make) if item.init}
