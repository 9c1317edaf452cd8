"""Fixtures shared by the tests."""

import http.server
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.video_files import write_video
from util import file_io


def numbered_frame(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return a picture whose mean luma is `number` wherever it is cropped; colour runs sideways."""
    frame = np.full((height, width, 3), 30.0 + 3 * number)
    ramp = np.linspace(-20, 20, width)
    frame[..., 0] += ramp
    frame[..., 1] -= ramp * 0.299 / 0.587  # leaves the luma as it is
    return frame.round().astype(np.uint8)


def read_number(frame) -> int:
    """Return the number that a decoded `numbered_frame`, or a crop of one, shows."""
    luma = (np.asarray(frame, dtype=np.float64) * [0.299, 0.587, 0.114]).sum(-1).mean()
    return round((luma - 30) / 3)


FORK = multiprocessing.get_context("fork")  # such processes need not import PyTorch anew


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six real H.264 videos, 64 x 48, 60 numbered frames, with train, val and test csvs."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    frames = [numbered_frame(i) for i in range(60)]
    for i in range(6):
        write_video(folder / f"v{i}.mp4", frames, bframes=2, options={"crf": "4"})
        rows.append(f"v{i}.mp4 {i % 3}\n")
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(rows))
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve tmp_path/www; returns (folder, address, list of requested paths)."""
    www, requested = tmp_path / "www", []
    (www / "pretrain").mkdir(parents=True)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    file_io.fetch.cache_clear()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(www))

        def log_message(self, format, *args):
            requested.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield www / "pretrain", f"http://127.0.0.1:{httpd.server_port}/pretrain", requested
        httpd.shutdown()


@pytest.fixture(scope="session")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers")
