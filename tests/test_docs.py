"""Every command in the documents works, recipes and tables are what the code has.

Commands are run in a small world of real files under the names they use: tiny videos, lists, and
checkpoints. What trains is run with --dry_run on one rank, with its own model at full size.
"""

import argparse
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import main_features
import main_finetune
import main_pretrain
import main_probe
import main_test
import models_mae
import models_vit
import submitit_finetune
import submitit_pretrain
import submitit_test
from tests import formats
from tests.video_files import moving_frames, write_video
from util import file_io

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (
        main_pretrain,
        main_finetune,
        main_test,
        main_features,
        main_probe,
        submitit_pretrain,
        submitit_finetune,
        submitit_test,
    )
}
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
).stdout.splitlines()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")])


def commands() -> list[tuple[str, str]]:
    """Find the lines of all ```bash blocks, as (document, command).

    Where a document says so, commands with the recipe of ViT-L also stand for the other sizes.
    """
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        name = str(document.relative_to(ROOT))
        for_all_sizes = "replace `large` by `base` or `huge`" in text
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if not line.strip() or line.strip()[0] == "#":
                    continue
                found.append((name, line))
                if for_all_sizes and re.search(r"@recipes/\w+_large\.args", line):
                    found += [(name, line.replace("large", size)) for size in ("base", "huge")]
    return found


def script_of(command: str) -> tuple[str, list[str]] | None:
    """Return the script of this project that a command starts, and its flags."""
    words = shlex.split(command, comments=True)
    script = next((word for word in words if word in SCRIPTS), None)
    return (script, words[words.index(script) + 1 :]) if script else None


def test_there_are_commands():
    assert len(commands()) > 50


# --- what trains or tests -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "command"), [pair for pair in commands() if script_of(pair[1])]
)
def test_script_parses(document, command, monkeypatch):
    script, argv = script_of(command)
    monkeypatch.chdir(ROOT)
    for module in (main_test, main_features, main_probe):
        monkeypatch.setattr(module, "checkpoint_flags", lambda path, **_: [])
    SCRIPTS[script].parse_args(argv)


def stand_in(path: Path, model: torch.nn.Module, flags: dict) -> str:
    """Write a checkpoint with every tensor of a model, which takes no room: all numbers are 0."""
    state = {
        k: torch.zeros(1, dtype=v.dtype).expand(v.shape) for k, v in model.state_dict().items()
    }
    torch.save({"model": state, "args": flags, "arguments": model.arguments}, path)
    return str(path)


def write_checkpoint(folder: Path, name: str, model: str) -> str:
    """Write what a command calls `name`, for a model of main_finetune.py ("" for main_test.py)."""
    path = folder / name.replace("/", "_")
    big = {
        "k400/vit_large": {"D": 1024, "depth": 24},
        "VIT_B_finetuned.pyth": {"D": 768, "depth": 12},
    }
    if name in big:
        decoder = name.startswith("k400")
        torch.save(formats.pyslowfast(**big[name], grid=(8, 14, 14), d=512, decoder=decoder), path)
        return str(path)
    if name == "videomae.pth":
        torch.save(formats.videomae("pretrain", side=14, frames=16, D=768, depth=12), path)
        return str(path)
    with torch.device("meta"):
        if model:
            built = models_mae.MODELS[f"mae_{model}"]()
        else:
            built = models_vit.MODELS["vit_large_patch16"]()
    return stand_in(path.with_name(f"{model or 'classifier'}.pth"), built, {})


def dry_runs() -> list:
    """List what there is to run once, as a command may be there for several launchers.

    tests/test_own_data.py runs those of OWN_DATA.md; tests/test_probe.py runs main_probe.py, and
    tests/test_time_loader.py --time_loader.
    """
    found = {}
    for document, command in commands():
        parts = script_of(command)
        elsewhere = document == "OWN_DATA.md" or "--time_loader" in command
        if parts and not elsewhere and parts[0] != "main_probe.py":
            flags = shlex.join(parts[1])
            flags = re.sub(r"--(nodes|ngpus|partition|accum_iter|output_dir) \S+", "", flags)
            key = f"{parts[0].replace('submitit', 'main')} {' '.join(flags.split())}"
            found.setdefault(key.replace("/runs/", "output/"), (document, command))
    return [pytest.param(*pair, id=f"{pair[0]}: {key}") for key, pair in found.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("document", "command"), dry_runs())
