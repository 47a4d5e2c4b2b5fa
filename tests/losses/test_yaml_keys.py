"""conf/loss names every divergence, and sets exactly the parameters that its function takes, to their defaults."""

from omegaconf import OmegaConf

from distill_cli.config.choices import conf_dir
from distill_cli.losses.divergence import DIVERGENCES, SIGNATURES


def test_every_divergence_has_a_yaml() -> None:
    files = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in (conf_dir() / "loss").glob("*.yaml")}
    assert files == {
        kl_type: {
            "kl_type": kl_type,
            **{name: taken.default for name, taken in SIGNATURES.parameters_of(kl_type).items()},
        }
        for kl_type in DIVERGENCES
    }
