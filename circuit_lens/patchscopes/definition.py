"""The definition, done literally: one run of the target prompt for each row and each new token, nothing shared.

Slow. It is what the fast path is compared with, in tests and on a few rows of every call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.decoding import uncached
from circuit_lens.hooks import Hook, preserved_rng, quiet_norm_edits, scoped_hooks
from circuit_lens.patchscopes.rows import Rows, written
from circuit_lens.patchscopes.sources import residual_hook
from circuit_lens.patchscopes.targets import Placed
from circuit_lens.protocols import HookedModel
from circuit_lens.running import plain_tensors


@dataclass(frozen=True, eq=False)
class Said:
    """What rows say.

    Attributes:
        logits: Of the token after the prompt.
        new_tokens: Generated ids, greedily; a row that is at its end is filled with its end-of-sequence token.
        lengths: Generated tokens of each row, the end of the sequence included.
        note: Why the cache of keys and values was not used; "" if it was, or was not asked for.
        state: The residual stream at the prompt's last position, after the layer that was asked for.
    """

    logits: Float[Tensor, "n_rows d_vocab"]
    new_tokens: Int[Tensor, "n_rows n_new"]
    lengths: Int[Tensor, "n_rows"]
    note: str = ""
    state: Float[Tensor, "n_rows d_model"] | None = None


def say_one_by_one(
    model: HookedModel, target: Placed, rows: Rows, max_new_tokens: int, *, read_layer: int | None = None
) -> Said:
    """Run the rows of a grid by the definition.

    Args:
        model: The target model.
        target: The target prompt.
        rows: What is moved.
        max_new_tokens: Tokens to generate greedily (the lower id of equals); a row ends at the tokenizer's end of the
            sequence.
        read_layer: The layer whose residual stream is kept.
    """
    eos = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    n_new = max_new_tokens
    first, states, new = [], [], torch.zeros(len(rows), n_new, dtype=torch.long)
    lengths = torch.full((len(rows),), n_new)
    with plain_tensors():
        for row in range(len(rows)):
            keep = [] if read_layer is None else [_keep(read_layer, states)]
            logits = _run(model, target.tokens, target, rows.part([row]), keep)
            first.append(logits)
            tokens = target.tokens
            for step in range(n_new):
                chosen = int((logits == logits.max()).nonzero()[0])
                new[row, step] = chosen
                if chosen == eos:
                    new[row, step:], lengths[row] = chosen, step + 1
                    break
                tokens = torch.cat([tokens, tokens.new_tensor([chosen])])
                if step + 1 < n_new:
                    logits = _run(model, tokens, target, rows.part([row]), [])
    return Said(torch.stack(first), new, lengths, state=torch.stack(states) if states else None)


def _keep(layer: int, states: list[Tensor]) -> Hook:
    def edit(residual: Tensor) -> None:
        states.append(residual[0, -1].clone())

    return Hook(residual_hook(layer), edit)


def _run(
    model: HookedModel, tokens: Int[Tensor, "n_pos"], target: Placed, row: Rows, keep: list[Hook]
) -> Float[Tensor, "d_vocab"]:
    """Return the logits after the last token of one run."""
    slots = list(target.positions)

    def hook(layer: int, value: Tensor) -> Hook:
        def edit(residual: Tensor) -> Tensor:
            residual = residual.clone()
            residual[:, slots] = written(row.write, residual[:, slots], value.to(residual.device))
            return residual

        return Hook(residual_hook(layer), edit)

    hooks = [hook(layer, value) for layer, (_, value) in row.writes().items()]
    with preserved_rng(), quiet_norm_edits(), scoped_hooks(model, [*hooks, *keep]):
        return uncached(model, tokens[None])[0, -1].clone()
