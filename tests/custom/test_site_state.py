from __future__ import annotations

from pathlib import Path

import pytest
import torch

from custom.site_state import KEPT_ROUNDS, SiteState


def test_a_repeated_round_starts_from_the_one_before(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    assert state.before(0) == {}
    for number in range(4):
        state.save(number, {"m": torch.tensor([float(number)])})
    assert state.before(4)["m"].item() == 3
    assert state.before(3)["m"].item() == 2  # round 3 again, after a crash of the server
    assert len(list(tmp_path.iterdir())) == KEPT_ROUNDS


def test_what_is_kept_is_not_written_again(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    tensors = {"b": torch.arange(3.0), "a": torch.tensor(1.5, dtype=torch.float64)}
    state.save(0, tensors)
    (file,) = tmp_path.iterdir()
    inode = file.stat().st_ino
    state.save(0, dict(reversed(tensors.items())))
    assert file.stat().st_ino == inode
    state.save(0, {**tensors, "b": torch.zeros(3)})
    assert file.stat().st_ino != inode
    assert state.before(1)["b"].sum() == 0


def test_a_site_that_was_not_drawn_continues_from_its_last_round(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    state.save(1, {"m": torch.ones(1)})
    assert state.before(7)["m"].item() == 1


@pytest.mark.parametrize("run_id", ["../../etc", "", "a/b", ".hidden", "x" * 200])
def test_a_name_from_the_wire_cannot_leave_the_folder(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ValueError, match="run_id"):
        SiteState.of_run(tmp_path, "e", run_id, private=False)
    with pytest.raises(ValueError, match="experiment"):
        SiteState.of_run(tmp_path, run_id, "r", private=False)
