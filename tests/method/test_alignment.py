"""Alignment: functions that permutations must not change, permutations that must be found again."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call

from pdiff import files
from pdiff.method.alignment.copies import Originals
from pdiff.method.alignment.groups import Group, Groups, balance, inverse, permute, recombine
from pdiff.method.alignment.matching import Matching, align
from pdiff.method.alignment.reference import Reference
from pdiff.method.alignment.symmetries import permutation_groups
from pdiff.method.collection import Collection, StateDict
from pdiff.method.standardize import Standardizer
from pdiff.networks.architectures import ARCHITECTURES, build
from pdiff.seeds import stream

pytestmark = pytest.mark.slow

SMALL = {
    "mlp": (1, 8),
    "mlp_deep": (1, 8),
    "cnn_small": (1, 8),
    "mlp_mini": (3, 16),
    "convnet_mini": (3, 16),
    "resnet_mini": (3, 16),
    "resnet8": (1, 8),
}
SMALL |= {"cnn_medium": (3, 32), "vit_mini": (3, 16), "convnext_mini": (3, 32)}
PAPER = ("resnet18", "vit_tiny_patch16_224", "resnet50", "vit_base_patch16_224", "convnext_tiny", "convnext_base")


class Residual(nn.Module):
    """A narrow residual network with BatchNorm: a stem and two blocks on one stream."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
                *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def deep_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def random_state(network: nn.Module, seed: int = 0) -> StateDict:
    """Random weights with running statistics and norms that differ from unit to unit, float64."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in network.state_dict().items():
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        state[name] = tensor.double() + 0.1 * noise if tensor.is_floating_point() else tensor
    return state


def outputs(network: nn.Module, state: StateDict, x: Tensor) -> Tensor:
    with torch.no_grad():
        return functional_call(network.double().eval(), state, (x.double(),))


def random_permutations(groups: Groups, count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.stack([torch.randperm(g.size, generator=generator) for _ in range(count)]) for g in groups}


def assert_same_function(network: nn.Module, x: Tensor, *, seed: int = 3) -> Groups:
    """A random permutation of all groups moves numbers, and leaves outputs and round trips as they were."""
    groups = permutation_groups(network, x)
    state = random_state(network)
    collection = Collection.stack([state])
    permutations = random_permutations(groups, 1, seed)
    permuted = permute(collection, groups, permutations)
    before, after = outputs(network, state, x), outputs(network, permuted[0], x)
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    moved = [group for group in groups if group.size > 3]
    for name in {place.name for group in moved for place in group.places}:
        assert not torch.equal(permuted.tensors[name], collection.tensors[name]), name
    back = permute(permuted, groups, inverse(permutations))
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in collection.tensors.items())
    return groups


def image(channels: int, size: int, count: int = 2) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_function_of_small_networks(name: str) -> None:
    channels, size = SMALL[name]
    torch.manual_seed(0)
    network = build(name, pretrained=False, classes=10, channels=channels, image_size=size)
    groups = assert_same_function(network, image(channels, size))
    expected = {
        "mlp": 1,
        "mlp_deep": 2,
        "cnn_small": 2,
        "cnn_medium": 4,
        "mlp_mini": 2,
        "convnet_mini": 4,
        "resnet_mini": 4,
        "resnet8": 6,
    }
    assert len(groups) == (expected | {"vit_mini": 8, "convnext_mini": 4 + 7})[name]
    assert bool(groups.left_alone) == (name == "vit_mini")  # its fixed positions tell the stream's units apart


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PAPER[:2], *(pytest.param(name, marks=pytest.mark.thorough) for name in PAPER[2:])])
def test_function_of_large_networks(name: str) -> None:
    network = build(name, pretrained=False, classes=10, channels=3, image_size=32)
    groups = assert_same_function(network, image(3, 32, 1))
    blocks = {"resnet18": 8 + 4, "resnet50": 32 + 5, "convnext_tiny": 18 + 4, "convnext_base": 36 + 4}
    assert len(groups) == blocks.get(name, 2 * 12 + 1) and not groups.left_alone


class Case(nn.Module):
    """A small network made of named parts and one expression."""

    def __init__(self, forward, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.expression = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.expression(self, x)


def conv(inputs: int, outputs: int, kernel: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def pooled_head(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 3))


def encoder_attention(m: nn.Module, x: Tensor) -> Tensor:
    tokens = m.patch(x).flatten(2).transpose(1, 2)
    return m.head((tokens + m.mix(tokens, tokens, tokens, need_weights=False)[0]).mean(1))


def two_step_attention(m: nn.Module, x: Tensor) -> Tensor:
    tokens = m.patch(x).flatten(2).transpose(1, 2)
    query, key, value = (part(tokens).reshape(2, 16, 4, 2).transpose(1, 2) for part in (m.q, m.k, m.v))
    mixed = (query @ key.transpose(-2, -1) / 2).softmax(dim=-1) @ value
    return m.head(m.out(mixed.transpose(1, 2).reshape(2, 16, 8)).mean(1))


def in_place_sum(m: nn.Module, x: Tensor) -> Tensor:
    x = m.a(x)
    x += m.b(x)
    return m.head(x.relu_())


def split_and_join(m: nn.Module, x: Tensor) -> Tensor:
    first, second = m.a(x).chunk(2, dim=1)
    return m.head(torch.cat([first.relu(), second.sigmoid(), m.b(x)], dim=1))


CASES = {
    # network -> sizes of its groups, and whether something is left alone
    "depthwise": (
        Case(lambda m, x: m.head(m.b(m.a(x))), a=conv(2, 8), b=conv(8, 8, 3, groups=8), head=pooled_head(8)),
        [8],
        False,
    ),
    "grouped": (
        Case(lambda m, x: m.head(m.b(m.a(x)).relu()), a=conv(2, 8), b=conv(8, 12, 3, groups=4), head=pooled_head(12)),
        [4],
        False,
    ),
    "group norm": (
        Case(lambda m, x: m.head(m.norm(m.a(x))), a=conv(2, 8), norm=nn.GroupNorm(4, 8), head=pooled_head(8)),
        [4],
        False,
    ),
    "one norm group": (
        Case(lambda m, x: m.head(m.norm(m.a(x))), a=conv(2, 8), norm=nn.GroupNorm(1, 8), head=pooled_head(8)),
        [8],
        False,
    ),
    "instance norm": (
        Case(
            lambda m, x: m.head(m.norm(m.a(x))),
            a=conv(2, 8),
            norm=nn.InstanceNorm2d(8, affine=True),
            head=pooled_head(8),
        ),
        [8],
        False,
    ),
    "prelu": (Case(lambda m, x: m.head(m.act(m.a(x))), a=conv(2, 8), act=nn.PReLU(8), head=pooled_head(8)), [8], False),
    "in place": (Case(in_place_sum, a=conv(2, 8), b=conv(8, 8), head=pooled_head(8)), [8], False),
    "segments": (Case(split_and_join, a=conv(2, 8), b=conv(2, 3), head=pooled_head(11)), [3, 4, 4], False),
    "shared": (
        Case(lambda m, x: m.head(m.b(m.b(m.a(x)).relu())), a=conv(2, 8), b=conv(8, 8), head=pooled_head(8)),
        [8],
        False,
    ),
    "squeeze and excite": (
        Case(
            lambda m, x: m.head((y := m.a(x)) * m.up(m.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()),
            **{"a": conv(2, 8), "down": conv(8, 3), "up": conv(3, 8), "head": pooled_head(8)},
        ),
        [3, 8],
        False,
    ),
    "layer scale": (
        Case(
            lambda m, x: m.head((y := m.a(x)) + m.scale * m.b(y)),
            **{"a": conv(2, 8), "b": conv(8, 8), "scale": nn.Parameter(torch.rand(8, 1, 1)), "head": pooled_head(8)},
        ),
        [8],
        False,
    ),
    "two-layer attention": (
        Case(
            encoder_attention, patch=conv(2, 8), mix=nn.MultiheadAttention(8, 4, batch_first=True), head=nn.Linear(8, 3)
        ),
        [4, 8],
        False,
    ),
    "attention by hand": (
        Case(
            two_step_attention,
            **{"patch": conv(2, 8), "q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "v": nn.Linear(8, 8)},
            **{"out": nn.Linear(8, 8), "head": nn.Linear(8, 3)},
        ),
        [4, 8, 8],
        False,
    ),
    "flatten of channels last": (
        Case(lambda m, x: m.head(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(2, 8), head=nn.Linear(8 * 16, 3)),
        [8],
        False,
    ),
    "shuffled": (
        Case(lambda m, x: m.head(F.channel_shuffle(m.a(x), 2) + m.a(x)), a=conv(2, 8), head=pooled_head(8)),
        [],
        True,
    ),
    "sorted": (Case(lambda m, x: m.head(m.a(x).sort(dim=1)[0]), a=conv(2, 8), head=pooled_head(8)), [], True),
    "cumulative": (Case(lambda m, x: m.head(m.a(x).cumsum(1)), a=conv(2, 8), head=pooled_head(8)), [], True),
    "constants": (
        Case(lambda m, x: m.head(m.a(x) + torch.arange(8.0)[:, None, None]), a=conv(2, 8), head=pooled_head(8)),
        [],
        True,
    ),
    "untraceable": (
        Case(lambda m, x: m.head(m.a(x) if x.sum() > 0 else -m.a(x)), a=conv(2, 8), head=pooled_head(8)),
        [],
        True,
    ),
    "outputs": (Case(lambda m, x: m.a(x), a=conv(2, 8)), [], False),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_of_operations(name: str) -> None:
    network, sizes, left = CASES[name]
    groups = assert_same_function(network, image(2, 4))
    assert sorted(group.size for group in groups) == sizes
    assert bool(groups.left_alone) == left, groups.left_alone


def planted(network: nn.Module, x: Tensor, count: int, *, noise: float) -> tuple[Groups, StateDict, Collection, dict]:
    """Permuted copies of a network with noise, in parts of each tensor's standard deviation; the permutations, too."""
    groups = permutation_groups(network, x)
    reference = {name: tensor.float() for name, tensor in random_state(network).items()}
    generator = torch.Generator().manual_seed(5)
    copies = {name: tensor.expand(count, *tensor.shape) for name, tensor in reference.items()}
    noisy = {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in copies.items()
        if tensor.numel() > count
    }
    permutations = random_permutations(groups, count)
    return groups, reference, permute(Collection(copies | noisy), groups, permutations), permutations


