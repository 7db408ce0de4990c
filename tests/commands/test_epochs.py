# SPDX-License-Identifier: Apache-2.0
"""Runs that are so many epochs long, and the paper's configurations as training reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.config import load_config, parse_config
from tests.commands.runs import (
    Outcome,
    Tree,
    attempt,
    checkpoint_of,
    evaluations_of,
    held_out_of,
    losses_of,
    make_tree,
)
from tests.pool import Pool

CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "configs"
ROWS, BATCH = 18, 4  # of the corpus; 4.5 steps an epoch
GPT2 = {  # by the paper: weight decay, LoRA dropout, label smoothing
    "e2e": (0.01, 0.1, 0.1),
    "webnlg": (0.01, 0.1, 0.1),
    "dart": (0.0, 0.0, 0.0),
}
GPT3 = {"wikisql": 384, "mnli": 768, "samsum": 2048}


def epochs_tree(corpus: Path, folder: Path, /, **sections: Tree) -> Tree:
    tree = make_tree(corpus, folder, **sections)
    tree["train"] = {"epochs": 2, "save_every": 2, "eval_every": "epoch", "best": "loss", **sections.get("train", {})}
    return tree


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("epochs") / "run"
    assert attempt(epochs_tree(corpus, run, train={"keep_checkpoints": 9})) == Outcome()
    return run


def test_a_run_ends_with_its_last_epoch_and_is_evaluated_at_each(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempt(epochs_tree(corpus, tmp_path / "run")) == Outcome()
    assert list(losses_of(tmp_path / "run")) == list(range(1, 2 * ROWS // BATCH + 1))
    assert [line["step"] for line in evaluations_of(tmp_path / "run")] == [0, 5, 9]
    assert "train.epochs = 2: 9 steps of 4 of 18 rows\n" in capsys.readouterr().err


def test_the_resolved_configuration_repeats_the_run(straight: Path, tmp_path: Path) -> None:
    config = load_config(straight / "config.yaml", [f"run.dir={tmp_path / 'again'}"])
    assert (config.train.steps, config.train.epochs, config.train.eval_every) == (None, 2, "epoch")
    assert attempt(config.model_dump()) == Outcome()
    assert losses_of(tmp_path / "again") == losses_of(straight)
    assert evaluations_of(tmp_path / "again") == evaluations_of(straight)


def test_a_run_of_epochs_goes_on_under_another_layout(pool: Pool, straight: Path, corpus: Path, tmp_path: Path) -> None:
    """The schedule's last step comes from the rows again, so the learning rates are the same."""
    run = {"dir": str(tmp_path / "run"), "resume": str(checkpoint_of(straight, 4))}
    tree = epochs_tree(corpus, tmp_path / "run", parallel={"tensor": 2})
    assert pool.run(2, attempt, tree={**tree, "run": run}) == [Outcome()] * 2
    expected = {step: loss for step, loss in losses_of(straight).items() if step > 4}
    assert losses_of(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert held_out_of(tmp_path / "run") == pytest.approx(held_out_of(straight), rel=1e-5)


def test_packed_rows_are_what_an_epoch_counts(corpus: Path, tmp_path: Path) -> None:
    tree = epochs_tree(corpus, tmp_path / "run", data={"packing": True, "sequence_length": 32, "global_batch_size": 1})
    assert attempt({**tree, "train": {"epochs": 1}}) == Outcome()
    assert 1 < len(losses_of(tmp_path / "run")) < ROWS


def test_fewer_epochs_than_were_run_are_refused(straight: Path, corpus: Path, tmp_path: Path) -> None:
    run = {"dir": str(tmp_path / "run"), "resume": str(checkpoint_of(straight, 6))}
    outcome = attempt({**epochs_tree(corpus, tmp_path / "run", train={"epochs": 1}), "run": run})
    assert outcome.status == 2
    assert "train.epochs = 1 (5 steps), and" in outcome.message
    assert outcome.message.endswith("is at step 6 already: raise train.epochs")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_held_out_losses_are_without_smoothing(corpus: Path, tmp_path: Path, smoothing: float) -> None:
    """At step 0 nothing was trained: whatever the smoothing, it is the same loss."""
    train = {"label_smoothing": smoothing, "epochs": 0.2}
    assert attempt(epochs_tree(corpus, tmp_path / "run", train=train)) == Outcome()
    plain = epochs_tree(corpus, tmp_path / "plain", train={"epochs": 0.2})
    assert attempt(plain) == Outcome()
    first, other = evaluations_of(tmp_path / "run")[0], evaluations_of(tmp_path / "plain")[0]
    assert first == other
    assert (losses_of(tmp_path / "run") == losses_of(tmp_path / "plain")) is (smoothing == 0.0)


def test_a_checkpoint_of_other_smoothing_is_refused(straight: Path, corpus: Path, tmp_path: Path) -> None:
    run = {"dir": str(tmp_path / "run"), "resume": str(checkpoint_of(straight, 4))}
    outcome = attempt({**epochs_tree(corpus, tmp_path / "run", train={"label_smoothing": 0.1}), "run": run})
    assert outcome.status == 4
    assert "is another run's: label_smoothing is None there and 0.1 here" in outcome.message


def test_the_papers_hyperparameters() -> None:
    for size in ("medium", "large"):
        for task, (decay, dropout, smoothing) in GPT2.items():
            config = load_config(CONFIGS / f"gpt2_{size}_{task}.yaml")
            assert (config.model.preset, config.data.train) == (f"gpt2-{size}", f"data/{task}/train.parquet")
            assert (config.optimizer.lr, config.optimizer.weight_decay) == (2e-4, decay)
            assert (config.method.targets, config.method.alpha, config.method.dropout) == (
                {"q": 4, "v": 4},
                32,
                dropout,
            )
            section = config.train
            assert (section.epochs, section.warmup_steps, section.schedule) == (5, 500, "linear")
            assert (section.label_smoothing, section.eval_every, section.best) == (smoothing, "epoch", "loss")
            assert (config.data.global_batch_size, config.data.sequence_length) == (8, 512)
    for task, length in GPT3.items():
        config = load_config(CONFIGS / f"gpt3_175b_{task}.yaml")
        assert (config.train.epochs, config.train.schedule, config.train.best) == (2, "linear", "loss")
        assert (config.data.sequence_length, config.data.global_batch_size) == (length, 128)
        assert (config.optimizer.lr, config.optimizer.weight_decay) == (2e-4, 0.1)
        assert config.train.warmup_steps == round(250_000 / (128 * length))


@pytest.mark.parametrize(
    "name",
    [
        *(f"gpt2_{size}_{task}" for size in ("medium", "large") for task in GPT2),
        *(f"gpt3_175b_{task}" for task in GPT3),
    ],
)
def test_training_reads_a_configuration_of_the_paper_unchanged(corpus: Path, tmp_path: Path, name: str) -> None:
    """On a tiny model and a tiny corpus; everything else, epochs and selection among it, is as the file has it."""
    config = load_config(CONFIGS / f"{name}.yaml")
    tree = config.model_dump(exclude_none=True)
    tree["model"] = make_tree(corpus, tmp_path)["model"]
    tree["data"] |= {
        "train": str(corpus / "train.parquet"),
        "validation": str(corpus / "validation.parquet"),
        "tokenizer": "bytes",
        "sequence_length": 16,
        "global_batch_size": 8,
    }
    tree["run"]["dir"] = str(tmp_path / "run")
    assert attempt(tree) == Outcome()
    resolved = load_config(tmp_path / "run" / "config.yaml")
    for section in ("base", "method", "parallel", "optimizer", "train"):
        assert getattr(resolved, section) == getattr(config, section) == getattr(parse_config(tree), section)
    assert max(losses_of(tmp_path / "run")) == -(-ROWS * int(config.train.epochs or 0) // 8)
    assert read_manifest(tmp_path / "run" / "best")["best"]["metric"] == "loss"
