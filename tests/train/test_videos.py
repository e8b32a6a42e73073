"""Videos through train.py: a composed model's stage on them."""

from __future__ import annotations

import json

import pytest
from transformers import LlavaForConditionalGeneration

from moellava.errors import UserError
from moellava.train.arguments import parse_arguments
from moellava.train.train import train

ROWS = [
    {
        "id": number,
        "video": name,
        "conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": said}],
    }
    for number, (name, said) in enumerate([("shapes.mp4", "a shape"), ("wide.mp4", "red"), ("short.mkv", "blue")] * 2)
]


def run(flags):
    return train(*parse_arguments([str(word) for name, value in flags.items() for word in (f"--{name}", value)]))


def test_a_stage_of_a_composed_model_learns_from_videos(flags_for, clips, tmp_path):
    (tmp_path / "videos.json").write_text(json.dumps(ROWS))
    data = {"data_path": tmp_path / "videos.json", "video_folder": clips, "num_frames": 3}
    short = {"save_strategy": "no", "skip_dry_save": True, "learning_rate": "2e-2", "max_steps": 6}
    flags = flags_for(tmp_path, "pretrain") | data | short
    folder = run(flags)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0]
    LlavaForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(UserError, match="(?s)short.mkv: the video has 3 frames but --num_frames asks for 8"):
        run(flags | {"num_frames": 8, "output_dir": tmp_path / "other"})
