"""Rules: which numbers of a Hugging Face tensor are which numbers of a Megatron parameter, on any rank of any layout.

A rule names one Megatron parameter and the Hugging Face tensors that hold the same numbers, and lists the `Region`s
they have in common for one rank. Loading copies every region from the file, exporting copies it back, so the two
directions cannot disagree. Regions only move numbers: no rule computes.

Letters in shapes (`dims`): V vocabulary, H hidden size, Q query heads x head width, K key/value heads x head width,
D head width, N query heads, F dense MLP width, E experts, M expert width, U both gate and up of an expert (2 M), S width
of the shared experts, 1 one. Of latent attention: A latent of the queries, C of keys and values, B with the rotated key,
X both of all heads, Y values of all heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megarl.models.spec import ModelSpec

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Shard:
    """The degrees that cut a weight, and which part a rank holds.

    Example: the second of two expert-parallel ranks is `Shard(ep=2, ep_rank=1)`.
    """

    tp: int = 1
    ep: int = 1
    etp: int = 1
    tp_rank: int = 0
    ep_rank: int = 0
    etp_rank: int = 0

    @classmethod
    def of(cls, mesh) -> Shard:
        """This rank's shard of a `megarl.parallel.Mesh`."""
        return cls(mesh.tp, mesh.ep, mesh.etp, mesh.tp_rank, mesh.ep_rank, mesh.etp_rank)

    def members(self, group: str) -> list[Shard]:
        """The shards that together hold a parameter of this group, in the order in which they are gathered."""
        if group == "tp":
            return [replace(self, tp_rank=rank) for rank in range(self.tp)]
        if group == "expert":
            return [replace(self, ep_rank=e, etp_rank=t) for e in range(self.ep) for t in range(self.etp)]
        return [self]


@dataclass(frozen=True)
class Region:
    """`tensor[hf_name][hf]` and `parameter[local]` are the same numbers, in the same shape unless there is an `order`.

    `order`: the dimensions of `parameter[local]` as they follow each other in the file, where neighbours may be one.
    """

    hf_name: str
    hf: tuple[slice, ...]
    local: Index
    order: tuple[int, ...] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The view of a parameter whose numbers come in the order of the file."""
        part = parameter[self.local]
        return part if self.order is None else part.permute(self.order)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors with the same numbers: here, one tensor of the same shape.

    `split` is the dimension cut over the tensor-parallel ranks; none: every rank holds the whole tensor.
    """

    megatron: str
    hf: tuple[str, ...]
    dims: tuple[str, ...]  # shape of each Hugging Face tensor
    split: int | None = None
    exported: bool = True  # False: loaded from `hf`, written by another rule
    dtype: str | None = None  # of a buffer, which keeps it in every precision; none: a parameter, in the model's

    @property
    def is_buffer(self) -> bool:
        """Whether it has no gradient."""
        return self.dtype is not None

    @property
    def group(self) -> str:
        """Over which ranks the parameter is cut: "tp", "expert" (ep x etp), or "" for not at all."""
        return "" if self.split is None else "tp"

    def under(self, megatron_prefix: str, hf_prefix: str) -> Rule:
        """The rule with full names, for one layer."""
        return replace(self, megatron=megatron_prefix + self.megatron, hf=tuple(hf_prefix + name for name in self.hf))

    def hf_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """The Hugging Face tensors of this rule and their full shapes, in the order they are exported."""
        return {name: shape(spec, dims) for name, dims in zip(self.hf, self.dims)}

    def local_shape(self, spec: ModelSpec, shard: Shard) -> tuple[int, ...]:
        """The shape of the parameter on one rank."""
        sizes = list(shape(spec, self.dims[0]))
        if self.split is not None:
            sizes[self.split] = self.padded(spec, shard, sizes[self.split]) // shard.tp
        return tuple(sizes)

    def padded(self, spec: ModelSpec, shard: Shard, size: int) -> int:
        """Length of the split dimension in the learner."""
        return size

    def regions(self, spec: ModelSpec, shard: Shard) -> list[Region]:
        """Everything this rank's parameter has in common with the Hugging Face tensors."""
        full = shape(spec, self.dims[0])
        hf, local = [slice(0, n) for n in full], [slice(0, n) for n in full]
        if self.split is not None:
            n = self.local_shape(spec, shard)[self.split]
            start, stop = shard.tp_rank * n, min((shard.tp_rank + 1) * n, full[self.split])
            if start >= stop:
                return []
            hf[self.split], local[self.split] = slice(start, stop), slice(0, stop - start)
        return [Region(self.hf[0], tuple(hf), tuple(local))]


