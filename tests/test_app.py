"""Tests of demo/app.py: the page in a real browser, without a network."""

import contextlib
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
from models_vit import vit_tiny_patch8
from util.features import load_clips
from util.file_io import printable

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


@contextlib.contextmanager
def serve(folder, model, **records):
    """Serve the page of a model by the command of the documents; give its address."""
    checkpoint = folder / "model.pth"
    torch.save({"model": model.state_dict(), "arguments": model.arguments} | records, checkpoint)
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
def address(tmp_path_factory):
    model = mae_vit_tiny_patch8(img_size=32, num_frames=8, pred_t_dim=8)
    with serve(tmp_path_factory.mktemp("model"), model, args={"sampling": "segments"}) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, address):
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


@pytest.fixture
def page(address, browser):
    with opened(browser, address) as page:
        yield page


def source(page) -> str:
    return page.locator("#picture img").get_attribute("src")


def wait_for_another(page, src) -> str:
    page.wait_for_function(
        "src => { const img = document.querySelector('#picture img'); "
        "return img && img.src !== src && img.complete }",
        arg=src,
    )
    return source(page)


def said(page) -> str:
    return page.locator("#frames textarea").input_value()


def wait_for_frames(page, start) -> str:
    """Wait until the page says which frames of a video it shows; return what it says."""
    page.wait_for_function(
        "start => document.querySelector('#frames textarea').value.startsWith(start)", arg=start
    )
    return said(page)


def picked(page) -> str:
    return page.get_by_label("Video", exact=True).input_value()


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
    wait_for_frames(page, "v0.mp4: ")
    own = wait_for_another(page, first)
    with page.expect_download() as download:
        page.locator("#download").click()
    assert re.fullmatch(r"v0-random-0\.90-\w+\.gif", download.value.suggested_filename)
    assert Path(download.value.path()).read_bytes() == fetch(own)


def test_the_page_names_the_clip_that_it_shows(page, videos):
    """Either a video of the list or the upload is chosen; the other one is empty."""
    text = wait_for_frames(page, "test_")
    assert text.endswith(".mp4: frames 1, 3, 6, ..., 18 of 20, 0.07 to 1.20 s")
    assert picked(page) == "moving_down"
    page.locator("#upload input[type=file]").set_input_files(videos / "v0.mp4")
    text = wait_for_frames(page, "v0.mp4: ")
    assert text == "v0.mp4: frames 3, 11, 18, ..., 56 of 60, 0.10 to 1.87 s"  # in segments
    page.wait_for_function("() => document.querySelector('#video input').value === ''")
    page.get_by_label("Position of the clip in the video").last.fill("0")
    page.wait_for_function(
        "() => document.querySelector('#frames textarea').value.startsWith('v0.mp4: frames 0, 7,')"
    )
    page.get_by_label("Video", exact=True).click()
    page.get_by_role("option", name="moving_up", exact=True).click()
    wait_for_frames(page, "test_")
    assert picked(page) == "moving_up"
    assert page.locator("#upload").get_by_text("v0.mp4").count() == 0
    page.locator("#upload input[type=file]").set_input_files(videos / "v0.mp4")
    wait_for_frames(page, "v0.mp4: ")
    page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
    wait_for_frames(page, "test_")
    assert picked(page) == "moving_down"


NAMES = [
    "moving \U0001f680",
    "a\x00b\n",
    "caf\udce9 <b>",
    "<i>|" + "x" * 150,
    "\u8dd1\u6b65",
    "e",
    "f",
]


def test_a_classifier_shows_five_bars_beside_the_clip(browser, tmp_path, videos):
    torch.manual_seed(0)
    model = vit_tiny_patch8(img_size=32, num_frames=8, num_classes=7).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
        clip = load_clips(videos / "v0.mp4", model)
        shares = model(clip)[0].softmax(dim=0)
    best = shares.argsort(descending=True)[:5].tolist()
    names = list(NAMES)
    names[best[0]], names[3] = names[3], names[best[0]]  # the long one is shown
    with serve(tmp_path, model, classes=names) as address, opened(browser, address) as page:
        page.locator("#upload input[type=file]").set_input_files(videos / "v0.mp4")
        wait_for_frames(page, "v0.mp4: frames 14, ")
        assert fetch(source(page)).startswith(b"GIF89a")
        expected = [printable(names[label]) for label in best]
        page.wait_for_function(
            "name => document.querySelector('#classes dt').textContent === name", arg=expected[0]
        )
        assert page.locator("#classes dt").all_text_contents() == expected
        percents = [float(text[:-1]) for text in page.locator("#classes dd").all_text_contents()]
        assert percents == pytest.approx([100 * shares[label].item() for label in best], abs=0.51)
        bars, clip = (page.locator(name).bounding_box() for name in ("#classes", "#picture"))
        assert bars["x"] >= clip["x"] + clip["width"]
        assert bars["y"] == pytest.approx(clip["y"], abs=2)
        right_edges = [cell.bounding_box() for cell in page.locator("#classes dd").all()]
        assert all(x["x"] + x["width"] <= bars["x"] + bars["width"] for x in right_edges)
        assert not page.locator("#ratio").is_visible()


def test_bad_file_gives_a_readable_message(page, tmp_path):
    bad = tmp_path / "notes.mp4"
    bad.write_text("no video at all")
    page.locator("#upload input[type=file]").set_input_files(bad)
    message = page.locator("#message textarea")
    message.wait_for()
    assert message.input_value().startswith("notes.mp4: cannot be opened as a video (")
    assert "Traceback" not in page.content()
    assert page.locator("#picture img").count() == 0
    assert said(page) == ""
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
