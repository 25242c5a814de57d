"""circuit-tracer's side of the parity benchmark: reads a case, writes a result (formats: `benchmarks.parity_models`).

Runs in the environment that ``make parity`` sets up for it, which has no circuit_lens:

    .venv-parity/bin/python -m benchmarks.parity_peer case.safetensors result.safetensors

A cross-layer transcoder is loaded by circuit-tracer's own loader, from files that circuit_lens wrote in its layout, and
written again by its own writer.

Every batch size of the case's settings is run in a process of its own, so that neither memory nor warm caches of one
help another; the graph, influence, masks and scores are those of the first. Times are CPU seconds of ``attribute``
alone (no loading, no influence, no pruning) on one thread.
"""
# circuit-tracer is not in the environment that checks types.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch

from benchmarks.parity_models import (
    Case,
    Measurement,
    PeerResult,
    hooked_config,
    load_state,
    measured,
    read_case,
    read_result,
    write_result,
)


class TokenNumbers:
    """Stands in for a tokenizer: tokens are numbers, the prompt's first token counts as the special one."""

    bos_token_id = pad_token_id = eos_token_id = None
    padding_side = "right"

    def __init__(self, first: int, vocab_size: int) -> None:
        self.all_special_ids = [first]
        self.vocab_size = vocab_size

    def decode(self, tokens: Any) -> str:
        """Return the numbers themselves."""
        return " ".join(str(int(token)) for token in torch.as_tensor(tokens).flatten())


def replacement_model(case: Case, clt_folder: Path) -> Any:
    """Return circuit-tracer's TransformerLens replacement model with the case's weights."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens import HookedTransformerConfig

    both = cross_layer_transcoder(case, clt_folder) if case.cross_layer else transcoder_set(case)
    model = TransformerLensReplacementModel(HookedTransformerConfig(**hooked_config(case)), move_to_device=False)
    load_state(model, case)
    model._configure_replacement_model(both)
    model.tokenizer = TokenNumbers(int(case.tokens[0]), model.cfg.d_vocab)
    return model.eval()


def cross_layer_transcoder(case: Case, folder: Path) -> Any:
    """Return circuit-tracer's cross-layer transcoder, loaded by itself; an error if it read other weights."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

    clt = load_clt(
        str(folder), case.hook_read, case.hook_write, scan=case.name, device=torch.device("cpu"), dtype=case.dtype
    )
    for layer, weights in enumerate(case.transcoders):
        read = {"W_enc": clt.W_enc[layer].T, "b_enc": clt.b_enc[layer], "b_dec": clt.b_dec[layer]}
        read["W_dec"] = clt._get_decoder_vectors(layer)
        if weights.threshold is not None:
            read["threshold"] = clt.activation_function.threshold[layer, 0]
        for name, tensor in read.items():
            if not torch.equal(tensor, getattr(weights, name)):
                raise ValueError(f"circuit-tracer read another {name} of layer {layer} than was written")
    if case.transcoders[0].W_skip is not None:  # its files have no skip, its code has
        clt.W_skip = torch.nn.Parameter(torch.stack([w.W_skip.T for w in case.transcoders if w.W_skip is not None]))
        clt.skip_connection = True
    return clt


def transcoder_set(case: Case) -> Any:
    """Return circuit-tracer's set of per-layer transcoders."""
    from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet
    from circuit_tracer.transcoder.activation_functions import JumpReLU

    transcoders = {}
    for layer, weights in enumerate(case.transcoders):
        d_model, d_sae = weights.W_enc.shape
        activation = torch.nn.ReLU() if weights.threshold is None else JumpReLU(weights.threshold.clone())
        transcoder = SingleLayerTranscoder(
            d_model, d_sae, activation, layer, weights.W_skip is not None, device=torch.device("cpu"), dtype=case.dtype
        )
        with torch.no_grad():
            transcoder.W_enc.copy_(weights.W_enc.T)  # its rows are features
            for name in ("b_enc", "W_dec", "b_dec", "W_skip"):
                if (tensor := getattr(weights, name)) is not None:
                    getattr(transcoder, name).copy_(tensor)
        transcoders[layer] = transcoder
    return TranscoderSet(
        transcoders, feature_input_hook=case.hook_read, feature_output_hook=case.hook_write, scan=case.name
    )


