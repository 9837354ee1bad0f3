"""The compressed log-probabilities of arcee-ai/DistillKit: encode and decode, for any of its configurations.

Source of all formulas: https://github.com/arcee-ai/DistillKit, README.md ("Logit Compression", "Compression
Deep-Dive") and the modules of `distillkit/compression` (Apache-2.0), release v1. Written from those formulas.

A position keeps k (token id, log-probability) pairs in order of falling probability, as two byte strings.

- ids: k integers of ceil(log2(d)) bits, most significant bit first, one after another, zeros up to a whole byte.
- log-probabilities, one after another:
    1. the first `exact_k` values as `exact_dtype`;
    2. coefficients c_j of the terms f_j as `term_dtype`: value i of the rest (i = 0 .. m - 1, m = k - exact_k) is
       approximated by sum_j c_j * f_j(x_i), x_i = i, or i / (m - 1) with `normalize_t`; f_j is a power, sqrt or exp;
       c is the least-squares solution (singular values up to 1e-5 are left out);
    3. for each residual bin its scale s as `scale_dtype` and `num_elements` integers q of b = `element_bits` bits,
       packed like ids and filled up to a whole byte: the residual (value - approximation) of the next `num_elements`
       values is s * (q - 2^(b - 1)), with s = max|residual| / 2^(b - 1); for b = 1 it is s * (2 q - 1), s = max.
- `delta_encoding`: before all this, each value after the first is replaced by its difference to the one before.

Floats are little-endian. Legend: N positions, K = k entries, T terms.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from logitcache.errors import TargetsError
from logitcache.interchange.packing import (
    FLOAT_BYTES,
    MAX_BITS,
    bytes_to_floats,
    floats_to_bytes,
    pack_bits,
    packed_bytes,
    unpack_bits,
)

FloatType = Literal["float16", "bfloat16", "float32", "float64"]
Term = Annotated[int, Field(strict=True, ge=0, le=16)] | Literal["sqrt", "exp"]
LEAST_SINGULAR_VALUE = 1e-5
# A log-probability may exceed 0 by rounding, not by more.
ROUNDING = 1e-3


class ResidualBin(BaseModel):
    """Quantised residuals of the next `num_elements` approximated values.

    Args:
        scale_dtype: of the bin's scale.
        element_bits: bits of one residual, 1 to 56 (DistillKit allows 64).
        num_elements: how many values the bin covers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale_dtype: FloatType
    element_bits: Annotated[int, Field(ge=1, le=MAX_BITS)]
    num_elements: Annotated[int, Field(ge=1)]

    @property
    def num_bytes(self) -> int:
        """Bytes a position's bin takes."""
        return FLOAT_BYTES[self.scale_dtype] + packed_bytes(self.num_elements, self.element_bits)

    def encode(self, residual_NE: NDArray[np.float64]) -> NDArray[np.uint8]:
        """uint8 [N, num_bytes] of residuals float64 [N, num_elements]: each becomes the nearest decodable value."""
        levels = 1 << (self.element_bits - 1)
        largest = np.abs(residual_NE).max(axis=1, keepdims=True)
        scale_bytes = floats_to_bytes(np.where(largest == 0, 1.0, largest / levels), self.scale_dtype)
        scale = bytes_to_floats(scale_bytes, self.scale_dtype)
        # A scale that underflowed to 0 decodes to 0 whatever the integers are.
        scaled = np.divide(residual_NE, scale, out=np.zeros_like(residual_NE), where=scale != 0)
        if self.element_bits == 1:
            codes = (scaled > 0).astype(np.int64)
        else:
            codes = np.clip(np.rint(scaled), -levels, levels - 1).astype(np.int64) + levels
        return np.concatenate([scale_bytes, pack_bits(codes, self.element_bits)], axis=1)

    def decode(self, data_NM: NDArray[np.uint8]) -> NDArray[np.float64]:
        """float64 [N, num_elements]: the inverse of `encode`."""
        cut = FLOAT_BYTES[self.scale_dtype]
        scale = bytes_to_floats(data_NM[:, :cut], self.scale_dtype)
        codes = unpack_bits(data_NM[:, cut:], self.element_bits, self.num_elements)
        if self.element_bits == 1:
            return (2.0 * codes - 1.0) * scale
        return (codes - float(1 << (self.element_bits - 1))) * scale


