# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video: LLaVA-1.6 with a way for videos."""

from moellava.data.frame_processors import LLAVA as LLAVA_FRAMES
from moellava.data.frame_processors import FrameRecipe, whole_frames
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.architectures.llava_1_6 import LLAVA_1_6, over_language_models
from moellava.lmm.templates import vicuna

_SQUARE = {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}

LLAVA_NEXT_VIDEO = register_architecture(
    Architecture(
        name="llava-next-video",
        model_type="llava_next_video",
        keywords=LLAVA_1_6.keywords,
        template=over_language_models(vicuna("<image>\n", "<video>\n")),
        video=FrameRecipe("LlavaNextVideoVideoProcessor", LLAVA_FRAMES | _SQUARE, whole_frames),
        models={
            "llava-next-video-7b": "llava-hf/LLaVA-NeXT-Video-7B-hf",
            "llava-next-video-7b-32k": "llava-hf/LLaVA-NeXT-Video-7B-32K-hf",
            "llava-next-video-34b": "llava-hf/LLaVA-NeXT-Video-34B-hf",
        },
    )
)
