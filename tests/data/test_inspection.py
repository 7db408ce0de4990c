# SPDX-License-Identifier: Apache-2.0
"""What `inspect` shows is what training makes of a file, is counted right, and cannot act on a terminal."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.__main__ import main
from data_prep.histogram import bar, bin_width, histogram
from data_prep.inspection import inspect, training_row
from data_prep.token_view import escape, show_tokens
from data_prep.writer import DatasetWriter
from lora_megatron.data.batches import BatchSource
from lora_megatron.data.examples import LOSSES
from lora_megatron.data.parquet import open_examples
from lora_megatron.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from tests.conftest import SHARED_DATA
from tests.data.chat_models import CHATML, END, START, write_tokenizer

PAIRS = [("ab", "cd"), ("\x1b]0;owned\x07", "\u202e[x]\\¦é\n!"), ("long " * 20, "end"), ("a", "much " * 9), ("", "x")]
GPT2 = SHARED_DATA / "gpt2_bpe"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    with (
        DatasetWriter(tmp_path / "out", preparer="x", options={}) as writer,
        writer.split("train") as split,
    ):
        for number, (context, target) in enumerate(PAIRS):
            split.write(id=f"id-{number}\x1b[2J", context=context, target=target, references=[target])
    return tmp_path / "out" / "train.parquet"


def output(path: Path, tokenizer: Tokenizer | None = None, **options: object) -> str:
    stream = io.StringIO()
    inspect(path, tokenizer=tokenizer or ByteTokenizer(), stream=stream, **options)
    return stream.getvalue()


def test_what_is_printed(prepared: Path) -> None:
    text = output(prepared, rows=2)
    assert text.startswith(f"{prepared}  5 rows, 187 tokens by bytes\n")
    assert "row 0  id-0\\x1b[2J  6 tokens, 3 learned\na¦b¦\\n\n[c][d][<eos>]\n" in text
    assert "\\x1b¦\\]¦0¦;¦o¦w¦n¦e¦d¦\\x07¦\\n\n" in text
    assert "[<0xE2>][<0x80>][<0xAE>][\\[][x][\\]][\\\\][<0xC2>][<0xA6>][<0xC3>][<0xA9>][\\n]\n[!][<eos>]\n" in text
    assert "context tokens  least 1, median 3, mean 23.6, 95% up to 101, most 101\n" in text
    assert "target tokens  least 2, median 4, mean 13.8, 95% up to 46, most 46\n" in text
    assert text.endswith("nothing is cut at --sequence-length 104 or more\n")
    everything = output(prepared, rows=1, loss="all")
    assert "6 tokens, 5 learned\na[b][\\n]\n[c][d][<eos>]\n" in everything
    cut = output(prepared, rows=5, sequence_length=40)
    assert "row 2  id-2\\x1b[2J  41 tokens, 4 learned, 64 cut off\n" in cut
    assert cut.endswith("truncated at 40: 2 of 5 rows (40.0%); 1 of them lose the end of the target\n")
    assert "row" not in output(prepared, rows=0).split("\n", 3)[3].split("context")[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sequence_length", [7, 40, 300])
def test_rows_are_those_of_training(prepared: Path, loss: str, sequence_length: int) -> None:
    table, tokenizer = open_examples(prepared), ByteTokenizer()
    options = {"sequence_length": sequence_length, "micro_batch_size": len(PAIRS), "loss": loss, "shuffle": False}
    batch = BatchSource(table, tokenizer, **options).microbatch(0)
    single = BatchSource(table.first(4), tokenizer, **{**options, "micro_batch_size": 1})
    for row in range(4):
        ids, learned = training_row(single, row)
        used = len(ids) - 1
        assert batch["tokens"][row, :used].tolist() == ids[:-1]
        assert batch["labels"][row, :used].tolist() == ids[1:]
        assert batch["loss_mask"][row].tolist() == [float(counts) for counts in learned[1:]] + [0.0] * (
            sequence_length - used
        )
        assert set(batch["tokens"][row, used:].tolist()) <= {tokenizer.pad_id}


@given(st.lists(st.tuples(st.text(), st.booleans())), st.integers(8, 60))
@example([("\U0001f3fb", False), ("\u0301", False), ("a", True)], 8)  # a tone of skin, an accent: without a width
def test_nothing_that_is_shown_can_act(tokens: list[tuple[str, bool]], width: int) -> None:
    lines = show_tokens([text for text, _ in tokens], [counts for _, counts in tokens], width=width)
    assert all(line.plain.isprintable() for line in lines)
    assert all(line.cell_len <= width for line in lines)
    shown = "".join(line.plain for line in lines)
    expected = "".join(f"[{escape(text)}]" if counts else escape(text) for text, counts in tokens)
    assert shown.replace("¦", "") == expected.replace("¦", "")


@given(st.text())
def test_escaping_loses_nothing(text: str) -> None:
    assert escape("\ud800\x9b\x85\u2028\u200b") == "\\ud800\\x9b\\x85\\u2028\\u200b"
    assert (escape(text) == text) == (text.isprintable() and not set(text) & set("\\¦[]"))


@given(st.lists(st.integers(1, 10**6), min_size=1))
def test_histograms_count_every_row(lengths: list[int]) -> None:
    lines = histogram(lengths)
    assert sum(int(line.rsplit(" ", 1)[1].replace(",", "")) for line in lines) == len(lengths)
    assert len(lines) <= 12
    assert len({len(line) for line in lines}) == 1
    assert max(line.count("█") for line in lines) == 40


def test_bars_and_bins() -> None:
    assert [bin_width(n) for n in (3, 11, 12, 100, 119, 120, 599, 600)] == [1, 1, 2, 10, 10, 20, 50, 100]
    assert [bar(n, 16, width=2) for n in (0, 1, 8, 12, 16)] == ["", "▏", "█", "█▌", "██"]
    assert bar(1, 10**6) == "▏"  # never nothing for something


def test_special_tokens_of_a_chat_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tokenizer(tmp_path / "model", CHATML)
    (tmp_path / "own.jsonl").write_text('{"prompt": "é?", "completion": "Yes"}\n')
    flags = ("--raw", str(tmp_path / "own.jsonl"), "--chat-template", str(folder))
    assert main(["jsonl", *flags, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    prepared = str(tmp_path / "out" / "train.parquet")
    assert main(["inspect", prepared, "--tokenizer", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"\n{START}¦u¦s¦e¦r¦\\n\n¦<0xC3>¦<0xA9>¦?¦{END}¦\\n\n¦{START}¦a¦s" in text
    assert f"[Y][e][s][{END}]\n" in text
    assert main(["inspect", prepared, "--tokenizer", "bytes"]) == 3
    assert "chat template of another tokenizer" in capsys.readouterr().err


@pytest.mark.skipif(not GPT2.is_dir(), reason="GPT-2's tokenizer is not in ../shared/data")
def test_words_keep_their_space(prepared: Path) -> None:
    tokenizer = load_tokenizer(str(GPT2))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("A cat's 漢")] == [
        *("A", " cat", "'s", "<0x20><0xE6>", "<0xBC>", "<0xA2>")
    ]
    assert "long¦ long¦ long" in output(prepared, tokenizer)


def test_wrong_flags_and_files(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(prepared), "--tokenizer", "bytes", "--rows", "-1"]) == 2
    assert main(["inspect", str(prepared), "--tokenizer", "bytes", "--sequence-length", "0"]) == 2
    assert main(["inspect", str(prepared.parent / "absent.parquet"), "--tokenizer", "bytes"]) == 3
    (prepared.parent / "manifest.json").unlink()
    assert main(["inspect", str(prepared), "--tokenizer", "bytes"]) == 3
    assert capsys.readouterr().err.count("\n") == 4


def test_a_reader_that_goes_and_a_terminal_without_the_letters(prepared: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "inspect", str(prepared), "--tokenizer", "bytes"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b"a\\xa6b\\xa6\\n" in done.stdout