def test_script_runs_dry(document, command, videos, tmp_path, monkeypatch, capsys):
    """The command as it is, but for one rank, other videos and stand-ins of checkpoints."""
    script, argv = script_of(command)
    module = SCRIPTS[script.replace("submitit", "main")]
    monkeypatch.chdir(ROOT)
    if "--finetune" in argv:
        place = argv.index("--finetune") + 1
        argv[place] = "stand-in"
        model = ""
        if module is main_finetune:
            model = SCRIPTS[script].parse_args(argv).model
        name = script_of(command)[1][place]
        argv[place] = write_checkpoint(tmp_path, name, model)
    rows = "".join(f"{videos}/v{i % 6}.mp4 {i % 3}\n" for i in range(128))  # a batch at least
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text(rows)
    if module is main_finetune:
        (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(400)))
    argv = [str(videos / "v0.mp4") if word in ("a.mp4", "b.mp4") else word for word in argv]
    monkeypatch.setattr(module, "data_dir", lambda args, task: str(tmp_path))
    args = SCRIPTS[script].parse_args(
        [*argv, "--dry_run", "--device", "cpu", "--num_workers", "0", "--output_dir", str(tmp_path)]
    )
    module.main(args)
    out = capsys.readouterr().out
    assert "FLOPs per clip forward" in out
    if "@recipes/pretrain" in command:  # the table has what is printed
        parameters = re.search(r"([\d.]+ M) parameters", out)[1]
        gflops = re.search(r"([\d.]+) GFLOPs", out)[1]
        table = (ROOT / "PRETRAIN.md").read_text()
        assert re.search(rf"\| {parameters} \| {gflops} \|", table), out


