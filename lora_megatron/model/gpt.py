# SPDX-License-Identifier: Apache-2.0
"""megatron-core's GPTModel with a loss that holds no fp32 logits: `layers.vocabulary_loss` in the place of its own.

Without labels (generation) the output layer computes logits, in FP8 where its weight is stored so
(`layers.output_layer`). With labels there are two cases. A frozen output weight, tied or not, and every evaluation:
losses come straight from the hidden states, the output layer is not called, and no logits outlive their chunk. An
output weight in training: the output layer is called, for the gradient of its weight, and the loss takes its logits.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from lora_megatron.layers.output_layer import StoredOutputLayer
from lora_megatron.layers.output_products import Fp8OutputProducts, OutputProducts, PlainOutputProducts
from lora_megatron.layers.smoothing import NO_SMOOTHING, Smoothing
from lora_megatron.layers.vocabulary_loss import loss_of_hidden, loss_of_logits
from lora_megatron.layers.vocabulary_shard import VocabularyShard


class Gpt(GPTModel):
    """A stage of GPTModel; `mask_padded_vocabulary` is called once it is built."""

    real_columns: int | None = None
    """Columns of this rank's logits, from the first, that are tokens; None if all are."""
    pp_comm_copy = False
    """Whether stages copy to each other what they send (`parallel.stage_copies`)."""
    smoothing: Smoothing = NO_SMOOTHING
    """Of labels, in training; evaluation has none."""

    def mask_padded_vocabulary(self, vocab_size: int) -> None:
        """Give padded vocabulary rows no probability, so that the loss does not depend on how much padding there is."""
        if not self.post_process:
            return
        columns = self.output_layer.output_size_per_partition
        real = max(0, min(columns, vocab_size - mpu.get_tensor_model_parallel_rank() * columns))
        self.real_columns = real

        def mask(module: nn.Module, args: object, output: tuple[Tensor, Tensor | None]) -> None:
            # Outside autograd, which would copy the whole gradient to clear columns whose gradient is 0 anyway.
            output[0].detach()[..., real:columns] = torch.finfo(output[0].dtype).min

        if real < columns:
            self.output_layer.register_forward_hook(mask)

    def _postprocess(self, *, hidden_states: Tensor, labels: Tensor | None, **rest: Any) -> Tensor:
        """Hidden states [s or s/t, b, h] of the decoder -> losses [b, s] where there are labels [b, s]."""
        if self.post_process and labels is not None:
            weight = self._output_weight()
            if not (weight.requires_grad and torch.is_grad_enabled()):
                shard = self._shard(weight, sequence_parallel=self.output_layer.sequence_parallel)
                products = self._products(weight)
                losses = loss_of_hidden(hidden_states, products, labels.t(), shard, smoothing=self._smoothing_now())
                return _as_given(losses)
        result: Tensor = super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
        return result

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V/t] -> losses [b, s]; where the output weight trains."""
        shard = self._shard(self._output_weight(), sequence_parallel=False)
        return _as_given(loss_of_logits(logits, labels.t(), shard, smoothing=self._smoothing_now()))

    def _smoothing_now(self) -> Smoothing:
        return self.smoothing if self.training else NO_SMOOTHING

    def _output_weight(self) -> Tensor:
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight

    def _products(self, weight: Tensor) -> OutputProducts:
        if isinstance(self.output_layer, StoredOutputLayer):
            return Fp8OutputProducts(self.output_layer.stored)
        return PlainOutputProducts(weight.detach())

    def _shard(self, weight: Tensor, *, sequence_parallel: bool) -> VocabularyShard:
        group = mpu.get_tensor_model_parallel_group()
        columns = weight.shape[0]
        return VocabularyShard(
            first=group.rank() * columns,
            real=columns if self.real_columns is None else self.real_columns,
            group=group if group.size() > 1 else None,
            sequence_parallel=sequence_parallel,
        )


def _as_given(losses: Tensor) -> Tensor:
    """[s, b] -> [b, s]."""
    return losses.t().contiguous()
