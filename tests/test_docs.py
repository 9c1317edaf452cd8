"""Every command in the documents parses, and every recipe builds its model."""

import re
import shlex
from pathlib import Path

import pytest

import demo.app
import demo.visualize
import main_finetune
import main_pretrain
import main_test
import submitit_finetune
import submitit_pretrain
import submitit_test

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (
        main_pretrain,
        main_finetune,
        main_test,
        submitit_pretrain,
        submitit_finetune,
        submitit_test,
    )
}
MODULES = {module.__name__: module for module in (demo.app, demo.visualize)}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])


def commands() -> list[tuple[str, str]]:
    """Find the lines of all ```bash blocks, as (document, command)."""
    found = []
    for document in DOCUMENTS:
        if document.parent.name.startswith("."):
            continue
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(document.name, line) for line in lines if line.strip()]
    return found


def test_there_are_commands():
    assert len(commands()) > 15


@pytest.mark.parametrize(("document", "command"), commands())
def test_command_parses(document, command, monkeypatch):
    words = shlex.split(command, comments=True)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(main_test, "checkpoint_flags", lambda path: [])
    script = next((word for word in words if word in SCRIPTS), None)
    if script is not None:
        SCRIPTS[script].parse_args(words[words.index(script) + 1 :])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets for word in words[1:] if "=" not in word)
    elif "-m" in words[:2]:
        name = words[words.index("-m") + 1]
        tools = ("venv", "pip", "nbconvert")
        assert name in tools or (ROOT / (name.replace(".", "/") + ".py")).exists()
        if name in MODULES:
            MODULES[name].parse_args(words[words.index("-m") + 2 :])
    else:
        known = ("python3", "tensorboard", ".venv/bin/python", ".venv/bin/uv", "pip", "git")
        assert words[0] in known, command


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
