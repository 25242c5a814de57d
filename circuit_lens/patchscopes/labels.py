"""Labels for a graph's nodes by patchscope, each held against random vectors and against ablating the node.

A label is a token that a target prompt says with the node's vector at its placeholder. Two things are asked of it.
Does a random vector of the same length, at the same place, make it as probable? Does the model say it less when the
node is ablated on the graph's own prompt?
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.errors import PatchscopeError, TokenNotFoundError, TokensError
from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import Feature, Node, NodeKind
from circuit_lens.graph.positions import find_position, join_tokens
from circuit_lens.graph.records import RankedNode
from circuit_lens.graph.select import NodeRef
from circuit_lens.graph.supernodes import Supernode
from circuit_lens.interventions.intervene import intervene_batch
from circuit_lens.interventions.plan import Bound
from circuit_lens.interventions.plan_parts import check_activations, feature_ids, members_of
from circuit_lens.interventions.recording import Recording, record
from circuit_lens.interventions.validation import require_same
from circuit_lens.patchscopes import presets
from circuit_lens.patchscopes.explain import Unit, random_directions, units_of
from circuit_lens.patchscopes.node_labels import Candidate, Kind, NodeLabel, NodeLabels
from circuit_lens.patchscopes.patchscope import patchscope
from circuit_lens.patchscopes.sources import At, Vectors
from circuit_lens.patchscopes.streams import EMBEDDING, MEMORY
from circuit_lens.patchscopes.targets import Placed, Preset, Target
from circuit_lens.protocols import HookedModel
from circuit_lens.running import token_string

SCALE = 4.0
N_RANDOM = 19
N_NODES = 10
N_TOKENS = 4


def label_nodes(
    rm: Bound,
    graph: AttributionGraph,
    *,
    nodes: NodeRef | Supernode | Iterable[NodeRef | Supernode] | None = None,
    residuals: Sequence[tuple[int, int | str]] | Literal["all"] = (),
    target: Target | Sequence[Target] | None = None,
    target_layer: int | None = None,
    scale: float = SCALE,
    unit: Unit | None = None,
    n_tokens: int = N_TOKENS,
    n_random: int = N_RANDOM,
    ablate: bool = True,
    seed: int = 0,
    memory: float = MEMORY,
) -> NodeLabels:
    """Return labels for nodes of a graph: what their vectors say, beside random vectors and beside ablation.

    A feature is its unit decoder row (summed over the layers it writes to), a supernode `Vectors.supernode`, both
    ``scale`` units long (a unit is the mean residual norm of the target prompt at the target layer, see
    `explain.explain_vectors`) and written at ``target_layer``. A residual is the stream of the graph's prompt at a
    layer and position, written as it is into the same layer.

    Candidates are the next token of each target, and for targets that generate (a description) the tokens that they
    say, each given those before it. The best has the largest margin over the random vectors. Then the node is ablated
    on the live model (activations set to 0, supernodes with all their members, nothing frozen): ``drop`` is at the
    graph's last position, ``peak_drop`` at the position from the node's own on at which the clean run gives the label
    most. Random sets of as many other active features, at the node's positions where there are enough, are ablated
    beside it.

    Args:
        rm: The ReplacementModel that the graph was made with.
        graph: A graph of one prompt, pruned or not.
        nodes: Feature nodes (ids, names, ``cl.Feature``, records) or supernodes, one or several; None: the ten features
            of most influence, or none where ``residuals`` are asked for.
        residuals: (layer, position) of the prompt; layer -1 is the embedding. "all": all of them.
        target: One or several; None: token identity and a description, in the words of the bundled models where the
            tokenizer knows no others.
        target_layer: Where directions are written; None: ``n_layers // 8``.
        scale, unit: Their length.
        n_tokens: Tokens of a target that generates, at most.
        n_random: Random vectors, and random ablations, of each node; at least 2.
        ablate: Ablate the nodes.
        seed: Of both.
        memory: See `circuit_lens.patchscope`.

    Raises:
        ConsistencyError: The graph is of other weights, hooks or conditions, or a contrast of two prompts.
        NodeNotFoundError, TokenNotFoundError, InterventionError: A node, position or supernode that is not there.
        PatchscopeError: A node that is no feature, no nodes at all, a layer or number that is not valid.
        TokensError: A target in words that the tokenizer does not know.
    """
    require_same(rm.binding, graph)
    model = rm.binding.model
    layer = model.cfg.n_layers // 8 if target_layer is None else target_layer
    _require(model, layer, scale, n_tokens, n_random)
    targets = default_targets(model) if target is None else [target] if isinstance(target, Target) else list(target)
    if not targets:
        raise PatchscopeError("target=[] names no target; give one or several, or None")
    recording = record(rm.binding, graph.tokens)
    found = _nodes(rm, graph, recording, nodes if nodes is not None or residuals else graph.top(N_NODES))
    found += _residuals(model, graph, residuals, memory)
    if not found:
        raise PatchscopeError("no nodes to label: give nodes=, residuals=, or a graph with features")
    reader = _Reader(model, n_random, seed, memory)
    parts: list[list[Candidate]] = [[] for _ in found]
    for one in targets:
        placed = one.place(model)
        units = units_of(model, placed, unit)
        vectors = [item.placed(layer, scale * units[layer]) for item in found]
        n_new = min(one.max_new_tokens, n_tokens) if isinstance(one, Preset) else 0
        for into, new in zip(parts, reader.candidates(one, placed, vectors, max(1, n_new)), strict=True):
            into.extend(new)
    for number, item in enumerate(found):
        ablated = item.features if ablate else ()
        parts[number] = _against_ablation(recording, item, ablated, parts[number], n_random, seed + number)
    return NodeLabels(
        labels=tuple(item.label(some) for item, some in zip(found, parts, strict=True)),
        prompt=graph.prompt if graph.prompt is not None else join_tokens(graph.token_strings),
        n_random=n_random,
        settings={
            "targets": [one.name or str(one.prompt) for one in targets], "target_layer": layer, "scale": scale,
            "n_tokens": n_tokens, "seed": seed,
        },
        notes=tuple(f"{i.name} is not active on this prompt, so nothing was ablated" for i in found if i.inactive),
    )  # fmt: skip


def default_targets(model: HookedModel) -> list[Target]:
    """Return token identity and a description, in the words that the tokenizer knows.

    Raises:
        PatchscopeError: No tokenizer, or one that knows none of them.
    """
    pairs = [
        (presets.token_identity("lines"), presets.entity_description("paper")),
        (presets.token_identity("words"), presets.entity_description("words")),
    ]
    reason = ""
    for pair in pairs:
        try:
            for one in pair:
                one.place(model)
        except (TokensError, TokenNotFoundError, PatchscopeError) as error:
            reason = reason or str(error)
        else:
            return list(pair)
    raise PatchscopeError(
        f"no default target can be written for this model ({reason}); give target=cl.Target(prompt, at=placeholder)"
    )


@dataclass(frozen=True, eq=False)
class _Item:
    """A node with its vector: a direction of length 1, or a residual with its layer."""

    name: str
    kind: Kind
    layer: int
    pos: int
    given: str
    vector: Float[Tensor, "d_model"]
    features: tuple[Feature, ...] = ()
    inactive: bool = False

    def placed(self, layer: int, length: float) -> tuple[int, Float[Tensor, "d_model"]]:
        """Return the layer that it is written at, and what is written."""
        return (self.layer, self.vector) if self.kind == "residual" else (layer, self.vector * length)

    def label(self, candidates: Sequence[Candidate]) -> NodeLabel:
        """Return the label, its candidates by margin (ties: the earlier)."""
        ordered = tuple(sorted(candidates, key=lambda one: -one.margin))
        return NodeLabel(self.name, self.kind, self.layer, self.pos, self.given, len(self.features), ordered)


def _nodes(rm: Bound, graph: AttributionGraph, recording: Recording, given: Any) -> list[_Item]:
    """Return the features and supernodes that are asked for."""
    if given is None:
        return []
    single = isinstance(given, int | str | Feature | Node | RankedNode | Supernode)
    dictionaries, ids = rm.binding.dictionaries, feature_ids(graph)
    found = []
    for one in [given] if single else given:
        if isinstance(one, Supernode):
            members = members_of(rm.binding, graph.token_strings, [one])[one.name]
            vector, name, label, kind = Vectors.supernode(dictionaries, one), one.name, one.name, "supernode"
        else:
            node = graph.node(one)
            if node.kind is not NodeKind.FEATURE:
                raise PatchscopeError(
                    f"{node.name} is a node of kind {node.kind.name.lower()} and has no decoder row; give features or "
                    "supernodes, and positions of the prompt as residuals=[(layer, position)]"
                )
            members, kind = (node.feature,), "feature"
            dictionary = rm.binding.dictionary(node.layer, node.feature.site)
            vector, name, label = Vectors.decoder(dictionary, node.index), node.name, node.label
        check_activations(graph, recording, {name: {f: ids[f] for f in members if f in ids}})
        active = tuple(f for f in members if recording.activation(f) != 0.0)
        first = min(members, key=lambda f: (f.layer, int(f.pos)))
        start = min(int(f.pos) for f in members)
        row = vector.values[0, 0, 0].to(rm.binding.model.W_U)
        found.append(_Item(name, kind, first.layer, start, label, row, active, not active))
    return found


def _residuals(
    model: HookedModel, graph: AttributionGraph, given: Sequence[tuple[int, int | str]] | Literal["all"], memory: float
) -> list[_Item]:
    """Return the residual streams that are asked for."""
    strings, known = graph.token_strings, range(EMBEDDING, model.cfg.n_layers)
    pairs = [(layer, i) for layer in known for i in range(len(strings))] if given == "all" else list(given)
    if not pairs:
        return []
    wrong = [layer for layer, _ in pairs if layer not in known]
    if wrong:
        raise PatchscopeError(f"residuals of layer {wrong[0]} do not exist; layers are {known[0]} to {known[-1]}")
    placed = [(int(layer), find_position(strings, pos)) for layer, pos in pairs]
    positions = sorted({pos for _, pos in placed})
    at = [At(graph.tokens, pos=pos) for pos in positions]
    states = Vectors.from_prompts(model, at, memory=memory, next_logits=False)
    return [
        _Item(
            f"L{layer} P{pos} residual", "residual", layer, pos, strings[pos].strip(),
            states.layer(layer)[positions.index(pos), 0].to(model.W_U),
        )
        for layer, pos in placed
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads candidates and their scores off a target prompt."""

    model: HookedModel
    n_random: int
    seed: int
    memory: float

    def _say(self, target: Target | Placed, rows: Tensor, layer: int, n_new: int) -> Any:
        asked = Target(target.tokens, at=target.positions) if isinstance(target, Placed) else target
        return patchscope(
            self.model, Vectors.of(rows), Target(asked.prompt, at=asked.at, which=asked.which), target_layers=[layer],
            max_new_tokens=n_new, keep_logits=not n_new, controls=False, memory=self.memory, progress=False,
        )  # fmt: skip

    def candidates(
        self, target: Target, placed: Placed, vectors: Sequence[tuple[int, Float[Tensor, "d_model"]]], n_new: int
    ) -> list[list[Candidate]]:
        """Return the candidates of every vector."""
        name = target.name or placed.text
        said: dict[int, list[int]] = {}
        for layer in dict.fromkeys(layer for layer, _ in vectors):
            numbers = [i for i, (one, _) in enumerate(vectors) if one == layer]
            out = self._say(placed, torch.stack([vectors[i][1] for i in numbers]), layer, n_new).patched
            for i, ids, length in zip(numbers, out.new_tokens[:, 0, 0, 0], out.lengths[:, 0, 0, 0], strict=True):
                said[i] = ids[: int(length)].tolist()
        groups: dict[tuple[int, tuple[int, ...], float], list[int]] = {}
        for i, (layer, vector) in enumerate(vectors):
            for n in range(len(said[i])):
                groups.setdefault((layer, tuple(said[i][:n]), round(float(vector.norm()), 4)), []).append(i)
        found: list[list[Candidate]] = [[] for _ in vectors]
        for (layer, before, _), numbers in groups.items():
            rows = torch.stack([vectors[i][1] for i in numbers])
            own = torch.tensor([said[i][len(before)] for i in numbers])
            scores = self._scores(placed, before, rows, layer, own)
            for i, token, figures in zip(numbers, own.tolist(), scores, strict=True):
                text = token_string(self.model, token)
                after = " ".join(token_string(self.model, one).strip() for one in before)
                found[i].append(Candidate(name, after, token, text, *figures, clean=0.0))
        return found

    def _scores(
        self, placed: Placed, before: tuple[int, ...], rows: Float[Tensor, "n d_model"], layer: int,
        own: Int[Tensor, "n"],
    ) -> list[tuple[float, float, float, float]]:  # fmt: skip
        """Return probability, margin and both p-values of each row's own token, after some tokens."""
        tokens = torch.cat([placed.tokens, placed.tokens.new_tensor(before)])
        random = random_directions(self.n_random, rows.shape[-1], self.seed).to(rows) * rows[0].norm()
        out = self._say(replace(placed, tokens=tokens), torch.cat([rows, random]), layer, 0)
        logprobs = out.logits[:, 0, 0, 0].double().log_softmax(-1)
        mine, theirs = logprobs[: len(rows)], logprobs[len(rows) :]
        logprob, others = mine.gather(1, own[:, None])[:, 0], theirs[:, own]
        margin = logprob - others.mean(0)
        top = theirs.argmax(-1)
        table = theirs[:, top]  # of every random vector, each random vector's own token
        n = self.n_random
        random_margin = table.diagonal() - (table.sum(0) - table.diagonal()) / (n - 1)
        p_value = (1 + (others >= logprob).sum(0)).double() / (1 + n)
        p_margin = (1 + (random_margin[:, None] >= margin).sum(0)).double() / (1 + n)
        figures = zip(logprob.exp().tolist(), margin.tolist(), p_value.tolist(), p_margin.tolist(), strict=True)
        return list(figures)