def run(case_path: Path, result_path: Path, batch_size: int, measure_only: bool) -> PeerResult:
    """Run circuit-tracer on the case in this process; write a cross-layer transcoder beside the result."""
    case = read_case(case_path)
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.graph import compute_graph_scores, compute_node_influence, prune_graph

    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # its way of reading gradients
    torch.set_num_threads(1)
    torch.set_default_dtype(case.dtype)  # its edge matrix has the default dtype
    model, settings = replacement_model(case, case_path.with_suffix(".clt")), case.settings
    if case.cross_layer and not measure_only:
        model.transcoders.to_safetensors(str(result_path.with_suffix(".clt")))
    case = dataclasses.replace(case, state={}, transcoders=())
    with measured() as meter:
        graph = attribute(
            case.tokens,
            model,
            batch_size=batch_size,
            max_n_logits=settings.max_n_logits,
            desired_logit_prob=settings.desired_logit_prob,
            max_feature_nodes=settings.max_feature_nodes,
        )
    measurement = Measurement(batch_size, meter.cpu_seconds, meter.wall_seconds, meter.peak_bytes)

    n_logits, n_selected = len(graph.logit_targets), len(graph.selected_features)
    targets = torch.cat([torch.arange(n_selected), torch.arange(-n_logits, 0)])
    full = graph.adjacency_matrix
    weights = torch.zeros(len(full))
    weights[-n_logits:] = graph.logit_probabilities
    nothing = torch.zeros(0)
    influence, scores, pruned = nothing, (float("nan"), float("nan")), None
    if not measure_only:
        influence, scores = compute_node_influence(full, weights), compute_graph_scores(graph)
        if settings.prune:
            pruned = prune_graph(graph, settings.node_threshold, settings.edge_threshold)
    return PeerResult(
        tokens=case.tokens,
        active_features=graph.active_features,
        activations=graph.activation_values,
        selected_features=graph.selected_features,
        adjacency=nothing if measure_only else full[targets][:, : len(full) - n_logits],
        logit_tokens=graph.logit_token_ids,
        logit_probabilities=graph.logit_probabilities,
        node_influence=influence,
        cumulative_scores=nothing if pruned is None else pruned.cumulative_scores,
        node_mask=nothing.bool() if pruned is None else pruned.node_mask,
        edge_mask=nothing.bool() if pruned is None else pruned.edge_mask[targets][:, : len(full) - n_logits],
        replacement_score=scores[0],
        completeness_score=scores[1],
        zero_positions=(model.zero_positions.start, model.zero_positions.stop),
        case=case.name,
        batch_size=batch_size,
        versions={
            name: importlib.metadata.version(name)
            for name in ("circuit-tracer", "transformer-lens", "transformers", "torch", "nnsight")
        },
        measurements=[measurement],
    )


def run_all(case_path: Path, result_path: Path) -> PeerResult:
    """Run every batch size of the case in a process of its own and write the result."""
    batch_sizes = read_case(case_path).settings.batch_sizes
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for i, batch_size in enumerate(batch_sizes):
            part = Path(folder) / f"{batch_size}.safetensors"
            command = [sys.executable, "-m", "benchmarks.parity_peer", str(case_path), str(part)]
            command += ["--batch-size", str(batch_size), *(["--measure-only"] if i else [])]
            subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
            results.append(read_result(part))
            if part.with_suffix(".clt").exists():
                shutil.move(part.with_suffix(".clt"), result_path.with_suffix(".clt"))
    result = dataclasses.replace(results[0], measurements=[m for r in results for m in r.measurements])
    write_result(result_path, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--batch-size", type=int, help="run this one, in this process")
    parser.add_argument("--measure-only", action="store_true", help="keep times and memory, not the graph")
    arguments = parser.parse_args()
    case_path, result_path = arguments.case.resolve(), arguments.result.resolve()
    if arguments.batch_size is not None:
        result = run(case_path, result_path, arguments.batch_size, arguments.measure_only)
        write_result(result_path, result)
        return
    result = run_all(case_path, result_path)
    print(
        f"{result.case}: circuit-tracer {result.versions['circuit-tracer']}, {len(result.active_features)} active "
        f"features, {len(result.selected_features)} nodes of them, replacement score {result.replacement_score:.6f}, "
        f"completeness {result.completeness_score:.6f}"
    )
    for m in result.measurements:
        print(
            f"  batch {m.batch_size:4d}: {m.cpu_seconds:7.2f} CPU s, {m.wall_seconds:7.2f} s, "
            f"peak {m.peak_bytes / 2**20:7.1f} MiB above the weights"
        )


if __name__ == "__main__":
    main()
