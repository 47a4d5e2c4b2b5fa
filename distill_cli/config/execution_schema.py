"""The sections of the config that decide how a run is executed: engines, checkpoints, cluster, trackers, search."""

from enum import Enum
from typing import Any

from distill_cli.config.fields import key, section
from distill_cli.metrics import find

Roles = Enum("Roles", {"shared": "shared", "split": "split"})
WandbMode = Enum("WandbMode", {"online": "online", "offline": "offline"})
SearchSampler = Enum("SearchSampler", {"tpe": "tpe", "random": "random"})


@section
class EngineModelConfig:
    tensor_parallel: int = key(1, evaluation=True)
    """Consecutive ranks that share one engine, for a model that is too large or too slow on one GPU. It must divide the
    ranks of a node, attention heads, the MLP and the vocabulary. Student, teacher and `mesh.tensor` may differ."""
    ranks: int | None = key(None, at_least=0)
    """Ranks that sample, or score with a teacher, alone, with cluster.roles=split: a multiple of tensor_parallel. null
    is the ranks of one engine for the student, and 0 for a teacher: the ranks that train score."""
    sleep: bool | None = None
    """Free the GPU's memory while the other models work: the student's weights are dropped, the teacher's move to host
    memory. null is true on GPUs; engines on CPUs cannot sleep."""
    gpu_memory_utilization: float = key(0.25, above=0, at_most=1, evaluation=True)
    """Share of a GPU's memory that the engine takes for weights and KV cache. While awake, an engine must fit with the
    trainer's part of the student; engines that do not sleep must fit together."""
    kv_cache_gib: float | None = key(None, above=0, evaluation=True)
    """Size of the KV cache in GiB; null is what gpu_memory_utilization leaves on GPUs, and 0.25 on CPUs."""
    max_model_len: int | None = None
    """Greatest length of a sequence in tokens; null is what training and validation need."""
    enforce_eager: bool = key(False, evaluation=True)
    """Leave out CUDA graphs and compilation: a faster start, slower sampling. Always on for CPUs."""
    kwargs: dict[str, Any] = key(factory=dict, evaluation=True)
    """Further arguments of `vllm.LLM`."""


@section
class EngineConfig:
    student: EngineModelConfig = key(factory=EngineModelConfig)
    teacher: EngineModelConfig = key(factory=EngineModelConfig)


@section
class CheckpointConfig:
    enabled: bool = True
    """Write checkpoints. Without them a run cannot be resumed."""
    period: int = key(10, at_least=1)
    """Steps between checkpoints. The last step, and a run that is stopped by a signal, save one too."""
    keep_top_k: int = key(3, at_least=0)
    """Checkpoints to keep, the best by `metric`, in addition to the newest. Checkpoints without a value come last."""
    metric: str = "val/accuracy"
    """Metric that ranks checkpoints: any of train/, rollout/ or val/ (docs/metrics.md)."""
    higher_is_better: bool | None = None
    """Which values of `metric` are kept; null is the metric's own: lower for a loss, higher for an accuracy."""
    must_save_by: str | None = None
    """DD:HH:MM:SS of wall clock since the command was typed, restarts included. Before a step that may end later, the
    run saves a checkpoint and stops; `resume` continues it."""
    save_optimizer: bool = True
    """Save the optimizer state. Without it a checkpoint is a third as large, and a resumed run is no longer exact."""
    async_save: bool = True
    """Train on while a checkpoint is written, at the cost of a copy in host memory."""

    @property
    def keeps_highest(self) -> bool:
        """Whether the best checkpoint is the one with the highest value of `metric`."""
        metric = find(self.metric)
        is_higher_better = metric is not None and metric.better == "higher"
        return is_higher_better if self.higher_is_better is None else self.higher_is_better