def _against_ablation(
    recording: Recording, item: _Item, features: Sequence[Feature], candidates: Sequence[Candidate], n_random: int,
    seed: int,
) -> list[Candidate]:  # fmt: skip
    """Return the candidates with what they lose when the node, and random others, are ablated."""
    ids = [one.token for one in candidates]
    logs = recording.logits.double().log_softmax(-1)[item.pos :, ids]  # from the node's position on
    clean = logs.exp()
    peaks = clean.argmax(0).tolist()
    found = [
        replace(one, clean=float(clean[-1, i]), peak_pos=item.pos + peak, peak=float(clean[peak, i]))
        for i, (one, peak) in enumerate(zip(candidates, peaks, strict=True))
    ]
    if not features:
        return found
    sets = random_sets(recording, features, n_random, seed)
    runs = [[f.set(0.0) for f in some] for some in [features, *sets]]
    batch = intervene_batch(recording.binding, recording, runs, pos=slice(item.pos, None), progress=False)
    after = batch.logits.double().log_softmax(-1)[..., ids]
    drops, nats = clean - after.exp(), logs[-1] - after[0, -1]
    last = drops[:, -1]
    p = (1 + (last[1:] >= last[0]).sum(0)).double() / (1 + len(sets))
    for i, one in enumerate(found):
        found[i] = replace(
            one,
            drop=float(last[0, i]),
            drop_nats=float(nats[i]),
            p_drop=float(p[i]) if sets else None,
            peak_drop=float(drops[0, peaks[i], i]),
        )
    return found


