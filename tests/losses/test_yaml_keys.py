"""conf/loss names every divergence and token weight, and sets exactly their parameters, to their defaults."""

from omegaconf import OmegaConf

from distill_cli.config.choices import conf_dir
from distill_cli.losses import divergence, token_weight

TERMS = {"policy_gradient", "reward", "no_teacher", "sft", "uld", "gold"}
"""Files that set other terms of the loss, or another alignment."""


def contents(folder: str) -> dict[str, object]:
    files = (conf_dir() / folder).glob("*.yaml")
    return {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in files}


def defaults(family: object, name: str) -> dict[str, object]:
    return {one: taken.default for one, taken in family.parameters_of(name).items()}


def test_every_divergence_has_a_yaml() -> None:
    files = {name: content for name, content in contents("loss").items() if name not in TERMS}
    names = divergence.DIVERGENCES
    assert files == {name: {"kl_type": name, **defaults(divergence.SIGNATURES, name)} for name in names}


def test_every_token_weight_has_a_yaml() -> None:
    names, family = token_weight.TOKEN_WEIGHTS, token_weight.SIGNATURES
    assert contents("loss/token_weight") == {name: {"token_weight": name, **defaults(family, name)} for name in names}


def test_parameters_have_names_of_their_own() -> None:
    assert not divergence.SIGNATURES.parameters.keys() & token_weight.SIGNATURES.parameters.keys()
