# SPDX-License-Identifier: Apache-2.0
"""One stage of training, from flags to a complete folder.

    deepspeed train.py --version qwen --model_name_or_path … --data_path … --output_dir …

Also `python train.py …` (one process) and `torchrun --nproc-per-node N train.py …`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import set_seed

from moellava import __version__, heap
from moellava.adapters.gradient_watch import GradientWatch
from moellava.adapters.lora import trainable_parameters
from moellava.data.dataset import SupervisedDataset
from moellava.data.media import MediaFiles
from moellava.data.packing import packed
from moellava.data.records import Records, load_records
from moellava.data.render.own import begin_on, day
from moellava.data.skip_lists import SkipList, read_skip_list
from moellava.errors import UserError, message_of
from moellava.log import copied_to, get_logger, is_rank_zero, printable
from moellava.model.manifest import read_folder
from moellava.model.stored import as_stored
from moellava.moe import enable_gradient_checkpointing
from moellava.moe.activations import use_kernels
from moellava.processes import leave_group, of_rank_zero
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments
from moellava.train.assemble import Assembled, assemble, casts_later, leave_files, start_of, training_dtype
from moellava.train.checkpoint import (
    check_contents,
    check_folder,
    chosen_checkpoint,
    claim_folder,
    complete_checkpoints,
    mark_finished,
    stored_contents,
)
from moellava.train.deepspeed.extensions import extension_root, remove_abandoned_locks
from moellava.train.deepspeed.portable import expert_parallel_size, refuse_unreadable
from moellava.train.deepspeed.zero import refuse_zero3_experts, whole_parameters
from moellava.train.folder import StageFolder
from moellava.train.fsdp import check_shards, shard
from moellava.train.hub import hub_of
from moellava.train.identity import folders_of, run_contents, run_identity
from moellava.train.intact import require_intact
from moellava.train.known_features import know_features, refuse_features
from moellava.train.known_pixels import know_pixels, refuse_pixels
from moellava.train.lock import locked
from moellava.train.masters import Masters, cast, dtypes_of, masters_of
from moellava.train.memory import describe, estimate, layout_of
from moellava.train.parsing import TrainingArguments, arguments_of, given_flags, parse_arguments
from moellava.train.present import require_present
from moellava.train.run_file import as_yaml, write_run_file
from moellava.train.run_log import TEXT_LOG, RunLog
from moellava.train.samples import SampleAnswers, counts_text, first_sample
from moellava.train.split import asked_split, require_same_numbers, require_same_step, split_of
from moellava.train.stages import Stage, freeze_all_but, parameter_table, render_table, save_table, stage_of
from moellava.train.stopping import Stopped
from moellava.train.tasks import TaskScores, tasks_of
from moellava.train.trackers import ExpertHistograms
from moellava.train.trainer import StageTrainer
from moellava.vis.report import report_of
from moellava.vlm import VLM

logger = get_logger(__name__)

KEPT: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "cache_features": (refuse_features, know_features),
    "cache_pixels": (refuse_pixels, know_pixels),
}
"""Flag that names a folder where something is kept of pictures -> what refuses it for a model, and what does it."""

SECONDS_FOR_RANK_ZERO = 10
"""Most mistakes are found by every process. The first one speaks; its exit makes the launcher end the others."""


def train(
    model_args: ModelArguments, data_args: DataArguments, moe_args: MoEArguments, args: TrainingArguments
) -> Path:
    """Runs one stage, or goes on with it, and returns its folder.

    Raises:
        UserError: before the first step, for whatever in flags, data or folders would make the run wrong.
    """
    refuse_zero3_experts(args.deepspeed, moe_args.moe_enable)
    require_present(data_args)
    begin_on(of_rank_zero(day()))  # processes may start on both sides of midnight
    stage, output_dir = stage_of(model_args, moe_args), Path(args.output_dir)
    with locked(output_dir) if is_rank_zero() else nullcontext():
        require_same_step(output_dir, split_of(args))
        identity = run_identity(stage.name, (model_args, data_args, moe_args, args), split_of(args).samples)
        finished = check_folder(output_dir, identity)
        hub = hub_of(args) if is_rank_zero() else None
        if hub:
            hub = hub.prepared()
        if model_args.cache_dir:
            constants.HF_HUB_CACHE = model_args.cache_dir  # where all downloads go that name no folder
        if finished:
            check_contents(output_dir, contents_of(model_args, data_args, args, read_data(model_args, data_args)))
            logger.info("%s is complete: this run has finished before. Nothing to do.", output_dir)
        else:
            begin(stage, (model_args, data_args, moe_args, args), identity)
        if hub:  # the other processes wait for --ddp_timeout seconds at the end of the run
            hub.upload(output_dir)
    return output_dir


def begin(
    stage: Stage,
    groups: tuple[ModelArguments, DataArguments, MoEArguments, TrainingArguments],
    identity: dict[str, Any],
) -> None:
    """Puts model and data together, makes sure that the folder is this run's, and trains. Raises UserError."""
    model_args, data_args, moe_args, args = groups
    output_dir = Path(args.output_dir)
    resume = chosen_checkpoint(output_dir, args.resume_from_checkpoint)
    if resume:
        require_intact(resume, [path for path in complete_checkpoints(output_dir) if path != resume])
        refuse_unreadable(args, resume)
    if args.deepspeed and args.local_process_index == 0:
        remove_abandoned_locks(extension_root())
    tasks = tasks_of(args.eval_task, args.eval_task_folder, args.eval_task_limit)
    set_seed(args.seed)
    with whole_parameters(args), as_stored(casts_later(args, moe_args)):
        assembled = assemble(stage, model_args, data_args, moe_args, args)
    vlm, adapter = assembled.vlm, assembled.adapter
    trained = trainable_parameters(vlm, adapter) if adapter else stage.selects(vlm, model_args, moe_args)
    freeze_all_but(vlm.model, trained)
    kept = {flag: getattr(data_args, flag) for flag in KEPT if getattr(data_args, flag)}
    for flag, folder in kept.items():
        KEPT[flag][0](vlm, folder, args)
    masters = laid_out(vlm, moe_args.ep_size, args)
    records = read_data(model_args, data_args)
    datasets = {name: make_dataset(found, vlm, data_args, args) for name, found in zip(DATASETS, records, strict=True)}
    tell_idle_media_flags(data_args, {shown for one in datasets.values() if one for shown in one.modalities})
    contents = contents_of(model_args, data_args, args, records)
    check_contents(output_dir, contents)
    if is_rank_zero():
        claim_folder(output_dir, identity, contents, split=split_of(args), asked=asked_split(args))
        write_run_file(output_dir, args.given, __version__)
    with copied_to(output_dir / TEXT_LOG) if is_rank_zero() else nullcontext():
        if is_rank_zero():
            report(assembled, stage, args)
            report_data(datasets, trains_questions=not model_args.mask_question_tokens)
        trainer = make_trainer(stage, assembled, masters, model_args, args, datasets)
        if tasks:
            trainer.add_callback(TaskScores(trainer, tasks, args.per_device_eval_batch_size))
        for flag, folder in kept.items():
            KEPT[flag][1](trainer, Path(folder), [one for one in datasets.values() if one])
        run(trainer, stage, resume)


