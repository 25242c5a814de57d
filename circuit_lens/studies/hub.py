"""The studies on models of the Hugging Face hub, by name.

- :func:`gemma_tables`: circuits of Gemma-2-2b, with its published transcoders and supernodes published as an address.
- :func:`patchscope_tables`: patchscopes of any model that TransformerLens knows, with the paper's prompts;
  :func:`across_tables`: one model's states read by another.

Everything is fetched from the hub (Gemma is gated: it needs a token, and some 20 GB of memory). Where that cannot be
had, :class:`StudySkipped` says what would have been fetched, and why it was not.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuit_lens.errors import CircuitLensError, InterventionError
from circuit_lens.interop.neuronpedia_url import supernodes_from_url
from circuit_lens.loading.failures import FetchError, fetching
from circuit_lens.patchscopes.fitting import same_vocabulary
from circuit_lens.patchscopes.presets import entity_description
from circuit_lens.patchscopes.sources import EMBEDDING
from circuit_lens.patchscopes.targets import Target
from circuit_lens.studies import (
    patch_attributes,
    patch_contexts,
    patch_entities,
    patch_hops,
    patch_lenses,
    patch_through,
    two_hop,
)
from circuit_lens.studies.lab import Lab
from circuit_lens.studies.patch_items import Item, Relation, fit_and_held_out, item, some
from circuit_lens.studies.patch_items import relations as all_relations
from circuit_lens.studies.places import Places
from circuit_lens.studies.tables import Cell, Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

if TYPE_CHECKING:
    import torch
    from transformer_lens import HookedTransformer

    from circuit_lens.protocols import HookedModel
    from circuit_lens.replacement_model import ReplacementModel

MODEL = "gemma-2-2b"
"""With its default set of :func:`circuit_lens.loading.table`: a transcoder per layer, those of the published graphs."""
PROMPT = "Fact: the capital of the state containing Dallas is"
DALLAS = (
    "https://www.neuronpedia.org/gemma-2-2b/graph?slug=gemma-fact-dallas-austin"
    "&supernodes=%5B%5B%22capital%22%2C%2215_4494_4%22%2C%226_4662_4%22%2C%224_7671_4%22%2C%223_13984_4%22%2C"
    "%221_1000_4%22%5D%2C%5B%22state%22%2C%226_4012_7%22%2C%220_13727_7%22%5D%2C%5B%22Texas%22%2C%2220_15589_9%22%2C"
    "%2219_7477_9%22%2C%2216_25_9%22%2C%224_13154_9%22%2C%2214_2268_9%22%2C%227_6861_9%22%5D%2C%5B%22capital+cities"
    "+%2F+say+a+capital+city%22%2C%2221_5943_10%22%2C%2217_7178_10%22%2C%227_691_10%22%2C%2216_4298_10%22%5D%2C%5B"
    "%22say+Austin%22%2C%2223_12237_10%22%5D%5D"
)
"""The published supernodes of the Dallas prompt (circuit-tracer's README, and Neuronpedia's subgraph of that name)."""
FACTORS = (0.0, -1.0, -2.0)
_NO_SPACE_BEFORE = frozenset(".,:;?!)'")


class StudySkipped(CircuitLensError, RuntimeError):
    """A study that could not be run here: what it would have fetched, and why it was not."""


def prose(words: Sequence[str]) -> str:
    """Return the corpus's words with spaces, none before punctuation and inside quotation marks.

    >>> prose('Fact : the opposite of " small " is " big " .'.split())
    'Fact: the opposite of "small" is "big".'
    """
    pieces, inside, glue = [], False, True
    for word in words:
        if word == '"':
            pieces.append('"' if glue or inside else ' "')
            inside = not inside
            glue = inside
            continue
        pieces.append(word if glue or word in _NO_SPACE_BEFORE else f" {word}")
        glue = False
    return "".join(pieces)


class ProseLab(Lab):
    """A lab of a model with a tokenizer of its own: the corpus's words as ordinary prose.

    Positions are found by tokenising what stands before; an answer begins with the first token after a space.
    """

    def text(self, words: Sequence[str]) -> str:
        """Return the words with spaces, none before punctuation and inside quotation marks."""
        return prose(words)

    def position(self, words: Sequence[str], number: int) -> int:
        """Return the position of the last token of a word."""
        return self.model.to_tokens(self.text(words[: number + 1])).shape[-1] - 1

    def first_token(self, phrase: str) -> int:
        """Return the first token of a phrase after a space."""
        return int(self.model.to_tokens(f" {phrase}", prepend_bos=False)[0, 0])


def load_gemma(*, device: str | None = None, dtype: torch.dtype | None = None) -> ReplacementModel:
    """Return Gemma-2-2b with its published transcoders, fetched from the hub or its local cache.

    Args:
        device: Where to compute; None: an accelerator if there is one.
        dtype: Of model and transcoders; None: the model in bfloat16, the transcoders in float32 as they are published.

    Raises:
        StudySkipped: The hub cannot be reached, or does not let us in, and nothing is cached.
    """
    from circuit_lens.loading import load

    try:
        return load(MODEL, device=device, dtype=dtype)
    except FetchError as error:
        raise StudySkipped(
            f"the studies on {MODEL}: {error}; give network, and HF_TOKEN of an account that accepted Gemma's licence, "
            "and call again"
        ) from error


def published_table(rm: ReplacementModel, *, url: str = DALLAS, prompt: str = PROMPT) -> StudyTable:
    """Inhibit each published supernode: the others' activation fractions, and the first answer."""
    recording, nodes = rm.record(prompt), supernodes_from_url(url)
    rows = []
    for node in nodes:
        for factor in FACTORS:
            try:
                run = rm.intervene(recording, node.scale(factor))
            except InterventionError as error:
                rows.append(Row(f"{node.name} x {factor:g}", {"answer": f"not run: {error}"}))
                continue
            cells: dict[str, Cell] = {other.name: run.activation(other) for other in nodes}
            best = run.top_logits(1)[0]
            rows.append(Row(f"{node.name} x {factor:g}", {**cells, "answer": f"{best.text} {best.prob:.2f}"}))
    note = f"Supernodes of {url.split('&')[0]}; one prompt, {prompt!r}: no interval."
    return StudyTable(f"Published supernodes ({MODEL})", tuple(rows), (note,))


