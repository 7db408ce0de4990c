# SPDX-License-Identifier: Apache-2.0
"""Can this configuration run on this many processes? Every refusal is one line with the value and the remedy."""

from __future__ import annotations

import torch

from lora_megatron.config import Config
from lora_megatron.errors import ConfigError
from lora_megatron.methods.method import Method
from lora_megatron.model.attention_kernels import check_attention, check_attention_here
from lora_megatron.model.build import BuildOptions
from lora_megatron.model.recomputation import check_recomputation
from lora_megatron.model.shape import ModelShape
from lora_megatron.model.storage import check_head, check_storage, head_of, storage_of
from lora_megatron.parallel.groups import Layout, check_world_size, device_memory_bytes
from lora_megatron.parallel.stage_copies import check_copies_here


def layout_of(config: Config) -> Layout:
    """The configuration's parallel section as a layout."""
    section = config.parallel
    return Layout(section.tensor, section.pipeline, section.virtual_pipeline, section.context, section.sequence)


def options_of(config: Config, *, meta: bool = False) -> BuildOptions:
    """How the configuration has its model built. Raises ConfigError, see `storage_of` and `head_of`."""
    return BuildOptions(
        precision=config.train.precision,
        recompute=config.train.recompute,
        recompute_modules=config.train.recompute_modules,
        recompute_layers=config.train.recompute_layers,
        recompute_unit=config.train.recompute_unit,
        dropout=config.method.dropout,
        adapter_seed=config.train.seed,
        label_smoothing=config.train.label_smoothing,
        attention=config.train.attention,
        storage=storage_of(config),
        transposes_kept=config.base.transposes_kept or 0,
        transposes_in_host=config.base.transposes == "host",
        head=head_of(config),
        tp_comm_overlap=config.parallel.tp_comm_overlap,
        pp_comm_copy=config.parallel.pp_comm_copy,
        meta=meta,
    )


def check(config: Config, shape: ModelShape, method: Method, world_size: int) -> None:
    """Raise ConfigError for the first thing that cannot work, this machine's memory included."""
    check_plan(config, shape, method, world_size)
    if config.train.cuda_graph and not torch.cuda.is_available():
        raise ConfigError("train.cuda_graph = true: this machine has no CUDA device; set train.cuda_graph=false")
    if config.parallel.pp_comm_copy:
        check_copies_here()
    check_attention_here(config, shape)
    _check_memory(config, layout_of(config), shape)


def check_plan(config: Config, shape: ModelShape, method: Method, world_size: int) -> None:
    """Raise ConfigError for the first thing that could not work on any machine, however large."""
    layout = layout_of(config)
    _check_layout(layout, shape)
    check_world_size(layout, world_size)
    _check_batches(config, layout, world_size)
    _check_lengths(config, layout, shape)
    if config.parallel.tp_comm_overlap and not layout.sequence:
        raise ConfigError(
            "parallel.tp_comm_overlap = true hides the collectives of sequence parallelism, which is off: set "
            "parallel.sequence=true, or leave it out"
        )
    if config.parallel.pp_comm_copy and layout.pipeline == 1:
        raise ConfigError(
            "parallel.pp_comm_copy = true is about what pipeline stages send each other, and there is one: set "
            "parallel.pipeline above 1, or leave it out"
        )
    check_storage(config, layout, shape)
    check_head(config, shape, method)
    check_recomputation(config, layout, shape, method)
    _check_graph(config)
    check_attention(config, shape)
    _check_targets(config, shape)
    _check_ranks(shape, method)
    has_bias = shape.linear_bias or shape.qkv_bias or shape.proj_bias or shape.normalization == "LayerNorm"
    if method.name == "bitfit" and not has_bias:
        raise ConfigError("method.name = bitfit trains bias vectors, and this model has none: choose another method")


def check_decoding(config: Config, shape: ModelShape, method: Method, world_size: int) -> None:
    """Raise ConfigError for the first thing that keeps this model from being run without training."""
    layout = layout_of(config)
    _check_layout(layout, shape)
    check_world_size(layout, world_size)
    check_storage(config, layout, shape)
    check_head(config, shape, method)
    _check_ranks(shape, method)


def _check_layout(layout: Layout, shape: ModelShape) -> None:
    if layout.context > 1:
        raise ConfigError(
            f"parallel.context = {layout.context}: megatron-core's context parallelism needs Transformer Engine's "
            "attention, and this stack uses torch's; set it to 1 and use parallel.sequence to shard activations"
        )
    for name, value in (
        ("num_attention_heads", shape.num_attention_heads),
        ("num_query_groups", shape.num_query_groups),
        ("ffn_hidden_size", shape.ffn_hidden_size),
    ):
        if value % layout.tensor:
            raise ConfigError(
                f"parallel.tensor = {layout.tensor} does not divide model.{name} = {value}: "
                f"choose one of {', '.join(str(n) for n in _divisors(shape))}"
            )
    if layout.sequence and layout.tensor == 1:
        raise ConfigError("parallel.sequence needs parallel.tensor > 1: it shards over the tensor-parallel group")
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        raise ConfigError(f"parallel.virtual_pipeline = {layout.virtual_pipeline} needs parallel.pipeline > 1")
    stages = layout.pipeline * layout.virtual_pipeline
    if shape.num_layers % stages:
        raise ConfigError(
            f"parallel.pipeline x virtual_pipeline = {layout.pipeline} x {layout.virtual_pipeline} does not divide "
            f"model.num_layers = {shape.num_layers}: choose sizes whose product does"
        )


