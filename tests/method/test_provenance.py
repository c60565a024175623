"""Where networks come from: populations whose making is known, from random walks, trunks and initialisations."""

import pytest
import torch

from pdiff.method.collection import Collection
from pdiff.method.provenance import SKETCH, Provenance, connected, sketches

SHAPES = {"a.weight": (30, 20), "a.bias": (30,), "b.weight": (50, 30), "norm.weight": (50,)}
D = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def networks(rows: torch.Tensor) -> Collection:
    """Vectors (N, D) as networks; biases and norms are of another scale, and there is a constant and a counter."""
    parts = rows.split([torch.Size(shape).numel() for shape in SHAPES.values()], dim=1)
    tensors = {n: part.reshape(-1, *shape) for (n, shape), part in zip(SHAPES.items(), parts, strict=True)}
    tensors["norm.weight"] = 50 + 10 * tensors["norm.weight"]
    more = {"frozen.weight": torch.ones(len(rows), 40, 40), "steps": torch.arange(len(rows))}
    return Collection(tensors | more)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def independent(count: int = 12) -> torch.Tensor:
    return noise(count, seed=0)


def walk(count: int = 20, step: float = 0.1, seed: int = 1) -> torch.Tensor:
    return noise(seed=seed) + step * noise(count, seed=seed + 100).cumsum(dim=0)


def line(count: int = 10) -> torch.Tensor:
    return noise(seed=0) + torch.linspace(0, 1, count)[:, None] * noise(seed=1) + 1e-3 * noise(count, seed=2)


def slowing(count: int = 15) -> torch.Tensor:
    return noise(seed=0) + (0.6 ** torch.arange(count))[:, None] * noise(seed=1) + 0.01 * noise(count, seed=2).cumsum(0)


def branches(count: int = 12) -> torch.Tensor:
    return noise(seed=0) + 0.2 * noise(count, seed=1)


def snapshots(count: int = 6, each: int = 4, common: float = 0.0) -> torch.Tensor:
    """Snapshots of branches, which leave the trunk in directions of their own, and in a common one."""
    own, way = noise(count, 1, seed=1), torch.linspace(0.3, 1, each)[:, None]
    return (noise(seed=0) + 0.2 * way * own + common * way * noise(seed=2)).flatten(0, 1)


def zoo(count: int = 4, each: int = 5) -> torch.Tensor:
    return torch.cat([walk(each, seed=k) for k in range(count)])


def runs_of(count: int, each: int) -> list[int]:
    return [k for k in range(count) for _ in range(each)]


@pytest.mark.parametrize(
    ("rows", "kind", "possible", "origins", "runs"),
    [
        (independent(), "seeds", ("seeds",), 12, list(range(12))),
        (independent(2), "seeds", ("seeds",), 2, [0, 1]),
        (independent() + 0.9 * noise(seed=5), "seeds", ("branches", "seeds"), 12, list(range(12))),
        (zoo(), "seeds", ("seeds",), 4, runs_of(4, 5)),
        (zoo().unflatten(0, (4, 5)).transpose(0, 1).flatten(0, 1), "seeds", ("seeds",), 4, [*range(4)] * 5),
        (branches(), "branches", ("branches", "trajectory"), 1, list(range(12))),
        (snapshots(), "branches", ("branches",), 1, runs_of(6, 4)),
        (snapshots(common=0.5), "branches", ("branches",), 1, runs_of(6, 4)),
        (walk(), "trajectory", ("trajectory",), 1, [0] * 20),
        (walk(6), "trajectory", ("trajectory",), 1, [0] * 6),
        (line(), "trajectory", ("trajectory",), 1, [0] * 10),
        (slowing(), "trajectory", ("trajectory",), 1, [0] * 15),
        (walk()[torch.randperm(20, generator=torch.Generator().manual_seed(0))], "files", None, 1, list(range(20))),
        (branches(2), "files", ("branches", "trajectory"), 1, [0, 1]),
    ],
    ids=[
        *("seeds", "two", "aligned", "zoo", "interleaved", "branches", "snapshots", "common"),
        *("walk", "short", "line", "slowing", "shuffled", "pair"),
    ],
)
def test_what_was_made_is_recognised(rows, kind, possible, origins, runs):
    found = Provenance.of(networks(rows))
    assert (found.kind, found.origins, found.runs) == (kind, origins, runs), found.describe()
    assert found.possible == (possible or ("branches", "trajectory")), found.describe()


def test_the_order_of_a_random_walk_is_that_of_von_neumann():
    found = Provenance.of(networks(walk(50)))
    assert found.order == pytest.approx(
        3 / 51, rel=0.1
    )  # E|x_i - x_j|^2 = |i - j|, whose mean over pairs is (N + 1) / 3
    assert Provenance.of(networks(branches(50))).order == pytest.approx(1, abs=0.05)
    assert "0.06 of that of any two of one initialisation" in found.describe()


def test_equal_networks_count_once_and_are_of_one_training():
    rows = independent()
    found = Provenance.of(networks(torch.cat([rows, rows[[3, 3, 0]]])))
    assert found.kind == "seeds" and found.origins == 12 and found.figures()["different"] == 12
    assert found.equal == [*range(12), 3, 3, 0] and found.runs == [*range(12), 3, 3, 0]
    assert found.digests[3] == found.digests[12] == found.digests[13] != found.digests[0]


def test_without_matrices_seeds_are_not_excluded():
    def norms(rows):
        return Collection({"norm.weight": 1 + 0.1 * rows[:, :500]})

    found = Provenance.of(norms(independent()))
    assert found.kind == "files" and "seeds" in found.possible and found.figures()["cosine"] is None
    assert Provenance.of(norms(walk())).kind == "trajectory"


def test_sketches_keep_cosines():
    rows = noise(40, seed=3)
    matrices, everything = sketches(networks(rows))
    chosen = torch.cat([rows[:, :600], rows[:, 630:2130]], dim=1)
    exact = torch.nn.functional.normalize(chosen) @ torch.nn.functional.normalize(chosen).T
    found = torch.nn.functional.normalize(matrices) @ torch.nn.functional.normalize(matrices).T
    assert (found - exact).std() < 1.2 / SKETCH**0.5 and found.diagonal().allclose(torch.ones(40))
    small = networks(rows).tensors
    matrices, everything = sketches(Collection({"a.weight": small["a.weight"], "a.bias": small["a.bias"]}))
    scaled = small["a.weight"].flatten(1) / small["a.weight"].square().mean().sqrt()
    torch.testing.assert_close(matrices @ matrices.T, scaled @ scaled.T, rtol=1e-3, atol=1e-2)
    assert (everything - matrices).abs().sum(dim=0).count_nonzero() == 30


def test_components_against_a_search_of_the_graph():
    directions = torch.nn.functional.normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)))
    linked = (directions @ directions.T).abs() >= 0.99
    reach = linked.clone()
    for _ in range(6):
        reach = (reach.float() @ reach.float()) > 0
    found = connected(directions, 0.99, opposite=True)
    assert torch.equal(found[:, None] == found, reach) and 3 < len(found.unique()) < 60
