"""What is said of a job, which run is carried on, and what is taken of a download; no server is needed for these."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvflare.fuel.flare_api.api_spec import (
    AuthorizationError,
    ClientInfo,
    InternalError,
    InvalidJobDefinition,
    ServerInfo,
    SystemInfo,
)

from custom.codec import RESULTS
from custom.config import ExperimentConfig
from custom.controllers.diffusion_fedavg import DiffusionFedAvg
from custom.diffusion.networks import build_network
from custom.model_file import ModelFile, save_model
from custom.run_folder import JOBS_FILE, MODEL_FILE, RoundRecord, RunFailed, RunFolder
from custom.strict import ConfigError
from poc import jobs
from poc.federation import Federation, Members, provision
from poc.jobs import (
    download,
    end_running,
    follow,
    last_heard,
    refusals,
    resuming,
    run_of,
    session,
    submit,
    unfinished_run,
)

JOBS = Path(__file__).resolve().parents[2] / "jobs"
JOB, EARLIER = "3f6f0c9e-0a1b-4c2d-8e3f-123456789abc", "11111111-0a1b-4c2d-8e3f-123456789abc"
SITES = ("site-1", "site-2", "site-3")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """One whose runs are looked at; it has no kits."""
    members = Members(
        project="fedct", server="server", sites=SITES, users={"lead@x": "lead"}, kits="kits", ports=(1, 2)
    )
    return Federation(folder=tmp_path, members=members)


@pytest.fixture
def quiet_nvflare() -> Iterator[None]:
    """A session silences NVFlare's log, for all tests of this process; this gives it its voice back."""
    logger = logging.getLogger("nvflare")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def model(experiment: ExperimentConfig) -> ModelFile:
    weights = dict(build_network(experiment.network, spatial_dims=2, seed=1).state_dict())
    return ModelFile(experiment=experiment, rounds_done=1, weights=weights, ema=weights)


def record(number: int, **changes: Any) -> RoundRecord:
    accepted = {site: {"train_loss": 0.1 * (number + 1) * place} for place, site in enumerate(SITES, start=1)}
    whole = RoundRecord(round_number=number, asked=list(SITES), accepted=accepted, refused={}, silent=[], seconds=12.6)
    return replace(whole, **changes)


def run(runs: Path, experiment: ExperimentConfig, *, name: str = "20260101-000000-0000", job: str = "") -> RunFolder:
    """A run that has begun; ``name`` is its folder's."""
    made = RunFolder.create(runs, experiment)
    folder = made.path.with_name(name)
    made.path.rename(folder)
    if job:
        RunFolder(folder).note_job(job)
    return RunFolder(folder)


def complete(folder: RunFolder, model: ModelFile) -> RunFolder:
    folder.record(record(0))
    save_model(folder.path / MODEL_FILE, model)
    folder.complete({"mean": {}})
    return folder


# ---- what sites said


def test_only_the_sites_that_did_not_take_a_job_are_told_with_their_reason() -> None:
    meta = {
        "job_deploy_detail": [
            "server: OK",
            "site-1: OK",
            "site-2: NVFLARE_ERROR: site-2 refuses this job: required = 'x': the site's policy is y: z",
            "site-3: no reply (deployment timeout)",
            "num_ok_sites 1 < required_min_sites 2",
        ]
    }
    assert refusals(meta) == {
        "site-2": "site-2 refuses this job: required = 'x': the site's policy is y: z",
        "site-3": "no reply (deployment timeout)",
    }


@pytest.mark.parametrize("meta", [{}, {"job_deploy_detail": None}, {"job_deploy_detail": []}])
def test_a_job_of_which_nothing_is_known_yet_was_refused_by_nobody(meta: dict[str, Any]) -> None:
    assert refusals(meta) == {}


names = st.from_regex(r"[a-z][a-z0-9-]{0,10}", fullmatch=True)
reasons = st.text(min_size=1).filter(lambda text: text != "OK" and not text.startswith("NVFLARE_ERROR: "))


