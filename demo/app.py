"""Serve a page on this machine: a masked autoencoder's reconstructions, or a classifier's classes.

    python -m demo.app

This needs `pip install '.[demo]'`. Nothing leaves the machine: the server listens only on
127.0.0.1, and all files of the page come from the installed package.
"""

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.visualize import (
    MIN_SIDE,
    NUM_BARS,
    classify,
    default_checkpoint,
    draw,
    embedded_videos,
    is_classifier,
    load_clip,
    load_model,
)
from util.args import adder, between
from util.errors import UserError
from util.file_io import path_to_text, printable
from util.masking import MASK_TYPES
from util.run import run
from util.visualize import encode_gif, enlarge

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
TEXT = """# Masked autoencoder on video
Patches are removed from the clip, and the model predicts them from the others. Model: {name}."""
CSS = "#classes dt { overflow-wrap: anywhere }"  # names may be long
CLASSES_TEXT = """# Video classifier
The bars are the probabilities of the best classes of the clip that is shown. Model: {name}."""


def build_page(model: Any, name: str, videos: Sequence[Path], folder: str) -> Any:
    """Return the page, a gradio.Blocks.

    Args:
        model: see demo.visualize.load_model.
        name: name of the model, as shown.
        videos: videos to choose from.
        folder: folder for the pictures.
    """
    import gradio as gr

    paths = {path.parent.name: path for path in videos}
    first, classifies = next(iter(paths)), is_classifier(model)

    def show(
        picked: str | None,
        uploaded: str | None,
        clip_start: float,
        mask_ratio: float,
        mask_type: str,
        seed: float,
        paste_visible: bool,
    ) -> tuple[str | None, Any, Any, str, Any]:
        """Return the GIF to show and to download, or a message, the frames, and the classes."""
        path = uploaded or str(paths[picked or first])
        # the user does not know the folder of an upload
        own_name = printable(path_to_text(os.path.basename(path)))
        try:
            clip = load_clip(path, model, clip_start)
            best = dict(classify(model, clip.pixels)) if classifies else None
        except UserError as error:
            message = gr.update(value=str(error).replace(path, own_name), visible=True)
            return None, gr.update(value=None, interactive=False), message, "", None
        stem = Path(path).stem
        if classifies:
            sheet = enlarge(clip.pixels[0], -(-MIN_SIDE // clip.pixels.shape[2]))
        else:
            sheet = draw(model, clip.pixels, [mask_ratio], mask_type, int(seed), paste_visible)
            stem += f"-{mask_type}-{mask_ratio:.2f}"
        file, path = tempfile.mkstemp(".gif", f"{stem}-", folder)
        with open(file, "wb") as gif:
            gif.write(encode_gif(sheet, clip.fps(len(sheet))))
        download, text = gr.update(value=path, interactive=True), f"{own_name}: {clip.frames}"
        return path, download, gr.update(visible=False), text, best

    with gr.Blocks(title="Video models", analytics_enabled=False) as page:
        gr.Markdown((CLASSES_TEXT if classifies else TEXT).format(name=name))
        with gr.Row():
            with gr.Column(min_width=250):
                video = gr.Dropdown(list(paths), value=first, label="Video", elem_id="video")
                upload = gr.File(label="or your own video file", height=120, elem_id="upload")
                start = gr.Slider(0, 1, 0.5, step=0.05, label="Position of the clip in the video")
                with gr.Column(visible=not classifies):
                    masks = [
                        gr.Slider(0.05, 0.99, 0.9, step=0.01, label="Mask ratio", elem_id="ratio"),
                        gr.Radio(list(MASK_TYPES), value="random", label="What is removed"),
                        gr.Slider(0, 99, 0, step=1, label="Seed of the mask"),
                        gr.Checkbox(True, label="Show the visible patches in the reconstruction"),
                    ]
            with gr.Column(min_width=250):
                message = gr.Textbox(label="This does not work", visible=False, elem_id="message")
                picture = gr.Image(
                    show_label=False,
                    type="filepath",
                    interactive=False,
                    buttons=[],
                    elem_id="picture",
                )
                frames = gr.Textbox(label="Clip", interactive=False, elem_id="frames")
                download = gr.DownloadButton("Download the GIF", elem_id="download")
            with gr.Column(min_width=250, visible=classifies):
                classes = gr.Label(
                    num_top_classes=NUM_BARS,
                    label="Best classes",
                    show_heading=False,
                    elem_id="classes",
                )
        # one video is chosen: the other control shows that it is not this one
        video.input(lambda: None, outputs=upload, api_visibility="private")
        upload.upload(lambda: None, outputs=video, api_visibility="private")
        upload.clear(lambda: first, outputs=video, api_visibility="private")
        controls = [video, upload, start, *masks]
        gr.on(
            [page.load, *(control.change for control in controls)],
            show,
            controls,
            [picture, download, message, frames, classes],
            trigger_mode="always_last",  # draw only the last position of a moving slider
            api_visibility="private",
        )
    return page


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.app",
        description="Serve a page that shows what a masked autoencoder or a classifier makes of "
        "videos.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = adder(parser)
    text = "path, address or name of a pre-trained or fine-tuned model; None: as in python -m "
    add("--checkpoint", None, text + "demo.visualize")
    text = "port of the page; None: the first free one from 7860"
    add("--port", None, text, between(int, 1, 65535))
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load the model and serve the page until Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install '.[demo]'")
    name = args.checkpoint or default_checkpoint()
    model = load_model(args.checkpoint)
    videos = embedded_videos()
    with tempfile.TemporaryDirectory(prefix="mae-video-") as folder:
        page = build_page(model, name, videos, folder)
        try:
            page.launch(
                server_name="127.0.0.1",
                server_port=args.port,
                share=False,
                ssr_mode=False,
                footer_links=[],
                css=CSS,
            )
        except OSError as error:
            raise UserError(f"the page cannot be served: {error}") from error


if __name__ == "__main__":
    run(main, parse_args)
