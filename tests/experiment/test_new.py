"""From a folder of checkpoint files to an experiment: what is written, what is printed, what is refused."""

import json
import statistics
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import REPORTED, UNUSABLE, State, folder_of, network, plain, suspicious
from safetensors.torch import save_file

from pdiff.cli.main import main
from pdiff.errors import UserError
from pdiff.experiment import config
from pdiff.experiment.new import new
from pdiff.experiment.proposal import PAPERS, paper_settings, patterns_of
from pdiff.method import baselines
from pdiff.method.standardize import Standardizer
from pdiff.networks.architectures import build
from pdiff.networks.evaluators.command import fractions, run_command
from pdiff.networks.imported.plain import read_collection
from pdiff.networks.imported.template import Template
from pdiff.networks.inspect import inspect_folder
from pdiff.networks.options import Dataset


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_suspicious_files_are_listed_and_left_out(here, capsys):
    folder = suspicious(here / "mine")
    path = new("odd", folder)
    printed, text = capsys.readouterr().out, path.read_text()
    for name in [*UNUSABLE, *REPORTED]:
        shown = " ".join(name.split())
        assert f"  {shown}: " in printed and f"#   {shown}: " in text
    experiment = config.load("odd")
    collection = read_collection(
        Path(experiment.prepare.source), experiment.prepare.parameters, experiment.prepare.exclude
    )
    assert collection.names == [path.name for path in inspect_folder(folder).used]


def test_absent_folder(here):
    with pytest.raises(UserError, match="--checkpoints: absent is not a folder"):
        new("mine", Path("absent"))


def matched(roles: dict[str, str], patterns: list[str]) -> set[str]:
    return {name for name in roles if any(fnmatchcase(name, pattern) for pattern in patterns)}


def test_patterns_leave_out_what_is_constant():
    layers = [
        f"layer{i}.{j}.{part}" for i in range(1, 5) for j in range(2) for part in ("conv1", "bn1", "conv2", "bn2")
    ]
    names = [*(f"{layer}.{p}" for layer in layers for p in ("weight", "bias")), "fc.weight", "fc.bias", "odd[1].w"]

    def roles(generated: Callable[[str], bool]) -> dict[str, str]:
        return {name: "generated" if generated(name) else "constant" for name in names}

    cases = {
        ("fc.*",): lambda name: name.startswith("fc."),
        ("fc.bias",): lambda name: name == "fc.bias",
        ("*.bias",): lambda name: name.endswith(".bias"),
        ("layer4.1.bn*.*",): lambda name: name.startswith("layer4.1.bn"),
        ("layer4.*", "fc.*"): lambda name: name.startswith(("layer4", "fc")),
        ("layer*.1.bn2.weight",): lambda name: name.endswith(".1.bn2.weight"),
        ("odd[[]1].*",): lambda name: name.startswith("odd"),
        ("all",): lambda name: True,
    }
    for expected, generated in cases.items():
        found = patterns_of(roles(generated))
        assert sorted(found) == sorted(expected)
        if expected != ("all",):
            assert matched(roles(generated), found) == {name for name in names if generated(name)}


def test_very_many_tensors_are_not_searched_for_patterns():
    names = [f"layer{k}.weight" for k in range(20_000)]
    assert patterns_of(dict.fromkeys(names, "generated") | {names[7]: "constant"}) == ["all"]


@pytest.mark.parametrize("seed", range(5))
def test_patterns_of_any_choice(seed):
    g = torch.Generator().manual_seed(seed)
    names = [f"a{i}.b{j}.{part}" for i in range(4) for j in range(3) for part in ("w", "b1", "b2")]
    kinds = ("generated", "constant", "integer")
    roles = {n: kinds[k] for n, k in zip(names, torch.randint(3, (len(names),), generator=g).tolist(), strict=True)}
    found = matched(roles, patterns_of(roles))
    assert {name for name in found if roles[name] != "integer"} == {n for n in names if roles[n] == "generated"}


