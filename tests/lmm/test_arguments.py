"""The flags of released models, in terms of the others."""

import pytest

from moellava.errors import UserError
from moellava.train.arguments import parse_arguments

COMMON = ["--data_path", "x.json", "--output_dir", "out", "--report_to", "none"]


def parsed(*flags):
    return parse_arguments([*COMMON, *flags])


def test_a_released_model_is_found_and_its_projector_rests_unless_asked():
    model, _, _, training = parsed("--model_id", "qwen2-vl-2b-instruct")
    assert model.is_released and model.model_name_or_path == "Qwen/Qwen2-VL-2B-Instruct"
    assert model.version is None, "the folder's own"
    assert model.freeze_mm_mlp_adapter and not model.freeze_backbone and not training.lora_enable
    model, *_ = parsed("--model_local_path", "/some/folder", "--train_vision_projector", "True")
    assert model.model_name_or_path == "/some/folder" and not model.freeze_mm_mlp_adapter


def test_lora_has_two_spellings():
    *_, training = parsed("--model_id", "llava-1.5-7b", "--use_lora", "True")
    assert training.lora_enable and training.bits == 16
    *_, training = parsed("--model_id", "llava-1.5-7b", "--q_lora", "True")
    assert training.lora_enable and training.bits == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_id", "llava-1.5-7b", "--image_tower", "t"], "--image_tower t conflicts with --model_id"),
        (["--model_local_path", "f", "--model_name_or_path", "g"], "--model_name_or_path g conflicts with --model_id"),
        (["--model_id", "llava-1.5-7b", "--tune_mm_mlp_adapter", "True"], "is for composed models"),
        (["--model_id", "llava-9"], "Unknown model id 'llava-9'.*llava-1.5-7b"),
        (["--model_id", "llava-1.5-7b", "--freeze_backbone", "True"], "nothing would train"),
    ],
)
def test_conflicts_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        parsed(*flags)


def test_the_vision_encoder_alone_can_train():
    model, *_ = parsed("--model_id", "llava-1.5-7b", "--freeze_backbone", "True", "--train_vision_encoder", "True")
    assert model.train_vision_encoder and model.freeze_backbone
