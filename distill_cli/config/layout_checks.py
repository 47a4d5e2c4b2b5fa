"""Check how the ranks of a job are used: their mesh and their roles (`cluster.roles`). Reads the config alone."""

import math
from collections.abc import Iterator

from distill_cli.config.derived import num_sampling_ranks, scoring_ranks
from distill_cli.config.schema import Config, OffPolicy
from distill_cli.config.teachers import engine_key, teacher_configs

Problems = Iterator[tuple[str, str]]
"""Keys, each with the rule that its value breaks and the fix."""


def role_problems(config: Config) -> Problems:
    """Yield each key that the ranks' roles do not allow."""
    rollout, engine = config.rollout, config.engine.student
    if not (number := num_sampling_ranks(config)):
        return
    if engine.ranks == 0:
        yield "engine.student.ranks", "with cluster.roles=split some ranks sample; leave it out"
    engines = {"engine.student": (number, engine)}
    for name, ranks in scoring_ranks(config).items():
        engines[engine_key(name)] = ranks, teacher_configs(config)[name].engine.teacher
    for at, (ranks, one) in engines.items():
        if one.tensor_parallel >= 1 and ranks % one.tensor_parallel:
            fix = f"make it a multiple of {at}.tensor_parallel={one.tensor_parallel}"
            yield f"{at}.ranks", f"each engine has {one.tensor_parallel} ranks; {fix}"
    if rollout.score_while_sampling:
        yield "rollout.score_while_sampling", "other ranks sample (cluster.roles=split); leave it out"
    if rollout.guard_above is not None:
        yield "rollout.guard_above", "the ranks that sample have no teacher (cluster.roles=split); leave it out"
    if rollout.on_policy_fraction < 1 and rollout.off_policy is OffPolicy.teacher:
        rule = "the ranks that sample have no teacher (cluster.roles=split)"
        yield "rollout.off_policy", f"{rule}; set rollout.off_policy=dataset, or cluster.roles=shared"
    if any(one.model.teacher.is_student for one in teacher_configs(config).values()):
        yield "model.teacher.path", "the student's engine is on other ranks; set cluster.roles=shared"


def mesh_problems(config: Config, *, ranks_per_node: int) -> Iterator[str]:
    """Yield one line for each axis of the mesh that the ranks of the job cannot form."""
    sizes = {f"mesh.{name}": getattr(config.mesh, name) for name in ("tensor", "context", "expert", "replicate")}
    others = num_sampling_ranks(config) + sum(scoring_ranks(config).values())
    if (whole := ranks_per_node * config.cluster.nodes) <= others:
        rule = f"{others} of {whole} ranks sample or score, and none is left to train"
        yield f"cluster.roles=split: {rule}; take more ranks, or lower engine.student.ranks and engine.teacher.ranks"
        return
    num_ranks, product = whole - others, math.prod(sizes.values())
    yield from _engines_on_two_nodes(config, first=num_ranks, per_node=ranks_per_node)
    data_ranks = num_ranks // max(config.mesh.tensor * config.mesh.context, 1)
    if product >= 1 and num_ranks % product:
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        divisors = ", ".join(str(size) for size in range(1, num_ranks + 1) if num_ranks % size == 0)
        train = " that train" if others else ""
        yield f"{shown}: their product {product} must divide the {num_ranks} ranks{train}; make it one of {divisors}"
    elif data_ranks > config.train.global_batch_size:
        rule = f"fewer sequences than the {data_ranks} ranks that share them; raise it, or take fewer ranks"
        yield f"train.global_batch_size={config.train.global_batch_size}: {rule}"


def _engines_on_two_nodes(config: Config, *, first: int, per_node: int) -> Iterator[str]:
    """Yield one line for each role whose engines would span nodes; `first` is the first rank that does not train."""
    sizes = [("engine.student", num_sampling_ranks(config), config.engine.student.tensor_parallel)]
    for name, ranks in scoring_ranks(config).items():
        sizes.append((engine_key(name), ranks, teacher_configs(config)[name].engine.teacher.tensor_parallel))
    for at, ranks, tensor_parallel in sizes:
        size = max(tensor_parallel, 1)  # a smaller one is refused elsewhere
        if any(rank // per_node != (rank + size - 1) // per_node for rank in range(first, first + ranks, size)):
            rule = f"an engine of {size} ranks would span two nodes of {per_node}"
            yield f"{at}.ranks={ranks}: {rule}; choose numbers of ranks that are multiples of {size}"
        first += ranks