def gemma_tables(
    rm: ReplacementModel | None = None, corpus: Corpus | None = None, *, n: int = 60, seed: int = 0
) -> list[StudyTable]:
    """Run the two-hop studies on Gemma-2-2b: published supernodes, and the swaps of :mod:`.two_hop`.

    Args:
        rm: The model, if it is loaded already.
        corpus: Cities; those that bundled models hold out are tested, the others choose supernodes.
        n: Pairs of cities.
        seed: Of the draw.

    Raises:
        StudySkipped: See :func:`load_gemma`.
    """
    rm = load_gemma() if rm is None else rm
    places = Places(rm, corpus, lab=ProseLab(rm))
    return [
        published_table(rm),
        two_hop.choice_table(rm, corpus, n=n, name=MODEL, places=places),
        two_hop.swap_table(rm, corpus, n=n, seed=seed, controls=False, name=MODEL, places=places),
    ]


# -------------------------------------------------------------------------------------------------------- patchscopes


def load_by_name(name: str, *, device: str | None = None) -> HookedTransformer:
    """Return a model of TransformerLens by its name, with unprocessed weights, from the hub or its local cache.

    Args:
        name: For example ``"gpt2-medium"`` or ``"EleutherAI/pythia-410m"``.
        device: Where to compute; None: an accelerator if there is one.

    Raises:
        StudySkipped: TransformerLens does not know it, or it cannot be fetched and is not cached.
    """
    from transformer_lens import HookedTransformer

    try:
        with warnings.catch_warnings(), fetching(f"the model {name}", name):
            warnings.simplefilter("ignore", DeprecationWarning)  # it announces TransformerLens 4
            return HookedTransformer.from_pretrained_no_processing(name, device=device)
    except FetchError as error:
        raise StudySkipped(f"the patchscope studies on {name}: {error}") from error


def prose_entities(corpus: Corpus) -> list[Item]:
    """Cities, countries and people as text, with a word that a description must hold: place, continent, job."""
    found = [item(city.name, city.place.name, group="city", write=_prose) for city in corpus.cities]
    countries = [place for place in corpus.places if place.kind == "country"]
    found += [item(place.name, place.region, group="place", family=place.name, write=_prose) for place in countries]
    people = corpus.people
    return found + [item(p.name, p.relations["job"], group="person", family=p.family, write=_prose) for p in people]


def prose_relations(corpus: Corpus) -> list[Relation]:
    """The relations of countries, states and people as text; codes and centuries are written in too many ways."""
    asked = all_relations(corpus, write=_prose)
    kinds = ("country", "state", "person")
    return [
        one
        for one in asked
        if one.name.split(":")[0] in kinds and not one.name.endswith(("code", "region", "century", "field"))
    ]


