"""What entities are, read from their last token by a list of descriptions (Ghandeharioun et al. 2024, §4.3)."""

from __future__ import annotations

from collections.abc import Sequence

from circuit_lens.graph.rates import Rate
from circuit_lens.patchscopes.metrics import How
from circuit_lens.patchscopes.sources import EMBEDDING
from circuit_lens.patchscopes.targets import Target
from circuit_lens.protocols import HookedModel
from circuit_lens.running import to_tokens
from circuit_lens.studies.patch_items import (
    SOURCE,
    Item,
    Write,
    as_words,
    capitals_by_words,
    descriptions,
    entities,
    people,
    shorter_forms,
    some,
)
from circuit_lens.studies.patch_tables import (
    CHOICE,
    CONTROLS,
    RECOMPUTES,
    Reading,
    into_table,
    layer_title,
    read,
    titled,
)
from circuit_lens.studies.tables import Cell, Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

LONG = ("the Great", "of Wales")
BY_TOKENS = "Entities by number of tokens"
FIRST = "Diana , princess of Wales", "Alexander the Great"


def description_reading(
    model: HookedModel, items: Sequence[Item] | None = None, *, target: Target | None = None, how: How = "starts",
    layers: Sequence[int] | None = None, n: int | None = None,
) -> Reading:  # fmt: skip
    """Read entities by the description prompt, from all layers into all layers.

    Args:
        model: A model that knows them.
        items: The entities; None: all that the corpus describes.
        target: The description prompt; None: that of the bundled models.
        how: Where the answer must stand.
        layers: Source and target layers; None: all.
        n: Entities of one word, and as many of several; None: all.
    """
    found = entities(Corpus()) if items is None else items
    one, more = ([item for item in found if (item.n_words > 1) == several] for several in (False, True))
    return read(model, [*some(one, n), *some(more, n)], target or descriptions(), how=how, layers=layers)


def description_table(reading: Reading, *, name: str = "") -> StudyTable:
    """How many descriptions are right, by one fixed cell, beside the controls.

    Args:
        reading: See `description_reading`.
        name: Of the model, for the title.
    """
    rows = []
    several = [i for i, item in enumerate(reading.items) if item.n_words > 1]
    single = [i for i, item in enumerate(reading.items) if item.n_words == 1]
    targets = [layer for layer in reading.result.target_layers if isinstance(layer, int)]
    unit = "token" if reading.how == "starts" else "word"
    for label, chosen in ((f"one {unit}", single), (f"several {unit}s", several)):
        if len(chosen) < 2:
            continue
        whole = reading.part(items=chosen)
        for first in (EMBEDDING, 0, 1):
            part = whole if first == EMBEDDING else whole.part(target_layers=[t for t in targets if t >= first])
            into = "all target layers" if first == EMBEDDING else f"target layers {first} and later"
            rows.append(Row(f"{label}, {into}", part.cells(), part.failures()))
        for group in dict.fromkeys(item.group for item in whole.items):
            part = whole.of(group=group)
            if len(part.items) > 1:
                rows.append(Row(f"{label}: {group}", part.cells(), part.failures()))
    notes = (
        f"Source {SOURCE!r}, read at the last token; target {reading.result.targets[0]!r}; right: the text "
        + ("begins with the whole description. " if reading.how == "starts" else "holds a word of the description. ")
        + f"{len(reading.items)} entities.",
        CHOICE,
        CONTROLS,
        RECOMPUTES,
    )
    return StudyTable(titled("Descriptions of entities", name), tuple(rows), notes)


def by_target_table(reading: Reading, *, name: str = "") -> StudyTable:
    """How many descriptions are right by each target layer, beside the re-embedded token there.

    Args:
        reading: See `description_reading`.
        name: Of the model, for the title.
    """
    unit = "token" if reading.how == "starts" else "word"
    readings: dict[str, Reading] = {}
    for label, more in ((f"one {unit}", False), (f"several {unit}s", True)):
        part = reading.part(items=[i for i, one in enumerate(reading.items) if (one.n_words > 1) == more])
        readings[label] = part
        for group in dict.fromkeys(one.group for one in part.items):
            readings[f"{label}, {group}"] = part.of(group=group)
    return into_table(titled("Descriptions by target layer", name), readings, (RECOMPUTES,))


