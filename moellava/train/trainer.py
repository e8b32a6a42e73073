# SPDX-License-Identifier: Apache-2.0
"""HF's Trainer with our loss, our parameter groups, and saves that cannot lose a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from moellava.data.collate import RECORDS, UNREADABLE
from moellava.data.places import PLACES, Places
from moellava.data.sampler import GroupedSampler
from moellava.errors import UserError
from moellava.log import get_logger
from moellava.model.short_tower import ShortTower
from moellava.moe import moe_layers, router_losses, router_metrics, set_routing_context
from moellava.moe.modes import evaluating
from moellava.moe.own_routers import OwnRouters, has_own_experts
from moellava.processes import sum_over_processes
from moellava.train.checkpoint import STAGING, last_checkpoint, put_in_place
from moellava.train.deepspeed.portable import expert_parallel_size, load_portable, save_portable, spread_of
from moellava.train.folder import StageFolder
from moellava.train.fsdp_trainer import FSDPTrainer
from moellava.train.intact import reading
from moellava.train.loss import SupervisedHead, sums_of_records, supervised_positions
from moellava.train.memory import zero_stage
from moellava.train.optimizer import missing_from, parameter_groups
from moellava.train.own_positions import share_rows
from moellava.train.progress import Clock, RunLines, RunProgress
from moellava.train.rows import NeededRows
from moellava.train.run_hooks import RunHooks, counts_of
from moellava.train.sample_attention import SampleAttention
from moellava.train.split import begin_random, processes_of
from moellava.train.stopping import StepWatch, StopRequest, require_finite
from moellava.vlm import VLM

logger = get_logger(__name__)


class StageTrainer(FSDPTrainer):
    """Trains one stage.

    Args:
        vlm: its model.
        folder: writes complete model folders.
        balance: see `watch_own_experts`.
        kwargs: of `transformers.Trainer`.
    """

    def __init__(self, *, vlm: VLM, folder: StageFolder, balance: float | None = None, **kwargs):
        super().__init__(model=vlm.model, **kwargs)
        self.vlm = vlm
        self.folder = folder
        self.image_token_ids = vlm.placeholder_ids  # the image tokens of the routing statistics
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the supervised tokens of the whole step
        self.head = SupervisedHead(self.model.get_output_embeddings(), self.model.config.get_text_config().vocab_size)
        self.rows, self.tower = NeededRows(self.model), ShortTower(self.model)
        self.attention = SampleAttention(self.model)
        self.is_moe = bool(moe_layers(self.model))
        self.own_routers = watch_own_experts(vlm, balance)
        self.step_tokens = torch.zeros(())
        self.step_items: torch.Tensor | int | None = None
        self.last_grad_norm: torch.Tensor | float | None = None
        self.eval_sums: torch.Tensor | None = None
        self.watch = StepWatch(self, StopRequest())
        self.saving_to: Path | None = None
        self.train_sampler: GroupedSampler | None = None
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.clock = Clock()
        self.rest: dict[str, float] = {}  # what a log line behind the last one would have said
        shows_bar = sys.stderr.isatty() and not self.args.disable_tqdm
        self.add_callback((RunProgress if shows_bar else RunLines)(self.clock))
        self.add_callback(RunHooks(self))
        self.add_callback(self.watch)

    # -- loss ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step; for a sparse model also counts its tokens, on which the router
        losses are means."""
        if self.control.should_training_stop:  # before the first step: see `RunHooks.on_epoch_begin`
            return [], None
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.is_moe or self.own_routers is not None:
            counted = sum(len(batch[PLACES]["real"]) for batch in batches)
            self.step_tokens = sum_over_processes(torch.tensor(float(counted), dtype=torch.float64, device=device))
        if not self.args.average_tokens_across_devices:  # each process's mean counts alike, of those that have one
            num_items_in_batch *= sum_over_processes((num_items_in_batch > 0).long())
        self.step_items = num_items_in_batch
        return batches, num_items_in_batch

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As HF's."""
        with self.rows.only_within(), self.tower, self.attention:
            return super().training_step(*args, **kwargs)

    @property
    def step_labels(self) -> int:
        """Supervised tokens of this optimizer step. The host waits for the device."""
        return int(self.step_items or 0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy per supervised token of the whole step, plus the router losses.

        Args:
            inputs: input_ids, attention_mask, labels [B, L], pixel_values [N, 3, H, W]; of samples that share rows also
                position_ids [B, L]. What the collator says beside them is taken out.
            num_items_in_batch: supervised tokens of this optimizer step over all processes and accumulation
                steps, 0 where none of its records could be shown; not read in evaluation, where `prediction_step`
                counts what every record adds.
        """
        dataset = self.train_dataset if model.training else self.eval_dataset
        dataset.leave_out(inputs.pop(UNREADABLE, {}))
        records, places = inputs.pop(RECORDS), Places(**inputs.pop(PLACES))
        supervised = supervised_positions(inputs.pop("labels"), places.supervised)
        image_mask, attention_mask = self.tell_routers(inputs, places), inputs["attention_mask"]
        if places.is_packed:
            share_rows(self.model, inputs, places.lengths)
            self.attention.tell(places.lengths)
        if self.head.is_last is None and self.may_chunk:
            with evaluating(model):
                self.head.look(lambda: model(**inputs, use_cache=False).logits, supervised)
        if model.training:  # until `training_step` is over
            forward = lambda: self.head.seen(lambda: model(**inputs, use_cache=False), supervised)  # noqa: E731
            self.rows.begin(model, forward, places, supervised)
        with self.head.only(supervised):
            outputs = model(**inputs, use_cache=False)
        if not model.training:
            self.eval_sums = sums_of_records(self.head.losses(outputs.logits, supervised.target_N), supervised)
            loss = self.eval_sums[:, 0].sum() / max(len(supervised.target_N), 1)
            return (loss, outputs) if return_outputs else loss
        # Gradients are averaged over processes, so each contributes its share of the step times their number.
        processes = self.accelerator.num_processes
        ce = self.head.loss_sum(outputs.logits, supervised.target_N, self.args.label_smoothing_factor)
        loss = ce * processes / torch.as_tensor(num_items_in_batch).clamp_min(1)
        measured = {"ce": loss.detach()}
        if self.is_moe:
            shares = router_losses(self.model, total_tokens=self.step_tokens, reduce=sum_over_processes)
            measured |= {
                name: value.detach().double() * processes for name, value in (("aux", shares.aux), ("z", shares.z))
            }
            loss = loss + shares.total * processes
        elif self.own_routers is not None:
            share = len(places.real) / self.step_tokens * processes
            aux = self.own_routers.loss(attention_mask, image_mask) * share
            measured["aux"] = aux.detach()
            loss = loss + aux * self.own_routers.coefficient
        self.watch.see(measured, records)
        counted = {"tokens": len(places.real), "positions": attention_mask.numel(), "samples": len(records)}
        for name, number in ({name: value.double() for name, value in measured.items()} | counted).items():
            self.sums[name] = self.sums.get(name, 0.0) + number
        return (loss, outputs) if return_outputs else loss

    def tell_routers(self, inputs, places: Places) -> torch.Tensor:
        """Sets what the routers know of a batch; gives the mask [B, L] of its image patches."""
        ids = inputs["input_ids"]
        token_mask = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
        token_mask = token_mask.index_fill_(0, places.real, True).view_as(ids)
        image_mask = torch.isin(ids, ids.new_tensor(self.image_token_ids)) & token_mask
        sequences = (places.sequence, places.n_sequences)
        set_routing_context(self.model, token_mask, image_mask, places.real, sequences)
        return image_mask

    @property
    def may_chunk(self) -> bool:
        """Whether the logits of a micro-batch may be too many to be held at once; the same on every process."""
        samples = max(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        return self.head.may_chunk(samples, self.args.model_max_length)

    def _get_grad_norm(self, model, grad_norm=None):
        self.last_grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.last_grad_norm

    # -- evaluation ------------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As HF's; adds what the records have to the sums of this evaluation, each record once.

        Processes repeat records so that their last batches are equally large; `gather_for_metrics` drops those.
        """
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        self.eval_total += self.accelerator.gather_for_metrics(self.eval_sums).double().sum(0)
        return found

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As HF's, with a loss that is a mean over tokens, however they are split over batches and processes."""
        self.eval_total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        summed, count = self.eval_total.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = summed / max(count, 1.0)
        return output

    # -- log -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, the throughput and the routing statistics to a training log line."""
        if "loss" in logs and self.sums:
            logs |= self._drain()
        super().log(logs, start_time)

    def _drain(self) -> dict[str, float]:
        """Sums since the last log line -> means per optimizer step, over all processes."""
        names = list(self.sums)
        device = self.args.device
        sums = torch.stack([torch.as_tensor(self.sums[name], dtype=torch.float64, device=device) for name in names])
        values = dict(zip(names, sum_over_processes(sums).tolist(), strict=True))
        seconds = time.perf_counter() - self.interval_start
        counts = {name: values.pop(name) for name in ("tokens", "samples")}
        positions = values.pop("positions")
        self.clock.count(**counts, seconds=seconds)
        steps = max(self.state.global_step - self.last_logged_step, 1) * self.args.world_size
        shown = {name: value / steps for name, value in values.items()}
        shown |= {f"{name}_per_second": count / seconds for name, count in counts.items()}
        shown["padding"] = 1 - counts["tokens"] / positions
        if self.is_moe:
            shown |= flat_metrics(router_metrics(self.model, reduce=sum_over_processes))
        elif self.own_routers is not None:
            shown |= flat_metrics(self.own_routers.metrics(self.args.device, sum_over_processes))
        self.begin_interval()
        return shown

    def count_rest(self) -> None:
        """Counts the steps behind the last log line into the run's totals. All processes come here together."""
        self.rest = self._drain() if self.sums else {}

    def begin_interval(self) -> None:
        """Starts counting for the next log line."""
        self.sums: dict[str, Any] = {}
        self.interval_start = time.perf_counter()
        self.last_logged_step = self.state.global_step

    def evaluate(self, *args, **kwargs):
        """As HF's; evaluation counts no more in the throughput that is logged than in the load of experts. Says which
        records could not be shown."""
        began = time.perf_counter()
        try:
            metrics = super().evaluate(*args, **kwargs)
        finally:
            self.interval_start += time.perf_counter() - began
        counts = counts_of(self.eval_dataset)
        if self.eval_dataset.unreadable:
            logger.info("Evaluation data: %s", counts)
        return metrics

    # -- data and optimizer ----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        grouped = self.args.group_by_modality_length
        self.train_sampler = GroupedSampler(
            dataset.positions if grouped else np.broadcast_to(np.int32(1), len(dataset)),  # equal: a plain shuffle
            dataset.with_media if grouped else None,
            batch_size=self.args.train_batch_size,
            world_size=self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            accumulation=self.args.gradient_accumulation_steps,
            drop_last=self.args.dataloader_drop_last,
        )
        return self.train_sampler

    def create_optimizer(self, model=None):
        """Named groups for every engine; experts in groups of their own under DeepSpeed."""
        if self.optimizer is None:
            groups = parameter_groups(
                self.model,
                self.vlm.parts["projector"],
                weight_decay=self.args.weight_decay,
                learning_rate=self.args.learning_rate,
                projector_lr=self.args.mm_projector_lr,
            )
            if self.is_deepspeed_enabled and self.is_moe:
                from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

                groups = split_params_into_different_moe_groups_for_optimizer(groups)
            forgotten = missing_from(groups, self.model)
            assert not forgotten, f"trainable parameters without an optimizer group: {forgotten[:5]}"
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    # -- saving ----------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial) -> str:
        return str(self.saving_to or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        """Writes a checkpoint aside and moves it to its place when it is complete on every process."""
        output_dir, began = Path(self.args.output_dir), time.perf_counter()
        self.saving_to = output_dir / STAGING
        try:
            with self._saving():
                super()._save_checkpoint(model, trial)
        finally:
            self.saving_to = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            put_in_place(
                output_dir / STAGING / f"checkpoint-{self.state.global_step}", output_dir, self.args.save_total_limit
            )
        self.accelerator.wait_for_everyone()
        self.interval_start += time.perf_counter() - began  # the throughput that is logged is that of training

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Raises UserError where a disk is full: what is safe, and how to go on."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise UserError(self.folder.failed_save(error, self.state.global_step)) from error

    def init_hf_repo(self, token: str | None = None) -> None:
        """Nothing: see `hub.py`."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: checkpoints are not uploaded."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a complete folder that the next stage, chat and (if dense) plain transformers open.

        A checkpoint holds the weights as they train, in fp32 where the stage's own folder is in 16 bits.
        """
        require_finite(self.model, self.state.global_step, last_checkpoint(self.args.output_dir))
        state = self.folder.gather(self.model, self.model_wrapped, self.accelerator)
        if self.args.should_save:
            with self._saving():
                self.folder.write(state, Path(output_dir or self.args.output_dir), final=self.saving_to is None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_moe and self.is_deepspeed_enabled and hasattr(self.model_wrapped.optimizer, "bit16_groups"):
            save_portable(self.model_wrapped, self.model, Path(output_dir))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """As HF's; a checkpoint of another `ep_size` or number of processes is read by parameter, since DeepSpeed's own
        files do not fit."""
        given = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with reading(given, self.is_deepspeed_enabled):
            return self._prepare_from(max_steps, train_dataloader, given)

    def _prepare_from(self, max_steps, train_dataloader, given: Path | None):
        spread = (self.args.world_size, expert_parallel_size(self.model))
        if given is None or not zero_stage(self.args.deepspeed) or spread_of(given) == spread:
            return super()._prepare_for_training(max_steps, train_dataloader, str(given) if given else None)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(str(given))  # under DeepSpeed: the scheduler alone
        load_portable(self.model_wrapped, self.model, given, self.lr_scheduler.get_last_lr())
        return prepared

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint and processes_of(Path(checkpoint)) != self.args.world_size:
            begin_random(self.args.seed, self.state.global_step, self.args.process_index)
            return
        with reading(checkpoint, False):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self.folder.load(model or self.model, Path(resume_from_checkpoint))


def watch_own_experts(vlm: VLM, balance: float | None = None) -> OwnRouters | None:
    """The routers of a composed model whose language model is sparse of itself; None: there is nothing to watch.

    Args:
        balance: the weight that a flag gives the balancing loss; a released model's is watched with such a flag alone.
    """
    is_released = vlm.architecture is not None
    if (is_released and balance is None) or moe_layers(vlm.model) or not has_own_experts(vlm.model):
        return None
    routers, name = OwnRouters(vlm.model, balance), vlm.model.config.get_text_config().model_type
    if routers.balance is None:
        logger.info(
            "The language model (%s) has experts and no balancing loss of its own: it trains without. "
            "--router_aux_loss_coef 0.01 would add Mixtral's.",
            name,
        )
        return None
    whose = "its" if routers.balance.is_own else "it has no balancing loss of its own, and Mixtral's"
    told = "balancing loss counts" if routers.balance.is_own else "counts"
    logger.info("The language model (%s) has experts: %s %s %g times.", name, whose, told, routers.coefficient)
    return routers


def flat_metrics(metrics: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Routing statistics under flat keys, as TensorBoard wants them: `expert_load/layer_3/expert_0`."""
    flat: dict[str, float] = {}
    for layer, values in metrics.items():
        for name, value in values.items():
            if name.startswith("load"):
                flat |= {f"expert_{name}/{layer}/expert_{expert}": share for expert, share in enumerate(value)}
            elif name != "tokens":
                flat[f"router_{name}/{layer}"] = len(value) if name == "dead" else value
    return flat
