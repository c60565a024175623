"""Networks by name: published sizes, one contract for every entry, files of users, and pretrained weights."""

import json
import math
from pathlib import Path

import timm
import torch
from pytest import MonkeyPatch, fixture, mark, param, raises
from safetensors.torch import save_file

from pdiff.errors import UserError
from pdiff.networks.architectures import ARCHITECTURES, build, is_known, known_architectures
from pdiff.networks.populations import generated_names
from pdiff.networks.small import positions
from pdiff.networks.split import split

FACTS = json.loads((Path(__file__).parents[1] / "helpers" / "tags.json").read_text())["tags"]
MAIN = {facts["timm_model"]: facts["generated_parameters"] for facts in FACTS.values() if facts["category"] == "main"}
GENERATED = dict(zip(MAIN, [4096, 3072, 2048, 5120, 3072, 768], strict=True))
LARGE = [  # a second each, and more
    param(name, marks=[mark.slow] * (name != "resnet18") + [mark.thorough] * ("base" in name)) for name in MAIN
]


def make(name: str, *, classes: int = 10, channels: int = 3, image_size: int = 32, **options):
    torch.manual_seed(0)
    sizes = {"classes": classes, "channels": channels, "image_size": image_size}
    return build(str(name), **({"pretrained": False} | sizes | options))


def message(name: str, **options) -> str:
    """The message of a mistake; always on one line, which is not too long."""
    with raises(UserError) as caught:
        make(name, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# -- ours


@mark.parametrize(
    ("name", "channels", "image_size", "parameters", "statistics"),
    [
        ("mlp", 1, 8, 2410, 0),
        ("cnn_small", 1, 8, 1946, 48),
        ("cnn_medium", 3, 32, 10853, 0),
        ("mlp_mini", 3, 64, 66970, 0),
        ("convnet_mini", 3, 64, 24262, 0),
        ("resnet_mini", 3, 64, 25138, 0),
        ("resnet8", 1, 8, 19810, 336),
        ("vit_mini", 3, 64, 80714, 0),
        ("convnext_mini", 3, 64, 74970, 0),
    ],
)
def test_sizes(name, channels, image_size, parameters, statistics):
    network = make(name, channels=channels, image_size=image_size)
    assert sum(p.numel() for p in network.parameters()) == parameters
    state = network.state_dict()
    assert sum(t.numel() for t in state.values() if t.is_floating_point()) == parameters + statistics


@mark.parametrize("channels", [1, 3])
@mark.parametrize("name", ARCHITECTURES)
def test_contract(name, channels):
    network, again = (make(name, classes=7, channels=channels).eval() for _ in range(2))
    images = torch.randn(4, channels, 32, 32)
    logits = network(images)
    assert logits.shape == (4, 7)
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert torch.equal(again(images), logits)  # the same seed gives the same network
    torch.testing.assert_close(network(images[2:3]), logits[2:3])  # images do not see one another
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert name in known_architectures()


@mark.parametrize(
    ("name", "image_size"),
    [("cnn_medium", 28), ("mlp_mini", 33), ("convnet_mini", 40), ("resnet_mini", 8), ("vit_mini", 28)],
)
def test_images_of_a_wrong_size(name, image_size):
    assert f"{name} needs" in message(name, image_size=image_size)
    assert f"{image_size}" in message(name, image_size=image_size)


def test_positions_in_closed_form():
    """Patch (row, column) at width 8: two frequencies, 1 and 1 / 10 000."""
    found = positions(3, 8)
    for row in range(3):
        for column in range(3):
            waves = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in (1, 1e-4)]
            torch.testing.assert_close(found[3 * row + column], torch.tensor(waves))


def test_vit_sees_where_a_patch_is():
    """Without positions, patches in another order would give the same logits."""
    network = make("vit_mini").eval()
    images = torch.randn(2, 3, 32, 32)
    flipped = torch.cat([images[..., 16:], images[..., :16]], dim=3)
    assert not torch.allclose(network(images), network(flipped), atol=1e-4)
    network.positions.zero_()
    torch.testing.assert_close(network(images), network(flipped))


def test_attention_against_its_formula():
    network = make("vit_mini").eval()
    tokens, layer = torch.randn(2, 16, 64), network.layers[0]
    query, key, value = layer.qkv(layer.norm(tokens)).split(32, dim=2)
    heads = []
    for columns in (slice(8 * h, 8 * h + 8) for h in range(4)):
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / 8**0.5
        heads.append(scores.softmax(dim=2) @ value[..., columns])
    expected = tokens + torch.cat(heads, dim=2) @ layer.out.weight.T
    torch.testing.assert_close(layer(tokens), expected + layer.mlp(expected))


# -- timm's


