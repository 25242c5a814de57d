"""Two steps put together by moving the first one's state into the second (Ghandeharioun et al. 2024, §5.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.decoding import decode
from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.maps import Map
from circuit_lens.patchscopes.metrics import How, says
from circuit_lens.patchscopes.readout import Wording
from circuit_lens.patchscopes.sources import EMBEDDING
from circuit_lens.patchscopes.targets import Target
from circuit_lens.protocols import HookedModel
from circuit_lens.running import to_tokens
from circuit_lens.studies.patch_items import Item, Write, as_words, some
from circuit_lens.studies.patch_tables import CHOICE, RECOMPUTES, Reading, cell_names, read, titled
from circuit_lens.studies.tables import Cell, Failure, Row, StudyTable
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.places import City

SECOND = "The capital of x is"
NAMES_IT = "the {kind} containing {city}"
ANSWERS_IT = "{city} lies in the {kind} of"
TRAINED = "Fact : the capital of the {kind} containing {city} is"
ADVERSE = "{city} is a city . The capital of the {kind} is"
CHAIN = "{city} is in {place} . The capital of {place} is"
ANSWERED = "The capital of {place} is"
BUNDLED = (
    "These cities are in no two-hop sentence of the model's training; the wording 'in one go' is that of its training. "
    "'Adverse' is a wording of ours, chosen on these cities among 18, because the model gets it wrong.",
)


class NextToken(Map):
    """f(h) = the embedding of the token that h says as the last layer's state, in the mean over its probabilities.

    A step of a written chain, kept inside the model: what the first step answers is embedded again.

    Args:
        model: Whose final norm, unembedding and embedding are used.
    """

    name = "next token, embedded again"

    def __init__(self, model: HookedModel) -> None:
        self.model = model

    def __call__(
        self, h: Float[Tensor, "*batch d_model"], source_layer: int | None, target_layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the mean embedding."""
        flat = h.reshape(1, -1, h.shape[-1])
        logits = self.model.unembed(self.model.ln_final(flat))  # pyright: ignore[reportAttributeAccessIssue]
        embedding: Tensor = self.model.W_E  # pyright: ignore[reportAttributeAccessIssue]
        return (logits.softmax(-1) @ embedding.to(logits)).reshape(h.shape).detach()


def written(model: HookedModel, prompts: Sequence[str], n: int = 4) -> list[str]:
    """Return what a model says after prompts, greedily: an own run each, nothing is moved."""
    wording = Wording(getattr(model, "tokenizer", None), model.cfg.d_vocab)
    runs = [decode(model, to_tokens(model, prompt)[None], max_new_tokens=n) for prompt in prompts]
    return [wording.text(run.rows()[0].tolist()) for run in runs]


