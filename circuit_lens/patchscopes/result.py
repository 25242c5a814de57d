"""The result of a grid, with named axes: item, source layer, target layer, scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from circuit_lens.errors import PatchscopeError, nearest
from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.axes import Measure
from circuit_lens.patchscopes.given import whole
from circuit_lens.patchscopes.metrics import Accuracy, Answer, How, best_fixed, says
from circuit_lens.patchscopes.readout import Readout, Wording

if TYPE_CHECKING:
    import pandas

    from circuit_lens.viewer.heatmap import HeatMap


@dataclass(frozen=True)
class Patched:
    """What one cell of a grid says.

    Attributes:
        item: Name of what was moved.
        source_layer, target_layer, scale: From where to where, how long.
        text: What was generated; "" if nothing was.
        top: The most probable next tokens, with their probabilities.
        entropy: Of the next token, in nats.
    """

    item: str
    source_layer: int | None
    target_layer: int
    scale: float
    text: str
    top: tuple[tuple[str, float], ...]
    entropy: float

    def __str__(self) -> str:
        source = "" if self.source_layer is None else f" layer {self.source_layer}"
        next_ = "  ".join(f"{token!r} {share:.3f}" for token, share in self.top[:5])
        said = f"\n  says {self.text!r}" if self.text else ""
        return f"{self.item}{source} → layer {self.target_layer} × {self.scale:g}{said}\n  next {next_}"


@dataclass(frozen=True, eq=False)
class PatchscopeResult:
    """What the target prompts say, for every item, source layer, target layer and scale.

    Attributes:
        items: Names of what was moved.
        source_layers: Layer -1 is the embedding; (None,) for vectors of no layer.
        target_layers: Layers, or "same": each source layer into itself, an axis of length 1.
        scales: What the moved vectors are multiplied with.
        patched: What the runs say, over (item, source layer, target layer, scale).
        reembedded: The control: the embedding of the source's token, moved to the same target layers at the same
            scales, over (item, target layer, scale); with "same", target layers are the source layers. None: the source
            has no embedding.
        unpatched: The control without any patch, over (item).
        source_top: The ids of the source's own most probable next tokens, by item; None: it was not run.
        targets: The target prompt of each item, its placeholder in brackets.
        settings: How it was made.
        notes: What a user must know: a cache that was not used, a control that could not be made.
        wording: Turns ids into text.
    """

    items: tuple[str, ...]
    source_layers: tuple[int | None, ...]
    target_layers: tuple[int, ...] | Literal["same"]
    scales: tuple[float, ...]
    patched: Readout
    reembedded: Readout | None
    unpatched: Readout
    source_top: Int[Tensor, "n_items"] | None
    targets: tuple[str, ...]
    wording: Wording = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    # ------------------------------------------------------------------------------------------------ axes and cells

    axes = ("item", "source_layer", "target_layer", "scale")
    """The names of the axes of all arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """How many items, source layers, target layers and scales."""
        return self.patched.axes

    def target_of(self, source: int, target: int) -> int:
        """Return the target layer of a cell, by the numbers of its source and target layer."""
        if self.target_layers == "same":
            layer = self.source_layers[source]
            assert layer is not None, "vectors of no layer have target layers of their own"
            return layer
        return self.target_layers[target]

    def index(
        self,
        item: int | str = 0,
        source_layer: int | None = None,
        target_layer: int | None = None,
        scale: float | None = None,
    ) -> tuple[int, int, int, int]:
        """Return the numbers of a cell along the axes; what there is only one of can be left out.

        Raises:
            PatchscopeError: No such item, layer or scale, or one that must be said.
        """
        i = self.item_number(item)
        if self.target_layers == "same":
            if target_layer is not None and source_layer not in (None, target_layer):
                raise PatchscopeError(
                    f"the grid moves each layer into itself, not layer {source_layer} to {target_layer}"
                )
            source_layer = target_layer if source_layer is None else source_layer
            return i, _one("source layer", source_layer, self.source_layers), 0, self.scale_number(scale)
        return (
            i,
            _one("source layer", source_layer, self.source_layers),
            _one("target layer", target_layer, self.target_layers),
            self.scale_number(scale),
        )

    def item_number(self, item: int | str) -> int:
        """Return the number of an item.

        Raises:
            PatchscopeError: No such item, or a name that several have.
        """
        if isinstance(item, str):
            return _one("item", item, self.items)
        return _number("item", whole(item, "item"), len(self.items))

    def scale_number(self, scale: float | None) -> int:
        """Return the number of a scale; the only one can be left out.

        Raises:
            PatchscopeError: No such scale, or none given where there are several.
        """
        return _one("scale", scale, self.scales)

    def cell(
        self,
        item: int | str = 0,
        source_layer: int | None = None,
        target_layer: int | None = None,
        scale: float | None = None,
    ) -> Patched:
        """Return what one cell says; see `index`."""
        at = self.index(item, source_layer, target_layer, scale)
        shares = self.patched.top_logprobs[at].exp().tolist()
        return Patched(
            self.items[at[0]], self.source_layers[at[1]], self.target_of(at[1], at[2]), self.scales[at[3]],
            self.texts[at], tuple(zip(self.top_tokens[at].tolist(), shares, strict=True)),
            float(self.patched.entropy[at]),
        )  # fmt: skip

    @cached_property
    def texts(self) -> ndarray:
        """What was generated, over (item, source layer, target layer, scale); "" if nothing was."""
        return self.wording.texts(self.patched)

    @cached_property
    def top_tokens(self) -> ndarray:
        """The most probable next tokens as text, over (item, source layer, target layer, scale, rank)."""
        return self.wording.tops(self.patched)

    @property
    def logits(self) -> Float[Tensor, "n_items n_source_layers n_target_layers n_scales d_vocab"]:
        """The next token's logits.

        Raises:
            PatchscopeError: They were not kept.
        """
        if self.patched.logits is None:
            raise _not_kept(self)
        return self.patched.logits

    # ------------------------------------------------------------------------------------------------------- metrics

    def precision_at_1(self) -> Float[ndarray, "n_source_layers n_target_layers n_scales"]:
        """Return the share of items whose most probable token is the source's (Ghandeharioun et al. 2024, §4.1).

        Raises:
            PatchscopeError: The source has no next token.
        """
        return self.figures("precision", self.patched).mean(0)

    def surprisal(self) -> Float[ndarray, "n_source_layers n_target_layers n_scales"]:
        """Return the mean of -log p_source(the patched run's most probable token), in nats: the paper's surprisal.

        Raises:
            PatchscopeError: The source has no next token.
        """
        return self.figures("surprisal", self.patched).mean(0)

    def nll(
        self, answers: Sequence[str | int] | None = None
    ) -> Float[ndarray, "n_source_layers n_target_layers n_scales"]:
        """Return the mean of -log p_patched(token), in nats: the plain negative log-likelihood.

        Args:
            answers: One token for each item, by id or as text; None: the source's most probable next token.

        Raises:
            PatchscopeError: The source has no next token, logits were not kept, or an answer is not one token.
        """
        return self.figures("nll", self.patched, answers).mean(0)

    def figures(
        self, measure: Measure, readout: Readout, answers: Sequence[Any] | None = None
    ) -> Float[ndarray, "n_items *axes"]:
        """Return the figure of each run, unreduced.

        Args:
            measure: "precision" (1 where the most probable token is the source's), "surprisal", "nll", "entropy" (nats)
                or "accuracy" (1 where the answer is said).
            readout: `patched`, `reembedded`, `unpatched`, or a part of one that keeps its axis of items.
            answers: For "accuracy", see `right`; for "nll" one token for each item, None: the source's.

        Raises:
            PatchscopeError: The source has no next token, logits were not kept, or answers are missing or not valid.
        """
        if measure == "entropy":
            return readout.entropy.numpy()
        if measure == "accuracy":
            if answers is None:
                raise PatchscopeError("accuracy needs answers, one for each item")
            return self._hits(readout, answers, "contains").astype(float)
        if measure == "nll" and answers is not None:
            ids = torch.tensor([self._answer_token(answer) for answer in self._listed(answers)])
            if readout.logits is None:
                raise _not_kept(self)
            return _nll(readout.logits, ids)
        ids = self._source_tokens()
        if measure == "surprisal":
            return readout.surprisal.numpy()
        if measure == "nll":
            return readout.source_nll.numpy() if readout.logits is None else _nll(readout.logits, ids)
        return (readout.top_tokens[..., 0] == _along(ids, readout.entropy)).double().numpy()

    def _answer_token(self, answer: Any) -> int:
        if not isinstance(answer, str | int):
            raise PatchscopeError(f"nll needs one token for each item; given {answer!r:.80}")
        return self.wording.token(answer)

    def _source_tokens(self) -> Int[Tensor, "n_items"]:
        """Return the source's next tokens, where the target's can be compared with them."""
        if self.source_top is None:
            raise PatchscopeError(
                "there is no next token of the source to compare with: it was not run, or has another vocabulary than "
                "the target; give prompts as source (cl.At(prompt, pos)) and models of one vocabulary, or answers"
            )
        return self.source_top

    def right(
        self, answers: Sequence[Answer], how: How = "contains"
    ) -> Bool[ndarray, "n_items n_source_layers n_target_layers n_scales"]:
        """Return which cells say the answer: in what was generated, or else as the most probable next token.

        Args:
            answers: One for each item, or several of which any counts. Matched as whole words, see `metrics.says`.
            how: "contains": anywhere in the text; "starts": at its beginning.

        Raises:
            PatchscopeError: Not one answer for each item, or one that is no text.
        """
        return self._hits(self.patched, answers, how)

    def accuracy(
        self, answers: Sequence[Answer], how: How = "contains", *, embedding: bool = False, seed: int = 0
    ) -> Accuracy:
        """Return how often the items are right, by any cell, by one fixed cell, and beside the controls.

        Args:
            answers: See `right`.
            how: See `right`.
            embedding: Count the source's embedding among the source layers; otherwise it is a control alone.
            seed: Of the halves of the items on which the fixed cell is chosen and scored.

        Raises:
            PatchscopeError: Not one answer for each item, or one that is no text.
        """
        kept = [n for n, layer in enumerate(self.source_layers) if embedding or layer != -1] or [0]
        layers = tuple(self.source_layers[n] for n in kept)
        right = self._hits(self.patched, answers, how)[:, kept]
        chosen = best_fixed(right, seed) if len(right) > 1 else None
        cells: tuple[tuple[int | None, int | str, float], ...] = ()
        controlled, gain = None, None
        if chosen is not None:
            cells = tuple(self._named(kept[s], t, a) for s, t, a in chosen.cells)
            if self.reembedded is not None:
                again = self._hits(self.reembedded, answers, how)
                same = self.target_layers == "same"
                first, second = ((kept[s] if same else t, a) for s, t, a in chosen.cells)
                hits = np.where(chosen.fold, again[:, *second], again[:, *first])
                controlled = _rate(hits)
                gain = Mean.of((chosen.right.astype(float) - hits.astype(float)).tolist())
        return Accuracy(
            any_layer=_rate(right.any((1, 2, 3))),
            any_target_layer=tuple(_rate(right[:, s].any((1, 2))) for s in range(len(kept))),
            best_fixed=None if chosen is None else _rate(chosen.right),
            cells=cells,
            unpatched=_rate(self._hits(self.unpatched, answers, how)),
            reembedded=controlled,
            gain=gain,
            by_cell=right.mean(0),
            source_layers=layers,
        )

    def _named(self, source: int, target: int, scale: int) -> tuple[int | None, int | str, float]:
        to = "same" if self.target_layers == "same" else self.target_layers[target]
        return self.source_layers[source], to, self.scales[scale]

    def _hits(self, readout: Readout, answers: Any, how: How) -> ndarray:
        said = self.wording.texts(readout) if readout.new_tokens.shape[-1] else self.wording.tops(readout)[..., 0]
        found = np.zeros(readout.axes, dtype=bool)
        for i, answer in enumerate(self._listed(answers)):
            known: dict[str, bool] = {}
            for at in np.ndindex(*readout.axes[1:]):
                text = said[(i, *at)]
                if text not in known:
                    known[text] = says(text, answer, how)
                found[(i, *at)] = known[text]
        return found

    def _listed(self, answers: Any) -> list[Any]:
        listed = list(answers) if isinstance(answers, Iterable) and not isinstance(answers, str) else []
        if len(listed) != len(self.items):
            raise PatchscopeError(f"{len(self.items)} items need a list of as many answers; given {answers!r:.80}")
        return listed

    # --------------------------------------------------------------------------------------------------------- views

    def heatmap(
        self,
        measure: Measure = "entropy",
        *,
        item: int | str | None = None,
        answers: Sequence[Answer] | None = None,
        scale: float | None = None,
    ) -> HeatMap:
        """Return a heat map of source layers (rows) and target layers (columns), with ``figure()`` and ``to_html()``.

        Every cell tells, in HTML, what was said there. With "same" target layers, and for vectors of no layer, items
        are rows (24 at most, and the mean over all) and layers columns; of one such vector at several scales, rows are
        scales. Set apart are the controls: the re-embedded token, and the prompt without a patch.

        Args:
            measure: "precision" (the source's most probable token comes first), "surprisal", "nll", "entropy", or
                "accuracy" (needs answers); see `figures`.
            item: One item; None: the mean over all.
            answers: For "accuracy" and "nll".
            scale: Which, where there are several.

        Raises:
            PatchscopeError: No such measure, item or scale, a scale that must be chosen, or what the measure needs is
                missing.
        """
        from circuit_lens.patchscopes.pictures import heatmap

        return heatmap(self, measure, item=item, answers=answers, scale=scale)

    def to_frame(self) -> pandas.DataFrame:
        """Return a line for each item, source layer, target layer and scale, as a pandas frame.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self.records())

    def records(self) -> list[dict[str, Any]]:
        """Return a line for each item, source layer, target layer and scale: names, text, tokens and figures."""
        from circuit_lens.patchscopes.records import records

        return records(self)

    def to_json(self) -> dict[str, Any]:
        """Return everything but logits and states as data that JSON can say: names, cells and controls."""
        from circuit_lens.patchscopes.records import as_json

        return as_json(self)

    def __str__(self) -> str:
        from circuit_lens.patchscopes.text import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from circuit_lens.patchscopes.text import as_html

        return as_html(self)


def _not_kept(result: PatchscopeResult) -> PatchscopeError:
    n = int(np.prod(result.shape))
    return PatchscopeError(f"the logits of {n} runs were not kept; give keep_logits=True, or read top_tokens")


def _along(ids: Int[Tensor, "n_items"], like: Float[Tensor, "n_items *axes"]) -> Int[Tensor, "n_items *ones"]:
    """Return ids with axes of length 1 behind, to stand beside a figure of each run."""
    return ids.reshape(-1, *[1] * (like.ndim - 1))


def _nll(
    logits: Float[Tensor, "n_items *axes d_vocab"], ids: Int[Tensor, "n_items"]
) -> Float[ndarray, "n_items *axes"]:
    """Return -log p of each item's token, in nats."""
    exact = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    at = _along(ids, logits).expand(*logits.shape[:-1], 1)
    return -exact.log_softmax(-1).gather(-1, at)[..., 0].numpy()


def _rate(hits: Any) -> Rate:
    return Rate(int(np.asarray(hits).sum()), len(hits))


def _number(what: str, number: int, n: int) -> int:
    if not -n <= number < n:
        raise PatchscopeError(f"{what} {number} does not exist; there are {n}")
    return number % n


def _one(what: str, wanted: Any, valid: Sequence[Any]) -> int:
    """Return the number of what is wanted; None where there is only one."""
    if wanted is None and len(valid) == 1:
        return 0
    if wanted not in valid:
        hint = nearest(str(wanted), [str(one) for one in valid]) if isinstance(wanted, str) else ""
        given = "none was given" if wanted is None else f"given {wanted!r}"
        raise PatchscopeError(f"which {what}? {given}; there are {', '.join(map(str, valid[:20]))}{hint}")
    if list(valid).count(wanted) > 1:
        raise PatchscopeError(f"{what} {wanted!r} occurs {list(valid).count(wanted)} times; give its number")
    return list(valid).index(wanted)
