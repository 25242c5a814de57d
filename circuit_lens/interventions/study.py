"""One graph and what the live model answers to it: what every part of the validation card is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_lens.dictionaries.points import Place
from circuit_lens.errors import ConsistencyError, InterventionError
from circuit_lens.graph.card_tables import Figure
from circuit_lens.graph.effects import spread
from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.statistics import NAN, bootstrap, bootstrap_pairs, r_squared, sign_accuracy, spearman
from circuit_lens.interventions.measure import LIVE, Ablations, Active
from circuit_lens.interventions.readout import Readout
from circuit_lens.interventions.recording import Recording, open_mlps, record
from circuit_lens.running import Prompt

Ablation = Literal["zero", "mean", "resample"]
Pairs = tuple[Int[np.ndarray, "n_pair"], Int[np.ndarray, "n_pair"]]


@dataclass(frozen=True)
class CardSettings:
    """How a card is made.

    Attributes:
        ablation: What an ablated feature becomes: 0, its mean over the reference prompts, or its value at the same
            position (the last one of a shorter prompt) of a reference prompt drawn for each feature.
        max_nodes: Ablate at most this many of the graph's features that can reach the target.
        choose: Which, if there are more: those of most ``"influence"``, or ``"random"`` ones, so that figures estimate
            those of all (among nodes alike in a predictor, that predictor ranks worse than among all).
        edge_share: The graph claims a knock-on effect and hardly an edge where |edge| is at most this share of the
            |total effect|.
        knock_on_targets: Features, drawn at random, at which effects of features on features are compared.
        flip_sources: Ablated features whose switched features are counted.
        node_threshold, edge_threshold: Of the circuit whose sufficiency and necessity are measured.
        random_circuits: Random circuits of its size at every layer and position.
        samples: Bootstrap samples of each interval; 0 gives none.
        seed: Of everything that is drawn.
    """

    ablation: Ablation = "zero"
    max_nodes: int = 512
    choose: Literal["influence", "random"] = "influence"
    edge_share: float = 0.1
    knock_on_targets: int = 128
    flip_sources: int = 64
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    random_circuits: int = 10
    samples: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid in (("ablation", ("zero", "mean", "resample")), ("choose", ("random", "influence"))):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is not valid; give one of {', '.join(valid)}")
        for name in ("max_nodes", "flip_sources", "random_circuits", "samples", "knock_on_targets"):
            least = 1 if name == "max_nodes" else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} is not valid; give a whole number from {least} up")
        if not 0 <= self.edge_share < 1:
            raise ValueError(f"edge_share={self.edge_share!r} is not valid; give a share from 0 to below 1")


class Study:
    """One graph and the live model's answers.

    Attributes:
        linear: Layers whose MLP, for which no dictionary stands, the graph has as its Jacobian.
        closed: The other layers, whose MLP outputs are features and errors.
        active: The features active on the prompt; columns of what is measured.
        node_of: The graph's node of each, -1 where it has none.
        sources: Which of them are ablated; rows of what is measured.
        share: What an ablation adds to a source's activation, as a share of it.
        live, live_pre: Measured changes of the target and of every active feature's pre-activation.
        said_pre: The graph's total effects on pre-activations; NaN where the graph has no node.
        edge_pre: Its direct edges, likewise.
        matched: For each source the row of another that is like it, -1 where there is none.
    """

    def __init__(
        self,
        recording: Recording,
        graph: AttributionGraph,
        read: Readout,
        reference: Sequence[Prompt],
        settings: CardSettings,
    ) -> None:
        self.recording, self.graph, self.read, self.settings = recording, graph, read, settings
        self.n_layers = recording.binding.model.cfg.n_layers
        jacobian = graph.manifest.get("settings", {}).get("mlp") == "jacobian"
        self.linear = frozenset(open_mlps(recording.binding)) if jacobian else frozenset()
        self.closed = frozenset(range(self.n_layers)) - self.linear
        self.rng = np.random.default_rng(settings.seed)
        self.active = Active.of(recording)
        self.node_of = nodes_of(graph, self.active)
        self._check_activations()
        self.n_able = 0
        self.replace = _replacements(recording, self.active, reference, settings, self.rng)
        self.sources = self._choose()
        self.runs = Ablations(recording, self.active, self.sources, self.replace[self.sources], read)
        self.share = self.runs.delta / self.active.act[self.sources]
        self.live, self.live_pre = self.runs.spread(LIVE)
        self.said_pre, self.edge_pre = self._from_graph()
        self.matched = _matched(self.active, self.sources, self.runs.delta, self.rng)

    def _check_activations(self) -> None:
        """Raise unless the graph's features are active on the run as the graph says.

        Rounding may switch a feature that is at its threshold, at which the activation (of a JumpReLU) jumps but the
        pre-activation, equal to it above, does not. Such features have no run of their own.
        """
        known = self.node_of >= 0
        its = self.graph.nodes.activation[: self.graph.nodes.n_features].double().cpu().numpy()
        mine = self._pre_acts_of_nodes()
        mine[self.node_of[known]] = self.active.act[known]
        gap = np.abs(mine - its).max(initial=0.0)
        limit = 1e-6 if self.recording.logits.dtype == torch.float64 else 1e-2
        if self.recording.logits.dtype in (torch.float16, torch.bfloat16):
            limit = 0.1
        if not gap <= limit * np.abs(its).max(initial=1.0):
            raise ConsistencyError(
                f"the graph's features are not active on its prompt as it says ({int(known.sum())} of "
                f"{self.graph.nodes.n_features} are, activations differ by {gap:.1e}): it is of another run, or the "
                "model has hooks that it had not; remove them or attribute the prompt again"
            )

    def _pre_acts_of_nodes(self) -> Float[np.ndarray, "n_features"]:
        """Return what the run's pre-activation is at each feature of the graph."""
        nodes, n = self.graph.nodes, self.graph.nodes.n_features
        found = np.zeros(n)
        for d in self.recording.binding.dictionaries:
            here = nodes.site[:n] == (nodes.sites.index(d.site) if d.site in nodes.sites else -1)
            pre = self.recording.pre_acts(d)[nodes.pos[:n][here].long(), nodes.index[:n][here]]
            found[here.cpu().numpy()] = pre.double().cpu().numpy()
        return found

    def _choose(self) -> Int[np.ndarray, "n"]:
        """Return the active features that are ablated: nodes of the graph that can reach the target.

        A replacement equal to what was there (a resampled value of a prompt that begins alike) is no ablation.
        """
        changed = np.abs(self.replace - self.active.act) > 1e-4 * np.abs(self.active.act)
        able = np.flatnonzero((self.node_of >= 0) & self._reaches() & changed)
        if not len(able):
            raise InterventionError(
                "no feature of the graph can reach the target and is changed by this ablation, so there is nothing to "
                "ablate; with ablation='resample' give reference prompts that differ from the prompt"
            )
        self.n_able = len(able)
        if self.settings.choose == "random":
            return np.sort(self.rng.permutation(able)[: self.settings.max_nodes])
        influence = self.graph.influence().numpy()[self.node_of[able]]
        return np.sort(able[np.argsort(-influence, kind="stable")[: self.settings.max_nodes]])

    def _reaches(self) -> Bool[np.ndarray, "n_active"]:
        """Return which features can reach what is read: at its position, or before it with attention still to come.

        The others have no effect whatever a predictor says, and ranking them right would be no merit.
        """
        positions = np.array(self.read.positions)
        moves_on = self.active.write < Place.HEADS.at(self.n_layers - 1)
        return np.isin(self.active.pos, positions) | (moves_on & (self.active.pos < positions.max()))

    def _from_graph(self) -> tuple[Float[np.ndarray, "n n_active"], Float[np.ndarray, "n n_active"]]:
        graph, known = self.graph, np.flatnonzero(self.node_of >= 0)
        at = torch.as_tensor(self.node_of[self.sources])
        total = spread(graph.adjacency, nodes=graph.nodes, sources=at).numpy()
        edge = graph.adjacency[:, at].double().T.numpy()
        found = []
        for effect in (total, edge):
            pre = np.full((len(self.sources), len(self.active.features)), NAN)
            pre[:, known] = effect[:, self.node_of[known]] * self.share[:, None]
            found.append(pre)
        return found[0], found[1]

    def at_sources(self, gradients: dict[str, Tensor]) -> Float[np.ndarray, "n"]:
        """Return gradients at every feature, by site, at the sources."""
        parts = [gradients[d.site][0][self.recording.acts(d) != 0] for d in self.recording.binding.dictionaries]
        return torch.cat(parts).double().cpu().numpy()[self.sources]

    def interval(
        self, figure: Callable[[Int[np.ndarray, "n"]], float], n: int, pairs: Pairs | None = None
    ) -> tuple[float, float]:
        """Return the interval of a figure over things, or over the rows and columns of pairs."""
        samples, seed = self.settings.samples, self.settings.seed
        if pairs is None:
            return bootstrap(n, figure, samples=samples, seed=seed)
        return bootstrap_pairs(*pairs, figure, samples=samples, seed=seed)

    def score(
        self,
        name: str,
        predicted: Float[np.ndarray, "n"],
        measured: Float[np.ndarray, "n"],
        *,
        signed: bool,
        pairs: Pairs | None = None,
    ) -> dict[str, Figure]:
        """Return the measures of one predictor of things, or of pairs."""
        measures: dict[str, Callable[..., float]] = {"abs_spearman": lambda p, m: spearman(np.abs(p), np.abs(m))}
        if signed:
            measures |= {"spearman": spearman, "sign_accuracy": sign_accuracy, "r_squared": r_squared}
        figures = {}
        for key, measure in measures.items():

            def figure(at: Int[np.ndarray, "n"], measure: Callable[..., float] = measure) -> float:
                return measure(predicted[at], measured[at])

            low, high = self.interval(figure, len(measured), pairs)
            figures[f"{name}/{key}"] = Figure(measure(predicted, measured), low, high, len(measured))
        return figures