def laid_out(vlm: VLM, ep_size: int, args: TrainingArguments) -> Masters | None:
    """Shards a model where --fsdp_size asks for it, and casts what was opened as it is stored: what trains in 16 bits
    gets fp32 masters; None: there are none. Of a mapped file a process reads and casts its share. Raises UserError."""
    masters = None if args.deepspeed else masters_of(vlm.model, training_dtype(args))
    dtypes = dtypes_of(vlm.model, masters)
    if args.fsdp_size > 1:
        check_shards(vlm.model, vlm.source, args.fsdp_size, ep_size)
        shard(vlm.model, args.fsdp_size, ep_size, args.device, in_16_bits=args.bf16)
    cast(vlm.model, dtypes)
    if args.fsdp_size > 1:
        heap.give_back()
    elif args.world_size > 1 and args.device.type == "cpu":
        leave_files(vlm.model)
    return masters


def run(trainer: StageTrainer, stage: Stage, resume: Path | None) -> None:
    """Trains from a checkpoint, or from the start, to the complete folder. Raises Stopped where a signal ends it."""
    output_dir = Path(trainer.args.output_dir)
    if resume:
        logger.info("Going on from %s", resume)
        require_same_numbers(trainer, resume)
    heap.keep_some_in_forks()  # data workers, beside a GPU too
    with trainer.watch.request.listening(), heap.kept() if trainer.args.device.type == "cpu" else nullcontext():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.watch.require_unstopped(trainer.args)
    trainer.save_model()
    if is_rank_zero():
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        mark_finished(output_dir)
        if trainer.args.report_html:
            logger.info("Report: %s", report_of(output_dir))
        logger.info("Stage %s is complete: %s", stage.name, output_dir)
    trainer.accelerator.wait_for_everyone()


