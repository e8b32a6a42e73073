"""Opening folders: ours of any stage, Hugging Face's LLaVA, and those that LLaVA and MoE-LLaVA published.

The config decides what a folder is; its name never does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PretrainedConfig

from moellava.data.tokenizers import load_tokenizer
from moellava.errors import UserError
from moellava.files import read_config, resolve_folder
from moellava.model.compose import section
from moellava.model.extended import PREFIX, base_of, extended_class
from moellava.model.families import family_of
from moellava.model.loading import read
from moellava.model.published import EMBEDDINGS, STAGE_1_FILE, is_sparse, open_published, projector_tensors
from moellava.model.saving import save_pretrained_folder
from moellava.model.towers import TOWERS
from moellava.model.weights import read_file, read_tensors
from moellava.moe import convert_engine

__all__ = [
    "folder_kind",
    "image_size",
    "load_pretrained_model",
    "load_projector",
    "parts_of",
    "require_tokenizer",
    "save_pretrained_folder",
    "tokens_per_image",
]

FLAG = "--model_name_or_path"


def folder_kind(path: str | Path, flag: str = FLAG) -> str:
    """What a folder holds, by its config.

    Returns:
        'llm' (a base language model), 'tower', 'dense' (a composed or published vision-language model) or 'moe' (a
        sparse one).
    """
    return config_kind(read_config(resolve_folder(str(path), flag), flag))


def config_kind(raw: dict[str, Any]) -> str:
    """The same, of a `config.json` that has been read."""
    model_type = raw.get("model_type", "")
    if model_type in TOWERS or model_type in {kind.full_model_type for kind in TOWERS.values()}:
        return "tower"
    if is_sparse(raw):
        return "moe"
    return "dense" if "text_config" in raw or is_published(raw) else "llm"


def is_published(raw: dict[str, Any]) -> bool:
    """Whether LLaVA's or MoE-LLaVA's code wrote this config: a language model's, with the tower's name in it."""
    return "text_config" not in raw and ("mm_image_tower" in raw or "mm_vision_tower" in raw)


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype that a device computes in well: bf16 or fp16 on GPUs, fp32 on CPUs."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def default_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    model_name: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    engine: str = "native",
) -> tuple[Any, Any, Any, int]:
    """Opens a vision-language model for use or for further training.

    Args:
        model_path: a folder of any stage of ours, of Hugging Face's LLaVA, or published by LLaVA or MoE-LLaVA.
        model_base: the language model, where `model_path` holds no more than an `mm_projector.bin` and its config; or
            where its tokenizer lies elsewhere.
        model_name: not used; in its place since LLaVA's function has it.
        device: default: a GPU where there is one.
        dtype: default: what the device computes in well.
        engine: what runs a sparse model's experts, 'native' or 'deepspeed'.

    Returns:
        tokenizer, model (in evaluation mode), processor, and the longest context in tokens. Tokenizer and processor are
        None where a published folder has no tokenizer and no `model_base` is given (see `require_tokenizer`).

    Raises:
        UserError: the folder is of another kind, lacks files or weights, or its parts do not belong together.
    """
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    folder = resolve_folder(str(model_path), "--model-path")
    raw = read_config(folder, "--model-path")
    kind = config_kind(raw)
    if kind in ("llm", "tower"):
        what = "a language model without a vision tower" if kind == "llm" else "a vision tower without a language model"
        raise UserError(
            f"--model-path {model_path} is {what}. Stage 1 composes the two: "
            "train.py --model_name_or_path LLM --image_tower TOWER --version plain"
        )
    if is_published(raw):
        model, tokenizer, processor = open_published(folder, model_base, dtype)
    else:
        model, tokenizer, processor = open_composed(folder, raw, dtype)
    if engine != "native":
        convert_engine(model, engine)
    return tokenizer, model.to(device), processor, model.config.get_text_config().max_position_embeddings


def require_tokenizer(tokenizer: Any, model_path: str | Path, flag: str = "--model-path") -> None:
    """Raises UserError if a folder came without a tokenizer, for those who cannot go on without one."""
    if tokenizer is None:
        raise UserError(
            f"{flag} {model_path} holds no tokenizer. Copy the files of the language model's tokenizer into it, "
            "or give the language model as --model-base."
        )


def open_composed(folder: Path, raw: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A folder in Hugging Face's layout, extended or not -> model, tokenizer, processor."""
    model = read_composed(folder, raw, dtype)
    tokenizer = load_tokenizer(str(folder), model.config.moellava["version"])
    return model, tokenizer, LlavaProcessor.from_pretrained(folder, tokenizer=tokenizer)


