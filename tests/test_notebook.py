"""Test of demo/video_mae_visualize.ipynb: all of it runs, and its sliders change the picture."""

import base64
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from models_mae import mae_vit_tiny_patch8

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "demo/video_mae_visualize.ipynb"

# what the frontend does when a slider is let go
MOVE_SLIDERS = """
seen = [picture.value]
for control, value in zip(controls, [0.5, "tube", 3, 0.0, False]):
    control.value = value
    seen.append(picture.value)
print(len(set(seen)))
"""


@pytest.mark.slow
def test_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs the [demo] extra")
    nbconvert = pytest.importorskip("nbconvert.preprocessors", reason="needs the [demo] extra")
    pytest.importorskip("ipywidgets", reason="the notebook needs the [demo] extra")
    model = mae_vit_tiny_patch8(img_size=32, num_frames=8, pred_t_dim=8)
    checkpoint = tmp_path / "mae.pth"
    torch.save({"model": model.state_dict(), "arguments": model.arguments}, checkpoint)

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)  # committed without results
    sources = "\n".join(cell.source for cell in code)
    assert sources.count("CHECKPOINT = None\n") == 1
    for cell in code:
        cell.source = cell.source.replace(
            "CHECKPOINT = None\n", f"CHECKPOINT = {str(checkpoint)!r}\n"
        )
    notebook.cells.append(nbformat.v4.new_code_cell(MOVE_SLIDERS))
    executor = nbconvert.ExecutePreprocessor(timeout=120, kernel_name="python3")
    executor.preprocess(notebook, {"metadata": {"path": str(NOTEBOOK.parent)}})

    outputs = [output for cell in code for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    (html,) = [d["text/html"] for d in data if "text/html" in d]
    (gif,) = re.fullmatch(r'<img src="data:image/gif;base64,(.*)">', html).groups()
    with Image.open(io.BytesIO(base64.b64decode(gif))) as picture:
        assert picture.n_frames == 8
        assert picture.width > 2 * 128
    assert any(
        "application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in code[-1].outputs
    )
    assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
    assert notebook.cells[-1].outputs[0].text.strip() == "6"  # every control drew another picture
