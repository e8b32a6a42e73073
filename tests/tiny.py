# SPDX-License-Identifier: Apache-2.0
"""The one factory of tiny things: tokenizers, language models, towers, LLaVA models, records, pictures and videos.

Everything is seeded, so that a test sees the same weights in every run. What depends on the package's own functions
stands in `write_base`, `compose_tiny` and `reopen`.
"""

from __future__ import annotations

import json
import shutil
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import moellava.model  # noqa: F401  (registers the families)
from moellava.convert.export.llava import flat_rope
from moellava.model.build import text_config
from moellava.model.compose import Composition
from moellava.model.families import FAMILIES
from moellava.vlm import VLM, compose, open_vlm

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": False}
"""A language model's sizes."""

NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
"""Where a real vocabulary makes the embeddings large."""

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
VISION |= {"image_size": 28, "patch_size": 14}
"""A tower's sizes; an image has 28 × 28 pixels, 4 patches."""

VOCABULARY = 280
"""Tokens of the trained tokenizer: its bytes, and a few words of the records."""

EOS = "<|endoftext|>"
IMAGE_TOKEN = 5  # its id in `tiny_llava`


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, trained on the records' few words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": [EOS]}
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, **letters)
    backend.train_from_iterator(["USER: what colour is the shape in the image? ASSISTANT: it is a red circle"], trainer)
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS).save_pretrained(folder)
    return folder


@dataclass
class Base:
    """A language model's folder, and the Hugging Face model that it must equal."""

    folder: Path
    oracle: torch.nn.Module


def write_base(
    folder: Path, family_name: str, tokenizer: Path, rows: int = VOCABULARY, noise: float = 0.0, **sizes: Any
) -> Base:
    """A random language model in its family's own config fields and tensor names, with a copy of a tokenizer.

    Args:
        family_name: of `FAMILIES`.
        rows: of the embedding.
        noise: deviation of what is added to every parameter, so that norms and biases are not all ones and zeros.
        sizes: fields of the text config beside `TEXT`.
    """
    torch.manual_seed(1)
    family = FAMILIES[family_name]
    config = hf.AutoConfig.for_model(family.text_model_type, vocab_size=rows, **TEXT | sizes)
    fields = family.their_config(flat_rope(config.to_dict()))
    raw = json.loads(json.dumps({**fields, "model_type": family.base_model_types[0]}, default=str))
    oracle = hf.AutoModelForCausalLM.from_config(text_config(family, family.text_config(raw))).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    tied = raw["tie_word_embeddings"]
    state = {name: value for name, value in oracle.state_dict().items() if not (tied and name == "lm_head.weight")}
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    tensors = {name: value.clone().contiguous() for name, value in family.to_theirs(state, raw).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    return Base(folder, oracle)


def clip_processor(side: int = VISION["image_size"]) -> hf.CLIPImageProcessorPil:
    """CLIP's image processor for images of `side` × `side` pixels."""
    return hf.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def write_clip(folder: Path) -> Path:
    """A random CLIP tower with its image processor."""
    torch.manual_seed(2)
    hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)).save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    return folder


def write_siglip(folder: Path) -> Path:
    """A random SigLIP tower without an image processor beside it."""
    torch.manual_seed(3)
    hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)).save_pretrained(folder)
    return folder


def compose_tiny(base: Path, tower: Path, version: str, **options: Any) -> VLM:
    """A composed model of two folders; its projector is the same each time."""
    torch.manual_seed(0)
    return compose(base, str(tower), Composition(version=version, **options))


