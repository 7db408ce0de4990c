# SPDX-License-Identifier: Apache-2.0
"""The layer spec: where megatron-core is told which of our layers to build, already adapted.

Adapters come in through `ModuleSpec(cls, params=...)`, layer by layer, instead of by walking and patching a built
model: a shard of a very large model is built once, and names are the same for every method.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from lora_megatron.layers.activation import Activation
from lora_megatron.layers.adapted_attention import AdaptedAttention
from lora_megatron.layers.attention import SdpaAttention
from lora_megatron.layers.column import LoraColumnParallelLinear
from lora_megatron.layers.lora import AdapterSet
from lora_megatron.layers.mlp import MlpSpec
from lora_megatron.layers.norm import ReadInFp8, RMSNorm, norm_class, norm_spec
from lora_megatron.layers.parallel_residual import ParallelResidualLayer
from lora_megatron.layers.qkv import Part, gated_parts, qkv_parts, whole
from lora_megatron.layers.residual import get_residual_add
from lora_megatron.layers.rotary import RotaryAttention
from lora_megatron.layers.row import LoraRowParallelLinear
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.methods.method import Method
from lora_megatron.model.shape import ModelShape


def _qkv_rows(rows: int, *, shape: ModelShape) -> tuple[Part, ...]:
    per_group = (shape.num_attention_heads // shape.num_query_groups + 2) * shape.head_dim
    groups = rows // per_group  # whole query groups of this rank
    return qkv_parts(groups * (shape.num_attention_heads // shape.num_query_groups), groups, shape.head_dim)


def _fc1_rows(rows: int, *, gated: bool) -> tuple[Part, ...]:
    return gated_parts(rows // 2) if gated else whole("fc1", rows)


def layer_spec(
    shape: ModelShape,
    method: Method,
    layer: int,
    *,
    dropout: float,
    seed: int,
    storage: StorageFormat | None,
    attention_kernels: str,
    rebuild_mlp: bool,
    first: bool,
) -> ModuleSpec:
    """One transformer layer, `layer` being its global index, `first` whether none is before it in its chunk, or in what
    is rebuilt with it; `dropout` and `seed` are the adapters', `storage` that of frozen weights; `attention_kernels` as
    in `layers.attention`, `rebuild_mlp` as in `layers.mlp`."""

    def adapters(linear: str, *projections: str) -> AdapterSet:
        chosen = tuple(adapter for name in projections for adapter in method.adapters(layer, name))
        return AdapterSet(f"decoder.layers.{layer}.{linear}", chosen, dropout, seed)

    def kept(linear: str, layer: int = layer) -> StorageFormat | None:
        trained = method.is_trainable(f"decoder.layers.{layer}.{linear}.weight")
        return None if trained else storage

    def in_fp8(linear: str, layer: int = layer) -> bool:
        form = kept(linear, layer)
        return form is not None and form.in_fp8

    def norm(before: str, *, beside_residual: bool, gradient: bool) -> ModuleSpec:
        """In front of that layer; `gradient`: whether its input's gradient is read in FP8."""
        # Where branches are parallel, autograd adds the other's gradient to it. What a rebuilt layer hands to the one
        # before is another tensor over the same memory: codes left there are given to nobody, and stay while that one
        # is rebuilt.
        read = ReadInFp8(in_fp8(before), gradient and not shape.parallel_residual)
        return norm_spec(shape.normalization, beside_residual=beside_residual, in_fp8=read)

    attention = SelfAttentionSubmodules(
        linear_qkv=ModuleSpec(
            LoraColumnParallelLinear,
            params={
                "parts": partial(_qkv_rows, shape=shape),
                "adapters": adapters("self_attention.linear_qkv", "q", "k", "v"),
                "has_bias": shape.qkv_bias,
                "storage": kept("self_attention.linear_qkv"),
            },
        ),
        core_attention=ModuleSpec(SdpaAttention, params={"kernels": attention_kernels}),
        linear_proj=ModuleSpec(
            LoraRowParallelLinear,
            params={
                "adapters": adapters("self_attention.linear_proj", "o"),
                "has_bias": shape.proj_bias,
                "storage": kept("self_attention.linear_proj"),
                "skip_update_add": True,
            },
        ),
        q_layernorm=RMSNorm if shape.qk_norm else IdentityOp,
        k_layernorm=RMSNorm if shape.qk_norm else IdentityOp,
    )
    mlp = MLPSubmodules(
        linear_fc1=ModuleSpec(
            LoraColumnParallelLinear,
            params={
                "parts": partial(_fc1_rows, gated=shape.gated_mlp),
                "adapters": adapters("mlp.linear_fc1", *(("gate", "up") if shape.gated_mlp else ("fc1",))),
                "has_bias": shape.linear_bias,
                "blocks": 2 if shape.gated_mlp else 1,
                "storage": kept("mlp.linear_fc1"),
            },
        ),
        linear_fc2=ModuleSpec(
            LoraRowParallelLinear,
            params={
                "adapters": adapters("mlp.linear_fc2", "fc2"),
                "has_bias": shape.linear_bias,
                "storage": kept("mlp.linear_fc2"),
                "skip_update_add": True,
            },
        ),
    )
    return ModuleSpec(
        module=ParallelResidualLayer if shape.parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm(
                "self_attention.linear_qkv",
                beside_residual=True,
                gradient=not first and in_fp8("mlp.linear_fc2", layer - 1),
            ),
            self_attention=ModuleSpec(
                module=RotaryAttention if shape.position == "rope" else AdaptedAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_residual_add,
            # Where branches are parallel, the second adds its output to that of the first, not to what its norm reads.
            pre_mlp_layernorm=norm(
                "mlp.linear_fc1",
                beside_residual=not shape.parallel_residual,
                gradient=in_fp8("self_attention.linear_proj"),
            ),
            mlp=MlpSpec(
                mlp, {"activation": Activation(shape.activation, gated=shape.gated_mlp), "rebuild": rebuild_mlp}
            ),
            mlp_bda=get_residual_add,
        ),
    )


def block_spec(
    shape: ModelShape,
    method: Method,
    layers: range,
    *,
    dropout: float,
    seed: int,
    storage: StorageFormat | None = None,
    attention: str = "torch",
    rebuilt_mlps: int = 0,
    first_of_units: Collection[int] = (),
) -> TransformerBlockSubmodules:
    """The layers `layers` (global indices) of one model chunk and the final norm's class; the first `rebuilt_mlps` of
    them make fc1's output again; `first_of_units` begin what is rebuilt as a whole."""
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(
                shape,
                method,
                layer,
                dropout=dropout,
                seed=seed,
                storage=storage,
                attention_kernels=attention,
                rebuild_mlp=layer - layers.start < rebuilt_mlps,
                first=layer == layers.start or layer - layers.start in first_of_units,
            )
            for layer in layers
        ],
        layer_norm=norm_class(shape.normalization),
    )
