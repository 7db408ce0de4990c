# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: one frozen section per concern, with the default and the bounds of every key.

The resolved configuration is written into the run folder, so a run can be repeated from its folder alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Target = Literal["q", "k", "v", "o", "fc1", "gate", "up", "fc2"]
# Far beyond any model or run, and small enough that nothing overflows or is looped over for ever.
LARGEST_SIZE, LARGEST_COUNT, MOST_LAYERS, MOST_RANKS = 2**31, 10**9, 10**6, 10**6
LARGEST_SEED = 2**63 - 1
DEFAULT_STEPS = 100
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: Any) -> Any:
        """YAML reads yes, on and true as a switch, which Python would take for the number 1."""
        kind = cls.model_fields[info.field_name].annotation
        if kind in (bool, bool | None) or (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return value
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any(isinstance(number, bool) for number in numbers):
            raise ValueError("yes, no, on, off, true and false are switches to YAML, not numbers or words")
        return value


class ModelSection(Section):
    preset: str | None = None
    """Name of a shape in `lora_megatron.model.presets`; the fields below override it."""
    num_layers: int | None = Field(None, ge=1, le=MOST_LAYERS)
    hidden_size: int | None = Field(None, ge=1, le=LARGEST_SIZE)
    num_attention_heads: int | None = Field(None, ge=1, le=LARGEST_SIZE)
    num_query_groups: int | None = Field(None, ge=1, le=LARGEST_SIZE)
    """Key/value heads; fewer than attention heads is grouped-query attention."""
    head_dim: int | None = Field(None, ge=1, le=LARGEST_SIZE)
    ffn_hidden_size: int | None = Field(None, ge=1, le=LARGEST_SIZE)
    max_position_embeddings: int | None = Field(None, ge=1, le=LARGEST_SIZE)
    vocab_size: int | None = Field(None, ge=1, le=LARGEST_SIZE)
    """Follows from the tokenizer when not given."""
    normalization: Literal["LayerNorm", "RMSNorm"] | None = None
    norm_epsilon: float | None = Field(None, gt=0, le=1)
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] | None = None
    gated_mlp: bool | None = None
    """SwiGLU-style MLP: fc1 is [gate; up]."""
    linear_bias: bool | None = None
    """Bias on the linear layers; `qkv_bias` and `proj_bias` decide for attention's two where they are given."""
    qkv_bias: bool | None = None
    proj_bias: bool | None = None
    qk_norm: bool | None = None
    """RMSNorm over each head of q and k."""
    parallel_residual: bool | None = None
    """x + attention(norm(x)) + mlp(norm(x)) instead of one after the other."""
    position: Literal["learned", "rope"] | None = None
    rotary_base: float | None = Field(None, gt=0, le=1e30)
    rotary_percent: float | None = Field(None, gt=0, le=1)
    """Share of each head's dimensions that turn."""
    rope_scaling: dict[str, Any] | None = None
    """`rope_type` (linear, dynamic, yarn, llama3) and its factors, as in a Hugging Face configuration."""
    sliding_window: int | None = Field(None, ge=0, le=LARGEST_SIZE)
    """Tokens each position sees, itself included; 0 is all."""
    full_attention_layers: int | None = Field(None, ge=0, le=MOST_LAYERS)
    """How many of the first layers see everything although there is a sliding window."""
    tied_embeddings: bool | None = None


class BaseSection(Section):
    weights: str = "random"
    """`random`, the folder of a model this project saved, or a Hugging Face folder (config.json and safetensors)."""
    seed: int = 1234
    """What random base weights are a function of."""
    storage: Literal["bf16", "fp8", "nf4"] | None = None
    """How frozen linear weights are kept; not given: in `train.precision`."""
    gemm: Literal["bf16", "fp8"] | None = None
    """What NF4 weights are multiplied in; not given: in `train.precision`. FP8 weights always are in FP8."""
    fast_accum: Literal["none", "forward", "both"] | None = None
    """Which FP8 products are added up in the tensor cores' own, shorter registers: those of the `forward` pass (not
    given: the same), gradients too (`both`), or `none`."""
    transposes: Literal["anew", "group", "kept", "host"] | None = None
    """FP8 weights turned round, which backward products read: made anew for each microbatch (not given: the same), kept
    for the microbatches of a `group` of the interleaved pipeline schedule (of one in any other), or `kept` for good, a
    second copy. `host` keeps those of MLPs in the host's memory, from where they are brought back while other products
    run (while backward passes alone run every second one, the others are made anew), and the others for a group."""
    transposes_kept: int | None = Field(None, ge=1, le=MOST_LAYERS)
    """Of so many layers of each pipeline stage, its last ones, they are kept for good whatever `transposes` says: for
    memory that is left."""

    head: Literal["bf16", "fp8"] | None = None
    """What the two products of the frozen output layer are done in; not given: in `train.precision`. `fp8` is that of
    training, of held-out losses and of decoding, so that all are of one model, and takes two bytes a weight: its codes,
    and those turned round for the gradient. A bf16 table is kept only where tokens are looked up in it too."""

    def of_training_precision(self) -> BaseSection:
        """The same weights, in no other format."""
        keys = ("storage", "gemm", "fast_accum", "transposes", "transposes_kept", "head")
        return self.model_copy(update=dict.fromkeys(keys))


