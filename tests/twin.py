# SPDX-License-Identifier: Apache-2.0
"""The experiment every parallel layout must repeat: a tiny GPT, three AdamW steps, everything gathered.

`train_twin` runs inside a world of any size and returns, on rank 0, whole tensors under global names: initial values,
the loss without dropout, then per step loss, trained gradients, their norm and parameters; in a world of one, the twin.
`tests.comparison` holds two records against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from lora_megatron.config import MethodSection, ModelSection, OptimizerSection
from lora_megatron.layers.lora import seed_from
from lora_megatron.layers.sharding import shard_of
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.initialise import initialise_base
from lora_megatron.model.names import named_parameters
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.optimizer import wrap_ddp
from lora_megatron.training.step import run_microbatches

VOCABULARY = 100
Record = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What is trained and on what layout; the defaults adapt every projection, each at a rank of its own."""

    layout: Layout = field(default_factory=Layout)
    model: dict[str, Any] = field(default_factory=lambda: {"preset": "tiny", "num_layers": 4})
    method: dict[str, Any] = field(
        default_factory=lambda: {"targets": {"q": 4, "k": 1, "v": 2, "o": 3, "fc1": 2, "fc2": 5}}
    )
    # Adam divides by |g| + eps: with eps far above the rounding of g, a step is as exact as its gradient.
    optimizer: dict[str, Any] = field(
        default_factory=lambda: {"lr": 2e-3, "weight_decay": 0.1, "clip_grad": 0.5, "eps": 1e-4}
    )
    precision: str = "fp32"
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ("core_attn",)
    recompute_layers: int | None = None
    recompute_unit: int = 1
    storage: StorageFormat | None = None
    head: StorageFormat | None = None
    dropout: float = 0.0
    label_smoothing: float = 0.0
    tp_comm_overlap: bool = False
    pp_comm_copy: bool = False
    transposes_kept: int = 0
    transposes_in_host: bool = False
    steps: int = 3
    sequence_length: int = 16
    micro_batch_size: int = 1
    global_batch_size: int = 4
    packing: bool = False
    resume_at: int = 0
    """Before this step, move the optimizer's state into a model and an optimizer built anew; 0 never does."""

    def with_layout(self, **layout: Any) -> Experiment:
        return replace(self, layout=Layout(**layout))


