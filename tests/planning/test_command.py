# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron plan`: what it prints, what it refuses, and that it needs neither data, GPU nor tokenizer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from lora_megatron.__main__ import main
from lora_megatron.planning.plan import MEMORY_KINDS
from tests.commands.runs import attempt, make_corpus, make_tree
from tests.pool import Pool

GPT3 = "launch/configs/gpt3_175b_plan.yaml"
TINY: dict[str, Any] = {
    "model": {"preset": "tiny", "num_layers": 4},
    "data": {"sequence_length": 64, "global_batch_size": 8, "train": "there/is/none.parquet"},
}
PNG = b"\x89PNG\r\n\x1a\n"


def write(folder: Path, **sections: Any) -> str:
    tree = {**TINY, **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(folder / "config.yaml")


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON object on stdout of a plan that works."""
    assert main(["plan", *arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert isinstance(facts, dict)
    return facts


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one line on stderr of a plan that does not; stdout stays empty."""
    assert main(["plan", *arguments, "--json"]) == status
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == ""
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("chunks", [1, 2])
def test_pipeline_stages_hold_two_outputs_and_a_message_each_way(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, chunks: int
) -> None:
    """However many microbatches are in flight (`parallel.sent_outputs`)."""
    path = write(tmp_path, parallel={"pipeline": 2, "virtual_pipeline": chunks})
    hidden = 64 * 64 * 4  # tokens x width of `tiny` x bytes
    for rank in plan(capsys, path)["ranks"]:
        assert rank["memory"]["communication"] == 4 * hidden


def test_stages_that_copy_hold_slots_and_gradients(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two slots for each neighbour, outside torch's allocator, and of the gradients as many as there are slots."""
    path = write(tmp_path, parallel={"pipeline": 2})
    sends, copies = (plan(capsys, path, f"parallel.pp_comm_copy={value}")["ranks"] for value in ("false", "true"))
    hidden = 64 * 64 * 4
    for before, after in zip(sends, copies, strict=True):
        more = {kind: after["memory"][kind] - bytes_ for kind, bytes_ in before["memory"].items()}
        box = 2 * 2 * hidden + 256
        assert {kind: bytes_ for kind, bytes_ in more.items() if bytes_} == {
            "communication": 2 * hidden,
            "context": box,
            "allocated": 2 * hidden,
            "total": 2 * hidden + box,
        }


def test_the_papers_175b_on_96_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    facts = plan(capsys, GPT3)
    assert time.process_time() - started < 20
    totals, ranks = facts["totals"], facts["ranks"]
    assert totals["trainable_parameters"] == 18_874_368
    assert totals["parameters"] - totals["trainable_parameters"] == 174_604_259_328
    assert totals["adapter_bytes"] == 37_748_736 < totals["adapter_file_bytes"] < 38_000_000
    assert [rank["pipeline_stage"] for rank in ranks] == list(range(12))
    assert [rank["layers"] for rank in ranks] == [list(range(8 * i, 8 * i + 8)) for i in range(12)]
    assert {rank["count"] for rank in ranks} == {8}
    # A is on every tensor rank of a stage, B is cut: 8 layers x 2 pairs x 4 x (12288 + 12288 / 8).
    assert {rank["trainable_parameters"] for rank in ranks} == {8 * 2 * 4 * (12288 + 1536)}
    for kind in MEMORY_KINDS:
        assert totals["memory"][kind] == sum(8 * rank["memory"][kind] for rank in ranks)
    for rank in ranks:
        assert sum(rank["memory"][kind] for kind in MEMORY_KINDS) == rank["memory"]["total"]
    full = facts["full_fine_tuning"]
    assert full["totals"]["trainable_parameters"] == full["totals"]["parameters"] == 174_604_259_328
    assert facts["fits"] is True
    assert full["totals"]["memory"]["optimizer"] == pytest.approx(12 * 174.6e9, rel=0.01)
    assert facts["flops"]["hardware_per_token"] / 1e12 == pytest.approx(1.068, abs=1e-3)
    assert not dist.is_initialized(), "the stand-in world is left"


def test_tables_and_chart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chart = tmp_path / "plan.png"
    assert main(["plan", write(tmp_path), "parallel.pipeline=2", "--png", str(chart)]) == 0
    text = capsys.readouterr().out
    for word in ("lora", "full fine-tuning", "grads", "It fits: stage", "expected tokens/s per GPU", "0-1", "2-3"):
        assert word in text
    assert chart.read_bytes().startswith(PNG)


def test_full_fine_tuning_is_not_compared_with_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", write(tmp_path, method={"name": "full"})]) == 0
    text = capsys.readouterr().out
    assert "full fine-tuning" not in text
    assert text.count("planned memory of a rank") == 1


def test_replicas_share_sharded_state(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = write(tmp_path, optimizer={"sharding": "megatron"})
    one, four = plan(capsys, config), plan(capsys, config, "--data-parallel", "4")
    assert four["layout"]["world_size"] == four["ranks"][0]["count"] == 4
    share = four["ranks"][0]["memory"]["optimizer"] / one["ranks"][0]["memory"]["optimizer"]
    assert share == pytest.approx(0.25, rel=0.1)


def test_ranking(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = write(tmp_path)
    facts = plan(capsys, config, "--gpus", "4", "--gpu-memory", "2")
    ranking = facts["ranking"]
    rates = [entry["speed"]["tokens_per_second"] for entry in ranking]
    assert rates == sorted(rates, reverse=True)
    assert len(rates) > 5
    for entry in ranking:
        assert entry["tensor"] * entry["pipeline"] * entry["data"] == 4
        assert entry["needed_bytes"] <= 2e9
    best = {key: ranking[0][key] for key in ("tensor", "pipeline", "data", "recompute", "micro_batch_size")}
    assert best == {key: facts["layout"][key] for key in best}, "the plan is the best layout's"
    assert main(["plan", config, "--gpus", "4", "--gpu-memory", "2"]) == 0
    assert "Layouts of 4 GPUs that fit into 2 GB" in capsys.readouterr().out


def test_what_does_not_fit_names_the_nearest_layout_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    facts = plan(capsys, GPT3, "parallel.pipeline=1", "train.recompute=none", "data.micro_batch_size=8")
    assert facts["fits"] is False
    assert facts["nearest_fit"]["world_size"] == 8
    assert len(facts["nearest_fit"]["changes"]) == 1
    assert facts["nearest_fit"]["needed_bytes"] <= 80e9 < facts["ranks"][0]["memory"]["total"]


def test_too_few_gpus_name_the_fewest_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, GPT3, "--gpus", "4", "--gpu-memory", "80")
    assert "no layout of --gpus 4 with 80 GB each" in line
    assert "the fewest GPUs that do are 6 with parallel.tensor=2 parallel.pipeline=3" in line


@pytest.mark.slow
def test_what_gpus_share_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """One rank's tokens in one box, all ranks' in the other, outside torch's allocator; and beside them what adapters
    make of them, as wide as in the layer of this rank that has most."""
    config = "launch/configs/gpt3_175b_8gpu.yaml"

    def totals(*changes: str) -> dict[str, int]:
        found: dict[str, int] = plan(capsys, config, *changes)["totals"]["memory"]
        return found

    shared, alone = (totals(f"parallel.tp_comm_overlap={value}") for value in ("true", "false"))
    columns = 12288 + 4 + 4  # of q and v together
    assert shared["context"] - alone["context"] == 8 * (1 + 8) * (8 * 2048 // 8) * columns * 2  # on 8 ranks
    more = totals("parallel.tp_comm_overlap=true", "method.layers={'48': {fc2: 16}}")
    assert more["context"] - shared["context"] == 8 * (1 + 8) * (8 * 2048 // 8) * (16 - 8) * 2
    stages = "parallel.tensor=4", "parallel.pipeline=2", "method.layers={'48': {fc2: 16}}"
    shared_by_four, apart = (totals(*stages, f"parallel.tp_comm_overlap={value}") for value in ("true", "false"))
    both = 2 * 12288 + 8 + 16  # the second stage begins with layer 48
    assert shared_by_four["context"] - apart["context"] == 4 * (1 + 4) * (8 * 2048 // 4) * both * 2
    assert {kind for kind in shared if shared[kind] != alone[kind]} == {"context", "total"}


def test_a_graph_keeps_what_the_optimizer_could_have_used(capsys: pytest.CaptureFixture[str]) -> None:
    config = "launch/configs/gpt3_175b_8gpu.yaml"
    graph, eager = (
        plan(capsys, config, f"train.cuda_graph={value}")["totals"]["memory"] for value in ("true", "false")
    )
    stepping = eager["optimizer"] // 12 * 4  # one temporary of fp32 beside masters and moments
    inputs = 8 * 128 * 2048 * (3 * 8 + 4)  # of the whole batch on each of 8 ranks
    aside = 8 * 32 * 2**20  # cuBLAS's workspace for one stream more
    assert graph["workspace"] - eager["workspace"] == stepping + inputs + aside
    assert {kind for kind in graph if graph[kind] != eager[kind]} == {"workspace", "allocated", "total"} & set(graph)


def test_packed_weights_are_planned_and_trained(capsys: pytest.CaptureFixture[str], tmp_path: Path, pool: Pool) -> None:
    bf16 = plan(capsys, "launch/configs/gpt3_175b_1gpu.yaml", "base.storage=bf16", "base.gemm=null")
    nf4 = plan(capsys, "launch/configs/gpt3_175b_1gpu.yaml", "--gpu", "h200")
    assert nf4["totals"]["memory"]["frozen_weights"] / 1e9 == pytest.approx(91, abs=1.5)
    assert bf16["totals"]["memory"]["frozen_weights"] / 1e9 == pytest.approx(349, abs=1.5)
    tree = make_tree(make_corpus(tmp_path / "data"), tmp_path / "run", base={"storage": "fp8"})
    (outcome,) = pool.run(1, attempt, tree=tree)
    assert outcome.status == 0, outcome.message
    planned = plan(capsys, str(tmp_path / "run" / "config.yaml"))
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    memory = planned["totals"]["memory"]
    assert memory["frozen_weights"] + memory["trained_weights"] == report["memory_by_rank"][0]["weights"]


def test_the_file_of_an_adapter_is_planned_to_the_byte(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pool: Pool
) -> None:
    tree = make_tree(make_corpus(tmp_path / "data"), tmp_path / "run", train={"steps": 1, "save_every": 0})
    (outcome,) = pool.run(1, attempt, tree=tree)
    assert outcome.status == 0, outcome.message
    facts = plan(capsys, str(tmp_path / "run" / "config.yaml"))
    assert (tmp_path / "run/adapter/adapter_model.safetensors").stat().st_size == facts["totals"]["adapter_file_bytes"]


def test_a_stored_base_tells_its_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path, pool: Pool) -> None:
    """The `model/` folder of a run, without its tokenizer or data."""
    tree = make_tree(
        make_corpus(tmp_path / "data"), tmp_path / "run", method={"name": "full", "dropout": 0.0}, train={"steps": 1}
    )
    (outcome,) = pool.run(1, attempt, tree=tree)
    assert outcome.status == 0, outcome.message
    model = tmp_path / "run" / "model"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"base": {"weights": str(model)}, "data": {
        "sequence_length": 32, "tokenizer": "not/here"}}), encoding="utf-8")  # fmt: skip
    facts = plan(capsys, str(tmp_path / "config.yaml"))
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert facts["full_fine_tuning"]["totals"]["adapter_file_bytes"] == pytest.approx(stored, rel=0.01)


def test_a_tokenizer_that_is_not_here_stops_nobody_who_knows_the_vocabulary(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = {**TINY["data"], "tokenizer": "not/here"}
    known = plan(capsys, write(tmp_path, model={"preset": "gpt2-small"}, data=data))
    assert known["full_fine_tuning"]["totals"]["parameters"] == 124_439_808
    given = plan(capsys, write(tmp_path, model={"preset": "tiny", "vocab_size": 500}, data=data))
    assert given["totals"]["parameters"] > 0
    assert "not/here" in refused(capsys, write(tmp_path, data=data), status=3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0"], "--gpus = 0: give a number from 1"),
        (["--gpus=-8"], "--gpus = -8"),
        (["--gpus", "4", "--data-parallel", "2"], "leave out --data-parallel"),
        (["--data-parallel", "0"], "--data-parallel = 0"),
        (["--gpu", "h10"], "unknown --gpu 'h10': did you mean h100?"),
        (["--gpu-memory=-80"], "--gpu-memory = -80 GB is not the memory of a GPU"),
        (["--gpu-memory", "nan"], "--gpu-memory = nan"),
        (["--gpu-memory", "inf"], "--gpu-memory = inf"),
        (["--gpu-memory", "0.1"], "CUDA's context alone takes"),
        (["--gpu-memory", "1e9"], "--gpu-memory = 1e+09"),
        (["--gpus", "1", "--gpu-memory", "0.6"], "no layout of --gpus 1 with 0.6 GB each"),
        (["data.sequence_length=100000", "--gpus", "3"], "longer than model.max_position_embeddings"),
        (["--data-parallel", "3"], "not a multiple of micro_batch_size x data-parallel"),
        (["parallel.tensor=3"], "parallel.tensor = 3 does not divide"),
        (["parallel.pipeline=3"], "does not divide model.num_layers = 4"),
        (["parallel.tensr=2"], "did you mean parallel.tensor?"),
        (["--png", "no/such/folder/plan.png"], "cannot write --png"),
        (["base.weights=no/such/model"], "is neither random nor a folder"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    status = 4 if "base.weights" in arguments[0] else 2
    assert words in refused(capsys, write(tmp_path), *arguments, status=status)


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read configuration no.yaml" in refused(capsys, "no.yaml")
