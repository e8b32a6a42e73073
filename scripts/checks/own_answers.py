# SPDX-License-Identifier: Apache-2.0
"""moellava's own answers to questions about pictures of easy-VQA's test split: what an engine's are compared with.

    python scripts/checks/own_answers.py --model-path DIR --output FILE

Each answer has its prompt and its tokens by id, and the log probabilities of the likeliest tokens at each place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moellava.eval.benchmarks import Question
from moellava.eval.easy_vqa import test_questions
from moellava.files import write_json
from moellava.serve.answer import Prompts
from moellava.serve.generate import Sampling, evaluating, generate
from moellava.serve.prompt import Request
from moellava.vlm import VLM, open_vlm

LIKELIEST = 5
"""Tokens of each place whose log probabilities are told."""

PACKAGES = ("moellava", "torch", "transformers", "tokenizers", "pillow")


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """So many questions, evenly over the split: other pictures and other sorts of questions."""
    step = len(questions) // count
    return [questions[index * step] for index in range(count)]


def answered(vlm: VLM, prompts: Prompts, question: Question, max_tokens: int) -> dict[str, Any]:
    """One question with its greedy answer, asked alone."""
    example = prompts.example(Request(question=question.text, images=[question.image]))
    batch = prompts.batch([example])
    (tokens,) = generate(
        vlm.model, batch, prompts.ending, Sampling(max_new_tokens=max_tokens), **prompts.options([example])
    )
    return {
        "question": question.text,
        "image": str(question.image),
        "text": prompts.ending.text(tokens),
        "length": len(tokens),
        "prompt": batch["input_ids"][0].tolist(),
        "tokens": tokens,
        "logprobs": logprobs(vlm.model, batch, tokens),
    }


def logprobs(model: Any, batch: dict[str, Tensor], tokens: list[int]) -> list[dict[int, float]]:
    """Token -> log probability at each place of an answer, from one forward over prompt and answer."""
    said = torch.tensor([tokens])
    whole = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], said], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(said)], dim=1),
    }
    with evaluating(model), torch.no_grad():
        logits_TV = model(**whole).logits[0, -len(tokens) - 1 : -1]
    values_TK, tokens_TK = logits_TV.float().log_softmax(-1).topk(LIKELIEST)
    return [dict(zip(*place, strict=True)) for place in zip(tokens_TK.tolist(), values_TK.tolist(), strict=True)]


def main() -> None:
    """Writes the answers."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model-path", required=True, help="a folder of stage 2 or 3")
    flags.add_argument("--output", type=Path, required=True, help="JSON file")
    flags.add_argument("--questions", type=int, default=12, help="how many (default 12)")
    flags.add_argument("--max-tokens", type=int, default=16, help="of an answer (default 16)")
    args = flags.parse_args()
    vlm = open_vlm(args.model_path, device="cpu")
    prompts = Prompts(vlm)
    questions = spread(test_questions(), args.questions)
    answers = [answered(vlm, prompts, question, args.max_tokens) for question in questions]
    write_json(
        args.output,
        {
            "engine": "moellava",
            "model": args.model_path,
            "versions": {name: version(name) for name in PACKAGES},
            "max_tokens": args.max_tokens,
            "answers": answers,
        },
    )


if __name__ == "__main__":
    main()
