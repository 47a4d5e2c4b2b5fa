"""Slurm without a Slurm: its commands' output is handed in."""

import signal
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError, DistillError
from distill_cli.launch.base import Place
from distill_cli.launch.slurm import Slurm, parameters, parse_time_limit

SINFO = """\
main*|up|infinite|n/a|3|1-infinite|gpu:a100:2(S:0-1)|16
main*|up|infinite|n/a|1|1-infinite|gpu:a100:4|8
short|up|5:00|2:00|2|1-2|(null)|4
old|down|1-00:00:00|1:00:00|1|1-infinite|(null)|4
"""
ANSWERS = {
    "sinfo": SINFO,
    "squeue": "7_0|RUNNING\n7_1|PENDING\n9|RUNNING\n",
    "sacct": "REQUEUED\nCANCELLED by 0\n",
    "scontrol show config": "MaxArraySize = 11\n",
    "scontrol show node": "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=far",
    "scontrol show job": "JobId=7 PreemptTime=2026-01-01T00:00:00",
}
MOUNTS = {"/": "ext4", "/home": "nfs4", "/tmp": "tmpfs"}


def slurm(**changed: str | Exception) -> Slurm:
    """A cluster whose commands answer as `ANSWERS` has it; `sinfo=...` changes one."""
    answers = ANSWERS | {name.replace("_", " "): answer for name, answer in changed.items()}

    def ask(*command: str) -> str:
        commands.append(" ".join(command))
        answer = next(answer for name, answer in answers.items() if commands[-1].startswith(name))
        if isinstance(answer, Exception):
            raise answer
        return answer

    commands: list[str] = []
    launcher = Slurm(ask)
    launcher.commands = commands
    return launcher


def config_of(*overrides: str) -> Config:
    return compose(["cluster=slurm", *overrides])[0].config


def test_resolve_fills_in_gpus_and_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_cli.machine.hardware.has_cpu_vllm", lambda: False)
    config = config_of()
    resolved = slurm().resolve(config)
    assert (resolved.cluster.gpus_per_node, resolved.cluster.slurm.cpus_per_node) == (4, 8)
    assert (config.cluster.gpus_per_node, config.cluster.slurm.cpus_per_node) == (None, None)
    half = slurm().resolve(config_of("cluster.gpus_per_node=2"))
    assert (half.cluster.gpus_per_node, half.cluster.slurm.cpus_per_node) == (2, 4)
    ranks = slurm().resolve(config_of("cluster.gpus_per_node=0", "cluster.ranks_per_node=3"))
    assert ranks.cluster.slurm.cpus_per_node == 3


def test_teachers_jobs_have_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_cli.machine.hardware.has_cpu_vllm", lambda: False)
    config = config_of("model.teacher.nodes=1", "cluster.slurm.teacher.partition=short", "cluster.gpus_per_node=2")
    resolved = slurm().resolve(config)
    assert resolved.cluster.slurm.cpus_per_node == 4
    assert resolved.cluster.slurm.teacher == {"partition": "short", "gpus_per_node": 2, "cpus_per_node": 2}
    own = slurm().resolve(config_of("model.teacher.nodes=1", "cluster.slurm.teacher.partition=short"))
    assert own.cluster.gpus_per_node == 4
    assert own.cluster.slurm.teacher["gpus_per_node"] == 0
    assert slurm().resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("model.teacher.nodes=5", "model.teacher.nodes=5: partition main gives a job at most 4"),
        ("cluster.slurm.teacher.partition=old", "cluster.slurm.teacher.partition=old: is down"),
        ("cluster.slurm.teacher.partition=mian", "cluster.slurm.teacher.partition=mian: no such partition"),
        (
            "cluster.slurm.teacher.partition=short cluster.slurm.teacher.time=6",
            "cluster.slurm.teacher.time=6: partition",
        ),
        (
            "cluster.slurm.teacher.gpus_per_node=5",
            "cluster.slurm.teacher.gpus_per_node=5: a node of partition main has 4",
        ),
    ],
)
def test_impossible_teachers_jobs_are_named(overrides: str, problem: str) -> None:
    config = config_of("cluster.slurm.shared_folders=[/]", "model.teacher.nodes=1", *overrides.split())
    problems = list(slurm().teacher_problems(config, "teacher"))
    assert [text for text in problems if text.startswith(problem)], problems