def read_composed(folder: Path, raw: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model of such a folder alone."""
    if raw["model_type"].startswith(PREFIX):
        cls = extended_class(base_of(raw["model_type"]))
    elif raw["model_type"] == "llava":
        cls = LlavaForConditionalGeneration
    else:
        raise UserError(f"{folder} is a {raw['model_type']!r} model, which no stage of ours writes.")
    model = read(cls, folder, dtype)
    if "moellava" not in raw:
        model.config.moellava = adopted(model.config)
    return model


def adopted(config: PretrainedConfig) -> dict[str, Any]:
    """The `moellava` section of a folder that other code composed: what its config implies, and its family's template.

    Raises:
        UserError: a projector that none of our names describes.
    """
    names = {"gelu": "mlp2x_gelu"}
    if config.projector_hidden_act not in names:
        raise UserError(f"Its projector's activation is {config.projector_hidden_act!r}. Known: {', '.join(names)}")
    return section(
        family_of(config),
        image_aspect_ratio="square",
        image_projector_type=names[config.projector_hidden_act],
        image_tower=config.vision_config.name_or_path or None,
    )


def load_projector(model: Any, path: str | Path) -> None:
    """Copies a projector into a model, and with it what `<im_start>` and `<im_end>` have learnt where they are used.

    Args:
        path: an `mm_projector.bin` of LLaVA or MoE-LLaVA, or a folder of any stage, ours or theirs.

    Raises:
        UserError: there is no projector, it has another shape than the model's, or only one of the two uses the tokens.
    """
    path = Path(path)
    if path.is_dir() and (path / STAGE_1_FILE).is_file():
        path = path / STAGE_1_FILE
    tensors = read_tensors(path) if path.is_dir() else dict(read_file(path))
    found = projector_tensors(tensors)
    if not found:
        raise UserError(f"--pretrain_mm_mlp_adapter {path} holds no projector.")
    projector = parts_of(model)["projector"]
    fixed = dict(projector.named_buffers())
    wanted = {name: tuple(tensor.shape) for name, tensor in projector.named_parameters()}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in found.items()
        if name not in fixed or not torch.equal(tensor.to(fixed[name]), fixed[name])
    }
    if shapes != wanted:
        raise UserError(
            f"--pretrain_mm_mlp_adapter {path} does not fit --image_projector_type: "
            f"it holds {shapes}, but the model's projector is {wanted}."
        )
    projector.load_state_dict(found, strict=False)
    copy_image_tokens(model, learnt_image_tokens(path, tensors), path)


def learnt_image_tokens(path: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Embeddings [2, D] of `<im_start>` and `<im_end>` beside a projector, or None.

    LLaVA stores them (or the whole table, which they end) in `mm_projector.bin`; our config names their ids.
    """
    tables = [tensor for name, tensor in tensors.items() if name.endswith(EMBEDDINGS)]
    if not tables:
        return None
    if not path.is_dir():
        return tables[0][-2:]
    extras = read_config(path, "--pretrain_mm_mlp_adapter").get("moellava") or {}
    ids = extras.get("image_token_ids") or []
    return tables[0][ids[1:]] if ids[1:] else None


def copy_image_tokens(model: Any, embeddings: torch.Tensor | None, path: Path) -> None:
    """Writes embeddings [2, D] to the rows of `<im_start>` and `<im_end>`. Raises UserError if one side lacks them."""
    ids = (model.config.moellava.get("image_token_ids") or [])[1:]
    if bool(ids) != (embeddings is not None):
        there, here = ("with", "without") if embeddings is not None else ("without", "with")
        raise UserError(
            f"--pretrain_mm_mlp_adapter {path} was trained {there} <im_start> and <im_end>, but this run is {here} "
            f"them: set --mm_use_im_start_end {embeddings is not None}."
        )
    if embeddings is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight[ids] = embeddings.to(model.get_input_embeddings().weight)


TOWERS_AT = ("vision_tower", "vision_model", "visual")
PROJECTORS_AT = ("multi_modal_projector", "connector")
MERGERS = ("merger", "deepstack_merger_list")
"""What transformers calls the vision encoder, the projector, and a projector that lies inside the encoder."""


def has_known_parts(model: Any) -> bool:
    """Whether the parts of a model are where `parts_of` looks for them."""
    return any(hasattr(getattr(model, "model", model), name) for name in TOWERS_AT)


def parts_of(model: Any) -> dict[str, nn.Module]:
    """The four parts of a composed or released model by name. The head is the embedding itself where the two are tied.

    Where the projector lies inside the vision encoder, the parts are lists of the modules that belong to each. A model
    of another layout brings `own_parts`, which says where they are.
    """
    if hasattr(model, "own_parts"):
        return model.own_parts()
    inner = model.model
    tower = next(getattr(inner, name) for name in TOWERS_AT if hasattr(inner, name))
    projector = next((getattr(inner, name) for name in PROJECTORS_AT if hasattr(inner, name)), None)
    if projector is None:
        mergers = [child for name, child in tower.named_children() if name in MERGERS]
        tower = nn.ModuleList(child for name, child in tower.named_children() if name not in MERGERS)
        projector = mergers[0] if len(mergers) == 1 else nn.ModuleList(mergers)
    return {
        "vision_tower": tower,
        "projector": projector,
        "language_model": model.get_decoder(),
        "lm_head": model.get_output_embeddings(),
    }


def tokens_per_image(model: Any) -> int:
    """Placeholder tokens that one image takes in the input."""
    return model.config.image_seq_length


def image_size(model: Any) -> tuple[int, int]:
    """(height, width) in pixels of the images that the tower takes."""
    side = model.config.vision_config.image_size
    return side, side