def make_trainer(
    stage: Stage,
    assembled: Assembled,
    masters: Masters | None,
    model_args: ModelArguments,
    args: TrainingArguments,
    datasets: dict[str, Any],
) -> StageTrainer:
    """The trainer of a stage, with what watches over its gradients and what shows its answers."""
    vlm = assembled.vlm
    if args.activation_checkpointing:
        enable_gradient_checkpointing(vlm.model)
        args.activation_checkpointing = False  # the Trainer would switch on its own, which routes anew
    if replaced := use_kernels(vlm.model):
        logger.info("%d activations run as one kernel", replaced)
    set_seed(args.seed)  # a resumed run and a fresh one build models differently; both train from the same state
    collator = vlm.collator(train_questions=not model_args.mask_question_tokens)
    shown = {modality for dataset in datasets.values() if dataset is not None for modality in dataset.modalities}
    collator.modalities = sorted(shown)
    collator.is_told = True
    if args.packing:
        seed = args.seed if args.data_seed is None else args.data_seed
        rows = packed(datasets["train_dataset"], args.model_max_length, seed, args.group_by_modality_length)
        logger.info("Packing: %s", rows)
        datasets = datasets | {"train_dataset": rows}
    trainer = StageTrainer(
        vlm=vlm,
        folder=StageFolder(Path(args.output_dir), vlm, stage.name, assembled.adapter, masters),
        balance=assembled.balance,
        args=args,
        data_collator=collator,
        **datasets,
    )
    facts = {"stage": stage.name, "data": {CALLED[name]: one.report() for name, one in datasets.items() if one}}
    run_log = RunLog(Path(args.output_dir), trainer.clock, facts, lambda: trainer.rest)
    trainer.add_callback(run_log)
    if assembled.adapter:
        trainer.add_callback(GradientWatch(vlm.model, vlm.parts["vision_tower"], lambda: not trainer.step_labels))
    trainer.add_callback(ExpertHistograms(trainer.callback_handler.callbacks))
    if args.eval_samples:
        trainer.add_callback(SampleAnswers(trainer, args.eval_samples, run_log))
    return trainer


DATASETS = ("train_dataset", "eval_dataset")
"""What the Trainer calls them."""

CALLED = dict(zip(DATASETS, ("Data", "Evaluation data"), strict=True))
"""What the log calls them."""


def read_data(model_args: ModelArguments, data_args: DataArguments) -> list[Records | None]:
    """The records that train, and those of evaluation; None without files. Raises DataError, and UserError for a skip
    list that names what is not there."""
    skip = read_skip_list(data_args.skip_list) if data_args.skip_list else SkipList()
    roles = (model_args.user_key, model_args.assistant_key)
    paths = (data_args.data_path, data_args.eval_data_path)
    records = [load_records(files, skip, roles) if files else None for files in paths]
    skip.require_used()
    return records


def contents_of(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, records: list[Records | None]
) -> dict[str, Any]:
    """What a run reads, by content. See `run_contents`."""
    folders = folders_of("the model", start_of(model_args)[0])
    for number, name in enumerate(model_args.image_tower or [], start=1):
        flag = "--image_tower" if number == 1 else f"--image_tower ({number})"
        folders |= folders_of(flag, read_folder(name, "--image_tower"))
    if model_args.pretrain_mm_mlp_adapter:
        folders["--pretrain_mm_mlp_adapter"] = Path(model_args.pretrain_mm_mlp_adapter)
    folders |= {f"--plugin {Path(file).name}": Path(file) for file in model_args.plugin or ()}
    data = dict(zip(("--data_path", "--eval_data_path"), records, strict=True))
    stored = stored_contents(Path(args.output_dir))
    return run_contents(folders, data, media_files(data_args), args.deepspeed, stored)


