"""What is measured of bundled dictionaries of every kind: in place of the MLPs on text, and in graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Int
from torch import Tensor

from circuit_lens.evaluation.evaluate import evaluate
from circuit_lens.zoo.dictionary_figures import LayerFigures, Mediation, mediation
from circuit_lens.zoo.evaluate import DALLAS_PROMPT, held_out_prompts

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from circuit_lens.dictionaries.binding import Binding
    from circuit_lens.graph.graph import AttributionGraph
    from circuit_lens.zoo.corpus import Corpus

HELD_OUT_PROMPTS = 15


@dataclass(frozen=True, slots=True)
class ReplacementFigures:
    """Dictionaries in place of every MLP; losses are mean cross-entropies in nats over ``n_tokens`` targets.

    Attributes:
        n_tokens: Text that every figure is computed on; a dead feature is active on none of it.
        layers: In the order of the layers.
        loss: The model's own.
        loss_replaced: Every MLP replaced at once, each dictionary reading what the replacements before it made.
        loss_zeroed: Every MLP's output zero.
    """

    n_tokens: int
    layers: tuple[LayerFigures, ...]
    loss: float
    loss_replaced: float
    loss_zeroed: float

    @property
    def added_loss(self) -> float:
        """Nats that replacing every MLP costs."""
        return self.loss_replaced - self.loss


def replacement_figures(
    binding: Binding, tokens: Int[Tensor, "row pos"], real: Bool[Tensor, "row pos"]
) -> ReplacementFigures:
    """Figures of dictionaries on text; ``real`` is True at all tokens but BOS, which is first, and padding after them.

    BOS keeps its MLP outputs and counts nowhere, but the prediction it makes of the first token does.
    """
    predicting = real.clone()
    predicting[:, 0] = True
    own = evaluate(binding, tokens, mask=real, alone=False, baselines=False, progress=False)
    losses = evaluate(binding, tokens, mask=predicting, alone=False, baselines=False, progress=False)
    layers = tuple(LayerFigures(one.hook, one.explained_variance, one.l0, one.dead) for one in own.outputs)
    values = (losses.loss, losses.replaced.loss, losses.zero.loss)
    return ReplacementFigures(own.n_tokens, layers, *(one.value for one in values))


@dataclass(frozen=True, slots=True)
class PathLengths:
    """How many features a path from a token to the most probable answer passes on average, in one graph.

    ``influence`` weighs a path by the product of its normalised |edges|, as influence does (Ameisen et al. 2025,
    Circuit Tracing, appendix on graph pruning); ``effect`` by the size of the linear effect that runs along it.
    """

    influence: float
    effect: float


@dataclass(frozen=True, slots=True)
class GraphFigures:
    """One set of dictionaries in graphs: its paths on the Dallas prompt and on held-out ones, and what mediates."""

    dallas: PathLengths
    held_out: tuple[PathLengths, ...]
    mediation: Mediation


@dataclass(frozen=True, slots=True)
class GraphsOfSets:
    """`GraphFigures` by the name of the set, all on the same prompts."""

    sets: dict[str, GraphFigures]


def path_lengths(graph: AttributionGraph) -> PathLengths:
    """Both mean path lengths of a graph."""
    return PathLengths(graph.path_length(), graph.path_length(by="effect"))


def measure_graphs(
    model: HookedTransformer, dictionaries: Sequence[Any], corpus: Corpus, n: int = HELD_OUT_PROMPTS
) -> GraphFigures:
    """Figures of dictionaries in graphs; ``n`` held-out prompts."""
    from circuit_lens.replacement_model import ReplacementModel

    rm = ReplacementModel(model, dictionaries)
    prompts = [DALLAS_PROMPT, *held_out_prompts(corpus, n)]
    first, *others = [path_lengths(rm.attribute(prompt, progress=False)) for prompt in prompts]
    return GraphFigures(first, tuple(others), mediation(model, dictionaries, corpus))