PLANTED = {
    "mlp": (deep_mlp, (1, 64)),
    "cnn": (lambda: build("cnn_small", pretrained=False, classes=10, channels=1, image_size=8), (1, 1, 8, 8)),
}
PLANTED["residual"] = (Residual, (1, 1, 8, 8))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_permutations_are_recovered(name: str) -> None:
    make, shape = PLANTED[name]
    torch.manual_seed(0)
    groups, reference, collection, permutations = planted(make(), torch.zeros(shape), 100, noise=0.01)
    aligned, found = align(collection, reference, groups)
    for group, expected in inverse(permutations).items():
        assert (found[group] == expected).all(dim=1).sum() == 100, group
    again, nothing = align(aligned, reference, groups)
    assert all(torch.equal(again.tensors[n], tensor) for n, tensor in aligned.tensors.items())
    assert all(torch.equal(rows, rows.sort(dim=1).values) for rows in nothing.values())


def test_a_residual_stream_through_square_weights() -> None:
    """Units that stand on both sides of one tensor: the step is linear in neither side alone."""
    network = Case(
        lambda m, x: m.head((y := m.a(x)) + m.b(y)), a=nn.Linear(6, 12), b=nn.Linear(12, 12), head=nn.Linear(12, 3)
    )
    groups, reference, collection, permutations = planted(network, torch.zeros(1, 6), 20, noise=0.01)
    assert [group.size for group in groups] == [12]
    assert torch.equal(
        align(collection, reference, groups)[1][groups.groups[0].name], inverse(permutations)["a.weight"]
    )


