# SPDX-License-Identifier: Apache-2.0
"""The page: pictures and questions, an answer that streams, and for a sparse model which experts read and wrote."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from moellava.data.embedded import data_uri
from moellava.errors import UserError
from moellava.serve.api.app import Service
from moellava.serve.api.experts import Shares
from moellava.serve.api.growing import Piece
from moellava.serve.api.page_files import LocalFiles
from moellava.serve.api.panel import panel
from moellava.serve.api.refusals import Refusal, public
from moellava.serve.api.schema import NEW_TOKENS, Question, pictures_of
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request, with_tags

CLEANING = (600, 3600)
"""Seconds between two looks for old uploads, and after which an upload is old."""

HINT = "Ask about pictures: the clip adds them, several at a time."

NOTHING_YET = "<p>Ask something, and this shows which experts read it and wrote the answer.</p>"


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        files: uploads that it shows.
        answer: as far as it has come.
    """

    question: str
    files: tuple[str, ...]
    answer: str = ""


State = tuple[Any, list[Turn], Any, Any]
"""What an event sets: the conversation as it is shown, its turns, the panel, and the input."""


class Page:
    """The events of the page.

    Args:
        service: answers.
    """

    def __init__(self, service: Service):
        self.service = service
        self.is_sparse = service.scheduler.vlm.spec is not None

    async def ask(self, message: dict[str, Any], turns: list[Turn], *options: Any) -> AsyncGenerator[State, None]:
        """Answers a new question."""
        question = (message.get("text") or "").strip()
        if not question and not message.get("files"):
            raise gr.Error("Type a question first.", print_exception=False)
        turn = Turn(question, tuple(str(file) for file in message.get("files") or ()))
        yield gr.skip(), turns, gr.skip(), gr.MultimodalTextbox(value=None)
        async with aclosing(self._answer(turns, turn, *options)) as states:
            async for state in states:
                yield state

    async def again(self, turns: list[Turn], *options: Any) -> AsyncGenerator[State, None]:
        """Answers the last question once more."""
        if not turns:
            raise gr.Error("There is no question yet.", print_exception=False)
        async with aclosing(self._answer(turns[:-1], replace(turns[-1], answer=""), *options)) as states:
            async for state in states:
                yield state

    async def _answer(self, turns: list[Turn], turn: Turn, *options: Any) -> AsyncGenerator[State, None]:
        """The states of the page while an answer grows. A turn that was not answered is forgotten by the next one."""
        before = [one for one in turns if one.answer]
        yield self.state([*before, turn])
        try:
            with self.service.slots.one():
                question = await run_in_threadpool(self.question, [*before, turn], *options)
                async with aclosing(self.service.events(question)) as events:
                    async for event in events:
                        if isinstance(event, Piece):
                            turn = replace(turn, answer=turn.answer + event.text)
                            yield self.state([*before, turn])
                        else:
                            yield self.state([*before, turn], event.experts)
        except UserError as error:
            yield self.state(before)
            raise gr.Error(public(error), print_exception=False) from error

    def question(
        self,
        turns: Sequence[Turn],
        temperature: float,
        top_p: float,
        top_k: float,
        repetition_penalty: float,
        new_tokens: float,
        seed: str,
    ) -> Question:
        """What turns, the last of them open, and the settings ask. What sampling alone knows is left out where nothing
        is drawn. Raises UserError for pictures or settings beyond the limits."""
        limits = self.service.limits
        messages = []
        for turn in turns:
            messages.append({"from": "human", "value": with_tags(turn.question, len(turn.files))})
            messages.append({"from": "gpt", "value": turn.answer})
        shown = pictures_of([uploaded(file) for turn in turns for file in turn.files], limits)
        drawing = {"top_p": top_p, "top_k": whole(top_k), "seed": whole(seed) if seed.strip() else None}
        sampling = Sampling(
            max_new_tokens=min(whole(new_tokens), limits.new_tokens),
            temperature=temperature,
            repetition_penalty=None if repetition_penalty == 1 else repetition_penalty,
            **(drawing if temperature else {}),  # type: ignore[arg-type]  # Sampling checks them
        )
        return Question(Request(messages=messages[:-1], images=shown), sampling, counts_experts=self.is_sparse)

    def state(self, turns: list[Turn], experts: Shares | None = None) -> State:
        """What the page shows of some turns; the input stays, for the next question may be typed there."""
        return messages_of(turns), turns, panel(experts) if experts else gr.skip(), gr.skip()


