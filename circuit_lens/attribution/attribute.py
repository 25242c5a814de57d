"""From a local replacement model to an attribution graph: which features get rows, and in what order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from circuit_lens.attribution.assemble import Columns, lay_out, lazy_zeros, table
from circuit_lens.attribution.ranking import ChosenRows
from circuit_lens.attribution.replacement import LocalReplacementModel
from circuit_lens.attribution.targets import Resolved, Targets, TokenLogits, stack
from circuit_lens.errors import ConsistencyError, NodeNotFoundError, TargetError
from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import Feature, Node, NodeKind, Section
from circuit_lens.graph.records import TopLogits
from circuit_lens.running import plain_tensors, token_string

_RERANK_EVERY = 256
_PART = 1024  # features whose encoder rows are held at once
# Largest difference of a fast row from the reference, relative to the row's largest entry, per dtype of the model. A
# bridge computes some norms in float32 even in a float64 model, hence the first.
AGREEMENT = {torch.float64: 5e-6, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.2}


def attribute(
    local: LocalReplacementModel,
    targets: Any = None,
    *,
    max_features: int | None = None,
    rerank_every: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> AttributionGraph:
    """Return the attribution graph of a prompt.

    Args:
        local: The prompt's local replacement model.
        targets: What to explain; see ``ReplacementModel.attribute``.
        max_features: At most this many features become nodes with rows, those with the most influence on the targets;
            the others are summed into rest nodes, so that rows still conserve. None: all active ones.
        rerank_every: Rows after which influence is computed anew to choose the next features; the choice depends on it,
            and never on ``batch_size``.
        batch_size: Rows computed at once; bounds memory, does not change the graph.
        progress: Show a progress bar; None shows it for work that takes more than two seconds.

    Raises:
        TargetError: See ``ReplacementModel.attribute``.
        ValueError: A limit below one.
    """
    for name, value in (("max_features", max_features), ("rerank_every", rerank_every), ("batch_size", batch_size)):
        least = 0 if name == "max_features" else 1
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}={value!r} is not valid; give a whole number from {least} up, or None")
    resolved = local.resolve(targets)
    total = local.n_active if max_features is None else min(max_features, local.n_active)
    bar = tqdm(
        total=total + len(resolved), desc="attribution", unit="row", disable=progress is False, leave=False,
        delay=0 if progress else 2,
    )  # fmt: skip
    with bar, plain_tensors():
        builder = _Builder(local, resolved, batch_size, bar.update)
        builder.choose(total, rerank_every or _RERANK_EVERY)
        builder.verify()
        return builder.graph(max_features)


def expand(local: LocalReplacementModel, graph: AttributionGraph, node: Any) -> AttributionGraph:
    """Return the graph with more features as nodes; see ``LocalReplacementModel.expand``."""
    _require_same(local, graph)
    new = _columns_of(local, graph, node)
    kept = [_column(local, graph.node(i)) for i in range(graph.nodes.n_features)]
    if not set(new) - set(kept):
        raise NodeNotFoundError(f"{node} already has a row of its own in this graph")
    resolved = _resolve_again(local, graph)
    limit = graph.manifest.get("options", {}).get("max_features")
    with plain_tensors():
        return replace(_Builder(local, resolved, None, None).with_features([*kept, *new], limit), prompt=graph.prompt)


class _Builder:
    """Computes rows, chooses features, and lays the graph out.

    When all active features are nodes, rows go straight into the graph's adjacency; otherwise they are kept by
    column until it is known which columns are nodes.
    """

    def __init__(
        self,
        local: LocalReplacementModel,
        resolved: Sequence[Resolved],
        batch_size: int | None,
        progress: Callable[[int], Any] | None,
    ) -> None:
        self.local, self.resolved, self.batch_size, self.progress = local, list(resolved), batch_size, progress
        self.logits = stack(self.resolved)
        self.chosen = torch.zeros(0, dtype=torch.long)
        self.layout: tuple[Columns, Tensor] | None = None
        self.sums = torch.zeros(0, 2, dtype=torch.float64)
        self.logit_rows = local.frozen.tokens.new_zeros(len(self.resolved), local.sources.n_columns)
        self._fill_logits()

    def _fill_logits(self) -> None:
        """Compute the rows of the targets."""
        for chosen, block in self._rows(self.logits):
            self.logit_rows[chosen] = block

    def _rows(self, targets: Targets) -> Iterator[tuple[list[int], Float[Tensor, "n_block n_columns"]]]:
        """Yield rows over all columns, block by block, and say so."""
        for chosen, block in self.local.row_blocks(targets, batch_size=self.batch_size):
            yield chosen, block
            if self.progress is not None:
                self.progress(len(chosen))

    def _lay_out(self) -> tuple[Columns, Tensor]:
        """Return the graph's columns and its adjacency, with the rows of the targets, features still empty."""
        columns = lay_out(self.local.sources, self.chosen, self.local.tokens.cpu(), self.local.label)
        n = len(self.chosen)
        adjacency = lazy_zeros((n + len(self.resolved), columns.n_nodes), self.logit_rows.dtype)
        adjacency[n:] = columns.gather(self.logit_rows).cpu()
        self.sums = torch.zeros(len(adjacency), 2, dtype=torch.float64)
        self._sum(self.logit_rows, list(range(n, len(adjacency))))
        return columns, adjacency

    def _sum(self, rows: Float[Tensor, "n n_columns"], at: Sequence[int]) -> None:
        """Keep the sum and the absolute sum of rows while they are at hand."""
        self.sums[at] = torch.stack([rows.sum(1), rows.abs().sum(1)], 1).double().cpu()

    def with_features(self, columns: Sequence[int], max_features: int | None) -> AttributionGraph:
        """Return the graph in which exactly these features are nodes."""
        self.chosen = torch.tensor(sorted(set(columns)), dtype=torch.long)
        self._compute_chosen()
        return self.graph(max_features)

    def _compute_chosen(self) -> None:
        """Compute the rows of the chosen features, in the order of their columns."""
        columns, adjacency = self.layout = self._lay_out()
        # By position, as rows are swept, and in parts: the encoder rows of all targets at once would be a matrix of
        # their own.
        order = torch.argsort(self.local.feature_positions()[self.chosen], stable=True)
        for part in order.split(_PART):
            part = part.sort().values
            targets = self.local.feature_targets(self.chosen[part].tolist())
            for chosen, block in self._rows(targets):
                at = part[chosen].tolist()
                columns.place(block, adjacency, at, [targets.ranks[i] for i in chosen])
                self._sum(block, at)

    def choose(self, total: int, rerank_every: int) -> None:
        """Compute the rows of ``total`` features, the most influential first."""
        n_active = self.local.n_active
        if total == n_active:
            self.chosen = torch.arange(n_active)
            self._compute_chosen()
            return
        known = ChosenRows(self.local.sources, total, self.logit_rows, [r.weight for r in self.resolved])
        while len(known) < total:
            ranked = known.influence()
            ranked[known.columns] = -1
            # Stable: ties go to the lower column.
            best = torch.argsort(ranked, descending=True, stable=True)
            new = best[: min(rerank_every, total - len(known))].sort().values
            first = known.begin(new)
            for chosen, block in self._rows(self.local.feature_targets(new.tolist())):
                known.put([first + i for i in chosen], block)
            known.end(first)
        self.chosen = known.columns.sort().values
        nodes, adjacency = self.layout = self._lay_out()
        for at, rows, ranks in known.sorted_blocks():
            nodes.place(rows, adjacency, at, ranks)
            self._sum(rows, at)

    def verify(self) -> None:
        """Compare two rows of the fast path with the reference, and fall back to it if they differ."""
        local = self.local
        if local.engine != "fast" or not local.settings.check or local.values.from_cache:
            return
        assert self.layout is not None
        columns, adjacency = self.layout
        generator = torch.Generator().manual_seed(0)
        logit = int(torch.randint(len(self.resolved), (1,), generator=generator))
        picks = [(stack([self.resolved[logit]]), adjacency[len(self.chosen) + logit], self.resolved[logit].value)]
        if len(self.chosen):
            row = int(torch.randint(len(self.chosen), (1,), generator=generator))
            column = int(self.chosen[row])
            picks.append((local.feature_targets([column]), adjacency[row], float(local.feature_values([column])[0])))
        worst = 0.0
        for targets, fast, value in picks:
            slow = columns.gather(local.rows(targets, engine="reference"))[0].cpu()
            # Of a row of linearised norms only the small rest of large terms is left: the value gives the scale too.
            gap = float((fast - slow).abs().max()) / max(float(slow.abs().max()), abs(value), 1e-30)
            worst = float("inf") if gap != gap else max(worst, gap)
        local.checks["fast_vs_reference"] = worst
        if worst <= AGREEMENT.get(local.values.native, 0.2):
            return
        if local.settings.engine == "fast":
            raise ConsistencyError(f"the fast path differs from the reference by {worst:.1e} of a row's largest entry")
        local.engine, local.engine_note = (
            "reference",
            f"fallback: the fast path differed by {worst:.1e} of a row's largest",
        )
        self._fill_logits()
        self._compute_chosen()

    def graph(self, max_features: int | None) -> AttributionGraph:
        """Lay the graph out."""
        local = self.local
        assert self.layout is not None
        columns, adjacency = self.layout
        value, bias = local.feature_values(self.chosen.tolist())
        dtype = adjacency.dtype
        bias = torch.cat([bias.cpu(), torch.tensor([r.bias for r in self.resolved], dtype=dtype)])
        value = torch.cat([value.cpu(), torch.tensor([r.value for r in self.resolved], dtype=dtype)])
        self._check_conservation(bias, value)
        manifest = local.manifest() | {
            "options": {"max_features": max_features},
            "targets": [r.name for r in self.resolved],
            "remainders": [r.remainder for r in self.resolved],
        }
        return AttributionGraph(
            nodes=table(columns, self._logit_section()),
            adjacency=adjacency,
            target_bias=bias,
            target_value=value,
            logit_weight=torch.tensor([r.weight for r in self.resolved], dtype=dtype),
            tokens=local.tokens.cpu(),
            token_strings=local.token_strings,
            prompt=local.prompt,
            top_logits=top_logits(local, self.resolved[0].pos),
            manifest=manifest,
            n_layers=local.frozen.n_layers,
            expander=self._expander(),
        )

    def _check_conservation(self, bias: Float[Tensor, "n_rows"], value: Float[Tensor, "n_rows"]) -> None:
        """Raise if the rows do not sum to their targets' values: then the sources are not all there is."""
        local = self.local
        total, size = self.sums.to(bias.dtype).unbind(1)
        size = size + bias.abs()
        # Linearised norms leave rows that are tiny beside the terms that cancelled in them: hence the median.
        gap = (total + bias - value).abs() / torch.maximum(size, size.median()).clamp_min(1e-30)
        local.checks["conservation"] = worst = float(gap.max())
        limit = AGREEMENT.get(local.values.native, 0.2)
        if local.settings.check and not worst <= limit:
            raise ConsistencyError(
                f"rows of the graph miss their targets' values by {worst:.1e} of their size (limit {limit:.0e}, engine "
                f"{local.engine}): the model does something at this prompt that no source explains. A hook of yours "
                "may edit it where attention is not known as linear maps; pass check=False to get the graph all the "
                "same"
            )

    def _logit_section(self) -> Section:
        pos = torch.tensor([r.pos for r in self.resolved])
        index = torch.tensor([r.index for r in self.resolved])
        names = tuple(r.name for r in self.resolved)
        return Section(NodeKind.LOGIT, pos, torch.full_like(pos, self.local.frozen.n_layers), index, labels=names)

    def _expander(self) -> Callable[[AttributionGraph, int], AttributionGraph]:
        local, resolved = self.local, self.resolved

        def expander(graph: AttributionGraph, node: int) -> AttributionGraph:
            kept = [_column(local, graph.node(i)) for i in range(graph.nodes.n_features)]
            new = _columns_of(local, graph, graph.node(node))
            limit = graph.manifest.get("options", {}).get("max_features")
            with plain_tensors():
                return _Builder(local, resolved, None, None).with_features([*kept, *new], limit)

        return expander


