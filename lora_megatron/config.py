# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: one frozen section per concern, defaults < YAML file < `section.key=value`.

An unknown key is an error that names the nearest valid one. The resolved configuration is written into the run
folder, so a run can be repeated from its folder alone.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lora_megatron.errors import ConfigError

Target = Literal["q", "k", "v", "o", "fc1", "gate", "up", "fc2"]
# Far beyond any model or run, and small enough that nothing overflows or is looped over for ever.
LARGEST_SIZE, LARGEST_COUNT, MOST_LAYERS, MOST_RANKS = 2**31, 10**9, 10**6, 10**6
LARGEST_SEED = 2**63 - 1
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
    steps: int = Field(100, ge=0, le=LARGEST_COUNT)
    warmup_steps: int = Field(0, ge=0, le=LARGEST_COUNT)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after warm-up: down to zero at the last step, or constant."""
    seed: int = Field(42, ge=0, le=LARGEST_SEED)
    eval_every: int = Field(0, ge=0, le=LARGEST_COUNT)
    """Steps between evaluations, the first before training; 0 evaluates after the last step only."""
    samples: int = Field(0, ge=0, le=LARGEST_COUNT)
    """Held-out contexts to continue greedily before and after training, for the report."""
    save_every: int = Field(0, ge=0, le=LARGEST_COUNT)
    """Steps between checkpoints; 0 saves after the last step only."""
    keep_checkpoints: int = Field(2, ge=1, le=LARGEST_COUNT)
    """The newest ones to keep; with 1 also the one before it, as no step was taken from the newest yet."""
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations rebuilt in the backward pass: none, core attention's, or whole layers'."""


class RunSection(Section):
    dir: str = "runs/run"
    resume: str = "never"
    """`never`, `auto` (the newest good checkpoint of `dir`, or a fresh start), or the path of a checkpoint."""


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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is not valid; the message names the nearest
            valid key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read configuration {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        tree = _read_yaml(text)
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (model:, data:, ...), not a {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)  # impossible dates and deep nesting raise the last two


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without tags that construct objects, and without the same key twice: the first would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    loader = _UniqueKeyLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    names = key.strip().split(".")
    if not equals or len(names) < 2 or not all(names):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. train.steps=100")
    node = tree
    for name in names[:-1]:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {name} is not a section")
    try:
        node[names[-1]] = _read_yaml(value)
    except _YAML_ERRORS:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a tree of sections; see `load_config`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0])) from None


def _explain(problem: Any) -> str:
    """One line for pydantic's first complaint, in this project's words."""
    where = [str(part) for part in problem["loc"] if part != "[key]"]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(where[:-1])
        nearest = difflib.get_close_matches(where[-1], valid, n=1, cutoff=0.0)
        prefix = ".".join([*where[:-1], ""])
        return f"unknown key {name}: did you mean {prefix}{nearest[0]}? (valid: {', '.join(valid)})"
    if problem["type"] == "model_type":
        return f"{name} = {_short.repr(problem['input'])} is not a section: it needs {', '.join(_valid_keys(where))}"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{name} = {_short.repr(problem['input'])} is not valid: {reason[0].lower()}{reason[1:]}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 2


def _valid_keys(section: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for name in section:
        model = model.model_fields[name].annotation  # type: ignore[assignment]  # a section's annotation is its class
    return list(model.model_fields)