def whole(number: object) -> int:
    """A whole number, of a slider or typed. Raises Refusal for what is none."""
    text = str(number).strip().removesuffix(".0")
    if not re.fullmatch(r"-?\d{1,19}", text):
        raise Refusal(f"{text[:40]!r} is no whole number.")
    return int(text)


def uploaded(file: str) -> str:
    """An upload as a data URI. Raises Refusal for one that has been deleted meanwhile."""
    try:
        return data_uri(Path(file).read_bytes())
    except OSError as error:
        raise Refusal("A picture of this conversation is no longer kept: clear it.") from error


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as Gradio's chatbot takes them."""
    shown: list[dict[str, Any]] = []
    for turn in turns:
        shown += [{"role": "user", "content": {"path": file}} for file in turn.files]
        shown += [{"role": "user", "content": turn.question}] if turn.question else []
        shown += [{"role": "assistant", "content": turn.answer}] if turn.answer else []
    return shown


def create_page(service: Service) -> gr.Blocks:
    """The page, with its events."""
    page, limits = Page(service), service.limits
    with gr.Blocks(
        title=f"{service.settings.name} · moellava", analytics_enabled=False, delete_cache=CLEANING
    ) as blocks:
        gr.Markdown(f"## {service.settings.name}")
        turns = gr.State([], time_to_live=CLEANING[1])
        with gr.Row():
            with gr.Column(scale=3):
                conversation = gr.Chatbot(height=460, show_label=False, buttons=["copy"], elem_id="conversation")
                message = gr.MultimodalTextbox(
                    file_count="multiple", file_types=["image"], sources=["upload"], placeholder=HINT, show_label=False
                )
                with gr.Row():
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                    again = gr.Button("Regenerate", elem_id="regenerate")
                    clear = gr.Button("Clear", elem_id="clear")
            with gr.Column(scale=2, min_width=280):
                with gr.Accordion("Experts", open=True, visible=page.is_sparse):
                    experts = gr.HTML(NOTHING_YET, elem_id="experts")
                with gr.Accordion("Sampling", open=True):
                    options = [
                        gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token"),
                        gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="acts above temperature 0"),
                        gr.Slider(0, 200, 0, step=1, label="Top k", info="0: all tokens"),
                        gr.Slider(0.5, 2, 1, step=0.05, label="Repetition penalty", info="1: the model's own"),
                        gr.Slider(
                            1,
                            limits.new_tokens,
                            min(NEW_TOKENS, limits.new_tokens),
                            step=1,
                            label="Longest answer",
                            elem_id="longest",
                        ),
                        gr.Textbox("", label="Seed", info="a whole number; empty: another draw each time"),
                    ]
        outputs = [conversation, turns, experts, message]
        shared: dict[str, Any] = {"outputs": outputs, "api_visibility": "private", "show_progress": "hidden"}
        asked = message.submit(page.ask, [message, turns, *options], **shared)
        asked_again = again.click(page.again, [turns, *options], **shared)
        stop.click(None, cancels=[asked, asked_again], api_visibility="private")
        cleared = {"fn": lambda: page.state([]), "cancels": [asked, asked_again], **shared}
        clear.click(**cleared)
        conversation.clear(**cleared)
    return blocks.queue(default_concurrency_limit=limits.requests, max_size=limits.requests, api_open=False)


def with_page(app: FastAPI, service: Service) -> FastAPI:
    """The API with the page at its root. Fonts are the reader's own: nothing is fetched from elsewhere."""
    app.add_middleware(LocalFiles)
    return gr.mount_gradio_app(
        app,
        create_page(service),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        max_file_size=service.limits.body_bytes,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