@given(st.dictionaries(names, reasons), st.sets(names), st.booleans())
def test_every_reason_comes_back_whole(refused: dict[str, str], fine: set[str], prefixed: bool) -> None:
    prefix = "NVFLARE_ERROR: " if prefixed else ""
    lines = [f"{name}: OK" for name in fine - set(refused)]
    lines += [f"{name}: {prefix}{why}" for name, why in refused.items()]
    assert refusals({"job_deploy_detail": lines}) == refused


# ---- the run of a job


def test_the_run_of_a_job_is_the_one_that_names_it(federation: Federation, experiment: ExperimentConfig) -> None:
    assert run_of(federation, JOB) is None
    first = run(federation.runs, experiment, job=EARLIER)
    assert run_of(federation, JOB) is None
    other = run(federation.runs, replace(experiment, name="other"), job=JOB)
    assert run_of(federation, JOB) == other.path
    assert run_of(federation, EARLIER) == first.path
    first.note_job("another")  # a job that carries the run on
    assert run_of(federation, "another") == first.path
    assert run_of(federation, EARLIER) == first.path


def test_half_of_a_jobs_name_names_none(federation: Federation, experiment: ExperimentConfig) -> None:
    run(federation.runs, experiment, job=JOB)
    for part in (JOB[:-1], JOB[1:], JOB.split("-", maxsplit=1)[0], ""):
        assert run_of(federation, part) is None


# ---- what is carried on


def test_the_newest_run_that_left_a_checkpoint_and_no_receipt_is_carried_on(
    federation: Federation, experiment: ExperimentConfig, model: ModelFile
) -> None:
    def begun(day: int, *, checkpoint: bool = True) -> RunFolder:
        folder = run(federation.runs, experiment, name=f"202601{day:02}-000000-0000")
        if checkpoint:
            folder.save_round(model)
        return folder

    with pytest.raises(ConfigError, match="nothing to resume"):
        unfinished_run(federation, experiment)
    begun(1, checkpoint=False)
    with pytest.raises(ConfigError, match="nothing to resume"):
        unfinished_run(federation, experiment)
    begun(2)
    newest = begun(3)
    begun(4, checkpoint=False)
    complete(begun(5), model)
    assert unfinished_run(federation, experiment).run_id == newest.run_id
    newest.fail("RoundVoid: too few")
    assert unfinished_run(federation, experiment).run_id == newest.run_id
    complete(newest, model)
    assert unfinished_run(federation, experiment).run_id == "20260102-000000-0000"
    with pytest.raises(ConfigError, match="job = 'other'"):
        unfinished_run(federation, replace(experiment, name="other"))


