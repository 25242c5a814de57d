"""The local replacement model: one prompt's frozen, linear model, reusable for rows, head loadings and graphs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.attribution.assemble import Columns, lay_out, table
from circuit_lens.attribution.autograd import FrozenHooks, attention_constants, rows_by_autograd
from circuit_lens.attribution.checks import check_reads, check_reconstruction
from circuit_lens.attribution.collect import collect
from circuit_lens.attribution.frozen import FrozenModel, freeze
from circuit_lens.attribution.linear_maps import MapsUnavailableError, ModelWeights
from circuit_lens.attribution.linearity import check_linearity
from circuit_lens.attribution.settings import Row, Settings
from circuit_lens.attribution.sources import ActiveFeatures, Sources
from circuit_lens.attribution.sweep import Sweep
from circuit_lens.attribution.targets import Resolved, Resolver, Targets, TokenLogits, side_by_side, stack
from circuit_lens.attribution.values import RunValues
from circuit_lens.dictionaries.binding import Binding, reads_where_it_writes
from circuit_lens.errors import ConsistencyError, NodeNotFoundError, TargetError
from circuit_lens.graph.nodes import Feature, Node, NodeKind, Section
from circuit_lens.graph.positions import Which, find_position, join_tokens
from circuit_lens.graph.records import RankedNode
from circuit_lens.hooks import present_hooks
from circuit_lens.running import plain_tensors, token_strings

if TYPE_CHECKING:
    from circuit_lens.attribution.heads import HeadLoadings
    from circuit_lens.graph.graph import AttributionGraph

FeatureLabel = Callable[[str, int, int], str]


class LocalReplacementModel:
    """One prompt's frozen, linear model.

    Made by ``ReplacementModel.local``. Rows are computed on demand; nothing of the user's model is changed.

    Args:
        binding: The model and its dictionaries.
        weights: The model's linear parts.
        values: The run.
        settings: What is held constant.
        prompt: The prompt as text, where it was text.
        label: Label of a feature by site, layer and index.

    Raises:
        LinearizationError: The frozen model is not linear.
        ConsistencyError: Activations that do not fit together.
        ReconstructionError: A dictionary explains less than nothing of what it should reconstruct.
    """

    def __init__(
        self,
        binding: Binding,
        weights: ModelWeights,
        values: RunValues,
        settings: Settings,
        *,
        prompt: str | None = None,
        label: FeatureLabel = lambda site, layer, index: "",
    ) -> None:
        self.binding, self.model, self.values = binding, binding.model, values
        self.settings = settings.settled(autoencoders=any(map(reads_where_it_writes, binding.dictionaries)))
        self.prompt, self.label = prompt, label
        self.tokens: Int[Tensor, "n_pos"] = values.tokens
        self.token_strings = token_strings(self.model, values.tokens)
        self.user_hooks = present_hooks(self.model) + [f"fwd_hooks: {s}" for s, _ in values.fwd_hooks]
        self.engine, self.engine_note = self._choose_engine(weights)
        with plain_tensors():
            self.frozen = self._freeze(weights)
        constants = self._attention_constants()
        with plain_tensors():
            self.sources: Sources = self._collect(constants)
        self.checks: dict[str, Any] = {"logit_gap": self.frozen.gap}
        if settings.check:
            self._check()

    # Building

    def _choose_engine(self, weights: ModelWeights) -> tuple[str, str]:
        if self.settings.attention == "linear":
            return "reference", "attention='linear' needs autograd"
        if self.settings.engine == "reference":
            return "reference", "asked for"
        if weights.unavailable is not None:
            return "reference", self._fallback(weights.unavailable)
        return "fast", ""

    def _fallback(self, reason: str) -> str:
        """Return the note that the reference is used; raise if the fast path was asked for by name."""
        if self.settings.engine == "fast":
            raise ConsistencyError(f"engine='fast' cannot be used here: {reason}; use engine='auto' or 'reference'")
        return f"fallback: {reason}"

    def _freeze(self, weights: ModelWeights) -> FrozenModel:
        linear = self.settings.norms == "linear"
        try:
            return freeze(self.model, weights, self.values, linear_norms=linear)
        except MapsUnavailableError as error:
            self.engine, self.engine_note = "reference", self._fallback(str(error))
            return freeze(self.model, weights.without_attention(str(error)), self.values, linear_norms=linear)

    def _collect(self, constants: list[Tensor] | None) -> Sources:
        return collect(
            self.model,
            self.frozen,
            self.binding.dictionaries,
            mlp=self.settings.mlp,
            zero_positions=[self.position(p) for p in self.settings.zero_positions],
            attention_constants=constants,
        )

    def _hooks(self) -> FrozenHooks:
        return FrozenHooks(
            self.model,
            self.frozen,
            self.sources,
            linear_norms=self.settings.norms == "linear",
            linear_attention=self.settings.attention == "linear",
        )

    def _attention_constants(self) -> list[Tensor] | None:
        """Return the constants of attention where the linear maps do not give them."""
        if self.frozen.attention and self.settings.attention == "frozen":
            return None
        empty = Sources([], [], [None] * self.frozen.n_layers, [], self.frozen.n_pos)
        linear = self.settings.norms == "linear", self.settings.attention == "linear"
        hooks = FrozenHooks(self.model, self.frozen, empty, linear_norms=linear[0], linear_attention=linear[1])
        return attention_constants(hooks)

    def _check(self) -> None:
        with plain_tensors():
            check_reads(self.frozen, self.sources)
            edited = bool(self.user_hooks or self.frozen.patches)
            check_reconstruction(self.frozen, self.sources, self.settings.min_explained, edited=edited)
        frozen = self.settings.norms == "frozen" and self.settings.attention == "frozen"
        if frozen and (not self.values.from_cache or self.engine == "reference"):
            self.checks["linearity"] = check_linearity(self._hooks())

    # Looking things up

    def position(self, pos: int | str, which: Which | None = None) -> int:
        """Return the index of a position given as an index (negative from the end) or as the string of one token."""
        return find_position(self.token_strings, pos, which=which)

    @property
    def explained(self) -> dict[str, float]:
        """Per dictionary, the share of the MLP output's square that it explains here, first position left out."""
        pairs = zip(self.sources.features, self.sources.explained, strict=True)
        return {f.dictionary.site: e for f, e in pairs}

    @property
    def n_active(self) -> int:
        """Number of active features."""
        return self.sources.n_features

    @cached_property
    def all_columns(self) -> Columns:
        """The source nodes when every active feature is one."""
        return lay_out(self.sources, torch.arange(self.n_active), self.tokens.cpu(), self.label)

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """Name of each source node when every active feature is one."""
        logit = Section(NodeKind.LOGIT, torch.zeros(1, dtype=torch.long))
        nodes = table(self.all_columns, logit)
        return tuple(nodes.name(i) for i in range(nodes.n_sources))

    def column(self, feature: Feature | Node) -> int:
        """Return the column of an active feature.

        Raises:
            NodeNotFoundError: The feature is not active there; names the strongest ones that are.
        """
        if isinstance(feature, Node):
            feature = feature.feature
        pos = self.position(feature.pos)
        dictionary = self.binding.dictionary(feature.layer, feature.site)
        if not 0 <= feature.index < dictionary.d_sae:
            raise NodeNotFoundError(f"{dictionary} has features 0..{dictionary.d_sae - 1}, not {feature.index}")
        f = next(f for f in self.sources.features if f.dictionary is dictionary)
        here = f.at(pos)
        found = (f.index[here] == feature.index).nonzero()[:, 0].tolist()
        if found:
            return f.start + here.start + found[0]
        active = f.index[here][f.act[here].argsort(descending=True)][:5].tolist()
        raise NodeNotFoundError(
            f"feature {feature.index} of layer {feature.layer} is not active at position {pos} "
            f"({self.token_strings[pos]!r}); active there, strongest first: {active or 'none'}"
        )

    def record_of(self, column: int) -> tuple[ActiveFeatures, int]:
        """Return the record a column lies in, and its place there."""
        f = next(f for f in self.sources.features if f.start <= column < f.start + len(f))
        return f, column - f.start

    def feature_positions(self) -> Int[Tensor, "n_active"]:
        """Return the position of each active feature, by column."""
        return torch.cat([f.pos.cpu() for f in self.sources.features] or [torch.zeros(0, dtype=torch.long)])

    # Rows

    def feature_targets(self, columns: Sequence[int]) -> Targets:
        """Return active features, by column, as targets."""
        if not len(columns):
            none = torch.zeros(0, dtype=torch.long)
            return Targets((), none, none, self.frozen.tokens[:0], {})
        hooks: list[str] = []
        layers, positions, vectors = [], [], []
        wanted = torch.as_tensor(list(columns), dtype=torch.long)
        order = []
        for f in self.sources.features:
            members = ((wanted >= f.start) & (wanted < f.start + len(f))).nonzero()[:, 0]
            here = (wanted[members] - f.start).to(f.pos.device)
            order.append(members)
            hooks += [f.dictionary.hook_in] * len(members)
            layers.append(torch.full((len(members),), f.dictionary.layer))
            positions.append(f.pos[here].cpu())
            vectors.append(f.encoder_rows(here))
        place = torch.cat(order).argsort()
        return Targets(
            tuple(hooks[i] for i in place.tolist()),
            torch.cat(layers)[place],
            torch.cat(positions)[place],
            side_by_side(vectors)[place.to(vectors[0].device)],
            {},
        )

    def feature_values(self, columns: Sequence[int]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """Return pre-activation and own bias of active features, by column.

        The own bias is the encoder's bias and the encoder row on the constant part of what it reads.
        """
        wanted = torch.as_tensor(list(columns), dtype=torch.long, device=self.frozen.tokens.device)
        values, biases = (self.frozen.tokens.new_zeros(len(wanted)) for _ in range(2))
        for f in self.sources.features:
            members = ((wanted >= f.start) & (wanted < f.start + len(f))).nonzero()[:, 0]
            if not len(members):
                continue
            here = wanted[members] - f.start
            own = self._encoder_bias(f, here)
            if bool(f.read_constant.any()):
                own = own + (f.encoder_rows(here) * f.read_constant[f.pos[here]]).sum(-1)
            values[members], biases[members] = f.pre_act[here], own
        return values, biases

    def _encoder_bias(self, f: ActiveFeatures, which: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        return f.encoder_bias(which)

    def logits(self) -> Float[Tensor, "n_pos d_vocab"]:
        """Return the model's own logits at this prompt, soft-cap included; rebuilt where a cache held none."""
        return self.frozen.capped_logits() if self.values.logits is None else self.values.logits

    @cached_property
    def _sweep(self) -> Sweep:
        return Sweep(self.frozen, self.sources)

    def row_blocks(
        self, targets: Targets, *, batch_size: int | None = None, engine: str | None = None
    ) -> Iterator[tuple[list[int], Float[Tensor, "n_block n_columns"]]]:
        """Yield rows over all columns (see :class:`Sources`), by this model's engine or the one named."""
        if not len(targets):
            return
        if (engine or self.engine) == "fast":
            yield from self._sweep.row_blocks(targets, batch_size=batch_size)
        else:
            yield from rows_by_autograd(self._hooks(), targets, batch_size=batch_size)

    def rows(self, targets: Targets, *, batch_size: int | None = None, engine: str | None = None) -> Tensor:
        """Return the rows of the given targets, ``[n, n_columns]``."""
        out = self.frozen.tokens.new_zeros(len(targets), self.sources.n_columns)
        for chosen, block in self.row_blocks(targets, batch_size=batch_size, engine=engine):
            out[chosen] = block
        return out

    def row(self, target: Feature | Node | Any) -> Row:
        """Return the row of one target: an active feature, or whatever ``attribute(targets=)`` takes, if it is one.

        Raises:
            NodeNotFoundError: The feature is not active.
            TargetError: Several targets.
        """
        resolved = self.resolve(target)
        if len(resolved) != 1:
            raise TargetError(f"a row has one target, these are {len(resolved)}: {[r.name for r in resolved]}")
        values = self.all_columns.gather(self.rows(stack(resolved)))[0]
        return Row(resolved[0].name, values, resolved[0].bias, resolved[0].value, self.source_names)

    def resolve(self, targets: Any) -> list[Resolved]:
        """Resolve targets as ``attribute`` does."""
        targets = targets.node if isinstance(targets, RankedNode) else targets
        if isinstance(targets, Node) and targets.kind is NodeKind.LOGIT and targets.index < self.model.W_U.shape[-1]:
            targets = TokenLogits((targets.index,), targets.pos)
        elif isinstance(targets, Node):
            targets = targets.feature
        return self._resolver().resolve(targets)

    def _resolver(self) -> Resolver:
        return Resolver(self.model, self.frozen, self.position, self._resolve_feature)

    def _resolve_feature(self, feature: Feature, index: int) -> Resolved:
        column = self.column(feature)
        targets = self.feature_targets([column])
        value, bias = self.feature_values([column])
        pos = int(targets.pos[0])
        resolved = Feature(feature.layer, pos, feature.index, feature.site)
        return Resolved(
            str(resolved), index, targets.hooks[0], feature.layer, pos, targets.vectors[0], None, float(value[0]),
            float(bias[0]), 1.0,
        )  # fmt: skip

    def heads(self, source: Any, target: Any) -> HeadLoadings:
        """Split an edge by the head through which the source last reaches the target's position, and the bypass.

        Args:
            source: A feature, a node, or the name of a source node.
            target: A feature, or anything ``attribute(targets=)`` takes that is one target.

        Raises:
            NodeNotFoundError: No such source.
            ConsistencyError: Attention is not known as linear maps here.
        """
        from circuit_lens.attribution.heads import head_loadings

        return head_loadings(self, source, target)

    def attribute(
        self,
        targets: Any = None,
        *,
        max_features: int | None = None,
        rerank_every: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> AttributionGraph:
        """Return the attribution graph of this prompt; arguments as in ``ReplacementModel.attribute``."""
        from circuit_lens.attribution.attribute import attribute

        return attribute(
            self,
            targets,
            max_features=max_features,
            rerank_every=rerank_every,
            batch_size=batch_size,
            progress=progress,
        )

    def expand(self, graph: AttributionGraph, node: Any) -> AttributionGraph:
        """Return the graph with one more feature (or all of a rest node's) as nodes with rows of their own.

        Raises:
            ConsistencyError: The graph was made on another prompt, or with other weights or settings.
            NodeNotFoundError: The node is no rest node and no active feature.
        """
        from circuit_lens.attribution.attribute import expand

        return expand(self, graph, node)

    def manifest(self) -> dict[str, Any]:
        """Return what identifies this local model: versions, weight hashes, settings, the user's hooks."""
        packages = ("circuit-lens", "torch", "transformer-lens", "sae-lens")
        return {
            "versions": {p: _version(p) for p in packages},
            "weights": self.binding.fingerprints(),
            "model": {
                "name": getattr(self.model.cfg, "model_name", None),
                "class": type(self.model).__name__,
                "n_layers": self.frozen.n_layers,
                "d_vocab": int(self.model.W_U.shape[-1]),
                "dtype": str(self.model.W_U.dtype).removeprefix("torch."),
            },
            "dictionaries": {d.site: repr(d) for d in self.binding.dictionaries},
            "settings": self.settings.manifest(),
            "engine": self.engine,
            "engine_note": self.engine_note,
            "source": "cache" if self.values.from_cache else "prompt",
            "user_hooks": self.user_hooks,
            "patches": [f"L{p.layer} {p.site} at {p.positions}" for p in self.frozen.patches],
            "checks": self.checks,
            "explained": self.explained,
            "n_active_features": self.n_active,
        }

    def __repr__(self) -> str:
        text = self.prompt if self.prompt is not None else join_tokens(self.token_strings)
        return f"LocalReplacementModel({text!r}, {self.n_active} active features, engine {self.engine})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
