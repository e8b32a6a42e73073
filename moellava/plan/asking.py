# SPDX-License-Identifier: Apache-2.0
"""What `moellava plan` is asked, made of its flags, a folder and the data; and the answer as text."""

from __future__ import annotations

import argparse
import copy
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from moellava.constants import IGNORE_INDEX
from moellava.data.encoder import Encoder
from moellava.data.media import MediaFiles
from moellava.data.media_reader import BLANK
from moellava.data.packing import packed_rows
from moellava.data.records import load_records
from moellava.errors import UserError
from moellava.model.description import Description
from moellava.plan.devices import DEVICES, SPEEDS, Device
from moellava.plan.judged import as_one_of, judgeable, judged, problems_of
from moellava.plan.model import WHOLE, Groups
from moellava.plan.plan import BATCHES, Asked, layouts_for
from moellava.plan.report import best_of_each, launcher, table
from moellava.plan.rows import shares_rows
from moellava.plan.samples import Sample, Samples
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments, settle
from moellava.train.conflicts import Flags, find_conflicts
from moellava.train.deepspeed.named import settings_named
from moellava.train.hf_flags import find_problems, typed
from moellava.train.memory import Layout, in_units, layout_of
from moellava.train.parsing import TrainingArguments, defaults
from moellava.train.trial import construct
from moellava.vlm import encoder_of

FIXED = ("deepspeed", "fsdp_size", "ep_size", "activation_checkpointing", "per_device_train_batch_size", "bf16", "fp16")
"""Flags of training that are looked for where they are not given."""

LIE = {True: "The samples of a micro-batch lie end to end in one row.", False: "Rows are padded to the longest sample."}
"""By whether any row of a plan has them so."""

LOOKED_AT = 256
"""Records of --data whose lengths are measured, evenly spread."""


def device_of(args: argparse.Namespace) -> Device:
    """The device, with the speeds that flags give it. Raises UserError for one that is not known."""
    device = DEVICES[args.device]
    told = {name: getattr(args, name) for name in SPEEDS if getattr(args, name) is not None}
    if "tflops" in told:
        told["tflops_fp32"] = told["tflops"]
    return replace(device, **told)


def flag_groups(given: dict[str, Any], tokens: int | None, gpus: int = 1, is_gpu: bool = True) -> Groups:
    """The flags of the run that is planned, as training would read them in one of its processes.

    Raises:
        UserError: as training would; and for --tokens beside --data, and for neither.
    """
    if bool(tokens) == bool(given.get("data_path")):
        raise UserError("Give --data FILE, or --tokens N: the positions of a sample. One of them.")
    run = {name: value for name, value in given.items() if name not in FIXED}
    run.setdefault("data_path", ["the data"])
    if tokens:
        run.setdefault("model_max_length", max(tokens, defaults()["model_max_length"]))
        if tokens > run["model_max_length"]:
            raise UserError(
                f"--tokens {tokens}: training takes samples of --model_max_length {run['model_max_length']} "
                "positions at most. Raise it, or leave it out."
            )
    with as_one_of(gpus):
        problems = find_problems(run | judgeable(fixed_of(given), is_gpu), defaults())
    if problems:
        raise UserError("\n".join(problems))
    model, data = construct(ModelArguments, run), construct(DataArguments, run)
    moe, training = construct(MoEArguments, run), construct(TrainingArguments, run)
    training.given = run
    settle(model, training)
    asked = copy.copy(training)  # with what this machine may not be able to do
    asked.bf16, asked.fp16 = bool(given.get("bf16")), bool(given.get("fp16"))
    with as_one_of(gpus):
        problems = find_conflicts(Flags(model, data, moe, asked))
    if problems:
        raise UserError("\n".join(problems))
    return model, data, moe, training


def fixed_of(given: dict[str, Any]) -> dict[str, Any]:
    """Those of `FIXED` that are given, DeepSpeed's settings as a file or JSON. Raises UserError: they are neither."""
    fixed = {name: given[name] for name in FIXED if name in given}
    return fixed | ({"deepspeed": settings_named(fixed["deepspeed"])} if "deepspeed" in fixed else {})


