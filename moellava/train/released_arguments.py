"""The flags of `train.py` that are about released models, and what they mean in terms of the others."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from moellava.errors import UserError
from moellava.lmm.supported_models import SUPPORTED_MODELS

COMPOSED_ONLY = (
    "model_name_or_path",
    "image_tower",
    "pretrain_mm_mlp_adapter",
    "image_projector_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_use_im_start_end",
)
"""Flags that say how a model is composed: a released one is as it is."""


@dataclass
class ReleasedArguments:
    """A released vision-language model, in place of --model_name_or_path."""

    model_id: str | None = field(default=None, metadata={"help": "A released model; `moellava models` lists them."})
    model_local_path: str | None = field(
        default=None, metadata={"help": "Folder of a released model; with --model_id, where that model lies."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code in the model's folder, for families that need it."}
    )
    train_vision_encoder: bool = field(default=False, metadata={"help": "Train the vision encoder, in full."})
    train_vision_projector: bool | None = field(
        default=None,
        metadata={"help": "Train what maps image features to embeddings. Unset: not with a released model."},
    )
    use_vision_lora: bool = field(
        default=False, metadata={"help": "Train low-rank adapters beside the vision encoder's frozen linears."}
    )
    use_lora: bool = field(default=False, metadata={"help": "The same as --lora_enable."})
    q_lora: bool = field(default=False, metadata={"help": "The same as --lora_enable True --bits 4."})
    mask_question_tokens: bool = field(
        default=True, metadata={"help": "False: train on every token but padding and media."}
    )
    user_key: str = field(default="human", metadata={"help": "What the records call the user's turns."})
    assistant_key: str = field(default="gpt", metadata={"help": "What the records call the model's turns."})

    @property
    def is_released(self) -> bool:
        """Whether a released model is asked for."""
        return bool(self.model_id or self.model_local_path)


def settle(model: Any, training: Any) -> None:
    """Writes what the flags of released models mean into the others, so that the rest of training need not know.

    Args:
        model: `ModelArguments`.
        training: `TrainingArguments`.

    Raises:
        UserError: a released model beside flags that compose another one, or its flags without one.
    """
    if model.q_lora:
        training.bits = 4
    training.lora_enable = training.lora_enable or model.use_lora or model.q_lora
    if not model.is_released:
        if model.train_vision_projector is not None:
            model.freeze_mm_mlp_adapter = not model.train_vision_projector
        return
    default = {f.name: f.default for f in fields(model)}
    for name in COMPOSED_ONLY:
        if getattr(model, name) != default[name]:
            raise UserError(f"--{name} {getattr(model, name)} conflicts with --model_id and --model_local_path.")
    if model.tune_mm_mlp_adapter:
        raise UserError(
            "--tune_mm_mlp_adapter True (stage 1) is for composed models. A released model's projector alone trains "
            "with --freeze_backbone True --train_vision_projector True."
        )
    model.model_name_or_path = model.model_local_path or SUPPORTED_MODELS[model.model_id].model_hf_path
    model.freeze_mm_mlp_adapter = not model.train_vision_projector
