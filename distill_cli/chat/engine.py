"""The engines of a chat: each in processes of its own, which end with this one, however it ends. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from distill_cli.chat.engine_settings import EnginePlan, memory_problems, plan_models, plan_teacher
from distill_cli.chat.setup import Pair, Setup
from distill_cli.engines.settings import SamplingSettings
from distill_cli.errors import DistillError, refuse
from distill_cli.jobs.engine_setup import engine_environment
from distill_cli.serving.engine_processes import EngineProcesses

if TYPE_CHECKING:
    from distill_cli.engines.stepwise import Piece


class ChatEngine:
    """Answers a token at a time, and scores: a `StepwiseTeacher`. Methods raise DistillError if it is gone."""

    def __init__(self, runner: asyncio.Runner, processes: EngineProcesses, *, topk: int) -> None:
        """Take the processes, which `start` starts.

        Args:
            runner: runs the calls.
            topk: most tokens of a position that it returns.
        """
        self.death: DistillError | None = None
        """Why the processes ended by themselves; None if they did not."""
        self._runner, self._processes, self._topk = runner, processes, topk

    async def start(self) -> None:
        """Start the processes and load the model. Raises DistillError if it cannot be loaded."""
        await self._processes.start(max_topk=self._topk, on_death=self._died, builder="start_stepwise")

    def _died(self, reason: DistillError) -> None:
        self.death = reason

    async def work(self, method: str, **arguments: Any) -> Any:
        """Return what a method returns; several engines may work at the same time."""
        (engine,) = self._processes.engines
        return await engine.call(method, **arguments)

    def call(self, method: str, **arguments: Any) -> Any:
        """Return what a method returns."""
        return self._runner.run(self.work(method, **arguments))

    def begin(self, prompt: list[int], *, seed: int, sampling: SamplingSettings) -> None:
        """Begin an answer; one that was not finished is dropped."""
        self.call("begin", prompt=prompt, seed=seed, sampling=sampling)

    def stop(self) -> None:
        """Drop the answer."""
        self.call("stop")

    def close(self) -> None:
        """End the processes; closing again does nothing."""
        self._processes.kill()


def advance(runner: asyncio.Runner, engines: Sequence[ChatEngine]) -> list[Piece]:
    """Let engines work at the same time, each on the next token of its answer; return what is new of each."""

    async def all_of_them() -> list[Piece]:
        return await asyncio.gather(*(engine.work("advance") for engine in engines))

    return runner.run(all_of_them())


@dataclass
class Engines:
    """Starts the engines of a chat, and ends all of them."""

    setup: Setup
    runner: asyncio.Runner
    output: IO[bytes] | None
    """A file for what they print; None is where this process prints."""
    _started: list[ChatEngine] = field(default_factory=list)

    def start_models(self, plans: Sequence[EnginePlan], *, meanwhile: Callable[[], None]) -> list[ChatEngine]:
        """Start the models' engines: on CPUs at once; on GPUs in turn, as each counts the memory that is free.

        Args:
            meanwhile: called in a thread, while they load.
        """
        engines = [
            self._engine(plan, topk=min(model.resolved.config.loss.topk, model.resolved.vocabulary.size))
            for plan, model in zip(plans, self.setup.models, strict=True)
        ]

        async def start() -> None:
            if self._on_gpus:
                for engine in engines:
                    await engine.start()
            else:
                await asyncio.gather(*(engine.start() for engine in engines))

        async def both() -> None:
            await asyncio.gather(start(), asyncio.to_thread(meanwhile))

        self.runner.run(both())
        return engines

    def start_teacher(self, pair: Pair) -> ChatEngine:
        """Start the engine of a teacher. Raises ConfigError if there is no room for it, DistillError if it fails."""
        plan = plan_teacher(self.setup, pair)
        refuse(memory_problems([*plan_models(self.setup), plan], self.setup.models[0].resolved.ranks))
        engine = self._engine(plan, topk=pair.alone.config.loss.topk)
        try:
            self.runner.run(engine.start())
        except BaseException:  # Ctrl-C too
            engine.close()
            raise
        return engine

    def close(self) -> None:
        """End all engines."""
        for engine in self._started:
            engine.close()

    @property
    def _on_gpus(self) -> bool:
        return self.setup.models[0].resolved.ranks.on_gpus

    def _engine(self, plan: EnginePlan, *, topk: int) -> ChatEngine:
        processes = EngineProcesses(
            plan.settings,
            num_ranks=plan.settings.tensor_parallel,
            on_gpus=self._on_gpus,
            env=engine_environment(self.setup.config.cluster, on_gpus=self._on_gpus),
            first_gpu=plan.seat.first_gpu,
            num_sharing=plan.seat.num_sharing,
            output=self.output,
        )
        engine = ChatEngine(self.runner, processes, topk=topk)
        self._started.append(engine)
        return engine
