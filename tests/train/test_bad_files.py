# SPDX-License-Identifier: Apache-2.0
"""Files that prove damaged only when they are decoded, in the middle of a run: a named problem, or a counted skip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moellava.constants import IGNORE_INDEX
from moellava.data.collate import UNREADABLE
from moellava.data.dataset import SupervisedDataset
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.errors import BadFileError, UserError
from moellava.train.arguments import parse_arguments
from moellava.train.train import main
from tests.processes import Flags, losses_of, run_train, train_here, words_of
from tests.tiny import record

SHORT = {"save_strategy": "no", "skip_dry_save": True}


def hole(path: Path) -> None:
    """An image whose head and ending are sound, with a hole between them."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), "u1")).save(path)
    content = bytearray(path.read_bytes())
    content[1000:1100] = bytes(100)
    path.write_bytes(content)


@pytest.fixture
def images(parts, tmp_path) -> Path:
    """The sound pictures, and hole.png."""
    folder = shutil.copytree(parts / "images", tmp_path / "images")
    hole(folder / "hole.png")
    return folder


@pytest.fixture
def flags(flags_for, images, tmp_path) -> Callable[..., Flags]:
    """(name of the run, names of images, further flags) -> two epochs of stage 1 on a caption for each image."""

    def make(name: str, shown: list[str], **more: object) -> Flags:
        rows = [record(image, "<image>", f"a picture {number}", image=image) for number, image in enumerate(shown)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        data = {"data_path": tmp_path / f"{name}.json", "image_folder": images, "output_dir": tmp_path / name}
        epochs = {"max_steps": None, "save_steps": None, "num_train_epochs": 2, "bad_files": "skip"}
        return flags_for(tmp_path, "pretrain") | data | epochs | SHORT | more

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_out_trains_nothing_and_is_counted_once(workers, flags, caplog):
    """In a batch with a sound record, the run is that of the sound record alone, step for step."""
    sound = train_here(flags("sound", ["0.png"], per_device_train_batch_size=1))
    caplog.clear()
    found = train_here(flags("found", ["0.png", "hole.png"], dataloader_num_workers=workers))
    said = caplog.text
    assert losses_of(found) == pytest.approx(losses_of(sound), rel=1e-5) and len(losses_of(found)) == 2
    ours, theirs = weights(found), weights(sound)
    assert all(torch.allclose(ours[key], value, rtol=1e-4, atol=1e-6) for key, value in theirs.items())
    assert said.count("skipped: Record hole.png of") == 1 and "hole.png: the image cannot be read" in said
    epoch = "Epoch data: 2 records, 0 skip listed, 1 bad files, 0 dropped, 0 truncated, 1 samples"
    assert said.count(epoch) == 2 and "Traceback" not in said


def test_a_step_of_nothing_but_bad_files_leaves_no_nan(flags):
    """Two of four steps have no supervised token."""
    folder = train_here(flags("alone", ["hole.png", "0.png"], per_device_train_batch_size=1))
    losses = sorted(losses_of(folder).values())
    assert losses[:2] == [0, 0] and losses[2] > 1
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_adapters_are_not_judged_by_a_step_without_tokens(flags, flags_for, tmp_path):
    start = train_here(flags("start", ["0.png"]))
    lora = {"lora_enable": True, "lora_r": 2, "tune_mm_mlp_adapter": None, "pretrain_mm_mlp_adapter": start}
    lora |= {"version": "qwen", "per_device_train_batch_size": 1}
    for seed in (1, 2):  # one of them meets the hole first
        folder = train_here(flags(f"lora{seed}", ["hole.png", "0.png"], seed=seed, **lora))
        assert (folder / "adapter").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_without_skip_the_run_stops_with_one_line(workers, flags, caplog):
    given = flags("stops", ["0.png", "hole.png"], bad_files="error", dataloader_num_workers=workers)
    caplog.clear()
    assert main(words_of(given)) == 2
    (said,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "ERROR"]
    assert said.startswith("Record hole.png of") and "hole.png: the image cannot be read" in said
    assert said.endswith("(`moellava check-data` lists all such files)")


@pytest.mark.slow
def test_questions_are_trained_on_but_not_those_of_a_bad_file(flags):
    """`--mask_question_tokens False`."""
    given = {"mask_question_tokens": False, "per_device_train_batch_size": 1}
    losses = losses_of(train_here(flags("questions", ["hole.png", "0.png"], **given)))
    assert sorted(losses.values())[:2] == [0, 0]


@pytest.mark.slow
def test_evaluation_leaves_out_and_counts_as_well(flags, tmp_path, caplog):
    given = flags("evaluated", ["0.png"])
    rows = [record(image, "<image>", "a picture", image=image) for image in ("hole.png", "1.png")]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    more = {"eval_data_path": tmp_path / "eval.json", "eval_strategy": "epoch", "per_device_eval_batch_size": 2}
    folder = train_here(given | more | {"eval_samples": 2})
    said = caplog.text
    assert said.count("skipped: Record hole.png of") == 1
    assert said.count("Evaluation data: 2 records, 0 skip listed, 1 bad files, 0 dropped, 0 truncated, 1 samples") == 2
    assert said.count("Sample answer at step") == 2, "the sound record is answered, twice"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert all(entry["eval_loss"] > 0 for entry in history if "eval_loss" in entry)


@pytest.mark.parametrize(
    "limit", [{"max_image_pixels": 900}, {"max_image_side": 39}, {"max_aspect_ratio": "1.5"}], ids=str
)
def test_limits_are_flags_and_what_is_beyond_is_a_bad_file(limit, flags, caplog):
    with pytest.raises(UserError, match=r"(?s)0.png: 40 × 24 pixels, but --max_"):
        train_here(flags("beyond", ["0.png", "2.png"], bad_files="error", **limit))
    caplog.clear()
    if limit == {"max_aspect_ratio": "1.5"}:  # 2.png is 40 × 40
        train_here(flags("skipped", ["0.png", "2.png"], **limit))
        assert "1 bad files, 0 dropped, 0 truncated, 1 samples" in caplog.text


@pytest.mark.parametrize("flag, value", [("max_image_pixels", 0), ("max_image_side", -1), ("max_aspect_ratio", "nan")])
def test_a_limit_that_allows_nothing_is_refused(flag, value, flags):
    with pytest.raises(UserError, match=f"--{flag}"):
        parse_arguments(words_of(flags("refused", ["0.png"], **{flag: value})))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_stay_in_step_and_count_together(launcher, flags, tmp_path):
    """Bad files come up in some steps of some process, and both go on together. Nothing is compiled for them."""
    names = ["0.png", "1.png", "hole.png", "2.png", "0.png", "hole.png", "1.png", "2.png"]
    given = flags("two", names, per_device_train_batch_size=1, dataloader_num_workers=1)
    done = run_train(given, 2, launcher, fresh=True, env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled")})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and done.stderr.count("skipped: Record hole.png of") == 2
    assert done.stderr.count("8 records, 0 skip listed, 2 bad files, 0 dropped, 0 truncated, 6 samples") == 2
    assert len(losses_of(given["output_dir"])) == 8 and not (tmp_path / "compiled").exists()


# -- the data set alone --------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(composed, images, clips, tmp_path) -> Callable[..., SupervisedDataset]:
    """(records, options) -> a data set of a composed model."""

    def make(rows: list[dict], **options: object) -> SupervisedDataset:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        files = MediaFiles(images, options.pop("video_folder", clips), 3)
        return SupervisedDataset(load_records(tmp_path / "rows.json"), composed.encoder, files, **options)

    return make


def test_a_blank_sample_has_no_label_and_says_why(dataset, composed):
    rows = [
        record("bad", "<image>\nwhat?", "a", image="hole.png"),
        record("good", "<image>\nwhat?", "b", image="0.png"),
    ]
    data = dataset(rows, bad_files="skip")
    bad, good = data[0], data[1]
    assert bad["media"] == [] and bad["labels"].tolist() == [IGNORE_INDEX] and len(bad["input_ids"]) == 1
    ((number, why),) = bad[UNREADABLE].items()
    assert number == 0 and "Record bad of" in why and "hole.png: the image cannot be read" in why
    batch = composed.collator()([bad, good])
    assert batch[UNREADABLE] == bad[UNREADABLE] and UNREADABLE not in composed.collator()([good])
    assert batch["pixel_values"].shape[0] == 1
    assert (batch["labels"][0] == IGNORE_INDEX).all() and batch["attention_mask"][0].sum() == 1
    data.leave_out(batch[UNREADABLE])
    data.leave_out(batch[UNREADABLE])
    assert (data.report()["bad_files"], data.report()["samples"], len(data)) == (1, 1, 2)
    with pytest.raises(BadFileError, match="Record bad of .*hole.png.*check-data"):
        dataset(rows)[0]


def test_a_video_that_breaks_later_is_skipped_as_well(dataset, clips, tmp_path):
    content = (clips / "shapes.mp4").read_bytes()
    (tmp_path / "x.mp4").write_bytes(content)
    data = dataset([record("x", "<video>", "a", video="x.mp4")], video_folder=tmp_path, bad_files="skip")
    assert UNREADABLE not in data[0] and len(data[0]["media"]) == 3
    (tmp_path / "x.mp4").write_bytes(content[: len(content) // 2])
    assert "x.mp4: the video cannot be read" in data[0][UNREADABLE][0]
    (tmp_path / "x.mp4").write_bytes((clips / "damaged.mp4").read_bytes())
    again = dataset([record("x", "<video>", "a", video="x.mp4")], video_folder=tmp_path, bad_files="skip")
    assert "x.mp4: the video" in again[0][UNREADABLE][0], "damage in the middle shows when it is decoded"
