"""What `distill --help` and `distill VERB --help` say: each fits one screen and ends with examples."""

from __future__ import annotations

GENERAL = """\
distill - on-policy distillation of language models from one command

  distill [train] [OVERRIDES]     train a student on its own answers, scored by a teacher (the default verb)
  distill plan [OVERRIDES]        compose and check everything, print what would run, start nothing
  distill check [OVERRIDES]       two minutes on the real models: are loss, engines, sync, checkpoint right?
  distill resume RUN|SWEEP        go on from the newest checkpoint, on any number of ranks
  distill replay RUN [OVERRIDES]  train again on what a run recorded (rollout.save_scores), without engines
  distill watch RUN               follow a run in progress, wherever it runs
  distill eval RUN|MODEL          accuracy on a benchmark, with intervals; --against compares models
  distill export RUN [DIR]        a checkpoint as a Hugging Face folder
  distill report RUN|SWEEP...     one HTML page about a run, or several compared
  distill track sync RUN...       send trackers what they could not be sent before
  distill ls [GROUP]              the choices of a config group, each with its first comment line
  distill doctor [--json]         what is installed, visible and reachable, and how to fix what is not

examples
  distill                                              the embedded pair, on this machine's CPU
  distill model=qwen3_1.7b_4b loss=mixed data.train.path=train.jsonl data.validation.path=test.jsonl
  distill -m loss.topk=32,64 loss.kl_weight=0.3,0.5    a sweep
  distill cluster=slurm cluster.nodes=2 cluster.partition=gpu model=qwen3_1.7b_4b ...

`distill VERB --help` says more. Overrides are Hydra's: group=choice, key=value; -m, --cfg, --info and
`eval "$(distill -sc install=bash)"` for tab completion work as in any Hydra application.
Set DISTILL_DEBUG=1 for tracebacks.
"""

