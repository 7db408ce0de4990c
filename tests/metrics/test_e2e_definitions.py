# SPDX-License-Identifier: Apache-2.0
"""Penn Treebank tokens, ROUGE-L, CIDEr and METEOR beside the programs that the E2E script runs, where they are here."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lora_megatron.metrics import meteor as meteor_module
from lora_megatron.metrics.coco import cider, rouge_l
from lora_megatron.metrics.meteor import meteor
from lora_megatron.metrics.ptb import PUNCTUATION, ptb_tokens
from lora_megatron.metrics.sums import Sums, Unavailable
from lora_megatron.metrics.tasks import score
from tests.conftest import SHARED_DATA
from tests.metrics.test_published_values import SENTENCE_REFERENCES, SENTENCES

E2E = SHARED_DATA / "e2e"
COCO = importlib.util.find_spec("pycocoevalcap")
needs_data = pytest.mark.skipif(not E2E.is_dir(), reason="the E2E files are not in ../shared/data")
needs_coco = pytest.mark.skipif(COCO is None, reason="pycocoevalcap is not installed (extra `meteor`)")


def sentences(name: str) -> dict[str, list[str]]:
    """References by meaning representation, in the order of the file."""
    found: dict[str, list[str]] = {}
    with open(E2E / name, encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            found.setdefault(row["mr"], []).append(" ".join(row["ref"].split()))
    return found


def held_out() -> tuple[list[str], list[list[str]]]:
    """The first sentence of each representation against the others."""
    groups = sentences("devset.csv").values()
    return [texts[0] for texts in groups], [texts[1:] or texts for texts in groups]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It isn't cheap (£20-25), e.g. “The Mill”.", "it is n't cheap -lrb- # 20-25 -rrb- e.g. the mill"),
        ("They're children's hors d'oeuvre - you'll cannot!", "they 're children 's hors d'oeuvre you 'll can not"),
        ("No. 5, 3.5 out of 5; Mr. Smith... café", "no. 5 3.5 out of 5 mr. smith café"),
        ("the city center., near a non-family-friendly pub", "the city center. near a non-family-friendly pub"),
        ("  ", ""),
        ("?!.,;", ""),
    ],
)
def test_treebank_tokens(text: str, tokens: str) -> None:
    assert " ".join(ptb_tokens(text)) == tokens


@needs_data
@needs_coco
def test_tokens_are_stanfords_in_all_of_e2e(tmp_path: Path, real_java: None) -> None:
    assert COCO is not None
    assert COCO.submodule_search_locations is not None
    jar = Path(next(iter(COCO.submodule_search_locations))) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    texts = [
        text for name in ("devset.csv", "testset_w_refs.csv") for group in sentences(name).values() for text in group
    ]
    (tmp_path / "texts").write_text("\n".join(texts) + "\n", encoding="utf-8")
    flags = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8", str(tmp_path / "texts")]
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *flags]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    lines = done.stdout.decode("utf-8").split("\n")[:-1]
    assert len(texts) == len(lines) == 9365
    expected = [[word for word in line.split() if word not in PUNCTUATION] for line in lines]
    assert [ptb_tokens(text) for text in texts] == expected


@needs_data
@needs_coco
def test_coco_metrics_are_pycocoevalcaps_over_e2e() -> None:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    predictions, references = held_out()
    tokens = [" ".join(ptb_tokens(text)) for text in predictions]
    targets = [[" ".join(ptb_tokens(text)) for text in texts] for texts in references]
    truth, found = dict(enumerate(targets)), {i: [text] for i, text in enumerate(tokens)}
    assert rouge_l(tokens, targets).value == pytest.approx(100 * Rouge().compute_score(truth, found)[0])
    assert cider(tokens, targets).value == pytest.approx(Cider().compute_score(truth, found)[0])


@needs_data
def test_e2e_development_set_gives_what_the_official_script_gave() -> None:
    """First sentences against the others; launch/results/2026-11-metrics.md says how the numbers came about."""
    found = score("e2e", *held_out(), bootstrap=0).values
    assert found["bleu"] == pytest.approx(59.95345944, abs=1e-7)
    assert found["nist"] == pytest.approx(8.578516298, abs=1e-8)
    assert found["rouge_l"] == pytest.approx(65.28351319, abs=1e-7)
    assert found["cider"] == pytest.approx(1.854275461, abs=1e-8)


def test_an_empty_prediction_scores_nothing_and_harms_nothing() -> None:
    assert rouge_l(["", "a b"], [["a b"], ["a b"]]).value == 50
    assert cider(["", "a b c d"], [["a b c d"], ["e f g h"]]).value == 0


@needs_data
@needs_coco
@pytest.mark.slow
def test_meteor_of_e2e_is_what_the_program_adds_up(real_java: None) -> None:
    assert score("e2e", *held_out(), bootstrap=0).values["meteor"] == pytest.approx(44.98183910, abs=1e-7)


@needs_coco
@pytest.mark.slow
def test_meteor_is_what_nlg_evals_readme_prints(real_java: None) -> None:
    found = meteor(SENTENCES, SENTENCE_REFERENCES)
    assert isinstance(found, Sums)
    assert found.value == pytest.approx(29.5797, abs=5e-5)
    found = meteor([*SENTENCES, "", "|||"], [*([text] for text in SENTENCES), ["a b"], ["c\u2028d ||| e"]])
    assert isinstance(found, Sums)
    assert found.value_of(found.statistics[:2].sum(axis=0)) == pytest.approx(100)
    assert found.value_of(found.statistics[2:].sum(axis=0)) == 0


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A `java` that is a shell script, and a jar that is a name."""
    folder.mkdir()
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(meteor_module, "_jar", lambda: Path("meteor-1.5.jar"))


