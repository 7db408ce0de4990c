# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong ends as one line with the value and a way out, the documented status, and no run folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
import yaml

from lora_megatron.__main__ import main
from lora_megatron.commands import train as train_command
from lora_megatron.errors import DataError
from tests.commands.runs import Outcome, Tree, attempt, make_corpus, make_tree, names_in, nothing_begun, status_of
from tests.data.manifests import vouch_for
from tests.pool import Pool


class Refused:
    """Runs the command in this process, as `python -m lora_megatron train` would, and reads its one line."""

    def __init__(self, folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.corpus, self.capsys = folder, corpus, capsys
        self.run = folder / "run"

    def __call__(self, status: int, *words: str, **sections: Tree) -> str:
        """Train with `sections`; the status, each of `words` in the one line, and nothing written but status.json."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(make_tree(self.corpus, self.run, **sections)))
        before = self._names()
        self.capsys.readouterr()
        ended = main(["train", str(path)])
        lines = [line for line in self.capsys.readouterr().err.splitlines() if "Warning" not in line]
        assert len(lines) == 1, lines
        assert ended == status, lines[0]
        assert lines[0].startswith("error: ")
        for word in words:
            assert word in lines[0]
        assert before == self._names()
        if (self.run / "status.json").exists():
            recorded = status_of(self.run)
            assert (recorded["state"], recorded["exit_status"]) == ("failed", ended)
            assert recorded["error"] == lines[0].removeprefix("error: ")
            (self.run / "status.json").unlink()
        assert not dist.is_initialized()
        return lines[0]

    def _names(self) -> list[str]:
        return [name for name in names_in(self.run) if name != "status.json"] if self.run.exists() else []


@pytest.fixture
def refused(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(tmp_path, corpus, capsys)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"modle": {"preset": "tiny"}}, ["unknown key modle", "did you mean model?"]),
        ({"model": {"preset": "tinny"}}, ["unknown model.preset 'tinny'", "did you mean tiny?"]),
        ({"model": {"hidden_size": 30}}, ["hidden_size = 30", "num_attention_heads = 4"]),
        ({"model": {"num_query_groups": 3}}, ["num_attention_heads = 4", "num_query_groups = 3"]),
        ({"model": {"vocab_size": 100}}, ["vocab_size = 100", "258"]),
        ({"parallel": {"tensor": 3}}, ["parallel.tensor = 3", "num_attention_heads = 4", "choose one of 1, 2, 4"]),
        ({"parallel": {"tensor": 4}, "model": {"num_query_groups": 2}}, ["num_query_groups = 2", "one of 1, 2"]),
        ({"parallel": {"tensor": 4}, "model": {"ffn_hidden_size": 130}}, ["ffn_hidden_size = 130", "one of 1, 2"]),
        ({"parallel": {"tensor": 2}}, ["world size 1 is not divisible", "2 x 1 x 1", "--nproc-per-node 2"]),
        ({"parallel": {"pipeline": 3}}, ["3 x 1", "num_layers = 4", "choose sizes"]),
        ({"parallel": {"pipeline": 2, "virtual_pipeline": 4}}, ["2 x 4", "num_layers = 4"]),
        ({"parallel": {"virtual_pipeline": 2}}, ["virtual_pipeline = 2 needs parallel.pipeline > 1"]),
        ({"parallel": {"sequence": True}}, ["parallel.sequence needs parallel.tensor > 1"]),
        ({"parallel": {"context": 2}}, ["parallel.context = 2", "set it to 1"]),
        ({"data": {"sequence_length": 64}}, ["sequence_length = 64", "max_position_embeddings = 32", "at most"]),
        ({"data": {"micro_batch_size": 3}}, ["global_batch_size = 4", "3 x 1 = 3", "choose such a multiple"]),
        ({"data": {"train": None}}, ["data.train is not given", "python -m data_prep"]),
        ({"method": {"name": "lorra"}}, ["unknown method.name 'lorra'", "did you mean lora?"]),
        ({"method": {"targets": {"q": 0}}}, ["method.targets.q = 0", "at least 1"]),
        ({"method": {"targets": {"q": -1}}}, ["method.targets.q = -1", "at least 1"]),
        ({"method": {"targets": {"q": 33}}}, ["rank 33 of q", "[32, 32]", "at most 32"]),
        ({"method": {"targets": {"k": 17}}, "model": {"num_query_groups": 2}}, ["rank 17 of k", "[16, 32]"]),
        ({"method": {"targets": {"fc2": 2**20}}}, ["rank 1048576 of fc2", "[32, 128]", "at most 32"]),
        ({"method": {"targets": {"w": 1}}}, ["method.targets.w", "'fc2'"]),
        (
            {"method": {"name": "bitfit"}, "model": {"preset": "tiny-llama", "max_position_embeddings": 32}},
            ["method.name = bitfit", "choose another method"],
        ),
        ({"model": {"position": "rope", "head_dim": 5}}, ["head_dim = 5", "even"]),
        ({"model": {"activation": "swish"}}, ["model.activation = 'swish'", "'silu'"]),
    ],
)
def test_a_configuration_that_cannot_work(refused: Refused, sections: Tree, words: list[str]) -> None:
    refused(2, *words, **sections)


def test_a_run_folder_that_is_in_use_or_a_file(refused: Refused, corpus: Path) -> None:
    refused.run.mkdir()
    note = refused.run / "note.txt"
    note.write_text("mine")
    refused(2, f"run.dir = {refused.run} holds a run already", "run.resume=auto")
    elsewhere = {"dir": str(refused.run), "resume": str(refused.folder / "other/checkpoints/step-00000002")}
    refused(2, "holds a run already", "is not of that run", run=elsewhere)
    assert note.read_text() == "mine"
    refused(2, f"run.dir = {note} is a file", run={"dir": str(note)})
    missing = {"dir": str(refused.run), "resume": str(refused.run / "checkpoints/step-00000009")}
    refused(4, "run.resume = ", "step-00000009", "neither never, nor auto", run=missing)
    refused(4, "run.resume = yess", run={"dir": str(refused.folder / "new"), "resume": "yess"})
    assert not (refused.folder / "new").exists()


def damaged_copy(corpus: Path, folder: Path, fault: str) -> Path:
    """A copy of the corpus in which the training file, or what stands beside it, has one fault."""
    shutil.copytree(corpus, folder)
    path, manifest_path = folder / "train.parquet", folder / "manifest.json"
    kind, _, manifest_says = fault.partition(", manifest ")
    data = path.read_bytes()
    faults = {
        "flipped": data[:40] + bytes([data[40] ^ 4]) + data[41:],
        "truncated": data[:-20],
        "text": b"context,target\n",
    }
    path.write_bytes(faults.get(kind, data))
    if manifest_says == "agrees":
        vouch_for(path)
    if manifest_says == "missing":
        manifest_path.unlink()
    if kind == "other rows":
        manifest = json.loads(manifest_path.read_text())
        manifest["files"]["train.parquet"]["rows"] += 1
        manifest_path.write_text(json.dumps(manifest))
    if kind == "not listed":
        path = path.rename(folder / "more.parquet")
    return path


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("flipped", "differs from the SHA-256"),
        ("truncated", "bytes, manifest.json says"),
        ("text", "bytes, manifest.json says"),
        ("flipped, manifest agrees", "cannot be read as Parquet"),
        ("truncated, manifest agrees", "cannot be read as Parquet"),
        ("text, manifest agrees", "cannot be read as Parquet"),
        ("whole, manifest missing", "prepare the data again with `python -m data_prep`"),
        ("other rows", "manifest.json says 19"),
        ("not listed", "is not listed in the manifest.json"),
    ],
)
@pytest.mark.parametrize("key", ["train", "validation"])
def test_data_that_is_damaged(refused: Refused, corpus: Path, fault: str, word: str, key: str) -> None:
    path = damaged_copy(corpus, refused.folder / "damaged", fault)
    refused(3, str(path.parent), word, data={key: str(path)})


def test_data_that_is_missing_empty_or_of_other_columns(refused: Refused) -> None:
    refused(3, "none.parquet does not exist", data={"train": str(refused.folder / "none.parquet")})
    refused(3, "none.parquet does not exist", data={"validation": str(refused.folder / "none.parquet")})
    empty = refused.folder / "empty.parquet"
    pq.write_table(pa.table({"context": pa.array([], pa.string()), "target": pa.array([], pa.string())}), empty)
    vouch_for(empty)
    refused(3, f"{empty} has no rows", data={"train": str(empty)})
    refused(3, f"{empty} has no rows", data={"validation": str(empty)})
    other = refused.folder / "other.parquet"
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), other)
    vouch_for(other)
    refused(3, "expected context and target", data={"train": str(other)})


def test_a_tokenizer_that_is_missing_or_damaged(refused: Refused) -> None:
    folder = refused.folder / "tokenizer"
    refused(3, f"tokenizer '{folder}' is neither 'bytes' nor a folder", data={"tokenizer": str(folder)})
    folder.mkdir()
    refused(3, f"no tokenizer in {folder}", data={"tokenizer": str(folder)})
    (folder / "tokenizer.json").write_text('{"version": "1.0", "version": "1.0"}')
    refused(3, "key 'version' appears twice", data={"tokenizer": str(folder)})


def test_deepspeed_that_is_not_installed(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    refused(2, "DeepSpeed", "pip install 'lora-megatron[deepspeed]'", optimizer={"sharding": "deepspeed"})


def test_a_failed_run_leaves_this_process_able_to_train(refused: Refused, corpus: Path) -> None:
    refused(3, "does not exist", data={"train": "none.parquet"})
    assert attempt(make_tree(corpus, refused.run, train={"steps": 1})) == Outcome()


def _differ_in_seed(tree: Tree) -> Outcome:
    return attempt({**tree, "base": {"seed": dist.get_rank()}})


def _one_rank_lacks_the_tokenizer(tree: Tree) -> Outcome:
    original = train_command.load_tokenizer

    def load(spec: str) -> Any:
        if dist.get_rank() == 1:
            raise DataError("the tokenizer is not on this machine")
        return original(spec)

    train_command.load_tokenizer = load  # type: ignore[assignment]  # pool workers have no monkeypatch fixture
    try:
        return attempt(tree)
    finally:
        train_command.load_tokenizer = original


def _one_rank_has_other_data(tree: Tree, other: Path) -> Outcome:
    data = {**tree["data"], "train": str(other)}
    original = train_command.open_examples
    train_command.open_examples = lambda path: original(data["train"] if dist.get_rank() == 1 else path)  # type: ignore[assignment]
    try:
        return attempt(tree)
    finally:
        train_command.open_examples = original


def test_ranks_that_do_not_agree_all_say_so(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    tree = make_tree(corpus, tmp_path / "run", parallel={"tensor": 2})
    other = make_corpus(tmp_path / "other", rows=9) / "train.parquet"
    for status, words, outcomes in (
        (2, "the configuration differs between ranks", pool.run(2, _differ_in_seed, tree=tree)),
        (3, "not on this machine (on rank 1)", pool.run(2, _one_rank_lacks_the_tokenizer, tree=tree)),
        (2, "the training data differs between ranks", pool.run(2, _one_rank_has_other_data, tree=tree, other=other)),
    ):
        assert outcomes[0] == outcomes[1]
        assert outcomes[0].status == status
        assert words in outcomes[0].message
    assert nothing_begun(tmp_path / "run")


@pytest.mark.parametrize(
    ("world", "sections", "word"),
    [
        (3, {"parallel": {"tensor": 2}}, "world size 3 is not divisible by parallel.tensor x pipeline x context"),
        (2, {"data": {"global_batch_size": 3}}, "global_batch_size = 3 is not a multiple"),
        (2, {"parallel": {"tensor": 2, "sequence": True}, "data": {"sequence_length": 15}}, "sequence_length = 15"),
        (
            2,
            {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "data": {"global_batch_size": 3}},
            "make data.global_batch_size a multiple of 2",
        ),
    ],
)
def test_layouts_that_do_not_fill_the_world(
    pool: Pool, corpus: Path, tmp_path: Path, world: int, sections: Tree, word: str
) -> None:
    outcomes = pool.run(world, attempt, tree=make_tree(corpus, tmp_path / "run", **sections))
    assert {outcome.status for outcome in outcomes} == {2}
    assert all(word in outcome.message for outcome in outcomes)
    assert nothing_begun(tmp_path / "run")
