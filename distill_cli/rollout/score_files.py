"""Record each step's sequences with the teacher's scores (`Recorder`), and train on them again (`Replay`).

`data.recorded_run` lists the files. Each data rank writes the sequences that it trains on. The ranks of a replay, in
any number, read the tokens of every file, to plan the step, and the scores of their own sequences.

Shape letters: S sequences of a file, R response tokens of all of them, K the teacher's top-k.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from distill_cli.data.order import permutation
from distill_cli.data.recorded_run import FACTS, HEADS, STEP, TOKENS, Facts, Recording, step_folder, temporary_folder
from distill_cli.errors import ConfigError
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import read_json, write_json
from distill_cli.losses.groups import TokenGroups
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import Planner
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.stages import Stages
from distill_cli.types import Example, ModelHead, OwnText, Prompt, Rollout, Sample, Target, TeacherScores

log = logging.getLogger(__name__)

SAMPLE_FACTS = ("finish_reason", "num_turns", "source")
"""Fields of a sample that a file keeps as they are, as JSON."""


class Recorder:
    """Write steps. Every rank has one and calls it at the same steps: a collective."""

    def __init__(self, root: Path, facts: Facts, parallel: Parallel) -> None:
        self._root, self._parallel = root, parallel
        if parallel.is_main:
            root.mkdir(exist_ok=True)
            write_json(root / FACTS, asdict(facts))

    def write(self, step: int, batch: ScoredBatch) -> None:
        """Write a step; if it cannot be written (a full disk), log a warning: a replay ends before it."""
        temporary, parallel = temporary_folder(self._root, step), self._parallel
        mine: dict[str, Any] | OSError = {}
        try:
            # Ranks that share sequences have the same scores; the first of them writes.
            if batch.scores and parallel.context.get_local_rank() == parallel.tensor.get_local_rank() == 0:
                temporary.mkdir(parents=True, exist_ok=True)
                file = temporary / f"rank_{parallel.data_rank}.safetensors"
                write_sequences(file, batch.rollouts, batch.scores)
                mine = atomic_dir.describe([file])
        except OSError as error:
            mine = error
        everyone: list[dict[str, Any] | OSError] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if parallel.is_main:
            self._seal(step, temporary, batch, everyone)

    def _seal(
        self, step: int, temporary: Path, batch: ScoredBatch, everyone: Sequence[dict[str, Any] | OSError]
    ) -> None:
        """Complete a step's folder from the ranks' manifest entries, or remove it after a rank's error."""
        try:
            if errors := [part for part in everyone if isinstance(part, OSError)]:
                raise errors[0]
            entries = {name: entry for part in everyone if isinstance(part, dict) for name, entry in part.items()}
            rollouts = batch.rollouts
            lengths = [len(rollout.token_ids) for rollout in rollouts]
            facts = {
                "num_sequences": len(rollouts),
                "num_tokens": sum(lengths),
                "longest_response": max(len(rollout.sample.token_ids) for rollout in rollouts),
                "longest_sequence": max(lengths),
                "slots": batch.slots,
            }
            write_json(temporary / STEP, facts)
            atomic_dir.seal(temporary, step_folder(self._root, step), entries | atomic_dir.describe([temporary / STEP]))
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            log.warning("cannot keep the scores of step %d (%s): a replay ends before it", step, error.strerror)