VERBS = {
    "train": """\
distill [train] [OVERRIDES] [--wait] - train a student on its own answers, scored by a teacher

Checks the whole configuration, writes the run's folder, starts the ranks, and prints a line a step. What is wrong is
said before anything starts, all of it at once (status 2).

  -m             a sweep: every combination of the values that are separated by commas, each in a folder of its own;
                 hydra/sweeper=optuna chooses instead, hydra/launcher=submitit_slurm submits (docs/clusters.md)
  --cfg job      print the composed configuration instead
  --wait         with cluster=slurm: follow the job, and end with its status

examples
  distill                                              the embedded pair, on this machine's CPU
  distill experiment=quick                             ten steps of it
  distill loss=reverse loss.topk=32 train.lr=1e-3      a choice of a group, and keys
  distill -m loss.topk=32,64 loss.kl_weight=0.3,0.5    a sweep of four runs
  distill cluster=slurm cluster.partition=gpu          the same as a job
""",
    "plan": """\
distill plan [OVERRIDES] [--measure] - compose and check everything, print what would run, start nothing

The mesh and who holds what, the arithmetic of a step, memory by part, the command or the sbatch script, and whatever
a run would refuse or warn of.

  --measure      run the first steps here, of the very models, mesh and engines: seconds by stage, and what they come
                 to over an epoch and the run; nothing is left behind

examples
  distill plan
  distill plan --measure
  distill plan model=qwen3_1.7b_4b data.train.path=train.jsonl data.validation.path=test.jsonl
  distill plan cluster.ranks_per_node=2 mesh.tensor=2
""",
    "check": """\
distill check [OVERRIDES] - two minutes on the real models, mesh and engines, before hours are spent on them

Is the loss zero where teacher and student are the same model, and not zero otherwise? Do sampler, scorer and trainer
agree on log-probabilities? Is the loss the mean over all tokens, and the gradient its slope? Do a step, a sync and a
checkpoint do what they should? Each answer is a number against a limit, and a fix where it is not met (status 1).

examples
  distill check
  distill check model=qwen3_1.7b_4b data.train.path=train.jsonl data.validation.path=test.jsonl
  distill check cluster.ranks_per_node=2 mesh.context=2
""",
    "resume": """\
distill resume RUN|SWEEP [OVERRIDES] [--step N] [--wait] - go on where it left off, in the same folder

From the newest checkpoint that is whole, on any number of ranks and any mesh. Of a sweep, what did not finish. Keys
that have shaped the weights cannot be changed; the README lists those that can.

  --step N       from an earlier checkpoint; later ones are set aside

examples
  distill resume runs/latest
  distill resume runs/latest train.max_steps=2000      for longer
  distill resume runs/latest mesh.tensor=2             on another mesh
  distill resume runs/latest --step 40
""",
    "replay": """\
distill replay RUN [OVERRIDES] [--wait] - train again on what a run recorded, with another loss or another student

RUN is one that was trained with rollout.save_scores=true: its sequences, with the teacher's top-k, lie in its scores/.
They take the place of prompts, answers and the teacher, step by step, and no engine is started: only the student is
trained. It becomes a run of its own, on any number of ranks, which `resume`, `report` and `eval` take like any other.

Loss, optimizer, student, mesh and the like may be others; what shaped the recording may not, and loss.topk not larger.
Nothing is validated unless it is asked for (eval.period, eval.at_start, eval.at_end): that starts the student's engine.

examples
  distill replay runs/latest loss=reverse
  distill replay runs/latest loss.topk=16 train.lr=5e-4
  distill replay runs/latest eval.at_end=true
""",
    "watch": """\
distill watch RUN - follow a run in progress, wherever it runs

Reads the run's own files, so a job of another machine is followed where its folder is visible. Ends when the run
ends; Ctrl-C leaves the run alone.

examples
  distill watch runs/latest
""",
    "eval": """\
distill eval RUN|MODEL [--against RUN|MODEL|before|teacher ...] [--step N|best|last] [--json] [OVERRIDES]

Accuracy on a benchmark through vLLM: pass@1, pass@k, majority@k, length, truncated rate, with bootstrap 95% intervals
over the problems; against other models the paired difference and its p-value. Answers are kept as parquet.

  --against      further models; `before` and `teacher` are the run's own student before training, and its teacher
  --step         which checkpoint of a run
  --json         the result as JSON on standard output

examples
  distill eval runs/latest
  distill eval runs/latest --against before teacher
  distill eval runs/latest eval.repeat=4 eval.temperature=1.0 eval.max_samples=500
""",
    "export": """\
distill export RUN [DIR] [--step N|best|last] - a checkpoint as a Hugging Face folder

Sharded safetensors, config, generation config, tokenizer, chat template and a model card; transformers, vLLM and
`distill eval` load it. One process, no GPU, no more memory than the largest tensor needs.

  --step             which checkpoint: a step, the best by checkpoint.metric, or the last (the default)
  --max-shard-size   of one file, such as 5GB (the default)
  --adapter          of a LoRA student: the adapter alone, as peft has it
  --push NAME        to the hub

examples
  distill export runs/latest
  distill export runs/latest student_40 --step 40
  distill export runs/latest best --step best
""",
    "report": """\
distill report RUN|SWEEP... [--out FILE] - one self-contained HTML page about a run, or several compared

Also written at the end of every run. Final KL, loss and accuracy over what was swept are printed here.

  --out FILE     where the page goes; the default is report.html in the run's or sweep's folder

examples
  distill report runs/latest
  distill report runs/first runs/second --out both.html
""",
    "track": """\
distill track sync RUN|SWEEP... [--uri ADDRESS] - send trackers what they could not be sent before

A tracking server that was away delays no run. What it missed (metrics, parameters, tags, artifacts) follows by itself
when it is back, or by this command afterwards; what is there already is not sent again.

  --uri ADDRESS  send it to another server or database than the one that the run was tracked by

examples
  distill track sync runs/latest
""",
    "ls": """\
distill ls [GROUP] - the choices of a config group, each with its first comment line

examples
  distill ls               the groups
  distill ls loss
  distill ls data
""",
    "doctor": """\
distill doctor [--json] - what is installed, visible and reachable, and how to fix what is not

examples
  distill doctor
  distill doctor --json
""",
}
"""By verb."""
