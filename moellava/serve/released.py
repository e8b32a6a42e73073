"""Chat with released models (Qwen2-VL, LLaVA-OneVision …): their own chat template, processor and `generate`.

The prompt is made by what training makes its samples with, so that both read the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from moellava.constants import IGNORE_INDEX
from moellava.data.images import open_image
from moellava.data.preprocess import as_tensor, chat_turns
from moellava.data.render.chat import chat_terminator
from moellava.errors import UserError
from moellava.files import read_config, resolve_folder
from moellava.lmm import folders
from moellava.lmm.collators import generation_inputs
from moellava.lmm.datasets import PLACEHOLDERS, TO_LOAD_IMAGE, encode_turns
from moellava.lmm.family_collators import collator_for
from moellava.lmm.loaders import ReleasedModel, find_model, load_lmm
from moellava.lmm.prompts import ChatTemplate
from moellava.model.builder import default_device, default_dtype
from moellava.serve.decode import Sampling
from moellava.serve.prompt import Request

NAME = "the question"


def is_released(model_path: str) -> bool:
    """Whether a folder holds a released model, by its config."""
    return folders.is_released(read_config(resolve_folder(model_path, "--model-path"), "--model-path"))


def open_released(model_path: str, device: str | None = None) -> ReleasedModel:
    """Opens a released model for chat.

    Raises:
        UserError: a family whose own code would have to run, or that reads images by their paths.
    """
    folder, raw, family = find_model(None, model_path)
    if family.remote_code or not TO_LOAD_IMAGE[family.name]:
        raise UserError(f"--model-path {model_path}: {family.name} models chat with the code of their repository.")
    where = torch.device(device) if device else default_device()
    released = load_lmm(Path(folder), raw, family, dtype=default_dtype(where))
    released.model.eval().to(where)
    return released


def inputs_of(released: ReleasedModel, request: Request) -> dict[str, Tensor]:
    """What `generate` takes: one row of ids with images and videos in place, and what the processor makes of them."""
    reader = released.reader
    if "video" not in reader.kinds:
        request = request.in_images()
    template = ChatTemplate(released.processor, released.processor.chat_template)
    turns = chat_turns(request.messages, NAME)
    clips = [video.clip for video in request.videos]
    has_media = bool(request.images or clips)
    ids = encode_turns(reader, template, turns, has_media, NAME, opens=True, clips=clips).ids
    for kind, given in {"image": len(request.images), "video": len(clips)}.items():
        if ids.count(PLACEHOLDERS[kind]) != given:
            raise UserError(f"{NAME} has {given} {kind}s; the template shows {ids.count(PLACEHOLDERS[kind])}.")
    pictures = [open_image(image) if isinstance(image, str | Path) else image for image in request.images]
    collator = collator_for(released.family.name, released.processor, reader=reader)
    labels = torch.full((len(ids),), IGNORE_INDEX)
    shown = {"images": pictures, "videos": list(request.videos)}
    prompt = {"input_ids": as_tensor(ids), "labels": labels, **shown, "record": NAME}
    return generation_inputs(prompt, collator, released.model.device, released.model.dtype)


def stream_released(released: ReleasedModel, request: Request, sampling: Sampling) -> Iterator[str]:
    """An answer in pieces, as they come. Raises UserError as `moellava.serve.answer.stream` does."""
    tokenizer, model = released.tokenizer, released.model
    inputs = inputs_of(released, request)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    template: Any = ChatTemplate(released.processor, released.processor.chat_template)
    terminator = tokenizer.convert_tokens_to_ids(chat_terminator(template))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(max_workers=1) as pool:
        run = pool.submit(
            model.generate,
            **inputs,
            **chosen,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted({terminator, tokenizer.eos_token_id}),
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
        )
        run.add_done_callback(lambda _: streamer.end())  # an error in the thread must not leave us waiting
        yield from (piece for piece in streamer if piece)
        run.result()
