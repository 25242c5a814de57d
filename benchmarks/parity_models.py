"""What is compared with circuit-tracer, and how it travels: exchange format, random models, one meter for both sides.

The two implementations need libraries that cannot be installed together, so they exchange files. This module is
imported on both sides; at import it needs torch and safetensors only. Nothing in a file is executed: tensors, and JSON
in the header.

A **case** (`Case`, `write_case`, `read_case`): one model, its dictionaries, one prompt, the settings.

    header   format   "circuit-lens-parity-case", version "1"
             name     the case's name
             config   JSON: fields of TransformerLens' HookedTransformerConfig (dtype as "float32" or "float64")
             hooks    JSON: {"read": hook the dictionaries read, "write": hook they write}, both without "blocks.<l>."
             settings JSON: the fields of `Settings`
    tensors  tokens                        int64 [n_pos]; the first is the begin-of-sequence token, nothing is prepended
             model.<name>                  HookedTransformer's state dict (no masks and rotary tables)
             transcoder.<l>.W_enc          [d_model, d_sae]   the orientation is that of SAELens
             transcoder.<l>.b_enc          [d_sae]
             transcoder.<l>.W_dec          [d_sae, d_model]   a cross-layer transcoder's: [d_sae, n_layers - l, d_model]
             transcoder.<l>.b_dec          [d_model]
             transcoder.<l>.threshold      [d_sae]            absent: ReLU; present: x·1[x > threshold], threshold >= 0
             transcoder.<l>.W_skip         [d_model, d_model] absent: no skip; present: x @ W_skip.T is added

A cross-layer transcoder also travels as a folder in circuit-tracer's own layout beside the case (``<case>.clt``), which
circuit-tracer loads, and comes back as circuit-tracer writes it beside the result, which circuit_lens loads.

A **result** (`PeerResult`, `write_result`, `read_result`): what circuit-tracer made of the case.

    header   format   "circuit-lens-parity-result", version "1"
             facts    JSON: the scalar fields of `PeerResult`, and its measurements per batch size
    tensors  as the tensor fields of `PeerResult`; masks as uint8

Node order in a result is circuit-tracer's: selected features (by layer, position, index), errors (layer-major), tokens,
logits. Rows are targets, columns are sources; rows of errors and tokens do not exist.

What circuit-tracer does that a comparison must follow: features and errors at position 0 are zero (`zero_positions`);
biases, position embeddings and decoder biases have no nodes; logit targets are the demeaned unembedding columns of the
most probable tokens before any soft-cap; with ``max_feature_nodes`` the features that are not selected vanish, and
which are selected depends on the batch size.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

CASE_FORMAT, RESULT_FORMAT, VERSION = "circuit-lens-parity-case", "circuit-lens-parity-result", "1"
BATCH_SIZES = (16, 32, 64, 128)


# ------------------------------------------------------------------------------------------------- exchange format


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a graph is made: circuit-tracer's names for its options."""

    batch_sizes: tuple[int, ...] = (32,)
    """Tried one after the other, each in a process of its own; the graph is that of the first."""
    max_n_logits: int = 10
    desired_logit_prob: float = 0.95
    max_feature_nodes: int | None = None
    prune: bool = True
    """Whether masks are wanted: sorting all edges takes seconds where there are thousands of nodes."""
    node_threshold: float = 0.8
    edge_threshold: float = 0.98


@dataclasses.dataclass(frozen=True)
class TranscoderWeights:
    """One layer's dictionary, in SAELens' orientation (see the module's description)."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    W_skip: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights that are there, by name."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: tensor for name, tensor in fields if tensor is not None}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its dictionaries (one per layer), a prompt and the settings of the graph."""

    name: str
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    transcoders: Sequence[TranscoderWeights]
    tokens: Tensor
    hook_read: str = "ln2.hook_normalized"
    hook_write: str = "hook_mlp_out"
    settings: Settings = dataclasses.field(default_factory=Settings)

    @property
    def cross_layer(self) -> bool:
        """Whether the dictionaries are the layers of one cross-layer transcoder."""
        return bool(self.transcoders) and self.transcoders[0].W_dec.ndim == 3

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of every computation."""
        return getattr(torch, str(self.config["dtype"]).removeprefix("torch."))


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One run of circuit-tracer's ``attribute`` in a fresh process, on one thread."""

    batch_size: int
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    """Highest resident memory during the run less what was resident before it: the weights are not counted."""