@section
class SlurmConfig:
    partition: str | None = None
    """Partition of the job; null is the cluster's default."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit, such as 04:00:00, 2-12:00:00, or minutes; null is the partition's default."""
    cpus_per_node: int | None = key(None, at_least=1)
    """CPUs of each node; null is the share of a node's CPUs that matches the share of its GPUs, or one per rank on
    CPUs."""
    mem: str | None = None
    """Memory of each node, such as 200G; 0 is all of it; null is the cluster's default."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes to leave out."""
    setup: list[str] = key(factory=list)
    """Lines of shell that run before the ranks start, such as `module load cuda`."""
    container: dict[str, Any] = key(factory=dict)
    """With pyxis: `image`, `mounts`, `workdir` and so on, each an argument --container-<name> of srun."""
    python: str | None = None
    """Python interpreter on the nodes, or in the container; null is the one that submits."""
    extra: dict[str, Any] = key(factory=dict)
    """Further parameters of sbatch, without dashes: {reservation: mine, exclusive: true}."""
    max_requeues: int = key(10, at_least=0)
    """How often a job is queued again after a preemption, its time limit or the loss of a node."""
    signal_s: int = 120
    """Seconds before the time limit at which the run saves and is queued again; at least cluster.grace_s."""
    teacher: dict[str, Any] = key(factory=dict)
    """What differs in the jobs that serve teachers (`model.teacher.nodes`): any of these keys, and `gpus_per_node`;
    {partition: large, time: 2-00:00:00}."""
    shared_folders: list[str] | None = None
    """Folders that every node sees, such as [/home, /scratch]; a run in another folder is refused. null judges by the
    file system: a disk of this machine is refused if the nodes are other machines."""


@section
class ClusterConfig:
    """Where runs are executed. A launcher's own keys are in the section of its name: `cluster.slurm.*` has no effect
    with another launcher."""

    launcher: str = key("local", evaluation=True)
    """local (this machine) or slurm; `cluster=slurm` chooses it."""
    nodes: int = key(1, at_least=1)
    """Machines of a run; more than one needs a launcher that submits jobs."""
    gpus_per_node: int | None = key(None, at_least=0, evaluation=True)
    """GPUs of each node; null is all visible ones, or all of a cluster's node; 0 runs on CPUs."""
    ranks_per_node: int | None = key(None, at_least=1, evaluation=True)
    """Processes of each node. On GPUs it must be the number of GPUs. null is one per GPU; on this machine's CPU the
    number that is fastest: one per core for small models, else one; on a cluster's CPUs one."""
    roles: Roles = Roles.shared
    """shared: every rank trains, samples and scores, in turn. split: engine.student.ranks ranks sample,
    engine.teacher.ranks score, and the others train; with rollout.staleness they work at the same time."""
    max_restarts: int = key(3, at_least=0)
    """How often a failed run restarts by itself from its newest checkpoint. An attempt that fails before its first step
    is not repeated."""
    hang_timeout_s: float = key(1800, at_least=0, evaluation=True)
    """Seconds that a stage of a step may take before the ranks count as hung and are ended; 0 waits for ever."""
    grace_s: float = key(60, at_least=0)
    """Seconds that the ranks have for a checkpoint when the run is stopped (Ctrl-C, SIGTERM, a scheduler's
    warning)."""
    parallel_jobs: int | None = key(None, at_least=1)
    """Runs of a sweep at a time; null is one on this machine, and no limit on a cluster. On this machine each run takes
    gpus_per_node GPUs of its own. A search has as many trials at a time; null is one."""
    wait: bool = False
    """Follow a submitted job to its end and exit with its status; `--wait` sets it."""
    env: dict[str, str] = key(factory=dict, evaluation=True)
    """Environment variables of the ranks. Not for passwords and tokens: the ranks inherit those from your shell."""
    hf_home: str | None = key(None, evaluation=True)
    """Folder of models and data from the Hugging Face hub; null is HF_HOME of the environment, or its default."""
    compile_cache: str | None = key(None, evaluation=True)
    """Folder of what torch, Triton and vLLM compile; null is each one's default. A node's own disk is best."""
    tmp_dir: str | None = key(None, evaluation=True)
    """Folder of temporary files; null is TMPDIR of the environment. In all three folders, $NAMES are variables of the
    node."""
    slurm: SlurmConfig = key(factory=SlurmConfig)


