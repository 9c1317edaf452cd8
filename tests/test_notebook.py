"""Tests of demo/video_mae_visualize.ipynb: all of it runs, and its sliders change the picture."""

import base64
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from demo.visualize import BARS_WIDTH
from models_mae import mae_vit_tiny_patch8
from models_vit import vit_tiny_patch8

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "demo/video_mae_visualize.ipynb"

# what the frontend does when a slider is let go
MOVE_SLIDERS = """
seen, texts = [picture.value], [frames.value]
for control, value in zip(controls, [0.0, 0.5, "tube", 3, False]):
    control.value = value
    seen.append(picture.value)
    texts.append(frames.value)
print(len(set(seen)), texts[0], texts[-1], sep="|")
"""


@pytest.fixture
def run_notebook():
    """Return a function that runs the notebook with a checkpoint and gives its code cells."""
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs the [demo] extra")
    nbconvert = pytest.importorskip("nbconvert.preprocessors", reason="needs the [demo] extra")
    pytest.importorskip("ipywidgets", reason="the notebook needs the [demo] extra")

    def run(checkpoint, allow_errors=False):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.outputs for cell in code] == [[]] * len(code)  # committed without results
        assert "\n".join(cell.source for cell in code).count("CHECKPOINT = None\n") == 1
        for cell in code:
            given = f"CHECKPOINT = {checkpoint!r}\n"
            cell.source = cell.source.replace("CHECKPOINT = None\n", given)
        notebook.cells.append(nbformat.v4.new_code_cell(MOVE_SLIDERS))
        options = {"timeout": 120, "kernel_name": "python3", "allow_errors": allow_errors}
        executor = nbconvert.ExecutePreprocessor(**options)
        executor.preprocess(notebook, {"metadata": {"path": str(NOTEBOOK.parent)}})
        return [*code, notebook.cells[-1]]

    return run


def saved(path, model, **records) -> str:
    torch.save({"model": model.state_dict(), "arguments": model.arguments} | records, path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mae", "vit"])
def test_notebook(run_notebook, tmp_path, kind):
    sizes = {"img_size": 32, "num_frames": 8}
    is_mae = kind == "mae"
    model = mae_vit_tiny_patch8(**sizes, pred_t_dim=8) if is_mae else vit_tiny_patch8(**sizes)
    code = run_notebook(saved(tmp_path / "model.pth", model, args={"sampling": "segments"}))
    outputs = [output for cell in code[:-1] for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    (html,) = [d["text/html"] for d in data if "text/html" in d]
    (gif,) = re.fullmatch(r'<img src="data:image/gif;base64,(.*)">', html).groups()
    with Image.open(io.BytesIO(base64.b64decode(gif))) as picture:
        assert picture.n_frames == 8
        assert picture.width > (2 * 128 if is_mae else 128 + BARS_WIDTH)
    assert any(
        "application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in code[-2].outputs
    )
    assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
    pictures, middle, start = code[-1].outputs[0].text.strip().split("|")
    assert pictures == ("6" if is_mae else "2")  # every control drew another picture
    assert middle == "frames 1, 3, 6, ..., 18 of 20, 0.07 to 1.20 s"
    assert start == "frames 0, 2, 5, ..., 17 of 20, 0.00 to 1.13 s"
    assert any(middle in output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_notebook_without_a_network(run_notebook, monkeypatch, tmp_path):
    """With no checkpoint to be had, it says so in one sentence."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    code = run_notebook("k400/vit_large", allow_errors=True)
    *_, error = next(cell.outputs for cell in code if cell.outputs)
    assert error.output_type == "error"
    (line,) = error.traceback
    assert line.startswith("error: cannot fetch https://dl.fbaipublicfiles.com/")
    assert "\n" not in line
    assert "OWNER" not in NOTEBOOK.read_text()
