"""Hostile tries at what a user writes: YAML files, configuration keys, tags, and the command line."""

import os
import subprocess
import sys
import time

import pytest
from hostile import Try, answered

from pdiff.cli.main import COMMANDS, main
from pdiff.experiment import config, documents
from pdiff.experiment.keys import all_keys

BASE = "dataset: {name: digits}\nnetwork: {architecture: mlp}\n"
ALIASES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k} {{{', '.join(f'k{j}: *a{k - 1}' for j in range(10))}}}\n" for k in range(1, 9)
)  # 10^8 leaves
SECONDS = 2  # of the processor; the worst of these inputs took minutes, or all memory


def file(text, name="own.yaml"):
    """Writes a file; a text that is not UTF-8 is given as bytes."""
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def files(**texts):
    """Writes name.yaml of every name."""
    return lambda folder: [file(text, f"{name}.yaml")(folder) for name, text in texts.items()]


def link(target, *others):
    """Makes own.yaml a link, beside other files."""
    return lambda folder: [(folder / "own.yaml").symlink_to(target), *(other(folder) for other in others)]


def chain(count, extends):
    """Writes 0.yaml, 1.yaml, ..., each of which extends the next."""
    chained = {str(k): BASE + extends.format(f"{k + 1}.yaml") for k in range(count)}
    return files(**chained, **{str(count): BASE + "seed: 7"})


def sparse(folder):
    """Makes a file of 10 MB."""
    with (folder / "own.yaml").open("wb") as content:
        content.truncate(10_000_000)


