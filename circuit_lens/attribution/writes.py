"""What active features add to the residual stream: a vector each, or decoder rows that all positions share.

The active features of a sparse dictionary write a vector each, decoder row times activation. Where a dictionary is
dense (a model's own neurons are active at every position) those would be copies of one decoder row for every position;
then the decoder is kept once, and activations are applied to products with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.protocols import Dictionary

# From what a feature writes at a dictionary's output to what that adds to the residual stream: the same, a factor per
# position, or a function of vectors and their positions.
Onward = Tensor | Callable[[Tensor, Tensor], Tensor] | None


@dataclass(frozen=True, eq=False)
class OwnVectors:
    """One vector per active feature.

    Attributes:
        vectors: What each adds to the residual stream.
        pos: Where each is.
    """

    vectors: Float[Tensor, "n_active d_model"]
    pos: Int[Tensor, "n_active"]

    def at(self, where: slice) -> Float[Tensor, "n d_model"]:
        """Return the vectors of some features."""
        return self.vectors[where]

    def score(
        self, out: Float[Tensor, "n_target n"], gradients: Float[Tensor, "n_target d_model"], where: slice, pos: int
    ) -> None:
        """Add the products of gradients and the vectors of some features to ``out``."""
        out.addmm_(gradients, self.vectors[where].T)

    def added_to(
        self, total: Float[Tensor, "n_pos d_model"], weights: Float[Tensor, "n_active"] | None = None
    ) -> Float[Tensor, "n_pos d_model"]:
        """Return ``total`` plus the sum of each position's vectors."""
        return total.index_add(0, self.pos, self.vectors if weights is None else weights[:, None] * self.vectors)


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Decoder rows that the features of all positions share.

    Attributes:
        rows: Decoder rows of the features that are active anywhere.
        pos, row, act: Position, row and activation of each active feature, sorted by position, then row.
        gain: What each position multiplies the rows by on their way to the stream; None for 1.
    """

    rows: Float[Tensor, "n_rows d_model"]
    pos: Int[Tensor, "n_active"]
    row: Int[Tensor, "n_active"]
    act: Float[Tensor, "n_active"]
    gain: Float[Tensor, "n_pos d_model"] | None

    def at(self, where: slice) -> Float[Tensor, "n d_model"]:
        """Return the vectors of some features, made anew."""
        vectors = self.rows[self.row[where]] * self.act[where, None]
        return vectors if self.gain is None else vectors * self.gain[self.pos[where]]

    def score(
        self, out: Float[Tensor, "n_target n"], gradients: Float[Tensor, "n_target d_model"], where: slice, pos: int
    ) -> None:
        """Add the products of gradients and the vectors of some features, all at one position, to ``out``."""
        onward = gradients if self.gain is None else gradients * self.gain[pos]
        every = where.stop - where.start == len(self.rows)
        rows = self.rows if every else self.rows[self.row[where]]
        out.addcmul_(onward @ rows.T, self.act[where])

    def added_to(
        self, total: Float[Tensor, "n_pos d_model"], weights: Float[Tensor, "n_active"] | None = None
    ) -> Float[Tensor, "n_pos d_model"]:
        """Return ``total`` plus the sum of each position's vectors."""
        act = self.act if weights is None else self.act * weights
        acts = total.new_zeros(len(total), len(self.rows)).index_put((self.pos, self.row), act)
        summed = acts @ self.rows
        return total + (summed if self.gain is None else summed * self.gain)


Written = OwnVectors | SharedRows


def shares(n_active: int, n_rows: int, n_pos: int) -> bool:
    """Whether features share rows: where each is active at half of the positions on average, and at two at least."""
    return n_active > 0 and n_active >= n_rows * max(2.0, n_pos / 2)


def written_by(
    dictionary: Dictionary,
    pos: Int[Tensor, "n_active"],
    index: Int[Tensor, "n_active"],
    act: Float[Tensor, "n_active"],
    n_pos: int,
    onward: Sequence[Onward],
) -> list[Written]:
    """Return what active features write, per output of their dictionary.

    Args:
        dictionary: The dictionary.
        pos, index, act: One entry per active feature, sorted by position, then index.
        n_pos: Number of positions.
        onward: Per output, how what is written there gets to the residual stream.
    """
    gains = [None if callable(to_stream) else to_stream for to_stream in onward]
    used, row = index.unique(return_inverse=True)
    if shares(len(index), len(used), n_pos) and not any(callable(to_stream) for to_stream in onward):
        decoder = dictionary.decoder_rows(used, act.dtype)
        return [SharedRows(decoder[:, o], pos, row, act, gain) for o, gain in enumerate(gains)]
    rows = dictionary.decoder_rows(index, act.dtype) * act[:, None, None]
    written: list[Written] = []
    for o, to_stream in enumerate(onward):
        if callable(to_stream):
            vectors = to_stream(rows[:, o], pos)
        else:
            vectors = rows[:, o] if to_stream is None else rows[:, o] * to_stream[pos]
        written.append(OwnVectors(vectors, pos))
    return written
