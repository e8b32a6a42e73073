# SPDX-License-Identifier: Apache-2.0
"""Builders of fast tokenizers from the vocabulary files that have none: SentencePiece, tiktoken, BPE merges.

Each returns a `tokenizers.Tokenizer` that gives exactly the ids of the format's own library, with character offsets,
and that plain `transformers` opens again from the `tokenizer.json` it is saved as.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from moellava.errors import UserError
from moellava.files import read_json

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Types of SentencePiece pieces (sentencepiece_model.proto, `SentencePiece.Type`)."""

CL100K_DIGITS_APART = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen and Arcade100k cut text into words: cl100k's rule, but every digit is a word of its own."""


def from_sentencepiece(path: Path, legacy: bool = True) -> Tokenizer:
    """A SentencePiece BPE model (`tokenizer.model`) as a fast tokenizer.

    Args:
        path: the model file.
        legacy: whether text after a special token gets the leading space of a sentence, as LlamaTokenizer's did until
            transformers 4.31 and does with `legacy: true` since (transformers#24565).

    Raises:
        UserError: not a SentencePiece file, or a model that is not BPE.

    Exact for models that do not normalize text, as all of Llama's; the others go by `normalizers.Precompiled`,
    which differs on a few sequences such as CR LF. There is no pre-tokenizer: SentencePiece merges over spaces. Control
    pieces take no part in merging, so that `</s>` typed in a text stays text.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # the class is made at import
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from error
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise UserError(f"{path} is not a BPE model; convert it once to a tokenizer.json with `transformers`")
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    normal = {piece.piece: -piece.score for piece in proto.pieces if piece.type == _NORMAL}
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    unk = next((piece.piece for piece in proto.pieces if piece.type == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(normal),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=any(piece.type == _BYTE for piece in proto.pieces),
            ignore_merges=bool(symbols),
        )
    )
    _sentencepiece_text_rules(tokenizer, proto.normalizer_spec, legacy, symbols)
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return tokenizer


def _sentencepiece_text_rules(tokenizer: Tokenizer, spec: Any, legacy: bool, symbols: list[str]) -> None:
    """Sets normalizer and decoder: spaces are `▁`, one stands before every sentence.

    Args:
        tokenizer: changed in place.
        spec: the model's NormalizerSpec.
        legacy: see `from_sentencepiece`.
        symbols: user-defined pieces. They are cut out of the normalized text whole; added tokens would not do, because
            the text behind one would count as a sentence of its own.
    """
    steps: list[normalizers.Normalizer] = []
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    first_only = spec.add_dummy_prefix and not legacy
    if spec.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(_SPACE))
    if not first_only:
        steps.append(normalizers.Replace(" ", _SPACE))
    else:
        cuts.append(pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False))
    if symbols:
        longest_first = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
        cuts.append(pre_tokenizers.Split(Regex(longest_first), behavior="isolated"))
    if cuts:
        tokenizer.pre_tokenizer = cuts[0] if len(cuts) == 1 else pre_tokenizers.Sequence(cuts)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", left=1)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _merges(ranks: dict) -> list[tuple]:
    """All pairs of entries that join to an entry, in the order in which the format's own library joins them.

    Args:
        ranks: entry (str or bytes) -> rank; the pair whose join has the lowest rank is joined first.
    """
    found = []
    for entry, rank in ranks.items():
        for cut in range(1, len(entry)):
            left, right = entry[:cut], entry[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(found, key=lambda merge: merge[:3])]


def from_tiktoken(path: Path, pattern: str, special: dict[str, int]) -> Tokenizer:
    """A tiktoken file (lines of `base64 rank`) as a fast byte-level tokenizer; text is normalised to NFC first.

    Args:
        path: the file.
        pattern: regular expression whose matches are tokenized apart.
        special: special tokens and their ids.

    Returns:
        The same object for the same content, asked for again: `transformers` copies what it wraps, and nobody else may
        change it.

    Raises:
        UserError: the file is of another format.
    """
    try:
        return _of_tiktoken(path.read_bytes(), pattern, tuple(special.items()))
    except ValueError as error:
        raise UserError(f"{path} is not a tiktoken file (lines of 'base64 rank'): {error}") from error


def _ranks(content: bytes) -> dict[bytes, int]:
    """Token -> its rank. Raises ValueError where the file is of another format."""
    lines = [line.split() for line in content.splitlines() if line]
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@lru_cache(maxsize=1)  # seconds of work; a process opens one model's files several times, as merge-lora does
def _of_tiktoken(content: bytes, pattern: str, special: tuple[tuple[str, int], ...]) -> Tokenizer:
    """See `from_tiktoken`. Raises ValueError where the file is of another format."""
    ranks = _ranks(content)
    char = _byte_characters()
    text = {token: "".join(char[byte] for byte in token) for token in ranks}
    vocab = {text[token]: rank for token, rank in ranks.items()} | dict(special)
    # New tokens are numbered by the size of the vocabulary, so a hole in it would let one take a used id.
    vocab |= {f"<unused {index}>": index for index in set(range(max(vocab.values()))) - set(vocab.values())}
    merges = [(text[left], text[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name, _ in special])
    return tokenizer


def from_merges(vocab_file: Path, merges_file: Path) -> Tokenizer:
    """A GPT-2 style `vocab.json` + `merges.txt` as a fast tokenizer (CodeGen's, of Phi-2).

    Args:
        vocab_file: token -> id.
        merges_file: merges in order, one a line.
    """
    vocab = read_json(vocab_file)
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    pairs = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> dict[int, str]:
    """byte -> the printable character that stands for it in GPT-2's byte-level vocabularies."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
