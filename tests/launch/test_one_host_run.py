# SPDX-License-Identifier: Apache-2.0
"""launch/one_host.py and its processes that stay, on two gloo ranks: through to the report, and what may go wrong."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import one_host, one_host_proofs
from launch.one_host_proofs import Proof, adapter_facts, resume_facts
from launch.warm_ranks import WarmRanks
from tests.launch.slurm_cluster import await_

TINY = ["model.preset=tiny", "model.num_layers=2", "model.vocab_size=300", "data.sequence_length=32"]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the surroundings' world; one thread a rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_session_runs_through_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--gpus", "2", "--out", str(out), "--budget", "2000", "--micro-batch", "2", "--proof-steps", "30"]
    assert one_host.main([*TINY, *words, "--parts", "bf16-tp2,adapter,resume"]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    parts = {part["part"]: part for part in report["parts"]}
    assert {name: (part["state"], part["why"]) for name, part in parts.items()} == dict.fromkeys(
        ("bf16-tp2", "adapter", "resume"), ("done", "")
    )
    assert report["complete"]
    (row,) = parts["bf16-tp2"]["rows"]
    assert (row["layers"], row["steps"], row["communication"]) == (2, 6, []), "a CPU has no kernels to look at"
    (value,) = parts["bf16-tp2"]["values"]
    assert value["value"] == row["tokens_per_second_per_rank"] > 0
    assert row["memory_by_rank"][1]["weights"] == row["planned_by_rank"][1]["weights"]
    adapter, resumed = parts["adapter"]["facts"], parts["resume"]["facts"]
    assert adapter["holds"]
    assert adapter["same_bytes"]
    assert adapter["bytes"] == (out / "proofs" / "reloaded" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert adapter["difference"] < 1e-3 < adapter["change"], "the adapter matters, and is the same elsewhere"
    assert resumed["holds"]
    assert resumed["same_bytes"]
    assert (resumed["equal_steps"], resumed["steps"]) == (30, 30)
    assert 15 <= resumed["resumed_at"][0] < 30
    assert (out / "report.md").read_text(encoding="utf-8").strip() in capsys.readouterr().out


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[WarmRanks]:
    ranks = WarmRanks(tmp_path / "ranks", processes=2)
    yield ranks
    ranks.stop()


def bench(out: Path, *words: str) -> list[str]:
    """A bench of a second."""
    config = "launch/configs/tiny.yaml"
    short = [
        "parallel.tensor=2",
        "data.sequence_length=16",
        "model.vocab_size=300",
        "--methods",
        "lora",
        "--no-ceiling",
    ]
    return ["bench", config, *short, "--steps", "1", "--warm-up", "0", "--visits", "1", "--out", str(out), *words]


def workers_of(ranks: WarmRanks) -> list[int]:
    agent = ranks._torchrun.pid if ranks._torchrun else 0
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


@pytest.mark.slow  # a minute of starting processes; the session above runs through the same ranks
@pytest.mark.timeout(600)
def test_ranks_outlive_an_error_and_come_back_after_a_loss(ranks: WarmRanks, tmp_path: Path) -> None:
    log = tmp_path / "log"
    wrong = ranks.run(bench(tmp_path / "a", "--steps", "0"), log=log, limit=300)
    assert wrong.why == "ended with status 2: error: --steps 0: at least 1 step has to be measured"
    before = workers_of(ranks)
    for folder in ("b", "c"):
        assert ranks.run(bench(tmp_path / folder), log=log, limit=300).why == ""
        assert json.loads((tmp_path / folder / "report.json").read_text(encoding="utf-8"))["world_size"] == 2
    assert workers_of(ranks) == before, "the same processes ran all of them"

    os.kill(before[1], signal.SIGKILL)
    lost = ranks.run(bench(tmp_path / "d"), log=log, limit=300)
    assert lost.why.startswith("a rank was lost (torchrun ended with status 1)")
    await_(lambda: not any(Path(f"/proc/{pid}/stat").exists() for pid in before), "nothing of them is left")

    late = ranks.run(bench(tmp_path / "e"), log=log, limit=0.2)
    assert late.why == "took longer than its time and was ended"
    assert ranks.run(bench(tmp_path / "f"), log=log, limit=300).why == "", "after both"


def lines(path: Path, *entries: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


@pytest.fixture
def proof(tmp_path: Path) -> Proof:
    """Runs as they are left when all is well: losses from 5.0 down, equal adapters."""
    proof = Proof(tmp_path, "config.yaml", [], gpus=4, layers=8, steps=2, micro_batch=1)
    for name, held_out in (("uninterrupted", [5.5, 5.0]), ("reloaded", [5.001]), ("stopped", [5.5, 5.0])):
        run = proof.run_folder(name)
        lines(run / "evaluations.jsonl", *({"held_out_loss": loss} for loss in held_out))
        lines(run / "metrics.jsonl", {"step": 1, "loss": 5.2}, {"step": 2, "loss": 5.1})
        (run / "adapter").mkdir()
        (run / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter")
    (tmp_path / "log").write_text("resumed from x/step-00000001 at step 1\n", encoding="utf-8")
    return proof


def test_what_a_proof_says_is_read_off_its_runs(proof: Proof, tmp_path: Path) -> None:
    found = adapter_facts(proof)
    assert (found["bytes"], found["same_bytes"], found["holds"]) == (7, True, True)
    assert found["difference"] == pytest.approx(0.0002)
    assert (found["layout"], found["other_layout"]) == ("TP=4", "TP=2 x PP=2")
    assert resume_facts(proof, tmp_path / "log")["holds"]
    assert resume_facts(proof, tmp_path / "log")["equal_steps"] == 2


def test_another_loss_or_an_adapter_that_changes_nothing_proves_nothing(proof: Proof) -> None:
    lines(proof.run_folder("reloaded") / "evaluations.jsonl", {"held_out_loss": 5.03})
    assert not adapter_facts(proof)["holds"], "0.6% away"
    before_and_after = proof.run_folder("uninterrupted") / "evaluations.jsonl"
    lines(before_and_after, {"held_out_loss": 5.01}, {"held_out_loss": 5.0})
    lines(proof.run_folder("reloaded") / "evaluations.jsonl", {"held_out_loss": 5.0})
    assert adapter_facts(proof)["holds"]
    lines(proof.run_folder("reloaded") / "evaluations.jsonl", {"held_out_loss": 5.01})
    assert not adapter_facts(proof)["holds"], "within a rounding, but that of a base without adapter"
    lines(before_and_after, {"held_out_loss": 5.0}, {"held_out_loss": 5.0})
    lines(proof.run_folder("reloaded") / "evaluations.jsonl", {"held_out_loss": 5.0})
    assert not adapter_facts(proof)["holds"], "an adapter that changed nothing"
    (proof.run_folder("reloaded") / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    assert not adapter_facts(proof)["same_bytes"]


def test_a_resumed_run_with_another_or_no_loss_does_not_hold(proof: Proof, tmp_path: Path) -> None:
    log, metrics = tmp_path / "log", proof.run_folder("stopped") / "metrics.jsonl"
    lines(metrics, {"step": 1, "loss": 5.2}, {"step": 2, "loss": 5.2})
    assert not resume_facts(proof, log)["holds"]
    assert resume_facts(proof, log)["equal_steps"] == 1
    lines(metrics, {"step": 1, "loss": 5.2})
    assert not resume_facts(proof, log)["holds"]
    lines(metrics, {"step": 1, "loss": 5.2}, {"step": 2, "loss": 5.1})
    assert resume_facts(proof, log)["holds"]
    log.write_text("", encoding="utf-8")
    assert not resume_facts(proof, log)["holds"], "nothing was resumed"


@pytest.mark.parametrize(
    ("statuses", "told"),
    [
        ([75, 0], ""),
        ([0], "the run was over before it could be stopped: give it more --proof-steps"),
        ([6], "the run that was told to stop ended with status 6, not 75: error: gone"),
        ([None], "took longer than its time and was ended: error: gone"),
        ([75, 4], "the run that was started again ended with status 4: error: gone"),
        ([75, None], "the run that was started again took longer than its time: error: gone"),
    ],
)
def test_why_a_run_could_not_be_stopped_and_resumed(
    proof: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: list[int | None], told: str
) -> None:
    (tmp_path / "log").write_text("step 1\nerror: gone\nerror: a consequence\nlast line\n", encoding="utf-8")
    started: list[list[str]] = []

    def pretend(words: list[str], *_: Any, **__: Any) -> int | None:
        started.append(words)
        return statuses[len(started) - 1]

    monkeypatch.setattr(one_host_proofs, "_launch", pretend)
    assert one_host_proofs.stop_and_resume(proof, tmp_path / "log", limit=1) == told
    assert [words[-1] == "run.resume=auto" for words in started] == [False, True][: len(statuses)]