def write_sequences(file: Path, rollouts: Sequence[Rollout], scores: Mapping[int, TeacherScores]) -> None:
    """Write the sequences of a step that have scores, and the scores, as one safetensors file."""
    rollouts, whole = [rollouts[place] for place in scores], TeacherScores.cat(list(scores.values()))
    samples = [rollout.sample for rollout in rollouts]
    logps = (sample.logp if sample.logp is not None else [0.0] * len(sample.token_ids) for sample in samples)
    masks = (sample.trained or [True] * len(sample.token_ids) for sample in samples)
    token_ids = chain.from_iterable(rollout.token_ids for rollout in rollouts)
    tensors = {
        "places": torch.tensor(list(scores)),
        "prompt_lengths": torch.tensor([len(rollout.context_ids) for rollout in rollouts]),
        "response_lengths": torch.tensor([len(sample.token_ids) for sample in samples]),
        "token_ids": torch.tensor(list(token_ids), dtype=torch.int32),
        "trained": torch.tensor(list(chain.from_iterable(masks)), dtype=torch.bool),
        "sampler_logp": torch.tensor(list(chain.from_iterable(logps))),
        **(
            {"hidden": whole.hidden.contiguous()}
            if whole.hidden.shape[1]
            else {
                "topk_ids": whole.topk_ids.contiguous(),
                "topk_logp": whole.topk_logp.contiguous(),
                "teacher_logp": whole.sampled_logp.contiguous(),
            }
        ),
        **({"alignment": whole.alignment.contiguous()} if whole.alignment.shape[1] else {}),
        **_text_tensors(list(scores.values())),
    }
    facts = [
        {
            "prompt_index": rollout.prompt.index,
            "has_logp": rollout.sample.logp is not None,
            "has_observations": rollout.sample.trained is not None,
            "reward": rollout.reward,
            "carried": [] if (part := rollout.carried) is None else [len(part.token_ids), part.num_trained],
            "teachers": [[target.teacher, target.weight] for target in rollout.prompt.targets],
            **{name: getattr(rollout.sample, name) for name in SAMPLE_FACTS},
        }
        for rollout in rollouts
    ]
    save_file(tensors, file, metadata={"sequences": json.dumps(facts)})


def _text_tensors(parts: Sequence[TeacherScores]) -> dict[str, torch.Tensor]:
    """Return the texts of teachers with tokenizers of their own; nothing if no teacher has one."""
    if all(part.text is None for part in parts):
        return {}
    texts = [part.text or OwnText.plain(len(part.sampled_logp)) for part in parts]
    lengths = [[len(column) for column in (one.token_ids, one.begun, one.moves, one.splits)] for one in texts]
    columns = {f"text_{name}": torch.cat([getattr(one, name) for one in texts]) for name in vars(texts[0])}
    return {"text_lengths": torch.tensor(lengths).reshape(-1, 4)} | columns


def read_sequences(file: Path) -> dict[int, Rollout]:
    """Return the sequences of a file by place in the step. Raises ConfigError if the file cannot be read."""
    names = ("places", "prompt_lengths", "response_lengths", "token_ids", "trained", "sampler_logp")
    try:
        with safe_open(file, framework="pt") as stored:
            facts = json.loads(stored.metadata()["sequences"])
            places, prompts, responses, *flat = (stored.get_tensor(name).tolist() for name in names)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged ({type(error).__name__}: {error})") from error
    token_ids, trained, logp = map(iter, flat)
    by_place = {}
    for place, num_prompt, num_response, fact in zip(places, prompts, responses, facts, strict=True):
        targets = tuple(Target(*one) for one in fact.get("teachers", [[0, 1.0]]))  # older files have none
        context, carried = list(islice(token_ids, num_prompt)), None
        if sizes := fact.get("carried"):  # of these, the number of trained ones alone matters
            number, num_trained = sizes
            trained_flags = [index < num_trained for index in range(number)]
            carried, context = Sample(context[-number:], None, "", trained=trained_flags), context[:-number]
        prompt = Prompt(fact["prompt_index"], context, Example(""), targets)
        ids, mask, logps = (list(islice(values, num_response)) for values in (token_ids, trained, logp))
        sample = Sample(
            ids,
            logps if fact["has_logp"] else None,
            trained=mask if fact["has_observations"] else None,
            **{name: fact[name] for name in SAMPLE_FACTS},
        )
        by_place[place] = Rollout(prompt, sample, reward=fact["reward"], carried=carried)
    return by_place