@section
class MlflowConfig:
    enabled: bool = False
    """Log runs to MLflow. `tracker=mlflow`, which is the default, turns it on; `tracker=none` turns all trackers
    off."""
    uri: str | None = key(None, credentials="MLFLOW_TRACKING_URI")
    """Address of a tracking server or a database; null is MLFLOW_TRACKING_URI of the environment, or else `mlflow.db`
    in run.root. Credentials in it are not written to files: they stay in the environment of started processes."""
    experiment: str = "distill"
    """MLflow experiment of the runs."""
    run_name: str | None = None
    """Name of the run in MLflow; null is the run folder's name."""
    log_model: bool = False
    """Log the trained student's folder as the artifact `model` at the end of the run."""


@section
class WandbConfig:
    enabled: bool = False
    """Log runs to Weights & Biases. `tracker=wandb` turns it on."""
    uri: str | None = key(None, only_with="tracker.wandb.enabled")
    """Address of a server of your own; null is WANDB_BASE_URL of the environment, the server of `wandb login`, or else
    https://api.wandb.ai."""
    project: str | None = key(None, only_with="tracker.wandb.enabled")
    """Project of the run; null is WANDB_PROJECT of the environment, or else `distill`."""
    entity: str | None = key(None, only_with="tracker.wandb.enabled")
    """User or team that owns the project; null is WANDB_ENTITY of the environment, or else your account's default."""
    group: str | None = key(None, only_with="tracker.wandb.enabled")
    """Group of the run; null is the folder's name of the sweep that the run is part of, or else WANDB_RUN_GROUP of the
    environment."""
    run_name: str | None = key(None, only_with="tracker.wandb.enabled")
    """Name of the run in W&B; null is the run folder's name."""
    tags: list[str] = key(factory=list, only_with="tracker.wandb.enabled")
    """Tags of the run, such as [baseline, 4b]."""
    notes: str | None = key(None, only_with="tracker.wandb.enabled")
    """Description of the run."""
    mode: WandbMode | None = key(None, only_with="tracker.wandb.enabled")
    """online sends the run while it lasts; offline writes it to `wandb/` in the run's folder; null is WANDB_MODE of the
    environment, or else online. The API key is taken from WANDB_API_KEY or `wandb login`, never from the config."""
    log_model: bool = key(False, only_with="tracker.wandb.enabled")
    """Upload the trained student's folder to the run's files at its end."""


@section
class TensorboardConfig:
    enabled: bool = False
    """Write TensorBoard's event files to `tensorboard/` in the run's folder. `tracker=tensorboard` turns it on."""
    samples: int = key(4, at_least=0, only_with="tracker.tensorboard.enabled")
    """Answers of each validation to show as text, of those that eval.record_samples records."""


@section
class TrackerConfig:
    """Where runs are shown in addition to their folders; `tracker=[mlflow,wandb]` turns on several. Each is a module of
    `track/`."""

    mlflow: MlflowConfig = key(factory=MlflowConfig)
    wandb: WandbConfig = key(factory=WandbConfig)
    tensorboard: TensorboardConfig = key(factory=TensorboardConfig)


@section
class SearchConfig:
    """A search (`distill -m` with a range or several values): each run draws its values from them."""

    trials: int | None = None
    """Number of runs; null runs every combination of the values instead. Taken from the command line alone."""
    sampler: SearchSampler = key(SearchSampler.tpe, only_with="search.trials")
    """tpe draws near the best trials so far, after ten random ones (Bergstra et al. 2011); random ignores them."""
    seed: int = key(0, only_with="search.trials")
    """Seed of the sampler: the same command draws the same trials."""


@section
class RunConfig:
    root: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Name of the run's folder in root; null is <date>-<time>_<model>_<loss>, or with the
    experiment in place of the model."""
    print_every: int = key(1, at_least=1, resume=True)
    """Steps between printed lines if the output is no terminal."""
