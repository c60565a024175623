"""Experiments by tag: precedence of settings, messages of mistakes, and what a digest depends on."""

import os
from pathlib import Path

import pytest
import yaml

from pdiff.errors import UserError
from pdiff.experiment import config, schema, stages
from pdiff.experiment.schema import affecting

BASE = "dataset: {name: digits}\nnetwork: {architecture: mlp}\n"


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Writes an experiment of a project of its own; the working folder is that project."""
    folder = tmp_path / "experiments" / "some"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "FOLDERS", (Path("experiments"),))

    def write(tag: str, text: str) -> Path:
        path = folder / f"{tag}.yaml"
        path.write_text(text)
        return path

    return write


def message(tag: str, overrides: dict[str, str] | None = None) -> str:
    """The message for the user; always on one line."""
    with pytest.raises(UserError) as caught:
        config.load(tag, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- who wins


def test_defaults_then_extended_files_then_the_file_then_overrides(write):
    write("low", BASE + "prepare: {collect: {learning_rate: 0.1, batch_size: 11, checkpoints: 12}}")
    write("high", "extends: low\nprepare: {collect: {batch_size: 21, checkpoints: 22}}")
    collect = config.load("high", {"prepare.collect.checkpoints": "32"}).prepare.collect
    assert (collect.learning_rate, collect.batch_size, collect.checkpoints) == (0.1, 21, 32)
    assert collect.optimizer == "adamw"
    assert config.load("low").prepare.collect.checkpoints == 12


def test_of_several_extended_the_last_wins_and_lists_are_replaced(write):
    write("a", BASE + "seed: 1\nevaluate: {noise: [0.1, 0.2], baseline_count: 5}")
    write("b", "seed: 2\nevaluate: {noise: [0.3]}")
    write("c", "extends: [a, b]\ngenerate: {count: 7}")
    write("d", "extends: [b, a]\nextends_nothing: 1")
    found = config.load("c")
    assert (found.seed, found.evaluate.noise, found.evaluate.baseline_count) == (2, (0.3,), 5)
    assert (found.generate.count, found.dataset.name, found.tag) == (7, "digits", "c")
    assert "d.yaml: extends_nothing: unknown key" in message("d")


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2E-3", 2e-3), ("0.5", 0.5), ("1", 1.0), ("1e3", 1000.0)])
def test_numbers_in_every_notation(write, text, value):
    write("t", BASE + f"autoencoder: {{kind: conv, latent_size: 4, learning_rate: {text}}}")
    assert config.load("t").autoencoder.learning_rate == value
    assert config.load("t", {"diffusion.learning_rate": text}).diffusion.learning_rate == value


def test_overrides_are_yaml(write):
    write("t", BASE)
    overrides = {"prepare.parameters": "[a.*, b]", "dataset.augment": "true", "network": "{architecture: cnn_small}"}
    found = config.load("t", overrides)
    assert found.prepare.parameters == ("a.*", "b")
    assert found.dataset.augment is True
    assert found.network.architecture == "cnn_small"


def test_a_path_is_a_tag(write, tmp_path):
    write("base", BASE + "seed: 4")
    outside = tmp_path / "elsewhere" / "mine.yaml"
    outside.parent.mkdir()
    outside.write_text("extends: base\ngenerate: {count: 3}")
    found = config.load(str(outside))
    assert (found.tag, found.seed, found.generate.count) == ("mine", 4, 3)
    assert "mine" not in config.tags()
    assert "absent.yaml: cannot be read" in message("absent.yaml")
    beside = outside.with_name("beside.yaml")
    beside.write_text("extends: mine.yaml\nseed: 5")  # a path is relative to the file that it stands in
    assert (config.load(str(beside)).seed, config.load(str(beside)).generate.count) == (5, 3)


def test_tags_are_files_and_sweeps_are_none(write, tmp_path):
    path = write("t", BASE)
    (tmp_path / "experiments" / "sweeps").mkdir()
    (tmp_path / "experiments" / "sweeps" / "s.yaml").write_text("{}")
    assert {tag: found.resolve() for tag, found in config.tags().items()} == {"t": path.resolve()}


# -- mistakes


def test_all_problems_in_one_message(write):
    parent = write("parent", "network: {architecture: mpl}\nautoencoder: {kind: conv, latent_size: 4, steps: 0}")
    own = write("own", "extends: parent\ndataset: {name: digts}\nautoencoder: {latentsize: 4}\nsed: 1")
    problems = message("own", {"diffusion.learning_rate": "fast", "generate.count": "-3"}).split("; ")
    expected = {
        f"experiments/some/{parent.name}: autoencoder.steps: input should be greater than or equal to 1, but got 0",
        f"experiments/some/{own.name}: autoencoder.latentsize: unknown key",
        f"experiments/some/{own.name}: sed: unknown key",
        "command line: diffusion.learning_rate: input should be a valid number, unable to parse string as a number, "
        "but got 'fast'",
        "command line: generate.count: input should be greater than or equal to 1, but got -3",
        f"experiments/some/{own.name}: dataset.name: unknown 'digts'",
        f"experiments/some/{parent.name}: network.architecture: unknown 'mpl'",
    }
    assert expected <= set(problems)
    hints = [problem for problem in problems if problem not in expected]
    assert len(hints) == 4
    for hint, nearest in zip(hints, ["autoencoder.latent_size", "seed", "digits", "mlp"], strict=True):
        assert hint.startswith("did you mean ")
        assert nearest in hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset: {name: digits}", "t.yaml: network: is missing; only prepare.source can do without both"),
        ("dataset: {}\nnetwork: {architecture: mlp}", "t.yaml: dataset.name: is missing"),
        ("dataset: digits\nnetwork: {architecture: mlp}", "t.yaml: dataset: input should be a valid dictionary"),
        (BASE + "dataset: [", "t.yaml: not YAML"),
        ("- 1", "t.yaml: holds a list, expected sections"),
        ("", "t.yaml: holds a NoneType, expected sections"),
        (BASE + "1: 2", "t.yaml: keys should be strings"),
        (BASE + "prepare: {parameters: 3}", "t.yaml: prepare.parameters: input should be a valid string"),
        (BASE + "seed: .nan", "t.yaml: seed: "),
        (BASE + "diffusion: {learning_rate: .inf}", "t.yaml: diffusion.learning_rate: input should be a finite"),
        (BASE + "autoencoder: {kind: conv}", "t.yaml: autoencoder: latent_size 'auto' needs kind pca"),
        (BASE + "diffusion: {prediction: epsilon, beta_start: 0.3}", "t.yaml: diffusion: beta_start <= beta_end must"),
        (BASE + "diffusion: {prediction: sample, beta_start: 0.3}", "but got (0.3, 0.02)"),
        (BASE + "diffusion: {heldout_fraction: 0}", "t.yaml: diffusion: stop_on heldout_loss needs heldout"),
        (BASE + "diffusion: {patience: 0}", "and patience > 0, but got (0.1, 0); stop_on none runs all steps"),
        (BASE + "generate: {sampler: ddpm}", "generate.sampler 'ddpm' cannot follow diffusion.prediction 'flow'"),
        (BASE + "generate: {sampling_steps: 9}\ndiffusion: {timesteps: 8}", "must hold, but got (9, 8)"),
        (BASE + "generate: {trajectory_every: 2}\ndiffusion: {steps: 0}", "trajectory_every needs diffusion.steps > 0"),
        ("prepare: {source: s}\ngenerator: {kind: neurons}", "generator.kind neurons: needs dataset and network"),
        (BASE + "generator: {kind: neurons, width: 9}", "generator: heads must divide width, but got (4, 9)"),
        (BASE + "evaluate: {warm_start: 10}", "evaluate.warm_start: needs prepare.collect.from seeds"),
        (BASE + "generator: {kind: neurons, condition: [a, a]}", "generator.condition: a column stands twice"),
        (BASE + "generator: {kind: neurons}\ngenerate: {condition: {a: 1}}", "'a' is not in generator.condition"),
        (BASE + "device: tpu", "t.yaml: device: string should match pattern"),
        (BASE + "dataset: {name: mnist}", "t.yaml: not YAML: 'dataset' stands twice"),
        (BASE + "generate: {count: 1, count: 2}", "t.yaml: not YAML: 'count' stands twice"),
        (BASE + "extends: t", "extends: t -> t is a circle"),
        (BASE + "extends:", "t.yaml: extends: expected a tag or a list of tags, but got None"),
        (BASE + "extends: [3]", "t.yaml: extends: expected a tag or a list of tags, but got [3]"),
        (BASE + "extends: tt", "unknown tag 'tt'; did you mean t?"),
        ("dataset: {name: digits}\nnetwork: {architecture: a.py:net}", "network.architecture: a.py is not a file"),
        ("dataset: {name: digits}\nnetwork: {architecture: mlp, weights: w}", "network: weights needs pretrained"),
    ],
)  # fmt: skip
def test_mistakes_in_files(write, text, expected):
    write("t", text)
    assert expected in message("t")


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("autoencoder.kynd", "pca", "command line: autoencoder.kynd: unknown key; did you mean autoencoder.kind"),
        ("seed.deep", "1", "command line: seed.deep: seed is a value, not a section"),
        ("seed", "@", "command line: seed: input should be a valid integer, unable to parse string as an integer"),
        ("network.architecture", "resnet81", "command line: network.architecture: unknown 'resnet81'; did you mean"),
        ("network.architecture", "resnet18.a9_in1k", "unknown 'resnet18.a9_in1k'; did you mean resnet18.a3_in1k"),
        ("extends", "t", "command line: extends: unknown key"),
    ],
)
def test_mistakes_on_the_command_line(write, key, text, expected):
    write("t", BASE + "seed: 1")
    assert expected in message("t", {key: text})


def test_a_long_circle(write):
    for tag, parent in (("a", "b"), ("b", "c"), ("c", "b")):
        write(tag, f"extends: {parent}")
    assert message("a") == "extends: a -> b -> c -> b is a circle"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("autoencoder: {steps: 3}", "autoencoder.steps: belongs to kind conv, but kind is pca"),
        ("autoencoder: {kind: conv, variance: 0.5}", "autoencoder.variance: belongs to kind pca, but kind is conv"),
        ("diffusion: {denoiser: conv, width: 9}", "diffusion.width: belongs to denoiser mlp, but denoiser is conv"),
        (
            "diffusion: {beta_end: 0.5}",
            "diffusion.beta_end: belongs to prediction epsilon or sample or v_prediction, but prediction is flow",
        ),
        (
            "generator: {kind: gaussian}\nautoencoder: {latent_size: 3}",
            "autoencoder: belongs to generator.kind latent_diffusion, but generator.kind is gaussian",
        ),
        (
            "generator: {kind: gaussian}\ngenerate: {sampler: heun}",
            "generate.sampler: belongs to generator.kind latent_diffusion or neurons, but generator.kind is gaussian",
        ),
        (
            "generator: {kind: neurons}\ndiffusion: {denoiser: conv}",
            "diffusion.denoiser: belongs to generator.kind latent_diffusion, but generator.kind is neurons",
        ),
        (
            "generator: {kind: neurons}\ndiffusion: {width: 3}",
            "diffusion.width: belongs to generator.kind latent_diffusion, but generator.kind is neurons",
        ),
        ("generator: {heads: 2}", "generator.heads: belongs to kind neurons, but kind is latent_diffusion"),
        ("generator: {scale: 2}", "generator.scale: belongs to kind gaussian, but kind is latent_diffusion"),
        ("autoencoder: {kind: vae}", "autoencoder.kind: input should be 'pca' or 'conv', but got 'vae'"),
    ],
)
def test_options_of_another_kind_are_refused(write, text, expected):
    path = write("t", BASE + text)
    assert message("t") == f"experiments/some/{path.name}: {expected}"


def test_a_layer_that_changes_the_kind_does_not_inherit_the_options_of_the_other(write):
    write("conv", BASE + "autoencoder: {kind: conv, latent_size: 9, steps: 3, max_accuracy_drop: 0.5}")
    write("pca", "extends: conv\nautoencoder: {kind: pca}")
    for found in (config.load("pca"), config.load("conv", {"autoencoder.kind": "pca"})):
        assert found.autoencoder.latent_size == 9 and found.autoencoder.max_accuracy_drop == 0.5
        assert not hasattr(found.autoencoder, "steps")
    gaussian = config.load("conv", {"generator.kind": "gaussian", "generator.scale": "0.5"})
    assert gaussian.generator.scale == 0.5 and not hasattr(gaussian, "autoencoder")
    assert "autoencoder.steps: belongs to kind conv" in message(
        "conv", {"autoencoder.kind": "pca", "autoencoder.steps": "2"}
    )


# -- what comes out


def test_complete_yaml_stands_for_the_same_experiment(write, tmp_path):
    write(
        "t",
        BASE
        + "seed: 5\nprepare: {parameters: ['*.bias']}\nautoencoder: {kind: conv, latent_size: 4, learning_rate: 1e-5}",
    )
    experiment = config.load("t", {"generate.count": "9"})
    path = tmp_path / "t.yaml"
    path.write_text(config.to_yaml(experiment))
    assert config.load(str(path)) == experiment
    assert list(yaml.safe_load(path.read_text())) == list(type(experiment).model_fields)


def test_flat_keys_are_overrides(write):
    write("t", BASE)
    write("other", "extends: t\nseed: 3\nautoencoder: {latent_size: 7}\nevaluate: {noise: []}")
    flat = config.flat(config.load("other"))
    assert flat["autoencoder.latent_size"] == 7
    assert config.load("t", {k: yaml.safe_dump(v) for k, v in flat.items()} | {"tag": "t"}) == config.load(
        "other"
    ).model_copy(update={"tag": "t"})


def digest(stage: str = "evaluate", **overrides: str) -> str:
    return stages.all_digests(config.load("t", {k.replace("__", "."): v for k, v in overrides.items()}))[stage]


def test_digest_sees_what_can_change_a_result_and_nothing_else(write):
    write("t", BASE)
    without_effect = {
        "device": "cpu",
        "register": "true",
        "dataset__root": "elsewhere",
        "dataset__download": "false",
        "generate__batch_size": "3",
        "evaluate__batch_size": "3",
    }
    assert digest(**without_effect) == digest()
    changes = {
        "seed": "1",
        "dataset__split_seed": "1",
        "network__architecture": "cnn_small",
        "prepare__collect__learning_rate": "0.5",
        "autoencoder__variance": "0.5",
        "diffusion__ema": "0.5",
        "generate__seed": "1",
        "evaluate__noise": "[1]",
    }
    assert len({digest(), *(digest(**{key: value}) for key, value in changes.items())}) == len(changes) + 1
    assert digest("train", generate__seed="1") == digest("train")
    assert digest("train", seed="1") != digest("train")
    assert digest("pretrain", prepare__collect__learning_rate="0.5") == digest("pretrain")
    assert digest("originals", evaluate__noise="[1]") == digest("originals")
    assert digest("originals", evaluate__test="false") != digest("originals")


def test_digest_is_the_same_whatever_the_tag_and_the_notation(write):
    write("t", BASE + "diffusion: {learning_rate: 1e-4}")
    write("u", "extends: t\ndiffusion: {learning_rate: 0.0001}")
    assert digest() == stages.all_digests(config.load("u"))["evaluate"]


def test_fields_without_effect_are_those_that_are_meant():
    experiment = schema.experiment({"dataset": {"name": "digits"}, "network": {"architecture": "mlp"}})

    def keys(tree: dict, prefix: str = "") -> set[str]:
        return {k for n, v in tree.items() for k in (keys(v, f"{prefix}{n}.") if isinstance(v, dict) else {prefix + n})}

    assert keys(experiment.model_dump()) - keys(affecting(experiment)) == {
        *("tag", "device", "processes", "register", "log_models", "dataset.root", "dataset.download"),
        *("generate.batch_size", "evaluate.batch_size"),
    }


def test_digest_sees_the_files_of_the_source(write, tmp_path):
    write("t", BASE)
    source = tmp_path / "source"
    source.mkdir()
    file = source / "0.pth"
    seen = [digest(prepare__source=str(source))]
    file.write_bytes(b"one")
    seen.append(digest(prepare__source=str(source)))
    assert digest(prepare__source=str(source)) == seen[-1]
    file.write_bytes(b"three")
    seen.append(digest(prepare__source=str(source)))
    os.utime(file, ns=(0, 12345))
    seen.append(digest(prepare__source=str(source)))
    file.rename(source / "1.pth")
    seen.append(digest(prepare__source=str(source)))
    assert len(set(seen)) == 5


def test_digest_sees_the_content_of_weights_and_of_files_of_architectures(write, tmp_path):
    write("t", BASE)
    own, weights = tmp_path / "nets.py", tmp_path / "w.pth"
    own.write_text("def net(): ...")
    weights.write_bytes(b"one")
    options = {"network": f"{{architecture: '{own}:net', pretrained: true, weights: '{weights}'}}"}
    seen = [digest(**options)]
    os.utime(own, ns=(0, 12345))
    assert digest(**options) == seen[0]
    for path, content in ((own, "def net(): pass"), (weights, "two")):
        path.write_text(content)
        seen.append(digest(**options))
    weights.unlink()
    seen.append(digest(**options))
    assert len(set(seen)) == 4


def test_names_of_timm_with_a_tag(write):
    write("t", BASE)
    assert config.load("t", {"network.architecture": "resnet18.a1_in1k"}).network.architecture == "resnet18.a1_in1k"


def test_experiments_are_frozen(write):
    write("t", BASE)
    with pytest.raises(ValueError, match="frozen"):
        config.load("t").generate.count = 3


def test_digest_sees_what_is_used_alone(write, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("0.pth", "1.pth", "bad.pth", "notes.txt"):
        (source / name).write_text(name)
    (tmp_path / "test.py").write_text("print(1)")

    def digest(stage: str, **evaluate: str) -> str:
        tree = {"prepare": {"source": str(source), "exclude": ["b*.pth"]}, "evaluate": evaluate}
        return stages.all_digests(config.load(str(write("own", yaml.safe_dump(tree)))))[stage]

    options = {"command": "python test.py {checkpoint}", "folder": str(tmp_path)}
    function = {"function": f"{tmp_path}/test.py:predict"}
    names = ("generate", "originals", "evaluate")
    before = [digest(name, **options) for name in names] + [digest("originals", **function)]
    for name in ("bad.pth", "notes.txt", "more.txt", "b.pth"):
        (source / name).write_text("changed")
    assert before == [digest(name, **options) for name in names] + [digest("originals", **function)]
    (tmp_path / "test.py").write_text("print(12)")
    after = [digest(name, **options) for name in names] + [digest("originals", **function)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize(
    "command", ["python 'my test.py' {checkpoint}", 'sh -c "python test.py {checkpoint}"', "./test.py {checkpoint}"]
)
def test_digest_sees_the_script_of_a_command(write, tmp_path, command):
    script = tmp_path / ("my test.py" if "my" in command else "test.py")
    tree = {"prepare": {"source": "absent"}, "evaluate": {"command": command, "folder": str(tmp_path)}}
    experiment = config.load(str(write("own", yaml.safe_dump(tree))))
    seen = set()
    for text in ("print(1)", "print(12)"):
        script.write_text(text)
        seen.add(stages.all_digests(experiment)["originals"])
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"command": "a '{checkpoint}"}, "cannot be split into words: No closing quotation"),
        ({"kind": "command"}, "command: is missing"),
        ({"command": "a {checkpoint}", "test": False}, "test: belongs to kind images, but kind is command"),
        ({"function": "a.py:b", "test": False}, "test: belongs to kind images, but kind is function"),
        ({"function": "a.py:b", "command": "a {checkpoint}"}, "command: belongs to kind command, but kind is function"),
        ({"workers": 3}, "workers: belongs to kind function or command, but kind is none"),
    ],
)
def test_evaluations_that_cannot_be(write, evaluate, message):
    with pytest.raises(UserError, match=f"own.yaml: evaluate[:.] ?.*{message}"):
        config.load(str(write("own", yaml.safe_dump({"prepare": {"source": "a"}, "evaluate": evaluate}))))
