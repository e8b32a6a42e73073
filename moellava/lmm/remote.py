"""Families whose code lies in their own repository: Qwen-VL-Chat and Phi-3-Vision.

Qwen-VL has no processor, its tokenizer reads paths; that of Phi-3-Vision takes one text at a time. Two adapters give
both the shape that `MediaReader` asks for. The Python files beside the model run only where --trust_remote_code True
was given, and are written beside every model that is saved.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast

from moellava.data.tokenizers import leading_ids, load_tokenizer
from moellava.errors import DataError, UserError
from moellava.files import read_json
from moellava.model.loading import REPORT, check_loaded, quietly

RUNS_BADLY = (ImportError, AttributeError, TypeError, ValueError, OSError, KeyError)
"""What code written for another version of transformers fails with."""


class RemoteProcessor:
    """A processor in the shape that `MediaReader` asks.

    Args:
        tokenizer: a fast one, for offsets.
        source: the folder that it came from; what belongs to the model's own code is saved from there.
        image_token: the special token that stands for an image.
        chat_template: in Jinja; None where the folder has none.
    """

    image_processor: Any = None

    def __init__(self, tokenizer: Any, source: Path, image_token: str, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.source = source
        self.image_token = image_token
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.chat_template = chat_template

    def apply_chat_template(self, conversation: Sequence[dict[str, Any]], **options: Any) -> str:
        """Text of messages, as of transformers' processors."""
        return self.tokenizer.apply_chat_template(conversation, **options)

    def __call__(
        self, text: Sequence[str], images: Sequence[Sequence[Any]], padding: bool = True, return_tensors: str = "pt"
    ) -> dict[str, torch.Tensor]:
        """Ids [B, L] of texts with a run of tokens for each image, and what else the model takes of images."""
        runs, tensors = self.runs(images)
        remaining = iter(runs)
        rows = [self._row(words, remaining) for words in text]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": attended, **tensors}

    def runs(self, images: Sequence[Sequence[Any]]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """The tokens of every image, in order, and the model's inputs for all of them."""
        raise NotImplementedError

    def _row(self, text: str, runs: Any) -> torch.Tensor:
        ids: list[int] = []
        for number, piece in enumerate(text.split(self.image_token)):
            ids += next(runs) if number else []
            ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return torch.tensor(ids)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes what a folder of this kind has beside the weights: code, settings, chat template."""
        folder = Path(folder)
        kept = [path for pattern in ("*.py", "*preprocessor_config.json") for path in self.source.glob(pattern)]
        for path in kept:
            if path.resolve().parent != folder.resolve():
                shutil.copyfile(path, folder / path.name)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


class PathTokenizer(PreTrainedTokenizerFast):
    """Qwen-VL's vocabulary as a fast tokenizer; saved as the files that it was read from, which its own class reads."""

    source: Path

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> tuple[str, ...]:
        """Copies `qwen.tiktoken` and the settings beside it."""
        names = [name for name in ("qwen.tiktoken", "tokenizer_config.json") if (self.source / name).is_file()]
        for name in names:
            shutil.copyfile(self.source / name, Path(save_directory) / name)
        return tuple(str(Path(save_directory) / name) for name in names)


class PathProcessor(RemoteProcessor):
    """Qwen-VL: an image is its path, one byte a token, between `<img>` and `</img>`, filled up to 256 tokens.

    The model opens the file itself, in its forward pass. `</img>` is the template's text, so a run is 257 tokens long.
    """

    SPAN = 256
    SPECIAL = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
    LONGEST = SPAN - 2
    """Bytes: the model looks for the first filler before the last of the 256 tokens."""

    def check_path(self, path: str | Path, name: str) -> None:
        """Raises DataError for a path that does not fit between the tokens; `name` is of its record."""
        length = len(str(path).encode())
        if length > self.LONGEST:
            raise DataError(
                f"{name}: the path {path} is {length} bytes long, and Qwen-VL reads paths of at most {self.LONGEST}: "
                "give a shorter --image_folder"
            )

    def runs(self, images: Sequence[Sequence[Any]]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """As of `RemoteProcessor`. An image instead of a path, whose tokens are only counted, has an empty path."""
        begin, filler = self.tokenizer.convert_tokens_to_ids(["<img>", "<imgpad>"])
        paths = [str(path) if isinstance(path, str | Path) else "" for row in images for path in row]
        return [[begin, *path.encode(), *[filler] * (self.SPAN - len(path.encode()))] for path in paths], {}


class NumberedProcessor(RemoteProcessor):
    """Phi-3-Vision: images are numbered in the prompt, `<|image_1|>`, and the model reads negative ids for them.

    Args:
        theirs: the processor of the model's own code.
        options: of `RemoteProcessor`.
    """

    numbered = re.compile(r"<\|image_\d+\|>")
    """How its prompts spell what `image_token` stands for."""

    def __init__(self, theirs: Any, **options: Any):
        super().__init__(theirs.tokenizer, **options)
        self.image_processor = theirs.image_processor
        self.leading = leading_ids(theirs.tokenizer)
        """What the model reads behind each image: its processor tokenizes the text between images apart, and the
        tokenizer begins every text so."""

    def runs(self, images: Sequence[Sequence[Any]]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """As of `RemoteProcessor`, with `image_token` for the ids that the collator writes."""
        inputs = dict(self.image_processor([image for row in images for image in row], return_tensors="pt"))
        counts = torch.as_tensor(inputs.pop("num_img_tokens")).flatten().tolist()
        return [[self.image_token_id] * (count + len(self.leading)) for count in counts], inputs


def load_path_processor(folder: Path, raw: dict[str, Any]) -> PathProcessor:
    """Qwen-VL's. Raises UserError where the tokens of its vocabulary are not where the model looks for them."""
    plain = load_tokenizer(folder, "qwen")
    tokenizer = PathTokenizer(
        tokenizer_object=plain.backend_tokenizer,
        model_max_length=plain.model_max_length,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(PathProcessor.SPECIAL)})
    tokenizer.source = folder
    found, wanted = tokenizer.convert_tokens_to_ids("<img>"), raw["visual"].get("image_start_id")
    if found != wanted:
        raise UserError(f"{folder}: <img> is token {found}, but config.json says visual.image_start_id {wanted}.")
    return PathProcessor(tokenizer, folder, "<img>", saved_template(folder))


def load_numbered_processor(folder: Path, raw: dict[str, Any]) -> NumberedProcessor:
    """Phi-3-Vision's, by its own code. Raises UserError where that does not run."""
    try:
        theirs = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    except RUNS_BADLY as error:
        raise refusal(folder, "processor", error) from error
    return NumberedProcessor(theirs, source=folder, image_token="<|image|>", chat_template=saved_template(folder))


REMOTE_PROCESSORS: dict[str, Callable[[Path, dict[str, Any]], RemoteProcessor]] = {
    "qwen-vl": load_path_processor,
    "phi3-v": load_numbered_processor,
}
"""Family -> what makes its processor from a folder and its config.json."""


def saved_template(folder: Path) -> str | None:
    """The chat template that was saved beside a trained model; the hub's are for texts alone and are left."""
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def load_remote_model(folder: Path, raw: dict[str, Any], *, dtype: torch.dtype) -> Any:
    """A model by the code in its folder.

    Raises:
        UserError: the folder has no code, the code does not run, or the weights do not fit.
    """
    name = (raw.get("auto_map") or {}).get("AutoModelForCausalLM")
    if name is None:
        raise UserError(f"{folder} has no code for its model: its config.json names none under auto_map.")
    try:
        with quietly():
            model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **REPORT)
    except RUNS_BADLY as error:
        raise refusal(folder, "model", error) from error
    check_loaded(info, str(folder))
    return model.eval()


def refusal(folder: Path, what: str, error: Exception) -> UserError:
    """What to say when a repository's code does not run."""
    return UserError(
        f"The code in {folder} cannot make its {what} with transformers {transformers.__version__}: "
        f"{type(error).__name__}: {error}. Such code is written for the version of transformers of its day; "
        f"config.json names {written_for(folder)}."
    )


def written_for(folder: Path) -> str:
    """The version of transformers that a folder was written with."""
    return str(read_json(folder / "config.json").get("transformers_version", "none"))