@dataclasses.dataclass(frozen=True)
class PeerResult:
    """circuit-tracer's graph of a case, its influence, pruning and scores, and what it took."""

    tokens: Tensor
    """[n_pos]"""
    active_features: Tensor
    """[n_active, 3]: layer, position, index"""
    activations: Tensor
    """[n_active]"""
    selected_features: Tensor
    """[n_selected]: which of the active features have nodes, ascending"""
    adjacency: Tensor
    """[n_selected + n_logits, n_selected + n_layers·n_pos + n_pos]"""
    logit_tokens: Tensor
    """[n_logits]"""
    logit_probabilities: Tensor
    """[n_logits]"""
    node_influence: Tensor
    """[n_nodes]: of every node, logits included, on the logits (``compute_node_influence``)"""
    cumulative_scores: Tensor
    """[n_nodes]; empty without pruning"""
    node_mask: Tensor
    """[n_nodes], bool; empty without pruning"""
    edge_mask: Tensor
    """as the adjacency, bool; empty without pruning"""
    replacement_score: float
    completeness_score: float
    zero_positions: tuple[int, int]
    """features and errors at positions from the first up to the second are zero"""
    case: str
    batch_size: int
    versions: Mapping[str, str]
    measurements: Sequence[Measurement]


def write_case(path: Path | str, case: Case) -> None:
    """Write a case (format: see the module's description)."""
    tensors = {f"model.{name}": tensor for name, tensor in case.state.items()}
    for layer, weights in enumerate(case.transcoders):
        tensors |= {f"transcoder.{layer}.{name}": tensor for name, tensor in weights.tensors().items()}
    tensors["tokens"] = case.tokens
    header = {
        "format": CASE_FORMAT,
        "version": VERSION,
        "name": case.name,
        "config": json.dumps(dict(case.config)),
        "hooks": json.dumps({"read": case.hook_read, "write": case.hook_write}),
        "settings": json.dumps(dataclasses.asdict(case.settings)),
    }
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, header)