def microbatch(experiment: Experiment, first: int) -> dict[str, Any]:
    """Samples first .. first + b - 1 of an endless random stream, a function of the sample index alone."""
    rows = []
    for sample in range(first, first + experiment.micro_batch_size):
        generator = torch.Generator().manual_seed(seed_from("sample", sample))
        rows.append(torch.randint(0, VOCABULARY, (experiment.sequence_length + 1,), generator=generator))
    ids = torch.stack(rows)
    length = experiment.sequence_length
    mask = torch.ones(len(rows), length)
    for row, sample in enumerate(range(first, first + len(rows))):
        mask[row, : 3 + sample % 5] = 0  # a context of its own length for every sample
    attention_mask = None
    positions = torch.arange(length).expand(len(rows), length)
    if experiment.packing:
        segment = (torch.arange(length) >= length // 2).long()
        positions = (torch.arange(length) % (length // 2)).expand(len(rows), length)
        visible = (segment[:, None] == segment[None, :]) & torch.ones(length, length).tril().bool()
        attention_mask = (~visible).expand(len(rows), 1, length, length)
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "loss_mask": mask,
        "position_ids": positions,
        "attention_mask": attention_mask,
        "first_sample": first,
    }


def build_chunks(experiment: Experiment) -> tuple[list[Any], Record | None]:
    """Chunks with base weights and randomised B (B = 0 hides a wrong dA until the second step).

    Also the values as the layers were born, before B is randomised.
    """
    shape = resolve_shape(ModelSection(**experiment.model), tokenizer_vocab_size=VOCABULARY)
    method = choose_method(MethodSection(**experiment.method), num_layers=shape.num_layers)
    options = BuildOptions(
        experiment.precision,
        experiment.recompute,
        experiment.dropout,
        adapter_seed=7,
        storage=experiment.storage,
        head=experiment.head,
        recompute_modules=experiment.recompute_modules,
        recompute_layers=experiment.recompute_layers,
        recompute_unit=experiment.recompute_unit,
        label_smoothing=experiment.label_smoothing,
        tp_comm_overlap=experiment.tp_comm_overlap,
        pp_comm_copy=experiment.pp_comm_copy,
        transposes_kept=experiment.transposes_kept,
        transposes_in_host=experiment.transposes_in_host,
    )
    chunks = build(shape, method, experiment.layout, options)
    initialise_base(chunks, seed=3, num_layers=shape.num_layers)
    born, _ = gather(chunks, "value")
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for named in named_parameters(chunks):
            if named.name.endswith(("lora_B", ".bias")):
                shard = shard_of(named.parameter)
                full_shape = shard.full_shape(named.parameter.shape, size)
                generator = torch.Generator().manual_seed(seed_from("B", named.name))
                full = torch.randn(full_shape, generator=generator) * 0.1
                named.parameter.copy_(shard.part(full, full_shape, rank, size))
    return chunks, born


def gather(chunks: list[Any], what: str, tokens: int = 1) -> tuple[Record | None, list[str]]:
    """Whole trained tensors (`value` or `grad`) under global names and which replicas disagree; both on rank 0.

    tokens: of a loss of whose sum the gradients are, to have those of its mean.
    """
    mine = {}
    for named in named_parameters(chunks):
        if named.parameter.requires_grad:
            value = named.parameter.detach() if what == "value" else named.parameter.main_grad / tokens
            name = f"{named.name} (copy)" if named.is_copy else named.name
            mine[name] = (shard_of(named.parameter), value.float().cpu().numpy())  # tensors are slow to pickle
    everyone: list[Any] | None = None if dist.get_rank() else [None] * dist.get_world_size()
    cut = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    dist.gather_object((cut, mine), everyone, dst=0)
    if everyone is None:
        return None, []
    parts: dict[str, list[torch.Tensor | None]] = {}
    shards, complaints = {}, []
    for (rank, size), theirs in everyone:
        for name, (shard, array) in theirs.items():
            shards[name], value = shard, torch.from_numpy(array)
            slots = parts.setdefault(name, [None] * size)
            twin = slots[rank] if shard.axis is not None else next((s for s in slots if s is not None), None)
            if twin is not None and _differ(value, twin):
                complaints.append(f"{what} of {name}: not replicated")
            slots[rank] = value
    whole = {name: shards[name].join(slots).clone() for name, slots in parts.items()}
    return whole, complaints


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-6 * float(b.abs().max()) + 1e-12


def own_batches(experiment: Experiment, step: int) -> list[dict[str, Any]]:
    """This data-parallel rank's microbatches of a step."""
    data_rank, data_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    b = experiment.micro_batch_size
    first = step * experiment.global_batch_size
    count = experiment.global_batch_size // (b * data_size)
    return [microbatch(experiment, first + (m * data_size + data_rank) * b) for m in range(count)]


class Run:
    """One model, its DDP wrap and its optimizer."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.section = experiment, OptimizerSection(**experiment.optimizer)
        self.chunks, self.born = build_chunks(experiment)
        self.ddp = wrap_ddp(self.chunks, sharding=self.section.sharding, precision=experiment.precision)
        self.optimizer = choose_optimizer(self.ddp, self.section, precision=experiment.precision)
        self.optimizer.refresh_master()

    @property
    def names(self) -> dict[torch.nn.Parameter, str]:
        """Trained parameters, copies of a tied embedding under a name of their own."""
        return {
            n.parameter: f"{n.name} (copy)" if n.is_copy else n.name
            for n in named_parameters(self.chunks)
            if n.parameter.requires_grad
        }

    def evaluate(self) -> float:
        """Loss of the first global batch, dropout off."""
        for ddp in self.ddp:
            ddp.eval()
        loss = run_microbatches(self.ddp, own_batches(self.experiment, 0), forward_only=True)
        for ddp in self.ddp:
            ddp.train()
        return loss.mean

    def resumed(self, steps_done: int) -> Run:
        """The optimizer's state, and nothing else, moved into a model and an optimizer built anew."""
        state = {name: tensor.clone() for name, tensor in self.optimizer.named_state(self.names)}
        fresh = Run(self.experiment)
        fresh.optimizer.load_named_state(fresh.names, state.__getitem__, steps_done)
        return fresh


def check_frozen_costs_nothing(run: Run) -> None:
    """Frozen parameters have no gradient, no gradient buffer, and no place in the optimizer; trained ones have."""
    in_buffers = {parameter for ddp in run.ddp for buffer in ddp.buffers for parameter in buffer.params}
    for named in named_parameters(run.chunks):
        if named.parameter.requires_grad:
            assert named.parameter in in_buffers, f"{named.name} is trained and has no gradient buffer"
            assert named.parameter.main_grad.dtype == torch.float32
        else:
            assert named.parameter not in in_buffers, f"{named.name} is frozen and has a gradient buffer"
            assert named.parameter.grad is None
            assert getattr(named.parameter, "main_grad", None) is None


def train_twin(experiment: Experiment) -> Record | None:
    """The record of a run, on rank 0."""
    if not mpu.is_initialized():
        build_mesh(experiment.layout, seed=1, timeout_minutes=2)
    run = Run(experiment)
    record: Record = {"born": run.born, "complaints": [], "eval": run.evaluate()}
    record |= {"loss": [], "norm": [], "grads": [], "values": []}
    for step in range(experiment.steps):
        if step and step == experiment.resume_at:
            run = run.resumed(step)
        run.optimizer.zero_grad()
        loss = run_microbatches(run.ddp, own_batches(experiment, step))
        record["loss"].append(loss.mean)
        if run.section.sharding != "megatron":  # reduce-scattered gradients are whole on no rank
            _note(record, "grads", gather(run.chunks, "grad", loss.tokens))
        run.optimizer.set_lr(run.section.lr)
        record["norm"].append(run.optimizer.step(loss.tokens))
        _note(record, "values", gather(run.chunks, "value"))
    check_frozen_costs_nothing(run)
    state_bytes: list[Any] = [None] * dist.get_world_size()
    trained_bytes = sum(4 * parameter.numel() for parameter in run.names)
    dist.all_gather_object(state_bytes, (run.optimizer.state_bytes(), trained_bytes))
    record["state_bytes"] = state_bytes  # per rank: of the optimizer, of one fp32 copy of what this rank trains
    return record if dist.get_rank() == 0 else None


def train_twins(experiments: list[Experiment]) -> list[Record | None]:
    """Several runs in one world: they share the mesh, which takes longer to build than a run takes."""
    cuts = {replace(experiment.layout, sequence=False) for experiment in experiments}
    assert len(cuts) == 1, "one mesh, one cut"
    return [train_twin(experiment) for experiment in experiments]


def _note(record: Record, kind: str, gathered: tuple[Record | None, list[str]]) -> None:
    record[kind].append(gathered[0])
    record["complaints"] += gathered[1]
