"""Audits of anybody's networks: answers that are known beforehand, one line for what cannot be read, one command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from tracked import artifacts, runs, statuses

from pdiff.cli.main import main
from pdiff.errors import UserError
from pdiff.experiment import board, command_options, config, stages
from pdiff.experiment.audit import cost_of_a_split
from pdiff.experiment.metrics import alarms
from pdiff.method.collection import Collection
from pdiff.method.novelty import data_copying
from pdiff.networks.imported.plain import read_collection

pytestmark = pytest.mark.slow

FUNCTION = """
import torch
from sklearn.datasets import load_digits
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x[1000:], dtype=torch.float32) / 16, torch.tensor(y[1000:])
def predict(state):
    hidden = torch.relu(x @ state["0.weight"].T + state["0.bias"])
    return (hidden @ state["2.weight"].T + state["2.bias"]).argmax(1), y
"""
SMALL = {"evaluate.noise": "0.05", "evaluate.baselines": "[average, gaussian]", "evaluate.baseline_count": "6"}
ALONE = {"evaluate.workers": "1"}  # no processes


def trained(count: int, seed: int) -> Collection:
    """MLPs (64, 6, 10) from independent initialisations, trained at once on 1000 digits; about 85 % on the others."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:1000], dtype=torch.float32) / 16, torch.tensor(y[:1000])
    g = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (6, 64), "0.bias": (6,), "2.weight": (10, 6), "2.bias": (10,)}
    weights = {n: (0.3 * torch.randn(count, *s, generator=g)).requires_grad_() for n, s in shapes.items()}
    optimizer = torch.optim.Adam(weights.values(), 0.05)
    for _ in range(40):
        hidden = torch.einsum("bi,nhi->nbh", x, weights["0.weight"]) + weights["0.bias"][:, None]
        logits = torch.einsum("nbh,noh->nbo", hidden.relu(), weights["2.weight"]) + weights["2.bias"][:, None]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(count)) * count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Collection({name: tensor.detach() for name, tensor in weights.items()})


def write(networks: Collection, folder: Path) -> Path:
    """Files as a plain script writes them."""
    folder.mkdir()
    for k, state in enumerate(networks):
        torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / f"net_{k}.pth")
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """Folders: 30 originals, 15 held-out ones, 15 fresh ones, copies and averages of originals; and a function."""
    home = tmp_path_factory.mktemp("zoo")
    networks = trained(60, 0)
    originals, g = networks.select(slice(30)), torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(30, generator=g)[:4] for _ in range(15)])
    groups = {
        "originals": originals,
        "heldout": networks.select(slice(30, 45)),
        "fresh": networks.select(slice(45, 60)),
        "copies": originals.select(slice(15)).map(lambda t: t + 0.01 * t.std() * torch.randn(t.shape, generator=g)),
        "averages": originals.map(lambda t: t[chosen].mean(1)),
    }
    for name, group in groups.items():
        write(group, home / name)
    (home / "digits.py").write_text(FUNCTION)
    return home


def audited(out: Path, *words: str, **options) -> Path:
    """The folder of an audit, whose stages run one after the other, without a tracking store."""
    experiment, folders = command_options.audit(*words, **options), {}
    for name in stages.of(experiment):
        folders[name] = out / name
        folders[name].mkdir(parents=True)
        upstream = {other: folders[other] for other in stages.reads(name, experiment)}
        final = stages.run(name, experiment, folders[name], log=lambda point: None, **upstream)
        assert final.keys() <= set(stages.STAGES[name].logs(experiment))
    return folders["audit"]


# -- known answers


@pytest.fixture(scope="module")
def known(zoo, tmp_path_factory) -> Path:
    """An audit of three generators whose answers are known."""
    generated = [f"{name}={zoo / name}" for name in ("copies", "fresh", "averages")]
    options = {"heldout": str(zoo / "heldout"), "function": f"{zoo}/digits.py:predict", "overrides": SMALL | ALONE}
    return audited(tmp_path_factory.mktemp("known"), str(zoo / "originals"), generated, **options)