def read_case(path: Path | str) -> Case:
    """Read a case; ``ValueError`` if the file is none, or of another version."""
    header, tensors = _read(path, CASE_FORMAT)
    layers: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith("transcoder.")]:
        _, layer, field = name.split(".")
        layers.setdefault(int(layer), {})[field] = tensors[name]
    hooks, settings = json.loads(header["hooks"]), json.loads(header["settings"])
    settings["batch_sizes"] = tuple(settings["batch_sizes"])
    return Case(
        name=header["name"],
        config=json.loads(header["config"]),
        state={name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")},
        transcoders=[TranscoderWeights(**layers[layer]) for layer in range(len(layers))],
        tokens=tensors["tokens"],
        hook_read=hooks["read"],
        hook_write=hooks["write"],
        settings=Settings(**settings),
    )


def write_result(path: Path | str, result: PeerResult) -> None:
    """Write a result (format: see the module's description)."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    facts = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}
    facts["measurements"] = [dataclasses.asdict(measurement) for measurement in result.measurements]
    masks = {name: tensor.to(torch.uint8) for name, tensor in tensors.items() if tensor.dtype == torch.bool}
    header = {"format": RESULT_FORMAT, "version": VERSION, "facts": json.dumps(facts)}
    save_file({name: tensor.contiguous() for name, tensor in (tensors | masks).items()}, path, header)


def read_result(path: Path | str) -> PeerResult:
    """Read a result; ``ValueError`` if the file is none, or of another version."""
    header, tensors = _read(path, RESULT_FORMAT)
    facts = json.loads(header["facts"])
    facts["measurements"] = [Measurement(**measurement) for measurement in facts["measurements"]]
    facts["zero_positions"] = tuple(facts["zero_positions"])
    masks = {name: tensors[name].bool() for name in ("node_mask", "edge_mask")}
    return PeerResult(**(tensors | masks), **facts)


def _read(path: Path | str, expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
        if (header.get("format"), header.get("version")) != (expected, VERSION):
            raise ValueError(f"{path} is no {expected} of version {VERSION}, but says {header.get('format')!r}")
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# ------------------------------------------------------------------------------------------------ from and to models


def case_from_model(
    name: str, model: HookedTransformer, transcoders: Sequence[Any], tokens: Tensor, settings: Settings | None = None
) -> Case:
    """Return the case of a HookedTransformer with one SAELens transcoder per layer, for instance a bundled one."""
    config = {k: v for k, v in model.cfg.to_dict().items() if isinstance(v, str | int | float | bool | list | None)}
    config |= {"dtype": str(model.cfg.dtype).removeprefix("torch."), "device": "cpu", "seed": None}
    tables = ("attn.mask", "attn.IGNORE", "attn.rotary_sin", "attn.rotary_cos")
    read, write = (transcoders[0].cfg.metadata[key] for key in ("hook_name", "hook_name_out"))
    fields = [field.name for field in dataclasses.fields(TranscoderWeights)]
    return Case(
        name=name,
        config=config,
        state={k: v.detach().cpu() for k, v in model.state_dict().items() if not k.endswith(tables)},
        transcoders=[
            TranscoderWeights(**{f: getattr(sae, f).detach().cpu() for f in fields if hasattr(sae, f)})
            for sae in transcoders
        ],
        tokens=tokens.flatten().cpu(),
        hook_read=read.split(".", 2)[2],
        hook_write=write.split(".", 2)[2],
        settings=settings or Settings(),
    )


def hooked_config(case: Case) -> dict[str, Any]:
    """Return the arguments of the installed TransformerLens' HookedTransformerConfig for the case.

    A field that the installed version does not know is left out if it says nothing (None, False, or the 1 and true of a
    switch that is off), and an error otherwise.
    """
    from transformer_lens import HookedTransformerConfig

    known = {field.name for field in dataclasses.fields(HookedTransformerConfig)} - {"n_params"}
    harmless = {"yarn_truncate"}  # says how a scaling is rounded that is off
    unknown = {k: v for k, v in case.config.items() if k not in known and k not in harmless and k != "n_params"}
    if any(v not in (None, False) for v in unknown.values()):
        raise ValueError(f"this version of TransformerLens does not know the configuration's {unknown}")
    return {k: v for k, v in case.config.items() if k in known} | {"dtype": case.dtype, "device": "cpu"}


def hooked_transformer(case: Case, tokenizer: Any = None) -> HookedTransformer:
    """Return the case's model as a HookedTransformer of the installed TransformerLens, nothing processed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(HookedTransformerConfig(**hooked_config(case)), tokenizer=tokenizer, move_to_device=False)
    load_state(model, case)
    return model.eval()


def load_state(model: torch.nn.Module, case: Case) -> None:
    """Load the case's weights; an error if one is missing or unknown (masks and rotary tables are computed)."""
    missing, unexpected = model.load_state_dict(dict(case.state), strict=False)
    missing = [name for name in missing if "attn.mask" not in name and "IGNORE" not in name and "rotary" not in name]
    if missing or unexpected:
        raise ValueError(f"the case {case.name!r} lacks weights {missing} and has unknown ones {unexpected}")


def saelens_transcoders(case: Case) -> list[Any]:
    """Return the case's dictionaries as SAELens transcoders."""
    from sae_lens.saes import transcoder as saelens
    from sae_lens.saes.sae import SAEMetadata

    result = []
    for layer, weights in enumerate(case.transcoders):
        name = "JumpReLU" * (weights.threshold is not None) + "Skip" * (weights.W_skip is not None) + "Transcoder"
        config = getattr(saelens, f"{name}Config")(
            d_in=weights.W_enc.shape[0],
            d_out=weights.W_dec.shape[1],
            d_sae=weights.W_enc.shape[1],
            dtype=str(case.dtype).removeprefix("torch."),
            device="cpu",
            apply_b_dec_to_input=False,
            metadata=SAEMetadata(
                hook_name=f"blocks.{layer}.{case.hook_read}", hook_name_out=f"blocks.{layer}.{case.hook_write}"
            ),
        )
        sae = getattr(saelens, name)(config)
        sae.load_state_dict(weights.tensors())
        result.append(sae.eval())
    return result


# --------------------------------------------------------------------------------------------------- random models


def random_case(
    name: str,
    *,
    rms: bool = False,
    skip: bool = False,
    jumprelu: bool = True,
    cross_layer: bool = False,
    n_layers: int = 4,
    d_model: int = 64,
    n_heads: int = 4,
    d_mlp: int = 128,
    d_vocab: int = 101,
    n_pos: int = 12,
    d_sae: int = 256,
    l0: float = 12.0,
    dtype: str = "float32",
    seed: int = 0,
    settings: Settings | None = None,
) -> Case:
    """Return a random model with random transcoders, or with a random cross-layer transcoder.

    Without ``rms`` the model is GPT-2-like: LayerNorm with gains and biases, learned positions, GELU, biases
    everywhere. With it: RMSNorm with gains, rotary positions, half as many key and value heads as query heads, a gated
    MLP. The transcoders read ``ln2.hook_normalized``, whose rows have length sqrt(d_model); an encoder of independent
    entries therefore has standard normal pre-activations, and a threshold at their quantile leaves ``l0`` features
    active per position in expectation.
    """
    rng = torch.Generator().manual_seed(seed)
    float_type = getattr(torch, dtype)
    n_kv, d_head = (n_heads // 2 if rms else n_heads), d_model // n_heads

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=rng, dtype=torch.float64)).to(float_type)

    state = {"embed.W_E": randn(d_vocab, d_model), "unembed.W_U": randn(d_model, d_vocab, scale=2 * d_model**-0.5)}
    state["unembed.b_U"] = randn(d_vocab, scale=0.1)
    if not rms:
        state["pos_embed.W_pos"] = randn(n_pos, d_model, scale=0.5)
    kv = "_" if rms else ""
    for layer in range(n_layers):
        b = f"blocks.{layer}."
        state |= {
            f"{b}ln1.w": 1 + randn(d_model, scale=0.2),
            f"{b}ln2.w": 1 + randn(d_model, scale=0.2),
            f"{b}attn.W_Q": randn(n_heads, d_model, d_head, scale=1.5 * d_model**-0.5),
            f"{b}attn.{kv}W_K": randn(n_kv, d_model, d_head, scale=1.5 * d_model**-0.5),
            f"{b}attn.{kv}W_V": randn(n_kv, d_model, d_head, scale=d_model**-0.5),
            f"{b}attn.W_O": randn(n_heads, d_head, d_model, scale=d_model**-0.5),
            f"{b}attn.b_Q": randn(n_heads, d_head, scale=0.1),
            f"{b}attn.{kv}b_K": randn(n_kv, d_head, scale=0.1),
            f"{b}attn.{kv}b_V": randn(n_kv, d_head, scale=0.1),
            f"{b}attn.b_O": randn(d_model, scale=0.1),
            f"{b}mlp.W_in": randn(d_model, d_mlp, scale=d_model**-0.5),
            f"{b}mlp.b_in": randn(d_mlp, scale=0.1),
            f"{b}mlp.W_out": randn(d_mlp, d_model, scale=d_mlp**-0.5),
            f"{b}mlp.b_out": randn(d_model, scale=0.1),
        }
        if rms:
            state[f"{b}mlp.W_gate"] = randn(d_model, d_mlp, scale=d_model**-0.5)
        else:
            state |= {f"{b}ln1.b": randn(d_model, scale=0.1), f"{b}ln2.b": randn(d_model, scale=0.1)}
    state["ln_final.w"] = 1 + randn(d_model, scale=0.2)
    if not rms:
        state["ln_final.b"] = randn(d_model, scale=0.1)

    config: dict[str, Any] = {
        "n_layers": n_layers, "d_model": d_model, "n_ctx": n_pos, "n_heads": n_heads, "d_head": d_head, "d_mlp": d_mlp,
        "d_vocab": d_vocab, "dtype": dtype, "device": "cpu", "model_name": "random", "eps": 1e-5,
    }  # fmt: skip
    if rms:
        config |= {
            "n_key_value_heads": n_kv, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS",
            "final_rms": True, "positional_embedding_type": "rotary", "rotary_dim": d_head,
        }  # fmt: skip
    else:
        config |= {"act_fn": "gelu_new", "normalization_type": "LN"}

    cut = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * l0 / d_sae, dtype=torch.float64)).item()
    transcoders = []
    for layer in range(n_layers):
        b_enc, outputs = randn(d_sae, scale=0.1), [n_layers - layer] if cross_layer else []
        transcoders.append(
            TranscoderWeights(
                W_enc=randn(d_model, d_sae, scale=d_model**-0.5),
                b_enc=b_enc if jumprelu else b_enc - cut,
                W_dec=randn(d_sae, *outputs, d_model, scale=(l0 * d_model) ** -0.5),
                b_dec=randn(d_model, scale=0.1),
                threshold=(cut + randn(d_sae, scale=0.1)).clamp(min=0) if jumprelu else None,
                W_skip=randn(d_model, d_model, scale=0.3 * d_model**-0.5) if skip else None,
            )
        )
    tokens = torch.randint(1, d_vocab, (n_pos,), generator=rng)
    tokens[0] = 0
    return Case(name, config, state, transcoders, tokens, settings=settings or Settings())