def trained(make, images: Tensor, labels: Tensor, seed: int) -> StateDict:
    torch.manual_seed(seed)
    network = make()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.state_dict()


@pytest.mark.parametrize("name", PLANTED)
def test_alignment_lowers_the_barrier(name: str) -> None:
    """Loss at the midpoint of two networks of different seeds, before and after; aligning again changes nothing.

    Small residual networks are no better connected once they are aligned: there, only their distance falls.
    BatchNorm normalises by the statistics of the images: the stored ones of two networks, averaged, are not those of
    their midpoint (Jordan et al. 2022, arXiv 2211.08403), which is why `generate.batchnorm: recompute` exists.
    """
    from sklearn.datasets import load_digits

    make, shape = PLANTED[name]
    digits = load_digits()
    images, labels = torch.tensor(digits.data[:300]).float() / 16, torch.tensor(digits.target[:300])
    images = images.reshape(-1, *shape[1:])
    states = [trained(make, images, labels, seed) for seed in range(3)]
    network = make()
    groups = permutation_groups(network, images[:1])
    collection = Collection.stack(states[1:])
    aligned, _ = align(collection, states[0], groups)
    losses = []
    for networks in (collection, aligned):
        middle = [{n: (t + states[0][n]) / 2 for n, t in state.items()} for state in networks]
        network.double().train()
        predicted = [functional_call(network, state_double(state), (images.double(),)) for state in middle]
        losses.append(sum(F.cross_entropy(logits, labels).item() for logits in predicted))
    apart, near = (
        sum(
            (tensor - states[0][n]).square().sum()
            for n, tensor in networks.tensors.items()
            if tensor.is_floating_point()
        )
        for networks in (collection, aligned)
    )
    assert near < apart and (name == "residual" or losses[1] < losses[0] / 2)
    again, _ = align(aligned, states[0], groups)
    assert all(torch.equal(again.tensors[n], tensor) for n, tensor in aligned.tensors.items())