def top_logits(local: LocalReplacementModel, pos: int, k: int = 10) -> TopLogits:
    """Return the model's most probable next tokens at a position."""
    logits = local.logits()[pos].detach().cpu()
    probs, ids = logits.softmax(-1).topk(min(k, len(logits)))
    return TopLogits(pos, ids, tuple(token_string(local.model, int(i)) for i in ids), logits[ids], probs)


def _column(local: LocalReplacementModel, node: Node) -> int:
    return local.column(node.feature)


def _columns_of(local: LocalReplacementModel, graph: AttributionGraph, node: Any) -> list[int]:
    """Return the columns of the features to add: one feature, or all that a rest node sums."""
    if isinstance(node, Feature):
        return [local.column(node)]
    node = graph.node(node)
    if node.kind is NodeKind.FEATURE:
        return [_column(local, node)]
    if node.kind is not NodeKind.REST:
        raise NodeNotFoundError(
            f"{node.name} is a {node.kind.name.lower()} node; only rest nodes and features can be expanded"
        )
    dictionary = local.binding.dictionary(node.layer, node.site)
    f = next(f for f in local.sources.features if f.dictionary is dictionary)
    here = f.at(node.pos)
    return list(range(f.start + here.start, f.start + here.stop))


def _require_same(local: LocalReplacementModel, graph: AttributionGraph) -> None:
    mine = local.manifest()
    if not torch.equal(graph.tokens.cpu(), local.tokens.cpu()):
        raise ConsistencyError("the graph was made on another prompt than this local model")
    for key in ("weights", "settings", "baseline"):
        if graph.manifest.get(key) != mine.get(key):
            raise ConsistencyError(
                f"the graph was made with another {key}: {graph.manifest.get(key)}, this local model has "
                f"{mine.get(key)}"
            )


def _resolve_again(local: LocalReplacementModel, graph: AttributionGraph) -> list[Resolved]:
    d_vocab = int(local.model.W_U.shape[-1])
    resolved: list[Resolved] = []
    for i in range(graph.nodes.n_sources, len(graph.nodes)):
        node = graph.node(i)
        if node.index >= d_vocab:
            raise TargetError(
                f"the target {node.label!r} is no token, and a saved graph does not hold it; call graph.expand(node) "
                "on the graph as it was made, or attribute again"
            )
        resolved += local.resolve(TokenLogits((node.index,), node.pos))
    return resolved
