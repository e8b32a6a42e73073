# SPDX-License-Identifier: Apache-2.0
"""Videos through train.py: a composed model's stage on them."""

from __future__ import annotations

import json

import pytest
from transformers import LlavaForConditionalGeneration

from moellava.errors import UserError
from tests.processes import losses_of, train_here
from tests.tiny import record

SAID = {"shapes.mp4": "a shape", "wide.mp4": "red", "short.mkv": "blue"}
ROWS = [record(name, "<video>", said, video=name) for name, said in SAID.items()] * 2


def test_a_stage_of_a_composed_model_learns_from_videos(flags_for, clips, tmp_path):
    (tmp_path / "videos.json").write_text(json.dumps(ROWS))
    data = {"data_path": tmp_path / "videos.json", "video_folder": clips, "num_frames": 3}
    short = {"save_strategy": "no", "skip_dry_save": True, "learning_rate": "2e-2", "max_steps": 6}
    flags = flags_for(tmp_path, "pretrain") | data | short
    folder = train_here(flags)
    losses = losses_of(folder)
    assert losses[max(losses)] < losses[1]
    LlavaForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(UserError, match="(?s)short.mkv: the video has 3 frames but --num_frames asks for 8"):
        train_here(flags | {"num_frames": 8, "output_dir": tmp_path / "other"})
