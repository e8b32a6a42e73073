# SPDX-License-Identifier: Apache-2.0
"""What happens around the steps of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

from moellava.data.dataset import SupervisedDataset
from moellava.errors import UserError
from moellava.heap import give_back
from moellava.log import get_logger
from moellava.moe import update_router_bias
from moellava.processes import joined_over_processes, sum_over_processes
from moellava.train.packing import settle_rows

if TYPE_CHECKING:
    from moellava.train.trainer import StageTrainer

logger = get_logger(__name__)


class RunHooks(TrainerCallback):
    """What happens around steps: checks before the first one, the sampler's epoch, the routers' biases, counts."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Stops before step 0 if DeepSpeed was dropped, if a parameter has no optimizer, or if saving fails."""
        trainer = self.trainer
        if args.deepspeed:
            from deepspeed import DeepSpeedEngine

            if not isinstance(trainer.model_wrapped, DeepSpeedEngine):
                raise UserError(
                    f"--deepspeed {args.deepspeed} was given, but the model is wrapped by "
                    f"{type(trainer.model_wrapped).__name__}. Start with `deepspeed train.py …` or `torchrun …`."
                )
        trainer.begin_interval()
        settle_rows(trainer)
        if not args.skip_dry_save:
            trainer.folder.dry_save(trainer.model, trainer.model_wrapped, trainer.accelerator)
        give_back()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Tells our sampler the epoch; a resumed run skips batches of the same order.

        One that was killed behind its last checkpoint has no step left; Hugging Face's loop would ask after one more.
        """
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the routers' selection biases (`--router_balance bias`)."""
        update_router_bias(self.trainer.model, reduce=sum_over_processes)

    def on_save(self, args, state, control, **kwargs):
        """Keeps none of the memory that saving took."""
        give_back()

    def on_train_end(self, args, state, control, **kwargs):
        """Completes the run's totals."""
        self.trainer.count_rest()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Says how many records were left out or cut, so that no loss of data stays silent."""
        logger.info("Epoch data: %s", counts_of(self.trainer.train_dataset))


def counts_of(dataset: SupervisedDataset) -> str:
    """What became of the records of a data set, on all processes together, which come here together."""
    dataset.leave_out(joined_over_processes(dataset.unreadable))
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in dataset.report().items())