def state_double(state: StateDict) -> StateDict:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def test_balance_undoes_random_scales() -> None:
    """Units scaled at random compute the same, and have one balanced form, whose two sides have equal norms."""
    network = deep_mlp()
    x = torch.randn(5, 64)
    groups = permutation_groups(network, x)
    assert all(group.balanceable for group in groups)
    state = random_state(network)
    scaled, generator = dict(state), torch.Generator().manual_seed(0)
    for row, column in ((0, 2), (2, 4)):
        scale = torch.rand(32, generator=generator, dtype=torch.float64) + 0.2
        scaled[f"{row}.weight"], scaled[f"{row}.bias"] = (
            scaled[f"{row}.weight"] * scale[:, None],
            scaled[f"{row}.bias"] * scale,
        )
        scaled[f"{column}.weight"] = scaled[f"{column}.weight"] / scale
    balanced, scales = balance(Collection.stack([state, scaled]), groups)
    assert scales.keys() == {group.name for group in groups}
    for name, tensor in balanced.tensors.items():
        torch.testing.assert_close(tensor[0], tensor[1], rtol=1e-4, atol=1e-6)
        assert name == "4.bias" or not torch.allclose(tensor[0], state[name])
    torch.testing.assert_close(outputs(network, balanced[0], x), outputs(network, state, x))
    incoming = torch.cat([balanced[0]["0.weight"], balanced[0]["0.bias"][:, None]], dim=1).norm(dim=1)
    torch.testing.assert_close(incoming, balanced[0]["2.weight"].norm(dim=0), rtol=1e-4, atol=1e-6)


def test_what_is_not_homogeneous_is_not_balanced() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3))
    groups = permutation_groups(network, torch.zeros(1, 4))
    assert len(groups) == 2 and not any(group.balanceable for group in groups)
    collection = Collection.stack([random_state(network)])
    assert all(torch.equal(t, collection.tensors[n]) for n, t in balance(collection, groups)[0].tensors.items())


def test_networks_do_not_depend_on_what_they_are_aligned_beside() -> None:
    """Whatever the others are, however many are aligned at a time; to the last bit."""
    network = deep_mlp()
    groups = permutation_groups(network, torch.zeros(1, 64))
    states = [random_state(network, seed) for seed in range(5)]
    reference = Reference(states[0], groups, balance=True, seed=0)
    poison = {name: torch.full_like(tensor, 1e6) for name, tensor in states[0].items()}
    beside, _ = reference.align(Collection.stack([*states, poison]))
    for k, state in enumerate(states):
        alone, _ = reference.align(Collection.stack([state]))
        assert all(torch.equal(alone.tensors[name][0], tensor) for name, tensor in beside[k].items()), k


def test_large_networks_are_aligned_few_at_a_time(monkeypatch) -> None:
    groups, _, collection, _ = planted(deep_mlp(), torch.zeros(1, 64), 7, noise=0.1)
    found = []
    for size in (2**30, 2 * sum(4 * tensor.numel() for tensor in collection[0].values())):
        monkeypatch.setattr("pdiff.method.alignment.reference.CHUNK_BYTES", size)
        reference = Reference.fit(collection, groups, balance=True, seed=0)
        found.append((len(list(reference.chunks(collection, torch.arange(7)))), *reference.align(collection)))
    (once, whole, whole_changes), (several, parts, parts_changes) = found
    assert (once, several) == (1, 4)
    assert all(torch.equal(rows, parts_changes.permutations[n]) for n, rows in whole_changes.permutations.items())
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor)