@mark.slow
def test_names_of_timm_are_known_without_importing_it():
    listed, known = timm.list_models(), known_architectures()
    assert {name for name in known if "." not in name} == {*ARCHITECTURES, *listed}
    assert all(map(is_known, [*listed, *timm.list_pretrained()]))
    tagged = {name for name in known if "." in name}
    assert len(tagged & set(timm.list_pretrained())) > 0.9 * len(timm.list_pretrained())
    for name in tagged - set(timm.list_pretrained()):  # a network that timm makes, but has no weights for
        assert timm.models.get_pretrained_cfg(name, allow_unregistered=False) and not timm.is_model_pretrained(name)
    loops = {name.partition(".")[0] for name in set(timm.list_pretrained()) - tagged}
    wrong = [f"{name}.of_mine" for name in ("resnet18", "resnet81", *sorted(loops)[:2])]
    assert not any(map(is_known, [*wrong, "resnet81", "of_mine"]))


def test_a_registered_function_is_an_architecture(monkeypatch):
    def flat(*, classes: int, channels: int, image_size: int):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * image_size**2, classes))

    monkeypatch.setitem(ARCHITECTURES, "flat", flat)
    assert is_known("flat") and make("flat", image_size=4)[1].in_features == 48


@mark.slow
def test_timm_by_name():
    network = make("resnet18", classes=1000)
    assert sum(p.numel() for p in network.parameters()) == 11_689_512  # as torchvision documents
    assert make("resnet10t", channels=1).conv1[0].in_channels == 1
    assert "does not take images of 3 x 4 x 4" in message("densenet121", image_size=4)


@mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224", "mixer_s32_224"])
def test_timm_at_another_size(name):
    assert make(name, classes=5, image_size=64).eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


@mark.parametrize("name", LARGE)
def test_what_the_main_experiments_generate(name):
    with torch.device("meta"):
        network = make(name, image_size=32)
    names = generated_names(network, MAIN[name])
    assert names == MAIN[name]
    assert sum(network.state_dict()[n].numel() for n in names) == GENERATED[name]


@mark.parametrize("name", [*LARGE, *(name for name in ARCHITECTURES if name not in MAIN)])
@torch.no_grad()
def test_a_split_network_predicts_the_same(name):
    """With the last layers generated, and with everything; uniform weights, which are quick for the large networks."""
    with torch.device("meta"):
        network = make(name, image_size=32)
    network.to_empty(device="cpu").eval()
    for n, tensor in (*network.named_parameters(), *network.named_buffers()):
        spread = 1 if tensor.ndim < 2 else 2 * tensor[0].numel() ** -0.5
        tensor.uniform_(0 if n.endswith("var") else -spread, spread) if tensor.is_floating_point() else tensor.zero_()
    images = torch.randn(2, 3, 32, 32)
    expected = network(images)
    assert expected.isfinite().all() and expected.std() > 0
    for generated in (MAIN.get(name) or list(network.state_dict())[-2:], list(network.state_dict())):
        prefix, suffix = split(network, generated)
        assert torch.equal(suffix(*prefix(images)), expected)
        assert set(generated) <= set(suffix.state_dict())
    _, suffix = split(network, [list(network.state_dict())[-1]])
    assert len(list(suffix.parameters())) < len(list(network.parameters()))


# -- files of users

OWN = """
import torch
from torch import nn
from beside import WIDTH

class Net(nn.Module):
    def __init__(self, classes, image_size):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, WIDTH), nn.Linear(WIDTH, classes))
    def forward(self, x):
        return self.layers(x)

def net(classes, image_size):
    return Net(classes, image_size)
def everything(**options):
    assert sorted(options) == ["channels", "classes", "image_size"]
    return Net(options["classes"], options["image_size"])
def nothing():
    return Net(10, 32)
class Keeping(Net):
    kept = None
    def forward(self, x):
        if self.kept is None:
            self.kept = torch.ones(10)
        return self.layers(x) * self.kept
def number(classes):
    return classes
def raising():
    raise RuntimeError("two\\nlines")
def leaving():
    raise SystemExit("usage: ...")
def demanding(depth):
    return nn.Flatten()
def wrong_shape():
    return nn.Flatten()
class Pair(Net):
    def forward(self, x):
        return x, x
class Failing(Net):
    def forward(self, x):
        raise KeyError(x.shape)
value = 3
"""


@fixture
def own(tmp_path: Path) -> Path:
    """A file with a user's architectures, and a module beside it."""
    folder = tmp_path / "some where"
    folder.mkdir()
    (folder / "beside.py").write_text("WIDTH = 5\n")
    (folder / "nets.py").write_text(OWN)
    return folder / "nets.py"


