"""The table of all tags: right numbers, without torch, kept for the next time, whatever becomes of the files."""

import json
from pathlib import Path

import pytest

from pdiff.cli.main import main
from pdiff.experiment import catalogue, config, sizes


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Writes an experiment of a project of its own, which has a cache of its own."""
    (tmp_path / "experiments" / "some").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "FOLDERS", (Path("experiments"),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda name, text: (tmp_path / "experiments" / f"{name}.yaml").write_text(text)


@pytest.fixture
def rows(capsys: pytest.CaptureFixture):
    """Tag -> the other cells, as `pdiff tags` prints them."""

    def rows(*words: str) -> dict[str, list[str]]:
        assert main(["tags", *words]) == 0
        header, *lines = capsys.readouterr().out.splitlines()
        places = [header.index(name) for name in catalogue.HEADER]
        assert places == sorted(places)
        cells = [line.split(maxsplit=4) for line in lines]
        return {tag: [folder, data, network, " ".join(rest.split())] for folder, tag, data, network, rest in cells}

    return rows


@pytest.mark.slow
def test_rows(write, rows, tmp_path):
    write("base", "dataset: {name: digits}\nnetwork: {architecture: mlp}")
    write("some/all", "extends: base")
    write("some/last", "extends: base\nprepare: {parameters: ['3.*']}")
    write("some/large", "dataset: {name: pets, image_size: 32}\nnetwork: {architecture: resnet18}")
    write("some/unknown", "dataset: {name: image_folder}\nnetwork: {architecture: mlp}")
    write("some/wrong", "extends: base\nprepare: {parameters: [absent]}")
    write("some/theirs", "prepare: {source: folder}")
    text = "tag,checkpoints,generated,original_mean,generated_mean\nlast,3,4,0.5,0.61239\nall,3,4,0.5,\n"
    (tmp_path / "experiments" / "published.csv").write_text(text)
    assert rows() == {
        "all": ["some", "digits", "mlp", "2 410 -"],
        "last": ["some", "digits", "mlp", "330 50.00 -> 61.24"],
        "large": ["some", "pets", "resnet18", f"{11_689_512 - 963 * 513 + 9600:,} -".replace(",", " ")],
        "unknown": ["some", "image_folder", "mlp", "- -"],
        "wrong": ["some", "digits", "mlp", "- -"],
        "theirs": ["some", "-", "-", "- -"],
    }
    assert set(rows("digits", "mlp")) == {"all", "last", "wrong"} and set(rows("las")) == {"last"}
    assert rows("nothing") == {}


def test_sizes_are_kept_until_what_they_depend_on_changes(write, rows, tmp_path, monkeypatch):
    write("some/t", "dataset: {name: digits}\nnetwork: {architecture: own.py:net}")
    own = "from torch.nn import *\ndef net(): return Sequential(Flatten(), Linear(64, 5), {}Linear(5, 10))"
    Path("own.py").write_text(own.format(""))
    built = []

    def measured(networks: list[sizes.Network]) -> list[int | None]:  # in this process
        built.extend(networks)
        return [sizes.measure(network) for network in networks]

    monkeypatch.setattr(sizes, "measured", measured)
    found = [rows()["t"][3], rows()["t"][3]]
    Path("own.py").write_text(own.format("Linear(5, 5), "))
    found.append(rows()["t"][3])
    assert found == ["385 -", "385 -", "415 -"] and len(built) == 2
    path = tmp_path / "cache" / "pdiff" / "sizes.json"
    assert sorted(json.loads(path.read_text()).values()) == [385, 415]
    for damaged in ("[1]", "{"):
        path.write_text(damaged)
        assert rows()["t"][3] == "415 -"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own.py"))  # not a folder
    assert rows()["t"][3] == "415 -"


@pytest.mark.slow
def test_the_table_of_sizes_is_that_of_the_experiments(monkeypatch):
    """So that `pdiff tags` need not build a network on a new machine, and says the truth."""
    listed = {network for tag in config.runnable() if (network := sizes.Network.of(config.load(tag)))}
    monkeypatch.setattr(sizes, "measured", pytest.fail)
    found = sizes.sizes([config.load(tag) for tag in config.runnable()])
    assert len(found) == len(config.runnable()) and None not in found
    table = sizes.table()
    assert set(table) == listed
    assert table == {network: sizes.measure(network) for network in listed}


def test_one_broken_file_does_not_hide_the_others(write, capsys):
    write("some/good", "dataset: {name: digits}\nnetwork: {architecture: mlp}")
    write("some/broken", "dataset: {name: digits}\nnetwork: {architecture: mlp}\ndiffusion: {stepz: 3}")
    assert main(["tags"]) == 0
    _, row, last = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["some", "good"]
    assert last.startswith("cannot be loaded: experiments/some/broken.yaml: diffusion.stepz: unknown key")