def test_settings_of_the_paper_are_the_medians_of_what_was_published():
    facts = json.loads((Path(__file__).parents[1] / "helpers" / "tags.json").read_text())
    default = facts["defaults"]["pdiff"]
    runs = [default | run["pdiff"] for run in facts["tags"].values() if run["category"] in ("main", "full")]
    assert len(runs) == 54
    for row in PAPERS:
        same = [run for run in runs if run["latent_size"] == row.latent_size]
        assert row.autoencoder_steps == statistics.median(run["ae_steps"] for run in same)
        assert row.diffusion_steps == statistics.median(run["diffusion_steps"] for run in same)
    assert {run["latent_size"] for run in runs} == {row.latent_size for row in PAPERS}
    sizes = {768: 128, 5120: 128, 10853: 256, 24000: 768, 80000: 768, 11_000_000: 768}
    assert {size: paper_settings(size).latent_size for size in sizes} == sizes


def test_the_yaml_loads_and_says_what_was_asked_for(here, tmp_path, capsys):
    path = new("mine", plain(here / "data" / "mine"), overrides={"generate.count": "7", "seed": "3"})
    assert path == Path("experiments/own/mine.yaml") and path.exists()
    experiment = config.load("mine")
    assert experiment.dataset is None and experiment.network is None
    assert (experiment.generate.count, experiment.seed) == (7, 3)
    assert experiment.prepare.source == "data/mine"
    assert set(experiment.prepare.parameters) == {"norm.*", "head.*"} and not experiment.prepare.exclude
    assert experiment == config.load(str(path))
    printed = capsys.readouterr().out
    assert printed.endswith("next        pdiff main --tag mine\n")
    assert "29 of 46 numbers" in printed and "at most 9" in printed
    for row in ("head.weight 4 x 5 float32 20 generated", "temperature 1 float32 1 single"):
        assert row in [" ".join(line.split()) for line in printed.splitlines()]
    text = path.read_text()
    lines = [line[2:] for line in text.splitlines() if line.startswith(("# extends", "# autoenc", "# diffusion"))]
    kept = [
        line for line in text.splitlines() if not line.startswith(("autoencoder", "diffusion", "  latent", "  steps"))
    ]
    (here / "paper.yaml").write_text("\n".join([*lines, *kept]))
    paper = config.load("paper.yaml")
    assert (paper.autoencoder.kind, paper.autoencoder.latent_size, paper.diffusion.steps) == ("conv", 128, 1800)


def test_places(here, tmp_path, capsys):
    outside = plain(tmp_path / "it's ü: #1")
    path = new("far", outside, out=tmp_path / "else where")
    experiment = config.load(str(path))
    assert experiment.prepare.source == str(outside)
    assert f"pdiff main --tag '{tmp_path}/else where/far.yaml'" in capsys.readouterr().out
    assert config.load(str(new("near", Path("../here") / "../it's ü: #1"))).prepare.source == str(outside)