def correctness_cases() -> list[Case]:
    """Return the small cases whose edges, influence, masks and scores are compared."""
    return [
        random_case("layernorm"),
        random_case("rms-grouped-queries", rms=True, seed=1),
        random_case("layernorm-skip", skip=True, jumprelu=False, seed=2),
        random_case("rms-grouped-queries-skip", rms=True, skip=True, seed=3),
        random_case("layernorm-capped", seed=4, settings=Settings(max_feature_nodes=200)),
        random_case("rms-grouped-queries-float64", rms=True, dtype="float64", seed=5),
        random_case("clt-layernorm-relu", cross_layer=True, jumprelu=False, seed=7),
        random_case("clt-rms-grouped-queries-jumprelu", cross_layer=True, rms=True, seed=8),
        random_case("clt-rms-grouped-queries-skip", cross_layer=True, rms=True, skip=True, seed=9),
        random_case("clt-layernorm-capped", cross_layer=True, seed=10, settings=Settings(max_feature_nodes=200)),
        random_case("clt-rms-grouped-queries-float64", cross_layer=True, rms=True, dtype="float64", seed=11),
    ]


def speed_case(batch_sizes: tuple[int, ...] = BATCH_SIZES) -> Case:
    """Return the case that is timed: 12 layers, d = 256, 32 positions, about 6,000 active features."""
    return random_case(
        "speed", n_layers=12, d_model=256, n_heads=8, d_mlp=1024, d_vocab=1000, n_pos=32, d_sae=2048, l0=15.4, seed=6,
        settings=Settings(batch_sizes=batch_sizes, prune=False),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ meter


class Meter:
    """What `measured` read: CPU seconds of this process, wall seconds, and bytes above what was resident before."""

    cpu_seconds: float = math.nan
    wall_seconds: float = math.nan
    peak_bytes: int = 0


@contextlib.contextmanager
def measured() -> Iterator[Meter]:
    """Measure the body. The process should be fresh and run one thread; memory is read on Linux and 0 elsewhere.

    The kernel's high-water mark is set back to what is resident now; ``ru_maxrss`` would include the peak of loading
    the weights, and even the parent's.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or the body could use it unseen
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, meter = _resident("VmRSS"), Meter()
    wall, cpu = time.perf_counter(), time.process_time()
    yield meter
    meter.cpu_seconds, meter.wall_seconds = time.process_time() - cpu, time.perf_counter() - wall
    meter.peak_bytes = max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