def random_sets(recording: Recording, features: Sequence[Feature], n: int, seed: int) -> list[tuple[Feature, ...]]:
    """Return n sets of as many other active features, at the same positions where there are at least twice as many.

    Else they are drawn from all positions; none where there are not more of them than are wanted.
    """
    own, positions = set(features), {f.pos for f in features}
    every = [f for f in recording.active() if f not in own]
    near = [f for f in every if f.pos in positions]
    pool = near if len(near) >= 2 * len(own) else every
    if len(pool) <= len(own):
        return []
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(pool), generator=generator)[: len(own)].tolist() for _ in range(n)]
    return [tuple(pool[i] for i in some) for some in drawn]


def _require(model: HookedModel, layer: int, scale: float, n_tokens: int, n_random: int) -> None:
    known = range(EMBEDDING, model.cfg.n_layers)
    if layer not in known:
        raise PatchscopeError(f"target_layer={layer} does not exist; the model has layers {known[0]} to {known[-1]}")
    if not 0 < scale < float("inf"):
        raise PatchscopeError(f"scale={scale!r} is not valid; give a number above 0")
    if n_tokens < 1:
        raise PatchscopeError(f"n_tokens={n_tokens!r} is not valid; give 1 or more")
    if n_random < 2:
        raise PatchscopeError(f"n_random={n_random!r} is not valid; give 2 or more, which margins are compared with")
