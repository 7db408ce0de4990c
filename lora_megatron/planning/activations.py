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
| attention's output and log-sum-exp         | (e q + 4 heads) / t | unless recompute is selective                     |
| fc1's output, gated [gate; up]             | e f / t, 2 e f / t  | it needs a gradient, or fc2's adapter reads it    |
| input of a linear layer                    | e in (*)            | its weight trains                                 |
| input of the projection behind attention   | e q / t             | it has an adapter, and recompute is selective     |
| u = x A^T                                  | e r (**)            | adapters of summed rank r                         |
| the mask of core attention                 | e s                 | packing, or a window shorter than the sequence    |

(*) divided by t under sequence parallelism for column layers and norms, and always for row layers, whose `in` is cut.
(**) a row layer's is divided by t under sequence parallelism. What adapters read behind a norm or an activation is
computed again (`layers.rebuilt`), and dropout masks are drawn again: neither keeps anything of its own.

Rotary positions keep their angles, 4 s rotary_dim bytes once a chunk (`layers.rotary`).

Full recomputation keeps only a layer's input, e h (*), and during backward the tensors above of one layer at a time; or
the input of every `recompute_unit` layers, and the tensors of so many.
Behind the last layer come the final norm and the loss (`layers.vocabulary_loss`). Where the output weight is frozen it
keeps its gradient to the hidden states, e h (*), and the loss mask, 4. Where that weight trains: the layer's input,
e h (*), the logits, e vocabulary / t, and 20 for labels, maxima, sums and the loss mask.

For GPT-3 (f = 4 h) with LoRA on q and v that is 2 + 6 + 2 + 2 + 8 = 20 s b h bytes without tensor parallelism.
`tests/planning` compares all of it with what autograd holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_megatron.methods.method import Method
from lora_megatron.model.build import padded_vocabulary
from lora_megatron.model.names import EMBEDDING, OUTPUT, POSITIONS
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
    """With `full`: of each chunk the first so many layers; None is all."""
    dropout: float = 0.0
    packing: bool = False
    recompute_unit: int = 1
    """With `full` of all layers: how many are rebuilt together."""

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


def recomputed_layers(recompute: str, asked: int | None, layers: int) -> int:
    """How many of a chunk's `layers`, from the first, are recomputed; `asked` is `train.recompute_layers`."""
    if recompute != "full":
        return 0
    return layers if asked is None else min(asked, layers)


def layer_bytes(flow: LayerFlow, batch: Microbatch, *, layer: int) -> float:
    """Bytes that global layer `layer` keeps of one microbatch when it is not recomputed."""
    kept = _norm(flow.norm1, batch, batch.shape.hidden_size)
    kept += _column_input(flow.qkv, flow.norm1, batch) + _attention(flow, batch, layer)
    kept += _norm(flow.norm2, batch, batch.shape.hidden_size)
    if batch.shape.parallel_residual and _keeps(flow.qkv, flow.norm1) and _keeps(flow.fc1, flow.norm2):
        kept -= batch.hidden_bytes  # both norms read the same tensor
    return kept + _column_input(flow.fc1, flow.norm2, batch) + _mlp(flow, batch)


def _keeps(linear: LinearFlow, norm: NormFlow) -> bool:
    """Whether the input of the norm before a column layer is kept: for the norm, or to rebuild what adapters read."""
    return norm.output_needs or linear.rank > 0


def _norm(norm: NormFlow, batch: Microbatch, width: int) -> float:
    """The input of a norm over the hidden width: the rest is computed again."""
    return batch.itemsize * width * batch.tokens / batch.sharded if norm.output_needs else 0.0


def _column_input(linear: LinearFlow, norm: NormFlow, batch: Microbatch) -> float:
    """What qkv or fc1 and their adapters keep of their input, which comes from `norm`."""
    one = batch.hidden_bytes
    kept = one if linear.weight else 0.0
    if linear.rank and not norm.output_needs:
        kept += one  # of the norm's input, from which adapters compute theirs again
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
    selective = batch.recompute == "selective"
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
    if batch.packing or 0 < shape.window(layer) < batch.sequence_length:
        rows = batch.samples if batch.packing else 1
        kept += e * rows * batch.sequence_length**2
    if not selective:
        kept += (e * queries + _LOG_SUM_EXP * heads) * batch.tokens
    return kept + _row_input(flow.proj, batch, queries, is_kept=not selective)


def _mlp(flow: LayerFlow, batch: Microbatch) -> float:
    """From fc1's output to fc2's input."""
    shape, width = batch.shape, batch.shape.ffn_hidden_size / batch.tensor
    one = batch.itemsize * width * batch.tokens
    columns = 2 if shape.gated_mlp else 1
    kept = columns * one if flow.fc1.output_needs or flow.fc2.rank else 0.0  # of fc1's output
    return kept + _row_input(flow.fc2, batch, width, is_kept=not flow.fc2.weight)


def head_bytes(method: Method, batch: Microbatch, *, input_needs: bool) -> tuple[float, float]:
    """(final norm and output layer's input, the loss) of one microbatch on the last stage."""
    shape = batch.shape
    name = "decoder.final_layernorm"
    has_bias = shape.normalization == "LayerNorm"
    norm = NormFlow(
        input_needs, method.is_trainable(f"{name}.weight"), has_bias and method.is_trainable(f"{name}.bias")
    )
    kept = _norm(norm, batch, shape.hidden_size)
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


def chunk_bytes(flows: Sequence[LayerFlow], layers: range, batch: Microbatch) -> ChunkBytes:
    """The layers `layers` of one chunk; embedding and head come on top."""
    stored = [layer_bytes(flow, batch, layer=layer) for flow, layer in zip(flows, layers, strict=True)]
    count = recomputed_layers(batch.recompute, batch.recompute_layers, len(stored))
    inputs = batch.hidden_bytes
    turns = count > 0 or any(flow.attention_needs for flow in flows)
    rotary = 4 * batch.shape.rotary_dim * batch.sequence_length if turns and batch.shape.position == "rope" else 0
    unit = batch.recompute_unit
    units = [sum(stored[start : start + unit]) for start in range(0, count, unit)]
    # While unit i is rebuilt, the inputs of units 0 .. i are held still, and its own is what its first norm keeps.
    most = max((i * inputs + kept for i, kept in enumerate(units)), default=0.0)
    return ChunkBytes(len(units) * inputs + sum(stored[count:]), 0.0, most, rotary)
