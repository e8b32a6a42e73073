# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL: images and videos of any size as patches, whose merger lies inside the vision encoder."""

from moellava.data.frame_processors import QWEN as QWEN_FRAMES
from moellava.data.frame_processors import FrameRecipe, Patched, Settings, fitted
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.templates import chatml
from moellava.model.parts import Keywords

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def fit_frame(settings: Settings, frames: int, height: int, width: int) -> tuple[int, int]:
    """A frame's pixels lie between `shortest_edge` and `longest_edge` of `size`, which are areas here."""
    factor = settings["patch_size"] * settings["merge_size"]
    least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    if settings["cap_pixels_per_frame"]:
        budget = int(settings["max_video_tokens"] * factor**2 * 0.9) * settings["temporal_patch_size"] // frames
        most = max(min(most, budget), int(least * 1.05))
    return fitted((1, height, width), factor, 1, least, most)


QWEN2_VL = register_architecture(
    Architecture(
        name="qwen2-vl",
        model_type="qwen2_vl",
        keywords=Keywords(("visual.patch_embed", "visual.blocks"), ("visual.merger",), ("language_model", "lm_head")),
        template=chatml(IMAGE, VIDEO, "You are a helpful assistant."),
        video=FrameRecipe(
            "Qwen2VLVideoProcessor",
            QWEN_FRAMES
            | {"size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2}, "patch_size": 14}
            | {"max_video_tokens": 128000, "do_sample_frames": False},
            Patched(fit_frame),
        ),
        models={
            "qwen2-vl-2b-instruct": "Qwen/Qwen2-VL-2B-Instruct",
            "qwen2-vl-7b-instruct": "Qwen/Qwen2-VL-7B-Instruct",
            "qwen2-vl-72b-instruct": "Qwen/Qwen2-VL-72B-Instruct",
        },
    )
)
