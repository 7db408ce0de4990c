# SPDX-License-Identifier: Apache-2.0
"""The stated model of activation memory: what this code's layers keep for the backward pass of one microbatch.

After Korthikanti et al. (arXiv 2205.05198, section 4), who count 34 s b h bytes a layer in 16 bits without the s^2
terms of attention. Flash attention keeps no s^2 term, there is no hidden or attention dropout, and a frozen linear
layer keeps nothing. With s tokens in a sequence, b in a microbatch, width h, MLP width f, tensor size t, e bytes per
element, q = heads x head_dim, k = groups x head_dim, a layer keeps, in bytes per token of the microbatch:

| kept                                       | bytes               | when                                              |
|--------------------------------------------|---------------------|---------------------------------------------------|
| input of each of the two norms             | e h (*)             | a gradient must pass the norm, it trains, or an   |
|                                            |                     | adapter reads what it makes                       |
| q, k, v as projected                       | e (q + 2 k) / t     | q, k or v needs a gradient; so for the next four  |
| q anew, where heads share k and v          | e q / t             | learned positions, or norms over heads            |
| q and k anew                               | e (q + k) / t       | norms over heads                                  |
| attention's output and log-sum-exp         | (e q + 4 heads) / t | unless core_attn is recomputed                    |
| fc1's output, gated [gate; up]             | e f / t, 2 e f / t  | it needs a gradient, or fc2's adapter reads it,   |
|                                            |                     | unless mlp is recomputed                          |
| input of a linear layer                    | e in (*)            | its weight trains                                 |
| input of the projection behind attention   | e q / t             | it has an adapter, and core_attn is recomputed,   |
|                                            |                     | or fa4 (***) attends to several samples           |
| u = x A^T                                  | e r (**)            | adapters of summed rank r                         |
| the mask of core attention                 | e s                 | packing, or a window shorter than the sequence    |

(*) divided by t under sequence parallelism for column layers and norms, and always for row layers, whose `in` is cut.
(**) a row layer's is divided by t under sequence parallelism. What adapters read behind a norm or an activation is
computed again (`layers.rebuilt`), and dropout masks are drawn again: neither keeps anything of its own.
(***) `train.attention`: FlashAttention 4 keeps what torch's kernels keep, but lays its output out as [b, s], of which
the projection reads a copy.

Rotary positions keep their angles, 4 s rotary_dim bytes once a chunk (`layers.rotary`).

Full recomputation keeps only a layer's input, e h (*), and during backward the tensors above of one layer at a time; or
the input of every `recompute_unit` layers, and the tensors of so many. Where mlp is recomputed, fc1's output is made
again from the norm's input within one function of the backward pass: no tensor kept, but `ChunkBytes.made_again`.
Behind the last layer come the final norm and the loss (`layers.vocabulary_loss`). Where the output weight is frozen it
keeps its gradient to the hidden states, e h (*), and the loss mask, 4. Where that weight trains: the layer's input,
e h (*), the logits, e vocabulary / t, and 20 for labels, maxima, sums and the loss mask.

For GPT-3 (f = 4 h) with LoRA on q and v that is 2 + 6 + 2 + 2 + 8 = 20 s b h bytes without tensor parallelism.
`tests/planning` compares all of it with what autograd holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_megatron.layers.attention import FLASH_ATTENTION_4
from lora_megatron.methods.method import Method
from lora_megatron.model.build import padded_vocabulary
from lora_megatron.model.names import EMBEDDING, OUTPUT, POSITIONS
from lora_megatron.model.recomputation import CORE_ATTENTION, rebuilds_attention, rebuilt_layers, rebuilt_mlps
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.groups import Layout
from lora_megatron.planning.gradients import LayerFlow, LinearFlow, NormFlow

_LOG_SUM_EXP = 4  # bytes per head and token, fp32
_LOSS_MASK = 4  # bytes per token, fp32
_LABELS_AND_SUMS = 16  # bytes per token: labels int64, each softmax's maximum and sum in fp32
_EMBEDDING_INDEX = 8  # bytes per token and trained embedding table, int64


@dataclass(frozen=True)
class Microbatch:
    """What flows through a rank: sizes of one microbatch and how it is cut and computed."""

    shape: ModelShape
    layout: Layout
    samples: int
    sequence_length: int
    itemsize: int
    """Bytes per element in train.precision."""
    recompute: str = "none"
    recompute_layers: int | None = None
    """With `full`, or `selective` of `mlp`: of each chunk the first so many layers; None is all."""
    dropout: float = 0.0
    packing: bool = False
    recompute_unit: int = 1
    """With `full` of all layers: how many are rebuilt together."""
    recompute_modules: tuple[str, ...] = CORE_ATTENTION
    """With `selective`: which parts."""
    attention: str = "torch"
    """Whose kernels core attention runs on (`layers.attention`)."""

    @property
    def tokens(self) -> int:
        return self.samples * self.sequence_length

    @property
    def tensor(self) -> int:
        return self.layout.tensor

    @property
    def sharded(self) -> int:
        """What norms and column inputs are divided by: the tensor size under sequence parallelism."""
        return self.tensor if self.layout.sequence else 1

    @property
    def hidden_bytes(self) -> float:
        """Bytes of one [s or s/t, b, h]."""
        return self.tokens * self.shape.hidden_size * self.itemsize / self.sharded

    @property
    def vocabulary(self) -> int:
        """Columns of the logits on this rank."""
        return padded_vocabulary(self.shape.vocab_size, self.tensor) // self.tensor


def layer_bytes(flow: LayerFlow, batch: Microbatch, *, layer: int, without_fc1_output: bool = False) -> float:
    """Bytes that global layer `layer` keeps of one microbatch when it is not recomputed as a whole."""
    again = fc1_output_bytes(flow, batch) if without_fc1_output else 0.0
    attends = flow.norm1.output_needs or flow.qkv.rank > 0
    feeds = flow.norm2.output_needs or flow.fc1.rank > 0 or again > 0  # z, too, is made again from the norm's input
    norms = attends + feeds - (batch.shape.parallel_residual and attends and feeds)  # both may read the same tensor
    kept = norms * batch.hidden_bytes + _column_input(flow.qkv, batch) + _attention(flow, batch, layer)
    return kept + _column_input(flow.fc1, batch) + _mlp(flow, batch) - again


def fc1_output_bytes(flow: LayerFlow, batch: Microbatch) -> float:
    """What a layer keeps of fc1's output and could make again; 0 where the MLP trains."""
    return _fc1_output(flow, batch) if flow.mlp_is_frozen else 0.0


