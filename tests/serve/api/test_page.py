# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: pictures, a stream, stop, regenerate, clear, experts, a browser that is closed."""

from __future__ import annotations

import json
import re
import time

import pytest

from moellava.serve.answer import answer
from moellava.serve.api import scheduler as scheduling
from moellava.serve.prompt import Request
from tests.serve.api.chromium import tab
from tests.serve.api.serving import serving

KEY, QUESTION = "a-key", "what colour is it?"

BOT = "[...document.querySelectorAll('#conversation .bot.message')].map(one => one.innerText).join('')"
"""JavaScript: what the model has said, as the page shows it."""

PARTS = "[...document.querySelectorAll('#experts table')].map(one => one.dataset.part).join()"


def letters(text: str) -> str:
    """What Markdown leaves of a text."""
    return re.sub(r"[\W_]", "", text)


@pytest.mark.slow
def test_a_person_can_use_the_page(sparse, pictures, tmp_path, monkeypatch):
    delay, plain = [0.02], scheduling.Growing.take

    def slowly(self, *args):
        time.sleep(delay[0])
        return plain(self, *args)

    monkeypatch.setattr(scheduling.Growing, "take", slowly)
    (expected,) = answer(sparse, [Request(QUESTION, pictures[:2])], max_new_tokens=40)
    with serving(sparse, key=KEY, page=True) as server:
        with tab(tmp_path) as page:
            page.open(f"http://anyone:{KEY}@127.0.0.1:{server.port}/health")  # as a prompt for the password would
            page.wait("document.body?.innerText.includes('ok')")
            page.open(server.url)
            page.wait("document.querySelector('textarea') !== null")
            set_longest(page, 40)
            page.upload("input[type=file]", *pictures[:2])
            page.wait("document.querySelectorAll('.thumbnail-item img, .thumbnails img').length === 2")
            page.type("textarea", QUESTION)
            seen = {page.wait(BOT)}
            while not page.run(PARTS):
                seen.add(page.run(BOT))
            assert len(seen) > 3, "the answer did not stream"
            assert letters(page.run(BOT)) == letters(expected)
            assert page.run("document.querySelectorAll('#conversation .user img').length") == 2
            assert page.run(PARTS) == "pictures,words,answer"
            assert page.run("document.querySelector('textarea').value") == ""

            shown = page.run(BOT)
            page.click("#regenerate")
            page.wait(f"{BOT}.length < {len(shown) // 2}")
            page.wait(f"{BOT} === {json.dumps(shown)}")
            server.settled()

            delay[0] = 0.1
            set_longest(page, 300)
            page.type("textarea", "what is red?")
            page.wait(f"{BOT}.length > {len(page.run(BOT)) + 5}")
            page.click("#stop")
            server.settled()
            stopped = page.run(BOT)
            time.sleep(0.5)
            assert page.run(BOT) == stopped

            page.click("#clear")
            page.wait(f"{BOT} === ''")
            page.type("textarea", "")
            page.wait("document.body?.innerText.includes('Type a question first')")
            page.type("textarea", "what is blue?")
            page.wait(BOT)
            assert server.service.slots.taken == 1
        server.settled()  # the browser has gone in the middle of an answer


def set_longest(page, tokens: int) -> None:
    """Sets the slider of the longest answer."""
    page.wait("document.querySelector('#longest input[type=number]') !== null")
    page.run(
        "(() => { const input = document.querySelector('#longest input[type=number]');"
        f"input.value = {tokens};"
        "input.dispatchEvent(new Event('input', {bubbles: true}));"
        "input.dispatchEvent(new Event('blur', {bubbles: true})); })()"
    )
