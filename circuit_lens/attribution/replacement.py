"""The local replacement model: one prompt's frozen, linear model, reusable for rows, head loadings and graphs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.attribution.assemble import Columns, lay_out, table
from circuit_lens.attribution.autograd import FrozenHooks, attention_constants, check_linearity, rows_by_autograd
from circuit_lens.attribution.frozen import FrozenModel, freeze
from circuit_lens.attribution.linear_maps import MapsUnavailableError, ModelWeights
from circuit_lens.attribution.mlp_paths import read_constant, read_value
from circuit_lens.attribution.sources import ActiveFeatures, Sources, collect
from circuit_lens.attribution.sweep import Sweep
from circuit_lens.attribution.targets import Resolved, Resolver, Targets, TokenLogits, stack
from circuit_lens.attribution.values import RunValues
from circuit_lens.dictionaries.binding import Binding
from circuit_lens.dictionaries.points import Read, read_kind
from circuit_lens.errors import ConsistencyError, NodeNotFoundError, ReconstructionError, TargetError
from circuit_lens.graph.nodes import Feature, Node, NodeKind, Section
from circuit_lens.graph.positions import Which, find_position, join_tokens
from circuit_lens.graph.records import RankedNode
from circuit_lens.hooks import present_hooks
from circuit_lens.running import plain_tensors, token_strings

if TYPE_CHECKING:
    from circuit_lens.attribution.heads import HeadLoadings
    from circuit_lens.graph.graph import AttributionGraph

Engine = Literal["auto", "fast", "reference"]
FeatureLabel = Callable[[str, int, int], str]
_READINGS = 16  # positions at which a dictionary's other possible inputs are tried


@dataclass(frozen=True)
class Settings:
    """What a local replacement model holds constant, and how it is computed.

    Attributes:
        norms: ``"frozen"``: norm denominators are constants; ``"linear"``: norms by their Jacobian.
        attention: ``"frozen"``: patterns are constants; ``"linear"``: queries, keys and softmax to first order.
        mlp: An MLP without dictionary is ``"error"``, one error node, or ``"jacobian"``, its local Jacobian.
        engine: ``"fast"`` sweep, ``"reference"`` autograd, or ``"auto"``: fast where it applies and agrees.
        zero_positions: Positions at which no feature is active by decree.
        check: Check the frozen model before it is used (linearity, two rows of the fast path against the reference,
            reconstruction).
        min_explained: Least share of the MLP output's square that a dictionary must explain on the prompt; None: any.
    """

    norms: Literal["frozen", "linear"] = "frozen"
    attention: Literal["frozen", "linear"] = "frozen"
    mlp: Literal["error", "jacobian"] = "error"
    engine: Engine = "auto"
    zero_positions: tuple[int, ...] = ()
    check: bool = True
    min_explained: float | None = 0.0

    def __post_init__(self) -> None:
        valid = {
            "norms": ("frozen", "linear"),
            "attention": ("frozen", "linear"),
            "mlp": ("error", "jacobian"),
            "engine": ("auto", "fast", "reference"),
        }
        for name, allowed in valid.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not valid; give one of {', '.join(allowed)}")
        if self.engine == "fast" and self.attention == "linear":
            raise ValueError("attention='linear' needs autograd; use engine='auto' or 'reference'")


@dataclass(frozen=True, eq=False)
class Row:
    """One target's row: what every source contributes to it.

    Attributes:
        target: Name of the target.
        values: Contribution of each source node, in units of the target.
        bias: What belongs to the target alone.
        value: The target's value; ``values.sum() + bias`` equals it.
        names: Name of each source node.
    """

    target: str
    values: Float[Tensor, "n_sources"]
    bias: float
    value: float
    names: tuple[str, ...]

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """Return the ``n`` sources with the largest contributions, signs kept."""
        order = self.values.abs().topk(min(n, len(self.values))).indices.tolist()
        return [(self.names[i], float(self.values[i])) for i in order]

    def __str__(self) -> str:
        lines = [f"{self.target} = {self.value:.4f} (own bias {self.bias:+.4f})"]
        return "\n".join(lines + [f"  {value:+9.4f}  {name}" for name, value in self.top()])


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
        self.binding, self.model, self.values, self.settings = binding, binding.model, values, settings
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
            self._check_reads()
            self._check_reconstruction()
        frozen = self.settings.norms == "frozen" and self.settings.attention == "frozen"
        if frozen and (not self.values.from_cache or self.engine == "reference"):
            self.checks["linearity"] = check_linearity(self._hooks())

    def _check_reads(self) -> None:
        """Raise if a dictionary's input was edited after the residual stream: no source explains such an edit."""
        for f in self.sources.features:
            hook, layer = f.dictionary.hook_in, f.dictionary.layer
            own = self.values.values.get(hook)
            if own is None or read_kind(hook) is Read.RESIDUAL:
                continue
            norm = self.frozen.ln2[layer]
            mine = read_value(read_kind(hook), norm, self.frozen.base[layer]) + f.read_constant
            error = float((own - mine).norm() / own.norm().clamp_min(1e-30))
            limit = {torch.float64: 1e-5, torch.float32: 1e-3}.get(self.values.native, 0.1)
            if error > limit:
                raise ConsistencyError(
                    f"{hook} in the run differs by {error:.1e} from what the residual stream gives: something edits "
                    "it there. Edit the residual stream or a feature instead, or pass check=False"
                )

    def _check_reconstruction(self) -> None:
        """Raise if a dictionary explains too little, and say which input would suit it."""
        least = self.settings.min_explained
        if least is None:
            return
        if self.frozen.n_pos == 1:  # only the first position, which dictionaries are not held to
            return
        for f, explained in zip(self.sources.features, self.sources.explained, strict=True):
            better = self._better_input(f)
            if explained >= least and not better:
                continue
            raise ReconstructionError(
                f"{f.dictionary} does not reconstruct this model's MLP output as it should: it explains "
                f"{explained:.0%} of it (least: {least:.0%}).{better} Its input hook may be another one, or the model's "
                "weights are processed in a way it was not trained on: load the model with "
                "from_pretrained_no_processing. To use it all the same pass min_explained=None"
            )

    def _better_input(self, f: ActiveFeatures) -> str:
        """Say which other input would suit a dictionary clearly better, on the prompt's last positions; "" if none."""
        layer, d, part = f.dictionary.layer, f.dictionary, slice(max(1, self.frozen.n_pos - _READINGS), None)
        if self.frozen.n_pos == 1 or len(d.out_layers) > 1:
            return ""
        norm, base = self.frozen.ln2[layer], self.frozen.base[layer]
        target = self.frozen.mlp_out[d.out_layers[0]][part]
        left: dict[Read, float] = {}
        for kind in Read:
            read = (read_value(kind, norm, base) + read_constant(kind, norm))[part]
            with torch.no_grad():
                out = (d.decode(d.activate(d.pre_acts(read))) + d.skip(read))[:, 0]
            left[kind] = float((target - out).square().sum() / target.square().sum().clamp_min(1e-30))
        best = min(left, key=lambda kind: left[kind])
        if left[best] > min(0.7, 0.75 * left[read_kind(d.hook_in)]):
            return ""
        name = f"blocks.{layer}.{best.value}"
        return f" Reading {name!r} it explains {1 - left[best]:.0%}: set cfg.metadata.hook_name to that."

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
            vectors.append(f.dictionary.encoder_rows(f.index[here], self.frozen.tokens.dtype))
        place = torch.cat(order).argsort()
        return Targets(
            tuple(hooks[i] for i in place.tolist()),
            torch.cat(layers)[place],
            torch.cat(positions)[place],
            torch.cat(vectors)[place.to(vectors[0].device)],
            {},
        )

    def feature_values(self, columns: Sequence[int]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """Return pre-activation and own bias of active features, by column.

        The own bias is the encoder's bias and the encoder row on the constant part of what it reads.
        """
        values, biases = [], []
        for f in self.sources.features:
            own = f.dictionary.encoder_bias(f.index, self.frozen.tokens.dtype)
            values.append(f.pre_act)
            if bool(f.read_constant.any()):
                rows = f.dictionary.encoder_rows(f.index, self.frozen.tokens.dtype)
                own = own + (rows * f.read_constant[f.pos]).sum(-1)
            biases.append(own)
        wanted = torch.as_tensor(list(columns), dtype=torch.long, device=self.frozen.tokens.device)
        if not len(wanted):
            return self.frozen.tokens.new_zeros(0), self.frozen.tokens.new_zeros(0)
        return torch.cat(values)[wanted], torch.cat(biases)[wanted]

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
        return Resolver(self.model, self.frozen, lambda pos: self.position(pos), self._resolve_feature).resolve(targets)

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
            "settings": {
                "norms": self.settings.norms,
                "attention": self.settings.attention,
                "mlp": self.settings.mlp,
                "zero_positions": list(self.settings.zero_positions),
            },
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