class DistillKitLayout(BaseModel):
    """One configuration of DistillKit's `logprob_compressor`, with the same field names, defaults and meaning.

    Args:
        d: vocabulary size; ids take ceil(log2(d)) bits.
        k: entries a position keeps.
        exact_k: how many of them, the most probable ones, are stored as floats.
        exact_dtype: of those floats.
        polynomial_terms: of the approximation of the others: powers, "sqrt", "exp".
        term_dtype: of the coefficients.
        residual_bins: quantised corrections of the approximated values, in order.
        delta_encoding: store differences between neighbours.
        error_diffusion: how DistillKit's encoder rounds; decoding does not depend on it, and ours does not diffuse.
        normalize_t: polynomials over [0, 1] instead of 0, 1, 2, ...

    Raises:
        pydantic.ValidationError: the fields contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    d: Annotated[int, Field(ge=2, le=1 << 32)]
    k: Annotated[int, Field(ge=1, le=65_535)]
    exact_k: Annotated[int, Field(ge=0)]
    exact_dtype: FloatType = "float32"
    polynomial_terms: tuple[Term, ...] | None = None
    term_dtype: FloatType = "float32"
    residual_bins: tuple[ResidualBin, ...]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k is {self.exact_k}, above k, which is {self.k}")
        if self.k > self.d:
            raise ValueError(f"k is {self.k}, above the vocabulary d, which is {self.d}")
        if self.exact_k < self.k and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("exact_k is below k, so polynomial_terms or residual_bins must say what the others are")
        covered = sum(part.num_elements for part in self.residual_bins)
        if covered > self.num_approximated:
            raise ValueError(f"residual_bins cover {covered} values, but only {self.num_approximated} are not exact")
        return self

    @classmethod
    def recommended(cls, vocab_size: int) -> DistillKitLayout:
        """The configuration DistillKit's README recommends for new captures: k = 128, the first 16 exact."""
        return cls._plain(vocab_size, 128, 16, (0, 1, 2, 3, 4, "sqrt"))

    @classmethod
    def budget(cls, vocab_size: int) -> DistillKitLayout:
        """The README's budget configuration: k = 50, the first one exact."""
        return cls._plain(vocab_size, 50, 1, (0, 1, "sqrt"))

    @classmethod
    def exact(cls, vocab_size: int, k: int) -> DistillKitLayout:
        """All k values as float32: the largest, and lossless to float32."""
        return cls(d=vocab_size, k=k, exact_k=k, exact_dtype="float32", residual_bins=(), delta_encoding=False)

    @classmethod
    def _plain(cls, vocab_size: int, k: int, exact_k: int, terms: tuple[Term, ...]) -> DistillKitLayout:
        return cls(
            d=vocab_size,
            k=k,
            exact_k=exact_k,
            exact_dtype="bfloat16",
            polynomial_terms=terms,
            term_dtype="float32",
            residual_bins=(),
            delta_encoding=False,
        )

    @property
    def num_approximated(self) -> int:
        """Entries that are not exact."""
        return self.k - self.exact_k

    @property
    def id_bits(self) -> int:
        """ceil(log2(d))."""
        return (self.d - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's packed ids."""
        return packed_bytes(self.k, self.id_bits)

    @property
    def logprob_bytes(self) -> int:
        """Bytes of a position's log-probabilities."""
        terms = len(self.polynomial_terms or ()) * FLOAT_BYTES[self.term_dtype]
        return self.exact_k * FLOAT_BYTES[self.exact_dtype] + terms + sum(part.num_bytes for part in self.residual_bins)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position, before Parquet compresses them."""
        return self.id_bytes + self.logprob_bytes

    def encode_ids(self, ids_NK: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [N, id_bytes] of ids int64 [N, k]. Raises TargetsError for an id outside [0, d)."""
        self._check_shape(ids_NK)
        outside = (ids_NK < 0) | (ids_NK >= self.d)
        if outside.any():
            row, slot = np.argwhere(outside)[0]
            raise TargetsError(f"row {row} has token id {ids_NK[row, slot]}, outside the vocabulary of {self.d} ids")
        return pack_bits(ids_NK, self.id_bits)

    def decode_ids(self, data_NM: NDArray[np.uint8]) -> NDArray[np.int64]:
        """int64 [N, k]; an id may be d or more where the bytes were not written with this layout."""
        return unpack_bits(self._sized(data_NM, self.id_bytes, "ids"), self.id_bits, self.k)

    def encode_logprobs(self, logprobs_NK: NDArray[np.floating]) -> NDArray[np.uint8]:
        """uint8 [N, logprob_bytes] of log-probabilities [N, k] in nats.

        Raises:
            TargetsError: one is not finite or above 0, or a row does not fall.
        """
        self._check_shape(logprobs_NK)
        values = logprobs_NK.astype(np.float64)
        rising = np.diff(values, axis=1, prepend=np.inf) > 0
        bad = ~np.isfinite(values) | (values > ROUNDING) | rising
        if bad.any():
            row, slot = np.argwhere(bad)[0]
            raise TargetsError(
                f"row {row} has log-probability {values[row, slot]} at place {slot}; DistillKit stores finite ones, at "
                "most 0, in falling order"
            )
        if self.delta_encoding:
            values = np.diff(values, axis=1, prepend=0.0)
        parts = [floats_to_bytes(values[:, : self.exact_k], self.exact_dtype)]
        residual = values[:, self.exact_k :]
        if self.polynomial_terms:
            design = self.design()
            coefficients = floats_to_bytes(residual @ _pseudo_inverse(design).T, self.term_dtype)
            parts.append(coefficients)
            residual = residual - bytes_to_floats(coefficients, self.term_dtype) @ design.T
        start = 0
        for part in self.residual_bins:
            parts.append(part.encode(residual[:, start : start + part.num_elements]))
            start += part.num_elements
        return np.concatenate(parts, axis=1)

    def decode_logprobs(self, data_NM: NDArray[np.uint8]) -> NDArray[np.float64]:
        """float64 [N, k]: the log-probabilities as stored; an approximated one may lie above 0 or above its neighbour.

        DistillKit evaluates the same formulas in float32, and rounds sums of deltas and residuals to `exact_dtype`.
        """
        data = self._sized(data_NM, self.logprob_bytes, "log-probabilities")
        cut = self.exact_k * FLOAT_BYTES[self.exact_dtype]
        exact = bytes_to_floats(data[:, :cut], self.exact_dtype)
        rest = np.zeros((len(data), self.num_approximated))
        if self.polynomial_terms:
            end = cut + len(self.polynomial_terms) * FLOAT_BYTES[self.term_dtype]
            rest += bytes_to_floats(data[:, cut:end], self.term_dtype) @ self.design().T
            cut = end
        start = 0
        for part in self.residual_bins:
            rest[:, start : start + part.num_elements] += part.decode(data[:, cut : cut + part.num_bytes])
            start, cut = start + part.num_elements, cut + part.num_bytes
        values = np.concatenate([exact, rest], axis=1)
        return np.cumsum(values, axis=1) if self.delta_encoding else values

    def design(self) -> NDArray[np.float64]:
        """float64 [k - exact_k, T]: the terms at every approximated place."""
        count = self.num_approximated
        places = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        functions = {"sqrt": np.sqrt, "exp": np.exp}
        terms = self.polynomial_terms or ()
        columns = [functions[term](places) if isinstance(term, str) else places**term for term in terms]
        return np.stack(columns, axis=1) if columns else np.zeros((count, 0))

    def _check_shape(self, values: NDArray[np.generic]) -> None:
        if values.ndim != 2 or values.shape[1] != self.k:
            raise TargetsError(f"the entries have shape {values.shape}; this layout stores {self.k} of each position")

    @staticmethod
    def _sized(data: NDArray[np.uint8], num_bytes: int, what: str) -> NDArray[np.uint8]:
        if data.ndim != 2 or data.shape[1] != num_bytes:
            raise TargetsError(f"the {what} have shape {data.shape}; this layout stores {num_bytes} bytes a position")
        return data


def _pseudo_inverse(design: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [T, m] for a design [m, T]; small singular values are dropped, as DistillKit does."""
    left, singular, right = np.linalg.svd(design, full_matrices=False)
    inverse = np.divide(1, singular, out=np.zeros_like(singular), where=singular > LEAST_SINGULAR_VALUE)
    return np.asarray((right.T * inverse) @ left.T)
