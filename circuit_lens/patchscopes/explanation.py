"""What was found when directions were explained: all rows of the search, the best of each, and the controls."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from circuit_lens.errors import PatchscopeError, nearest
from circuit_lens.graph.records import Records
from circuit_lens.patchscopes.result import PatchscopeResult

LEVEL = 0.05
"""The largest p, and the largest share of random directions that say the same, at which something is different."""


@dataclass(frozen=True)
class Explained:
    """One row of the search.

    Attributes:
        item: What was moved.
        target_layer: Where to.
        scale, norm: Its length, in units of the target layer and as it is.
        text: What was generated; the most probable token if nothing was.
        token, probability: The most probable first token.
        entropy: Of the first token, in nats.
        self_similarity: Cosine of the last position's residual stream with the direction.
        score: What rows are ranked by.
    """

    item: str
    target_layer: int
    scale: float
    norm: float
    text: str
    token: str
    probability: float
    entropy: float
    self_similarity: float
    score: float

    def __str__(self) -> str:
        return (
            f"{self.score:+.3f}  L{self.target_layer} × {self.scale:<5g} entropy {self.entropy:5.2f}  "
            f"similarity {self.self_similarity:+.3f}  {self.text!r}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What a model says that directions mean, and how well that stands beside random directions.

    Attributes:
        items: The directions.
        n_random: Random directions, which stand behind the items in all arrays.
        alpha: Weight of the self-similarity.
        read_layer: The layer that it is read after.
        units: The length of scale 1, by layer.
        result: Everything that was said.
        self_similarity, entropy, score: Of every row, by direction, target layer and scale; entropy in nats.
        notes: What a user must know.
    """

    items: tuple[str, ...]
    n_random: int
    alpha: float
    read_layer: int
    units: Mapping[int, float]
    result: PatchscopeResult
    self_similarity: Float[ndarray, "n_rows n_layers n_scales"]
    entropy: Float[ndarray, "n_rows n_layers n_scales"]
    score: Float[ndarray, "n_rows n_layers n_scales"]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def text(self) -> str:
        """The best text of the first direction."""
        return self.best().text

    @property
    def texts(self) -> tuple[str, ...]:
        """The best text of every direction."""
        return tuple(self.best(i).text for i in range(len(self)))

    def _item(self, item: int | str) -> int:
        """Return the number of one of the directions; the random ones are none of them.

        Raises:
            PatchscopeError: No such direction, or several of that name.
        """
        found = [i for i, name in enumerate(self.items) if name == item] if isinstance(item, str) else [item]
        if len(found) != 1 or not -len(self) <= found[0] < len(self):
            what = f"names {len(found)} directions" if isinstance(item, str) else "does not exist"
            hint = nearest(item, self.items) if isinstance(item, str) else ""
            raise PatchscopeError(f"{item!r} {what}; there are {len(self)}, numbered from 0{hint}")
        return found[0] % len(self)

    @property
    def _layers(self) -> tuple[int, ...]:
        assert not isinstance(self.result.target_layers, str), "directions belong to no layer"
        return self.result.target_layers

    def _row(self, row: int, layer: int, scale: int) -> Explained:
        at = (row, 0, layer, scale)
        top = self.result.top_tokens[at][0]
        number, times = self._layers[layer], self.result.scales[scale]
        return Explained(
            item=self.result.items[row],
            target_layer=number,
            scale=times,
            norm=times * self.units[number],
            text=self.result.texts[at] or top,
            token=top,
            probability=float(self.result.patched.top_logprobs[at][0].exp()),
            entropy=float(self.entropy[row, layer, scale]),
            self_similarity=float(self.self_similarity[row, layer, scale]),
            score=float(self.score[row, layer, scale]),
        )

    def _best(self, row: int) -> tuple[int, int]:
        layer, scale = np.unravel_index(int(self.score[row].argmax()), self.score[row].shape)
        return int(layer), int(scale)

    def rows(self, item: int | str = 0, n: int | None = None) -> Records[Explained]:
        """Return the rows of a direction, the best first; at most n."""
        row = self._item(item)
        order = np.argsort(-self.score[row], axis=None, kind="stable")[:n]
        cells = zip(*np.unravel_index(order, self.score[row].shape), strict=True)
        return Records(self._row(row, int(layer), int(scale)) for layer, scale in cells)

    def best(self, item: int | str = 0) -> Explained:
        """Return the row of a direction with the largest score."""
        row = self._item(item)
        return self._row(row, *self._best(row))

    # Controls

    @property
    def unpatched(self) -> str:
        """What the prompt says without a patch."""
        wording = self.result.wording
        said = str(wording.texts(self.result.unpatched)[0])
        return said or str(wording.tops(self.result.unpatched)[0, 0])

    def random(self, item: int | str = 0) -> Records[Explained]:
        """Return what the random directions say in the cell that is best for a direction."""
        row = self._item(item)
        return Records(self._row(len(self) + i, *self._best(row)) for i in range(self.n_random))

    def random_best(self) -> Records[Explained]:
        """Return the best row of every random direction."""
        return Records(self._row(row, *self._best(row)) for row in range(len(self), len(self) + self.n_random))

    def p_value(self, item: int | str = 0) -> float | None:
        """Return (1 + random directions whose best score is at least this one's) / (1 + all); None without any."""
        best = self.best(item).score
        if not self.n_random:
            return None
        return (1 + sum(one.score >= best for one in self.random_best())) / (1 + self.n_random)

    def reasons(self, item: int | str = 0) -> tuple[str, ...]:
        """Return why the best row of a direction is not different from the controls; empty where it is."""
        best, p, found = self.best(item), self.p_value(item), []
        if best.text == self.unpatched:
            found.append("the prompt says the same without a patch")
        if p is None:
            return tuple(found)
        if p > LEVEL:
            better = round(p * (1 + self.n_random)) - 1
            found.append(
                f"{better} of {self.n_random} random directions reach its score in the same search (p = {p:.2f})"
                if better
                else f"{self.n_random} random directions are too few for p <= {LEVEL:g}"
            )
        same = sum(one.text == best.text for one in self.random(item))
        if same > LEVEL * self.n_random:
            found.append(f"{same} of {self.n_random} random directions say the same there")
        return tuple(found)

    def different(self, item: int | str = 0) -> bool | None:
        """Return whether the best row is different from the controls; None where no random direction was tried."""
        if self.reasons(item):
            return False
        return True if self.n_random else None

    # Forms

    def records(self) -> list[dict[str, Any]]:
        """Return a line for each row of the search, those of random directions marked, with p where it is the best."""
        lines = []
        for row in range(len(self.result.items)):
            chosen = self._best(row)
            for layer, scale in np.ndindex(*self.score.shape[1:]):
                best = (layer, scale) == chosen
                p = self.p_value(row) if best and row < len(self) else None
                lines.append(vars(self._row(row, layer, scale)) | {"random": row >= len(self), "best": best, "p": p})
        return lines

    def _verdict(self, item: int) -> str:
        reasons, p = self.reasons(item), self.p_value(item)
        if reasons:
            return f"NOT different from the controls: {'; '.join(reasons)}"
        if p is None:
            return "not compared with random directions (n_random=0)"
        return f"different from {self.n_random} random directions in the same search (p = {p:.2f}) and from no patch"

    def __str__(self) -> str:
        said = (
            f"score = {self.alpha:g} · self-similarity (layer {self.read_layer}) - {1 - self.alpha:g} · entropy / max"
        )
        lines = [f"target {self.result.targets[0]!r}; {said}", *(f"note: {note}" for note in self.notes)]
        for i, name in enumerate(self.items):
            lines += [f"{name}: {self.best(i).text!r}", f"  {self._verdict(i)}"]
            lines += [f"  {row}" for row in self.rows(i, 5)]
            lines += [f"  random there: {', '.join(repr(one.text) for one in self.random(i)[:5])}"] * (
                self.n_random > 0
            )
        return "\n".join([*lines, f"unpatched: {self.unpatched!r}"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<p>target <code>{html.escape(self.result.targets[0])}</code></p>"]
        parts += [f"<p>{html.escape(note)}</p>" for note in self.notes]
        head = "".join(f"<th>{name}</th>" for name in ("layer", "scale", "score", "entropy", "self-similarity", "says"))
        for i, name in enumerate(self.items):
            rows = "".join(
                f"<tr><td>{r.target_layer}</td><td>{r.scale:g}</td><td>{r.score:.3f}</td><td>{r.entropy:.2f}</td>"
                f"<td>{r.self_similarity:.3f}</td><td>{html.escape(r.text)}</td></tr>"
                for r in self.rows(i)
            )
            verdict = html.escape(self._verdict(i))
            parts.append(
                f"<p><b>{html.escape(name)}</b>: {html.escape(self.best(i).text)}<br>{verdict}</p>"
                f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            )
        return "".join([*parts, f"<p>unpatched: {html.escape(self.unpatched)}</p>"])