def test_nothing_is_written_over(here):
    folder = plain(here / "mine")
    path = new("mine", folder)
    path.write_text(path.read_text() + "seed: 7\n")
    with pytest.raises(UserError, match=r"experiments/own/mine\.yaml is there already; --force writes over it"):
        new("mine", folder)
    assert config.load("mine").seed == 7
    new("mine", folder, force=True)
    assert config.load("mine").seed == 0
    with pytest.raises(UserError, match=r"the tag digits_mlp is taken by .*digits_mlp\.yaml"):
        new("digits_mlp", folder, force=True)
    for bad in ("a/b", "", "a b", "-a", "x.yaml", "../x"):
        with pytest.raises(UserError, match="cannot be a tag"):
            new(bad, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": ["head.*", "tail.*"]}, r"--parameters: 'tail\.\*' matches none of the files' 6 tensors"),
        ({"parameters": ["stem.*"]}, r"--parameters: stem\.\* matches nothing that can be generated and varies"),
        ({"dataset": "digits"}, "--dataset and --architecture belong together"),
        ({"dataset": "digit", "architecture": "mlp"}, "unknown 'digit'; did you mean digits"),
        ({"dataset": "digits", "architecture": "resnet81"}, "unknown 'resnet81'; did you mean"),
        ({"command": "python test.py"}, "command must hold {checkpoint}, but got 'python test.py'"),
        ({"command": "python 'test.py {checkpoint}"}, "cannot be split into words: No closing quotation"),
        ({"function": "absent.py:predict"}, "--function: 'absent.py:predict' is not path/to/file.py:function"),
        ({"function": "predict"}, "--function: 'predict' is not path/to/file.py:function"),
        ({"overrides": {"generate.cuont": "3"}}, "generate.cuont: unknown key; did you mean generate.count"),
        ({"overrides": {"network": "resnet18"}, "dataset": "digits"}, "network"),
        ({"overrides": {"evaluate": "3"}}, "evaluate: input should be a valid dictionary"),
    ],
)
def test_mistakes(here, options, message):
    with pytest.raises(UserError, match=message) as caught:
        new("mine", plain(here / "mine", 4), **options)
    assert "\n" not in str(caught.value) and "/tmp" not in str(caught.value).replace(str(here), "")
    assert not Path("experiments").exists()


def test_a_function_and_a_command_of_the_user(here, tmp_path):
    folder = plain(here / "mine", 4)
    (tmp_path / "eval.py").write_text("def predict(state): ...")
    (here / "near.py").write_text("def predict(state): ...")
    assert config.load(str(new("a", folder, function=f"{tmp_path}/eval.py:predict"))).evaluate.function == (
        f"{tmp_path}/eval.py:predict"
    )
    assert config.load(str(new("b", folder, function="near.py:predict"))).evaluate.function == "near.py:predict"
    with_command = config.load(str(new("c", folder, command="sh 'my test.sh' {checkpoint} --top 1"))).evaluate
    assert (with_command.command, with_command.folder) == ("sh 'my test.sh' {checkpoint} --top 1", "")


def test_the_published_layout(here, tmp_path):
    home = tmp_path / "published" / "cifar"
    plain(home / "checkpoint")
    folder_of({"generated_000.pth": {"other": torch.ones(2)}}, home / "generated")
    (home / "test.py").write_text("...")
    experiment = config.load(str(new("published", home)))
    assert experiment.prepare.source == str(home / "checkpoint")
    assert experiment.evaluate.command == "python test.py {checkpoint}"
    assert experiment.evaluate.folder == str(home)
    asked = config.load(str(new("asked", home, command="python test.py {checkpoint} --fast"))).evaluate
    assert (asked.command, asked.folder) == ("python test.py {checkpoint} --fast", str(home))
    assert (asked.noise, asked.baseline_count) == ((0.05,), 5)
    folder_of({f"{k:02d}.pth": perceptron(k) for k in range(12)}, home / "checkpoint")
    known = config.load(str(new("known", home, dataset="digits", architecture="mlp"))).evaluate
    assert known.kind == "images" and not hasattr(known, "command")


def perceptron(seed: int, *, image_size: int = 8) -> State:
    """The weights of the architecture `mlp` for ten classes of grey images."""
    torch.manual_seed(seed)
    return build("mlp", pretrained=False, classes=10, channels=1, image_size=image_size).state_dict()


@pytest.mark.parametrize("fits", [True, False])
def test_networks_that_are_known_are_compared(here, capsys, fits, digits):
    folder_of({f"{k}.pth": perceptron(k, image_size=8 if fits else 9) for k in range(3)}, here / "mine")
    if fits:
        experiment = config.load(str(new("mine", here / "mine", dataset="digits", architecture="mlp")))
        assert experiment.dataset == Dataset(name="digits") and experiment.network.architecture == "mlp"
    else:
        with pytest.raises(UserError, match="nothing was written"):
            new("mine", here / "mine", dataset="digits", architecture="mlp")
        assert not Path("experiments").exists()
    printed = capsys.readouterr().out
    assert ("pdiff main" in printed) == fits
    assert ("network     fits: all 4 tensors" in printed) == fits
    assert ("does not fit: 1.weight is (32, 81) in the files, (32, 64) in the network" in printed) != fits