def by_layer_table(reading: Reading, *, name: str = "") -> StudyTable:
    """At which layer entities are described rightly.

    Args:
        reading: See `description_reading`.
        name: Of the model, for the title.
    """
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(reading.items):
        several = item.n_words > 1
        label = f"{item.group} of {'several words' if several else 'one word'}"
        if item.group == "person":
            label = f"person, {item.family}" if item.family in LONG else "person, first and last name"
        groups.setdefault(label, []).append(i)
    family: dict[str, set[str]] = {}
    for item in reading.items:
        family.setdefault(item.family, set()).add(str(item.answer))
    rows = []
    for label, chosen in groups.items():
        part = reading.part(items=chosen)
        for s, layer in enumerate(part.result.source_layers):
            cells = part.from_layer(s)
            if "person" in label and reading.how == "starts":
                cells["another of the family"] = Rate.of(_others(part, s, family))
            rows.append(Row(f"{label}: {layer_title(layer)}", cells))
    notes = (
        "First right here: by any target layer, and at no earlier source layer. Another of the family: moved into the "
        "embedding, it says the description of somebody else of the same last word.",
        RECOMPUTES,
    )
    return StudyTable(titled("At which layer entities resolve", name), tuple(rows), notes)


def _others(part: Reading, source: int, family: dict[str, set[str]]) -> list[bool]:
    """Whether each item is said to be somebody else of its family, read into the embedding."""
    into = list(part.result.target_layers).index(EMBEDDING)
    found = []
    for i, item in enumerate(part.items):
        said = part.said(i, source, into)
        other = family[item.family] - {str(item.answer)}
        found.append(not part.right[i, source, into] and any(said.startswith(answer) for answer in other))
    return found


def said_table(
    model: HookedModel, corpus: Corpus | None = None, *, target: Target | None = None, write: Write = as_words,
    layers: Sequence[int] | None = None, names: Sequence[str] | None = None, name: str = "",
) -> StudyTable:  # fmt: skip
    """What long names say at each layer, and two of them at each of their tokens.

    Args:
        model: A model that knows them.
        corpus: Its people.
        target: The description prompt; None: that of the bundled models.
        write: Turns the words of a prompt into text.
        layers: Source layers; None: all.
        names: Whom to ask about; None: all that are called "the Great" or "of Wales".
        name: Of the model, for the title.
    """
    found = [one for one in people(corpus or Corpus(), write=write) if one.family in LONG]
    chosen = [one for one in found if names is None or one.name in names]
    asked = [*chosen, *(part for one in chosen if one.name in FIRST for part in _prefixes(one, write))]
    reading = read(model, asked, target or descriptions(), layers=layers, target_layers=[EMBEDDING])
    rows = []
    for i, one in enumerate(asked):
        said: dict[str, Cell] = {
            layer_title(layer): _first_words(reading.said(i, s, 0), str(one.answer))
            for s, layer in enumerate(reading.result.source_layers)
        }
        rows.append(Row(one.name, {"is": str(one.answer), **said}))
    notes = (
        "Read at the last token of each text, moved into the embedding of the description prompt; * marks what is "
        "right. The second part reads two names at each of their tokens, with what stands before it only.",
    )
    return StudyTable(titled("What names say, layer by layer", name), tuple(rows), notes)


def _prefixes(one: Item, write: Write) -> list[Item]:
    """The name up to each of its words."""
    words = one.name.split()
    parts = [" ".join(words[: k + 1]) for k in range(len(words))]
    return [Item(f"up to: {part}", write(SOURCE.format(name=part)), one.answer, one.group) for part in parts]


def _first_words(said: str, answer: str) -> str:
    text = " ".join(said.split()[: max(2, len(answer.split()))])
    return f"{text} *" if text == answer else text