def _divisors(shape: ModelShape) -> list[int]:
    sizes = (shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size)
    return [n for n in range(1, shape.num_query_groups + 1) if all(size % n == 0 for size in sizes)]


def _check_graph(config: Config) -> None:
    """A CUDA graph repeats what it has captured, and cannot hold what waits for the host."""
    method, parallel, sharding = config.method, config.parallel, config.optimizer.sharding
    for is_asked, what, why, remedy in (
        (
            method.dropout > 0,
            f"method.dropout = {method.dropout:g}",
            "a graph would drop the same values in every step",
            "method.dropout=0",
        ),
        (
            parallel.pipeline > 1,
            f"parallel.pipeline = {parallel.pipeline}",
            "megatron-core waits for the device after messages between stages, which no graph can hold",
            "parallel.pipeline=1",
        ),
        (
            sharding == "deepspeed",
            "optimizer.sharding = deepspeed",
            "nobody has tried whether DeepSpeed leaves parameters where a graph reads them",
            "optimizer.sharding=megatron or none",
        ),
        (
            config.base.transposes == "host",
            "base.transposes = host",
            "the first weights of a step are on their way from the host since the step before",
            "base.transposes=anew or kept",
        ),
    ):
        if config.train.cuda_graph and is_asked:
            raise ConfigError(f"train.cuda_graph = true with {what}: {why}; set {remedy}, or train.cuda_graph=false")


def _check_batches(config: Config, layout: Layout, world_size: int) -> None:
    data = config.data
    data_size = world_size // layout.model_size
    step = data.micro_batch_size * data_size
    if data.global_batch_size % step:
        raise ConfigError(
            f"data.global_batch_size = {data.global_batch_size} is not a multiple of micro_batch_size x data-parallel "
            f"ranks = {data.micro_batch_size} x {data_size} = {step}: choose such a multiple"
        )
    count = data.global_batch_size // step
    if layout.virtual_pipeline > 1 and count % layout.pipeline:
        raise ConfigError(
            f"the interleaved schedule needs microbatches in rounds of parallel.pipeline = {layout.pipeline}, and a "
            f"global batch has {count} per rank: make data.global_batch_size a multiple of {step * layout.pipeline}"
        )


def _check_lengths(config: Config, layout: Layout, shape: ModelShape) -> None:
    length = config.data.sequence_length
    if length > shape.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length = {length} is longer than model.max_position_embeddings = "
            f"{shape.max_position_embeddings}: lower data.sequence_length to at most that"
        )
    if layout.sequence and length % layout.tensor:
        raise ConfigError(
            f"parallel.sequence needs data.sequence_length = {length} to be a multiple of parallel.tensor = "
            f"{layout.tensor}"
        )


def _check_memory(config: Config, layout: Layout, shape: ModelShape) -> None:
    """Refuse what cannot fit: the weights alone of the first stage, or one microbatch's input to one layer."""
    available = device_memory_bytes()
    if available is None:
        return
    size = 2 if config.train.precision == "bf16" else 4
    linear = {"fp8": 1.0, "nf4": 0.5}.get(config.base.storage or "", size)
    layer = sum(out * features for out, features in map(shape.projection, shape.projections))
    stage = shape.num_layers // layout.pipeline * layer * linear + shape.vocab_size * shape.hidden_size * size
    tokens = config.data.micro_batch_size * config.data.sequence_length
    for what, needed in (
        ("the weights of this model", stage // layout.tensor),
        ("a microbatch of data.micro_batch_size x sequence_length", tokens * shape.hidden_size * size // layout.tensor),
    ):
        if needed > available:
            raise ConfigError(
                f"{what} need {needed / 2**30:,.0f} GiB on each rank, and a device has {available / 2**30:,.0f} GiB: "
                "make it smaller, or raise parallel.tensor or parallel.pipeline"
            )


def _check_targets(config: Config, shape: ModelShape) -> None:
    named = {target for ranks in (config.method.targets, *config.method.layers.values()) for target in ranks}
    for target in sorted(named & {"gate", "up"}):
        if not shape.gated_mlp:
            raise ConfigError(f"method.targets.{target}: this model's MLP has no gate; its first projection is fc1")


def _check_ranks(shape: ModelShape, method: Method) -> None:
    for layer in range(shape.num_layers):
        for projection in shape.projections:
            for adapter in method.adapters(layer, projection):
                out, features = shape.projection(projection)
                if adapter.rank > min(out, features):
                    raise ConfigError(
                        f"rank {adapter.rank} of {projection} is larger than its matrix [{out}, {features}]: "
                        f"at most {min(out, features)}"
                    )