@dataclass(frozen=True)
class Vocab(Rule):
    """Rows of the vocabulary, padded with zero rows to a multiple of tp in the learner and cut again on export."""

    def padded(self, spec: ModelSpec, shard: Shard, size: int) -> int:
        return spec.padded_vocab_size(shard.tp)


@dataclass(frozen=True)
class QKV(Rule):
    """Queries, keys and values interleaved by key/value group: [q.. k v] [q.. k v] ..., cut over tp as plain rows."""

    def local_shape(self, spec: ModelSpec, shard: Shard) -> tuple[int, ...]:
        rows = sum(shape(spec, dims)[0] for dims in self.dims)
        return (rows // shard.tp, *shape(spec, self.dims[0])[1:])

    def regions(self, spec: ModelSpec, shard: Shard) -> list[Region]:
        rows = self.local_shape(spec, shard)[0]
        first, last, at, out = shard.tp_rank * rows, (shard.tp_rank + 1) * rows, 0, []
        rest = tuple(slice(0, n) for n in shape(spec, self.dims[0])[1:])
        for group in range(spec.num_kv_heads):
            for name, dims in zip(self.hf, self.dims):
                n = shape(spec, dims)[0] // spec.num_kv_heads
                start, stop = max(at, first), min(at + n, last)
                if start < stop:
                    source = group * n + start - at
                    hf, local = slice(source, source + stop - start), slice(start - first, stop - first)
                    out.append(Region(name, (hf, *rest), (local, *rest)))
                at += n
        return out


@dataclass(frozen=True)
class GateUp(Rule):
    """A gated MLP's first matrix: this rank's rows of the gate above this rank's rows of the up projection."""

    def local_shape(self, spec: ModelSpec, shard: Shard) -> tuple[int, ...]:
        width, *rest = shape(spec, self.dims[0])
        return (len(self.hf) * width // shard.tp, *rest)

    def regions(self, spec: ModelSpec, shard: Shard) -> list[Region]:
        width, *rest = shape(spec, self.dims[0])
        n, rest = width // shard.tp, tuple(slice(0, m) for m in rest)
        hf = (slice(shard.tp_rank * n, (shard.tp_rank + 1) * n), *rest)
        return [Region(name, hf, (slice(i * n, (i + 1) * n), *rest)) for i, name in enumerate(self.hf)]


@dataclass(frozen=True)
class Experts(Rule):
    """One matrix of all local experts, [E/ep, ...]; two names (gate, up) are stacked: [E/ep, 2, ...].

    `{e}` in the Hugging Face names is the expert; `split` is the dimension of one expert's matrix cut over etp.
    """

    @property
    def group(self) -> str:
        return "expert"

    def hf_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        size = shape(spec, self.dims[0])
        return {name.replace("{e}", str(e)): size for e in range(spec.num_experts) for name in self.hf}

    def local_shape(self, spec: ModelSpec, shard: Shard) -> tuple[int, ...]:
        stack = (len(self.hf),) if len(self.hf) > 1 else ()
        return (spec.num_experts // shard.ep, *stack, *self._matrix(spec, shard))

    def _matrix(self, spec: ModelSpec, shard: Shard) -> list[int]:
        sizes = list(shape(spec, self.dims[0]))
        if self.split is not None:
            sizes[self.split] //= shard.etp
        return sizes

    def regions(self, spec: ModelSpec, shard: Shard) -> list[Region]:
        sizes, count = self._matrix(spec, shard), spec.num_experts // shard.ep
        hf = [slice(0, n) for n in sizes]
        if self.split is not None:
            hf[self.split] = slice(shard.etp_rank * sizes[self.split], (shard.etp_rank + 1) * sizes[self.split])
        out = []
        for j in range(count):
            e = str(shard.ep_rank * count + j)
            for i, name in enumerate(self.hf):
                out.append(Region(name.replace("{e}", e), tuple(hf), (j, i) if len(self.hf) > 1 else (j,)))
        return out


@dataclass(frozen=True)
class StackedExperts(Rule):
    """Local experts [E/ep, ...] of one Hugging Face tensor of all experts [E, ...], whose dimensions are in `order`.

    A last dimension U of the tensor holds gate and up column by column in turns, and counts as two, [..., M, 2]. Not cut
    over etp.
    """

    order: tuple[int, ...] = ()

    @property
    def group(self) -> str:
        return "expert"

    def local_shape(self, spec: ModelSpec, shard: Shard) -> tuple[int, ...]:
        full = shape(spec, self.dims[0])
        sizes = [full[0] // shard.ep, *full[1:]]
        if self.dims[0].endswith("U"):
            sizes = [*sizes[:-1], sizes[-1] // 2, 2]
        return tuple(sizes[self.order.index(i)] for i in range(len(sizes)))

    def regions(self, spec: ModelSpec, shard: Shard) -> list[Region]:
        experts, *rest = shape(spec, self.dims[0])
        n = experts // shard.ep
        hf = (slice(shard.ep_rank * n, (shard.ep_rank + 1) * n), *(slice(0, m) for m in rest))
        return [Region(self.hf[0], hf, (slice(0, n),), self.order)]


def shape(spec: ModelSpec, dims: str) -> tuple[int, ...]:
    """The numbers behind the letters of `dims`: `shape(spec, "VH")` is `(vocab_size, hidden_size)`."""
    letters = {
        "V": spec.vocab_size,
        "H": spec.hidden_size,
        "Q": spec.num_heads * spec.head_dim,
        "K": spec.num_kv_heads * spec.head_dim,
        "D": spec.head_dim,
        "N": spec.num_heads,
        "F": spec.intermediate_size,
        "E": spec.num_experts,
        "M": spec.moe_intermediate_size,
        "U": 2 * spec.moe_intermediate_size,
        "S": spec.shared_width,
        "A": spec.q_lora_rank,
        "C": spec.kv_lora_rank,
        "B": spec.kv_lora_rank + spec.rope_head_dim,
        "X": spec.num_heads * (spec.nope_head_dim + spec.v_head_dim),
        "Y": spec.num_heads * spec.v_head_dim,
        "1": 1,
    }
    return tuple(letters[letter] for letter in dims)


def plain(megatron: str, hf: str, dims: str, split: int | None = None) -> Rule:
    """The same tensor under two names; `split`: the dimension cut over tp."""
    return Rule(megatron, (hf,), (dims,), split)


def vocab(megatron: str, hf: str, exported: bool = True) -> Rule:
    """Embedding or output layer, [V, H]."""
    return Vocab(megatron, (hf,), ("VH",), 0, exported)


def qkv(megatron: str, q: str, k: str, v: str, dims: tuple[str, str, str] = ("QH", "KH", "KH")) -> Rule:
    """The three attention projections in one matrix."""
    return QKV(megatron, (q, k, v), dims, 0)


def gate_up(megatron: str, gate: str, up: str, dims: str = "FH") -> Rule:
    """The two input projections of a gated MLP in one matrix."""
    return GateUp(megatron, (gate, up), (dims, dims), 0)


def experts(megatron: str, *hf: str, dims: str, split: int) -> Rule:
    """One matrix (or gate and up) of every expert in one tensor."""
    return Experts(megatron, hf, (dims,) * len(hf), split)


def stacked_experts(megatron: str, hf: str, dims: str, order: tuple[int, ...]) -> Rule:
    """All experts of one Hugging Face tensor; `order`: of the parameter's dimensions in it."""
    return StackedExperts(megatron, (hf,), (dims,), None, order=order)
