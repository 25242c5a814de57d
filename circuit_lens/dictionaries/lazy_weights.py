"""Parts of tensors in safetensors files, read without mapping or loading the file.

Mapping would count every touched page, and the kernel's read-ahead around it, as memory of the process; a reader with
offsets takes the rows it is asked for and nothing else. The format (https://github.com/huggingface/safetensors): eight
bytes of length, a JSON header with dtype, shape and offsets of each tensor, the numbers row by row.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.dictionaries.finite import refuse_bad_numbers
from circuit_lens.errors import DictionaryError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
REMEMBERED_NUMBERS = 2**24  # of encoder rows of a file that stores features along the second axis: 64 MiB in float32


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """The tensors of one safetensors file, read on demand.

    Args:
        path: The file. It must stay as it is while it is in use.

    Raises:
        DictionaryError: No such file, no safetensors file, a file that was cut short, numbers that are no floats.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._open() as file:
            self.size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= self.size - 8:
                raise DictionaryError(f"{self.path} is no safetensors file, or was cut short ({self.size} bytes)")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise DictionaryError(f"{self.path} is no safetensors file: its header is no JSON") from error
        self.entries = self._entries(header, 8 + length)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            DictionaryError: The file has no such tensor.
        """
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype.

        Raises:
            DictionaryError: The file has no such tensor.
        """
        return self._entry(name).dtype

    def read(self, name: str) -> Tensor:
        """Return a whole tensor.

        Raises:
            DictionaryError: The file has no such tensor, or changed since it was opened.
        """
        entry = self._entry(name)
        return self._take(name, entry.shape, [(0, math.prod(entry.shape))])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return a range along the first axis."""
        shape = self.shape(name)
        width = math.prod(shape[1:])
        return self._take(name, (stop - start, *shape[1:]), [(start * width, stop * width)])

    def gather(self, name: str, index: Int[Tensor, "n"]) -> Tensor:
        """Return entries along the first axis, which must ascend; neighbours are read in one go."""
        shape, index = self.shape(name), index.cpu()
        width = math.prod(shape[1:])
        gap = index.diff() != 1
        edge = gap.new_ones(min(1, len(index)))
        firsts, lasts = index[torch.cat([edge, gap])], index[torch.cat([gap, edge])]
        runs = [(a * width, (b + 1) * width) for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)]
        return self._take(name, (len(index), *shape[1:]), runs)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Return a range along the second axis of a matrix."""
        n, width = self.shape(name)
        return self._take(name, (n, stop - start), [(i * width + start, i * width + stop) for i in range(n)])

    def _take(self, name: str, shape: tuple[int, ...], runs: Sequence[tuple[int, int]]) -> Tensor:
        entry = self._entry(name)
        out = torch.empty(shape, dtype=entry.dtype)
        size, at = entry.dtype.itemsize, 0
        view: Any = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self._open() as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise DictionaryError(f"{self.path} changed since it was opened; load the transcoder again")
            for start, stop in runs:
                file.seek(entry.start + start * size)
                end = at + (stop - start) * size
                while at < end:
                    got = file.readinto(view[at:end])
                    if not got:
                        raise DictionaryError(f"{self.path} ends within {name}: it was cut short")
                    at += got
        refuse_bad_numbers(f"{name} in {self.path}", out)
        return out

    def _open(self) -> FileIO:
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            raise DictionaryError(f"{self.path} cannot be read ({error.strerror}); it belongs to the set") from error

    def _entry(self, name: str) -> _Entry:
        if name not in self.entries:
            raise DictionaryError(f"{self.path} has no tensor {name!r}; it has {', '.join(self.entries) or 'none'}")
        return self.entries[name]

    def _entries(self, header: object, data: int) -> dict[str, _Entry]:
        if not isinstance(header, dict):
            raise DictionaryError(f"{self.path} is no safetensors file: its header is no JSON object")
        entries = {}
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            try:
                kind, shape = facts["dtype"], tuple(map(int, facts["shape"]))
                start, stop = map(int, facts["data_offsets"])
            except (TypeError, KeyError, ValueError) as error:
                raise DictionaryError(f"{self.path} is no safetensors file: {name!r} is not described") from error
            if kind not in DTYPES:
                raise DictionaryError(f"{name} in {self.path} has dtype {kind}; valid are {', '.join(DTYPES)}")
            if stop - start != math.prod(shape) * DTYPES[kind].itemsize or start < 0:
                raise DictionaryError(f"{self.path} is damaged: the extent of {name!r} does not fit its shape")
            if data + stop > self.size:
                raise DictionaryError(
                    f"{self.path} was cut short: {name!r} ends at byte {data + stop}, the file at {self.size}"
                )
            entries[name] = _Entry(DTYPES[kind], shape, data + start)
        return entries