KINDS: dict[str, Callable[[State, Path], object]] = {
    ".pth": torch.save,
    ".pt": lambda state, path: torch.save({"model": {f"module.{n}": t for n, t in state.items()}}, path),
    ".safetensors": save_file,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_of_file(here, suffix, dtype, capsys):
    (here / "mine").mkdir()
    for k in range(4):
        state = {n: t.to(dtype) if n.startswith("head") else t for n, t in network(k).items()}
        KINDS[suffix](state, here / "mine" / f"{k}{suffix}")
    experiment = config.load(str(new("mine", here / "mine", parameters=["head.*"])))
    collection = read_collection(Path(experiment.prepare.source), experiment.prepare.parameters)
    assert sorted(collection.tensors) == ["head.bias", "head.weight"]
    assert {t.dtype for t in collection.tensors.values()} == {dtype}
    assert Standardizer.fit(collection).size == 24
    (types,) = [line[12:] for line in capsys.readouterr().out.splitlines() if line.startswith("types")]
    expected = {"float32"} if dtype == torch.float32 else {"float32 (3)", f"{str(dtype)[6:]} (2)"}
    assert set(types.split(", ")) == expected


USER = """
import torch
from sklearn.datasets import load_digits
data = load_digits()
images, labels = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
network = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for step in range(240):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    if step >= 200: torch.save({"net": network.state_dict(), "step": step}, f"checkpoint/{step}.pth")
"""
TEST = """
import sys, torch
from sklearn.datasets import load_digits
data = load_digits()
images, labels = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
network = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
for path in sys.argv[1:]:
    network.load_state_dict(torch.load(path)["net"])
    outputs = network(images)
    loss, acc = torch.nn.functional.cross_entropy(outputs, labels), (outputs.argmax(1) == labels).float().mean()
    print(f"Loss: {loss:.4f} | Acc: {acc:.4f}")
"""


@pytest.mark.slow
def test_a_users_own_networks_from_training_to_their_own_test(here, capsys, monkeypatch):
    """A script of ten lines, `pdiff new`, and another network in such a file, measured by the user's own test.py."""
    home = here / "own"
    (home / "checkpoint").mkdir(parents=True)
    (home / "test.py").write_text(TEST)
    user: dict = {}
    monkeypatch.chdir(home)
    exec(compile(USER, "user.py", "exec"), user)
    monkeypatch.chdir(here)
    assert main(["new", "own", "--checkpoints", "own", "--generate.count", "4", "--autoencoder.latent_size=4"]) == 0
    assert "next        pdiff main --tag own" in capsys.readouterr().out
    assert yaml.safe_load(Path("experiments/own/own.yaml").read_text())["autoencoder"] == {"latent_size": 4}
    experiment = config.load("own")
    source = Path(experiment.prepare.source)
    collection = read_collection(source, experiment.prepare.parameters, experiment.prepare.exclude)
    assert len(collection) == 40 and Standardizer.fit(collection).size == 64 * 16 + 16 + 160 + 10
    average = baselines.BASELINES["average"](collection)
    found = run_command(
        experiment.evaluate.command,
        average,
        template=Template.read(source / "200.pth"),
        scratch=here / "scratch",
        folder=Path(experiment.evaluate.folder),
        pattern=experiment.evaluate.pattern,
    )
    user["network"].load_state_dict(average[0])
    right = user["network"](user["images"]).argmax(dim=1) == user["labels"]
    accuracies = fractions(found)
    assert accuracies == pytest.approx([right.double().mean().item()], abs=1e-4)
    assert accuracies[0] > 0.5