def everything(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_job_that_carries_a_run_on_is_a_copy_that_differs_in_one_argument(tmp_path: Path) -> None:
    job = tmp_path / "my job"
    shutil.copytree(JOBS / "ct_ddpm", job)
    before = everything(job)
    with resuming(job, "20260101-000000-0000") as copied:
        assert copied != job
        assert copied.name == job.name
        after = everything(copied)
        changed = Path("app/config/config_fed_server.json")
        assert {name for name in before if before[name] != after[name]} == {changed}
        assert set(before) == set(after)
        was, now = json.loads(before[changed]), json.loads(after[changed])
        assert now["workflows"][0]["args"] == {"resume_run": "20260101-000000-0000"}
        now["workflows"][0]["args"] = was["workflows"][0]["args"]
        assert now == was
        assert everything(job) == before
    assert not copied.exists()
    assert everything(job) == before


@pytest.mark.parametrize("args", [None, {}, {"resume_run": "an-earlier-one"}])
def test_the_controller_takes_the_run_whatever_arguments_it_had(tmp_path: Path, args: dict[str, str] | None) -> None:
    job = tmp_path / "job"
    shutil.copytree(JOBS / "ct_ddpm", job)
    file = job / "app" / "config" / "config_fed_server.json"
    server = json.loads(file.read_text())
    del server["workflows"][0]["args"]
    if args is not None:
        server["workflows"][0]["args"] = args
    file.write_text(json.dumps(server))
    with resuming(job, "20260101-000000-0000") as copied:
        (workflow,) = json.loads((copied / "app" / "config" / "config_fed_server.json").read_text())["workflows"]
    assert workflow["path"].endswith(DiffusionFedAvg.__name__)
    DiffusionFedAvg(**workflow["args"])
    assert workflow["args"] == {"resume_run": "20260101-000000-0000"}


def test_the_copy_is_gone_when_handing_it_in_fails() -> None:
    with pytest.raises(KeyboardInterrupt), resuming(JOBS / "ct_ddpm", "20260101-000000-0000") as copied:
        raise KeyboardInterrupt
    assert not copied.exists()


# ---- following


class PlayedBack:
    """Stands in for NVFlare's session, which needs a server: says one description of the job after the other."""

    def __init__(self, *steps: dict[str, Any] | Callable[[], dict[str, Any]]) -> None:
        self._steps = list(steps)

    def get_job_meta(self, job_id: str) -> dict[str, Any]:
        assert job_id == JOB
        step = self._steps.pop(0)
        return step() if callable(step) else step


def followed(federation: Federation, *steps: Any) -> tuple[jobs.Followed, list[str]]:
    lines: list[str] = []
    played: Any = PlayedBack(*steps)
    return follow(federation, played, JOB, lines.append, poll_s=0), lines


def test_each_round_is_told_once_when_it_is_done(federation: Federation, experiment: ExperimentConfig) -> None:
    begun: list[RunFolder] = []

    def begins() -> dict[str, Any]:
        begun.append(run(federation.runs, experiment, job=JOB))
        return {"status": "RUNNING"}

    def goes_on(*records: RoundRecord) -> Callable[[], dict[str, Any]]:
        def step() -> dict[str, Any]:
            for one in records:
                begun[0].record(one)
            return {"status": "RUNNING"}

        return step

    missing = record(1, accepted={"site-1": {}}, refused={"site-2": "NaN"}, silent=["site-3"], seconds=0.4)
    end, lines = followed(
        federation,
        {"status": "SUBMITTED"},
        begins,
        {"status": "RUNNING"},
        goes_on(record(0)),
        {"status": "RUNNING"},
        goes_on(missing),
        {"status": "FINISHED:COMPLETED"},
    )
    assert lines == [
        "round 1/2 done in 13 s, train loss 0.2000, 3 of 3 sites",
        "round 2/2 done in 0 s, 1 of 3 sites, refused site-2, silent site-3",
    ]
    assert end == jobs.Followed(job_id=JOB, status="FINISHED:COMPLETED", refused={}, folder=begun[0].path)


def test_rounds_that_ended_with_the_job_are_told_before_the_end(
    federation: Federation, experiment: ExperimentConfig
) -> None:
    def all_at_once() -> dict[str, Any]:
        folder = run(federation.runs, experiment, job=JOB)
        folder.record(record(0))
        folder.record(record(1))
        return {"status": "FINISHED:COMPLETED"}

    _, lines = followed(federation, {"status": "SUBMITTED"}, all_at_once)
    assert [line.split(" done")[0] for line in lines] == ["round 1/2", "round 2/2"]


def test_of_a_run_that_is_carried_on_only_the_new_rounds_are_told(
    federation: Federation, experiment: ExperimentConfig
) -> None:
    folder = run(federation.runs, experiment, job=EARLIER)
    folder.record(record(0))

    def taken_over() -> dict[str, Any]:
        folder.note_job(JOB)
        return {"status": "RUNNING"}

    def goes_on() -> dict[str, Any]:
        folder.record(record(1))
        return {"status": "FINISHED:COMPLETED"}

    end, lines = followed(federation, {"status": "SUBMITTED"}, taken_over, goes_on)
    assert [line.split(" done")[0] for line in lines] == ["round 2/2"]
    assert end.folder == folder.path


def test_a_refusal_is_told_once_and_kept(federation: Federation) -> None:
    said = {"job_deploy_detail": ["site-1: OK", "site-2: NVFLARE_ERROR: site-2 refuses this job: why"]}
    more = {"job_deploy_detail": [*said["job_deploy_detail"], "site-3: no reply (deployment timeout)"]}
    end, lines = followed(
        federation,
        {"status": "SUBMITTED"},
        {"status": "DISPATCHED", **said},
        {"status": "DISPATCHED", **said},
        {"status": "FINISHED:ABORTED", **more},
    )
    assert lines == ["site-2: site-2 refuses this job: why", "site-3: no reply (deployment timeout)"]
    assert set(end.refused) == {"site-2", "site-3"}
    assert end.folder is None
    assert end.status == "FINISHED:ABORTED"


# ---- downloads


class Downloads:
    """Stands in for NVFlare's session: lays a job's folder down as NVFlare unpacks a download."""

    def __init__(self, produced: RunFolder | None) -> None:
        self._produced = produced

    def download_job_result(self, job_id: str, destination: str) -> str:
        location = Path(destination) / job_id
        (location / "job" / "app" / "config").mkdir(parents=True)  # fails where something is left of an earlier one
        (location / "job" / "meta.json").write_text("{}")
        (location / "workspace").mkdir()
        (location / "workspace" / "log.txt").write_text("log")
        if self._produced is not None:
            self._produced.copy_products(location / "workspace" / RESULTS)
        return str(location)


def fetched(federation: Federation, produced: RunFolder | None) -> Path:
    opened: Any = Downloads(produced)
    return download(opened, JOB, federation.results)


def test_products_are_held_against_their_receipt(
    federation: Federation, experiment: ExperimentConfig, model: ModelFile
) -> None:
    folder = complete(run(federation.runs, experiment), model)
    folder.note_job(JOB)
    products = fetched(federation, folder)
    assert products.is_relative_to(federation.results / JOB)
    assert (products / MODEL_FILE).read_bytes() == (folder.path / MODEL_FILE).read_bytes()
    assert not (products / JOBS_FILE).exists()
    (federation.results / JOB / "left of an earlier one").write_text("")
    assert fetched(federation, folder) == products
    assert not (federation.results / JOB / "left of an earlier one").exists()


def test_a_model_that_is_not_the_receipts_is_refused(
    federation: Federation, experiment: ExperimentConfig, model: ModelFile
) -> None:
    folder = complete(run(federation.runs, experiment), model)
    content = bytearray((folder.path / MODEL_FILE).read_bytes())
    content[-1] ^= 1
    (folder.path / MODEL_FILE).write_bytes(content)
    with pytest.raises(RunFailed, match="not the one of the receipt"):
        fetched(federation, folder)
    (folder.path / MODEL_FILE).unlink()
    with pytest.raises(RunFailed, match="not the one of the receipt"):
        fetched(federation, folder)


def test_a_job_that_did_not_complete_gives_nothing(federation: Federation, experiment: ExperimentConfig) -> None:
    with pytest.raises(RunFailed, match=r"no receipt.*fedct poc resume"):
        fetched(federation, None)
    folder = run(federation.runs, experiment)
    with pytest.raises(RunFailed, match=r"no receipt.*fedct poc resume"):
        fetched(federation, folder)
    folder.fail("RoundVoid: too few")
    with pytest.raises(RunFailed, match="failed: RoundVoid: too few"):
        fetched(federation, folder)


def test_two_receipts_in_one_download_are_one_too_many(
    federation: Federation, experiment: ExperimentConfig, model: ModelFile
) -> None:
    folder = complete(run(federation.runs, experiment), model)

    class Twice(Downloads):
        def download_job_result(self, job_id: str, destination: str) -> str:
            location = super().download_job_result(job_id, destination)
            folder.copy_products(Path(location) / "elsewhere" / RESULTS)
            return location

    opened: Any = Twice(folder)
    with pytest.raises(RunFailed):
        download(opened, JOB, federation.results)


# ---- sessions


def test_nobody_logs_in_who_is_not_in_the_federation(federation: Federation) -> None:
    with pytest.raises(ConfigError, match=r"user = 'nobody@x'.*lead@x"), session(federation, "nobody@x"):
        pass


def test_a_server_that_is_not_up_is_said_to_be_so(tmp_path: Path, quiet_nvflare: None) -> None:
    made = provision(tmp_path / "a federation")
    with pytest.raises(ConfigError, match="server = 'server': does not answer; is it up"), session(made, timeout_s=1.0):
        pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            AuthorizationError("not authorized"),
            r"user = 'viewer@x': may not submit jobs \(not authorized\); ask a lead",
        ),
        (InvalidJobDefinition("no meta.json"), "job = .*no meta.json"),
        (InternalError("disk full"), "job = .*disk full"),
    ],
)
def test_a_job_that_is_not_taken_is_refused_with_the_reason(tmp_path: Path, error: Exception, said: str) -> None:
    class Refuses:
        """Stands in for a session whose server refuses."""

        username = "viewer@x"

        def submit_job(self, path: str) -> str:
            assert Path(path).is_absolute()
            raise error

    opened: Any = Refuses()
    (tmp_path / "job").mkdir()
    with pytest.raises(ConfigError, match=said):
        submit(opened, tmp_path / "job")