def refuse_hosts(gpus: int, per_host: int) -> None:
    """Raises UserError where the last host would have idle devices: launchers start as many processes on each."""
    if gpus > per_host and gpus % per_host:
        fits = max(size for size in range(1, per_host + 1) if gpus % size == 0)
        raise UserError(
            f"--gpus {gpus}: hosts of --per-host {per_host} devices have {gpus - gpus % per_host} or "
            f"{gpus + per_host - gpus % per_host} together. --per-host {fits} makes {gpus // fits} hosts of {fits}."
        )


def data_of(args: argparse.Namespace, groups: Groups, description: Description) -> Samples:
    """What flags say of the samples, or the records; with --packing, of rows that hold several of them.

    Raises:
        UserError: for more supervised positions than a sample has.
    """
    if args.tokens:
        if (args.supervised or 0) > args.tokens:
            raise UserError(f"--supervised {args.supervised}: a sample has --tokens {args.tokens} positions in all.")
        training = groups[3]
        several = max(training.model_max_length // args.tokens, 1) if training.packing else 1
        supervised = args.supervised or max(args.tokens // 4, 1)
        return Samples((Sample((args.tokens,) * several, several * supervised, several * (args.images or 1)),))
    return measured(groups, encoder_of(*description.inputs(), description.config, description.architecture))


def measured(groups: Groups, encoder: Encoder) -> Samples:
    """Lengths of the records, as training would cut and pack them. Raises DataError where one cannot be read."""
    model_args, data_args, _, args = groups
    records = load_records(data_args.data_path, roles=(model_args.user_key, model_args.assistant_key))
    limits = data_args.limits()
    files = MediaFiles(data_args.image_folder, data_args.video_folder, data_args.num_frames, limits)
    step = max(len(records) // LOOKED_AT, 1)
    found: list[Sample] = []
    for number in range(0, len(records), step):
        name = records.name(number)
        for _, example in encoder.examples(records[number], name, files, max_length=args.model_max_length):
            trained = sum(label != IGNORE_INDEX for label in example.labels)
            if trained:
                found.append(Sample((example.length,), trained, len(example.media)))
    if not found:
        raise UserError(f"--data {' '.join(data_args.data_path)}: no record has anything to train on.")
    if args.packing:
        rows = packed_rows([sample.length for sample in found], args.model_max_length)
        found = [filled([found[number] for number in row]) for row in rows]
    return Samples(tuple(found), encoder.reader.run_length(BLANK, 1))


def filled(samples: Sequence[Sample]) -> Sample:
    """A row of several samples."""
    parts, supervised, images = zip(*samples, strict=True)
    return Sample(tuple(chain.from_iterable(parts)), sum(supervised), sum(images))


def asked_of(
    args: argparse.Namespace,
    given: dict[str, Any],
    groups: Groups,
    device: Device,
    data: Samples,
    own_counts: Sequence[int] = (),
) -> Asked:
    """The question, with what the run's flags leave open.

    Args:
        own_counts: numbers of experts that the sparse layers have, or that a language model has of its own.

    Raises:
        UserError: no way to lay a run out is as the flags say.
    """
    model, training = groups[0], groups[3]
    sizes, checkpointing = given.get("per_device_train_batch_size"), given.get("activation_checkpointing")
    return Asked(
        gpus=args.gpus,
        memory=args.hbm or device.memory,
        device=device,
        per_host=args.per_host,
        data=data,
        layouts=layouts_of(args, given, groups, device, own_counts),
        samples=(sizes,) if sizes else BATCHES,
        checkpointing=(False, True) if checkpointing is None else (bool(checkpointing),),
        accumulation=training.gradient_accumulation_steps,
        is_packed=training.packing,
        longest=training.model_max_length,
        eval_samples=training.per_device_eval_batch_size,
        joins=lambda vlm, samples: shares_rows(vlm, training, model.attn_implementation, samples),
    )


def layouts_of(
    args: argparse.Namespace, given: dict[str, Any], groups: Groups, device: Device, own_counts: Sequence[int]
) -> tuple[Layout, ...]:
    """Those that the flags leave open and training takes. Raises UserError, see `asked_of`."""
    is_moe, bits, fixed = groups[2].moe_enable, groups[3].bits, fixed_of(given)
    counts = (own_counts, ()) if is_moe else (None, own_counts)
    copy_size = given["fsdp_size"] if given.get("fsdp_size", 1) > 1 else args.per_host
    layouts = layouts_for(args.gpus, counts[0], is_moe, counts[1], copy_size, device.is_gpu)
    if fixed.get("deepspeed"):
        wanted = layout_of(fixed["deepspeed"], args.gpus, is_gpu=device.is_gpu)
        layouts = tuple({replace(wanted, ep_size=layout.ep_size) for layout in layouts if layout.fsdp == 1})
    elif "deepspeed" in fixed:
        layouts = tuple(layout for layout in layouts if not layout.deepspeed)
    if "fsdp_size" in given:
        layouts = tuple(layout for layout in layouts if layout.fsdp == given["fsdp_size"])
    if "ep_size" in given:
        layouts = tuple(layout for layout in layouts if layout.ep_size == given["ep_size"])
    if not layouts:
        raise UserError(why_none(args.gpus, fixed, groups, device.is_gpu, own_counts))
    if bits < WHOLE:
        layouts = unsplit(layouts, bits)
    return judged(layouts, fixed, groups, args.gpus, device.is_gpu)


def why_none(gpus: int, fixed: dict[str, Any], groups: Groups, is_gpu: bool, own_counts: Sequence[int]) -> str:
    """Why no way to lay a run out is as flags say: training's own words, where these say what computes."""
    is_chosen = bool({"deepspeed", "fsdp_size"} & fixed.keys())  # else nothing says what --ep_size belongs to
    if problems := is_chosen and problems_of(fixed, groups, gpus, is_gpu):
        return "\n".join(problems)
    if fixed.get("ep_size", 1) > 1 and gpus > 1 and not own_counts:
        return f"{typed('ep_size', fixed['ep_size'])}: the model has no experts to spread. Leave it out."
    flags = " ".join(typed(name, fixed[name]) for name in ("fsdp_size", "ep_size") if name in fixed)
    if not flags:
        return f"--deepspeed none: upcycled experts train on --gpus {gpus} under DeepSpeed alone. Leave it out."
    return f"{flags} does not divide --gpus {gpus} and the experts (--num_experts, or the model's own)."


def unsplit(layouts: Sequence[Layout], bits: int) -> tuple[Layout, ...]:
    """Those that split no weights. Raises UserError: there is none."""
    kept = tuple(layout for layout in layouts if layout.fsdp == 1 and layout.zero < 3)
    if not kept:
        raise UserError(f"--bits {bits}: packed weights are not split. Use --deepspeed zero2, or leave it out.")
    return kept


def command_of(asked: Asked, flags: list[str], words: list[str], given: dict[str, Any]) -> str:
    """The command that starts the run."""
    fixed = {f"--{name}" for name in FIXED if name in given}
    added = [word for pair in zip(flags[::2], flags[1::2], strict=True) if pair[0] not in fixed for word in pair]
    if asked.device.is_gpu and not {"bf16", "fp16"} & given.keys():
        added += ["--bf16", "True"]
    if "data_path" not in given:
        added += ["--data_path", "DATA.json"]
        if "model_max_length" not in given and asked.longest != defaults()["model_max_length"]:
            added += ["--model_max_length", str(asked.longest)]
    return " ".join([launcher(asked.gpus, asked.per_host), "-m moellava.train", shlex.join([*words, *added])])


def said(asked: Asked, rows: list, command: str | None, given: dict[str, Any]) -> list[str]:
    """The plan as text."""
    batch = asked.data.longest
    what = "row of samples" if asked.is_packed else "sample"
    about = f"longest {what} {batch.length} positions ({batch.supervised} supervised, {batch.images} images)"
    lines = [f"{asked.gpus} devices of {asked.memory:g} GB; {about}, mean {asked.data.mean_length:.0f}"]
    lines.append(LIE[any(row.in_one_row for row in rows)])
    if "optim" in given and not given["optim"].startswith("adamw_torch"):
        lines.append(f"Optimizer states are counted as AdamW's, which {typed('optim', given['optim'])} need not hold.")
    lines.append("")
    lines += table(best_of_each(rows, asked.memory), asked.memory)
    smallest = in_units(min(row.total for row in rows))
    lines.append("")
    lines.append(command or f"Nothing fits into {asked.memory:g} GB: the smallest takes {smallest} a process.")
    return lines
