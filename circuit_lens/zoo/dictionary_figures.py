"""How well transcoders stand in for a bundled model's MLPs; and whether an answer runs through features of any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from circuit_lens.dictionaries.attach import feature_acts
from circuit_lens.dictionaries.binding import bind
from circuit_lens.training.activations import mlp_activations
from circuit_lens.zoo.batches import HeldOutText
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.evaluate import DALLAS_PROMPT, NEUTRAL_PROMPT, padded, token_ids
from circuit_lens.zoo.tokenizer import BOS_ID, PAD_ID

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformer_lens import HookedTransformer

# A feature belongs to a state's supernode if it is active on at least / at most this share of cities.
IN_STATE, OUT_OF_STATE = 0.5, 0.3
CONTROL_STATE = "California"
BATCH = 64


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """One transcoder on held-out text: explained variance (1 - FVU), mean active features per token, dead share."""

    hook_out: str
    explained_variance: float
    l0: float
    dead: float


@dataclass(frozen=True, slots=True)
class Mediation:
    """The linear effect of one token's embedding on an answer's logit, and the shares that run through supernodes.

    ``effect`` in units of the demeaned logit, over all paths through features; ``share`` through the true state's
    supernode; ``control`` through `CONTROL_STATE`'s; ``others_max`` and ``others_mean`` over all states but the true
    one; ``members`` are the (layer, index) of the supernode's features that are active on the prompt.
    """

    effect: float
    share: float
    control: float
    others_max: float
    others_mean: float
    members: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class DictionaryFigures:
    """The figures of one set of transcoders. Losses are mean cross-entropies in nats over ``n_tokens`` targets.

    ``n_tokens`` is the text that every figure is computed on; a dead feature is active on none of it.
    """

    n_tokens: int
    layers: tuple[LayerFigures, ...]
    loss: float
    loss_replaced: float
    loss_zeroed: float
    mediation: Mediation

    @property
    def added_loss(self) -> float:
        """Nats that replacing every MLP costs."""
        return self.loss_replaced - self.loss

    @property
    def dead(self) -> float:
        """Mean dead share of the layers."""
        return sum(layer.dead for layer in self.layers) / len(self.layers)

    @property
    def l0(self) -> float:
        """Mean number of active features per token and layer."""
        return sum(layer.l0 for layer in self.layers) / len(self.layers)


def layer_of(dictionary: SAE[Any]) -> int:
    """The layer in ``blocks.<layer>...`` that a dictionary writes to."""
    return int(str(dictionary.cfg.metadata.hook_name_out).split(".")[1])


@torch.no_grad()
def layer_figures(
    model: HookedTransformer, dictionaries: Sequence[SAE[Any]], text: HeldOutText
) -> tuple[LayerFigures, ...]:
    """Each transcoder alone, on the true activations of the text; BOS and padding left out."""
    layers = [layer_of(dictionary) for dictionary in dictionaries]
    figures = []
    for dictionary, data in zip(
        dictionaries, mlp_activations(model, text.rows.tokens, text.rows.real, layers=layers), strict=True
    ):
        acts = dictionary.encode(data.inputs)
        unexplained = (dictionary.decode(acts) - data.outputs).pow(2).sum()
        total = (data.outputs - data.outputs.mean(0)).pow(2).sum()
        active = acts > 0
        figures.append(
            LayerFigures(
                data.hook_out,
                1 - float(unexplained / total),
                float(active.sum(-1).float().mean()),
                float((~active.any(0)).float().mean()),
            )
        )
    return tuple(figures)


@torch.no_grad()
def text_loss(
    model: HookedTransformer,
    tokens: Int[Tensor, "row pos"],
    *,
    dictionaries: Sequence[SAE[Any]] = (),
    zero: bool = False,
) -> float:
    """Mean cross-entropy in nats, with every MLP replaced by its transcoder, or by zeros.

    Each transcoder reads the stream that the replacements before it made. At BOS the MLPs are left as they are.
    """
    inputs: dict[int, Tensor] = {}
    hooks: list[tuple[str, Callable[..., Any]]] = []
    for dictionary in dictionaries:
        layer = layer_of(dictionary)

        def remember(value: Tensor, hook: object, layer: int = layer) -> None:
            inputs[layer] = value

        def replace(value: Tensor, hook: object, layer: int = layer, dictionary: SAE[Any] = dictionary) -> Tensor:
            replaced = dictionary.decode(dictionary.encode(inputs[layer]))
            return torch.cat([value[:, :1], replaced[:, 1:]], 1)

        hooks += [
            (dictionary.cfg.metadata.hook_name, remember),
            (dictionary.cfg.metadata.hook_name_out, replace),
        ]
    if zero:

        def silence(value: Tensor, hook: object) -> Tensor:
            return torch.cat([value[:, :1], torch.zeros_like(value[:, 1:])], 1)

        hooks = [(f"blocks.{layer}.hook_mlp_out", silence) for layer in range(model.cfg.n_layers)]
    total, count = 0.0, 0
    for start in range(0, len(tokens), BATCH):
        rows = tokens[start : start + BATCH]
        logits = model.run_with_hooks(rows, fwd_hooks=list(hooks))[:, :-1]
        targets = rows[:, 1:]
        real = targets != PAD_ID
        total += float(F.cross_entropy(logits[real], targets[real], reduction="sum"))
        count += int(real.sum())
    return total / count


@torch.no_grad()
def active_features(
    model: HookedTransformer, dictionaries: Sequence[Any], texts: Sequence[Sequence[str]]
) -> dict[str, Bool[Tensor, "text d_sae"]]:
    """Which features are active at the last token of each text, by the dictionaries' sites."""
    binding = bind(model, dictionaries)
    rows = padded([token_ids(model, text) for text in texts])
    _, cache = model.run_with_cache(rows, names_filter=[d.hook_in for d in binding.dictionaries])
    last = torch.tensor([len(text) for text in texts])
    return {site: acts[torch.arange(len(texts)), last] > 0 for site, acts in feature_acts(binding, cache).items()}