@pytest.fixture(scope="module")
def summary(known) -> dict[str, float]:
    return json.loads((known / "summary.json").read_text())


@pytest.fixture(scope="module")
def sentences(known) -> list[str]:
    return (known / "verdict.md").read_text().strip().split("\n\n")


def test_copies_are_found(summary, sentences):
    assert summary["z_u/copies"] < -4  # of 15 against 15 it cannot be below -4.7
    assert summary["novelty/copies_median"] < 0.1
    assert summary["novel_performant/copies_0.5"] == summary["novel_performant/copies_0.25"] == 0
    assert "New, or copied? The networks of copies are copies: " in " ".join(sentences)
    assert set(alarms(summary, ["copies", "fresh"])) == {"memorising"}


def test_held_out_networks_are_as_new_and_as_good(summary, sentences):
    assert abs(summary["z_u/fresh"]) < 2
    assert 0.8 < summary["novelty/fresh_median"] < 1.25
    assert summary["novel_performant/fresh_0.5"] > 0.5
    text = " ".join(sentences)
    assert "Better than the originals? No difference: on test images the networks of fresh" in text
    assert "The networks of fresh are as new as held-out networks" in text


def test_averages_are_found_inside_the_span(summary):
    assert summary["outside_span/averages_mean"] < 1e-6
    assert summary["outside_span/copies_mean"] < 1e-3
    assert summary["outside_span/fresh_mean"] > 0.1
    assert summary["outside_span/heldout_mean"] > 0.1


def test_everything_is_written(known, sentences):
    evaluation = pd.read_csv(known / "evaluation.csv")
    sizes = {"original": 30, "heldout": 15, "copies": 15, "fresh": 15, "averages": 15, "noise_0.05": 6}
    assert evaluation["group"].value_counts(sort=False).to_dict() == sizes | {"average": 1, "gaussian": 6}
    assert len(sentences) == 3 * 3 + 1, "held-out networks were given: no note"
    assert sentences[-1] == "The originals: 30 networks from independent seeds."
    assert set(pd.read_csv(known / "tables" / "comparisons.csv")["group"]) == {"copies", "fresh", "averages"}
    assert "Leaderboard" in (known / "report.html").read_text()


def test_the_leaderboard(known):
    table = pd.read_csv(known / "tables" / "board.csv")
    kinds = dict(zip(table["group"], table["kind"], strict=True))
    assert kinds.pop("original") == kinds.pop("heldout") == "original"
    assert {name for name, kind in kinds.items() if kind == "generator"} == {"copies", "fresh", "averages"}
    generators = table[table["kind"] == "generator"]["group"].tolist()
    assert generators[0] == "fresh"
    shown = board.cells(table)
    assert list(shown) == ["group", "kind", "test %", "novelty", "novel and performant (0.5) %", "Z_U"]


def test_the_order_of_the_leaderboard():
    """Novel and performant networks, then accuracy; without accuracy, Z_U near 0."""

    def order(**numbers: tuple[float, float, float]) -> list[str]:
        columns = ("test_accuracy/{}_mean", "novel_performant/{}_0.5", "z_u/{}")
        metrics = {"test_accuracy/original_mean": 0.9} | {
            column.format(name): value
            for name, values in numbers.items()
            for column, value in zip(columns, values, strict=True)
            if value is not None
        }
        return board.board(metrics, list(numbers), list(numbers))["group"].tolist()

    assert order(a=(0.9, 0.0, -8), b=(0.7, 0.5, 0), c=(0.95, 0.0, -9)) == ["b", "c", "a"]
    assert order(a=(None, None, -8), b=(None, None, 0.5), c=(None, None, 3)) == ["b", "c", "a"]
    assert order(a=(0.7, None, None), b=(0.9, None, None)) == ["b", "a"]


# -- without held-out networks, without accuracy


