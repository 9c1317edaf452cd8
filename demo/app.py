"""Serve a page on this machine that shows what a masked autoencoder sees and predicts.

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
    Autoencoder,
    default_checkpoint,
    draw,
    embedded_videos,
    load_autoencoder,
    load_clip,
)
from util.args import between
from util.errors import UserError
from util.masking import MASK_TYPES
from util.run import run
from util.visualize import encode_gif

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
TEXT = """# Masked autoencoder on video
Patches are removed from the clip, and the model predicts them from the others. Model: {name}."""


def build_page(autoencoder: Autoencoder, name: str, videos: Sequence[Path], folder: str) -> Any:
    """Return the page, a gradio.Blocks.

    Args:
        name: name of the model, as shown.
        videos: videos to choose from.
        folder: folder for the pictures.
    """
    import gradio as gr

    paths = {path.parent.name: path for path in videos}

    def show(
        picked: str,
        uploaded: str | None,
        mask_ratio: float,
        mask_type: str,
        seed: float,
        clip_start: float,
        paste_visible: bool,
    ) -> tuple[str | None, Any, Any]:
        """Return the GIF to show and to download, or a message instead."""
        path = uploaded or str(paths[picked])
        try:
            clip = load_clip(path, autoencoder, clip_start)
        except UserError as error:
            # the user does not know the folder of an upload
            message = str(error).replace(path, os.path.basename(path))
            nothing = gr.update(value=None, interactive=False)
            return None, nothing, gr.update(value=message, visible=True)
        sheet = draw(autoencoder, clip, [mask_ratio], mask_type, int(seed), paste_visible)
        stem = f"{Path(path).stem}-{mask_type}-{mask_ratio:.2f}-"
        file, path = tempfile.mkstemp(".gif", stem, folder)
        with open(file, "wb") as gif:
            gif.write(encode_gif(sheet, autoencoder.fps))
        return path, gr.update(value=path, interactive=True), gr.update(visible=False)

    with gr.Blocks(title="Masked autoencoder on video", analytics_enabled=False) as page:
        gr.Markdown(TEXT.format(name=name))
        with gr.Row():
            with gr.Column():
                controls = [
                    gr.Dropdown(list(paths), value=next(iter(paths)), label="Video"),
                    gr.File(label="or your own video file", height=120, elem_id="upload"),
                    gr.Slider(0.05, 0.99, 0.9, step=0.01, label="Mask ratio", elem_id="ratio"),
                    gr.Radio(list(MASK_TYPES), value="random", label="What is removed"),
                    gr.Slider(0, 99, 0, step=1, label="Seed of the mask"),
                    gr.Slider(0, 1, 0.5, step=0.05, label="Position of the clip in the video"),
                    gr.Checkbox(True, label="Show the visible patches in the reconstruction"),
                ]
            with gr.Column():
                message = gr.Textbox(label="This does not work", visible=False, elem_id="message")
                picture = gr.Image(
                    show_label=False,
                    type="filepath",
                    interactive=False,
                    buttons=[],
                    elem_id="picture",
                )
                download = gr.DownloadButton("Download the GIF", elem_id="download")
        gr.on(
            [page.load, *(control.change for control in controls)],
            show,
            controls,
            [picture, download, message],
            trigger_mode="always_last",  # draw only the last position of a moving slider
            api_visibility="private",
        )
    return page


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.app",
        description="Serve a page that shows what a masked autoencoder sees and predicts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        help="path, address or name of a pre-trained model; None: as in python -m demo.visualize",
    )
    parser.add_argument(
        "--port",
        type=between(int, 1, 65535),
        help="port of the page; None: the first free one from 7860",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load the model and serve the page until Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install '.[demo]'")
    name = args.checkpoint or default_checkpoint()
    autoencoder = load_autoencoder(args.checkpoint)
    videos = embedded_videos()
    with tempfile.TemporaryDirectory(prefix="mae-video-") as folder:
        page = build_page(autoencoder, name, videos, folder)
        try:
            page.launch(
                server_name="127.0.0.1",
                server_port=args.port,
                share=False,
                ssr_mode=False,
                footer_links=[],
            )
        except OSError as error:
            raise UserError(f"the page cannot be served: {error}") from error


if __name__ == "__main__":
    run(main, parse_args)