class OnDisk:
    """A layer's matrices in files: a `circuit_lens.dictionaries.cross_layer_weights.Matrices`.

    Args:
        encoder: File and name of the encoder.
        decoder: File and name of the decoder, ``[d_sae, n_out, d_out]``.
        feature_first: Whether the encoder is stored ``[d_sae, d_in]``, which makes reading by rows cheap, or
            ``[d_in, d_sae]``.
        dtype: What is read is converted to this; None keeps the files' dtype.
        device: Where what is read goes.

    Raises:
        DictionaryError: Tensors that are missing or do not fit together.
    """

    def __init__(
        self,
        encoder: tuple[TensorFile, str],
        decoder: tuple[TensorFile, str],
        *,
        feature_first: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.encoder, self.decoder, self.feature_first = encoder, decoder, feature_first
        enc, dec = encoder[0].shape(encoder[1]), decoder[0].shape(decoder[1])
        if len(enc) != 2 or len(dec) != 3 or enc[0 if feature_first else 1] != dec[0]:
            order = "[d_sae, d_in]" if feature_first else "[d_in, d_sae]"
            raise DictionaryError(
                f"{encoder[1]} in {encoder[0].path} has shape {enc} and {decoder[1]} in {decoder[0].path} {dec}; they "
                f"must be {order} and [d_sae, n_out, d_out]"
            )
        self.d_in = enc[1 if feature_first else 0]
        self.d_sae, self.n_out, self.d_out = dec
        self.asked, self.dtype = dtype, dtype or decoder[0].dtype(decoder[1])
        self.encoder_dtype = dtype or encoder[0].dtype(encoder[1])
        self.device = torch.device("cpu" if device is None else device)
        self._known: dict[int, Tensor] = {}

    def encoder_columns(self, start: int, stop: int) -> Float[Tensor, "d_in n"]:
        """Read the encoder of a range of features."""
        file, name = self.encoder
        part = file.rows(name, start, stop).T if self.feature_first else file.columns(name, start, stop)
        return part.to(self.device, self.encoder_dtype)

    def encoder_rows(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n d_in"]:
        """Read the encoder rows of features in ascending order, none twice."""
        file, name = self.encoder
        if self.feature_first:
            return file.gather(name, index).to(self.device, self.encoder_dtype)
        return self._columns_as_rows(index.tolist()).to(self.device, self.encoder_dtype)

    def decoder_slab(self, start: int, stop: int) -> Float[Tensor, "n n_out d_out"]:
        """Read the decoder of a range of features."""
        file, name = self.decoder
        return file.rows(name, start, stop).to(self.device, self.dtype)

    def decoder_rows(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n n_out d_out"]:
        """Read the decoder rows of features in ascending order, none twice."""
        file, name = self.decoder
        return file.gather(name, index).to(self.device, self.dtype)

    def moved(self, dtype: torch.dtype | None, device: torch.device | str | None) -> OnDisk:
        """Return the same files, read in another dtype or to another device."""
        first, dtype, device = self.feature_first, dtype or self.asked, device or self.device
        return OnDisk(self.encoder, self.decoder, feature_first=first, dtype=dtype, device=device)

    def _columns_as_rows(self, index: list[int]) -> Tensor:
        """Read columns of the encoder, a block of columns at a time, and remember them: each block costs a pass."""
        file, name = self.encoder
        missing = [i for i in index if i not in self._known]
        if (len(self._known) + len(missing)) * self.d_in > REMEMBERED_NUMBERS:
            self._known, missing = {}, index
        step = max(1, 2**20 // self.d_in)
        for start in range(0, self.d_sae if missing else 0, step):
            here = [i for i in missing if start <= i < start + step]
            if here:
                block = file.columns(name, here[0], here[-1] + 1)
                rows = block[:, torch.tensor(here) - here[0]].T.contiguous()
                self._known |= dict(zip(here, rows, strict=True))
        none = torch.empty(0, self.d_in, dtype=file.dtype(name))
        return torch.stack([self._known[i] for i in index]) if index else none
