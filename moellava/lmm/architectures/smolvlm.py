# SPDX-License-Identifier: Apache-2.0
"""SmolVLM2: an image as squares and one of the whole; a video as squares, with the times of its frames in words."""

import torch
from PIL import Image
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from moellava.data.frame_processors import COMMON, FrameRecipe, Settings, pixels_of
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.templates import IN_ORDER, filled
from moellava.model.parts import Keywords


def square_frames(settings: Settings, videos: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
    """Every frame is a square, as a small image is; `pixel_values` [videos, T, 3, side, side] and
    `pixel_attention_mask` [videos, T, side, side]."""
    side = settings["max_image_size"]["longest_edge"]
    rows = []
    for frames in videos:
        if settings["do_resize"]:
            size = longest_edge(frames[0].size, settings["size"]["longest_edge"])
            frames = [frame.resize(size, settings["resample"]) for frame in frames]
        rows.append(pixels_of(settings, frames, size={"height": side, "width": side}))
    pixels = torch.stack(rows)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0], dtype=torch.long)}


def longest_edge(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """(width, height) with the longer one as asked, the other in proportion and even."""
    width, height = size
    if width >= height:
        short = int(edge / (width / height))
        return edge, max(short + short % 2, 1)
    short = int(edge * (width / height))
    return max(short + short % 2, 1), edge


_TEMPLATE = filled(
    "<|im_start|>{%- for message in messages %}"
    "{{ message['role'].capitalize() + (':' if message['content'][0]['type'] == 'image' else ': ') }}"
    + IN_ORDER
    + "{{ '<end_of_utterance>\n' }}{%- endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "<image>",
    "<video>",
)

SMOLVLM = register_architecture(
    Architecture(
        name="smolvlm",
        model_type="smolvlm",
        keywords=Keywords(("vision_model",), ("connector",), ("text_model", "lm_head")),
        template=_TEMPLATE,
        video=FrameRecipe(
            "SmolVLMVideoProcessor",
            COMMON
            | {"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}, "resample": 1}  # Lanczos
            | {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
            | {"do_sample_frames": False, "num_frames": None, "fps": None},
            square_frames,
        ),
        models={
            "smolvlm2-256m-video-instruct": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
            "smolvlm2-500m-video-instruct": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
            "smolvlm2-2.2b-instruct": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        },
    )
)