def _norm(norm: NormFlow, batch: Microbatch) -> float:
    """The input of a norm: the rest is computed again."""
    return batch.hidden_bytes if norm.output_needs else 0.0


def _column_input(linear: LinearFlow, batch: Microbatch) -> float:
    """What qkv or fc1 keep of their input, beside that of the norm before them, and their adapters of u."""
    kept = batch.hidden_bytes if linear.weight else 0.0
    return kept + batch.itemsize * linear.rank * batch.tokens


def _row_input(linear: LinearFlow, batch: Microbatch, width: float, *, is_kept: bool) -> float:
    """What proj or fc2 and their adapter keep of their input, `width` per token on this rank."""
    reads = linear.weight or linear.rank > 0
    kept = batch.itemsize * width * batch.tokens if reads and not is_kept else 0.0
    return kept + batch.itemsize * linear.rank * batch.tokens / batch.sharded


def _attention(flow: LayerFlow, batch: Microbatch, layer: int) -> float:
    """Core attention with what comes before and after it; the projection's input is its output."""
    shape, e = batch.shape, batch.itemsize
    queries, keys = shape.projection("q")[0] / batch.tensor, shape.projection("k")[0] / batch.tensor
    again = rebuilds_attention(batch.recompute, batch.recompute_modules)
    if not flow.attention_needs:
        return _row_input(flow.proj, batch, queries, is_kept=False)
    heads = shape.num_attention_heads / batch.tensor
    grouped = shape.num_query_groups < shape.num_attention_heads
    kept = e * (queries + 2 * keys) * batch.tokens
    if shape.qk_norm and grouped:
        kept += e * queries * batch.tokens
    if shape.qk_norm:
        kept += e * (queries + keys) * batch.tokens
    elif grouped and shape.position != "rope":
        kept += e * queries * batch.tokens
    is_masked = batch.packing or 0 < shape.window(layer) < batch.sequence_length
    if is_masked:
        rows = batch.samples if batch.packing else 1
        kept += e * rows * batch.sequence_length**2
    if not again:
        kept += (e * queries + _LOG_SUM_EXP * heads) * batch.tokens
    is_copied = batch.attention == FLASH_ATTENTION_4 and batch.samples > 1 and not is_masked
    return kept + _row_input(flow.proj, batch, queries, is_kept=not (again or is_copied))