def state_supernodes(
    model: HookedTransformer, dictionaries: Sequence[Any], corpus: Corpus
) -> dict[str, dict[str, Bool[Tensor, " d_sae"]]]:
    """For each American state, the features of each site that detect it at a city's position on a neutral prompt.

    Active on at least `IN_STATE` of the state's cities and at most `OUT_OF_STATE` of the other states' cities.
    """
    cities = [city for city in corpus.cities if city.place.kind == "state"]
    active = active_features(model, dictionaries, [[*NEUTRAL_PROMPT.split(), city.name] for city in cities])
    supernodes = {}
    for state in dict.fromkeys(city.place.name for city in cities):
        inside = torch.tensor([city.place.name == state for city in cities])
        supernodes[state] = {
            site: (found[inside].float().mean(0) >= IN_STATE) & (found[~inside].float().mean(0) <= OUT_OF_STATE)
            for site, found in active.items()
        }
    return supernodes


def mediation(
    model: HookedTransformer,
    dictionaries: Sequence[Any],
    corpus: Corpus,
    *,
    prompt: str = DALLAS_PROMPT,
    city: str = "Dallas",
    state: str = "Texas",
    answer: str = "Austin",
) -> Mediation:
    """How much of the effect of ``city`` on the logit of ``answer`` runs through ``state``'s features at the city.

    The linear effect in the attribution graph of the prompt, where attention patterns, norm scales, errors and the set
    of active features are those of the run (`AttributionGraph.mediation`); any dictionaries that can be attributed.
    """
    from circuit_lens.replacement_model import ReplacementModel

    graph = ReplacementModel(model, dictionaries).attribute(prompt, targets=[answer], progress=False)
    (source,) = graph.find(city, role="source")
    here = [node for node in graph.find(range(graph.nodes.n_features)) if node.pos == source.pos]
    shares, members = {}, {}
    for name, masks in state_supernodes(model, dictionaries, corpus).items():
        members[name] = [node for node in here if bool(masks[node.site][node.index])]
        # A state without active features mediates nothing; `graph.mediation` wants at least one.
        through = members[name]
        shares[name] = graph.mediation(source, graph.best_logit, through=through).share if through else 0.0
    others = [share for name, share in shares.items() if name != state]
    return Mediation(
        effect=float(graph.total_effect(graph.best_logit)[source.id]),
        share=shares[state],
        control=shares[CONTROL_STATE],
        others_max=max(others),
        others_mean=sum(others) / len(others),
        members=tuple((node.layer, node.index) for node in members[state]),
    )


def measure_dictionaries(
    model: HookedTransformer, dictionaries: Sequence[SAE[Any]], corpus: Corpus, text: HeldOutText
) -> DictionaryFigures:
    """All figures of one set of transcoders, one for every layer, in the order of the layers."""
    tokens = text.rows.tokens
    if [layer_of(dictionary) for dictionary in dictionaries] != list(range(model.cfg.n_layers)):
        raise ValueError("dictionaries must be one per layer, in the order of the layers")
    assert int((tokens == BOS_ID).sum()) == len(tokens)
    return DictionaryFigures(
        n_tokens=int(text.rows.real.sum()),
        layers=layer_figures(model, dictionaries, text),
        loss=text_loss(model, tokens),
        loss_replaced=text_loss(model, tokens, dictionaries=dictionaries),
        loss_zeroed=text_loss(model, tokens, zero=True),
        mediation=mediation(model, dictionaries, corpus),
    )