class MethodSection(Section):
    name: str = "lora"
    targets: dict[Target, int] = {"q": 4, "v": 4}
    """Rank per target projection. On a gated MLP `fc1` adapts gate and up separately, each at that rank; `gate` and
    `up` name them singly and win over `fc1`."""
    layers: dict[str, dict[Target, int]] = {}
    """Ranks for some layers only: `{"0-11,23": {q: 8}}`; rank 0 leaves a target alone there."""
    alpha: float = Field(16.0, gt=0, le=1e30)
    dropout: float = Field(0.0, ge=0, lt=1)
    scaling: Literal["standard", "rslora"] = "standard"
    """alpha / r, or alpha / sqrt(r)."""
    start_from: str | None = None
    """Folder of an adapter to start from, trained on the same base with the same method."""


class ParallelSection(Section):
    tensor: int = Field(1, ge=1, le=MOST_RANKS)
    pipeline: int = Field(1, ge=1, le=MOST_RANKS)
    virtual_pipeline: int = Field(1, ge=1, le=MOST_RANKS)
    """Model chunks per pipeline stage; above 1 the interleaved schedule runs."""
    context: int = Field(1, ge=1, le=MOST_RANKS)
    sequence: bool = False
    """Megatron's sequence parallelism: shard activations between linear layers over the tensor group."""
    tp_comm_overlap: bool = False
    """With `sequence`, on GPUs of one host: copy tokens between them behind the products of frozen weights, instead of
    gathering and scattering them before and after."""
    pp_comm_copy: bool = False
    """With `pipeline`, on GPUs of one host: copy engines bring what stages send each other, where NCCL's kernels would
    take processors from the products beside them."""
    timeout_minutes: float = Field(30.0, gt=0, le=1e6)
    """Timeout of every process group."""


class OptimizerSection(Section):
    lr: float = Field(2e-4, ge=0, le=1e30)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0, le=1e30)
    clip_grad: float = Field(1.0, ge=0, le=1e30)
    """Largest global gradient norm; 0 leaves gradients alone."""
    sharding: Literal["none", "megatron", "deepspeed"] = "none"
    """How optimizer state of the trained parameters is sharded over data-parallel ranks."""


class DataSection(Section):
    train: str | None = None
    validation: str | None = None
    sequence_length: int = Field(512, ge=2, le=LARGEST_SIZE)
    micro_batch_size: int = Field(1, ge=1, le=LARGEST_COUNT)
    global_batch_size: int = Field(8, ge=1, le=LARGEST_COUNT)
    tokenizer: str | None = None
    """`bytes`, a folder with GPT-2's encoder.json and vocab.bpe, or one with a tokenizer.json. Not given: that of a
    Hugging Face base, bytes for any other."""
    packing: bool = False
    """Several examples per row, blind to each other."""
    loss: Literal["target", "all"] = "target"
    """Tokens that count: the target's (the paper's objective) or every token (language modelling)."""