def test_resolve_leaves_errors_to_problems() -> None:
    silent, config = slurm(sinfo=ConfigError("sinfo does not answer")), config_of()
    assert silent.resolve(config) is config
    with pytest.raises(ConfigError, match="does not answer"):
        list(silent.problems(config))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("cluster.slurm.partition=old", "cluster.slurm.partition=old: is down"),
        ("cluster.nodes=5", "cluster.nodes=5: partition main gives a job at most 4"),
        ("cluster.slurm.partition=short cluster.nodes=3", "cluster.nodes=3: partition short gives a job at most 2"),
        (
            "cluster.slurm.partition=short",
            "cluster.slurm.time: partition short gives 2 minutes where none is asked for; it must exceed",
        ),
        (
            "cluster.slurm.partition=short cluster.slurm.time=6",
            "cluster.slurm.time=6: partition short allows 5",
        ),
        ("cluster.gpus_per_node=5", "cluster.gpus_per_node=5: a node of partition main has 4"),
        ("cluster.slurm.time=1x", "cluster.slurm.time=1x: must be minutes"),
        ("cluster.slurm.time=2", "cluster.slurm.time=2: must exceed cluster.slurm.signal_s=120"),
        ("cluster.slurm.signal_s=30", "cluster.slurm.signal_s=30: saving may take cluster.grace_s=60"),
        ("+cluster.slurm.extra.open_mode=x", "cluster.slurm.extra.open-mode: is set by distill"),
        ("cluster.slurm.shared_folders=[/no/such]", "run.root=runs: not in a folder that all nodes see"),
    ],
)
def test_what_the_cluster_cannot_run(overrides: str, problem: str) -> None:
    problems = slurm().problems(config_of("cluster.slurm.shared_folders=[/]", *overrides.split()))
    assert [text for text in problems if text.startswith(problem)]


def test_a_fitting_job_has_no_problem() -> None:
    config = config_of("cluster.slurm.shared_folders=[/]", "cluster.nodes=4", "cluster.slurm.time=1:00:00")
    assert list(slurm().problems(config, num_jobs=11)) == []
    assert list(slurm().problems(config, num_jobs=12)) == [
        "a sweep of 12 runs: an array of this cluster holds 11; make several sweeps"
    ]


def test_an_unknown_partition_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"cluster.slurm.partition=mian: .* did you mean main\?"):
        list(slurm().problems(config_of("cluster.slurm.partition=mian")))


def test_status_leaves_out_ended_jobs() -> None:
    assert slurm().status(["7_0", "7_2", "9"]) == {"7_0": "RUNNING", "9": "RUNNING"}
    forgotten = ConfigError("squeue says: slurm_load_jobs error: Invalid job id specified")
    assert slurm(squeue=forgotten).status(["9"]) == {}
    with pytest.raises(DistillError):
        slurm(squeue=ConfigError("squeue says: no route")).status(["9"])


def test_accounting_tells_how_a_job_ended() -> None:
    assert slurm().end_state("7") == "CANCELLED by 0"
    assert slurm(sacct=ConfigError("no accounting")).end_state("7") == ""
    assert slurm(sacct="").end_state("7") == ""


