# SPDX-License-Identifier: Apache-2.0
"""Stand-in for Qwen-VL-Chat's tokenizer: paths between <img> and </img> become one token a byte."""

import base64
import re
from pathlib import Path

import tiktoken

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPAN = 256
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
IMAGE = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]


class QWenTokenizer:
    def __init__(self, folder):
        lines = (Path(folder) / "qwen.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
        self.special = {name: len(ranks) + index for index, name in enumerate(SPECIAL + IMAGE)}
        self.encoding = tiktoken.Encoding("Qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special)

    def __call__(self, text):
        ids = []
        for piece in re.split("(<img>.*?</img>)", text):
            if not piece.startswith("<img>"):
                ids += self.encoding.encode(piece, allowed_special="all")
                continue
            path = list(piece[len("<img>") : -len("</img>")].encode())
            begin, end, filler = (self.special[name] for name in ("<img>", "</img>", "<imgpad>"))
            ids += [begin, *path, *[filler] * (SPAN - len(path)), end]
        return ids