OWN = "own.yaml"
NO_FILE = (OWN, "is not an ordinary file of at most")
IN_FILES = [
    ("nested aliases", file(ALIASES), (OWN, "aliases such as *a0", "line 2")),
    ("an alias in itself", file("generate: &g {count: 3, self: *g}"), (OWN, "aliases such as *g")),
    ("an alias that is not there", file("seed: *nothing"), (OWN, "aliases such as *nothing")),
    ("10 MB", sparse, NO_FILE),
    ("a link to a device", link("/dev/zero"), NO_FILE),
    ("a pipe", lambda folder: os.mkfifo(folder / "own.yaml"), NO_FILE),
    ("a folder", lambda folder: (folder / "own.yaml").mkdir(), NO_FILE),
    ("a link to itself", link("own.yaml"), (OWN, "cannot be read")),
    ("deep lists", file("seed: " + "[" * 500 + "]" * 500), (OWN, "more than 20 deep")),
    ("deeper lists", file("seed: " + "[" * 100_000), (OWN, "line 1")),
    ("deep sections", file("".join(f"{'  ' * k}a:\n" for k in range(500))), (OWN, "more than 20 deep")),
    ("a long number", file(BASE + f"seed: {'9' * 100_000}"), (OWN, "seed: unable to parse", "999 ... 999")),
    ("a long key", file(BASE + f"{'k' * 500}: 1"), (OWN, "kkkk: unknown key")),
    ("not UTF-8", file(b"seed: \xff"), (OWN, "cannot be read", "'utf-8' codec")),
    ("NUL", file("seed: \0"), (OWN, "not YAML", "#x0000")),
    ("NUL, escaped", file('prepare: {source: "a\\0b"}'), (OWN, "a NUL character", "line 1")),
    ("half a character", file('prepare: {source: "\\ud800"}'), (OWN, "nicode")),
    ("a key of two lines", file(BASE + '"a\\nb": 1'), (OWN, r"a\nb: unknown key")),
    ("empty", file(""), (OWN, "holds a NoneType, expected sections")),
    ("a list", file("- a"), (OWN, "holds a list, expected sections")),
    ("a text", file("seed"), (OWN, "holds a str, expected sections")),
    ("two documents", file(f"{BASE}---\n{BASE}"), (OWN, "not YAML", "single document")),
    ("a tabulator", file("generate:\n\tcount: 1"), (OWN, "not YAML", "line 2, column 1")),
    ("a call", file("seed: !!python/object/apply:os.getpid []"), (OWN, "YAML tags such as", "python/object/apply")),
    ("a tag of YAML", file("seed: !!bool maybe"), (OWN, "YAML tags such as tag:yaml.org,2002:bool", "line 1")),
    ("a date", file(BASE + "seed: 2024-01-31"), (OWN, "seed: input should be a valid integer", "'2024-01-31'")),
    ("no date", file(BASE + "seed: 2024-99-99"), (OWN, "seed: input should be a valid integer", "'2024-99-99'")),
    ("a time", file(BASE + "seed: 1:30"), (OWN, "seed: input should be a valid integer", "'1:30'")),
    ("half a number", file(BASE + "seed: 0b_"), (OWN, "seed: input should be a valid integer", "'0b_'")),
    ("a key that is 1", file(BASE + "generate: {1: 2}"), (OWN, "generate: keys should be strings", "1")),
    ("a key that is null", file(BASE + "null: x"), (OWN, "keys should be strings", "None")),
    ("a key that is true", file(BASE + "true: x"), (OWN, "keys should be strings", "True")),
    ("a key that is a list", file(BASE + "[1]: x"), (OWN, "not YAML", "unhashable key")),
    ("a key twice", file(BASE + "generate:\n  count: 1\n  count: 2"), (OWN, "'count' stands twice, at 4:3 and 5:3")),
    ("a key twice in a line", file(BASE + "generate: {count: 1, count: 2}"), (OWN, "'count' stands twice, at 3:")),
    ("another tag", file(BASE + "tag: other"), (OWN, "tag: the tag is the name of the file", "'other'")),
    ("count true", file(BASE + "generate: {count: true}"), (OWN, "generate.count: input should be a number", "True")),
    ("noise true", file(BASE + "evaluate: {noise: [1, true]}"), (OWN, "evaluate.noise: input should be a number")),
    ("count 1.5e0", file(BASE + "generate: {count: 1.5e0}"), (OWN, "generate.count: ", "fractional part", "1.5")),
    ("count 1e999", file(BASE + "generate: {count: 1e999}"), (OWN, "generate.count: input should be a finite number")),
    ("noise nan", file(BASE + "evaluate: {noise: [.nan]}"), (OWN, "evaluate.noise", "finite number", "nan")),
    (
        "parameters []",
        file(BASE + "prepare: {parameters: []}"),
        (OWN, "prepare.parameters: nothing would be generated"),
    ),
    ("extends what is not there", file("extends: nosuchtag"), (OWN, "extends: unknown tag 'nosuchtag'")),
    ("extends a misspelt base", file("extends: papr"), (OWN, "extends: unknown tag 'papr'; did you mean paper?")),
    ("extends no file", file("extends: absent.yaml"), (OWN, "extends: absent.yaml is not a file")),
    ("extends two lines", file('extends: "a\\nb.yaml"'), (OWN, r"extends: a\nb.yaml is not a file")),
    ("extends nobody's", file("extends: ~nobody-of-this-name/a.yaml"), (OWN, "extends: ~nobody", "is not a file")),
    ("extends a long name", file(f"extends: {'n' * 100_000}.yaml"), (OWN, "extends: nnn", "is not a file")),
    ("extends a device", file("extends: /dev/zero"), (OWN, "extends: unknown tag '/dev/zero'")),
    ("extends many", file(f"extends: [{'paper, ' * 5000}]"), (OWN, "more than 100 files")),
]
FILES = [Try(f"show own.yaml # {name}", 2, says, before) for name, before, says in IN_FILES]
CIRCLE = {
    "in itself": file("extends: own.yaml"),
    "through the folder above": lambda folder: [
        (folder / "a").mkdir(),
        file("extends: ./a/../own.yaml")(folder),
    ],
    "through a link to the folder": lambda folder: [
        (folder / "a").symlink_to("."),
        file("extends: a/own.yaml")(folder),
    ],
    "through a link to the file": link("other.yaml", file("extends: own.yaml", "other.yaml")),
    "of two": files(own="extends: other.yaml", other="extends: own.yaml"),
}
CIRCLES = [Try(f"show own.yaml # {name}", 2, (OWN, "is a circle"), before) for name, before in CIRCLE.items()]
SHOW = "show tiny.yaml"
TRIES = [
    *FILES,
    *CIRCLES,
    Try("show 0.yaml", 2, ("100.yaml", "more than 100 files belong to 0.yaml"), chain(2000, "extends: {}")),
    Try("show 0.yaml", 2, ("more than 100 files", "0.yaml"), chain(60, "extends: [{0}, {0}]")),
    Try("sweep --tag tiny.yaml --sweep own.yaml # a link to a device", 2, NO_FILE, link("/dev/zero")),
    Try("sweep --tag tiny.yaml --sweep own.yaml # aliases", 2, (OWN, "aliases such as *a0"), file(ALIASES)),
    Try("sweep --tag tiny.yaml --sweep own.yaml # a key", 2, (OWN, "'a' stands twice"), file("{a: 1, a: 2}")),
    Try("sweep --tag tiny.yaml --sweep layers --launcher-options '&a {b: *a}'", 2, ("--launcher-options", "mapping")),
    Try("show absent.yaml", 2, ("absent.yaml", "cannot be read")),
    Try("show /dev/zero", 2, ("unknown tag '/dev/zero'",)),
    Try("show '~nobody-of-this-name/a.yaml'", 2, ("~nobody-of-this-name/a.yaml", "cannot be read")),
    Try("show 'a\nb.yaml'", 2, (r"a\nb.yaml", "cannot be read")),
    Try("show 'a\0b.yaml'", 2, (r"a\x00b.yaml", "cannot be read")),
    Try("show \udcff", 2, (r"argument '\udcff': not UTF-8",)),
    Try(f"{SHOW} --prepare.source \udcff", 2, (r"argument '\udcff': not UTF-8",)),
    Try(f"show {'t' * 100_000}", 2, ("unknown tag 'ttt",)),
    Try("main --tag paper", 2, ("paper.yaml: is a base that other experiments extend, and no tag that can be run",)),
    Try("main --tag digits_mpl", 2, ("unknown tag 'digits_mpl'; did you mean digits_mlp",)),
    Try("main --tag resnet18_norm", 2, ("unknown tag 'resnet18_norm'; did you mean",)),
    Try("main --tag zzzzz", 2, ("unknown tag 'zzzzz'; nothing known is like it (`pdiff tags` lists all)",)),
    Try("main --tag tiny.yaml --tag digits_mlp", 2, ("--tag: given twice, as 'tiny.yaml' and 'digits_mlp'",)),
    Try(f"{SHOW} --seed 1 --seed=2", 2, ("--seed: given twice, as '1' and '2'",)),
    Try(f"{SHOW} --generate.count 1 --generate '{{}}'", 2, ("--generate would replace --generate.count",)),
    Try(f"{SHOW} --generate '{{count: 1, count: 2}}'", 2, ("generate: ", "dictionary", "'{count: 1, count: 2}'")),
    Try(f"{SHOW} --generate '&a {{b: *a}}'", 2, ("command line: generate: ", "dictionary", "'&a {b: *a}'")),
    Try(f"{SHOW} --tag other", 2, ("command line: tag: the tag is the name of the file, tiny", "'other'")),
    Try(f"{SHOW} --generate.count true", 2, ("command line: generate.count: input should be a number", "True")),
    Try(f"{SHOW} --generate.count 1.5e0", 2, ("command line: generate.count: ", "fractional part", "1.5")),
    Try(f"{SHOW} --generate.count .inf", 2, ("command line: generate.count: input should be a finite number", "inf")),
    Try(f"{SHOW} --diffusion.learning_rate nan", 2, ("diffusion.learning_rate: input should be a finite number",)),
    Try(f"{SHOW} --dataset.channels true", 2, ("dataset.channels: ", "True")),
    Try(f"{SHOW} --prepare.parameters '[]'", 2, ("prepare.parameters: nothing would be generated", "or all")),
    Try(f"{SHOW} --prepare.source ~nobody-of-this-name/a", 2, ("prepare.source: ", "there is no such home folder")),
    Try(
        f"{SHOW} --network.architecture ~nobody-of-this-name/a.py:b", 2, ("network.architecture: ~nobody", "not a file")
    ),
    Try("new own --checkpoints ~nobody-of-this-name/a", 2, ("--checkpoints", "no home folder ~nobody-of-this-name")),
    Try("new own --checkpoints . --out ~nobody-of-this-name", 2, ("--out", "no home folder ~nobody-of-this-name")),
    Try("new own --checkpoints . --function ~nobody-of-this-name/a.py:b", 2, ("--function", "no home folder")),
    Try(
        "sweep --tag tiny.yaml --sweep ~nobody-of-this-name/a.yaml", 2, ("~nobody-of-this-name/a.yaml: cannot be read",)
    ),
    Try(f"{SHOW} --generate..count 1", 2, ("command line: generate.", "unknown key")),
    Try(f"{SHOW} --=1", 2, ("command line: ", "unknown key")),
    Try(f"{SHOW} -- --seed 1", 2, ("unexpected argument '1'",)),
    Try(f"{SHOW} --seed '{'[' * 5000}'", 2, ("command line: seed: input should be a valid integer",)),
    Try(f"{SHOW} --seed {'9' * 5000}", 2, ("command line: seed: ", "999 ... 999")),
]


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What commands import does not count."""
    main(["sweep", "--tag", "digits_mlp", "--sweep", "absent"])
    main(["show", "digits_mlp", "--network.architecture", "absent"])


@pytest.mark.parametrize("tried", TRIES, ids=lambda tried: tried.command[:80])
def test_a_line(tried, workspace, capfd):
    start = time.process_time()
    answered(tried._replace(command=tried.command.partition(" # ")[0]), workspace, capfd)
    assert time.process_time() - start < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"{BASE}generate:\n" + "".join(f"  k{k}: 1\n" for k in range(20_000)), "generate.k0"),
        (BASE + "".join(f"k{k}: 1\n" for k in range(20_000)), "k0"),
    ],
    ids=["in a section", "of sections"],
)
def test_twenty_thousand_unknown_keys(text, key, workspace, capfd):
    file(text)(workspace)
    start = time.process_time()
    assert main(["show", "own.yaml"]) == 2
    assert time.process_time() - start < SECONDS
    first, *_, last = capfd.readouterr().err.split("; own.yaml: ")
    assert first.startswith(f"pdiff: own.yaml: {key}: unknown key") and last.endswith("; and 19988 more problems\n")


def test_a_sweep_of_too_many_parameters(workspace, capfd):
    parameters = "".join(f"  k{k}: {{kind: float, low: 0, high: 1}}\n" for k in range(2000))
    file(f"objectives: {{a: maximize}}\nparameters:\n{parameters}")(workspace)
    start = time.process_time()
    assert main(["sweep", "--tag", "tiny.yaml", "--sweep", "own.yaml"]) == 2
    assert time.process_time() - start < SECONDS
    assert "own.yaml: parameters: dictionary should have at most 100 items" in capfd.readouterr().err


def test_a_file_that_extends_much_within_limits(workspace):
    """Ninety files one after the other, and a file that two others extend."""
    chain(90, "extends: {}")(workspace)
    files(own="extends: [left.yaml, right.yaml]")(workspace)
    files(left="extends: 60.yaml", right="extends: 60.yaml\ngenerate: {count: 2}")(workspace)
    assert config.load("0.yaml").seed == config.load("own.yaml").seed == 7
    assert config.load("own.yaml").generate.count == 2


@pytest.mark.parametrize("given", ["file", "command line"])
@pytest.mark.parametrize(
    ("text", "count"),
    [("1e3", 1000), ("1E+3", 1000), ("1.5e1", 15), ("20.0", 20), ("1_000", 1000), ("010", 10), ("'7'", 7)],
)
def test_whole_numbers_in_every_notation(text, count, given, workspace):
    file(BASE + (f"generate: {{count: {text}}}" if given == "file" else ""))(workspace)
    found = config.load("own.yaml", {} if given == "file" else {"generate.count": text})
    assert found.generate.count == count and type(found.generate.count) is int


@pytest.mark.parametrize(
    "text", ["1e3", "-.5e-3", "1:30", "2024-01-31", "0x10", "010", "1_000", "true", "null", "", "*a", "&a", "!a", "\\"]
)
def test_a_text_is_the_same_after_it_was_written(text, tmp_path):
    (tmp_path / "a.yaml").write_text(documents.dump({"a": text, "b": [text]}))
    assert documents.read(tmp_path / "a.yaml") == {"a": text, "b": [text]}
    assert documents.value(documents.dump(text)) == text


@pytest.mark.slow
def test_no_key_takes_true_for_a_number(workspace):
    """Whatever its section, and if its value is one of several."""
    conv = {"autoencoder": "{kind: conv, latent_size: 4}"}
    others = ({"diffusion.prediction": "epsilon"}, {"evaluate.function": "a.py:b"}, {"generator.kind": "gaussian"})
    checked = set()
    for kind in ({}, conv, *others):
        for key, value in config.flat(config.load("tiny.yaml", kind)).items():
            (first, *_) = value if isinstance(value, list) and value else [value]
            if key not in checked and isinstance(first, int | float) and not isinstance(first, bool):
                for text in ("true", "[true]")[: 1 + isinstance(value, list)]:
                    assert any(key in line for line in config.problems("tiny.yaml", {**kind, key: text}, origin="")), (
                        key
                    )
                checked.add(key)
    assert {"seed", "generate.count", "evaluate.noise", "autoencoder.steps", "generator.scale"} <= checked
    assert checked < set(all_keys())


@pytest.mark.parametrize("command", COMMANDS.commands)
def test_only_what_resumes_says_that_it_goes_on(command, monkeypatch, capfd):
    def interrupted(context):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS, "invoke", interrupted)
    assert main([command]) == 130
    goes_on = command in ("main", "prepare", "train", "generate", "evaluate", "audit", "sweep")
    assert capfd.readouterr().err == f"pdiff: interrupted{'; the same command goes on from here' * goes_on}\n"


@pytest.mark.slow
@pytest.mark.parametrize("line", ["tags", "show digits_mlp", "--help", "show --help", "--version"])
@pytest.mark.parametrize("output", [">&-", "| true"])
def test_output_that_nobody_reads(line, output, workspace):
    """Closed before the command begins, or a pipe that is closed before it prints."""
    program = f"{sys.executable} -m pdiff {line} {output}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@pytest.mark.slow
def test_main_without_output_runs_and_does_not_end_well(workspace):
    program = f"{sys.executable} -m pdiff main --tag tiny.yaml --diffusion.steps 5 --prepare.pretrain.epochs 1 >&-"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.returncode == 141 and "Traceback" not in done.stderr
