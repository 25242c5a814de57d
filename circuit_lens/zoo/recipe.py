"""How the bundled models are made: every artefact from seeds, each one skipped if the work folder has it already.

work/models/<name>-<seed>/            the model as it ships (float16 weights, JSON)
work/dictionaries/<name>-<seed>-<n>/  its transcoders as they ship, one SAELens folder per hook
work/features/<key>.safetensors       what is known about features, as it ships
work/figures/<key>.json               the figures, measured on what ships

Dictionaries of other kinds: `cross_layer_recipe` and `sae_recipe`. The model of cut names: `cut_recipe`. All of it in
order: `everything`.

A folder is written beside its place and renamed when it is complete, so an interrupted run loses the artefact it was
making and nothing else.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from circuit_lens.zoo.batches import HeldOutText, held_out_text
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.cut_names import CUT
from circuit_lens.zoo.loading import (
    ASSETS,
    DICTIONARIES,
    FEATURE_INFO_FILE,
    load_dictionaries_from,
    load_model_from,
    save_model,
)
from circuit_lens.zoo.model import ModelShape, hooked_state
from circuit_lens.zoo.tokenizer import build_vocabulary
from circuit_lens.zoo.train import TrainingSettings, train_model

if TYPE_CHECKING:
    from circuit_lens.training.transcoder import TranscoderSettings

CAPITALS, SHORTCUT = "capitals", "capitals-shortcut"
MODELS: dict[str, TrainingSettings] = {
    CAPITALS: TrainingSettings(),
    SHORTCUT: TrainingSettings(trained_embedding=True),
    CUT: TrainingSettings(steps=1500),
}
RUNS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    # (model, model seed, dictionary seeds)
    (CAPITALS, 0, (0, 1)),
    (CAPITALS, 1, (0, 1)),
    (CAPITALS, 2, (0, 1)),
    (SHORTCUT, 0, (0,)),
)
ROW_LENGTH = 64
# Seeds of texts; models are trained on the texts 1000 + seed.
DICTIONARY_TEXT, FIGURES_TEXT, FEATURES_TEXT = 5000, 9000, 9001
DICTIONARY_TOKENS, FIGURES_TOKENS, FEATURES_TOKENS = 400_000, 100_000, 100_000


def transcoder_settings() -> TranscoderSettings:
    """The settings of every bundled transcoder."""
    from circuit_lens.training.transcoder import TranscoderSettings

    return TranscoderSettings(d_sae=640, k=11.0, steps=700)


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder that appears at ``place`` when the block ends without an exception."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
        inside = Path(temporary) / place.name
        inside.mkdir()
        yield inside
        if place.exists():
            shutil.rmtree(place)
        inside.rename(place)


def halve_weights(folder: Path) -> None:
    """Rewrite a SAELens folder's weights in float16; SAELens loads them in any dtype asked for."""
    path = folder / "sae_weights.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in load_file(path).items()}, path)


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where artefacts are made, and what tells the user how it goes."""

    work: Path
    say: Callable[[str], None] = print

    def model_folder(self, name: str, seed: int) -> Path:
        """Where a trained model lies or will lie."""
        return self.work / "models" / f"{name}-{seed}"

    def dictionaries_folder(self, name: str, seed: int, dictionary_seed: int) -> Path:
        """Where a set of transcoders lies or will lie."""
        return self.work / "dictionaries" / f"{name}-{seed}-{dictionary_seed}"

    def make_model(self, corpus: Corpus, name: str, seed: int, shape: Callable[[int], ModelShape] = ModelShape) -> Path:
        """Train and keep one model, of the sizes that ``shape`` makes for a number of tokens in the vocabulary."""
        folder = self.model_folder(name, seed)
        if folder.exists():
            return folder
        settings = MODELS[name]
        vocabulary = build_vocabulary(corpus.words())
        started = time.perf_counter()

        def progress(step: int, loss: float) -> None:
            if step % 250 == 0:
                seconds = time.perf_counter() - started
                self.say(f"{name} seed {seed}: step {step}/{settings.steps}, loss {loss:.3f}, {seconds:.0f} s")

        model = train_model(corpus, vocabulary, settings, seed=seed, shape=shape(len(vocabulary)), progress=progress)
        provenance = {"seed": seed, "settings": asdict(settings), "seconds": round(time.perf_counter() - started)}
        with new_folder(folder) as place:
            save_model(place, model.shape, hooked_state(model), vocabulary, name=name, provenance=provenance)
        return folder

    def make_dictionaries(self, corpus: Corpus, name: str, seed: int, dictionary_seed: int) -> Path:
        """Train and keep one set of transcoders on the model as it ships."""
        from circuit_lens.training.activations import mlp_activations
        from circuit_lens.training.transcoder import train_transcoder

        folder = self.dictionaries_folder(name, seed, dictionary_seed)
        if folder.exists():
            return folder
        model = load_model_from(self.model_folder(name, seed))
        text = self.text(corpus, DICTIONARY_TOKENS, DICTIONARY_TEXT + dictionary_seed)
        with new_folder(folder) as place:
            for layer in range(model.cfg.n_layers):
                started = time.perf_counter()
                (data,) = mlp_activations(model, text.rows.tokens, text.rows.real, layers=[layer])
                train_transcoder(
                    data.inputs,
                    data.outputs,
                    hook_in=data.hook_in,
                    hook_out=data.hook_out,
                    settings=transcoder_settings(),
                    seed=100 * dictionary_seed + layer,
                    metadata={"model_name": name, "model_seed": seed, "dictionary_seed": dictionary_seed},
                    folder=place / data.hook_out,
                    progress=False,
                )
                halve_weights(place / data.hook_out)
                seconds = time.perf_counter() - started
                self.say(f"{name} seed {seed}: transcoder {data.hook_out}, seed {dictionary_seed}, {seconds:.0f} s")
        return folder

    def text(self, corpus: Corpus, n_tokens: int, seed: int) -> HeldOutText:
        """Text that no model was trained on."""
        ids = {word: index for index, word in enumerate(build_vocabulary(corpus.words()))}
        return held_out_text(corpus, ids, n_tokens=n_tokens, length=ROW_LENGTH, seed=seed)

    def figures(self, key: str, measure: Callable[[], Any]) -> dict[str, Any]:
        """The record that ``measure`` returns, as JSON data; measured once."""
        path = self.work / "figures" / f"{key}.json"
        if not path.exists():
            record = json.dumps(asdict(measure()), indent=1, ensure_ascii=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".partial")
            temporary.write_text(record, encoding="utf-8")
            temporary.rename(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def measure(self, corpus: Corpus, name: str, seed: int, dictionary_seed: int) -> tuple[dict, dict]:
        """(behaviour of the model, figures of its transcoders)."""
        from circuit_lens.zoo.dictionary_figures import measure_dictionaries
        from circuit_lens.zoo.evaluate import measure_behaviour

        model = load_model_from(self.model_folder(name, seed))
        behaviour = self.figures(f"{name}-{seed}", lambda: measure_behaviour(model, corpus))
        dictionaries = load_dictionaries_from(self.dictionaries_folder(name, seed, dictionary_seed))
        text = self.text(corpus, FIGURES_TOKENS, FIGURES_TEXT)
        figures = self.figures(
            f"{name}-{seed}-{dictionary_seed}", lambda: measure_dictionaries(model, dictionaries, corpus, text)
        )
        return behaviour, figures

    def make_features(self, corpus: Corpus, name: str, seed: int, dictionaries: Path, key: str) -> Path:
        """The file of feature information of the dictionaries in a folder; ``key`` names it."""
        from circuit_lens.zoo.feature_information import feature_information

        path = self.work / "features" / f"{name}-{seed}-{key}.safetensors"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        feature_information(
            load_model_from(self.model_folder(name, seed)),
            load_dictionaries_from(dictionaries),
            self.text(corpus, FEATURES_TOKENS, FEATURES_TEXT),
            build_vocabulary(corpus.words()),
            description=f"held-out text of the generator, seed {FEATURES_TEXT}",
        ).save(path)
        self.say(f"{name} seed {seed}: feature information {key}")
        return path

    def ship(
        self, name: str, seed: int, sets: Mapping[str, Path], features: Mapping[str, Path], assets: Path = ASSETS
    ) -> Path:
        """Copy a model, its sets of dictionaries and what is known of their features into the package."""
        place = assets / name
        with new_folder(place) as new:
            new.chmod(0o755)
            shutil.copytree(self.model_folder(name, seed), new, dirs_exist_ok=True)
            for one, folder in sets.items():
                shutil.copytree(folder, new / DICTIONARIES / one)
            for one, path in features.items():
                shutil.copyfile(path, new / DICTIONARIES / one / FEATURE_INFO_FILE)
            for path in new.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
        self.say(f"shipped {name}: model seed {seed}, {', '.join(sets) or 'no dictionaries'}")
        return place
