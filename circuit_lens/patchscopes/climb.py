"""The prompts of a grid's rows, each run from its target layer up: what is below is the same in all rows, and run once.

A row that is written at layer t alone differs from the plain target prompt at the placeholder, from layer t on. So the
prompt is run once; then layer after layer, by all rows whose target layer is below: the batch grows as it climbs. Keys
and values of the layers up to t are those of the plain prompt. Needs a model that can run some of its layers, which a
HookedTransformer can.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.decoding import HookedStep, Prompted
from circuit_lens.hooks import Hook, carries_hooks, scoped_hooks
from circuit_lens.patchscopes.rows import Rows, Writes, written
from circuit_lens.patchscopes.sources import EMBEDDING, residual_hook
from circuit_lens.patchscopes.targets import Placed


def can_climb(model: Any, rows: Rows) -> bool:
    """Whether the rows are written at one layer each, and the model can run a part of its layers.

    Where there are other hooks all layers are run by all rows: what they carry from layer to layer has one batch.
    """
    accepted = inspect.signature(model.forward).parameters
    partly = {"start_at_layer", "stop_at_layer", "past_kv_cache"} <= set(accepted)
    # Shortformer's attention reads positions at every layer, which the residual stream does not hold.
    positions = getattr(model.cfg, "positional_embedding_type", None)
    return partly and positions != "shortformer" and rows.through == "layer" and not carries_hooks(model)


def climbing_order(rows: Rows) -> Int[Tensor, "n_rows"]:
    """Return the numbers of the rows by target layer, those that nothing is moved into last."""
    return torch.argsort(_target_layers(rows), stable=True)


def _target_layers(rows: Rows) -> Int[Tensor, "n_rows"]:
    layers = torch.tensor([cell.target_layer for cell in rows.cells])[rows.cell]
    return torch.where(rows.item >= 0, layers, torch.iinfo(layers.dtype).max)


class Climb:
    """Runs the prompt of rows that are in climbing order.

    Args:
        model: The target model, see `can_climb`.
        target: The target prompt.
        rows: In `climbing_order`.
        writes: What is written in them.
        read_layer: Keep the residual stream of the prompt's last position after this layer.
        generates: Whether keys and values are needed afterwards.

    Attributes:
        state: That of ``read_layer``, once it was run.
    """

    def __init__(
        self, model: Any, target: Placed, rows: Rows, writes: Writes, read_layer: int | None, *, generates: bool
    ) -> None:
        self.model, self.target, self.rows, self.writes = model, target, rows, writes
        self.read_layer, self.generates = read_layer, generates
        self.layer_of = _target_layers(rows)
        self.columns = torch.tensor([position - target.start for position in target.positions])
        self.state: Tensor | None = None

    def __call__(self) -> Prompted:
        """Return the logits after the prompt, and where its keys and values are kept, a forward that goes on."""
        n_layers, n_prefix = self.model.cfg.n_layers, self.target.start
        plain, streams = self._plain()
        step = HookedStep(self.model, len(self.rows))
        step.cache.append_attention_mask(torch.ones(len(self.rows), len(self.target.tokens), dtype=torch.int))
        stream, last = self._start(EMBEDDING, None, streams), None
        if self.read_layer == EMBEDDING:
            self._keep(EMBEDDING, stream, streams)
        for layer in range(n_layers):
            entry, shared = step.cache.entries[layer], plain.cache.entries[layer]
            n_run = 0 if stream is None else len(stream)
            if stream is not None:
                entry.past_keys = shared.past_keys[:, :n_prefix].expand(n_run, -1, -1, -1)
                entry.past_values = shared.past_values[:, :n_prefix].expand(n_run, -1, -1, -1)
                mask = torch.ones(n_run, len(self.target.tokens), dtype=torch.int, device=stream.device)
                stream = self.model(
                    stream, start_at_layer=layer, stop_at_layer=layer + 1, past_kv_cache=step.cache, attention_mask=mask
                )
            if self.generates:
                entry.past_keys = _and_shared(entry.past_keys[:n_run], shared.past_keys, len(self.rows))
                entry.past_values = _and_shared(entry.past_values[:n_run], shared.past_values, len(self.rows))
            else:
                entry.past_keys, entry.past_values = shared.past_keys[:, :0], shared.past_values[:, :0]
            stream = self._start(layer, stream, streams)
            if self.read_layer == layer:
                self._keep(layer, stream, streams)
        last = self._all_last(n_layers - 1, stream, streams)
        logits = self.model(last, start_at_layer=n_layers, return_type="logits")[:, -1]
        return Prompted(logits, step)

    def _plain(self) -> tuple[HookedStep, dict[int, Tensor]]:
        """Run the target prompt as it is; return its step and the streams from the first placeholder on."""
        n_layers, start = self.model.cfg.n_layers, self.target.start
        step, tokens = HookedStep(self.model, 1), self.target.tokens[None]
        if start:
            step.fill(tokens[:, :start])
        streams: dict[int, Tensor] = {}

        def keep(layer: int) -> Hook:
            def edit(residual: Tensor) -> None:
                streams[layer] = residual

            return Hook(residual_hook(layer), edit)

        wanted = {*self.writes, n_layers - 1} | ({self.read_layer} if self.read_layer is not None else set())
        with scoped_hooks(self.model, [keep(layer) for layer in sorted(wanted)]):
            step.fill(tokens[:, start:])
        return step, streams

    def _start(self, layer: int, stream: Tensor | None, streams: dict[int, Tensor]) -> Tensor | None:
        """Return the streams of rows that run already, and of those that begin with what is written at this layer."""
        if layer not in self.writes:
            return stream
        rows, value = self.writes[layer]
        new = streams[layer].expand(len(rows), -1, -1).clone()
        at = torch.argsort(rows).to(value.device)  # writes are listed by cell
        columns = self.columns.to(new.device)
        new[:, columns] = written(self.rows.write, new[:, columns], value[at].to(new.device))
        return new if stream is None else torch.cat([stream.to(new.device), new])

    def _all_last(
        self, layer: int, stream: Tensor | None, streams: dict[int, Tensor]
    ) -> Float[Tensor, "n_rows 1 d_model"]:
        """Return the last position of all rows after a layer; rows that are not written yet are as the plain prompt."""
        plain = streams[layer][:, -1:]
        if stream is None:
            return plain.expand(len(self.rows), -1, -1)
        return _and_shared(stream[:, -1:].to(plain.device), plain, len(self.rows))

    def _keep(self, layer: int, stream: Tensor | None, streams: dict[int, Tensor]) -> None:
        self.state = self._all_last(layer, stream, streams)[:, 0].clone()


def _and_shared(own: Tensor, shared: Tensor, n_rows: int) -> Tensor:
    """Return the first rows' own values and, for all others, the same."""
    if not len(own):
        return shared.expand(n_rows, *shared.shape[1:])
    return torch.cat([own, shared.expand(n_rows - len(own), *shared.shape[1:])])