def read_scores(file: Path, places: set[int], *, topk: int) -> dict[int, TeacherScores]:
    """Return the file's scores of the sequences at `places`: `topk` tokens of each position, or hidden states."""
    by_place = {}
    with safe_open(file, framework="pt") as stored:
        lengths = stored.get_tensor("response_lengths").tolist()
        hidden_RH = stored.get_slice("hidden") if "hidden" in stored.keys() else None  # noqa: SIM118
        alignment_R2 = stored.get_slice("alignment") if "alignment" in stored.keys() else None  # noqa: SIM118
        texts = _read_texts(stored, lengths) if "text_lengths" in stored.keys() else None  # noqa: SIM118
        if hidden_RH is None:
            ids_RK, logp_RK, sampled_R = (stored.get_slice(name) for name in ("topk_ids", "topk_logp", "teacher_logp"))
        found = zip(stored.get_tensor("places").tolist(), accumulate(lengths), lengths, strict=True)
        for index, (place, end, length) in enumerate(found):
            if place in places:
                rows = slice(end - length, end)
                if hidden_RH is not None and texts is not None:
                    by_place[place] = TeacherScores.of_hidden(hidden_RH[texts[index][0]], texts[index][1])
                elif hidden_RH is not None:
                    by_place[place] = TeacherScores.of_hidden(hidden_RH[rows])
                else:
                    topk_of = ids_RK[rows, :topk], logp_RK[rows, :topk], sampled_R[rows]
                    by_place[place] = TeacherScores.of_topk(*topk_of)
                if alignment_R2 is not None:
                    text = None if texts is None else texts[index][1]
                    by_place[place] = replace(by_place[place], alignment=alignment_R2[rows], text=text)
    return by_place


def _read_texts(stored: Any, lengths: Sequence[int]) -> list[tuple[slice, OwnText]]:
    """Return each sequence's text, after the rows of its hidden states."""
    counts = stored.get_tensor("text_lengths")
    sizes = torch.cat([counts[:, :1], torch.tensor(lengths)[:, None], counts[:, 1:]], dim=1).T.tolist()
    names = ("token_ids", "places", "begun", "moves", "splits")
    columns = [stored.get_tensor(f"text_{name}").split(one) for name, one in zip(names, sizes, strict=True)]
    ends = accumulate(sizes[0])
    rows = [slice(end - size, end) for end, size in zip(ends, sizes[0], strict=True)]
    return [(one, OwnText(*parts)) for one, *parts in zip(rows, *columns, strict=True)]


def write_head(root: Path, teacher: int, first: int, head: ModelHead) -> None:
    """Write rows of a teacher's head, from id `first` on, unless they are there."""
    file = root / HEADS / f"{teacher}_{first}.safetensors"
    if file.exists():
        return
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".tmp")
    tensors = {"weight": head.weight.contiguous()} | ({} if head.bias is None else {"bias": head.bias.contiguous()})
    save_file(tensors, temporary, metadata={"scale": repr(head.scale), "soft_cap": repr(head.soft_cap or 0.0)})
    temporary.rename(file)


def read_head(root: Path, teacher: int, rows: tuple[int, int]) -> ModelHead:
    """Return rows of a recorded head, fewer where it has fewer. Raises ConfigError if a file is damaged or missing."""
    parts, (begin, end) = [], rows
    files = {int(file.stem.partition("_")[2]): file for file in (root / HEADS).glob(f"{teacher}_*.safetensors")}
    try:
        for first, file in sorted(files.items()):
            with safe_open(file, framework="pt") as stored:
                weight, metadata = stored.get_slice("weight"), stored.metadata()
                own = slice(max(begin - first, 0), max(end - first, 0))
                bias = stored.get_slice("bias")[own] if "bias" in stored.keys() else None  # noqa: SIM118
                parts.append(
                    ModelHead(weight[own], bias, float(metadata["scale"]), float(metadata["soft_cap"]) or None)
                )
        weight, biases = torch.cat([part.weight for part in parts]), [one.bias for one in parts if one.bias is not None]
        return replace(parts[0], weight=weight, bias=torch.cat(biases) if biases else None)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        what = f"the head of teacher {teacher} cannot be read ({type(error).__name__}: {error})"
        raise ConfigError(f"{root / HEADS}: {what}; restore it") from error


