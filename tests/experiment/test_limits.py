"""Lower bounds of memory and disk: below what is really needed, and what is done with them."""

from collections import namedtuple

import pytest
import torch

from pdiff.errors import UserError
from pdiff.experiment import config, limits, memory, sizes, stages
from pdiff.experiment.limits import bounds, check, in_bytes
from pdiff.method.autoencoders import ConvAutoencoderOptions
from pdiff.method.denoisers import ConvDenoiserOptions, MLPDenoiserOptions
from pdiff.method.options import Optimization

GB = 10**9
Usage = namedtuple("Usage", "total free")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 16 GB and a disk of 100 GB, of which 40 are free."""
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: Usage(12 * GB, 1 * GB))
    monkeypatch.setattr(limits.psutil, "swap_memory", lambda: Usage(4 * GB, 0))
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda place: Usage(100 * GB, 40 * GB))


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        (MLPDenoiserOptions(), 5),
        (MLPDenoiserOptions(width=700, blocks=9), 300),
        (ConvDenoiserOptions(), 2000),
        (ConvAutoencoderOptions(latent_size=100), 30_000),
        (ConvAutoencoderOptions(latent_size=3000, kl_weight=1), 100),
    ],
)
def test_parameters_are_at_least_so_many(options, inputs):
    with torch.device("meta"):
        module = options.build(inputs)
    counted, least = sum(parameter.numel() for parameter in module.parameters()), options.least_parameters(inputs)
    assert 0.3 * counted < least < counted


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_copies_of_what_is_trained(optimizer, momentum):
    from pdiff.method.training import make_optimizer

    settings, weight = Optimization(optimizer=optimizer, momentum=momentum), torch.nn.Parameter(torch.ones(7))
    made = make_optimizer([weight], settings)
    weight.sum().backward()
    made.step()
    state = [value for value in made.state[weight].values() if isinstance(value, torch.Tensor) and value.numel() == 7]
    assert settings.copies == 2 + len(state)


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["digits_mlp", "digits_mlp_paper", "vae_sample"])
def test_bounds_lie_below_the_predicted_peak(tag):
    experiment = config.load(tag)
    size = memory.sizes(experiment)
    peaks: dict[str, int] = {}
    for need in memory.needs(experiment, size):
        peaks[need.part] = max(need.peak, peaks.get(need.part, 0))
    least: dict[str, int] = {}
    for bound in bounds(experiment, size.size, "cpu"):
        if bound.stage == "train":
            part = "denoiser" if "diffusion." in bound.keys else "autoencoder"
            least[part] = max(bound.memory, least.get(part, 0))
    assert all(0 < least[part] <= peaks[part] for part in peaks), (least, peaks)


@pytest.mark.slow
def test_every_tag_fits(tmp_path):
    for tag in config.runnable():
        experiment = config.load(tag)
        assert sizes.known(experiment), "a bound without D says little"
        check(experiment, stages.of(experiment), tmp_path)


def loaded(**overrides: object):
    return config.load("digits_mlp", {key.replace("__", "."): str(value) for key, value in overrides.items()})


@pytest.mark.parametrize(
    ("count", "stage", "size", "needed"),
    [
        (10**11, "generate", None, "800 GB of memory"),  # names of 8 bytes
        (10**10, "evaluate", None, "80.0 GB of memory"),
        (4 * 10**6, "generate", 10**4, "160 GB of disk"),  # 10^4 numbers of 2 bytes, twice
    ],
)
def test_what_is_refused(tmp_path, count, stage, size, needed):
    with pytest.raises(UserError, match=f"{stage} needs at least {needed}, but th"):
        check(loaded(generate__count=count), [stage], tmp_path, size=size)


def test_the_weights_alone_count_on_a_gpu(tmp_path):
    """A denoiser of 13 x 10^8 numbers: 5.2 GB of weights, five times as much while a CPU trains it."""
    experiment = loaded(diffusion__width=10_000)
    check(experiment, ["train"], tmp_path, device="cuda")
    with pytest.raises(UserError, match=r"diffusion\.width 10000, .* train needs at least 26\.0 GB of memory"):
        check(experiment, ["train"], tmp_path, device="cpu")
    check(experiment, ["generate", "evaluate"], tmp_path, device="cpu")


def test_exactly_as_much_as_there_is_is_enough(tmp_path):
    size, count = 2000, 40 * GB // (2 * 2 * 2000)
    check(loaded(generate__count=count), ["generate"], tmp_path, size=size)
    check(loaded(generate__count=count), ["pretrain", "prepare", "train"], tmp_path)
    with pytest.raises(UserError, match=r"generate needs at least 40\.0 GB of disk"):
        check(loaded(generate__count=count + 1), ["generate"], tmp_path, size=size)


def test_disk(tmp_path, monkeypatch):
    """What is finished needs no room: only a stage that begins looks at the free part, and at what it has already."""
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: Usage(10**15, 0))
    experiment = loaded(generate__count=10**7)  # 2 x 48.2 GB
    check(experiment, ["generate"], tmp_path)
    with pytest.raises(UserError, match=r"generate needs at least 96\.4 GB of disk, but there are 40\.0 GB"):
        check(experiment, ["generate"], tmp_path, size=2410)
    with (tmp_path / "part.safetensors").open("wb") as file:
        file.truncate(57 * GB)
    check(experiment, ["generate"], tmp_path, size=2410)
    with pytest.raises(UserError, match="generate needs at least 193 GB of disk, but there are 100 GB"):
        check(loaded(generate__count=2 * 10**7), ["generate"], tmp_path / "absent" / "folder")


def test_files_of_a_source_count(tmp_path):
    (tmp_path / "mine").mkdir()
    for k in range(4):
        (tmp_path / "mine" / f"{k}.pth").touch()
    (tmp_path / "mine.yaml").write_text(f"prepare: {{source: {tmp_path}/mine}}")
    experiment = config.load(str(tmp_path / "mine.yaml"))
    check(experiment, stages.of(experiment), tmp_path)
    with pytest.raises(UserError, match=r"prepare\.source .*: prepare needs at least 80\.0 GB of disk"):
        check(experiment, ["prepare"], tmp_path, size=10 * GB)


def test_what_is_cut_to_what_there_is_is_not_refused(tmp_path):
    huge = {"autoencoder__latent_size": 10**15, "generate__batch_size": 10**15}
    experiment = loaded(**huge, generate__trajectory_count=10**15, evaluate__batch_size=10**15)
    check(experiment, stages.of(experiment), tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_640_000_000_000, "9.64 TB"), (10**400, "1.00e+382 EB")],
)
def test_bytes_for_people(count, text):
    assert in_bytes(count) == text
