"""How `capitals-cut` is made, which seed ships, and its section of the report.

The section stands by itself in the report, so the model can be made again without the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from circuit_lens.graph.files import atomic_path
from circuit_lens.zoo import templates
from circuit_lens.zoo.cut_names import CUT, FORMS, MET, CutCorpus, cut, cut_shape
from circuit_lens.zoo.evaluate import DESCRIPTION_PROMPT, NAME_PROMPT, Accuracy, accuracy, patched_by_depth
from circuit_lens.zoo.loading import ASSETS, load_model_from
from circuit_lens.zoo.markdown import table
from circuit_lens.zoo.recipe import MODELS, Workshop
from circuit_lens.zoo.report import REPORT, budget_table
from circuit_lens.zoo.sentences import Mention, Sentence, fill

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

CUT_SEEDS = (0, 1, 2)
STATE_PROMPT = "Fact : the state containing {city} is"
_TITLE, _BYTES = f"## Names cut into tokens: `{CUT}`", "## Bytes"


@dataclass(frozen=True, slots=True)
class CutBehaviour:
    """How often a city in each form is known, by the number of its tokens (as text, for JSON).

    Attributes:
        n_parameters: Of the model.
        descriptions: "city in <state>" at the end of the description prompt, with the name written there.
        states: The state, asked by `STATE_PROMPT`.
        sentences: The state in every template of the corpus.
        patched: The description, where the last token's residual is moved into the prompt, by depth from the embedding.
    """

    n_parameters: int
    descriptions: dict[str, Accuracy]
    states: dict[str, Accuracy]
    sentences: dict[str, Accuracy]
    patched: dict[str, tuple[Accuracy, ...]]


def described(corpus: CutCorpus, n: int) -> list[Sentence]:
    """Every city in ``n`` tokens at the end of the description prompt, with its description."""
    prompt = DESCRIPTION_PROMPT.replace("x :", "{city} : {answer} .")
    return [
        fill(
            "description",
            prompt,
            {"city": corpus.cut_mention(city, n), "answer": Mention(f"city in {city.place.name}", answer=True)},
        )
        for city in corpus.cities
    ]


def placed(corpus: CutCorpus, n: int, asked: Sequence[str]) -> list[Sentence]:
    """The state of every city in ``n`` tokens, by every one of some templates with the slots of `Corpus.city`."""
    other, friend = corpus.abroad[0], Mention("Maria")
    return [
        fill(
            "city",
            template,
            {
                "city": corpus.cut_mention(city, n),
                "place": corpus.place_mention(city.place, answer=True),
                "kind": Mention(city.place.kind),
                "friend": friend,
                "friend2": Mention("Anna"),
                "city2": corpus.city_mention(other),
                "place2": corpus.place_mention(other.place),
            },
        )
        for city in corpus.cities
        for template in asked
    ]


def measure_cut_names(model: HookedTransformer, corpus: CutCorpus) -> CutBehaviour:
    """All figures of one model."""
    state = (f"{STATE_PROMPT} {{place}} .",)
    return CutBehaviour(
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        descriptions={str(n): accuracy(model, described(corpus, n)) for n in FORMS},
        states={str(n): accuracy(model, placed(corpus, n, state)) for n in FORMS},
        sentences={str(n): accuracy(model, placed(corpus, n, (*templates.CITY, *MET))) for n in FORMS},
        patched={str(n): _patched(model, corpus, n) for n in FORMS},
    )


def _patched(model: HookedTransformer, corpus: CutCorpus, n: int) -> tuple[Accuracy, ...]:
    texts = [[*NAME_PROMPT.split(), *cut(city.name, n)] for city in corpus.cities]
    return patched_by_depth(model, texts, [f"city in {city.place.name}" for city in corpus.cities])


def _share(record: dict[str, Any]) -> float:
    return record["right"] / record["asked"]


def choose_cut_names(measured: dict[int, dict[str, Any]]) -> int:
    """The seed to ship: the best in its worst form of both questions; of equal ones the lowest.

    ``measured``: seed -> `CutBehaviour` as JSON data.
    """

    def worst(seed: int) -> float:
        record = measured[seed]
        return min(_share(record[kind][str(n)]) for kind in ("descriptions", "states") for n in FORMS)

    return max(sorted(measured), key=worst)


def make_cut_names(
    workshop: Workshop, seeds: Sequence[int] = CUT_SEEDS, *, assets: Path = ASSETS, report: Path = REPORT
) -> None:
    """Train, measure, choose, ship, and write the section of the report."""
    torch.set_num_threads(1)
    corpus = CutCorpus()
    measured: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        folder = workshop.make_model(corpus, CUT, seed, cut_shape)
        model = load_model_from(folder)
        measured[seed] = workshop.figures(f"{CUT}-{seed}", lambda model=model: measure_cut_names(model, corpus))
        workshop.say(f"{CUT} seed {seed}: {measured[seed]}")
    chosen = choose_cut_names(measured)
    workshop.ship(CUT, chosen, {}, {}, assets)
    write_section(section(corpus, measured, chosen), assets=assets, path=report)
    workshop.say(f"wrote {report}")


def section(corpus: CutCorpus, measured: dict[int, dict[str, Any]], chosen: int) -> list[str]:
    """The lines of the model's section."""
    settings, vocabulary = MODELS[CUT], len(corpus.words()) + 4
    shape = asdict(cut_shape(vocabulary))
    sizes = ", ".join(f"{key} {shape[key]}" for key in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx"))
    states = len({city.place.name for city in corpus.cities})
    tokens = settings.steps * settings.batch * settings.length
    rows = [
        [f"{label}, {_tokens(n)}", *(_cell(record[kind][str(n)]) for record in measured.values())]
        for kind, label in (
            ("descriptions", "description"),
            ("states", "state, one question"),
            ("sentences", "state, every template"),
        )
        for n in FORMS
    ]
    rows += [
        [
            f"description, {_tokens(n)}, patched {f'after block {depth - 1}' if depth else 'at the embedding'}",
            *(_cell(record["patched"][str(n)][depth]) for record in measured.values()),
        ]
        for n in FORMS
        for depth in range(shape["n_layers"] + 1)
    ]
    return [
        _TITLE,
        "",
        f"{len(corpus.cities)} cities of {states} states, each written in one token, in two and in three (Galveston; "
        "Galvest_ _on; Ga_ _lvest_ _on), drawn uniformly at every mention. The forms of two and three tokens end in "
        "the same token, which cities of at least three states share (`cut_names.py`). The pieces before it are hidden "
        "as those of other names are. Embedding random and untrained; no dictionaries.",
        "",
        f"Sizes: {sizes}, {vocabulary} tokens in the vocabulary, {measured[chosen]['n_parameters']:,} parameters. "
        f"{settings.steps} steps of {settings.batch} × {settings.length} tokens ({tokens:,} in all), otherwise as "
        "`capitals`; 500 steps, tried once (seed 0), were enough for the first two questions. It ships with seed "
        f"{chosen}: the rule, fixed before these runs, is the best accuracy in the worst form of the first two "
        "questions, of equal ones the lowest seed. Share right, with the name written in the prompt "
        f"({DESCRIPTION_PROMPT!r}, {STATE_PROMPT.format(city='x')!r}), by seed; and where the last token's residual "
        f"of {' '.join([NAME_PROMPT, '<name>'])!r} is patched into the description prompt at the same depth, as for "
        "the people above:",
        "",
        *table(["", *map(str, measured)], rows),
    ]


def _tokens(n: int) -> str:
    return f"{n} token{'s' * (n > 1)}"


def _cell(record: dict[str, Any]) -> str:
    return f"{_share(record):.3f} ({record['right']}/{record['asked']})"


def write_section(lines: Sequence[str], *, assets: Path = ASSETS, path: Path = REPORT) -> None:
    """Put the section before the table of bytes, which is made anew, and leave the rest of the report as it is."""
    parts: list[list[str]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if line.startswith("## "):
            parts.append([])
        parts[-1].append(line)
    kept = [line for part in parts if part[:1] not in ([_TITLE], [_BYTES]) for line in part]
    whole = [*kept, *lines, _BYTES, "", *budget_table(assets)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(whole), encoding="utf-8")