def write_tokens(root: Path, teacher: int, firsts: torch.Tensor, groups: TokenGroups) -> None:
    """Write what the tokens of a teacher with a tokenizer of its own are to the student.

    Args:
        firsts: by id of its tokens, the student's first one.
    """
    file = root / TOKENS / f"{teacher}.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file({"firsts": firsts.contiguous(), **vars(groups)}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").rename(file)


def read_tokens(root: Path, teacher: int) -> tuple[torch.Tensor, TokenGroups] | None:
    """Return what `write_tokens` wrote; None if the teacher has the student's tokens. Raises ConfigError."""
    file = root / TOKENS / f"{teacher}.safetensors"
    if not file.exists():
        return None
    try:
        tensors = load_file(file)
        return tensors.pop("firsts"), TokenGroups(**tensors)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        what = f"the tokens of teacher {teacher} cannot be read ({type(error).__name__}: {error})"
        raise ConfigError(f"{file}: {what}; restore it") from error


class RecordedSteps:
    """Read recorded steps; the first step follows the last one."""

    def __init__(
        self, recording: Recording, *, topk: int, parallel: Parallel, seed: int = 0, shuffle: bool = False
    ) -> None:
        """Build the order of the steps.

        Args:
            topk: the loss's: only the likeliest of the recorded tokens are read.
            shuffle: draw the order of all but the last step from `seed`, anew for each pass.
        """
        self._recording, self._topk, self._parallel = recording, topk, parallel
        self._seed, self._shuffle = seed, shuffle
        self.steps_per_epoch = recording.num_steps
        self.fingerprint = atomic_dir.sha256(step_folder(recording.folder, 1) / atomic_dir.MANIFEST)
        """Identifies the recording."""

    def rollouts(self, step: int) -> list[Rollout]:
        """Read the sequences of `step`, counted from 1, from the files of all ranks. A collective.

        Raises:
            ConfigError: on all ranks, if a file is damaged.
        """
        folder = self._folder(step)
        problem = [atomic_dir.damage(folder) if self._parallel.is_main else None]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise ConfigError(f"{folder}: damaged: {problem[0]}; restore it, or end before it with train.max_steps")
        by_place = {place: rollout for file in _files(folder) for place, rollout in read_sequences(file).items()}
        return [by_place[place] for place in range(len(by_place))]

    def slots(self, step: int) -> list[int] | None:
        """Read `ScoredBatch.slots` of a step."""
        slots: list[int] | None = read_json(self._folder(step) / STEP).get("slots")  # older recordings have none
        return slots

    def scores(self, step: int, places: Sequence[int]) -> dict[int, TeacherScores]:
        """Read the teacher's scores of the sequences at these places, in their order."""
        files = _files(self._folder(step))
        by_place = {k: v for file in files for k, v in read_scores(file, set(places), topk=self._topk).items()}
        return {place: by_place[place] for place in places}

    def _folder(self, step: int) -> Path:
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        others = permutation(self.steps_per_epoch - 1, seed=f"{self._seed}-{epoch}", shuffle=self._shuffle)
        return step_folder(self._recording.folder, [*others, self.steps_per_epoch - 1][place] + 1)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@dataclass
class Replay(RolloutSource):
    """Train on recorded steps; each rank reads the scores of its own sequences."""

    recorded: RecordedSteps
    planner: Planner
    stages: Stages

    def step(self, step: int) -> ScoredBatch:
        self.stages.check_stop(within_s=self.stages.longest_s)
        with self.stages("read"):
            rollouts = self.recorded.rollouts(step)
            plans = self.planner.plan(rollouts, self.recorded.slots(step))
            scores = self.recorded.scores(step, self.planner.local_places(plans))
        return ScoredBatch(rollouts, plans, scores, is_current=False)