def forms_table(model: HookedModel, corpus: Corpus | None = None, *, name: str = "") -> StudyTable:
    """The same people in fewer pieces of their name, and places by the number of their tokens.

    Args:
        model: A bundled model.
        corpus: Its facts.
        name: Of the model, for the title.
    """
    corpus = corpus or Corpus()
    rows: list[Row] = []

    def add(label: str, items: Sequence[Item], target: Target) -> None:
        if len(items) > 1:
            rows.append(_form_row(label, read(model, items, target, max_new_tokens=5)))

    for form, items in shorter_forms(corpus).items():
        add(form, items, descriptions())
    found = [item for item in entities(corpus) if item.group == "place" and str(item.answer).startswith("state")]
    for n in sorted({item.n_words for item in found}):
        add(f"states of {n} word{'s' * (n > 1)}", [item for item in found if item.n_words == n], descriptions())
    for n, items in capitals_by_words(corpus).items():
        states = [item for item in items if item.group == "state"]
        add(f"capitals of states, {n} word{'s' * (n > 1)}", states, Target("Fact : the state containing x is"))
    notes = (
        "Every word is a token, and the corpus writes every name in one way only: no entity is known here in one, two "
        "and three tokens (it is in `capitals-cut`). Shorter forms are ours, so the model has not seen them as names "
        "of these people, and a last word alone does not say who is meant. Groups of states and capitals differ in "
        "more than their tokens.",
        CHOICE,
        CONTROLS,
    )
    return StudyTable(titled(BY_TOKENS, name), tuple(rows), notes)


def tokens_table(model: HookedModel, reading: Reading, *, name: str = "") -> StudyTable:
    """Entities by the number of tokens that a model's own tokenizer cuts their name into.

    Args:
        model: The model that was read.
        reading: See `description_reading`.
        name: Of the model, for the title.
    """
    cut: dict[int, list[int]] = {}
    for i, one in enumerate(reading.items):
        cut.setdefault(n_tokens(model, one), []).append(i)
    rows = []
    for n, chosen in sorted(cut.items()):
        whole = reading.part(items=chosen)
        kinds = list(dict.fromkeys(one.group for one in whole.items))
        parts = {"": whole} | ({f": {kind}": whole.of(group=kind) for kind in kinds} if len(kinds) > 1 else {})
        label = f"{n} token{'s' * (n > 1)}"
        rows += [_form_row(f"{label}{kind}", part) for kind, part in parts.items() if len(part.items) > 1]
    alone = ", ".join(f"{n}" for n, chosen in sorted(cut.items()) if len(chosen) < 2)
    notes = (
        "Tokens of the name at the end of its sentence, by the model's own tokenizer. Entities of different lengths "
        "differ in more than their tokens: the same ones in several forms are studied in `capitals-cut`."
        + (f" One entity alone, and left out, has {alone} tokens." if alone else ""),
        CHOICE,
        CONTROLS,
    )
    return StudyTable(titled(BY_TOKENS, name), tuple(rows), notes)


def n_tokens(model: HookedModel, one: Item) -> int:
    """Return how many tokens the name at the end of an item's prompt is: those that the prompt has without it less.

    Raises:
        ValueError: The prompt does not end in the name.
    """
    before = one.prompt.rstrip()
    for letter in reversed("".join(one.name.split())):  # prose has no blank before a comma, a list of words has
        if not before.endswith(letter):
            raise ValueError(f"the prompt {one.prompt!r} does not end in the name {one.name!r}")
        before = before.removesuffix(letter).rstrip()
    return len(to_tokens(model, one.prompt)) - len(to_tokens(model, before))


def _form_row(label: str, reading: Reading) -> Row:
    layers = reading.result.source_layers
    first = [layer for s, layer in enumerate(layers) if reading.right[:, s].mean(0).max() > 0.5]
    words = sorted({item.n_words for item in reading.items})
    cells: dict[str, Cell] = {"words": " to ".join(map(str, dict.fromkeys((words[0], words[-1]))))}
    cells |= reading.cells() | {"first layer above a half": layer_title(first[0]) if first else "none"}
    return Row(label, cells, reading.failures())