def reopen(folder: Path) -> VLM:
    """A folder that a stage has left, as fp32 on the CPU."""
    return open_vlm(folder, device="cpu", dtype=torch.float32)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """name -> tensor of all safetensors of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def tiny_llava(model_type: str = "llama", **sizes: int) -> hf.LlavaForConditionalGeneration:
    """A random Llava of 96 tokens and a CLIP tower, in memory; `sizes` are fields of the text config beside `TEXT`."""
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.AutoConfig.for_model(model_type, vocab_size=96, pad_token_id=0, **TEXT | sizes),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def batch_for(model: Any) -> dict[str, torch.Tensor]:
    """A question with an image, and one that is shorter and padded, for any LLaVA model."""
    torch.manual_seed(4)
    side, image = model.config.vision_config.image_size, model.config.image_token_index
    ids = torch.randint(6, 96, (2, 1 + model.config.image_seq_length + 6))
    ids[:, 0], ids[:, 1:-6] = 1, image
    mask = torch.ones_like(ids)
    mask[1, -3:] = ids[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, side, side)}


SHAPES = ("red circle", "green square", "blue shape")
"""What the records say of the three pictures."""


def record(identity: object, *said: str, roles: tuple[str, str] = ("human", "gpt"), **shown: object) -> dict[str, Any]:
    """A record: (id, question, answer, …, image=, video=)."""
    turns = [{"from": roles[number % 2], "value": text} for number, text in enumerate(said)]
    return {"id": identity, "conversations": turns, **shown}


def write_records(folder: Path) -> None:
    """`captions.json` and `sft.json`: 24 records each over three pictures; every fourth conversation has none."""
    captions, conversations = [], []
    for number in range(24):
        image, said = f"{number % 3}.png", f"a {SHAPES[number % 3]}" + " here" * (number % 5)
        captions.append(record(f"c{number}", "<image>", said, image=image))
        shown = record(f"s{number}", "<image>\nwhat is in the image?", said, "is it red?", "no", image=image)
        conversations.append(shown if number % 4 else record(f"s{number}", "what is red?", "a shape"))
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "sft.json").write_text(json.dumps(conversations))


def write_pictures(folder: Path) -> list[Path]:
    """`0.png` to `2.png`: a red, a green and a blue one of different shapes."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        image = Image.effect_mandelbrot((40, 24 + 8 * number), (-3, -2.5, 2, 2.5), 9 + number).convert("RGB")
        Image.blend(image, Image.new("RGB", image.size, colour), 0.5).save(paths[number])
    return paths


def write_image_tree(folder: Path) -> Path:
    """Good images a.png and sub/b.jpg, and bad ones: cut.png, cut.jpg, text.png, empty.png."""
    (folder / "sub").mkdir()
    picture = Image.effect_mandelbrot((64, 40), (-3, -2.5, 2, 2.5), 40).convert("RGB")
    for path in (folder / "a.png", folder / "sub" / "b.jpg"):
        picture.save(path)
        (folder / f"cut{path.suffix}").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    return folder


def write_video(path: Path, pictures: list[Image.Image]) -> None:
    """Pictures of one size as a video, 4 a second; key frames some frames apart, and frames that lean on later ones."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 6
        stream.codec_context.max_b_frames = 2
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def write_videos(folder: Path) -> Path:
    """Videos of easy-VQA's images: shapes.mp4 (20 frames, 64 × 64), short.mkv (3 frames, which its header does not
    count) and wide.mp4 (9 frames, 96 × 48). And bad ones: cut.mp4 (half a file), damaged.mp4 (with a hole in it),
    text.mp4 and sound.wav."""
    import easy_vqa

    pictures = [Image.open(path).convert("RGB") for path in list(easy_vqa.get_test_image_paths().values())[:20]]
    write_video(folder / "shapes.mp4", pictures)
    write_video(folder / "short.mkv", pictures[:3])
    write_video(folder / "wide.mp4", [picture.resize((96, 48)) for picture in pictures[:9]])
    content = (folder / "shapes.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    hole = len(content) // 3
    (folder / "damaged.mp4").write_bytes(content[:hole] + bytes(hole) + content[2 * hole :])
    (folder / "text.mp4").write_text("no video")
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(bytes(1600))
    return folder
