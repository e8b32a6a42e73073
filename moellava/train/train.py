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

from moellava.adapters.folder import AdaptedFolder
from moellava.adapters.gradient_watch import GradientWatch
from moellava.adapters.lora import trainable_parameters
from moellava.data.collate import ImageTextCollator
from moellava.data.dataset import SupervisedDataset
from moellava.data.preprocess import terminator_of
from moellava.data.records import load_records
from moellava.data.render.chat import chat_terminator
from moellava.errors import UserError
from moellava.lmm.collators import MediaCollator
from moellava.lmm.family_collators import collator_for
from moellava.lmm.prompts import ChatTemplate
from moellava.log import get_logger, is_rank_zero
from moellava.model.builder import image_size, parts_of, tokens_per_image
from moellava.moe import enable_gradient_checkpointing
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments, TrainingArguments, parse_arguments
from moellava.train.assemble import Assembled, assemble
from moellava.train.checkpoint import check_folder, claim_folder, last_checkpoint, mark_finished
from moellava.train.deepspeed.extensions import extension_root, remove_abandoned_locks
from moellava.train.deepspeed.zero import refuse_zero3_experts, whole_parameters
from moellava.train.folder import StageFolder
from moellava.train.memory import describe, estimate, zero_stage
from moellava.train.released import released_dataset
from moellava.train.samples import SampleAnswers
from moellava.train.stages import Stage, freeze_all_but, parameter_table, render_table, save_table, stage_of
from moellava.train.trainer import StageTrainer

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
        parts = assemble(stage, model_args, data_args, moe_args, args)
    adapted = parts.adapter and trainable_parameters(parts.model, parts.adapter)
    freeze_all_but(parts.model, adapted or stage.selects(parts.model, model_args, moe_args))
    datasets = {
        "train_dataset": make_dataset(data_args.data_path, parts, model_args, data_args, args),
        "eval_dataset": make_dataset(data_args.eval_data_path, parts, model_args, data_args, args),
    }
    if is_rank_zero():
        claim_folder(output_dir, identity)
        report(parts, stage, args)
    run(make_trainer(stage, parts, model_args, args, datasets), stage, output_dir)
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
    stage: Stage, parts: Assembled, model_args: ModelArguments, args: TrainingArguments, datasets: dict[str, Any]
) -> StageTrainer:
    """The trainer of a stage, with what watches over its gradients and what shows its answers."""
    if args.activation_checkpointing:
        enable_gradient_checkpointing(parts.model)
        args.activation_checkpointing = False  # the Trainer would switch on its own kind, which routes anew
    set_seed(args.seed)  # a resumed run and a fresh one build models differently; both train from the same state
    collator = make_collator(parts, model_args, datasets["train_dataset"])
    if isinstance(collator, MediaCollator):
        shown = {kind for dataset in datasets.values() if dataset is not None for kind in dataset.kinds}
        collator.kinds = sorted(shown)
    trainer = StageTrainer(
        folder=make_folder(Path(args.output_dir), parts, {"stage": stage.name, "version": model_args.version}),
        image_token_id=parts.model.config.image_token_id,
        model=parts.model,
        args=args,
        data_collator=collator,
        **datasets,
    )
    if parts.adapter:
        trainer.add_callback(GradientWatch(parts.model, parts_of(parts.model)["vision_tower"]))
    if args.eval_samples:
        trainer.add_callback(SampleAnswers(trainer, args.eval_samples, parts.tokenizer, terminator(parts, model_args)))
    return trainer


def terminator(parts: Assembled, model_args: ModelArguments) -> str:
    """What ends an answer in the model's template."""
    if parts.family:
        return chat_terminator(ChatTemplate(parts.processor, parts.processor.chat_template))
    return terminator_of(model_args.version, parts.tokenizer)


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
    paths: list[str], parts: Assembled, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> SupervisedDataset | None:
    """Reads and checks every record. Raises DataError with all problems of the files; None without files."""
    if not paths:
        return None
    records = load_records(paths, data_args.skip_list, (model_args.user_key, model_args.assistant_key))
    if parts.family:
        return released_dataset(records, parts.processor, parts.family, data_args, args)
    dataset = SupervisedDataset(
        records,
        parts.tokenizer,
        version=model_args.version,
        image_processor=parts.processor.image_processor if data_args.is_multimodal else None,
        image_folder=data_args.image_folder,
        video_folder=data_args.video_folder,
        num_frames=data_args.num_frames,
        tokens_per_image=tokens_per_image(parts.model),
        aspect_ratio=parts.model.config.moellava["image_aspect_ratio"],
        max_length=args.model_max_length,
        overlong=data_args.overlong,
        use_im_start_end=parts.model.config.moellava["use_im_start_end"],
        bad_files=data_args.bad_files,
        workers=args.dataloader_num_workers,
    )
    if not data_args.lazy_preprocess:
        for index in range(len(dataset)):
            dataset[index]
    return dataset


def make_folder(output_dir: Path, parts: Assembled, meta: dict[str, Any]) -> StageFolder:
    """What writes the run's folder: a merged model and the adapter beside it, or the model as it is."""
    if parts.adapter:
        return AdaptedFolder(output_dir, parts.tokenizer, parts.processor, meta, adapter=parts.adapter)
    return StageFolder(output_dir, parts.tokenizer, parts.processor, meta)


def make_collator(parts: Assembled, model_args: ModelArguments, dataset: Any) -> ImageTextCollator | MediaCollator:
    """The collator of a composed model, or of a released one's family."""
    if parts.family:
        train_questions = not model_args.mask_question_tokens
        return collator_for(parts.family.name, parts.processor, train_questions, dataset.reader)
    return ImageTextCollator(
        pad_token_id=parts.tokenizer.pad_token_id,
        image_token_id=parts.model.config.image_token_id,
        tokens_per_image=tokens_per_image(parts.model),
        image_size=image_size(parts.model),
    )


def report(parts: Assembled, stage: Stage, args: TrainingArguments) -> None:
    """Says what a run is before it starts: what trains (saved as `parameters.json`), the certificate, the memory."""
    output_dir = Path(args.output_dir)
    table = parameter_table(parts.model)
    logger.info("Stage %s\n%s", stage.name, render_table(table))
    save_table(table, output_dir / "parameters.json")
    if parts.certificate:
        parts.certificate.save(output_dir)
        logger.info("%s", "\n".join(parts.certificate.lines()))
    logger.info("%s", describe(estimate(parts.model, zero_stage(args.deepspeed), args.world_size)))


def main(argv: list[str] | None = None) -> int:
    """Entry point of `train.py`: a user's mistake is one message on the first process, and exit status 2."""
    try:
        train(*parse_arguments(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        if not is_rank_zero():
            time.sleep(SECONDS_FOR_RANK_ZERO)
        logger.error("%s", error)
        # Other processes may stand in a collective that this one will never join: no orderly exit from here.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(2)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
