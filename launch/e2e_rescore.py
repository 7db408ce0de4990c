# SPDX-License-Identifier: Apache-2.0
"""Score the predictions of launch/e2e_experiment.py anew, with the metrics of this machine, and write its report.

    python launch/e2e_rescore.py --out runs/e2e

For METEOR, which needs Java and `pip install 'lora-megatron[meteor]'`, where the machine with the GPU has neither.
Nothing is trained or predicted, no model is needed. Of the experiment's folder these files have to be there:

    settings.json, prepared.json, timeline.json, data/e2e/{test.parquet,manifest.json}, base/environment.json,
    report.json, */report.json, evaluations/*/{evaluation.json,predictions.jsonl,scores.json}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch import side_by_side as side
from launch.e2e_plan import BASE, Settings, evaluation_folder
from launch.e2e_report import write_findings
from lora_megatron.data.parquet import ExampleTable, open_examples
from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.evaluation.predictions import IDENTITY, SCORES, PredictionLog
from lora_megatron.evaluation.rows import instances_of
from lora_megatron.measure.atomic import write_json
from lora_megatron.metrics.tasks import score
from lora_megatron.strict_json import load_json_object


def rescore(out: Path) -> list[str]:
    """Write scores.json of each finished evaluation and the report; returns the names of the runs that are missing.

    Raises:
        ConfigError: `out` is no experiment's.
        CheckpointError: a file of it is damaged, or is not of the others.
        DataError: its test set cannot be read.
    """
    settings = _settings(out)
    table = open_examples(out / "data" / "e2e" / "test.parquet", with_references=True)
    for name in (BASE, *settings.adaptations):
        if (evaluation_folder(name, settings) / SCORES).exists():
            _score(evaluation_folder(name, settings), table)
    earlier = load_json_object(out / side.JSON_NAME, "a report", CheckpointError)
    try:
        commands = [str(command) for command in earlier["commands"]]  # as they ran: this folder may be a copy
    except (KeyError, TypeError):
        raise CheckpointError(f"{out / side.JSON_NAME} has no list of commands: bring it whole") from None
    return write_findings(settings, command=str(earlier.get("command")), commands=commands)


def _settings(out: Path) -> Settings:
    """What the folder says of itself; seeds and jobs are those of its report."""
    if not all((out / name).is_file() for name in ("settings.json", side.JSON_NAME)):
        raise ConfigError(
            f"--out {out} is not the folder of launch/e2e_experiment.py: it has no settings.json or report"
        )
    identity = load_json_object(out / "settings.json", "the settings of an experiment", CheckpointError)
    report = load_json_object(out / side.JSON_NAME, "a report", CheckpointError)
    try:
        return Settings(
            **{**identity, "shrink": tuple(identity["shrink"])},
            raw=Path("raw"),
            out=out,
            seeds=tuple(report["seeds"]),
            jobs=report["jobs"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{out / 'settings.json'} is not this version's ({error}): run the experiment anew"
        ) from None


def _score(folder: Path, table: ExampleTable) -> None:
    """As `lora-megatron evaluate` does once all predictions are there."""
    scores = load_json_object(folder / SCORES, "the scores of an evaluation", CheckpointError)
    identity: dict[str, Any] = load_json_object(folder / IDENTITY, "what an evaluation is of", CheckpointError)
    if identity.get("data") != table.content_hash:
        raise CheckpointError(f"{folder / IDENTITY} is of other data than {table.path}: bring both from one experiment")
    instances = instances_of(table, group=True, limit=identity.get("rows"))
    log = PredictionLog(folder, identity, [instance.id for instance in instances])
    log.close()
    if len(log.answers) != len(instances):
        raise CheckpointError(f"{log.path} has {len(log.answers)} of {len(instances)} predictions: bring it whole")
    found = score(
        "e2e",
        [str(answer["prediction"]) for answer in log.answers],
        [instance.references for instance in instances],
        bootstrap=int(scores.get("bootstrap", 0)),
    )
    for metric, value in found.values.items():
        if metric in scores["scores"] and abs(value - scores["scores"][metric]) > 1e-9 * max(1, abs(value)):
            print(f"{folder.name}: {metric} is {value} here and was {scores['scores'][metric]}", file=sys.stderr)
    write_json(folder / SCORES, {**scores, **found.to_dict()})


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or as in lora_megatron.errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the experiment")
    out: Path = parser.parse_args(argv).out

    def run() -> None:
        missing = rescore(out)
        print(f"missing: {', '.join(missing)}" if missing else "all runs are scored", file=sys.stderr)
        print(out / side.MARKDOWN_NAME)

    return side.status_of(run)


if __name__ == "__main__":
    sys.exit(main())