def matched_plainly(network: StateDict, reference: StateDict, groups: Groups, seed: int) -> dict[str, Tensor]:
    """Weight matching of one network as the paper writes it: every similarity anew, no step left out, in float64."""
    names = {place.name for group in groups for place in group.places}
    permuted = {name: {axis for group in groups for n, axis in group.axes() if n == name} for name in names}
    target = {name: (reference[name] / reference[name].square().mean()).double() for name in names}
    tolerances = {g.name: 1e-6 * sum(target[n].numel() for n in {place.name for place in g.places}) for g in groups}

    def similarity(state: StateDict, group: Group, sort: bool) -> Tensor:
        total = torch.zeros(group.size, group.size, dtype=torch.float64)
        for (name, axis), index in group.axes().items():
            sides = [target[name], state[name].double()]
            for other in sorted(permuted[name] - {axis}) if sort else ():
                sides = [side.sort(dim=other).values for side in sides]
            a, b = (side.movedim(axis, 0)[index].flatten(1) for side in sides)
            total += a @ b.T
        return total

    def best(matrix: Tensor) -> Tensor:
        return torch.from_numpy(linear_sum_assignment(matrix.numpy(), maximize=True)[1])

    def objective(state: StateDict) -> float:
        return sum((state[name].double() * target[name]).sum().item() for name in names)

    def moved(state: StateDict, permutations: dict[str, Tensor]) -> StateDict:
        return permute(Collection.stack([state]), groups, permutations)[0]

    identity = {group.name: torch.arange(group.size) for group in groups}
    found, reached = identity, -math.inf
    for k, start in enumerate((identity, {group.name: best(similarity(network, group, True)) for group in groups})):
        permutations, state, before = dict(start), moved(network, start), None
        generator = torch.Generator().manual_seed(stream(seed, k))
        while before is None or any(not torch.equal(before[name], rows) for name, rows in permutations.items()):
            before = dict(permutations)
            for group in (groups.groups[j] for j in torch.randperm(len(groups), generator=generator)):
                step = best(similarity(state, group, False))
                after = moved(state, {group.name: step})
                if objective(after) - objective(state) > tolerances[group.name]:
                    state, permutations[group.name] = after, permutations[group.name][step]
        if objective(state) > reached + 1e-6 * sum(tensor.numel() for tensor in target.values()):
            found, reached = permutations, objective(state)
    return found


def square() -> nn.Module:
    """A stream that stands on both sides of one weight, beside a layer whose units stand alone."""
    return Case(
        lambda m, x: m.head(m.up((y := m.a(x)) + m.b(y)).relu()),
        **{"a": nn.Linear(6, 12), "b": nn.Linear(12, 12), "up": nn.Linear(12, 16), "head": nn.Linear(16, 3)},
    )


DESCENTS = {"mlp": (deep_mlp, (1, 64)), "residual": (Residual, (1, 1, 8, 8)), "square": (square, (1, 6))}
DESCENTS["resnet"] = (
    lambda: build("resnet_mini", pretrained=False, classes=10, channels=3, image_size=16),
    (1, 3, 16, 16),
)


@pytest.mark.parametrize("name", DESCENTS)
def test_what_is_left_out_of_the_descent_changes_nothing(name: str) -> None:
    """Independent networks, alone and beside others, reach what a descent reaches that computes everything anew."""
    make, shape = DESCENTS[name]
    states = []
    for seed in range(6):
        torch.manual_seed(seed)
        states.append(random_state(make(), seed))
    groups = permutation_groups(make(), torch.zeros(shape))
    _, together = align(Collection.stack(states[1:]), states[0], groups, seed=4)
    for k, state in enumerate(states[1:]):
        _, alone = align(Collection.stack([state]), states[0], groups, seed=4)
        for group, expected in matched_plainly(state, states[0], groups, 4).items():
            assert torch.equal(together[group][k], expected), (k, group)
            assert torch.equal(alone[group][0], expected), (k, group)