# --- everything else ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Write the files that the documents' other commands name, small, and return their folder."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("recipes", "Makefile", "util", "demo", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    video = write_video(folder / "clip.mp4", moving_frames(40))

    def place(*names: str) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(video, path)

    header = "label,youtube_id,time_start,time_end,split\n"
    for split, csv in (("train", "train"), ("validate", "validate"), ("test", "test")):
        place(f"VIDEOS/zumba/{split}_000010_000020.mp4")
        (folder / f"{csv}.csv").write_text(f"{header}zumba,{split},10,20,{split}\n")
    place("UCF-101/Archery/v_Archery_g01_c01.avi", "UCF-101/Archery/v_Archery_g02_c01.avi")
    (folder / "trainlist01.txt").write_text("Archery/v_Archery_g01_c01.avi 1\n")
    (folder / "testlist01.txt").write_text("Archery/v_Archery_g02_c01.avi\n")
    place("hmdb51/wave/a.avi", "hmdb51/wave/b.avi")
    (folder / "testTrainMulti_7030_splits").mkdir()
    splits = folder / "testTrainMulti_7030_splits/wave_test_split1.txt"
    splits.write_text("a.avi 1\nb.avi 2\n")
    place("VIDEOS/pushing/1.webm", "VIDEOS/pushing/2.webm")
    (folder / "labels.json").write_text(json.dumps({"Pushing something": "0"}))
    for name, number in (("train", "1"), ("validation", "2")):
        entry = {"id": number, "template": "Pushing [something]"}
        (folder / f"{name}.json").write_text(json.dumps([entry]))

    (folder / "TARS").mkdir()
    with tarfile.open(folder / "TARS/0.tar", "w") as tar:
        for key in "ab":
            tar.add(video, f"{key}.mp4")
            info = tarfile.TarInfo(f"{key}.cls")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"0"))

    for run_name in ("pretrain", "pretrain2", "finetune", "scratch"):
        (folder / "output" / run_name).mkdir(parents=True)
        (folder / "output" / run_name / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    small = {"img_size": 32, "num_frames": 4}
    mae = models_mae.MODELS["mae_vit_tiny_patch8"](**small, pred_t_dim=2)
    vit = models_vit.MODELS["vit_tiny_patch8"](**small, num_classes=3)
    stand_in(folder / "output/pretrain/checkpoint-00199.pth", mae, {})
    stand_in(folder / "output/finetune/checkpoint-00049.pth", vit, {})
    (folder / "k400").mkdir()
    torch.save(formats.pyslowfast(), folder / "k400/vit_large")
    torch.save(formats.videomae("pretrain"), folder / "videomae.pth")
    return folder


def check_make(words: list[str]) -> None:
    """Let make tell what it would do; help is done."""
    dry = [] if words == ["make", "help"] else ["-n"]
    done = subprocess.run([*words, *dry], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def check_tensorboard(words: list[str]) -> None:
    from tensorboard import default, program

    server = program.TensorBoard(default.get_plugins())
    server.configure(words)
    assert server.flags.host == "127.0.0.1"


# smaller numbers where the documents' ones take long
SMALLER = {"--num_videos 4096": "--num_videos 32 --num_val 8 --num_test 8"}
# these have tests of their own, and take minutes or need a browser
PARSED_ONLY = ("demo.", "benchmarks.")


def check_module(words: list[str], cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python -m MODULE ...` of this project."""
    name, argv = words[2], words[3:]
    assert f"{name.replace('.', '/')}.py" in TRACKED
    if name.startswith(PARSED_ONLY):
        module = importlib.import_module(name)
        if hasattr(module, "get_args_parser"):
            parse = module.get_args_parser().parse_args
        else:
            parse = getattr(module, "parse_args", None)
        if parse is not None:
            assert isinstance(parse(argv), argparse.Namespace)
            return
        argv = ["--help"]
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [name, *argv])
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("document", "command"), [pair for pair in commands() if not script_of(pair[1])]
)
def test_other_command_runs(document, command, world, monkeypatch):
    for text, shorter in SMALLER.items():
        command = command.replace(text, shorter)
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        check_make(words)
    elif words[0] == "tensorboard":
        check_tensorboard(words)
    elif words[:2] == ["python", "-m"]:
        check_module(words, world, monkeypatch)
    elif words[0] == "bash":
        subprocess.run(["bash", "-n", *words[1:]], cwd=ROOT, check=True)
    else:  # nothing to try here: installing, and what tests/test_notebook.py does
        known = {
            ".venv/bin/python -m nbconvert --to html --execute demo/video_mae_visualize.ipynb",
            "python3 -m venv .venv",
            "source .venv/bin/activate",
            ".venv/bin/python -m pip install uv",
            ".venv/bin/uv pip install --python .venv/bin/python -e '.[dev,demo]'",
        }
        assert command in known


# --- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").glob("*.args")))
def test_recipe_parses(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = main_pretrain if "pretrain" in recipe else main_finetune
    args = module.parse_args(["--path_to_data_dir", "X", f"@recipes/{recipe}"])
    assert args.model.endswith(("patch16", "patch8"))


@pytest.mark.parametrize(
    ("module", "name"), [(main_pretrain, "pretrain"), (main_finetune, "finetune")]
)
def test_defaults_equal_the_large_recipe(module, name):
    """The recipe file repeats the defaults for the reader's sake; they must not drift apart."""
    defaults = module.parse_args(["--path_to_data_dir", "X"])
    recipe = module.parse_args(
        ["--path_to_data_dir", "X", f"@{ROOT}/recipes/{name}_vit_large.args"]
    )
    assert defaults == recipe


def test_recipes_are_shown_as_they_are():
    shown = []
    for document in DOCUMENTS:
        for name, text in re.findall(
            r"`recipes/(\w+\.args)`:\n\n```\n(.*?)```", document.read_text(), re.S
        ):
            assert text == (ROOT / "recipes" / name).read_text(), f"{name} in {document.name}"
            shown.append(name)
    assert {"pretrain_vit_large.args", "finetune_vit_large.args"} <= set(shown)


def test_every_recipe_is_somewhere_a_command():
    text = "\n".join(command for _, command in commands())
    for size in ("base", "large", "huge"):
        for script in ("pretrain", "finetune"):
            for launcher in (
                f"torchrun .*main_{script}",
                f"srun .*main_{script}",
                f"submitit_{script}",
            ):
                assert re.search(f"{launcher}.*@recipes/{script}_vit_{size}.args", text)


def test_table_of_released_checkpoints():
    rows = re.findall(
        r"\| `(k\d00/\w+)` \| \[.*?\]\((.*?)\) \| `(\w+)` \|", (ROOT / "README.md").read_text()
    )
    assert {name: md5 for name, _, md5 in rows} == file_io.MD5
    for name, address, _ in rows:
        data, size = name.split("/")
        assert address == file_io.ADDRESS.format(size=size, data=data)


def test_file_tree_names_every_file():
    """One line for each file of code but the tests', in its folder, and none for others."""
    tree = re.search(r"## The code\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        assert len(line) <= 100
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        if name.endswith(".py"):
            named.add(folder + name if line.startswith(" ") else name)
    there = {
        str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.t]*/**/*.py")]
    }
    assert named == {path for path in there if not path.endswith("__init__.py")}
    for folder in ("recipes/", "tests/", "docs/"):
        assert f"\n{folder}" in tree


def anchors(document: Path) -> set[str]:
    """Return the names that GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            path = document.parent / name if name else document
            assert path.exists(), f"{target} in {document.name}"
            assert not anchor or anchor in anchors(path), f"{target} in {document.name}"