def test_meteor_by_its_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics that the program printed for `a cheap restaurant in the city center` and its two references."""
    line = "7.0 9.0 3.0 5.0 2.0 2.0 3.0 3.0 0 0 0 0 1.0 1.0 0 0 0 0 0 0 2.0 6.0 6.0"
    fake_java(tmp_path / "bin", monkeypatch, f'while read -r _; do echo "{line}"; done')
    found = meteor(["a cheap restaurant"], [["x", "y"]])
    assert isinstance(found, Sums)
    precision = (2 * 0.75 + 3 * 0.25 + 0.8 * 0.75) / (4 * 0.75 + 3 * 0.25)
    recall = (2 * 0.75 + 3 * 0.25 + 0.8 * 0.75) / (4 * 0.75 + 5 * 0.25)
    mean = 1 / (0.15 / precision + 0.85 / recall)
    assert found.value == pytest.approx(100 * mean * (1 - 0.6 * (2 / 6) ** 0.2))
    assert meteor(["a"] * 3, [["x"]] * 3).value == pytest.approx(found.value)  # type: ignore[union-attr]


@pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "cat", "echo 1 2 3"])
def test_a_meteor_that_fails_is_named(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path / "bin", monkeypatch, script)
    found = meteor(["a"], [["a"]])
    assert isinstance(found, Unavailable)
    assert "METEOR 1.5 failed" in found.reason


@pytest.mark.parametrize("task", ["e2e", "webnlg", "dart"])
def test_without_java_meteor_is_missing_by_name(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = score(task, ["a b c d e"], [["a b c d e"]], bootstrap=10)
    assert "meteor" not in found.values
    assert "meteor" not in found.intervals
    assert found.unavailable == {"meteor": found.unavailable["meteor"]}
    assert "no `java` on the PATH" in found.unavailable["meteor"]
    assert found.values["bleu"] == pytest.approx(100)


def test_without_its_jar_meteor_is_missing_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path / "bin", monkeypatch, "exit 1")
    nothing: Any = None
    monkeypatch.setattr(meteor_module, "_jar", lambda: nothing)
    assert "pycocoevalcap" in score("dart", ["a"], [["a"]], bootstrap=0).unavailable["meteor"]