def hop_table(
    model: HookedModel,
    corpus: Corpus | None = None,
    *,
    cities: Sequence[City] | None = None,
    adverse: str = ADVERSE,
    write: Write = as_words,
    how: How = "starts",
    max_new_tokens: int = 4,
    layers: Sequence[int] | None = None,
    n: int | None = None,
    name: str = "",
    notes: Sequence[str] = (),
) -> StudyTable:
    """Ask for the capital of a city's state in one go, in a written chain, and by moving the first step's state.

    Args:
        model: A model that knows both steps.
        corpus: Its facts.
        cities: What is asked about; None: the cities that no two-hop sentence of the corpus contains.
        adverse: A wording that the bundled models answer wrongly.
        write: Turns the words of a prompt into text.
        how: Where an answer must stand.
        max_new_tokens: Tokens to generate.
        layers: Source and target layers; None: all.
        n: Cities; None: all.
        name: Of the model, for the title.
        notes: More of them, `BUNDLED` for the bundled models.
    """
    corpus = corpus or Corpus()
    held = [city for city in corpus.cities if city.name in corpus.hard_cities]
    asked = some(held if cities is None else cities, n)

    def fill(template: str) -> Callable[[City], str]:
        return lambda city: write(template.format(city=city.name, kind=city.place.kind, place=city.place.name))

    rows = []
    plain: dict[str, list[bool]] = {}
    for label, template in (
        ("in one go", TRAINED), ("in one go, adverse", adverse), ("written chain", CHAIN),
        ("second step alone, answer of the first written", ANSWERED),
    ):  # fmt: skip
        said = written(model, [fill(template)(city) for city in asked], max_new_tokens)
        hits = [says(text, city.place.relations["capital"], how) for text, city in zip(said, asked, strict=True)]
        plain[label] = hits
        failed = [
            Failure(city.name, city.place.relations["capital"], text)
            for city, text, hit in zip(asked, said, hits, strict=True)
            if not hit
        ]
        cells: dict[str, Cell] = {"prompt": template, "right": Rate.of(hits)}
        rows.append(Row(label, cells, tuple(failed)))
    first = written(model, [fill(ANSWERS_IT)(city) for city in asked], 2)
    hits = [says(text, city.place.name, how) for text, city in zip(first, asked, strict=True)]
    rows.append(Row("first step alone", {"prompt": ANSWERS_IT, "right": Rate.of(hits)}))

    wrong = plain["in one go, adverse"]
    later = [layer for layer in layers or range(model.cfg.n_layers) if layer >= 1]
    before = adverse.split("{city}")[0] + "{city}"
    moved: list[tuple[str, str, Map | None, Sequence[int] | None]] = [
        ("the first step names it, read at the city", NAMES_IT, None, None),
        ("the same, target layers 1 and later", NAMES_IT, None, later),
        ("read at the city of the adverse question", before, None, None),
        ("the first step answers it, read at its last word", ANSWERS_IT, None, None),
        ("the same, answer embedded again", ANSWERS_IT, NextToken(model), [EMBEDDING]),
    ]
    for label, template, mapping, into in moved:
        items = [Item(city.name, fill(template)(city), city.place.relations["capital"]) for city in asked]
        reading = read(
            model, items, Target(write(SECOND)), max_new_tokens=max_new_tokens, how=how, layers=layers,
            target_layers=into, mapping=mapping,
        )  # fmt: skip
        rows.append(_moved(f"moved: {label}", template, reading, wrong))
    which = "given" if cities is not None else "those that no two-hop sentence of the corpus contains"
    shown = (
        f"Second step: {write(SECOND)!r}, patched at x. Cities: {which}. Corrected: right minus right by the adverse "
        "wording in one go, item by item.",
        *notes,
        "Read at the city, the first step's expression is resolved where it ends, as in the paper. Read at its last "
        f"word, the state holds the answer as what comes next. {_bases(model)}",
        CHOICE,
        "Embedding patch: the embedding of the token that is read, through the same map, at its own best fixed target "
        "layer of the row, chosen on the same halves. Where the model composes by itself, a city's embedding into the "
        "embedding answers too: see the row of target layers 1 and later. " + RECOMPUTES,
    )
    return StudyTable(titled("Two steps", name), tuple(rows), shown)


def _moved(label: str, template: str, reading: Reading, wrong: Sequence[bool]) -> Row:
    accuracy = reading.accuracy
    assert accuracy.best_fixed is not None, "one city cannot be halved"
    right = reading.chosen.right
    cells: dict[str, Cell] = {
        "prompt": template,
        "right": accuracy.best_fixed,
        "which": cell_names(accuracy),
        "corrected": Mean.of([float(a) - float(b) for a, b in zip(right, wrong, strict=True)]),
        "any cell": accuracy.any_layer,
        "unpatched": accuracy.unpatched,
    }
    if reading.embedded is not None:
        cells["embedding patch"] = Rate.of(reading.embedded.tolist())
    return Row(label, cells, reading.failures())


def _bases(model: HookedModel) -> str:
    """Say how alike a token's embedding and unembedding are."""
    embedding: Tensor = model.W_E  # pyright: ignore[reportAttributeAccessIssue]
    cosine = torch.cosine_similarity(embedding.detach().double(), model.W_U.detach().double().T, dim=-1).mean()
    return (
        f"Embedding and unembedding of a token have cosine {float(cosine):.2f} on average in this model: what is about "
        "to be said and what was read need not share directions, and then the identity map cannot turn one into the "
        "other."
    )