def depths(n_layers: int, n: int = 8) -> list[int]:
    """Return the embedding and about so many layers, evenly spaced, the last among them.

    >>> depths(24), depths(3)
    ([-1, 2, 5, 8, 11, 14, 17, 20, 23], [-1, 0, 1, 2])
    """
    step = max(1, n_layers // n)
    return [EMBEDDING, *sorted(range(n_layers - 1, -1, -step))]


def patchscope_tables(
    model: HookedModel | str, corpus: Corpus | None = None, *, n: int | None = 60, layers: Sequence[int] | None = None,
    device: str | None = None,
) -> list[StudyTable]:  # fmt: skip
    """Run the patchscope studies on any model, with the paper's prompts and the corpus's facts as ordinary text.

    An answer is right where 20 generated tokens hold it, as in the paper.

    Args:
        model: A model with a tokenizer, or its name in TransformerLens.
        corpus: The facts.
        n: Items per table; None: all.
        layers: Source and target layers; None: the embedding and eight others.
        device: Where a model is loaded to, see `load_by_name`.

    Raises:
        StudySkipped: See `load_by_name`.
    """
    name = model if isinstance(model, str) else str(getattr(model.cfg, "model_name", ""))
    model = load_by_name(model, device=device) if isinstance(model, str) else model
    corpus = corpus or Corpus()
    layers = depths(model.cfg.n_layers) if layers is None else layers
    target, asked = entity_description("paper"), prose_relations(corpus)
    shown = Target(target.prompt, name=target.name)
    reading = patch_entities.description_reading(
        model, prose_entities(corpus), target=target, how="contains", layers=layers, n=n
    )
    attributes = patch_attributes.read_attributes(
        model, asked, n=n, max_new_tokens=20, how="contains", layers=layers, probe=n is None or n >= 20
    )
    fit_on, held_out = fit_and_held_out(corpus, write=_prose)
    return [
        patch_entities.description_table(reading, name=name),
        patch_entities.by_target_table(reading, name=name),
        patch_entities.by_layer_table(reading, name=name),
        patch_entities.said_table(model, corpus, target=target, write=_prose, layers=layers, name=name),
        patch_entities.tokens_table(model, reading, name=name),
        patch_contexts.contexts_table(model, corpus, target=shown, write=_prose, layers=layers, n=n, name=name),
        patch_attributes.attributes_table(attributes, name=name),
        patch_attributes.attribute_targets_table(attributes, name=name),
        patch_attributes.probe_table(attributes, name=name),
        patch_attributes.attribute_layers_table(attributes, name=name),
        patch_hops.hop_table(
            model, corpus, write=_prose, how="contains", max_new_tokens=20, layers=layers, n=n, name=name
        ),
        patch_lenses.lens_table(model, fit_on=fit_on, held_out=held_out, form="lines", n=n or 300, name=name),
        patch_through.through_table(
            model, items=prose_entities(corpus), asked=asked, target=target, attribute_tokens=20, how="contains",
            layers=layers, n=n, name=name,
        ),
    ]  # fmt: skip


def across_tables(
    model: HookedModel | str, other: HookedModel | str, corpus: Corpus | None = None, *, n: int | None = 60,
    layers: Sequence[int] | None = None, other_layers: Sequence[int] | None = None, device: str | None = None,
) -> list[StudyTable]:  # fmt: skip
    """Read one model's states with another of the same vocabulary, with the paper's prompts and ordinary text.

    Widths may differ: states go through affine maps that are fitted between all pairs of the layers. Models of one
    width are compared by the identity and a rotation too.

    Args:
        model: Whose states are read, or its name in TransformerLens.
        other: Which reads them, likewise.
        corpus: The facts and texts.
        n: Positions, and entities of each kind; None: 100 positions and all entities.
        layers: Of the first model; None: the embedding and eight others.
        other_layers: Of the second; None: likewise.
        device: Where models are loaded to, see `load_by_name`.

    Raises:
        StudySkipped: See `load_by_name`; and models whose vocabularies differ.
    """
    names = tuple(one if isinstance(one, str) else str(getattr(one.cfg, "model_name", "")) for one in (model, other))
    first, second = (load_by_name(one, device=device) if isinstance(one, str) else one for one in (model, other))
    if not same_vocabulary(first, second):
        raise StudySkipped(
            f"the patchscope study of {names[0]} read by {names[1]}: their vocabularies differ, and maps are fitted on "
            "the same tokens in both; give two models of one family"
        )
    corpus = corpus or Corpus()
    fit_on, held_out = fit_and_held_out(corpus, write=_prose)
    entities = prose_entities(corpus)
    kinds = dict.fromkeys(one.group for one in entities)
    described = [one for kind in kinds for one in some([item for item in entities if item.group == kind], n)]
    return patch_lenses.cross_model_tables(
        first, second, fit_on=fit_on, held_out=held_out, form="lines", n=n or 100, described=described,
        description=entity_description("paper"), how="contains", names=(names[0], names[1]),
        layers=(layers or depths(first.cfg.n_layers), other_layers or depths(second.cfg.n_layers)),
    )  # fmt: skip


def _prose(text: str) -> str:
    return prose(text.split())