@mark.parametrize("function", ["net", "everything", "nothing", "Net", "Keeping"])
def test_architectures_in_a_file(own, monkeypatch, function):
    network = make(f"{own}:{function}")
    logits = network(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()  # every parameter can be trained
    monkeypatch.chdir(own.parent)
    assert make(f"nets.py:{function}").state_dict().keys() == network.state_dict().keys()


@mark.parametrize(
    ("function", "expected"),
    [
        ("absent", "has no function 'absent'"),
        ("value", "has no function 'value'"),
        ("number", "gives a int, expected a torch.nn.Module"),
        ("raising", "failed: RuntimeError: two lines (nets.py, line"),
        ("leaving", "failed: SystemExit: usage: ..."),
        ("demanding", "failed: TypeError: demanding() missing 1 required positional argument: 'depth'"),
        ("wrong_shape", "gives (2, 3072) for 2 images, expected logits (2, 10)"),
        ("Pair", "gives a tuple for 2 images, expected logits (2, 10)"),
        ("Failing", "does not take images of 3 x 32 x 32"),
    ],
)
def test_mistakes_in_a_file_of_architectures(own, function, expected):
    found = message(f"{own}:{function}")
    assert expected in found and found.startswith("network.architecture")


def test_files_that_cannot_be_run(own):
    assert "absent.py is not a file" in message(f"{own.parent / 'absent.py'}:net")
    for text, expected in (("1 / 0", "ZeroDivisionError: division by zero (nets.py, line 1)"), ("x ==", "SyntaxError")):
        own.write_text(text)
        assert f"nets.py cannot be run: {expected}" in message(f"{own}:net")


# -- pretrained weights


@mark.parametrize("name", ["mlp", "botnet50ts_256"])
def test_pretrained_weights_that_do_not_exist(name):
    assert f"no pretrained weights of {name}" in message(name, pretrained=True)


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch: MonkeyPatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = message("resnet18", pretrained=True)
    for part in ("network.pretrained: model.safetensors of timm/resnet18.", str(tmp_path), "HF_HOME"):
        assert part in found
    assert "network.weights" in found


def save(network, path: Path) -> dict:
    """Write a network's state; every number differs from what initialisation gives."""
    state = {n: t + 0.25 if t.is_floating_point() else t for n, t in network.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    return state


@mark.parametrize("suffix", ["pth", "safetensors"])
@mark.parametrize("name", ["mlp", "vit_mini", "resnet10t", "convnext_atto"])
def test_weights_of_a_file(name, suffix, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    state = save(make(name), path)
    found = make(name, pretrained=True, weights=str(path)).state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[n], t) for n, t in state.items())


def test_weights_of_an_architecture_in_a_file(own, tmp_path):
    state = save(make(f"{own}:net"), tmp_path / "w.pt")
    found = make(f"{own}:net", pretrained=True, weights=str(tmp_path / "w.pt")).state_dict()
    assert all(torch.equal(found[n], t) for n, t in state.items())


@mark.slow
def test_weights_for_other_classes_channels_and_sizes(tmp_path):
    """The classifier is as new, a first convolution sums its channels (as timm's does), positions are resized."""
    path = tmp_path / "weights.pth"
    state = save(make("resnet10t", classes=1000), path)
    found = make("resnet10t", classes=7, channels=1, pretrained=True, weights=str(path)).state_dict()
    fresh = make("resnet10t", classes=7, channels=1).state_dict()
    changed = {n for n, t in state.items() if not torch.equal(found[n], t) if found[n].shape == t.shape}
    assert not changed
    assert {n for n in state if found[n].shape != state[n].shape} == {"conv1.0.weight", "fc.weight", "fc.bias"}
    torch.testing.assert_close(found["conv1.0.weight"], state["conv1.0.weight"].sum(dim=1, keepdim=True))
    assert found["fc.weight"].std() / fresh["fc.weight"].std() < 1.1
    state = save(make("vit_tiny_patch16_224", image_size=64), path)
    found = make("vit_tiny_patch16_224", pretrained=True, weights=str(path)).state_dict()
    assert found["pos_embed"].shape == (1, 1 + 4, 192)
    assert torch.equal(found["head.weight"], state["head.weight"])


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@mark.slow
@mark.parametrize("name", ["mlp", "resnet10t"])
def test_weights_that_do_not_fit(name, tmp_path):
    def refused(path: Path) -> str:
        return message(name, pretrained=True, weights=str(path))

    assert "network.weights" in refused(tmp_path / "absent.pth") and "is not a file" in refused(tmp_path / "absent.pth")
    state = save(make(name), tmp_path / "right.pth")
    first = next(iter(state))
    for wrong in (
        {n: t for n, t in state.items() if n != first},
        state | {"more.weight": torch.zeros(2)},
        state | {first: torch.zeros(2, 3)},
        {"other.weight": torch.zeros(2)},
    ):
        torch.save(wrong, tmp_path / "wrong.pth")
        assert f"network.weights: {tmp_path / 'wrong.pth'} does not fit {name}: " in refused(tmp_path / "wrong.pth")
    torch.save(state | {"evil": Evil(tmp_path / "run")}, tmp_path / "evil.pth")
    assert "pickled code is never run" in refused(tmp_path / "evil.pth")
    assert not (tmp_path / "run").exists()
    data = (tmp_path / "right.pth").read_bytes()
    for suffix in ("pth", "safetensors"):
        damaged = tmp_path / f"damaged.{suffix}"
        damaged.write_bytes(data[: len(data) // 2])
        assert str(damaged) in refused(damaged)


@mark.slow
def test_weights_of_another_architecture_with_other_classes(tmp_path):
    save(make("resnet14t", classes=9), tmp_path / "other.pth")
    assert "does not fit resnet10t" in message("resnet10t", pretrained=True, weights=str(tmp_path / "other.pth"))