def test_a_tenth_is_set_apart_and_the_cost_is_said(zoo, tmp_path):
    """Without a way to measure accuracy, weights alone; a single file is enough."""
    single = zoo / "copies" / "net_3.pth"
    overrides = {"evaluate.noise": "[]", "evaluate.baselines": "average", "prepare.parameters": "'*.weight'"}
    out = audited(tmp_path, str(zoo / "originals"), [str(single)], overrides=overrides)
    evaluation = pd.read_csv(out / "evaluation.csv")
    assert evaluation["group"].value_counts().to_dict() == {"original": 27, "heldout": 3, "generated": 1, "average": 1}
    assert "test_accuracy" not in evaluation
    *three, population, note = (out / "verdict.md").read_text().strip().split("\n\n")
    assert "accuracy was not measured" in three[0] and len(three) == 3
    assert population == "The originals: 30 networks from independent seeds."
    assert note == cost_of_a_split(27, 3, 1) and "3 of the 30 originals were set apart" in note
    assert not (out / "tables" / "board.csv").exists()
    assert Collection.load(tmp_path / "prepare" / "checkpoints.safetensors").tensors.keys() == {"0.weight", "2.weight"}


def test_permuted_copies_are_found_once_they_are_aligned(zoo, tmp_path):
    """In weights they look as new as any network; aligned, they are what they are, and predict what they predicted."""
    pytest.importorskip("pdiff.method.alignment")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))\n"
    )
    copies, g = trained(60, 0).select(slice(12)), torch.Generator().manual_seed(2)
    orders = torch.stack([torch.randperm(6, generator=g) for _ in range(12)])[:, :, None]
    tensors = copies.tensors
    tensors["0.weight"] = tensors["0.weight"].gather(1, orders.expand_as(tensors["0.weight"]))
    tensors["0.bias"] = tensors["0.bias"].gather(1, orders[:, :, 0])
    tensors["2.weight"] = tensors["2.weight"].gather(2, orders[:, None, :, 0].expand_as(tensors["2.weight"]))
    write(Collection({renamed(n): t for n, t in tensors.items()}), tmp_path / "permuted")
    for name in ("originals", "heldout"):
        group = read_collection(zoo / name)
        write(Collection({renamed(n): t for n, t in group.tensors.items()}), tmp_path / name)
    options = {"dataset": "digits", "architecture": f"{tmp_path}/net.py:flat", "heldout": str(tmp_path / "heldout")}
    found = {}
    for align in ("none", "weights"):
        words = str(tmp_path / "originals"), [str(tmp_path / "permuted")]
        out = audited(tmp_path / f"align_{align}", *words, align=align, overrides=SMALL, **options)
        found[align] = json.loads((out / "summary.json").read_text())
    assert found["none"]["novelty/generated_median"] > 0.5
    assert found["weights"]["novelty/generated_median"] < 1e-3
    accuracies = [values["test_accuracy/generated_mean"] for values in found.values()]
    assert accuracies[0] == pytest.approx(accuracies[1])


def renamed(name: str) -> str:
    """The name of a tensor in a network that begins with nn.Flatten."""
    index, _, rest = name.partition(".")
    return f"{int(index) + 1}.{rest}"


def test_the_smallest_z_u_is_that_of_copies_alone():
    """Every distance of 20 networks below those of 3 held-out ones."""
    least = data_copying(torch.arange(20.0), 100 + torch.arange(3.0))
    assert f"Z_U cannot fall below {least:.1f}," in cost_of_a_split(27, 3, 20)


# -- files that cannot be compared


def without(name: str):
    return lambda state: {n: t for n, t in state.items() if n != name}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s | {"2.bias": torch.zeros(7)}, r"net_1\.pth: 2\.bias is \(7,\), expected \(10,\) as in .*net_0"),
        (lambda s: s | {"2.bias": s["2.bias"].half()}, r"net_1\.pth: 2\.bias is torch\.float16, expected torch"),
        (without("0.bias"), r"net_1\.pth: tensors differ from those of .*net_0\.pth: 0\.bias"),
        (lambda s: s | {"gain": torch.ones(3)}, r"net_1\.pth: tensors differ from those of .*net_0\.pth: gain"),
        (lambda s: s | {"2.bias": torch.full((10,), torch.nan)}, r"net_1\.pth: 2\.bias holds NaN or infinity"),
        (lambda s: s | {"2.bias": os.getcwd}, r"net_1\.pth: holds more than tensors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", ["generated", "heldout"])