class TrainSection(Section):
    steps: int | None = Field(None, ge=0, le=LARGEST_COUNT)
    """Not given, or null: as many as `epochs` take; 100 without `epochs` either."""
    epochs: float | None = Field(None, gt=0, le=LARGEST_COUNT)
    """Passes over the rows of `data.train` (packed rows, with `data.packing`), instead of `steps`: ceil(epochs x rows /
    `data.global_batch_size`) steps."""
    warmup_steps: int = Field(0, ge=0, le=LARGEST_COUNT)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after warm-up: down to zero at the last step, or constant."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over the vocabulary, in training; held-out losses are without it."""
    seed: int = Field(42, ge=0, le=LARGEST_SEED)
    eval_every: int | Literal["epoch"] = 0
    """Steps between evaluations, or `epoch` for one at the end of each, the first before training; 0 evaluates after
    the last step only."""
    best: str = "none"
    """What evaluations are compared by: `loss` (the held-out one), or a task's metric on the rows of `data.validation`,
    such as `e2e.bleu` or `mnli.accuracy`, decoded as `lora-megatron evaluate` does by default. The best so far, after
    at least one step, is kept in `best/` of the run folder, in the form of `adapter/` (or `model/`, where the whole
    model trains), which remains that of the last step. `none` keeps none."""
    samples: int = Field(0, ge=0, le=LARGEST_COUNT)
    """Held-out contexts to continue greedily before and after training, for the report."""
    save_every: int = Field(0, ge=0, le=LARGEST_COUNT)
    """Steps between checkpoints; 0 saves after the last step only."""
    async_save: bool = True
    """Write periodic checkpoints in the background, from a copy taken at the step; results do not change."""
    keep_checkpoints: int = Field(2, ge=1, le=LARGEST_COUNT)
    """The newest ones to keep; with 1 also the one before it, as no step was taken from the newest yet."""
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full", "auto"] = "none"
    """Activations rebuilt in the backward pass: none, those of `recompute_modules`, whole layers', or as few as the
    memory allows: `auto` becomes `none`, `selective` of `[mlp]` or `full`, with `recompute_layers`, when a run
    starts."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = Field(("core_attn",), min_length=1)
    """With `selective`: `core_attn`, core attention, of all layers; `mlp`, of a frozen MLP the output of fc1, its
    largest activation, at the price of one more product."""
    recompute_layers: int | None = Field(None, ge=1, le=MOST_LAYERS)
    """With `full`, or `mlp` of `selective`: of the first so many layers of each model chunk; of all where not given."""
    recompute_unit: int = Field(1, ge=1, le=MOST_LAYERS)
    """With `full` of all layers: how many are rebuilt together. More keep fewer inputs and rebuild more at a time: for
    GPT-3 175B on one GPU 3 are the leanest by the plan."""
    cuda_graph: bool = False
    """Launch both passes of a step at once, as a CUDA graph captured in the third step, and the optimizer's step as
    another where `optimizer.sharding` is `none` and `precision` is `bf16`; results do not change. It saves the host's
    time per kernel and holds the memory of the activations between steps."""
    attention: Literal["torch", "fa4"] = "torch"
    """Whose kernels core attention runs on: torch's (cuDNN's on recent GPUs), or those of FlashAttention 4, for bf16 on
    Hopper or newer GPUs. It needs flash-attn-4. What has a mask stays torch's (a window shorter than the sequence), and
    so does decoding; data.packing, whose rows all have one, is refused. Results change by roundings."""
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or gradient is not finite, or the loss is a spike: end with status 5, go on without the update, or
    go back to the newest good checkpoint and leave out the samples since."""
    max_bad_steps: int = Field(3, ge=1, le=LARGEST_COUNT)
    """How many bad steps in a row are skipped, or how many times a run goes back, before it ends with status 5."""
    spike_factor: float = Field(0.0, ge=0, le=1e30)
    """A loss above this many times the median of the last 20 steps is a spike; 0 looks for none."""
    straggler_every: int = Field(100, ge=0, le=LARGEST_COUNT)
    """Steps between lines that name the slowest rank; 0 writes none."""

    @field_validator("eval_every", mode="before")
    @classmethod
    def _steps_or_epoch(cls, value: Any) -> Any:
        if value == "epoch" or (type(value) is int and 0 <= value <= LARGEST_COUNT):
            return value
        raise ValueError(f"it is a number of steps from 0 to {LARGEST_COUNT:,}, or epoch")

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, epochs: float | None, info: Any) -> float | None:
        if epochs is not None and (steps := info.data.get("steps")) is not None:
            raise ValueError(
                f"train.steps = {steps} is given too, and each says how long to train: keep one (train.steps=null or "
                "train.epochs=null drops that of a file)"
            )
        return epochs

    @model_validator(mode="before")
    @classmethod
    def _some_length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "steps": DEFAULT_STEPS}
        return values


class RunSection(Section):
    dir: str = "runs/run"
    resume: str = "never"
    """`never`, `auto` (the newest good checkpoint of `dir`, or a fresh start), or the path of a checkpoint."""
    grace_seconds: float = Field(60.0, gt=0, le=1e6)
    """Time between a termination signal (SIGTERM, SIGINT, SIGUSR1, SIGUSR2) and the kill, in which a checkpoint has to
    be written; Slurm: --signal."""
    hang_minutes: float = Field(15.0, gt=0, le=1e6)
    """Without progress for so long the job ends with status 6, and says which rank hangs and where."""


class Config(Section):
    """A whole run."""

    model: ModelSection = ModelSection()
    base: BaseSection = BaseSection()
    method: MethodSection = MethodSection()
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()

    def to_yaml(self) -> str:
        """The resolved configuration, loadable by `load_config`."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)
