# SPDX-License-Identifier: Apache-2.0
"""METEOR 1.5 by its authors' Java program, which PyPI's pycocoevalcap carries. Without either, it is named as missing.

No other METEOR stands in: nltk's has neither the paraphrases nor the tuned weights, and scores several points apart.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_megatron.metrics.sums import Sums, Unavailable

# Of METEOR 1.5 for English; modules: exact, stem, synonym, paraphrase.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MODULES = np.array([1.0, 0.6, 0.8, 0.6])
_NUMBERS = 23  # in a line of statistics
_SECONDS = 3600


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Sums | Unavailable:
    """METEOR 1.5 (`-l en -norm`), 0 to 100, of the reference that fits an instance best.

    Corpus score as the program adds it up: from summed matches and lengths, not the mean of instances.
    """
    java, jar = shutil.which("java"), _jar()
    if java is None:
        return Unavailable("METEOR 1.5 is a Java program and there is no `java` on the PATH: install a Java runtime")
    if jar is None:
        return Unavailable(
            "METEOR 1.5's jar comes with the package pycocoevalcap, which is not here: "
            "pip install 'lora-megatron[meteor]'"
        )
    lines = [_line(*pair) for pair in zip(predictions, references, strict=True)]
    command = [java, "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Xmx2G", "-jar", str(jar)]
    try:
        done = subprocess.run(
            [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
            input="".join(lines).encode("utf-8", "replace"),
            capture_output=True,
            timeout=_SECONDS,
        )
        return _sums(done.stdout.decode("utf-8"), len(lines))
    except subprocess.TimeoutExpired:
        return Unavailable(f"METEOR 1.5 gave no answer within {_SECONDS} s")
    except (OSError, ValueError) as error:
        return Unavailable(f"METEOR 1.5 failed ({error}); does `java -jar {jar}` run?")


def _jar() -> Path | None:
    package = importlib.util.find_spec("pycocoevalcap")
    for folder in package.submodule_search_locations or () if package else ():
        path = Path(folder) / "meteor" / "meteor-1.5.jar"
        if path.is_file():
            return path
    return None


def _line(prediction: str, references: Sequence[str]) -> str:
    """One instance in the program's protocol; its separator and line ends cannot stand in a text."""
    texts = (" ".join(text.replace("|||", " ").split()) for text in (*references, prediction))
    return f"SCORE ||| {' ||| '.join(texts)}\n"


def _sums(output: str, instances: int) -> Sums:
    lines = output.splitlines()
    if len(lines) != instances:
        raise ValueError(f"{len(lines)} lines of statistics for {instances} instances")
    statistics = np.array([[float(number) for number in line.split()] for line in lines], dtype=np.float64)
    if statistics.shape != (instances, _NUMBERS):
        raise ValueError(f"statistics of shape {statistics.shape}, expected {_NUMBERS} numbers an instance")
    matched, referred = _matches(statistics)
    whole = (matched == statistics[:, 0]) & (referred == statistics[:, 1]) & (statistics[:, 20] == 1)
    statistics[whole, 20] = 0  # a perfect instance adds no chunk to the corpus
    return Sums(statistics, _value)


def _matches(statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stages = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 2, 2)  # [.., module, content or function, side]
    return stages[..., 0].sum(axis=(-1, -2)), stages[..., 1].sum(axis=(-1, -2))


def _value(total: np.ndarray) -> float:
    """Statistics: lengths, function words, 4 modules x (content, function) x (text, reference), chunks, matches."""
    stages = total[4:20].reshape(4, 2, 2)
    rates = []
    for side in range(2):
        length, functional = total[side], total[2 + side]
        weighted = _DELTA * (length - functional) + (1 - _DELTA) * functional
        matches = _MODULES @ (_DELTA * stages[:, 0, side] + (1 - _DELTA) * stages[:, 1, side])
        if not weighted or not matches:
            return 0.0
        rates.append(matches / weighted)
    precision, recall = rates
    mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
    fragmentation = total[20] / ((total[21] + total[22]) / 2)
    return 100.0 * max(0.0, mean * (1 - _GAMMA * fragmentation**_BETA))