def nodes_of(graph: AttributionGraph, active: Active) -> Int[np.ndarray, "n_active"]:
    """Return the graph's node of each active feature, -1 where it has none."""
    nodes, f = graph.nodes, graph.nodes.n_features
    columns = (nodes.layer[:f].tolist(), nodes.pos[:f].tolist(), nodes.index[:f].tolist(), nodes.site[:f].tolist())
    found = np.full(len(active.features), -1)
    for node, (layer, pos, index, site) in enumerate(zip(*columns, strict=True)):
        column = active.column.get(Feature(layer, pos, index, nodes.sites[site]))
        if column is not None:
            found[column] = node
    return found


def _replacements(
    recording: Recording,
    active: Active,
    reference: Sequence[Prompt],
    settings: CardSettings,
    rng: np.random.Generator,
) -> Float[np.ndarray, "n_active"]:
    """Return what each active feature becomes when it is ablated."""
    n = len(active.features)
    if settings.ablation == "zero":
        return np.zeros(n)
    if isinstance(reference, str) or not len(reference):
        raise InterventionError(
            f"ablation={settings.ablation!r} needs reference=, a list of prompts to take values from; or use 'zero'"
        )
    donors = [record(recording.binding, prompt) for prompt in reference]
    dictionary = recording.binding.dictionary
    if settings.ablation == "mean":
        # Without first positions, where activations are unlike all others.
        means = {
            d.site: torch.cat([donor.acts(d)[min(1, donor.n_pos - 1) :] for donor in donors]).double().mean(0)
            for d in recording.binding.dictionaries
        }
        return np.array([float(means[dictionary(f.layer, f.site).site][f.index]) for f in active.features])
    drawn = rng.integers(0, len(donors), n)
    values = []
    for f, i in zip(active.features, drawn, strict=True):
        acts = donors[i].acts(dictionary(f.layer, f.site))
        values.append(float(acts[min(int(f.pos), donors[i].n_pos - 1), f.index]))
    return np.array(values)


def _matched(
    active: Active, sources: Int[np.ndarray, "n"], delta: Float[np.ndarray, "n"], rng: np.random.Generator
) -> Int[np.ndarray, "n"]:
    """Return for each source one of the 3 others of its layer and position whose activations change most like its."""
    layer, pos = active.layer[sources], active.pos[sources]
    found = np.full(len(sources), -1)
    for i in range(len(sources)):
        for same in ((layer == layer[i]) & (pos == pos[i]), layer == layer[i], np.ones(len(sources), bool)):
            others = np.flatnonzero(same & (np.arange(len(sources)) != i))
            if len(others):
                nearest = others[np.argsort(np.abs(delta[others] - delta[i]), kind="stable")[:3]]
                found[i] = nearest[rng.integers(0, len(nearest))]
                break
    return found
