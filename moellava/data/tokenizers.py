# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: what differs between them, as rows of data, and the one way to load any of them.

`load_tokenizer` returns a fast tokenizer that gives the ids of its own library, with the special tokens that the
guide asks for (docs/CUSTOM.md). A new one is one more row in `TOKENIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moellava.constants import CHAT_TEMPLATE, DEFAULT_IMAGE_TOKEN
from moellava.conversation import conv_templates
from moellava.data.fast_tokenizers import CL100K_DIGITS_APART, from_merges, from_sentencepiece, from_tiktoken
from moellava.data.render.own import own_template
from moellava.errors import UserError
from moellava.files import read_object, resolve_folder
from moellava.log import get_logger
from moellava.registry import Registry

logger = get_logger(__name__)

TOKENIZER_FILES = (
    "tokenizer*",
    "*.tiktoken",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""What is fetched when a tokenizer is named by its hub id."""

_ROW_KEY = "moellava_kind"
"""Key of tokenizer_config.json under which a tokenizer remembers its row."""

_QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
_ARCADE_SPECIAL = [
    *("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<gh_stars>", "<filename>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>", "<|endofprompt|>"),
    *("<|im_start|>", "<|im_end|>", "<|pause|>", *(f"<|reg{i}|>" for i in range(8)), "<|extra0|>"),
]


@dataclass(frozen=True)
class TokenizerSpec:
    """A row of `TOKENIZERS`.

    Attributes:
        name: its key in `TOKENIZERS`.
        classes: the values of `tokenizer_class` in tokenizer_config.json that name it ('Fast' left out).
        file: the vocabulary file without which it is another; None where a tokenizer.json is enough.
        build: makes the fast tokenizer from (folder, tokenizer_config); None reads tokenizer.json.
        versions: templates made for it, the first one the usual choice.
        adds_bos: whether every sequence begins with `bos`; None keeps what the folder says.
        bos, eos, unk, pad: special tokens that are set, over what the folder says; None keeps the folder's. A pad that
            neither names is unk, or else eos.
        can_add_tokens: whether its own implementation takes new special tokens.
    """

    name: str
    classes: tuple[str, ...] = ()
    file: str | None = None
    build: Callable[[Path, dict[str, Any]], Tokenizer] | None = None
    versions: tuple[str, ...] = ()
    adds_bos: bool | None = None
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    can_add_tokens: bool = True

    def has_own_file(self, folder: Path) -> bool:
        """Whether to build from its own file: a tokenizer.json wins, but not over SentencePiece."""
        if self.file is None or not (folder / self.file).exists():
            return False
        return self.file == "tokenizer.model" or not (folder / "tokenizer.json").exists()

    def fits(self, folder: Path, config: dict[str, Any]) -> bool:
        """Whether a folder holds such a tokenizer."""
        cls = str(config.get("tokenizer_class") or "").removesuffix("Fast")
        return cls in self.classes or (not cls and self.has_own_file(folder))


def _build_llama(folder: Path, config: dict[str, Any]) -> Tokenizer:
    tokenizer = from_sentencepiece(folder / "tokenizer.model", legacy=config.get("legacy") is not False)
    _add_recorded(tokenizer, folder, config)
    return tokenizer


def _build_qwen(folder: Path, config: dict[str, Any]) -> Tokenizer:
    special = {text: 151643 + offset for offset, text in enumerate(_QWEN_SPECIAL)}
    return from_tiktoken(folder / "qwen.tiktoken", CL100K_DIGITS_APART, special)


def _build_arcade(folder: Path, config: dict[str, Any]) -> Tokenizer:
    special = {text: 100257 + offset for offset, text in enumerate(_ARCADE_SPECIAL)}
    return from_tiktoken(folder / "arcade100k.tiktoken", CL100K_DIGITS_APART, special)


def _build_codegen(folder: Path, config: dict[str, Any]) -> Tokenizer:
    tokenizer = from_merges(folder / "vocab.json", folder / "merges.txt")
    _add_recorded(tokenizer, folder, config)
    return tokenizer


TOKENIZERS: Registry[TokenizerSpec] = Registry("tokenizer")
for _spec in (
    TokenizerSpec(
        "llama",
        classes=("LlamaTokenizer", "CodeLlamaTokenizer"),
        file="tokenizer.model",
        build=_build_llama,
        versions=("v1", "mistral", "openchat", "minicpm", "llama_2", "llava_llama_2", "llava_v1", "v1_mmtag"),
        adds_bos=True,
    ),
    TokenizerSpec(
        "qwen1",
        classes=("QWenTokenizer",),
        file="qwen.tiktoken",
        build=_build_qwen,
        versions=("qwen", "mpt"),
        adds_bos=False,
        eos="<|endoftext|>",
        unk="<|extra_0|>",
        pad="<|extra_0|>",
    ),
    TokenizerSpec(
        "arcade100k",
        classes=("Arcade100kTokenizer",),
        file="arcade100k.tiktoken",
        build=_build_arcade,
        versions=("stablelm", "mpt"),
        adds_bos=False,
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        unk="<|reg0|>",
        pad="<|reg0|>",
        can_add_tokens=False,
    ),
    TokenizerSpec(
        "codegen",
        classes=("CodeGenTokenizer",),
        file="merges.txt",
        build=_build_codegen,
        versions=("phi",),
        adds_bos=False,
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        unk="<|extra_0|>",
        pad="<|extra_0|>",
    ),
    TokenizerSpec("qwen2", classes=("Qwen2Tokenizer",), versions=("qwen", "mpt"), adds_bos=False),
    TokenizerSpec("fast"),
):
    TOKENIZERS.register(_spec.name, _spec)


def load_tokenizer(path: str | Path, version: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id, as a fast tokenizer, without remote code.

    Args:
        path: a folder with tokenizer.json, tokenizer.model, qwen.tiktoken, arcade100k.tiktoken or vocab.json and
            merges.txt; or the id of a hub repository that holds one.
        version: the template it is wanted for; an unknown name is refused.

    Returns:
        A tokenizer that pads on the right, has a pad token, and adds BOS where its own implementation does. The same
        ids come from `AutoTokenizer` once it is saved.

    Raises:
        UserError: no tokenizer there, a file of another format, or an unknown version.
    """
    if version is not None:
        _check_version(version)
    folder, config = read_settings(path)
    spec = _row_of(folder, config)
    saved_by_us = _ROW_KEY in config and (folder / "tokenizer.json").exists()
    built = None if saved_by_us else _built(spec, folder, config)
    tokenizer = _open_fast(folder) if built is None else _wrap(spec, built, config)
    if not saved_by_us:  # else its files say all
        _apply(spec, tokenizer, adds_bos=bool(config.get("add_bos_token", spec.adds_bos)))
    tokenizer.chat_template = own_template(tokenizer.chat_template)
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _built(spec: TokenizerSpec, folder: Path, config: dict[str, Any]) -> Tokenizer | None:
    """What a row makes of its own file; None where there is none, or where a tokenizer.json beside it has other tokens:
    that is what the folder's model was trained with."""
    if spec.build is None or not spec.has_own_file(folder):
        return None
    beside = read_object(folder / "tokenizer.json")
    if not beside:
        return spec.build(folder, config)
    try:
        built = spec.build(folder, config)
    except UserError:  # tokens are recorded under ids that the file does not give them
        return None
    vocabulary = beside["model"]["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else {piece: at for at, (piece, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in beside.get("added_tokens", [])}
    if built.get_vocab(with_added_tokens=True) == pieces | added:
        return built
    logger.info("%s: tokenizer.json and %s have other tokens; tokenizer.json is taken.", folder, spec.file)
    return None


def spec_for(source: PreTrainedTokenizerBase | str | Path, version: str | None = None) -> TokenizerSpec:
    """The row of `TOKENIZERS` that a tokenizer or a folder belongs to, `adds_bos` and special tokens as they are in it.

    Raises:
        UserError: an unknown version, or no tokenizer in the folder.
    """
    if version is not None:
        _check_version(version)
    if isinstance(source, PreTrainedTokenizerBase):
        # A row of somebody else's may be unknown here; what was saved with it says all that loading needs.
        row = TOKENIZERS.get(source.init_kwargs.get(_ROW_KEY, "fast"), TOKENIZERS["fast"])
        names = {key: getattr(source, f"{key}_token") for key in ("bos", "eos", "unk", "pad")}
        return replace(row, adds_bos=bool(leading_ids(source)), **names)
    return _row_of(*read_settings(source))


def read_settings(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a tokenizer, and its tokenizer_config.json; what older folders keep in special_tokens_map.json and
    added_tokens.json is in it too. Raises UserError: no such folder, or a file that is no JSON."""
    folder = resolve_folder(path, "the tokenizer", patterns=TOKENIZER_FILES)
    own, special, added = (
        read_object(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    config = special | own
    if not config.get("added_tokens_decoder"):
        # Where it is not recorded whether one is special, all are but runs of spaces.
        config["added_tokens_decoder"] = {
            index: {"content": text, "special": not text.isspace()} for text, index in added.items()
        }
    return folder, config


def _row_of(folder: Path, config: dict[str, Any]) -> TokenizerSpec:
    """The row of a folder, by its settings and files."""
    if _ROW_KEY in config:
        return TOKENIZERS.get(config[_ROW_KEY], TOKENIZERS["fast"])
    fitting = [spec for spec in TOKENIZERS.values() if spec.classes and spec.fits(folder, config)]
    if fitting:
        return fitting[0]
    if (
        (folder / "tokenizer.json").exists()
        or (folder / "vocab.json").exists()
        or (folder / "tokenizer.model").exists()
    ):
        return TOKENIZERS["fast"]
    raise UserError(f"{folder} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before every text: `[bos]` or nothing."""
    empty = tokenizer("").input_ids
    if tokenizer.eos_token_id in empty and tokenizer.eos_token_id != tokenizer.bos_token_id:
        return empty[: empty.index(tokenizer.eos_token_id)]
    return empty


def place_image_token(
    tokenizer: PreTrainedTokenizerBase, embedding_rows: int, tokens: Sequence[str] = (DEFAULT_IMAGE_TOKEN,)
) -> list[int]:
    """Gives image tokens their ids: the next free ones after the vocabulary, whatever the embedding's padding.

    Args:
        tokenizer: gains the tokens as special tokens, unless it has them.
        embedding_rows: rows of the embedding matrix. An id at or above it means that the caller grows the matrix.
        tokens: `<image>`, and `<im_start>`, `<im_end>` where images are to be wrapped.

    Returns:
        One id per token.

    Raises:
        UserError: the tokenizer already spans more ids than the embedding has rows.

    The masking engine still reads `<image>` typed in an answer as text.
    """
    if len(tokenizer) > embedding_rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens but the embedding only {embedding_rows} rows")
    known = tokenizer.added_tokens_encoder
    new = [AddedToken(text, normalized=False, special=True) for text in tokens if text not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    return [int(tokenizer.convert_tokens_to_ids(text)) for text in tokens]


def _check_version(version: str) -> None:
    if version != CHAT_TEMPLATE:
        conv_templates[version]  # raises UnknownNameError


def _recorded_tokens(config: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """Added tokens that the folder lists, by id. None is matched in normalized text: SentencePiece's normalization
    would put a space in front of the token itself."""
    keep = ("content", "single_word", "lstrip", "rstrip", "special")
    tokens = [
        (int(index), AddedToken(normalized=False, **{key: entry[key] for key in keep if key in entry}))
        for index, entry in config["added_tokens_decoder"].items()
    ]
    return sorted(tokens, key=lambda entry: entry[0])


def _add_recorded(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Adds the folder's own added tokens. Raises UserError where one would get another id than is recorded."""
    for index, token in _recorded_tokens(config):
        tokenizer.add_tokens([token])
        actual = tokenizer.token_to_id(token.content)
        if actual != index:
            raise UserError(f"{folder}: added token {token.content!r} is recorded as {index} but would be {actual}")


def _open_fast(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer.json as it is; without one, whatever transformers makes of the folder."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: transformers cannot open this tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: only a slow tokenizer; save it once as tokenizer.json with transformers")
    return tokenizer


def _wrap(spec: TokenizerSpec, backend: Tokenizer, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A `tokenizers.Tokenizer` with the special tokens of its folder, as transformers knows it."""
    names = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        names[key] = value["content"] if isinstance(value, dict) else value
    if spec.name == "llama":
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | {k: v for k, v in names.items() if v}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config.get("model_max_length", 2048),
        add_bos_token=False,  # so that nothing but the text is encoded, until `_apply` says more
        chat_template=config.get("chat_template"),
        **{key: value for key, value in names.items() if value},
    )


def _apply(spec: TokenizerSpec, tokenizer: PreTrainedTokenizerFast, adds_bos: bool) -> None:
    """Sets what the row says, in place. A tokenizer that ought to add BOS and does not is told to."""
    if adds_bos and spec.adds_bos and not leading_ids(tokenizer):
        tokenizer.add_bos_token = True
    for key in ("bos", "eos", "unk", "pad"):
        value = getattr(spec, key)
        if value is not None:
            setattr(tokenizer, f"{key}_token", value)
            _ensure_special(tokenizer, value)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError("the tokenizer has neither a pad, an unk nor an eos token: one of them must be in its config")
    tokenizer.init_kwargs[_ROW_KEY] = spec.name


def _ensure_special(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    if text not in tokenizer.added_tokens_encoder:
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=True)], special_tokens=True)
