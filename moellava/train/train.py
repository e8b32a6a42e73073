"""One stage of training, from flags to a complete folder.

    deepspeed train.py --version qwen --model_name_or_path … --data_path … --output_dir …

Also `python train.py …` (one process) and `torchrun --nproc-per-node N train.py …`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import set_seed

from moellava.adapters.gradient_watch import GradientWatch
from moellava.adapters.lora import trainable_parameters
from moellava.data.dataset import SupervisedDataset
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.data.skip_lists import SkipList, read_skip_list
from moellava.errors import UserError, message_of
from moellava.log import get_logger, is_rank_zero
from moellava.moe import enable_gradient_checkpointing
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments, TrainingArguments, parse_arguments
from moellava.train.assemble import Assembled, assemble
from moellava.train.checkpoint import check_folder, claim_folder, last_checkpoint, mark_finished
from moellava.train.deepspeed.extensions import extension_root, remove_abandoned_locks
from moellava.train.deepspeed.zero import refuse_zero3_experts, whole_parameters
from moellava.train.folder import StageFolder
from moellava.train.memory import describe, estimate, zero_stage
from moellava.train.samples import SampleAnswers
from moellava.train.stages import Stage, freeze_all_but, parameter_table, render_table, save_table, stage_of
from moellava.train.trainer import StageTrainer
from moellava.vlm import VLM

logger = get_logger(__name__)

SECONDS_FOR_RANK_ZERO = 10
"""Most mistakes are found by every process. The first one speaks; its exit makes the launcher end the others."""

WHAT_TRAINS = (
    "freeze_backbone",
    "freeze_mm_mlp_adapter",
    "train_vision_encoder",
    "train_vision_projector",
    "use_vision_lora",
)
"""Flags of `ModelArguments` that choose it, beside the stage and --lora_enable."""


def train(
    model_args: ModelArguments, data_args: DataArguments, moe_args: MoEArguments, args: TrainingArguments
) -> Path:
    """Runs one stage, or goes on with it, and returns its folder.

    Raises:
        UserError: before the first step, for whatever in flags, data or folders would make the run wrong.
    """
    refuse_zero3_experts(args.deepspeed, moe_args.moe_enable)
    stage, output_dir = stage_of(model_args, moe_args), Path(args.output_dir)
    identity = run_identity(stage, model_args, data_args, moe_args, args)
    if check_folder(output_dir, identity):
        logger.info("%s is complete: this run has finished before. Nothing to do.", output_dir)
        return output_dir
    if args.deepspeed and args.local_process_index == 0:
        remove_abandoned_locks(extension_root())
    if model_args.cache_dir:
        constants.HF_HUB_CACHE = model_args.cache_dir  # where all downloads go that name no folder
    set_seed(args.seed)
    with whole_parameters(args):
        assembled = assemble(stage, model_args, data_args, moe_args, args)
    vlm, adapter = assembled.vlm, assembled.adapter
    trained = trainable_parameters(vlm, adapter) if adapter else stage.selects(vlm, model_args, moe_args)
    freeze_all_but(vlm.model, trained)
    skip = read_skip_list(data_args.skip_list) if data_args.skip_list else SkipList()
    datasets = {
        "train_dataset": make_dataset(data_args.data_path, skip, vlm, model_args, data_args, args),
        "eval_dataset": make_dataset(data_args.eval_data_path, skip, vlm, model_args, data_args, args),
    }
    skip.require_used()
    if is_rank_zero():
        claim_folder(output_dir, identity)
        report(assembled, stage, args)
    run(make_trainer(stage, assembled, model_args, args, datasets), stage, output_dir)
    return output_dir


def run(trainer: StageTrainer, stage: Stage, output_dir: Path) -> None:
    """Trains from the last checkpoint, or from the start, to the complete folder."""
    resume = last_checkpoint(output_dir)
    if resume:
        logger.info("Going on from %s", resume)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model()
    if is_rank_zero():
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        mark_finished(output_dir)
        logger.info("Stage %s is complete: %s", stage.name, output_dir)
    trainer.accelerator.wait_for_everyone()


def make_trainer(
    stage: Stage, assembled: Assembled, model_args: ModelArguments, args: TrainingArguments, datasets: dict[str, Any]
) -> StageTrainer:
    """The trainer of a stage, with what watches over its gradients and what shows its answers."""
    vlm = assembled.vlm
    if args.activation_checkpointing:
        enable_gradient_checkpointing(vlm.model)
        args.activation_checkpointing = False  # the Trainer would switch on its own, which routes anew
    set_seed(args.seed)  # a resumed run and a fresh one build models differently; both train from the same state
    collator = vlm.collator(train_questions=not model_args.mask_question_tokens)
    shown = {modality for dataset in datasets.values() if dataset is not None for modality in dataset.modalities}
    collator.modalities = sorted(shown)
    trainer = StageTrainer(
        vlm=vlm,
        folder=StageFolder(Path(args.output_dir), vlm, stage.name, assembled.adapter),
        args=args,
        data_collator=collator,
        **datasets,
    )
    if assembled.adapter:
        trainer.add_callback(GradientWatch(vlm.model, vlm.parts["vision_tower"], lambda: not trainer.step_labels))
    if args.eval_samples:
        trainer.add_callback(SampleAnswers(trainer, args.eval_samples))
    return trainer


def run_identity(
    stage: Stage, model: ModelArguments, data: DataArguments, moe: MoEArguments, args: TrainingArguments
) -> dict[str, Any]:
    """What has to be equal for a killed run to go on in the same folder: else its samples or weights would differ.

    Steps and epochs count as well: the learning rate's schedule is laid over them.
    """
    identity = {
        "stage": stage.name,
        "model_name_or_path": model.model_name_or_path,
        "version": model.version,
        "image_tower": model.image_tower,
        "image_projector_type": model.image_projector_type,
        "data_path": data.data_path,
        "num_frames": data.num_frames,
        "trains": {name: getattr(model, name) for name in WHAT_TRAINS} | {"modules": moe.train_modules},
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "num_train_epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "deepspeed": bool(args.deepspeed),
    }
    if moe.moe_enable:
        identity["moe"] = moe.spec().to_config()
    if args.lora_enable or model.use_vision_lora:
        identity["adapter"] = args.adapter_settings()
    return identity


def make_dataset(
    paths: list[str],
    skip: SkipList,
    vlm: VLM,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
) -> SupervisedDataset | None:
    """Reads and checks every record. Raises DataError with all problems of the files; None without files."""
    if not paths:
        return None
    dataset = SupervisedDataset(
        load_records(paths, skip, (model_args.user_key, model_args.assistant_key)),
        vlm.encoder,
        MediaFiles(
            data_args.image_folder,
            data_args.video_folder,
            data_args.num_frames,
            data_args.limits(),
            data_args.confine_media,
        ),
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
    logger.info("%s", describe(estimate(assembled.vlm.model, zero_stage(args.deepspeed), args.world_size)))


def main(argv: list[str] | None = None) -> int:
    """Entry point of `train.py`: a user's mistake is one message on the first process, and exit status 2."""
    try:
        train(*parse_arguments(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        if not is_rank_zero():
            time.sleep(SECONDS_FOR_RANK_ZERO)
        logger.error("%s", message_of(error))
        # Other processes may stand in a collective that this one will never join: no orderly exit from here.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(2)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
