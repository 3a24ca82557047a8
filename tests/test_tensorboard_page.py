"""TensorBoard's pages of a resumed run, as a browser shows them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prepare_synthetic
import pytest

from engine.training_step import TrainingStep
from main import main

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no chromium here; on Debian: apt install chromium"),
]
PATIENCE = 60  # seconds until a page shows what it should
FOLDER = os.environ.get("SCREENSHOT_DIR")  # where each page goes as a PNG, to look at

# Everything that can be read on the page; TensorBoard hides most of it in shadow roots and frames.
READ_TEXT = """(function text(node) {
    if (node.nodeType === Node.TEXT_NODE) return node.data + " ";
    if (["SCRIPT", "STYLE", "TEMPLATE"].includes(node.nodeName)) return "";
    const inner = [node.shadowRoot, node.contentDocument?.body, ...node.childNodes];
    return inner.filter(Boolean).map(text).join("");
})(document.body)"""


class Browser:
    """Chromium without a window, driven over its debugging pipe."""

    def __init__(self, profile: str):
        read_end, self._commands = os.pipe()
        self._answers, write_end = os.pipe()

        def to_3_and_4() -> None:
            spare = os.dup(write_end)
            os.dup2(read_end, 3)
            os.dup2(spare, 4)

        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader",
            "--remote-debugging-pipe", "--window-size=1400,1000", f"--user-data-dir={profile}",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [BROWSER, *options],
            stderr=subprocess.DEVNULL, pass_fds=(3, 4), preexec_fn=to_3_and_4,
        )  # fmt: skip
        os.close(read_end)
        os.close(write_end)
        self._buffer, self._count, self._session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters} | self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                part = os.read(self._answers, 1 << 20)
                assert part, "the browser is gone"
                self._buffer += part
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str, *expected: str) -> str:
        """The page's text, once everything expected is in it."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        deadline, text = time.monotonic() + PATIENCE, ""
        while missing := [part for part in expected if part not in text]:
            assert time.monotonic() < deadline, f"{url}: no {missing} in {text!r}"
            time.sleep(0.3)
            found = self.call("Runtime.evaluate", expression=READ_TEXT)["result"]
            text = " ".join(found.get("value", "").split())
        if FOLDER:
            time.sleep(3)  # charts are drawn after their titles
            image = base64.b64decode(self.call("Page.captureScreenshot")["data"])
            (Path(FOLDER) / f"{url.partition('#')[2]}.png").write_bytes(image)
        return text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        yield browser
        browser.process.terminate()
        browser.process.wait()


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> Iterator[str]:
    """The address of TensorBoard on the log of a run that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("board")
    prepare_synthetic.write(folder / "data", 600, 400, 7)
    flags = [
        f"--data_dir={folder}/data", f"--output_dir={folder}/o", f"--log_dir={folder}/logs",
        "--device=cpu", "--num_workers=0", "--num_epochs=6", "--lr=0.003", "--log_every=1",
        "--projector",
    ]  # fmt: skip
    step = TrainingStep.__call__

    def stopping(training_step, batches, epoch, number):
        if number == 18:
            raise KeyboardInterrupt
        return step(training_step, batches, epoch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    time.sleep(1 - time.time() % 1)  # files of one second have no order
    assert main(flags) == 0
    command = [sys.executable, "-m", "tensorboard.main", "--port=0", f"--logdir={folder}/logs"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if " at http://" in line:
            break
    yield line.split(" at ")[1].split()[0].rstrip("/")
    process.terminate()
    process.wait()


def test_every_curve_has_a_chart(browser, board):
    browser.open(f"{board}/#scalars", "Loss", "Metrics", "Train", "Loss/train", "Metrics/HR@10")


def test_the_custom_page_has_what_belongs_together(browser, board):
    titles = ["loss", "ranking", "learning rate", "gradient norm", "wait for data, ms"]
    browser.open(f"{board}/#custom_scalars", "Learning", "Speed", *titles, "Loss/train_epoch")


def test_flags_are_hyperparameters_beside_their_results(browser, board):
    browser.open(f"{board}/#hparams", "batch_size", "128.00", "Metrics/HR@10", "Loss/valid")


def test_flags_are_a_table(browser, board):
    browser.open(f"{board}/#text", "flags", "infonce_temp", "0.1")


def test_similarities_are_histograms(browser, board):
    browser.open(f"{board}/#histograms", "InfoNCE/pos_sim", "InfoNCE/neg_sim")


def test_the_projector_shows_items_with_their_names(browser, board):
    browser.open(f"{board}/#projector", "Points: 400", "Dimension: 64", "events")


def test_a_resumed_run_is_one_line(board):
    """What the page draws: each step once, in order, in one run."""
    url = f"{board}/data/plugin/scalars/scalars?run=.&tag=Loss%2Ftrain"
    steps = [step for _, step, _ in json.load(urllib.request.urlopen(url))]
    assert steps == list(range(1, 31))
