"""Build a rank's tokenizer, prompts and validation from its config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from distill_cli.config.derived import validates
from distill_cli.data.isolated import IsolatedEnvironments, IsolatedVerifier
from distill_cli.data.prompts import PromptMaker, PromptSettings, load_template, load_tokenizer, make_prompts
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.models.model_pair import OWN_TEMPLATE, read_template
from distill_cli.parallel.mesh import Parallel
from distill_cli.ranks.build_engines import train_sampling
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.turns import Turns, observation_encoder
from distill_cli.train.validation import Validator, first_of_each


def build_tokenizer(resolved: ResolvedRun) -> PreTrainedTokenizerBase:
    """Load the tokenizer that prompts are rendered with."""
    model, folder = resolved.config.model, resolved.tokenizer.folder
    return load_tokenizer(folder, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)


def prompt_maker(resolved: ResolvedRun, tokenizer: PreTrainedTokenizerBase) -> PromptMaker:
    """Build the maker of prompts, which begin with the environment's opening if there is an environment."""
    environment = resolved.config.rollout.environment
    opening = IsolatedEnvironments(environment).make().reset if environment else None
    return PromptMaker(tokenizer, prompt_settings(resolved), opening=opening)


def prompt_settings(resolved: ResolvedRun) -> PromptSettings:
    """Return how examples become prompts."""
    data, model = resolved.config.data, resolved.config.model
    return PromptSettings(
        max_tokens=resolved.lengths.prompt,
        prompt_template=data.prompt_template,
        system_prompt=data.system_prompt,
        template_kwargs=model.chat_template_kwargs,
        overlong=data.overlong_prompts.value,
        teacher_max_tokens=resolved.lengths.teacher_prompt,
        teacher_chat_template=teacher_chat_template(resolved),
        teacher_template_kwargs=model.teacher.chat_template_kwargs,
        has_teacher_context=data.teacher_context is not None,
        teacher_prompt_template=data.teacher_prompt_template,
    )


def teacher_chat_template(resolved: ResolvedRun) -> str | None:
    """Return the text of the teacher's chat template; None is the student's."""
    template = resolved.config.model.teacher.chat_template
    if template == OWN_TEMPLATE:
        folder = resolved.model("teacher").folder
        return load_template(folder, trust_remote_code=resolved.config.model.trust_remote_code)
    return None if template is None else read_template(template)


def build_validator(resolved: ResolvedRun, parallel: Parallel, tokenizer: PreTrainedTokenizerBase) -> Validator | None:
    """Build the validation; None if the run has none."""
    config, settings = resolved.config, resolved.config.eval
    if config.data.validation is None or not validates(config):
        return None
    assert config.data.verifier is not None, "config.checks refuses a validation without one"
    examples = load_examples(config.data.validation, key="data.validation")
    limit = settings.max_samples if isinstance(examples, Stream) else None
    prompts = make_prompts(examples, prompt_maker(resolved, tokenizer), key="data.validation", limit=limit)
    sampling = replace(train_sampling(resolved), temperature=settings.temperature, top_p=settings.top_p)
    max_new_tokens = settings.max_new_tokens or sampling.max_new_tokens
    return Validator(
        prompts=first_of_each(prompts, settings.max_samples),
        repeat=settings.repeat,
        sampling=replace(sampling, max_new_tokens=max_new_tokens, top_k=0, logp=False),
        verify=IsolatedVerifier(config.data.verifier),
        decode=make_decode(tokenizer),
        turns=build_turns(resolved, tokenizer, max_tokens=resolved.lengths.validation),
        batch_size=settings.batch_size,
        seed=config.train.seed,
        parallel=parallel,
    )


def build_turns(resolved: ResolvedRun, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Turns | None:
    """Build the turns of the config's environment; None if it has none."""
    config, rollout = resolved.config, resolved.config.rollout
    if rollout.environment is None:
        return None
    ends = {tokenizer.eos_token_id, *rollout.stop_token_ids, *resolved.vocabulary.merged_eos_ids}
    if rollout.replay is None:
        ends |= {token for model in (resolved.student, resolved.teacher) if model for token in model.eos_ids}
    kwargs = config.model.chat_template_kwargs
    return Turns(
        make=IsolatedEnvironments(rollout.environment).make,
        max_turns=rollout.max_turns,
        max_tokens=max_tokens,
        decode=make_decode(tokenizer),
        observation_ids=observation_encoder(tokenizer, template_kwargs=kwargs, end_ids=ends),
    )


def make_decode(tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> Callable[[list[int]], str]:
    """Return the function from token ids to text."""
    return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
