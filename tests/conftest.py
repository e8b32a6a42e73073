"""Tiny random models of the real families, with their real tokenizers: what more than one room tests with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import wave
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from PIL import Image

# The same examples in every run: a run that has passed says something about the next one.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]

SIZES = {
    "hidden_size": 16,  # the real vocabularies are what takes time and room
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def make_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SIZES)).save_pretrained(folder)


def make_mistral(folder: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    MistralForCausalLM(MistralConfig(vocab_size=32000, num_key_value_heads=1, **SIZES)).save_pretrained(folder)


def make_phi(folder: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    PhiForCausalLM(PhiConfig(vocab_size=51200, **SIZES)).save_pretrained(folder)


def make_stablelm(folder: Path) -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(vocab_size=100352, num_key_value_heads=2, use_qkv_bias=True, **SIZES)
    StableLmForCausalLM(config).save_pretrained(folder)


def make_qwen1(folder: Path) -> None:
    """Qwen-1's own layout, config fields and tensor names, which no class of transformers writes."""
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from moellava.model.families import FAMILIES

    raw = {
        "model_type": "qwen",
        "vocab_size": 151936,
        "hidden_size": SIZES["hidden_size"],
        "intermediate_size": 2 * SIZES["intermediate_size"],
        "num_hidden_layers": SIZES["num_hidden_layers"],
        "num_attention_heads": SIZES["num_attention_heads"],
        "kv_channels": SIZES["hidden_size"] // SIZES["num_attention_heads"],
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "seq_length": SIZES["max_position_embeddings"],
        "tie_word_embeddings": False,
    }
    family = FAMILIES["qwen"]
    model = Qwen2ForCausalLM(Qwen2Config(**family.text_config(raw)))
    tensors = family.to_theirs(model.state_dict(), raw)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that processes which share the files out end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


BASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "vicuna": (make_llama, "mistral"),
    "openchat": (make_mistral, "mistral"),
    "phi2": (make_phi, "phi"),
    "qwen": (make_qwen1, "qwen"),
    "stablelm": (make_stablelm, "stablelm"),
}
"""name -> (what makes the weights, the golden tokenizer that goes with them)."""


@pytest.fixture(scope="session")
def golden_tokenizers(tmp_path_factory) -> Path:
    """The folder of the unpacked golden tokenizers: mistral, qwen, phi, stablelm."""
    root = tmp_path_factory.mktemp("tokenizers")
    for archive in sorted((Path(__file__).parent / "golden" / "tokenizers").glob("*.tar.xz")):
        with tarfile.open(archive) as packed:
            packed.extractall(root, filter="data")
    return root


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, golden_tokenizers) -> Callable[[str], Path]:
    """name of `BASES` -> the folder of a tiny random language model with that family's tokenizer."""
    root = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(0)
            weights, tokenizer = BASES[name]
            weights(folder)
            for file in (golden_tokenizers / tokenizer).iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_tower(tmp_path_factory) -> Path:
    """The folder of a tiny random CLIP tower: 32 × 32 pixels, 4 patches."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **shape)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    """Three images of different shapes and colours."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        path = folder / f"{number}.png"
        Image.effect_mandelbrot((40, 24 + 8 * number), (-3, -2.5, 2, 2.5), 9 + number).convert("RGB").save(path)
        with Image.open(path) as image:
            Image.blend(image.convert("RGB"), Image.new("RGB", image.size, colour), 0.5).save(path)
        paths.append(path)
    return paths


