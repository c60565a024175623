"""A small evaluation, and a parser of pages: what tests of figures, reports and leaderboards need."""

from html.parser import HTMLParser

import pandas as pd

MEASURES = ["val_accuracy", "test_accuracy", "max_similarity", "nearest_distance"]
ACCURACIES = {
    "original": [0.90, 0.92, 0.94],
    "generated": [0.93, 0.95],
    "noise_0.05": [0.80, 0.85, 0.87],
    "average": [0.945],
    "gaussian": [0.91, 0.97],
}


def evaluation() -> pd.DataFrame:
    """Five groups; on test images every accuracy is lower by 0.01."""
    rows = [
        (group, index, accuracy, accuracy - 0.01, accuracy - 0.1, 2.5)
        for group, accuracies in ACCURACIES.items()
        for index, accuracy in enumerate(accuracies)
    ]
    return pd.DataFrame(rows, columns=["group", "index", *MEASURES])


def history(steps: int = 5) -> pd.DataFrame:
    """A falling loss and a held-out loss of one part, a loss of another that reaches 0, and no loss."""
    names = ["diffusion/loss", "diffusion/heldout_loss", "autoencoder/loss", "pretrain/val_accuracy"]
    rows = [(n, s, 1 - s / (steps - 1) + (n != "autoencoder/loss")) for n in names for s in range(steps)]
    return pd.DataFrame(rows, columns=["name", "step", "value"])


def trajectory() -> pd.DataFrame:
    """Two samples at three timesteps."""
    rows = [(t, index, 0.9 - t / 10 - index / 10, 0.8 - t / 10) for t in (2.0, 1.0, 0.0) for index in (0, 1)]
    return pd.DataFrame(rows, columns=["timestep", "index", "val_accuracy", "test_accuracy"])


class Page(HTMLParser):
    """What a page consists of: its tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)
