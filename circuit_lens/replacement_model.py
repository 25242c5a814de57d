"""The facade that users hold: a model and its dictionaries, bound once; everything else is delegated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from circuit_lens.attribution.contrast import ContrastModel, check_pair, check_settings
from circuit_lens.attribution.linear_maps import ModelWeights, read_weights
from circuit_lens.attribution.probe import probe
from circuit_lens.attribution.replacement import LocalReplacementModel
from circuit_lens.attribution.settings import Engine, Settings
from circuit_lens.attribution.values import compute_dtype, from_cache, from_prompt, needed_names
from circuit_lens.dictionaries.attach import attached, feature_acts
from circuit_lens.dictionaries.binding import Binding, bind, reads_where_it_writes
from circuit_lens.dictionaries.points import Read, read_kind
from circuit_lens.errors import ConsistencyError
from circuit_lens.evaluation.evaluate import evaluate
from circuit_lens.evaluation.figures import Evaluation
from circuit_lens.evaluation.rows import Mask, Rows
from circuit_lens.graph.card import ValidationCard
from circuit_lens.graph.edits import Intervention
from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.grouping import Grouping
from circuit_lens.graph.supernodes import Supernode
from circuit_lens.hooks import has_hook, refuse_split_inputs
from circuit_lens.interventions.group_scores import GroupScores, score_groups
from circuit_lens.interventions.intervene import Generation, generate, intervene, intervene_batch
from circuit_lens.interventions.plan import MIN_EDGE, InterventionPlan, make_plan
from circuit_lens.interventions.plan_parts import Children
from circuit_lens.interventions.recording import Recording, record
from circuit_lens.interventions.run import BatchRun, Run
from circuit_lens.interventions.study import Ablation, CardSettings
from circuit_lens.interventions.validation import validate
from circuit_lens.protocols import Cache, Dictionary, HookedModel
from circuit_lens.running import Prompt, plain_tensors, to_tokens

FeatureLabel = Callable[[str, int, int], str]


class ReplacementModel:
    """A hooked model and the sparse dictionaries on its hook points.

    Args:
        model: A HookedTransformer or TransformerBridge; it is never changed.
        dictionaries: SAELens transcoders and SAEs as they come, a ``CrossLayerTranscoder``, ``cl.neurons(model)``,
            objects that follow ``circuit_lens.protocols.Dictionary``; one or several in any mixture, but no two that
            stand for the same activation. An MLP without one stays what it is.
        label: Label of a feature by site, layer and index, copied into graphs.

    Raises:
        HookError: A dictionary's hook that the model does not have.
        DictionaryError: A dictionary that cannot be attributed or does not fit the model.
    """

    def __init__(
        self, model: HookedModel, dictionaries: Any, *, label: FeatureLabel = lambda site, layer, index: ""
    ) -> None:
        self.binding: Binding = bind(model, dictionaries)
        self._probe = probe(self.binding.model)
        self.label = label

    @property
    def model(self) -> Any:
        """The user's model, as it was given."""
        return self.binding.model

    @property
    def dictionaries(self) -> tuple[Dictionary, ...]:
        """The dictionaries, in the order the model computes them."""
        return self.binding.dictionaries

    def names_filter(self) -> list[str]:
        """Return the least a cache must hold: hook names for ``model.run_with_cache(..., names_filter=...)``."""
        sites = [d.hook_in for d in self.dictionaries if reads_where_it_writes(d)]
        return list(dict.fromkeys([*needed_names(self.binding.model), *sites]))

    def local(
        self,
        prompt: Prompt,
        *,
        cache: Cache | None = None,
        batch_index: int | None = None,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
        baseline: Prompt | None = None,
        baseline_cache: Cache | None = None,
        baseline_batch_index: int | None = None,
        baseline_fwd_hooks: Sequence[tuple[Any, Any]] = (),
        norms: Literal["frozen", "linear"] = "frozen",
        attention: Literal["frozen", "linear"] = "frozen",
        mlp: Literal["auto", "error", "jacobian"] = "auto",
        engine: Engine = "auto",
        zero_positions: Sequence[int] = (),
        check: bool = True,
        min_explained: float | None = 0.0,
    ) -> LocalReplacementModel:
        """Return one prompt's frozen linear model, reusable for rows, head loadings and graphs.

        With ``baseline``: the model of what differs between the two (:mod:`circuit_lens.attribution.contrast`).

        Args:
            prompt: Text, or token ids ``[n_pos]`` or ``[1, n_pos]``.
            cache: Activations of this prompt from ``model.run_with_cache``, on any device, in any float dtype, with or
                without batch axis; then the source is not run again. It must hold ``names_filter()``.
            batch_index: Which row of a batched cache.
            fwd_hooks: Temporary TransformerLens hooks for the run; permanent ones are honoured without being named.
            baseline: Another prompt of as many tokens (or the same one, with other hooks or activations), to explain
                the difference to.
            baseline_cache, baseline_batch_index, baseline_fwd_hooks: The same for the baseline's run.
            norms: ``"frozen"`` denominators, or norms by their Jacobian (``"linear"``).
            attention: ``"frozen"`` patterns, or queries, keys and softmax to first order (``"linear"``).
            mlp: What an MLP without dictionary is: an ``"error"`` node, or its local ``"jacobian"`` and a bias node.
                ``"auto"``: the second as soon as an SAE is among the dictionaries (the graph's settings say which).
            engine: ``"auto"``, or one of ``"fast"`` and ``"reference"``.
            zero_positions: Positions at which no feature is active by decree (peers do so at position 0).
            check: Check linearity, reconstruction and inputs before anything is computed.
            min_explained: Least share of the MLP output's square that every dictionary must explain on the prompt
                (first position left out); None uses any dictionary.

        Raises:
            CircuitLensError: What does not fit: TokensError (the prompt), HookError, CacheError, ConsistencyError (the
                run), ReconstructionError (a dictionary), LinearizationError (hooks that do not hold).
            ValueError: An option that is not one of the listed ones, or hooks together with a cache.
        """
        settings = Settings(norms, attention, mlp, engine, tuple(zero_positions), check, min_explained)
        other = baseline_cache, baseline_batch_index, baseline_fwd_hooks
        if baseline is None:
            if baseline_cache is not None or baseline_batch_index is not None or baseline_fwd_hooks:
                raise ValueError("baseline_cache and baseline_fwd_hooks need baseline=, the tokens of that run")
            return self._local(prompt, cache, batch_index, fwd_hooks, settings)
        check_settings(settings)
        same_run = cache is None and baseline_cache is None and not fwd_hooks and not baseline_fwd_hooks
        model = self.binding.model
        check_pair(model, to_tokens(model, prompt), to_tokens(model, baseline), same_run=same_run)
        clean = self._local(prompt, cache, batch_index, fwd_hooks, settings)
        zeros = tuple(clean.position(pos) for pos in zero_positions)
        return ContrastModel(clean, self._local(baseline, *other, replace(settings, zero_positions=zeros)))

    def _local(
        self, prompt: Prompt, cache: Cache | None, batch_index: int | None,
        fwd_hooks: Sequence[tuple[Any, Any]], settings: Settings,
    ) -> LocalReplacementModel:  # fmt: skip
        """Return one run's frozen model."""
        if cache is not None and fwd_hooks:
            raise ValueError("fwd_hooks act on a run, and with a cache there is none; give one of the two")
        model = self.binding.model
        refuse_split_inputs(model)
        tokens = to_tokens(model, prompt)
        extra = self._read_hooks()
        text = prompt if isinstance(prompt, str) else None
        with plain_tensors():
            # Read anew for every prompt: the user may have edited the model's weights in between.
            weights = read_weights(model, compute_dtype(model))
            if cache is None:
                values = from_prompt(model, tokens, extra=extra, fwd_hooks=fwd_hooks)
            else:
                weights = self._fit_for_caches(weights)
                values = from_cache(model, tokens, cache, extra=extra, batch_index=batch_index)
            return LocalReplacementModel(self.binding, weights, values, settings, prompt=text, label=self.label)

    def attribute(
        self,
        prompt: Prompt,
        *,
        targets: Any = None,
        cache: Cache | None = None,
        batch_index: int | None = None,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
        baseline: Prompt | None = None,
        baseline_cache: Cache | None = None,
        baseline_batch_index: int | None = None,
        baseline_fwd_hooks: Sequence[tuple[Any, Any]] = (),
        max_features: int | None = None,
        norms: Literal["frozen", "linear"] = "frozen",
        attention: Literal["frozen", "linear"] = "frozen",
        mlp: Literal["auto", "error", "jacobian"] = "auto",
        engine: Engine = "auto",
        zero_positions: Sequence[int] = (),
        check: bool = True,
        min_explained: float | None = 0.0,
        rerank_every: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> AttributionGraph:
        """Return the attribution graph of a prompt (Ameisen et al. 2025, Circuit Tracing).

        With ``baseline``, a prompt of as many tokens, the graph is a contrast: every target, edge and activation is the
        prompt's minus the baseline's, and rows sum to that difference (:mod:`circuit_lens.attribution.contrast`).

        Args:
            prompt: Text, or token ids ``[n_pos]`` or ``[1, n_pos]``.
            targets: What to explain. None: the most probable next tokens (``cl.salient_logits()``). Token strings or
                ids, at another position by ``cl.token_logits(*tokens, pos=)``; ``cl.logit_difference(a, b)``;
                ``cl.direction(vector)``; ``cl.Feature(...)``; any function from logits ``[1, n_pos, d_vocab]`` to a
                scalar, linearised at the run (between the runs, with a baseline); or a list of these.
            max_features: At most this many features become nodes; the others are summed into rest nodes.
            rerank_every: Rows after which influence is computed anew to choose the next features (default 256).
            batch_size: Rows computed at once; bounds memory, does not change the graph.
            progress: Show a progress bar; None shows it for work that takes more than two seconds.
            cache, batch_index, fwd_hooks: See :meth:`local`.
            baseline, baseline_cache, baseline_batch_index, baseline_fwd_hooks: See :meth:`local`.
            norms, attention, mlp, engine, zero_positions, check, min_explained: See :meth:`local`.

        Raises:
            TargetError: A target that is not one token, an unknown feature, a metric that is no differentiable scalar.
            CircuitLensError: As :meth:`local`.
        """
        local = self.local(
            prompt, cache=cache, batch_index=batch_index, fwd_hooks=fwd_hooks, baseline=baseline,
            baseline_cache=baseline_cache, baseline_batch_index=baseline_batch_index,
            baseline_fwd_hooks=baseline_fwd_hooks, norms=norms, attention=attention, mlp=mlp, engine=engine,
            zero_positions=zero_positions, check=check, min_explained=min_explained,
        )  # fmt: skip
        return local.attribute(
            targets, max_features=max_features, rerank_every=rerank_every, batch_size=batch_size, progress=progress
        )

    def evaluate(
        self,
        tokens: Rows,
        *,
        mask: Mask | None = None,
        keep_special: bool = True,
        alone: bool = True,
        baselines: bool = True,
        batch_size: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Evaluation:
        """Return L0, explained variance, dead share, loss and KL of the dictionaries in place of what they stand for.

        Each alone and all at once, at the hooks they write, beside zero and mean ablation and untrained dictionaries of
        equal L0; see :func:`circuit_lens.evaluation.evaluate.evaluate`.
        """
        return evaluate(
            self.binding, tokens, mask=mask, keep_special=keep_special, alone=alone, baselines=baselines,
            batch_size=batch_size, seed=seed, progress=progress,
        )  # fmt: skip

    def attached(self, *, error: bool = True) -> AbstractContextManager[Any]:
        """Put the dictionaries on the model's hook points for a ``with`` block.

        Inside it, ``blocks.1.hook_mlp_out.pre_acts``, ``.features`` and ``.error`` are ordinary hook points of the
        model: in caches, and for ``run_with_hooks``, ``hooks``, ``add_hook`` and TransformerLens' ``patching``. See
        :func:`circuit_lens.dictionaries.attach.attached`.

        Args:
            error: Add what the dictionaries miss, so that the model's output stays. False: the reconstruction
                replaces the output, and the error points hold zeros.

        Raises:
            HookError: Dictionaries are attached to the model already, or (in a forward pass) a hook did not fire.
        """
        return attached(self.binding, error=error)

    def feature_acts(self, cache: Cache) -> dict[str, Tensor]:
        """Return feature activations ``[batch, pos, d_sae]`` by site, from a cache of any run.

        A cache that holds ``names_filter()`` is enough. See :func:`circuit_lens.dictionaries.attach.feature_acts`.

        Raises:
            CacheError: An entry that a dictionary needs is missing; names it.
        """
        return feature_acts(self.binding, cache)

    # Interventions

    def record(self, prompt: Prompt, *, fwd_hooks: Sequence[tuple[Any, Any]] = ()) -> Recording:
        """Run a prompt once, unchanged, and keep what interventions start from; give it in place of the prompt.

        Raises:
            CircuitLensError: As :meth:`local`.
        """
        return record(self.binding, prompt, fwd_hooks=fwd_hooks)

    def active_features(self, prompt: Prompt | Recording, pos: int | str = -1) -> dict[tuple[str, int, int], float]:
        """Return the activations of the features that are active at a position, by (site, layer, index)."""
        return (prompt if isinstance(prompt, Recording) else self.record(prompt)).active_at(pos)

    def intervene(
        self,
        prompt: Prompt | Recording,
        interventions: Intervention | Iterable[Intervention],
        *,
        freeze: Literal["none", "attention", "all"] = "none",
        layers: tuple[int, int] | None = None,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
    ) -> Run:
        """Run a prompt with features, supernodes, error nodes or directions changed.

        A new value is fixed before the run (a value, a factor of the clean activation, the clean activation plus
        something, or a recorded one); the difference from the activation on the run itself is added to what the
        dictionary's MLP writes. So whatever is not held reacts, errors included, and an activation that is given its
        own value changes no bit.

        Args:
            prompt: Text, token ids, or a recording of this model (``rm.record``), which saves the clean run.
            interventions: Such as ``[cl.Feature(0, 9, 158).set(0.0), texas.scale(-1)]``.
            freeze: ``"none"``: everything reacts (constrained by nothing). ``"attention"``: clean queries, keys and
                patterns. ``"all"``: these, norm denominators and MLP outputs are clean (skip paths stay linear);
                features are read but do not react, so that changes are the graph's direct edges.
            layers: First and last layer (both included) whose MLP outputs are held at clean plus the changes
                (constrained patching, Ameisen et al. 2025); combines with ``freeze``.
            fwd_hooks: Temporary TransformerLens hooks, in the clean run too.

        Raises:
            InterventionError: A feature that does not exist or is not active where it is scaled, two interventions
                that change one thing differently, an empty group, NaN.
            CircuitLensError: As :meth:`local`; HookError also when dictionaries are attached to the model.
            ValueError: An option that is not one of the listed ones.
        """
        return intervene(
            self.binding, prompt, interventions, freeze=freeze, layers=layers, fwd_hooks=fwd_hooks, labels=self.label
        )

    def intervene_batch(
        self,
        prompt: Prompt | Recording,
        runs: Iterable[Intervention | Iterable[Intervention]],
        *,
        freeze: Literal["none", "attention", "all"] = "none",
        layers: tuple[int, int] | None = None,
        read: Literal["logits", "features"] = "logits",
        pos: int | str | slice | None = -1,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> BatchRun:
        """Run a prompt many times at once, each time with interventions of its own; the same results as one by one.

        Args:
            prompt, freeze, layers, fwd_hooks: See :meth:`intervene`.
            runs: The interventions of each run.
            read: ``"logits"``, or ``"features"`` too: (pre-)activations of what is active on the clean run, and
                everything that switches on.
            pos: Where logits are kept; None for all positions.
            batch_size: Runs per forward pass; bounds memory.
            progress: Show a progress bar; None shows it for work that takes more than two seconds.

        Raises:
            As :meth:`intervene`.
        """
        return intervene_batch(
            self.binding, prompt, runs, freeze=freeze, layers=layers, read=read, pos=pos, fwd_hooks=fwd_hooks,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip

    def plan(
        self,
        graph: AttributionGraph,
        supernodes: Iterable[Supernode],
        *,
        children: Children | None = None,
        min_edge: float = MIN_EDGE,
        tokens: bool = True,
    ) -> InterventionPlan:
        """Return supernodes of a graph with the edges between them, to be changed and drawn.

        An edge is the share of the target's inputs that comes from the source, signed
        (:mod:`circuit_lens.graph.supernode_links`); between two supernodes it is shown from the lower to the higher
        one. Members without node in the graph (inactive on the prompt, or pruned) have no edges and are listed; they
        still take part in interventions.

        Args:
            graph: A graph of this model and these dictionaries: whole, pruned, or loaded from a file.
            supernodes: With different names and no member in common; positions as text are those of the graph's prompt.
            children: What each supernode feeds, by hand: ``{"Texas": ["say Austin"]}``. Only these edges between
                supernodes are shown then, whatever their weight.
            min_edge: Smallest share of a target's inputs that is shown.
            tokens: Show tokens that supernodes stand on and whose embeddings feed one directly.

        Raises:
            ConsistencyError: The graph was made with other weights, with hooks, or does not say with which weights.
            InterventionError: Two supernodes of one name or with a common member, unknown children, a cycle of them.
            TokenNotFoundError: A position that the prompt does not have.
        """
        return make_plan(
            self.binding, graph, supernodes, children=children, min_edge=min_edge, tokens=tokens, labels=self.label
        )

    def generate(
        self,
        prompt: Prompt | Recording,
        *,
        max_new_tokens: int = 20,
        interventions: Intervention | Iterable[Intervention] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop_at_eos: bool = True,
        use_cache: bool = True,
        freeze: Literal["none", "attention", "all"] = "none",
        layers: tuple[int, int] | None = None,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
    ) -> Generation:
        """Write on, with interventions; with keys and values kept from step to step, and equal to doing without.

        Interventions at positions of the prompt are as in :meth:`intervene`. Those with an open slice
        (``feature.scale(2, pos=slice(None))``, ``slice(5, None)``) act in generated positions too; there factors
        multiply, and summands add to, the activation on the run itself.

        Args:
            prompt: Text, token ids or a recording.
            max_new_tokens: At most so many tokens.
            interventions: What to change.
            temperature, top_k, seed: 0 takes the most probable token; otherwise a seeded sample.
            stop_at_eos: End at the tokenizer's end-of-sequence token.
            use_cache: Keep keys and values.
            freeze, layers: Nothing can be frozen in generated positions: anything but the default is an error.
            fwd_hooks: Temporary TransformerLens hooks.

        Raises:
            InterventionError: As :meth:`intervene`, for freezing, and for a slice that reaches into generated positions
                and is not open.
            TokensError: The text would not fit the model's context.
        """
        return generate(
            self.binding, prompt, interventions, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
            seed=seed, stop_at_eos=stop_at_eos, use_cache=use_cache, freeze=freeze, layers=layers, fwd_hooks=fwd_hooks,
        )  # fmt: skip

    def validate(
        self,
        graph: AttributionGraph,
        *,
        target: Any = None,
        ablation: Ablation = "zero",
        reference: Sequence[Prompt] = (),
        settings: CardSettings | None = None,
    ) -> ValidationCard:
        """Return how well a graph predicts what interventions do on the live model, beside the cheap baselines.

        ``graph.with_card(card)`` keeps the card with the graph; ``cl.validate_many`` makes one of several prompts.

        Args:
            graph: A graph of this model and these dictionaries, from ``rm.attribute`` or a file.
            target: Which of its targets: a token (id or text), or the ``cl.logit_difference`` or metric it was made
                for; None: the token with the largest weight.
            ablation: What ablated features become: ``"zero"``, their ``"mean"`` over the reference prompts, or
                ``"resample"``, their value on one of them.
            reference: Reference prompts of mean and resample ablation.
            settings: Numbers of nodes, samples and so on.

        Raises:
            ConsistencyError: The graph was made with other weights, or on a run with hooks.
            TargetError: A target that the graph does not explain.
            InterventionError: No features to ablate, or no reference prompts where they are needed.
        """
        settings = replace(CardSettings() if settings is None else settings, ablation=ablation)
        return validate(self.binding, graph, target=target, reference=reference, settings=settings)

    def score_groups(
        self, graph: AttributionGraph, grouping: Grouping, *, target: Any = None, n_random: int = 20, seed: int = 0
    ) -> GroupScores:
        """Return how good groups (``cl.group``) are by intervention; see :func:`group_scores.score_groups`."""
        return score_groups(self.binding, graph, grouping, target=target, n_random=n_random, seed=seed)

    def _fit_for_caches(self, weights: ModelWeights) -> ModelWeights:
        """Apply what the short run at binding showed: a cache alone cannot tell an architecture from an edit."""
        if self._probe.logits is not None:
            raise ConsistencyError(f"no graph can be made from a cache of this model: {self._probe.logits}")
        return weights if self._probe.maps is None else weights.without_attention(self._probe.maps)

    def _read_hooks(self) -> list[str]:
        """Return the dictionaries' read hooks that a default run fires."""
        names = [d.hook_in for d in self.dictionaries if read_kind(d.hook_in) not in (Read.RESIDUAL, Read.MID)]
        return [n for n in names if has_hook(self.binding.model, n)]

    def __repr__(self) -> str:
        kinds = ", ".join(f"{d.site} ({d.kind}, {d.d_sae})" for d in self.dictionaries)
        name = getattr(self.binding.model.cfg, "model_name", type(self.binding.model).__name__)
        return f"ReplacementModel({name}; {kinds or 'no dictionaries'})"