@pytest.mark.parametrize(
    ("reason", "preempted", "restarts", "requeues"),
    [
        ("SIGUSR2", False, 0, True),
        ("SIGUSR2", False, 10, False),
        ("SIGTERM", True, 9, True),
        ("SIGTERM", False, 0, False),
        ("checkpoint.must_save_by", True, 0, False),
    ],
)
def test_only_the_cluster_s_stops_requeue(
    reason: str, preempted: bool, restarts: int, requeues: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    job = {} if preempted else {"scontrol_show_job": "PreemptTime=None"}
    launcher, handler = slurm(scontrol_requeue="", **job), signal.getsignal(signal.SIGTERM)
    launcher.requeue(config_of(), Place("7", restarts), reason=reason)
    signal.signal(signal.SIGTERM, handler)
    assert ("scontrol requeue 7" in launcher.commands) == requeues


def test_too_many_restarts_end_a_job() -> None:
    slurm().check_restarts(config_of(), Place("7", 10))
    with pytest.raises(DistillError, match="cluster.slurm.max_requeues=10"):
        slurm().check_restarts(config_of(), Place("7", 11))


def test_unresolved_addresses_come_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm().address("localhost") == "localhost"
    assert slurm().address("no-such-host.invalid") == "10.0.0.1"


def test_parameters_of_the_script() -> None:
    config = config_of(
        "cluster.gpus_per_node=2", "cluster.slurm.cpus_per_node=6", "cluster.slurm.qos=long", "cluster.parallel_jobs=3",
        "+cluster.slurm.extra.cpu_bind=none", "+cluster.slurm.container.image=a.sqsh",
    )  # fmt: skip
    made = parameters(config, name="r", max_jobs=4)
    assert made.items() >= {
        "qos": "long", "gpus_per_node": 2, "cpus_per_task": 6, "array_parallelism": 3, "signal_delay_s": 120,
        "additional_parameters": {"cpu-bind": "none", "requeue": True}, "mem": None,
        "srun_args": ["--kill-on-bad-exit=1", "--cpus-per-task=6", "--container-image=a.sqsh"],
    }.items()  # fmt: skip
    own = parameters(config_of("+cluster.slurm.extra.gres=gpu:a:1", "cluster.gpus_per_node=1"), name="r", max_jobs=4)
    assert (own["gpus_per_node"], own["array_parallelism"]) == (None, 4)


def test_jobs_begin_after_others() -> None:
    made = parameters(config_of(), name="r", max_jobs=1, after=["7", "8"])
    assert made["additional_parameters"]["dependency"] == "after:7:8"
    both = parameters(config_of("+cluster.slurm.extra.dependency=afterok:5"), name="r", max_jobs=1, after=["7"])
    assert both["additional_parameters"]["dependency"] == "afterok:5,after:7"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60", 3600), ("1:30", 90), ("01:00:00", 3600), ("1-0", 86400), ("2-00:00:01", 172801), ("x", None), ("0", None)],
)
def test_time_limits_are_slurm_s(text: str, seconds: float | None) -> None:
    assert parse_time_limit(text) == seconds


def test_doctor_lists_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: "/usr/bin/squeue")
    rows = slurm().findings()
    assert [(name, is_fine) for name, is_fine, _, _ in rows] == [
        ("slurm main", True), ("slurm short", True), ("slurm old", False),
    ]  # fmt: skip
    assert rows[0][2] == "4 nodes of 4 GPUs, the default"


def test_other_nodes_need_shared_disks() -> None:
    others, here = Slurm(lambda *_: "NodeHostName=far NodeHostName=away"), Slurm(lambda *_: "")
    assert "other nodes do not see" in others.unshared(Path("/srv/x"), None, MOUNTS)
    assert others.unshared(Path("/home/x"), None, MOUNTS) is None
    assert here.unshared(Path("/srv/x"), None, MOUNTS) is None
    assert others.unshared(Path("/srv/x"), ["/srv"], MOUNTS) is None
    assert "/scratch" in here.unshared(Path("/srv/x"), ["/scratch"], MOUNTS)


@pytest.mark.parametrize(("path", "kind"), [("/home/me/runs", None), ("/tmp/runs", "tmpfs"), ("/srv", "ext4")])
def test_longest_mount_point_holds_a_path(path: str, kind: str | None) -> None:
    problem = Slurm(lambda *_: "NodeHostName=far").unshared(Path(path), None, MOUNTS)
    assert problem is None if kind is None else f"on a {kind} file system" in problem


def test_this_machine_s_mounts_are_read() -> None:
    assert Slurm(lambda *_: "NodeHostName=far").unshared(Path("/proc/self"), None) is None
