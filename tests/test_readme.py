"""The documents: the README is short, and every link, command, option, key, tag and file that they name exists."""

import re
from pathlib import Path

import pytest
import yaml

from pdiff.cli.main import main
from pdiff.experiment import config
from pdiff.experiment.keys import all_keys
from pdiff.sweeps import schema

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
FENCED = r"^```(\w*)\n(.*?)^```$"
BLOCKS = re.findall(FENCED, TEXT, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(FENCED, "", TEXT, flags=re.MULTILINE | re.DOTALL))
LINES = [line for _, block in BLOCKS for line in block.replace("\\\n", " ").splitlines()] + INLINE
COMMANDS = [part.strip() for line in LINES for part in re.split(r"[;#`]", line)]
KEYS = set(all_keys())


def named(pattern: str) -> list[str]:
    """What a pattern with one group finds in all commands, each once."""
    return sorted({found for command in COMMANDS for found in re.findall(pattern, command)})


def help_of(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """What `pdiff ... --help` prints; it must succeed."""
    try:
        code = main([*words, "--help"])
    except SystemExit as ended:
        code = ended.code
    assert code in (0, None), f"no command {' '.join(words)}"
    return capsys.readouterr().out


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    assert links or path.name == "team.md"
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize("name", named(r"^(?:\$ )?pdiff ([a-z]+)\b"))
def test_commands_and_their_options_exist(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = help_of([name], capsys)
    for command in (command for command in COMMANDS if re.match(rf"(\$ )?pdiff {name}\b", command)):
        for option in re.findall(r"(?<=\s)--([\w.-]+)", command):
            assert f"--{option}" in shown or option in KEYS, command


def test_options_of_pdiff_itself_exist(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = help_of([], capsys)
    for option in named(r"^pdiff (--[a-z-]+)"):
        assert option in shown


def test_entry_points_and_their_parameters_exist(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    commands = [command for command in COMMANDS if command.startswith("mlflow run . -e ")]
    assert commands
    for command in commands:
        name, shown = command.split()[4], help_of([command.split()[4]], capsys)
        assert name in entry_points, command
        for key in re.findall(r"-P ([\w.]+)=", command):
            assert f"--{key}" in shown or key in KEYS | {"section.key"}, command


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in named(r"^make (\w+)"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_tags_and_sweeps_exist():
    tags = named(r"--tag ([a-z]\w*)(?!\S)") + named(r"-P tag=(\w+)") + named(r"\bpdiff show ([a-z]\w*)")
    assert set(tags) <= config.tags().keys() | set(named(r"pdiff new (\w+)"))
    assert set(named(r"--sweep (?:sweep=)?([a-z]\w*)") + named(r"-P sweep=(\w+)")) <= schema.sweeps().keys()


def test_the_catalogue_is_complete():
    catalogue = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    for tag, path in config.tags().items():
        parts = {"ablation": [tag], "offline": [tag], "main": tag.split("_"), "full": tag.split("_")}
        for part in parts.get(path.parent.name, []):
            assert f"`{part}`" in catalogue, tag
    for name in schema.sweeps():
        assert f"`{name}`" in TEXT


def test_keys_exist():
    sections = {key.partition(".")[0] for key in KEYS if "." in key} | {"generator"}
    for key in (code.partition(":")[0] for code in INLINE if re.fullmatch(r"[a-z]+(\.[a-z_]+)+(: .*)?", code)):
        section, _, name = key.partition(".")
        assert key in KEYS or section not in sections or name in ("safetensors", "json", "csv"), key


def test_examples_of_yaml_are_valid(tmp_path):
    examples = [block for language, block in BLOCKS if language == "yaml"]
    assert len(examples) == 2
    for k, example in enumerate(examples):
        path = tmp_path / f"example_{k}.yaml"
        path.write_text(example)
        (schema.load if "objectives" in example else config.load)(str(path))


def test_modules_and_registries_exist():
    rows = [row.split("|")[2:4] for row in TEXT.splitlines() if re.match(r"\|.*\| `[A-Z]+`.*\| `pdiff/", row)]
    assert rows
    for registries, modules in rows:
        found = zip(re.findall(r"`(\w+)`", registries), re.findall(r"`(\S+)`", modules), strict=True)
        for registry, module in found:
            assert (ROOT / module).is_file(), module
            assert re.search(rf"^{registry}\b", (ROOT / module).read_text(), re.MULTILINE), f"{registry} in {module}"
    for path in named(r"^(pdiff/[\w/]+\.py)"):
        assert (ROOT / path).is_file(), path