def test_networks_of_another_layout_are_refused(zoo, tmp_path, role, change, expected):
    folder = write(trained(1, 3), tmp_path / "bad")
    torch.save(change(dict(trained(1, 4)[0])), folder / "net_1.pth")
    places = {"generated": [str(zoo / "fresh")]} | ({"heldout": str(folder)} if role == "heldout" else {})
    places |= {"generated": [f"mine={folder}"]} if role == "generated" else {}
    with pytest.raises(UserError, match=expected) as raised:
        audited(tmp_path / "out", str(zoo / "originals"), **places)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--originals absent --generated fresh", "--originals: absent is not a folder"),
        ("--originals fresh --generated absent", "--generated generated: absent is neither a folder nor a file"),
        ("--originals fresh --generated empty", "--generated generated: empty holds no file .pth/.pt/.safetensors"),
        ("--originals fresh --generated digits.py", "--generated generated: digits.py holds no file .pth/.pt"),
        ("--originals fresh --generated copies --heldout empty", "--heldout: empty holds no file"),
        ("--originals fresh --generated copies fresh", "--generated copies: expected NAME=DIR, since there are"),
        ("--originals fresh --generated a=copies a=fresh", "--generated a=fresh: a is given twice, as copies and"),
        ("--originals fresh --generated a=", "--generated a=: expected a folder after a="),
        ("--originals fresh --generated original=copies", "audit.generated: 'original' cannot name a generator"),
        ("--originals fresh --generated swag=copies", "audit.generated: 'swag' cannot name a generator"),
        ("--originals fresh --generated average_9=copies", "audit.generated: 'average_9' cannot name a generator"),
        ("--originals fresh --generated a.b=copies", "'a.b' cannot name a generator, expected at most 60 letters"),
        ("--originals fresh --generated a=copies a_low=fresh", "'a_low' cannot name a generator beside 'a'"),
        ("--originals fresh --generated copies --dataset digits", "--dataset and --architecture belong together"),
        ("--originals fresh --generated copies --function no.py:f", "--function: 'no.py:f' is not path/to/file.py"),
        ("--originals fresh --generated copies --align weights", "prepare.align weights: needs dataset and network"),
        ("--originals fresh --generated copies --align sideways", "'sideways' is not one of 'auto', 'none', 'weights'"),
        ("--originals fresh --generated copies --evaluate.nose 1", "evaluate.nose: unknown key; did you mean"),
        ("--originals fresh --generated ~no_such_user/x", "there is no such home folder"),
        (
            "--originals fresh --generated copies --heldout averages --prepare.heldout 0.2",
            "prepare.heldout must be 0 where audit.heldout gives the held-out ones, but got 0.2",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(zoo, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(zoo)
    Path("empty").mkdir(exist_ok=True)
    assert main(["audit", *words.split()]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("pdiff: ") and printed.err.count("\n") == 1
    assert expected in printed.err
    assert not (zoo / "mlflow.db").exists()


# -- the configuration


def test_names_of_generators(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "lr=0.1", "one,two"):
        Path(name).mkdir()
    assert command_options.by_name(["a"]) == {"generated": "a"}
    assert command_options.by_name(["ours=a"]) == {"ours": "a"}
    assert command_options.by_name(["lr=0.1"]) == {"generated": "lr=0.1"}, "it exists: a folder, not a name"
    assert command_options.by_name(["x=lr=0.1", "y=a"]) == {"x": "lr=0.1", "y": "a"}
    assert command_options.by_name(["x=a,y=absent"]) == {"x": "a", "y": "absent"}, "one text, as MLflow passes it"
    assert command_options.by_name(["x=one,two"]) == {"x": "one,two"}


def test_a_file_and_a_command_say_the_same(zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(zoo)
    asked = command_options.audit("originals", ["copies"], heldout="heldout", overrides={"seed": "3"})
    assert asked.tag == "audit_originals" and asked.generators == ("generated",)
    (tmp_path / "mine.yaml").write_text(
        "{seed: 3, prepare: {source: originals, heldout: 0}, audit: {generated: copies, heldout: heldout}}"
    )
    loaded = config.load(str(tmp_path / "mine.yaml"))
    assert stages.all_digests(loaded) == stages.all_digests(asked)
    assert stages.of(loaded) == ["prepare", "audit"] and stages.evaluation(loaded) == "audit"
    with pytest.raises(UserError, match="mine: has no stage train, expected one of prepare, audit"):
        stages.needed("train", loaded)
    assert main(["sweep", "--tag", str(tmp_path / "mine.yaml"), "--sweep", "layers"]) == 2


def test_an_audit_without_originals_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "{dataset: {name: digits}, network: {architecture: mlp}, audit: {generated: somewhere}}"
    )
    with pytest.raises(UserError, match=r"mine\.yaml.*audit: needs prepare\.source, the originals"):
        config.load(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", ["my nets", "zoo (2)", "a"])
def test_the_tag_is_safe(zoo, tmp_path, name):
    write(trained(2, 5), tmp_path / name)
    tag = command_options.audit(str(tmp_path / name), [str(zoo / "fresh")]).tag
    assert tag == "audit_" + {"my nets": "my_nets", "zoo (2)": "zoo__2_", "a": "a"}[name]


def test_the_digest_sees_the_files(tmp_path):
    source, made = write(trained(4, 6), tmp_path / "source"), write(trained(2, 7), tmp_path / "made")

    def digest(**options) -> str:
        return stages.all_digests(command_options.audit(str(source), [str(made)], **options))["audit"]

    before = digest()
    assert digest() == before
    assert digest(overrides={"evaluate.baseline_count": "7"}) != before
    assert digest(overrides={"generator.checkpoints": "3"}) != before
    save_file(trained(1, 8)[0], made / "more.safetensors")
    after = digest()
    assert after != before
    assert digest(heldout=str(write(trained(2, 9), tmp_path / "held"))) not in (before, after)


# -- the whole command

SCRIPT = """
import sys
import torch
from pathlib import Path
from sklearn.datasets import load_digits
from torch import nn

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))

if __name__ == "__main__":
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    for name, first, last in (("trained", 0, 20), ("others", 20, 30)):
        Path(name).mkdir()
        for seed in range(first, last):
            torch.manual_seed(seed)
            net = network()
            optimizer = torch.optim.Adam(net.parameters(), 0.05)
            for step in range(25):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[:500]), y[:500]).backward()
                optimizer.step()
            torch.save({"model": net.state_dict(), "seed": seed}, f"{name}/seed_{seed}.pt")
"""


@pytest.mark.slow
def test_folders_of_a_plain_script_are_audited_with_one_command(workspace, capsys):
    Path("zoo.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "zoo.py"], check=True)
    keys = ["--evaluate.baseline_count", "5", "--evaluate.noise", "0.05"]
    words = ["audit", "--originals", "trained", "--dataset", "digits", "--architecture", "zoo.py:network", *keys]
    words += ["--generated", "copied=trained", "other=others"]
    assert main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert statuses() == [("audit", "FINISHED"), ("prepare", "FINISHED"), ("originals", "FINISHED")]
    (run,) = runs("audit")
    assert run.data.tags["pdiff.tag"] == "audit_trained" and run.info.run_name == "audit_trained audit"
    assert run.data.tags["pdiff.alarm"] == "memorising"
    assert run.data.params["config.audit.generated.other"] == "others"
    assert run.data.metrics["novelty/copied_median"] == 0 and run.data.metrics["test_accuracy/other_mean"] > 0.2
    note = run.data.tags["mlflow.note.content"]
    assert "The networks of copied are copies" in note and "2 of the 20 originals were set apart" in note
    assert (artifacts(run) / "verdict.md").read_text().strip() in note and "Next: `report.html`" in note
    assert (
        (artifacts(run) / "verdict.md").read_text() in printed
        and "other" in printed
        and str(artifacts(run) / "report.html") in printed
    )
    assert main(words) == 0
    assert f"audit: reusing run {run.info.run_id}" in "".join(capsys.readouterr()) and len(runs("audit")) == 1
