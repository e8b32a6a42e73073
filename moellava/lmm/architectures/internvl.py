# SPDX-License-Identifier: Apache-2.0
"""InternVL3 in Hugging Face's layout."""

from moellava.data.frame_processors import LLAVA as LLAVA_FRAMES
from moellava.data.frame_processors import FrameRecipe, whole_frames
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.templates import chatml
from moellava.model.parts import LLAVA

INTERNVL = register_architecture(
    Architecture(
        name="internvl",
        model_type="internvl",
        keywords=LLAVA,
        template=chatml("<IMG_CONTEXT>\n", "<video>\n"),
        video=FrameRecipe(
            "InternVLVideoProcessor", LLAVA_FRAMES | {"size": {"height": 384, "width": 384}}, whole_frames
        ),
        models={
            "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
            "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
            "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
        },
    )
)
