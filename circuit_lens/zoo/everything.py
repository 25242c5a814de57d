"""Everything that ships, from seeds: models, their dictionaries of every kind, feature information, figures, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.cross_layer_recipe import CLT, cross_layer_settings, make_cross_layer, measure_cross_layer
from circuit_lens.zoo.cut_recipe import make_cut_names
from circuit_lens.zoo.loading import DEFAULT_SET, load_dictionaries_from, load_model_from
from circuit_lens.zoo.recipe import CAPITALS, DICTIONARY_TOKENS, MODELS, RUNS, Workshop, transcoder_settings
from circuit_lens.zoo.report import Measured, choose, write_report
from circuit_lens.zoo.report_sets import MeasuredSets
from circuit_lens.zoo.sae_recipe import SAE_SET, SETS, SKIP, make_saes, measure_saes, sae_settings
from circuit_lens.zoo.set_figures import GraphsOfSets, measure_graphs

DESCRIBED = (DEFAULT_SET, CLT, SKIP, SAE_SET)
"""Sets whose features are described, and whose graphs are measured."""


def make_sets(workshop: Workshop, corpus: Corpus, name: str, seed: int, dictionary_seed: int) -> dict[str, Path]:
    """Every set of dictionaries of one model by its name, each trained unless it is there already."""
    saes = make_saes(workshop, corpus, name, seed, dictionary_seed)
    return {
        DEFAULT_SET: workshop.make_dictionaries(corpus, name, seed, dictionary_seed),
        CLT: make_cross_layer(workshop, corpus, name, seed),
        **{one: saes / one for one in SETS},
    }


def measure_sets(workshop: Workshop, corpus: Corpus, name: str, pair: Measured, sets: dict[str, Path]) -> MeasuredSets:
    """The figures of all sets beside those of the per-layer transcoders, which ``pair`` has."""

    def graphs() -> GraphsOfSets:
        model = load_model_from(workshop.model_folder(name, pair.seed))
        return GraphsOfSets(
            {one: measure_graphs(model, load_dictionaries_from(sets[one]), corpus) for one in DESCRIBED}
        )

    key = f"{name}-{pair.seed}-{pair.dictionary_seed}"
    return MeasuredSets(
        transcoders=pair.figures,
        clt=measure_cross_layer(workshop, corpus, name, pair.seed),
        saes=measure_saes(workshop, corpus, name, pair.seed, pair.dictionary_seed),
        graphs=workshop.figures(f"{key}-graphs", graphs)["sets"],
        cross_layer=cross_layer_settings(),
        sae=sae_settings,
    )


def make_everything(workshop: Workshop, runs: tuple[tuple[str, int, tuple[int, ...]], ...] = RUNS) -> None:
    """Train, measure, choose, ship, report."""
    torch.set_num_threads(1)
    corpus = Corpus()
    measured: list[Measured] = []
    for name, seed, dictionary_seeds in runs:
        workshop.make_model(corpus, name, seed)
        for dictionary_seed in dictionary_seeds:
            workshop.make_dictionaries(corpus, name, seed, dictionary_seed)
            behaviour, figures = workshop.measure(corpus, name, seed, dictionary_seed)
            measured.append(Measured(name, seed, dictionary_seed, behaviour, figures))
            workshop.say(measured[-1].summary())
    shipped = {name: choose(measured, name) for name in dict.fromkeys(name for name, _, _ in runs)}
    more: dict[str, Any] = {}
    for name, pair in shipped.items():
        sets = {DEFAULT_SET: workshop.dictionaries_folder(name, pair.seed, pair.dictionary_seed)}
        if name == CAPITALS:
            sets = make_sets(workshop, corpus, name, pair.seed, pair.dictionary_seed)
            more["sets"] = measure_sets(workshop, corpus, name, pair, sets)
        tables = {
            one: workshop.make_features(corpus, name, pair.seed, folder, f"{pair.dictionary_seed}-{one}")
            for one, folder in sets.items()
            if one in DESCRIBED
        }
        workshop.ship(name, pair.seed, sets, tables)
    path = write_report(
        measured,
        shipped,
        settings=MODELS[CAPITALS],
        transcoders=transcoder_settings(),
        dictionary_tokens=DICTIONARY_TOKENS,
        **more,
    )
    workshop.say(f"wrote {path}")
    make_cut_names(workshop)
