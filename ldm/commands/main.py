"""``ldm VERB [overrides]``: one thin function a verb, composed with Hydra."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.logging import RichHandler

from ldm.commands.overrides import check_overrides, quote_templates, replace_free_form
from ldm.commands.run import is_sweep, run_folder
from ldm.errors import LdmError, nearest
from ldm.source import source_commit

VERBS = {
    "check": "read every file of a cohort and report all faults",
    "train-vae": "train the first stage",
    "train-ldm": "train the diffusion model on the first stage's latents",
    "train-gan": "train a GAN on the images, to compare with",
    "ema": "make the moving average of another length from a training's snapshots",
    "train-segmenter": "train the network that measures volumes in images",
    "train-predictor": "train the network that reads covariates from images",
    "train-matcher": "train the network that recognises training scans",
    "train-classifier": "train a classifier on the noisy latents of a diffusion model",
    "import-weights": "make one model file of published MONAI weights",
    "segment": "segment images with an ensemble, its uncertainty beside",
    "detect": "find what is not healthy in images, and show their healthy counterparts",
    "sample": "draw images with asked covariates",
    "edit": "change an image, go from one to another, or fill in a region",
    "release": "make a synthetic data set of many volumes",
    "evaluate": "measure samples against what was asked, and write a report",
    "compare": "measure models of one cohort alike, in one table",
    "audit": "look for copies of training scans among samples",
}
USAGE = "usage: ldm VERB [key=value ...]\n\n{verbs}\n\n`ldm VERB --help` explains a verb and lists its settings.\n"

logger = logging.getLogger("ldm")


def main() -> None:
    """Entry point of the console script."""
    try:
        try:
            _run(sys.argv[1:])
        finally:  # also on the way out of --help, which ends in SystemExit
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
        raise SystemExit(1) from None


def _run(arguments: Sequence[str]) -> None:
    verbs = "\n".join(f"  {verb:<17}{text}" for verb, text in VERBS.items())
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE.format(verbs=verbs))
        raise SystemExit(0 if arguments else 2)
    verb, *rest = quote_templates(arguments)
    configure_logging()
    try:
        if verb not in VERBS:
            raise LdmError(f"There is no verb '{verb}'.{nearest(verb, VERBS)} Legal: {', '.join(VERBS)}.")
        check_overrides(conf_dir(), verb, [item for item in rest if _is_override(item)])
    except LdmError as error:
        _fail(error)
    _run_hydra(verb, rest)


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def conf_dir() -> Path:
    """The Hydra tree: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def verb_function(verb: str) -> Callable[[DictConfig], object]:
    """The function behind a verb, imported only when it is used."""
    return import_module(f"ldm.commands.{verb.replace('-', '_')}").run


def configure_logging() -> None:
    """Messages of this package on the terminal, warnings of all others; only from the first process of a run."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.ERROR)
    for noisy in ("pytorch_lightning", "lightning.pytorch", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # torch's pytree inside Lightning
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # the moving average, meant so
    warnings.filterwarnings("ignore", ".*does not have many workers.*")


def _run_hydra(verb: str, arguments: Sequence[str]) -> None:
    original = list(sys.argv)

    def task(config: DictConfig) -> object:
        sys.argv = [original[0], *(job_arguments(verb) if is_sweep() else original[1:])]  # of further ranks
        function = verb_function(verb)
        source_commit()  # now, while it is that of the code that was imported
        configure_logging()  # after the imports, for some libraries set levels of their own
        try:
            with run_folder(config):
                return function(config)
        except LdmError as error:
            if is_sweep():
                raise
            _fail(error)

    flags = [item for item in arguments if not _is_override(item)]  # argparse wants these together, and first
    overrides = [item for item in arguments if _is_override(item)]
    sys.argv = [f"ldm {verb}", *flags, *replace_free_form(overrides)]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=verb)(task)()


def job_arguments(verb: str) -> list[str]:
    """The command of this one job of a sweep, for a rank that Lightning starts to run the same and not the sweep."""
    return [verb, *HydraConfig.get().overrides.task]


def _fail(error: LdmError) -> None:
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
    raise SystemExit(1)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
