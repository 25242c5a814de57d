"""How often patched prompts are right: by any cell, by one fixed cell, and beside the controls.

The paper's figures for attributes and multi-hop questions count an item as right if any layer (any pair of layers) is
(Ghandeharioun et al. 2024, §4.2, §5.2), a maximum over many tries. ``best_fixed`` chooses one cell on one half of the
items and counts the other half.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from circuit_lens.errors import PatchscopeError
from circuit_lens.graph.rates import Mean, Rate

How = Literal["contains", "starts"]
# A letter or digit of a script that parts its words: no Thai, Lao, Myanmar, Khmer, kana or ideograph.
_LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
Answer = str | Sequence[str]


def says(text: str, answer: Answer, how: How = "contains") -> bool:
    """Whether a text says the answer (any of several): as whole words, whatever their case and the blanks.

    Where the answer begins or ends with a letter or digit, none may stand beside it in the text; scripts without blanks
    between words (Chinese, Japanese, Thai and their neighbours) have no such edges.

    Args:
        text: What was said.
        answer: What counts.
        how: "contains": anywhere in the text; "starts": at its beginning.

    Raises:
        PatchscopeError: No answer, or an empty one, or another ``how``.

    >>> says("the city of  Austin .", "austin"), says("Texas", "Tex"), says("a Welsh singer", "Welsh singer", "starts")
    (True, False, False)
    """
    listed = [answer] if isinstance(answer, str) else list(answer) if isinstance(answer, Iterable) else []
    words = [_plain(one) if isinstance(one, str) else "" for one in listed]
    if how not in ("contains", "starts") or not words or not all(words):
        raise PatchscopeError(f"answer={answer!r:.80}, how={how!r}: give words, and 'contains' or 'starts'")
    text = _plain(text)
    for one in words:
        before = rf"(?<!{_LETTER})" if re.match(_LETTER, one[0]) else ""
        after = rf"(?!{_LETTER})" if re.match(_LETTER, one[-1]) else ""
        pattern = before + re.escape(one) + after
        if re.match(pattern, text) if how == "starts" else re.search(pattern, text):
            return True
    return False


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()).casefold())


@dataclass(frozen=True)
class Chosen:
    """A fixed cell, by the numbers of its source layer, target layer and scale, and how the items are scored by it."""

    cells: tuple[tuple[int, ...], ...]
    right: Bool[ndarray, "n_items"]
    fold: Bool[ndarray, "n_items"]


def best_fixed(right: Bool[ndarray, "n_items *cells"], seed: int = 0) -> Chosen:
    """Choose the cell that is right most often on one half of the items and score the other half, both ways.

    Args:
        right: Whether each item is right, by cell.
        seed: Of the halves. Ties go to the cell with the lower numbers.

    Returns:
        The two cells, each item scored by the one that was chosen without it, and which of the two that was.

    Raises:
        PatchscopeError: Fewer than two items.
    """
    n_items = len(right)
    if n_items < 2:
        raise PatchscopeError(f"a fixed cell is chosen on one half and scored on the other; given {n_items} item")
    fold = np.zeros(n_items, dtype=bool)
    fold[np.random.default_rng(seed).permutation(n_items)[: n_items // 2]] = True
    scored, cells = np.zeros(n_items, dtype=bool), []
    for half in (False, True):  # the items of this half are scored by a cell chosen on the other
        counts = right[fold != half].sum(0)
        cell = np.unravel_index(int(counts.argmax()), counts.shape)
        cells.append(tuple(int(i) for i in cell))
        scored[fold == half] = right[(fold == half, *cell)]
    return Chosen(tuple(cells), scored, fold)


@dataclass(frozen=True)
class Accuracy:
    """How often the items are right.

    Attributes:
        any_layer: Any cell is right: the paper's figure for pairs of layers, a maximum over all tries.
        any_target_layer: For each source layer, any target layer is right: the paper's figure for attributes.
        best_fixed: One cell, chosen on one half of the items and scored on the other, both ways.
        cells: The two cells, as (source layer, target layer, scale).
        unpatched: The prompt with its placeholder.
        reembedded: The source's token itself, embedded, at the same target layer as the fixed cell; None: unknown.
        gain: best_fixed minus reembedded, item by item.
        by_cell: The share of items that is right in each cell, ``[n_source_layers, n_target_layers, n_scales]``.
        source_layers: The layers that these are about; the embedding is a control, and not among them.
    """

    any_layer: Rate
    any_target_layer: tuple[Rate, ...]
    best_fixed: Rate | None
    cells: tuple[tuple[int | None, int | str, float], ...]
    unpatched: Rate
    reembedded: Rate | None
    gain: Mean | None
    by_cell: ndarray
    source_layers: tuple[int | None, ...]

    def __str__(self) -> str:
        shown = " and ".join(_cell(cell) for cell in dict.fromkeys(self.cells))
        lines = [f"best fixed cell   {self.best_fixed}  ({shown}; chosen on the other half of the items)"]
        if self.best_fixed is None:
            lines = ["best fixed cell   one item cannot be halved"]
        lines.append(f"any cell          {self.any_layer}  (of {self.by_cell.size})")
        if self.reembedded is not None:
            lines.append(f"re-embedded token {self.reembedded}  (at the same target layer; gain {self.gain})")
        lines.append(f"unpatched prompt  {self.unpatched}")
        return "\n".join(lines)


def _cell(cell: tuple[int | None, int | str, float]) -> str:
    source, target, scale = cell
    source = "vector" if source is None else f"layer {source}"
    to = "the same layer" if target == "same" else f"layer {target}"
    return f"{source} into {to}" + ("" if scale == 1.0 else f" × {scale:g}")