class Listed:
    """Stands in for a session: lists jobs, each of which ends some listings after it was told to."""

    def __init__(self, listed: list[dict[str, str]], *, ends: bool = True) -> None:
        self._listed = listed
        self._ends = ends
        self.aborted: list[str] = []

    def list_jobs(self) -> list[dict[str, str]]:
        return [
            job | ({"status": "FINISHED:ABORTED"} if self._ends and job["job_id"] in self.aborted else {})
            for job in self._listed
        ]

    def abort_job(self, job_id: str) -> None:
        self.aborted.append(job_id)


LISTING = [
    {"job_id": "a", "job_name": "small", "status": "RUNNING"},
    {"job_id": "b", "job_name": "small", "status": "FINISHED:COMPLETED"},
    {"job_id": "c", "job_name": "other", "status": "RUNNING"},
    {"job_id": "d", "name": "small", "status": "SUBMITTED"},
]


def worked_on(federation: Federation, experiment: ExperimentConfig, *job_ids: str) -> RunFolder:
    folder = run(federation.runs, experiment)
    for job_id in job_ids:
        folder.note_job(job_id)
    return folder


def test_the_jobs_that_work_on_the_run_end_and_no_others(
    federation: Federation, experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their ids: what a job folder is called says nothing of the run. One that the server forgot is over."""
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    opened: Any = Listed(LISTING)
    folder = worked_on(federation, experiment, "forgotten", "b", "a", "d")
    assert sorted(end_running(opened, folder)) == ["a", "d"]
    assert sorted(opened.aborted) == ["a", "d"]
    assert end_running(opened, folder) == []


def test_a_job_that_does_not_end_is_named_and_asked_once(
    federation: Federation, experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    opened: Any = Listed(LISTING[:1], ends=False)
    with pytest.raises(ConfigError, match=r"jobs = \['a'\]: they do not end"):
        end_running(opened, worked_on(federation, experiment, "a"), timeout_s=0.05)
    assert opened.aborted == ["a"]


def test_a_site_was_last_heard_of_when_the_server_says_and_never_if_it_says_nothing() -> None:
    class Knows:
        """Stands in for a session."""

        def get_system_info(self) -> SystemInfo:
            heard = (1764073432.5, "1764073430.25", None)
            clients = [ClientInfo(name, when) for name, when in zip(SITES, heard, strict=True)]
            return SystemInfo(ServerInfo("started", 0.0), clients, [])

    opened: Any = Knows()
    assert last_heard(opened) == {"site-1": 1764073432.5, "site-2": 1764073430.25, "site-3": 0.0}
