"""Tests of demo/app.py: the page in a real browser, without a network."""

import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from models_mae import mae_vit_tiny_patch8

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# no background services: whatever the browser asks for, the page asks for
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip
missing = [name for name in ("gradio", "playwright") if not importlib.util.find_spec(name)]
missing += [] if CHROMIUM else ["chromium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Serve the page by the command of the documents and return its address."""
    checkpoint = tmp_path_factory.mktemp("model") / "mae.pth"
    model = mae_vit_tiny_patch8(img_size=32, num_frames=8, pred_t_dim=8)
    torch.save({"model": model.state_dict(), "arguments": model.arguments}, checkpoint)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "demo.app", "--checkpoint", str(checkpoint)]
    server = subprocess.Popen(
        [*command, "--port", str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    lines = []
    for line in server.stdout:
        lines.append(line)
        if match := re.search(r"http://\S+", line):
            assert match[0].rstrip("/") == f"http://127.0.0.1:{port}"
            break
    else:
        pytest.fail("the server ended: " + "".join(lines))
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def page(address, browser):
    """Open the page, see its first picture, and check in the end that it asked no other host."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    hosts = set()
    page.on(
        "request", lambda request: hosts.add(re.sub(r"^(\w+:(//[^/]*)?).*", r"\1", request.url))
    )
    page.goto(address)
    page.wait_for_selector("#picture img")
    yield page
    assert hosts <= {address, "data:", f"blob:{address}"}
    page.close()


def source(page) -> str:
    return page.locator("#picture img").get_attribute("src")


def wait_for_another(page, src) -> str:
    page.wait_for_function(
        "src => { const img = document.querySelector('#picture img'); "
        "return img && img.src !== src && img.complete }",
        arg=src,
    )
    return source(page)


def fetch(url) -> bytes:
    with urllib.request.urlopen(url) as response:
        return response.read()


def grey_share(gif: bytes) -> float:
    """Measure how much of the middle row is removed, over all frames."""
    with Image.open(io.BytesIO(gif)) as picture:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
    return float((np.stack(frames) == 128).all(axis=-1).sum() / len(frames) / 128**2)


def test_choosing_and_moving_change_the_picture(page):
    first = source(page)
    assert fetch(first).startswith(b"GIF89a")
    page.locator("#ratio input[type=range]").fill("0.5")
    half = wait_for_another(page, first)
    assert grey_share(fetch(first)) == pytest.approx(0.9, abs=0.02)
    assert grey_share(fetch(half)) == pytest.approx(0.5, abs=0.02)
    page.get_by_label("Video", exact=True).click()
    page.get_by_role("option", name="moving_up", exact=True).click()
    up = wait_for_another(page, half)
    page.get_by_label("tube").check()
    wait_for_another(page, up)


def test_uploading_and_downloading(page, videos):
    first = source(page)
    page.locator("#upload input[type=file]").set_input_files(videos / "v0.mp4")
    own = wait_for_another(page, first)
    with page.expect_download() as download:
        page.locator("#download").click()
    assert re.fullmatch(r"v0-random-0\.90-\w+\.gif", download.value.suggested_filename)
    assert Path(download.value.path()).read_bytes() == fetch(own)


def test_bad_file_gives_a_readable_message(page, tmp_path):
    bad = tmp_path / "notes.mp4"
    bad.write_text("no video at all")
    page.locator("#upload input[type=file]").set_input_files(bad)
    message = page.locator("#message textarea")
    message.wait_for()
    assert message.input_value().startswith("notes.mp4: cannot be opened as a video (")
    assert "Traceback" not in page.content()
    assert page.locator("#picture img").count() == 0
    assert page.locator("#download").is_disabled()
    page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
    page.wait_for_selector("#picture img")
    message.wait_for(state="hidden")


def test_it_listens_on_this_machine_alone(address):
    port = int(address.rpartition(":")[2])
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    table += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    listening = [row[1] for row in table if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]


def test_without_gradio_it_says_what_to_install():
    code = (
        "import importlib.util, runpy, sys; sys.argv = ['app.py']; "
        "find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name: None if name == 'gradio' else find(name); "
        "runpy.run_module('demo.app', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == "app.py: error: the page needs Gradio: pip install '.[demo]'"
    )