def _mlp(flow: LayerFlow, batch: Microbatch) -> float:
    """From fc1's output to fc2's input."""
    width = batch.shape.ffn_hidden_size / batch.tensor
    return _fc1_output(flow, batch) + _row_input(flow.fc2, batch, width, is_kept=not flow.fc2.weight)


def _fc1_output(flow: LayerFlow, batch: Microbatch) -> float:
    if not (flow.fc1.output_needs or flow.fc2.rank):
        return 0.0
    columns = (2 if batch.shape.gated_mlp else 1) * batch.shape.ffn_hidden_size / batch.tensor
    return batch.itemsize * columns * batch.tokens


def head_bytes(method: Method, batch: Microbatch, *, input_needs: bool) -> tuple[float, float]:
    """(final norm and output layer's input, the loss) of one microbatch on the last stage."""
    shape = batch.shape
    name = "decoder.final_layernorm"
    has_bias = shape.normalization == "LayerNorm"
    norm = NormFlow(
        input_needs, method.is_trainable(f"{name}.weight"), has_bias and method.is_trainable(f"{name}.bias")
    )
    kept = _norm(norm, batch)
    loss = float(_LOSS_MASK * batch.tokens)
    if trains_output(method, shape):
        kept += batch.hidden_bytes
        loss += (batch.itemsize * batch.vocabulary + _LABELS_AND_SUMS) * batch.tokens
    elif norm.output_needs:
        loss += batch.hidden_bytes
    return kept, loss


def trains_output(method: Method, shape: ModelShape) -> bool:
    """Whether the output layer's weight, its own or the embedding's, gets a gradient."""
    return method.is_trainable(EMBEDDING if shape.tied_embeddings else OUTPUT)


def embedding_bytes(method: Method, batch: Microbatch) -> float:
    """What the embedding keeps of one microbatch: indices, where it trains."""
    tables = [EMBEDDING, *([POSITIONS] if batch.shape.position == "learned" else [])]
    return float(_EMBEDDING_INDEX * batch.tokens * sum(method.is_trainable(table) for table in tables))


@dataclass(frozen=True)
class ChunkBytes:
    """What one model chunk keeps of one microbatch."""

    held: float
    """From its forward to its backward pass, without the loss."""
    loss: float
    """The gradient to the hidden states or the logits, labels and masks; 0 but on the last chunk."""
    recomputed: float
    """The most that recomputation adds while its backward pass runs, over what the chunk holds then."""
    once: float = 0.0
    """Shared by all microbatches under way: angles of rotary positions."""
    made_again: float = 0.0
    """The most that an output of fc1, made again, adds to all that a chunk holds when its backward pass begins: by the
    time of a layer's the layers behind it are gone. It lives within one function, which autograd knows nothing of."""


def chunk_bytes(flows: Sequence[LayerFlow], layers: range, batch: Microbatch) -> ChunkBytes:
    """The layers `layers` of one chunk; embedding and head come on top."""
    count = rebuilt_layers(batch.recompute, batch.recompute_layers, len(layers))
    mlps = rebuilt_mlps(batch.recompute, batch.recompute_modules, batch.recompute_layers, len(layers))
    stored = [
        layer_bytes(flow, batch, layer=layer, without_fc1_output=index < mlps)
        for index, (flow, layer) in enumerate(zip(flows, layers, strict=True))
    ]
    inputs = batch.hidden_bytes
    turns = count > 0 or any(flow.attention_needs for flow in flows)
    rotary = 4 * batch.shape.rotary_dim * batch.sequence_length if turns and batch.shape.position == "rope" else 0
    unit = batch.recompute_unit
    units = [sum(stored[start : start + unit]) for start in range(0, count, unit)]
    # While unit i is rebuilt, the inputs of units 0 .. i are held still, and its own is what its first norm keeps.
    most = max((i * inputs + kept for i, kept in enumerate(units)), default=0.0)
    again = (fc1_output_bytes(flow, batch) - sum(stored[i + 1 :]) for i, flow in enumerate(flows[:mlps]))
    return ChunkBytes(len(units) * inputs + sum(stored[count:]), 0.0, most, rotary, max([0.0, *again]))