def command(flags: dict[str, object], processes: int = 1, launcher: str = "deepspeed") -> list[str]:
    """The command line that a user would type."""
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", *as_list(value))]
    if processes == 1:
        return [sys.executable, str(ROOT / "train.py"), *words]
    own = [str(Path(sys.executable).with_name(launcher)), "--master_port", str(free_port())]
    if launcher == "torchrun":
        return [*own, "--nproc-per-node", str(processes), str(ROOT / "train.py"), *words]
    zero = ["--deepspeed", str(ROOT / "scripts" / "zero2.json")]
    return [*own, "--num_accelerators", str(processes), str(ROOT / "train.py"), *zero, *words]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_list(value: object) -> list:
    """A flag's value or values."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


@pytest.fixture(scope="session")
def run_train():
    """Runs `train.py` in real processes and returns the finished process, its output as text."""

    def run(flags: dict[str, object], processes: int = 1, launcher: str = "deepspeed", **kwargs):
        words = command(flags, processes, launcher)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(words, env=environment(), start_new_session=True, **pipes, **kwargs) as process:
            try:
                stdout, stderr = process.communicate(timeout=280)
            finally:
                kill_session(process.pid)  # a launcher that is stopped leaves its ranks behind
        assert process.returncode or not shared_memory_of(words)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def kill_train():
    """Runs `train.py` until a checkpoint appears, then kills every process of it with SIGKILL."""

    def kill(flags: dict[str, object], checkpoint: str, processes: int = 1) -> None:
        wanted, words = Path(str(flags["output_dir"])) / checkpoint, command(flags, processes)
        with subprocess.Popen(
            words,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        ) as process:
            deadline = time.monotonic() + 200
            while not wanted.exists():
                assert process.poll() is None, "the run ended before it could be killed"
                assert time.monotonic() < deadline, f"{wanted} did not appear"
                time.sleep(0.02)
            kill_session(process.pid)
        assert not shared_memory_of(words)

    return kill


def shared_memory_of(words: list[str]) -> list[Path]:
    """What a run has left in shared memory, told by its port; empty for a process that ran alone."""
    port = words[words.index("--master_port") + 1] if "--master_port" in words else "alone"
    return list(Path("/dev/shm").glob(f"*_{port}_*"))


def kill_session(leader: int) -> None:
    """SIGKILLs every process of a session: the launcher starts its ranks in groups of their own."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and session_of(entry) == leader:
            os.kill(int(entry.name), signal.SIGKILL)


def session_of(entry: Path) -> int | None:
    """The session id of a process by its /proc folder; None if it has ended meanwhile."""
    try:
        return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3])
    except (FileNotFoundError, ProcessLookupError):
        return None


def environment() -> dict[str, str]:
    """One thread a process, so that runs are repeatable to the bit and do not fight for cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}


def losses(folder: Path) -> dict[int, float]:
    """step -> logged loss of a run."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="session")
def losses_of():
    """folder of a finished run -> {step: loss}."""
    return losses


@pytest.fixture
def released_flags(pictures, tmp_path) -> Callable[..., dict[str, object]]:
    """(folder, name of the run, flags) -> the flags of a short run of a released model over 8 records.

    Every fourth record has no image.
    """
    records = []
    for number in range(8):
        question, image = ("<image>\nWhat is it?", {"image": f"{number % 3}.png"}) if number % 4 else ("Hello?", {})
        turns = [{"from": "user", "value": question}, {"from": "bot", "value": f"A fractal, number {number}."}]
        records.append({"id": str(number), "conversations": turns, **image})
    (tmp_path / "data.json").write_text(json.dumps(records))

    def make(folder: Path, name: str = "run", **flags: object) -> dict[str, object]:
        return {
            "model_local_path": folder,
            "data_path": tmp_path / "data.json",
            "image_folder": pictures[0].parent,
            "output_dir": tmp_path / name,
            "user_key": "user",
            "assistant_key": "bot",
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "model_max_length": 256,
            "save_strategy": "no",
            "report_to": "none",
        } | flags

    return make


def make_clip(path: Path, pictures: list[Image.Image], codec: str = "mpeg4", rate: int = 4) -> None:
    """Writes pictures of one size as a video; key frames some frames apart, and frames that lean on later ones."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 6
        stream.codec_context.max_b_frames = 2
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with videos made of easy-VQA's images, 4 frames a second: shapes.mp4 (20 frames, 64 × 64), short.mkv
    (3 frames, which its header does not count) and wide.mp4 (9 frames, 96 × 48). And with bad ones: cut.mp4 (half a
    file), damaged.mp4 (with a hole in it), text.mp4 and sound.wav."""
    import easy_vqa

    folder = tmp_path_factory.mktemp("clips")
    pictures = [Image.open(path).convert("RGB") for path in list(easy_vqa.get_test_image_paths().values())[:20]]
    make_clip(folder / "shapes.mp4", pictures)
    make_clip(folder / "short.mkv", pictures[:3])
    make_clip(folder / "wide.mp4", [picture.resize((96, 48)) for picture in pictures[:9]])
    content = (folder / "shapes.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    hole = len(content) // 3
    (folder / "damaged.mp4").write_bytes(content[:hole] + bytes(hole) + content[2 * hole :])
    (folder / "text.mp4").write_text("no video")
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(bytes(1600))
    return folder


@pytest.fixture(scope="session")
def begin_at():
    """(step, finished run, new folder) -> the folder as a run leaves it that is killed after that checkpoint."""

    def copy(step: int, finished: Path, folder: Path) -> Path:
        folder.mkdir()
        shutil.copytree(finished / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        state = json.loads((finished / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(state | {"finished": False}))
        return folder

    return copy