def media_files(data_args: DataArguments) -> MediaFiles:
    """Where the images and videos of the records lie."""
    folders = (data_args.image_folder, data_args.video_folder)
    return MediaFiles(*folders, data_args.num_frames, data_args.limits(), data_args.confine_media)


def tell_idle_media_flags(data_args: DataArguments, modalities: set[str]) -> None:
    """Warns of flags about images or videos of which the records show none."""
    both = {"image", "video"}
    readers = {"image_folder": both, "video_folder": {"video"}, "num_frames": {"video"}, "confine_media": both}
    readers |= dict.fromkeys(KEPT, both)
    if data_args.video_folder is not None:
        readers["image_folder"] = {"image"}
    default = {item.name: item.default for item in fields(data_args)}
    for name, read in readers.items():
        value = getattr(data_args, name)
        if value != default[name] and not modalities & read:
            logger.warning("--%s %s does nothing: the records show no %ss", name, value, " or ".join(sorted(read)))


def make_dataset(
    records: Records | None, vlm: VLM, data_args: DataArguments, args: TrainingArguments
) -> SupervisedDataset | None:
    """Checks every record. Raises DataError with all problems of the records; None without records."""
    if records is None:
        return None
    dataset = SupervisedDataset(
        records,
        vlm.encoder,
        media_files(data_args),
        max_length=args.model_max_length,
        overlong=data_args.overlong,
        bad_files=data_args.bad_files,
        takes_media=data_args.is_multimodal,
        workers=args.dataloader_num_workers,
    )
    if not data_args.lazy_preprocess:
        for index in range(len(dataset)):
            dataset[index]
    return dataset


def report(assembled: Assembled, stage: Stage, args: TrainingArguments) -> None:
    """Says what a run is before it starts: what trains (saved as `parameters.json`), the certificate, the memory."""
    output_dir = Path(args.output_dir)
    table = parameter_table(assembled.vlm)
    logger.info("Stage %s, template %s\n%s", stage.name, assembled.vlm.section.version, render_table(table))
    save_table(table, output_dir / "parameters.json")
    if assembled.certificate:
        assembled.certificate.save(output_dir)
        logger.info("%s", "\n".join(assembled.certificate.lines()))
    layout = layout_of(args.deepspeed, args.world_size, expert_parallel_size(assembled.vlm.model), args.fsdp_size)
    logger.info("%s", describe(estimate(assembled.vlm.model, layout)))


def report_data(datasets: dict[str, SupervisedDataset | None], trains_questions: bool) -> None:
    """Says what a run learns from: counts of each data set, and the first sample as the model sees it."""
    for name, dataset in datasets.items():
        if dataset is not None:
            logger.info("%s", counts_text(CALLED[name], dataset))
    dataset = datasets[DATASETS[0]]
    if dataset is not None:
        logger.info("%s", first_sample(dataset, trains_questions))


def print_config(argv: list[str]) -> int:
    """Prints the flags that are given, by file and words together, as a run file. Returns the exit status."""
    try:
        given = given_flags(argv)
        arguments_of(given)
    except UserError as error:
        logger.error("%s", error)
        return 2
    print(printable(as_yaml(given)), end="")  # noqa: T201  (the answer of a command)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `train.py`: a user's mistake is one message on the first process, and exit status 2;
    a run that a signal has stopped ends with 143 or 130."""
    code = 0
    try:
        train(*parse_arguments(sys.argv[1:] if argv is None else argv))
    except Stopped as stopped:  # by all processes, after the same step
        logger.warning("%s", stopped)
        code = stopped.exit_code
    except UserError as error:
        if not is_rank_zero():
            time.sleep(SECONDS_FOR_RANK_ZERO)
        logger.error("%s", message_of(error))
        # Other processes may stand in a collective that this one will never join: no orderly exit from here.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(2)
        return 2
    leave_group()
    return code


if __name__ == "__main__":  # `deepspeed moellava/train/train.py …`
    from moellava.train.entry import main as enter

    here = Path(__file__).resolve().parent  # which Python has put first: its `deepspeed` would hide the package
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    sys.exit(enter(sys.argv[1:]))
