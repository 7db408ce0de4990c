# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong with `generate` and `evaluate`: one line, the documented status, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from lora_megatron.__main__ import main
from lora_megatron.commands.run_lock import RunLock
from tests.evaluation.commands import POSITIONS, save_config, save_rows
from tests.evaluation.conftest import Reader

TOO_LONG = "x" * POSITIONS  # and a line end


class Refused:
    """Runs a command in this process and reads its one line."""

    def __init__(self, files: Reader, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.files, self.folder, self.capsys = files, folder, capsys
        self.out = folder / "out"

    def evaluate(self, status: int, says: str, *words: str, adapter: Path | None = None) -> None:
        """Words of the command line win over those before."""
        common = ["--task", "text", "--data", str(self.files.data), "--out", str(self.out)]
        common += ["--adapter", str(adapter or self.files.adapter)]
        self._check(status, says, ["evaluate", str(self.files.config), *common, *words])

    def generate(self, status: int, says: str, *words: str) -> None:
        self._check(status, says, ["generate", str(self.files.config), *words])

    def _check(self, status: int, says: str, command: list[str]) -> None:
        before = sorted(self.folder.rglob("*"))
        self.capsys.readouterr()
        ended = main(command)
        lines = [line for line in self.capsys.readouterr().err.splitlines() if "Warning" not in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert says in lines[0]
        assert ended == status
        assert sorted(self.folder.rglob("*")) == before
        assert not dist.is_initialized()


@pytest.fixture
def refused(reader: Callable[[str], Reader], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(reader("gpt2"), tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--beams", "0"], "--beams 0 cannot be: give 1 to 1000"),
        (["--beams", "200"], "--beams 200 cannot be: a vocabulary of 257 has at most 128"),
        (["--beams", "4", "--sample"], "--sample and --beams 4: choose one of them"),
        (["--temperature", "0.5"], "--temperature 0.5 says nothing in greedy decoding: add --sample"),
        (["--length-penalty", "0.5"], "--length-penalty 0.5 says nothing in greedy decoding: add --beams 2 or more"),
        (["--task", "e2e", "--beams", "1", "--no-early-stopping"], "--early-stopping False says nothing in greedy"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 cannot be"),
        (["--batch-size", "0"], "--batch-size 0 cannot be: give 1 or more"),
        (["--limit", "0"], "--limit 0 cannot be: give 1 or more"),
        (["--bootstrap", "-1"], "--bootstrap -1 cannot be: give 0 to 100,000"),
        (["--task", "e2f"], "--task e2f is not known: choose one of wikisql, mnli"),
        (["parallel.tensor=2"], "world size 1 is not divisible by parallel.tensor"),
        (["--split", "test"], "--split test with --data"),
    ],
)
def test_flags_that_cannot_work(refused: Refused, words: list[str], says: str) -> None:
    refused.evaluate(2, says, *words)


def test_adapters_that_are_none_or_another_base_s(refused: Refused, reader: Callable[[str], Reader]) -> None:
    refused.evaluate(4, "is not the folder of an adapter: give the folder `adapter` of a run", adapter=refused.folder)
    run = refused.files.adapter.parent
    refused.evaluate(4, f"did you mean {refused.files.adapter}?", adapter=run)
    refused.evaluate(4, "was trained on another base", adapter=reader("llama").adapter)
    peft = refused.folder / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    refused.evaluate(4, "`lora-megatron import` makes one", adapter=peft)


def test_data_that_is_missing_or_too_long(refused: Refused) -> None:
    nowhere = refused.folder / "nowhere.parquet"
    refused.evaluate(3, f"{nowhere} does not exist", "--data", str(nowhere))
    refused.evaluate(3, f"{refused.files.data.parent / 'dev.parquet'} does not exist", "--split", "dev",
                     "--data", str(refused.files.data.parent))  # fmt: skip
    rows = save_rows(refused.folder / "rows", [("short", ["a"]), (TOO_LONG, ["b"])])
    says = f"row row-1 has a prompt of {POSITIONS + 1} tokens, and beside an answer {POSITIONS} of the model's"
    refused.evaluate(3, says, "--data", str(rows))
    longest = POSITIONS + 1 - len("contradiction") - 1  # the end token is predicted only
    rows = save_rows(refused.folder / "labels", [("x" * longest, ["neutral"])])
    refused.evaluate(3, f"and beside an answer {longest} of the", "--data", str(rows), "--task", "mnli")
    config = save_config(refused.folder / "c.yaml", refused.files.base)
    refused._check(2, "no rows to evaluate", ["evaluate", str(config), "--task", "text", "--out", str(refused.out)])


def test_a_prompt_that_is_too_long_may_lose_its_beginning(refused: Refused) -> None:
    rows = save_rows(refused.folder / "rows", [(TOO_LONG, ["neutral"])])
    command = ["evaluate", str(refused.files.config), "--data", str(rows), "--cut-prompts", "--bootstrap", "0"]
    for task in ("text", "mnli"):
        assert main([*command, "--task", task, "--out", str(refused.folder / task)]) == 0
        assert (refused.folder / task / "scores.json").exists()


def test_a_folder_that_is_not_an_evaluation_s(refused: Refused) -> None:
    refused.evaluate(2, "is a file: choose a folder", "--out", str(refused.files.config))
    run = refused.folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {}")
    refused.evaluate(2, f"--out {run} holds config.yaml and is no evaluation's", "--out", str(run))
    damaged = refused.folder / "damaged"
    damaged.mkdir()
    (damaged / "evaluation.json").write_text("{")
    refused.evaluate(4, "evaluation.json", "--out", str(damaged))


def test_a_folder_in_use(refused: Refused) -> None:
    with RunLock(refused.out):
        refused.evaluate(2, f"--out = {refused.out} is in use by process")
    refused.out.rmdir()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "", "is empty: put a prompt in each line"),
        ("p.txt", "one\n\nthree\n", "line 2 is empty"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 is no object with a text under context or prompt"),
        ("p.jsonl", "[" * 100_000 + "\n", "line 1 is no object"),
    ],
)
def test_prompts_that_cannot_be_read(refused: Refused, name: str, content: str | bytes, says: str) -> None:
    path = refused.folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused.generate(3, f"{says}", "--prompts", str(path))


def test_wrong_words_of_generate(refused: Refused) -> None:
    refused.generate(2, "give --prompt TEXT (once or more), or --prompts FILE, and not both")
    refused.generate(2, "give --prompt TEXT", "--prompt", "a", "--prompts", "file")
    refused.generate(3, "cannot read prompts from nowhere: No such file", "--prompts", "nowhere")
    refused.generate(3, f"row 0 has a prompt of {POSITIONS + 1} tokens", "--prompt", TOO_LONG)
    refused.generate(2, "give the name of a file in a folder that exists", "--prompt", "a", "--out", "/nowhere/file")


def test_a_model_whose_logits_are_not_finite(
    reader: Callable[[str], Reader], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_megatron.evaluation.decoder import CachedDecoder

    whole = CachedDecoder._whole
    monkeypatch.setattr(CachedDecoder, "_whole", lambda self, logits: whole(self, logits * float("inf")))
    files = reader("gpt2")
    for task in ("text", "e2e", "mnli"):
        data = files.labelled if task == "mnli" else files.data
        common = ["--data", str(data), "--out", str(tmp_path / task)]
        command = ["evaluate", str(files.config), "--task", task, *common]
        assert main(command) == 5
        assert "error: the model's logits are not finite" in capsys.readouterr().err
        assert (tmp_path / task / "predictions.jsonl").read_bytes() == b""


def test_the_data_of_another_task(refused: Refused) -> None:
    """Before anything is decoded: an accuracy of 0 would say nothing."""
    refused.evaluate(3, "is no label of mnli (", "--task", "mnli")


def test_more_resamples_than_anyone_needs(refused: Refused) -> None:
    refused.evaluate(2, "--bootstrap 99999999999 cannot be: give 0 to 100,000", "--bootstrap", "99999999999")


def test_an_empty_prompt(refused: Refused) -> None:
    refused.generate(2, "--prompt is empty: give it a text", "--prompt", " ")
