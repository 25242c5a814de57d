"""Labels of a graph's nodes as records: what a node's direction says, beside random vectors and beside its ablation."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from circuit_lens.errors import PatchscopeError
from circuit_lens.graph.rates import Rate, finite
from circuit_lens.patchscopes.metrics import says

Kind = Literal["feature", "supernode", "residual"]


@dataclass(frozen=True)
class Candidate:
    """One token that may name a node.

    Attributes:
        target: The target prompt that it was read by.
        after: What the node had the target say before it; "" for the next token.
        token, text: The token.
        probability: Its probability with the node's vector at the placeholder, after ``after``.
        margin: Its log-probability, less the mean of random vectors of the same length at the same place, in nats.
        p_value: (1 + random vectors that give it at least this log-probability) / (1 + all). The label was chosen for
            this vector, so any vector's own label tends to have a small one.
        p_margin: The same of the margin, compared with the margins of the random vectors' own most probable tokens:
            whether the node says something more its own than random vectors do.
        clean: Its probability at the last position of the graph's prompt.
        drop: By how much ablating the node lowers that; None: nothing was ablated.
        drop_nats: The same of its log-probability, which can be read where the probability is small.
        p_drop: (1 + random sets of as many other active features whose ablation lowers it as much) / (1 + all); None:
            there are not so many.
        peak_pos: The position, from the node's own on, at which the clean run gives the label most.
        peak: Its probability there.
        peak_drop: By how much ablating the node lowers that.
    """

    target: str
    after: str
    token: int
    text: str
    probability: float
    margin: float
    p_value: float
    p_margin: float
    clean: float
    drop: float | None = None
    drop_nats: float | None = None
    p_drop: float | None = None
    peak_pos: int = 0
    peak: float = 0.0
    peak_drop: float | None = None

    def __str__(self) -> str:
        drop = "" if self.drop is None else f"  drop {self.drop:+.4f} of {self.clean:.4f}, {self.drop_nats:+.2f} nats"
        rank = "" if self.p_drop is None else f" (p {self.p_drop:.2f})"
        after = f"{self.after} " if self.after else ""
        return (
            f"{after}[{self.text.strip()}] {self.probability:.3f}  margin {self.margin:+.2f} (p {self.p_value:.2f}, "
            f"own {self.p_margin:.2f}){drop}{rank}  by {self.target}"
        )


@dataclass(frozen=True)
class NodeLabel:
    """A node and the tokens that may name it, the largest margin first.

    Attributes:
        node: Its name.
        kind: What it is.
        layer, pos: Of a feature or residual; of a supernode the first of its members'.
        given: What the graph calls it; "" for nothing.
        size: Features that are active on the prompt and were ablated; 0: none.
        candidates: At least one.
    """

    node: str
    kind: Kind
    layer: int
    pos: int
    given: str
    size: int
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate with the largest margin."""
        return self.candidates[0]

    @property
    def label(self) -> str:
        """Its text."""
        return self.best.text.strip()

    @property
    def agrees(self) -> bool | None:
        """Whether the graph's own label has this one as whole words; None where there is none to compare."""
        return says(self.given, self.label) if self.given.strip() and self.label else None

    def __str__(self) -> str:
        given = f" [{self.given}]" if self.given else ""
        return "\n".join([f"{self.node}{given}: {self.label!r}", *(f"    {one}" for one in self.candidates)])


@dataclass(frozen=True, eq=False, repr=False)
class NodeLabels:
    """Labels of nodes of a graph.

    Attributes:
        labels: One for each node, in the order asked for.
        prompt: The graph's prompt.
        n_random: Random vectors, and random ablations.
        settings: How it was made.
        notes: What a user must know.
    """

    labels: tuple[NodeLabel, ...]
    prompt: str
    n_random: int
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[NodeLabel]:
        return iter(self.labels)

    def __getitem__(self, node: int | str) -> NodeLabel:
        """Return one by number, or by the node's name.

        Raises:
            PatchscopeError: No such node.
        """
        if isinstance(node, int) and -len(self) <= node < len(self):
            return self.labels[node]
        found = [one for one in self.labels if one.node == node]
        if len(found) != 1:
            raise PatchscopeError(
                f"{node!r} names {len(found)} of the labels, which are of {[one.node for one in self.labels[:20]]}"
            )
        return found[0]

    @property
    def agreement(self) -> Rate:
        """How many labels are among the words of the graph's own, where it has any."""
        return Rate.of(bool(one.agrees) for one in self.labels if one.agrees is not None)

    @property
    def lowered(self) -> Rate:
        """How many labels' probability at the last position sinks when the node is ablated, of those ablated."""
        return Rate.of(one.best.drop > 0 for one in self.labels if one.best.drop is not None)

    def records(self) -> list[dict[str, Any]]:
        """Return a line for each node and candidate: names, probabilities, margins, p-values and drops."""
        lines = []
        for one in self.labels:
            about = {"node": one.node, "kind": one.kind, "layer": one.layer, "pos": one.pos, "given": one.given}
            for rank, candidate in enumerate(one.candidates):
                figures = {k: finite(v) if isinstance(v, float) else v for k, v in vars(candidate).items()}
                lines.append(about | {"size": one.size, "rank": rank} | figures)
        return lines

    _HEAD = ("node", "label", "prob.", "margin", "p", "own p", "at the end", "drop", "nats", "drop p", "graph's label")

    def _table(self) -> list[tuple[str, ...]]:
        rows = []
        for one in self.labels:
            best = one.best
            drop = "" if best.drop is None else f"{best.drop:+.4f}"
            nats = "" if best.drop_nats is None else f"{best.drop_nats:+.2f}"
            rank = "" if best.p_drop is None else f"{best.p_drop:.2f}"
            rows.append((
                one.node, one.label, f"{best.probability:.3f}", f"{best.margin:+.2f}", f"{best.p_value:.2f}",
                f"{best.p_margin:.2f}", f"{best.clean:.4f}", drop, nats, rank,
                "" if one.given == one.node else one.given,
            ))  # fmt: skip
        return rows

    def __str__(self) -> str:
        table = [self._HEAD, *self._table()]
        widths = [max(len(row[i]) for row in table) for i in range(len(self._HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        lines = [f"Labels of {len(self)} nodes of {self.prompt!r}", *(line.rstrip() for line in lines)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self._HEAD)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self._table())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<p>{html.escape(self.prompt)}</p>{table}{notes}"
