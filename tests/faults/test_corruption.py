# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that was changed on the disk is named aloud and never loaded; the one before it is."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_megatron.checkpoint import state
from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.checkpoint.state import read_progress
from lora_megatron.errors import CheckpointError
from tests.commands.runs import Tree, checkpoint_of
from tests.faults.finished_run import BEFORE, FILES, NEWEST, find
from tests.faults.ranks import train_ranks
from tests.faults.recovery import LAYOUTS, Undisturbed, result_of, resumed, tree_of


def flip(path: Path, other: Path) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    position = random.Random(path.name).randrange(8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path, other: Path) -> None:
    path.unlink()


def lengthen(path: Path, other: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"x")


def mix(path: Path, other: Path) -> None:
    """The file of the other step, of the same size where it holds tensors."""
    shutil.copy(other, path)


def become_a_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def point_nowhere(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = [flip, truncate, empty, delete, lengthen, mix, become_a_folder, point_nowhere]
SAME_IN_BOTH = {"adapter_config.json"}  # mixing these changes nothing


def damages() -> Iterator[tuple[str, Callable[[Path, Path], None]]]:
    for name in FILES:
        for damage in DAMAGES:
            if damage is not mix or name not in SAME_IN_BOTH:
                yield name, damage


@pytest.mark.parametrize(("name", "damage"), list(damages()))
@pytest.mark.usefixtures("alone")
def test_each_damage_of_each_file_is_named_and_the_checkpoint_before_used(
    run: Path, name: str, damage: Callable[[Path, Path], None]
) -> None:
    assert find(run) == (NEWEST, "")
    path = checkpoint_of(run, NEWEST) / name
    damage(path, checkpoint_of(run, BEFORE) / name)
    step, said = find(run)
    assert step == BEFORE
    assert said.startswith("checkpoint passed over: ")
    assert str(path) in said or (name == "manifest.json" and damage is mix)
    assert "\n" not in said
    with pytest.raises(CheckpointError, match=str(checkpoint_of(run, NEWEST))) as caught:  # and when it is asked for
        read_progress(checkpoint_of(run, NEWEST), read_manifest(checkpoint_of(run, BEFORE))["identity"])
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("alone")
def test_a_hundred_flipped_bits(run: Path) -> None:
    choose = random.Random(5)
    for name in FILES:
        path = checkpoint_of(run, NEWEST) / name
        whole = path.read_bytes()
        for _ in range(20):
            broken = bytearray(whole)
            broken[choose.randrange(len(broken))] ^= 1 << choose.randrange(8)
            path.write_bytes(broken)
            step, said = find(run)
            assert (step, str(path) in said) == (BEFORE, True)
        path.write_bytes(whole)
    assert find(run) == (NEWEST, "")


@pytest.mark.usefixtures("alone")
def test_two_files_that_changed_places_are_noticed(run: Path) -> None:
    first, second = (checkpoint_of(run, NEWEST) / FILES[stage] for stage in (1, 2))
    first.rename(run / "aside")
    second.rename(first)
    (run / "aside").rename(second)
    assert find(run)[0] == BEFORE


def a_copy_under_another_name(folder: Path) -> None:
    shutil.copytree(checkpoint_of(folder.parent, 6), folder / "step-00000010")


@pytest.mark.parametrize(
    ("garbage", "passed_over"),
    [
        (lambda folder: (folder / "latest").write_text("step-00000002"), ""),
        (lambda folder: (folder / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\x00"), ""),
        (lambda folder: (folder / "step-9").mkdir(), ""),
        (lambda folder: (folder / "step-000000009999999999").mkdir(), ""),
        (lambda folder: (folder / "superseded-step-00000010-abcdefgh").mkdir(), ""),
        (lambda folder: (folder / ".tmp-step-00000010-12345678").mkdir(), ""),
        (lambda folder: (folder / "step-00000010").mkdir(), "manifest.json"),
        (lambda folder: (folder / "step-00000010").write_text("a file"), "is not a folder"),
        (lambda folder: (folder / "step-00000010").symlink_to("nowhere"), "is not a folder"),
        (lambda folder: (folder / "step-00000010").symlink_to("step-00000010"), "is not a folder"),
        (lambda folder: (folder / "step-00000010").symlink_to("step-00000006"), "holds step 6"),
        (a_copy_under_another_name, "holds step 6: it is another checkpoint under this name; move it away"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_stale_pointers_and_garbage_beside_checkpoints(
    run: Path, garbage: Callable[[Path], object], passed_over: str
) -> None:
    garbage(run / "checkpoints")
    step, said = find(run)
    assert step == NEWEST
    assert passed_over in said
    assert bool(said) == bool(passed_over)


@pytest.mark.parametrize("damage", [flip, delete], ids=lambda damage: damage.__name__)
def test_training_goes_on_from_the_one_before_to_the_same_bits(
    corpus: Path, run: Path, tmp_path: Path, undisturbed: Undisturbed, damage: Callable[[Path, Path], None]
) -> None:
    expected = undisturbed("PP2")
    tree = tree_of("PP2", corpus, run)
    path = checkpoint_of(run, NEWEST) / FILES[2]
    damage(path, path)
    said = check_recovery_past(tree, tmp_path, expected_name=path)
    assert result_of(run) == expected
    assert said.count("checkpoint passed over") == 1


def check_recovery_past(tree: Tree, folder: Path, *, expected_name: Path) -> str:
    with train_ranks(resumed(tree), world=LAYOUTS["PP2"][0], folder=folder) as ranks:
        assert ranks.statuses() == [0, 0], ranks.logs()
        said = ranks.log()
    assert f"checkpoint passed over: {expected_name}" in said
    assert f"is newer than step {BEFORE}, where the run goes on: renamed to superseded-" in said
    return said


def test_a_named_checkpoint_that_is_damaged_is_one_line(corpus: Path, run: Path, tmp_path: Path) -> None:
    tree = tree_of("PP2", corpus, run)
    path = checkpoint_of(run, NEWEST) / FILES[1]
    flip(path, path)
    tree["run"]["resume"] = str(checkpoint_of(run, NEWEST))
    with train_ranks(tree, world=2, folder=tmp_path) as ranks:
        assert ranks.statuses() == [4, 4], ranks.logs()
        errors = [line for line in ranks.log().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {path} is damaged: its SHA-256 is not the manifest's")


def test_damage_that_one_rank_alone_sees_is_passed_over_by_both(
    corpus: Path, run: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """A machine whose disk fails may not go on from another step than the rest."""
    expected = undisturbed("PP2")
    tree = tree_of("PP2", corpus, run)
    with train_ranks(resumed(tree), world=2, folder=tmp_path, before=see_damage_on_rank_1) as ranks:
        assert ranks.statuses() == [0, 0], ranks.logs()
        said = ranks.log()
    assert f"checkpoint passed over: {checkpoint_of(run, NEWEST)} cannot be read here (on rank 1)" in said
    assert result_of(run) == expected


def see_damage_on_rank_1() -> None:
    original = state.read_manifest

    def read(folder: Path, *, verify: bool = True) -> Tree:
        if os.environ["RANK"] == "1" and folder.name.endswith(str(NEWEST)):
            raise CheckpointError(f"{folder} cannot be read here")
        return original(folder, verify=verify)

    state.read_manifest = read