def test_aligned_networks_are_written_where_large_tensors_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To files, network by network, with the numbers that they have in memory."""
    groups, _, collection, _ = planted(deep_mlp(), torch.zeros(1, 64), 7, noise=0.1)
    reference = Reference.fit(collection, groups, balance=False, seed=0)
    expected, _ = reference.align(collection)
    monkeypatch.setattr("pdiff.method.alignment.reference.CHUNK_BYTES", 1)
    monkeypatch.setattr(files, "SCRATCH_BYTES", 1)
    made, mapped = [], files._mapped
    monkeypatch.setattr(files, "_mapped", lambda *arguments: made.append(arguments[2]) or mapped(*arguments))
    with files.scratch_folder(tmp_path):
        found, _ = reference.align(collection)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    size = sum(tensor.numel() * tensor.element_size() for tensor in expected.tensors.values())
    assert len(made) == 1 and size <= made[0] < size + files.SCRATCH_ALIGNMENT * len(expected.tensors)


def test_balanced_alignment_sees_through_scales() -> None:
    groups, reference, collection, permutations = planted(deep_mlp(), torch.zeros(1, 64), 5, noise=0.0)
    name, scale = groups.groups[0].name, torch.linspace(0.1, 10, 32)
    tensors = dict(collection.tensors)
    tensors["0.weight"], tensors["0.bias"] = tensors["0.weight"] * scale[:, None], tensors["0.bias"] * scale
    tensors["2.weight"] = tensors["2.weight"] / scale
    _, found = Reference(reference, groups, balance=True, seed=0).align(Collection(tensors))
    assert torch.equal(found.permutations[name], inverse(permutations)[name])


@pytest.mark.parametrize("balanced", [False, True])
def test_a_reference_gives_networks_back_as_they_came(tmp_path, balanced) -> None:
    """Also from a file; aligned networks compute what they did, and are aligned to the mean of their own."""
    network, x = deep_mlp(), torch.randn(16, 64)
    groups = permutation_groups(network, torch.zeros(1, 64))
    collection = Collection.stack([random_state(network, seed) for seed in range(6)])
    reference = Reference.fit(collection, groups, balance=balanced, seed=0)
    aligned, changes = reference.align(collection)
    for before, after in zip(collection, aligned, strict=True):
        torch.testing.assert_close(outputs(network, after, x), outputs(network, before, x), rtol=1e-4, atol=1e-4)
    again, nothing = reference.align(aligned)
    assert all(torch.equal(p, torch.arange(p.shape[1]).expand_as(p)) for p in nothing.permutations.values())
    for name, tensor in again.tensors.items():
        torch.testing.assert_close(tensor, aligned.tensors[name], rtol=1e-4, atol=1e-5)
    reference.save(tmp_path / "alignment.safetensors", changes)
    read, of_file = Reference.load(tmp_path / "alignment.safetensors", groups, balance=balanced, seed=0)
    assert all(torch.equal(read.state[name], tensor) for name, tensor in reference.state.items())
    for name, tensor in of_file.undo(aligned, groups).tensors.items():
        torch.testing.assert_close(tensor, collection.tensors[name], rtol=1e-5, atol=1e-6)
        assert balanced or torch.equal(tensor, collection.tensors[name])


def test_the_mean_of_aligned_networks_is_nearer_than_that_of_networks_as_they_come() -> None:
    """Planted: permuted copies with noise have a mean without that noise only in one order of units."""
    groups, _, collection, _ = planted(deep_mlp(), torch.zeros(1, 64), 12, noise=0.1)
    aligned, _ = Reference.fit(collection, groups, balance=False, seed=0).align(collection)
    apart = sum(tensor.var(0).sum() for tensor in collection.tensors.values())
    together = sum(tensor.var(0).sum() for tensor in aligned.tensors.values())
    assert together < 0.2 * apart


def test_a_part_of_the_tensors_is_left_alone() -> None:
    network = deep_mlp()
    groups = permutation_groups(network, torch.zeros(1, 64))
    part = [name for name in network.state_dict() if name != "0.bias"]
    within = groups.within(part)
    assert [group.name for group in within] == ["2.weight"]
    assert within.left_alone.keys() == {"0.weight", "2.weight"} and "0.bias" in within.left_alone["0.weight"]
    collection = Collection({name: torch.randn(3, *network.state_dict()[name].shape) for name in part})
    aligned, permutations = align(collection, collection[0], groups)
    assert permutations.keys() == {"2.weight"} and torch.equal(
        aligned.tensors["0.weight"], collection.tensors["0.weight"]
    )
    nothing, none = align(Collection({"4.bias": torch.randn(3, 10)}), {"4.bias": torch.zeros(10)}, groups)
    assert not none and len(nothing) == 3


def test_mistaken_permutations_are_refused() -> None:
    network = deep_mlp()
    groups, collection = permutation_groups(network, torch.zeros(1, 64)), Collection.stack([network.state_dict()])
    for wrong in (torch.zeros(32, dtype=torch.int64), torch.arange(31)):
        with pytest.raises(ValueError, match="permutations of 32 units"):
            permute(collection, groups, {"0.weight": wrong})
    with pytest.raises(ValueError, match="nothing"):
        permute(collection, groups, {"nothing": torch.arange(32)})


def test_recombined_units_come_from_one_parent_each() -> None:
    """Parent p holds the number p everywhere, so that every number says where it comes from."""
    network = deep_mlp()
    groups = permutation_groups(network, torch.zeros(1, 64))
    rows = torch.arange(6.0)
    collection = Collection(
        {n: rows.reshape(-1, *[1] * t.ndim).expand(6, *t.shape) for n, t in network.state_dict().items()}
    )
    parents = torch.tensor([[0, 1, 2], [3, 4, 5], [5, 5, 5], [2, 0, 4]])
    mixed = recombine(collection, parents, groups, seed=0).tensors
    for rows_of, bias in (("0.weight", "0.bias"), ("2.weight", "2.bias")):
        assert torch.equal(mixed[rows_of], mixed[bias][:, :, None].expand_as(mixed[rows_of]))
    assert torch.equal(mixed["4.weight"], mixed["2.bias"][:, None, :].expand_as(mixed["4.weight"]))
    assert torch.equal(mixed["4.bias"], parents[:, :1].float().expand(4, 10))
    assert not torch.equal(mixed["0.bias"], mixed["2.bias"])
    for k, chosen in enumerate(mixed["0.bias"]):
        assert set(chosen.tolist()) == set(parents[k].tolist())
    assert all(torch.equal(t, mixed[n]) for n, t in recombine(collection, parents, groups, seed=0).tensors.items())
    assert not torch.equal(recombine(collection, parents, groups, seed=1).tensors["0.bias"], mixed["0.bias"])


@pytest.mark.parametrize("name", ["mlp_deep", "resnet8"])
def test_matching_to_one_reference_of_each_is_matching_to_each(name: str) -> None:
    channels, size = SMALL[name]
    network = build(name, pretrained=False, classes=10, channels=channels, image_size=size)
    groups = permutation_groups(network, image(channels, size))
    references, networks = (
        Collection.stack([random_state(network, 4 * k + seed) for seed in range(4)]) for k in (0, 1)
    )
    together = Matching(references.tensors, groups, seed=3).best(networks.tensors)
    for k in range(4):
        _, alone = align(networks.select([k]), references[k], groups, seed=3)
        assert all(torch.equal(together[group][k], rows[0]) for group, rows in alone.items())


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_noisy_copies_in_another_order_find_their_originals(noise: float) -> None:
    """At the distance of their noise; networks of their own, and the others of the originals, are far away."""
    network = build("resnet8", pretrained=False, classes=10, channels=1, image_size=8)
    groups = permutation_groups(network, image(1, 8))
    seeds = range(9), (20, 21)
    originals, others = (Collection.stack([random_state(network, seed) for seed in some]) for some in seeds)
    reference = Reference.fit(originals, groups, balance=False, seed=0)
    fitted, _ = reference.align(originals)
    standardizer = Standardizer.fit(fitted)
    generator = torch.Generator().manual_seed(1)
    sigma = {n: noise * t.float().std() for n, t in fitted.tensors.items() if t.is_floating_point()}
    noisy = dict(fitted.tensors)
    for n, deviation in sigma.items():
        noisy[n] = noisy[n] + deviation * torch.randn(noisy[n].shape, generator=generator)
    apart = standardizer.encode(Collection(noisy)) - standardizer.encode(fitted)
    copies = permute(Collection(noisy), groups, random_permutations(groups, 9, 5)).select([4, 7, 1])
    measured = Originals(fitted, reference, standardizer).distances(reference.align(copies)[0])
    torch.testing.assert_close(measured, apart[[4, 7, 1]].square().mean(1).sqrt(), rtol=1e-4, atol=1e-6)
    far = Originals(fitted, reference, standardizer).distances(reference.align(others)[0])
    assert far.min() > 0.5 and far.min() > 2 * measured.max()
