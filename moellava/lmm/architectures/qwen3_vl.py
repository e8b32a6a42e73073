# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: further mergers read the encoder's inner layers, and a video's tokens tell the times of its frames."""

from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from moellava.data.frame_processors import QWEN as QWEN_FRAMES
from moellava.data.frame_processors import FrameRecipe, Patched, Settings, fitted
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.architectures.qwen2_vl import IMAGE, VIDEO
from moellava.lmm.templates import chatml
from moellava.model.parts import Keywords


def fit_video(settings: Settings, frames: int, height: int, width: int) -> tuple[int, int]:
    """The pixels of all frames together lie between `shortest_edge` and `longest_edge` of `size`, which are areas."""
    factor, time = settings["patch_size"] * settings["merge_size"], settings["temporal_patch_size"]
    least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    if frames < time:
        raise ValueError(f"a video of {frames} frames: at least {time} are needed")
    if settings["cap_pixels_per_frame"]:
        share = min(settings["max_video_tokens"] * factor**2, most // frames)
        most = max(share, int(least * 1.05)) * frames
    enlarged = max(1.0, factor / height, factor / width)
    return fitted((frames, int(height * enlarged), int(width * enlarged)), factor, time, least, most)


QWEN3_VL = register_architecture(
    Architecture(
        name="qwen3-vl",
        model_type="qwen3_vl",
        keywords=Keywords(
            vision_encoder=("visual.patch_embed", "visual.pos_embed", "visual.blocks"),
            vision_projector=("visual.merger", "visual.deepstack_merger_list"),
            language_model=("language_model", "lm_head"),
        ),
        template=chatml(IMAGE, VIDEO),
        video=FrameRecipe(
            "Qwen3VLVideoProcessor",
            QWEN_FRAMES
            | {"size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2}, "patch_size": 16}
            | {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
            | {"max_video_tokens": 768, "do_sample_frames": True},
            Patched(fit_video),
        ),
        models={
            "qwen3-vl-2b-instruct": "Qwen/Qwen3-VL-2B-Instruct",
            "qwen3-vl-4b-instruct": "Qwen/Qwen3-VL-4B-Instruct",
            "qwen3-vl-8b-instruct": "Qwen/Qwen3-VL-8B-Instruct",
        },
    )
)
